"""The shipped weights: there, intact, and fit for their job."""

import json

import pytest
import torch

from entrgi import tiny
from entrgi.tiny import data, diffusion, grammar
from entrgi.tiny import train as tiny_train
from entrgi.tiny.tokenizer import prompt_ids, split_chat


@pytest.fixture(scope="module")
def lm():
    return tiny.load_diffusion()


@pytest.fixture(scope="module", params=["reward", "judge"])
def scorer(request):
    return tiny.load_reward() if request.param == "reward" else tiny.load_judge()


def score(model, tokenizer, pairs):
    """Plain scoring, through nothing but the public interface of transformers."""
    rows = [
        tokenizer.apply_chat_template(
            [{"role": "user", "content": p}, {"role": "assistant", "content": t}], tokenize=False
        )
        for p, t in pairs
    ]
    with torch.no_grad():
        return model(**tokenizer(rows, return_tensors="pt", padding=True)).logits[:, 0]


@pytest.mark.parametrize("name", tiny.MODELS)
def test_checksums_match(name):
    record = json.loads((tiny_train.WEIGHTS / "checksums.json").read_text())[name]
    assert tiny_train.sha256(tiny.weights_path(name) / "model.safetensors") == record["model.safetensors"]


def test_size_and_tokenizers():
    files = [p for p in tiny_train.WEIGHTS.rglob("*") if p.is_file()]
    assert sum(p.stat().st_size for p in files) < 8 * 2**20
    assert len({(tiny.weights_path(name) / "tokenizer.json").read_bytes() for name in tiny.MODELS}) == 1


def test_bad_names_and_missing_weights(monkeypatch, tmp_path):
    with pytest.raises(ValueError, match="diffusion, reward, judge"):
        tiny.weights_path("critic")
    monkeypatch.setattr(tiny_train, "WEIGHTS", tmp_path)
    with pytest.raises(FileNotFoundError, match="entrgi tiny train"):
        tiny.load_reward()


def test_special_tokens(lm):
    model, tokenizer = lm
    assert tokenizer.mask_token == "<|mask|>" and tokenizer.eos_token == "<|endoftext|>"
    assert tokenizer.eos_token_id == tokenizer.pad_token_id == model.config.pad_token_id == model.config.eos_token_id
    assert tokenizer.padding_side == "left"
    marker = model.config.entrgi
    assert marker["kind"] == "masked_diffusion" and marker["shift"] is True
    assert marker["mask_token_id"] == tokenizer.mask_token_id
    assert (marker["prompt_slots"], marker["response_slots"]) == (24, 32)
    assert model.config.vocab_size == len(tokenizer)


def test_tokenizer_round_trip(lm):
    tokenizer = lm[1]
    texts = [r.text for r in grammar.reviews(50, seed=77)] + ["Größe: 3 × 4\n\t§ 語", "<|im_end|> in the text"]
    for text in texts:
        assert tokenizer.decode(tokenizer(text)["input_ids"]) == text
    assert tokenizer("<|mask|>")["input_ids"] == [tokenizer.mask_token_id]
    assert len(tokenizer("The waiter was friendly.")["input_ids"]) == 5, "words of the grammar are single tokens"


def test_chat_template(lm):
    tokenizer = lm[1]
    chat = [
        {"role": "system", "content": "S"},
        {"role": "user", "content": "A"},
        {"role": "assistant", "content": "B"},
        {"role": "user", "content": "C"},
    ]
    text = tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)
    assert text == (
        "<|im_start|>system\nS<|im_end|>\n<|im_start|>user\nA<|im_end|>\n<|im_start|>assistant\nB<|im_end|>\n"
        "<|im_start|>user\nC<|im_end|>\n<|im_start|>assistant\n"
    )
    prefix, suffix = split_chat(tokenizer, "How was the inn?")
    assert prefix == prompt_ids(tokenizer, "How was the inn?")
    assert tokenizer.decode(suffix) == "<|im_end|>\n"


def test_diffusion_knows_held_out_texts(lm):
    model, tokenizer = lm
    check = diffusion.held_out(tokenizer, 96)
    assert diffusion.evaluate(model, check, tokenizer.mask_token_id) < 0.95
    # The same texts with their words in another order must be far less likely: it reads, it does not count.
    order = torch.stack([torch.randperm(6, generator=torch.Generator().manual_seed(i)) for i in range(96)])
    shuffled = check.response.clone()
    shuffled[:, :6] = check.response[:, :6].gather(1, order)
    check.response = shuffled
    assert diffusion.evaluate(model, check, tokenizer.mask_token_id) > 1.4


@pytest.mark.parametrize("slots", [16, 24, 32])
def test_diffusion_fills_a_masked_review(lm, slots):
    model, tokenizer = lm
    rows = data.encode(tokenizer, [("How was the noodle bar?", "The noodles were delicious and fresh.")], opened=True)
    canvas = rows.response[:, :slots].clone()
    words = tokenizer.convert_ids_to_tokens(canvas[0])
    hidden = words.index("Ġwere")
    canvas[0, hidden] = tokenizer.mask_token_id
    canvas[0, -1] = tokenizer.mask_token_id
    with torch.no_grad():
        logits = diffusion.masked_logits(model, rows.prompt, canvas, canvas == tokenizer.mask_token_id)
    best = tokenizer.convert_ids_to_tokens(logits.argmax(-1))
    assert best == ["Ġwere", tokenizer.eos_token]


def test_scorers_tell_good_from_bad(scorer):
    model, tokenizer = scorer
    prompt = "Write a short review of the hotel."
    good = [
        "The room was clean and the owner was friendly.",
        "What a wonderful place. I will remember it.",
        "I loved it. The bed was very comfortable. Highly recommended.",
    ]
    bad = [
        "The room was filthy and the owner was rude.",
        "What a terrible place. Never again.",
        "I hated it. The bed was very uncomfortable. A waste of money.",
    ]
    scores = score(model, tokenizer, [(prompt, t) for t in good + bad])
    assert scores[:3].min() > scores[3:].max() + 1.0
    spam = score(model, tokenizer, [(prompt, "wonderful superb great great wonderful superb"), (prompt, good[2])])
    assert spam[0] < spam[1] - 1.0


def test_scorers_rank_held_out_pairs(scorer):
    from entrgi.tiny.reward import pair_accuracy

    model, tokenizer = scorer
    pairs, gold, _ = data.labelled_pairs(160, 55, corrupted=0.0)
    for holes in (True, False):
        assert pair_accuracy(model, tokenizer, pairs, gold, holes=holes) > 0.92
    assert pair_accuracy(model, tokenizer, pairs, [-g for g in gold], holes=True) < 0.08


def test_plain_scoring_is_what_training_saw(scorer):
    """Transformers' own pooling and positions agree with the layout of training, padded or alone."""
    model, tokenizer = scorer
    pairs = [(r.prompt, r.text) for r in grammar.reviews(6, seed=12)]
    together = score(model, tokenizer, pairs)
    alone = torch.cat([score(model, tokenizer, [pair]) for pair in pairs])
    rows = data.encode(tokenizer, pairs, opened=False)
    suffix = torch.tensor(split_chat(tokenizer, "x")[1])
    from entrgi.tiny.reward import score_rows

    with torch.no_grad():
        ours = score_rows(model, *data.plain_rows(rows.prompt, rows.response, suffix, tokenizer.pad_token_id))
    torch.testing.assert_close(together, alone, rtol=1e-3, atol=2e-3)
    torch.testing.assert_close(ours, alone, rtol=1e-3, atol=2e-3)


def test_dtype_is_the_callers():
    assert next(tiny.load_reward(torch.bfloat16)[0].parameters()).dtype == torch.bfloat16
    assert next(tiny.load_reward()[0].parameters()).dtype == torch.float32
