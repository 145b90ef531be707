"""Verifiers by name: what generate, compare, evaluate and train make of ``verifier:NAME[=ARG]``."""

from __future__ import annotations

import json

import pytest

from entrgi.digests import fingerprint
from entrgi.errors import UsageError
from entrgi.evaluate.config import from_dict

SMALL = ["-K", "2", "-L", "8", "-T", "4", "-M", "1", "--quiet"]


def lines(path) -> list[dict]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def test_generate_ranks_by_it(tiny_weights, entrgi, tmp_path):
    out, mine = tmp_path / "out.jsonl", tmp_path / "mine.py"
    mine.write_text("def count(prompt, text):\n    return len(text) + ('inn' in prompt)\n")
    flags = ["--format", "jsonl", "-o", out, "--method", "none", "--reward", f"verifier:{mine}:count"]
    assert entrgi("generate", "How was the inn?", *SMALL, *flags) == 0
    (record,) = lines(out)
    assert [sample["reward"] for sample in record["samples"]] == [len(s["text"]) + 1 for s in record["samples"]]
    assert record["top1"] == max(sample["reward"] for sample in record["samples"])


@pytest.mark.parametrize(
    ("command", "flags", "message"),
    [
        ("generate", ["--reward", "verifier:json"], "verifier:json has no gradient and cannot guide by method entrgi"),
        ("compare", ["--reward", "verifier:json"], "has no gradient and cannot guide"),
        ("generate", ["--reward", "verifier:jso", "--method", "none"], "verifier 'jso': expected one of regex=PATTERN"),
        ("generate", ["--reward", "verifier:python=/absent.py", "--method", "none"], "absent.py"),
        ("generate", ["--reward", "verifier:json", "--reward-kind", "likelihood"], "leave the kind out"),
        ("generate", ["--reward", "folder"], "--model is missing"),
    ],
)
def test_what_is_refused(tiny_weights, entrgi, capsys, command, flags, message):
    assert entrgi(command, "Hello", *SMALL, *flags) == 2
    assert message in capsys.readouterr().err


def test_compare_shows_one_without_guidance(tiny_weights, entrgi, capsys):
    assert entrgi("compare", "Hello", *SMALL, "--methods", "none", "--reward", "verifier:length=1-:characters") == 0
    assert "1.0" in capsys.readouterr().out


def test_evaluate_rewards_and_judges(tiny_weights, entrgi, tmp_path, capsys):
    judges = "judges=[{kind: reward, name: short, model: 'verifier:length=0-3', samples: all}, {kind: rule}]"
    flags = ["--methods", "none", "--rewards", "verifier:length=1-:characters", "-n", 2, "-L", 8, "-T", 4, "-K", 2,
             "--seeds", "1", "--best-of", 2]  # fmt: skip
    assert entrgi("evaluate", "tiny", *flags, "--set", judges, "-o", tmp_path, "--no-report") == 0
    samples = {line["key"]: line for line in lines(tmp_path / "samples.jsonl")}
    assert all(line["reward"] == float(bool(line["text"])) for line in samples.values()) and len(samples) == 4
    said = [line for line in lines(tmp_path / "judgements.jsonl") if line["judge"] == "short"]
    assert {line["sample"] for line in said} == samples.keys()
    for line in said:
        assert line["score"] == float(len(samples[line["sample"]]["text"].split()) <= 3)
    assert entrgi("evaluate", "tiny", *flags, "--dry-run") == 0
    assert "verifier:length=1-:characters" in capsys.readouterr().out


def test_evaluate_refuses_to_guide_by_one():
    with pytest.raises(UsageError, match="verifier:json has no gradient and cannot guide by method entrgi"):
        from_dict({"rewards": ["tiny", "verifier:json"], "methods": ["none", "entrgi"]})


def test_its_file_counts(tmp_path):
    tests = tmp_path / "tests.py"
    tests.write_text("assert x")
    before = fingerprint("reward", f"verifier:python={tests}")
    tests.write_text("assert y")
    assert before and fingerprint("reward", f"verifier:python={tests}") not in (None, before)
    assert fingerprint("reward", "verifier:sudoku") is None


def test_diffu_grpo_trains_on_one(tiny_weights, entrgi, tmp_path):
    flags = ["-L", 4, "-T", 2, "-K", 2, "--prompts", 1, "--max-steps", 2, "--eval-prompts", 0, "--max-prompts", 20]
    reward = ["--reward", "verifier:length=1-4"]
    assert entrgi("train", "--method", "diffu-grpo", *reward, *flags, "-o", tmp_path / "a") == 0
    assert entrgi("train", *reward, *flags, "-o", tmp_path / "b") == 2
