"""Layouts, losses and the training script, on a few steps."""

import json
import random

import pytest
import torch

from entrgi.errors import UsageError
from entrgi.tiny import data, diffusion, grammar, reward
from entrgi.tiny import train as tiny_train

SMOKE = tiny_train.Budget(diffusion_steps=2, lm_steps=2, reward_steps=2, corpus=120, tokenizer_corpus=1500, batch=8)


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    out = tmp_path_factory.mktemp("tiny")
    lines = []
    return out, tiny_train.train_all(out, budget=SMOKE, threads=1, log=lines.append), lines


@pytest.fixture(scope="module")
def tokenizer(trained):
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(trained[0] / "diffusion")


def test_smoke_run_writes_loadable_directories(trained):
    from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer

    out, record, lines = trained
    assert json.loads((out / "checksums.json").read_text()) == record
    assert set(record) == {"diffusion", "reward", "judge"} and lines
    for name in record:
        auto = AutoModelForCausalLM if name == "diffusion" else AutoModelForSequenceClassification
        model, tokenizer = auto.from_pretrained(out / name), AutoTokenizer.from_pretrained(out / name)
        assert model.config.pad_token_id == tokenizer.pad_token_id == tokenizer.eos_token_id
        assert model.config.vocab_size == len(tokenizer)
        assert record[name]["model.safetensors"] == tiny_train.sha256(out / name / "model.safetensors")
    assert model.num_labels == 1
    assert record["reward"]["model.safetensors"] != record["judge"]["model.safetensors"]


def test_training_is_reproducible_by_seed(trained, tmp_path):
    out, record, _ = trained
    quiet = {"budget": SMOKE, "threads": 1, "log": lambda line: None}
    again = tiny_train.train_all(tmp_path / "a", **quiet)
    for name in record:
        assert again[name]["model.safetensors"] == record[name]["model.safetensors"], name
    other = tiny_train.train_all(tmp_path / "a", only="reward", seed=1, **quiet)
    assert other["reward"]["model.safetensors"] != record["reward"]["model.safetensors"]
    assert other["judge"] == again["judge"], "training one part must leave the others alone"


def test_unknown_part_is_refused(tmp_path):
    with pytest.raises(ValueError, match="only must be one of"):
        tiny_train.train_all(tmp_path, only="discriminator")


def test_no_thread_is_refused(tmp_path):
    with pytest.raises(UsageError, match="--threads 0: expected at least 1"):
        tiny_train.main(["--threads", "0", "--out", str(tmp_path)])


def test_command_line_options(tmp_path, monkeypatch, capsys):
    calls = []
    monkeypatch.setattr(tiny_train, "train_all", lambda out, **options: calls.append((out, options)))
    args = ["--out", str(tmp_path), "--only", "judge", "--seed", "3", "--threads", "1"]
    assert tiny_train.main(args) == 0
    out, options = calls[0]
    assert out == tmp_path and (options["only"], options["seed"], options["threads"]) == ("judge", 3, 1)
    with pytest.raises(SystemExit):
        tiny_train.main(["--only", "nothing"])
    assert "invalid choice" in capsys.readouterr().err


def test_mask_counts_cover_the_canvas_evenly():
    generator = torch.Generator().manual_seed(0)
    counts = diffusion.draw_masks(64, 32, generator).sum(1)
    assert sorted(set(counts.tolist())) == list(range(1, 33))
    assert torch.bincount(counts, minlength=33)[1:].max() == 2


def test_diffusion_loss_of_an_ignorant_model_is_log_vocabulary(tokenizer):
    model = diffusion.new_model(tokenizer, 0)
    torch.nn.init.zeros_(model.model.norm.weight)  # every logit becomes 0
    batch = data.encode(tokenizer, [(r.prompt, r.text) for r in grammar.reviews(8, seed=1)], opened=True)
    nats = diffusion.evaluate(model, batch, tokenizer.mask_token_id)
    assert nats == pytest.approx(torch.log(torch.tensor(float(len(tokenizer)))).item(), rel=1e-5)


def test_a_slot_is_read_from_the_position_before_it_and_pads_are_never_seen(tokenizer):
    torch.manual_seed(0)
    model = diffusion.new_model(tokenizer, 0).eval()
    batch = data.encode(tokenizer, [(grammar.prompts(1)[0], "I liked it.")], opened=True)
    canvas = batch.response.masked_fill(torch.arange(32) >= 3, tokenizer.mask_token_id)
    masked = canvas == tokenizer.mask_token_id
    with torch.no_grad():
        logits = diffusion.masked_logits(model, batch.prompt, canvas, masked)
        ids = torch.cat([batch.prompt, canvas], 1)
        real = batch.prompt[0] != tokenizer.pad_token_id
        assert not real.all(), "the prompt of this test has left padding"
        kept = ids[:, int((~real).sum()) :]
        whole = model(
            kept,
            attention_mask=torch.zeros(1, 1, kept.shape[1], kept.shape[1]),
            position_ids=torch.arange(kept.shape[1])[None],
        ).logits[0]
    torch.testing.assert_close(logits, whole[-33:-1][masked[0]], rtol=1e-4, atol=1e-5)


def test_reward_layouts(tokenizer):
    pairs = [("How was the inn?", "I liked it."), (grammar.prompts(1)[0], "The bed was soft. Five stars.")]
    rows = data.encode(tokenizer, pairs, opened=False)
    suffix, pad = torch.tensor([7, 8]), tokenizer.pad_token_id
    ids, mask, position_ids = data.reward_rows(rows.prompt, rows.response, suffix, pad)
    assert ids.shape == (2, 24 + 32 + 2) and mask[:, -2:].all()
    for row in range(2):
        first = int(mask[row].argmax())
        assert position_ids[row, first:].tolist() == list(range(58 - first)), "holes keep their position ids"
        assert mask[row, 24:56].sum() == rows.length[row]
    plain, plain_mask, plain_positions = data.plain_rows(rows.prompt, rows.response, suffix, pad)
    for row in range(2):
        assert plain[row][plain_mask[row].bool()].tolist() == ids[row][mask[row].bool()].tolist()
        kept = plain_positions[row][plain_mask[row].bool()]
        assert kept.tolist() == list(range(len(kept)))
        assert not plain_mask[row, : len(plain_mask[row]) - len(kept)].any(), "pads are on the left"
    assert plain_mask[:, 0].any(), "nothing is padded that need not be"


def test_encode_refuses_prompts_that_do_not_fit(tokenizer):
    with pytest.raises(ValueError, match="does not fit"):
        data.encode(tokenizer, [("How was the inn? " * 12, "I liked it.")], opened=True)


def test_damage_is_seeded_and_mostly_punished():
    reviews = grammar.reviews(150, seed=8)
    rng = random.Random(0)
    damaged = [data.corrupt(r.prompt, r.text, rng) for r in reviews]
    rng = random.Random(0)
    assert damaged == [data.corrupt(r.prompt, r.text, rng) for r in reviews]
    worse = sum(bool(grammar.analyse(*pair).defects) for pair in damaged)
    assert worse > 0.8 * len(reviews)


def test_preference_loss_orders():
    gold = torch.tensor([2.0, 0.0, -2.0, 0.1])
    right, share = reward.preference_loss(1.5 * gold, gold)
    wrong, none = reward.preference_loss(-1.5 * gold, gold)
    assert right < wrong and share == 1 and none == 0
    # Soft labels: the loss is least where differences are 1.5 times the gold's.
    assert right < reward.preference_loss(5 * gold, gold)[0]
    assert right < reward.preference_loss(0.2 * gold, gold)[0]
