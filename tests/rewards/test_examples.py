"""The examples of rewards: each runs, on tiny random networks of the real architecture and, when chosen, for real."""

from __future__ import annotations

import importlib
import math
from pathlib import Path

import pytest
import torch
import transformers

from entrgi import packaged, tiny

FOLDER = Path(__file__).parents[2] / "examples" / "rewards"
NAMES = ("classifier", "likelihood", "judge", "similarity", "weighted_sum", "function")
SMALL = {"num_samples": 2, "max_new_tokens": 6, "steps": 2, "guidance_steps": 1}


@pytest.fixture
def example(monkeypatch):
    """Imports an example as its command line does: its folder first in the path."""
    monkeypatch.syspath_prepend(str(FOLDER))
    return importlib.import_module


@pytest.fixture(scope="module")
def random_networks(build):
    """Stands for (model, tokenizer) of each example."""
    words = build["byte-level"]()
    words.add_tokens(["yes", "no"])
    small = dict(hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4)
    torch.manual_seed(0)
    llama = transformers.LlamaForCausalLM(transformers.LlamaConfig(vocab_size=len(words), **small)).eval()
    pieces = build["wordpiece"](chat_template=None)
    bert = transformers.BertModel(transformers.BertConfig(vocab_size=len(pieces), **small)).eval()
    causal, encoder = (llama, words), (bert, pieces)
    return {
        "classifier": tiny.load_reward(), "likelihood": causal, "judge": causal, "similarity": encoder,
        "weighted_sum": encoder, "function": tiny.load_diffusion(),
    }  # fmt: skip


def test_every_file_is_an_example():
    assert {path.stem for path in FOLDER.glob("*.py")} == {*NAMES, "before_after"}


@pytest.mark.parametrize("name", NAMES)
def test_on_random_networks(example, random_networks, name, capsys):
    reward = example(name).make(*random_networks[name])
    found = example("before_after").before_after(reward, ["How was the inn?"], **SMALL)
    assert len(found) == 4 and all(math.isfinite(value) for value in found.values())
    printed = capsys.readouterr().out
    assert f"{found['none mean']:+.3f} -> {found['entrgi mean']:+.3f}" in printed
    assert ("of the best: SequenceClassifier" in printed) == (name == "weighted_sum")


@pytest.fixture(scope="module")
def real_networks():
    causal, encoder = packaged.load_smollm2(), packaged.load_minilm()
    return {"likelihood": causal, "judge": causal, "similarity": encoder, "weighted_sum": encoder}


@pytest.mark.real
@pytest.mark.parametrize("name", ["likelihood", "judge", "similarity", "weighted_sum"])
def test_for_real(example, real_networks, name):
    """Published models: guided to the end, their vocabularies mostly covered, all savings in use."""
    reward = example(name).make(*real_networks[name])
    settings = {"num_samples": 2, "max_new_tokens": 12, "steps": 6, "guidance_steps": 2}
    found = example("before_after").before_after(reward, ["How was the noodle bar?"], **settings)
    assert all(math.isfinite(value) for value in found.values())
    if name in ("likelihood", "judge"):
        assert not reward.savings_off, "every saving is in use"
        diffusion, tokenizer = tiny.load_diffusion()
        assert reward.vocabulary_map(tokenizer, diffusion.config.vocab_size).coverage > 0.7


@pytest.mark.real
def test_real_models_say_what_they_should(real_networks):
    """What a person would say; a judge of this size follows the wording more, so it is held to its own odds."""
    from entrgi_kernels.rewards import JudgeReward, LikelihoodReward, SimilarityReward

    question = [[{"role": "user", "content": "What is the capital of France?"}]] * 2
    likely = LikelihoodReward(*real_networks["likelihood"])
    good, bad = likely.score_texts(question, ["The capital of France is Paris.", "Paris the is France capital of."])
    assert good > bad + 1
    judge = JudgeReward(*real_networks["judge"], "Is the response about food?")
    lm, words = real_networks["judge"]
    content = judge.ask(question[0], "Pizza is delicious.")
    ids = words.apply_chat_template(content, add_generation_prompt=True, tokenize=True, return_dict=False)
    with torch.no_grad():
        p = lm(torch.tensor([ids])).logits[0, -1].softmax(-1)
    assert {"yes", "Yes", "YES"} >= {words.decode([i]).strip() for i in judge.yes_ids} >= {"yes", "Yes"}
    odds = (p[judge.yes_ids].sum().log() - p[judge.no_ids].sum().log()).item()
    assert judge.score_texts(question[:1], ["Pizza is delicious."]) == pytest.approx([odds], abs=1e-3)
    near = SimilarityReward(*real_networks["similarity"], "The soup was delicious.")
    same, other = near.score_texts(question, ["I loved the tasty soup.", "Stock prices fell on Monday."])
    assert same > 0.6 > 0.3 > other


@pytest.mark.real
def test_minilm_is_pooled_as_its_authors_do(real_networks):
    """The reference similarity is computed by sentence-transformers where it is installed."""
    sentence_transformers = pytest.importorskip("sentence_transformers")
    from entrgi_kernels.rewards import SimilarityReward

    model, tokenizer = real_networks["similarity"]
    texts = ["The soup was delicious.", "I loved the tasty soup.", "Stock prices fell on Monday, said the bank."]
    theirs = sentence_transformers.SentenceTransformer(model.config._name_or_path, device="cpu").encode(texts)
    theirs = torch.nn.functional.cosine_similarity(torch.tensor(theirs[:1]), torch.tensor(theirs))
    reward = SimilarityReward(model, tokenizer, texts[0])
    assert reward.pooling == "mean" and reward.max_length == 256
    assert reward.score_texts([[]] * 3, texts) == pytest.approx(theirs.tolist(), abs=1e-5)
