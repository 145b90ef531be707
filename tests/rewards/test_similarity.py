"""The similarity reward: cosines of sentence embeddings, pooled as the model's own files say."""

from __future__ import annotations

import json

import pytest
import torch
import transformers

from entrgi_kernels import rewards
from entrgi_kernels.rewards import SimilarityReward

SHORT = [{"role": "user", "content": "Hello"}]
TARGET = "The food was tasty."
TEXTS = ["The food was tasty.", "Nothing else", "", "the waiter was friendly and the place tiny, again"]


@pytest.fixture(scope="module")
def words(build):
    """A WordPiece tokenizer that wraps texts in special tokens, as BERT's does."""
    from tokenizers.processors import TemplateProcessing

    tokenizer = build["wordpiece"](specials=["[CLS]", "[SEP]", "[PAD]"], chat_template=None)
    tokenizer.add_special_tokens({"pad_token": "[PAD]", "cls_token": "[CLS]", "sep_token": "[SEP]"})
    marks = [(token, tokenizer.convert_tokens_to_ids(token)) for token in ("[CLS]", "[SEP]")]
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(single="[CLS] $A [SEP]", special_tokens=marks)
    return tokenizer


def encoder(size: int, kind: str = "Bert", dtype=torch.float64, **changes) -> torch.nn.Module:
    torch.manual_seed(0)
    settings = dict(hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4, pad_token_id=3)
    config = getattr(transformers, f"{kind}Config")(vocab_size=size, initializer_range=0.3, **settings, **changes)
    return getattr(transformers, f"{kind}Model")(config).to(dtype).eval()


def sentence(module, ids: list[int], pooling: str) -> torch.Tensor:
    with torch.no_grad():
        hidden = module(torch.tensor([ids])).last_hidden_state[0]
    return {"mean": hidden.mean(0), "cls": hidden[0], "max": hidden.amax(0), "last": hidden[-1]}[pooling]


@pytest.mark.parametrize("kind", ["Bert", "Roberta"])
@pytest.mark.parametrize("pooling", ["mean", "cls", "max", "last"])
def test_texts_and_embeddings_give_the_models_own_cosine(words, kind, pooling):
    module = encoder(len(words), kind)
    reward = rewards.wrap(module, words, target=TARGET)
    assert isinstance(reward, SimilarityReward) and reward.pooling == "mean"  # nothing else is said
    reward = SimilarityReward(module, words, TARGET, pooling=pooling)
    aim = sentence(module, words(TARGET)["input_ids"], pooling)
    expected = [torch.cosine_similarity(sentence(module, words(t)["input_ids"], pooling), aim, dim=0) for t in TEXTS]
    for batch_size in (1, 8):
        found = reward.score_texts([SHORT] * len(TEXTS), TEXTS, batch_size=batch_size)
        assert found == pytest.approx([value.item() for value in expected], abs=1e-9)
    assert found[0] == pytest.approx(1, abs=1e-9) and min(found) < 0.99
    # The same from embeddings, with dead slots at the end, in the middle, and the slot that ends a response.
    table = reward.embedding_table(words, len(words))
    tokens = torch.full((len(TEXTS), 16), words.sep_token_id)
    alive, ended = torch.zeros(tokens.shape, dtype=torch.bool), torch.zeros(tokens.shape, dtype=torch.bool)
    for row, text in enumerate(TEXTS):
        ids = words(text, add_special_tokens=False)["input_ids"]
        places = [*range(len(ids))] if row else [1, 2, *range(5, 5 + len(ids) - 2)]
        tokens[row, places], alive[row, places] = torch.tensor(ids, dtype=torch.long), True
        alive[row, len(ids) + 3] = ended[row, len(ids) + 3] = True
    given = table[tokens].clone().requires_grad_()
    index = torch.zeros(len(TEXTS), dtype=torch.long)
    value = reward.score_embeddings(reward.prepare([SHORT]), index, given, alive, ended=ended)
    assert value.tolist() == pytest.approx(found, abs=1e-9)
    value.sum().backward()
    live = alive & ~ended
    assert (given.grad[~live] == 0).all() and given.grad[1][live[1]].abs().max() > 0
    assert all(parameter.grad is None for parameter in module.parameters())


def test_their_own_files_say_how_to_pool(words, tmp_path):
    module = encoder(len(words))
    module.save_pretrained(tmp_path)
    (tmp_path / "modules.json").write_text(json.dumps([
        {"type": "sentence_transformers.models.Transformer", "path": ""},
        {"type": "sentence_transformers.models.Pooling", "path": "1_Pooling"},
        {"type": "sentence_transformers.models.Normalize", "path": "2_Normalize"},
    ]))  # fmt: skip
    (tmp_path / "sentence_bert_config.json").write_text('{"max_seq_length": 6}')
    (tmp_path / "1_Pooling").mkdir()
    settings = tmp_path / "1_Pooling" / "config.json"

    def load(**options) -> SimilarityReward:
        loaded = transformers.AutoModel.from_pretrained(tmp_path, dtype=torch.float64)
        return SimilarityReward(loaded, words, TARGET, **options)

    settings.write_text('{"pooling_mode_cls_token": true, "pooling_mode_mean_tokens": false}')
    reward = load()
    assert (reward.pooling, reward.max_length) == ("cls", 6)
    settings.write_text('{"pooling_mode": "lasttoken"}')
    assert load().pooling == "last"
    # What is longer is cut, special tokens kept, and so are embeddings.
    ids = words(TEXTS[3], add_special_tokens=False)["input_ids"]
    cut = [words.cls_token_id, *ids[:4], words.sep_token_id]
    assert reward.encode(SHORT, TEXTS[3]) == cut
    given = reward.embedding_table(words, len(words))[torch.tensor([ids])]
    alive = torch.ones(1, len(ids), dtype=torch.bool)
    value = reward.score_embeddings(reward.prepare([SHORT]), torch.tensor([0]), given, alive)
    assert value.tolist() == pytest.approx(reward.score_texts([SHORT], [TEXTS[3]]), abs=1e-9)
    settings.write_text('{"pooling_mode_mean_tokens": true, "pooling_mode_weightedmean_tokens": true}')
    with pytest.raises(ValueError, match="pools by .*weightedmean.*pass pooling="):
        load()
    assert load(pooling="max", max_length=9).max_length == 9
    (tmp_path / "modules.json").write_text('[{"type": "sentence_transformers.models.Dense", "path": "3_Dense"}]')
    with pytest.raises(ValueError, match="modules of type Dense"):
        load()


def save(module, folder, network: str = "") -> None:
    """A sentence-embedding model as sentence-transformers writes it: by its first token, of 20 tokens at most."""
    module.save_pretrained(folder / network)
    (folder / "modules.json").write_text(json.dumps([
        {"type": "sentence_transformers.models.Transformer", "path": network},
        {"type": "sentence_transformers.models.Pooling", "path": "1_Pooling"},
    ]))  # fmt: skip
    (folder / network / "sentence_bert_config.json").write_text('{"max_seq_length": 20}')
    (folder / "1_Pooling").mkdir()
    (folder / "1_Pooling" / "config.json").write_text('{"pooling_mode_cls_token": true}')


@pytest.mark.parametrize("name", ["emb", "./emb", "some/where/emb"])
def test_files_that_a_relative_path_no_longer_leads_to(words, tmp_path, monkeypatch, name):
    save(encoder(len(words), max_position_embeddings=64), tmp_path / name)
    monkeypatch.chdir(tmp_path)
    module = transformers.AutoModel.from_pretrained(name)
    reward = SimilarityReward(module, words, TARGET)
    assert (reward.pooling, reward.max_length) == ("cls", 20)
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    for given in ({}, {"pooling": "cls"}, {"max_length": 20}):
        with pytest.raises(ValueError, match=f"loaded from '{name}'.*modules.json.*pass pooling= and max_length="):
            SimilarityReward(module, words, TARGET, **given)
    assert SimilarityReward(module, words, TARGET, pooling="cls", max_length=20).max_length == 20


def test_a_cache_without_the_files_that_say_how_to_pool(words, tmp_path, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    commit = "0" * 40
    repository = tmp_path / "models--somebody--emb"
    snapshot = repository / "snapshots" / commit
    save(encoder(len(words), max_position_embeddings=64), snapshot)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text(commit)
    module = transformers.AutoModel.from_pretrained("somebody/emb")
    reward = SimilarityReward(module, words, TARGET)
    assert (reward.pooling, reward.max_length) == ("cls", 20)
    (snapshot / "modules.json").unlink()
    with pytest.raises(ValueError, match="loaded from 'somebody/emb'.*modules.json cannot be looked for"):
        SimilarityReward(module, words, TARGET)
    # The Hub's own mark that there is no such file.
    for missing in ("modules.json", "sentence_bert_config.json"):
        (snapshot / missing).unlink(missing_ok=True)
        (repository / ".no_exist" / commit).mkdir(parents=True, exist_ok=True)
        (repository / ".no_exist" / commit / missing).touch()
    reward = SimilarityReward(module, words, TARGET)
    assert (reward.pooling, reward.max_length) == ("mean", 64)


def test_a_network_in_a_folder_of_its_own(words, tmp_path):
    save(encoder(len(words)), tmp_path, "0_Transformer")
    folder = tmp_path / "0_Transformer"
    (folder / "sentence_bert_config.json").rename(folder / "sentence_roberta_config.json")
    module = transformers.AutoModel.from_pretrained(folder)
    module.config.model_type = "roberta"
    reward = SimilarityReward(module, words, TARGET)
    assert (reward.pooling, reward.max_length) == ("cls", 20)


def test_damaged_files_are_named(words, tmp_path):
    save(encoder(len(words)), tmp_path)
    module = transformers.AutoModel.from_pretrained(tmp_path)
    for name, text in (("modules.json", "[{"), ("sentence_bert_config.json", "[]"), ("1_Pooling/config.json", "3")):
        before = (tmp_path / name).read_text()
        (tmp_path / name).write_text(text)
        with pytest.raises(ValueError, match=f"{name} is damaged"):
            SimilarityReward(module, words, TARGET)
        (tmp_path / name).write_text(before)


def test_errors(words):
    module = encoder(len(words))
    with pytest.raises(TypeError, match="BertModel has no head.*target="):
        rewards.wrap(module, words)
    with pytest.raises(ValueError, match="expected a text to come close to"):
        rewards.wrap(module, words, target=" ")
    with pytest.raises(ValueError, match="pooling=.*: expected one of 'mean', 'cls'"):
        SimilarityReward(module, words, TARGET, pooling="median")
    with pytest.raises(TypeError, match="pass one of them"):
        rewards.wrap(module, words, target=TARGET, question="Is it?")
