"""Where prompts come from, and models and prompts given by path through the whole command."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from entrgi.errors import UsageError
from entrgi.evaluate.config import from_dict
from entrgi.evaluate.prompts import fingerprints, load_prompts

CONVERSATION = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hi, you"}]


def prompts_of(seed: int = 0, **dataset) -> list:
    config = from_dict({"datasets": [dataset], "seeds": [seed]})
    return [item.prompt for item in next(iter(load_prompts(config).values()))]


@pytest.fixture
def files(tmp_path) -> dict[str, Path]:
    """The same three prompts, one of them twice, in every form."""
    datasets = pytest.importorskip("datasets")
    rows = [{"id": i, "question": q} for i, q in enumerate(["a, b", "c", "a, b", json.dumps(CONVERSATION)])]
    table = datasets.Dataset.from_list(rows)
    found = {name: tmp_path / f"p.{name}" for name in ("csv", "jsonl", "parquet", "txt")}
    table.to_csv(found["csv"], index=False)
    table.to_json(found["jsonl"])
    table.to_parquet(found["parquet"])
    found["txt"].write_text("a, b\nc\na, b\n", encoding="utf-8")
    found["tsv"] = tmp_path / "p.tsv"
    found["tsv"].write_text("id\tquestion\n1\ta, b\n2\tc\n", encoding="utf-8")
    return found


def test_local_files(files) -> None:
    for name in ("csv", "parquet"):
        assert prompts_of(path=str(files[name]), field="question") == ["a, b", "c", CONVERSATION]
    assert prompts_of(path=str(files["jsonl"]), field="question")[:2] == ["a, b", "c"]
    assert prompts_of(path=str(files["txt"])) == prompts_of(path=str(files["tsv"]), field="question") == ["a, b", "c"]


def test_shuffling_is_that_of_datasets(tmp_path) -> None:
    datasets = pytest.importorskip("datasets")
    path = tmp_path / "p.txt"
    path.write_text("".join(f"prompt {i}\n" for i in range(40)), encoding="utf-8")
    published = datasets.Dataset.from_dict({"p": [f"prompt {i}" for i in range(40)]}).shuffle(seed=3).select(range(6))
    assert prompts_of(3, path=str(path), num_prompts=6, shuffle="seed") == published["p"]
    assert prompts_of(8, path=str(path), num_prompts=6, shuffle=3) == published["p"]
    assert prompts_of(8, path=str(path), num_prompts=2) == ["prompt 0", "prompt 1"]


def test_fingerprints_tell_content_and_order() -> None:
    def fingerprint(**dataset) -> dict:
        return fingerprints(load_prompts(from_dict({"datasets": [{"path": "tiny", **dataset}]})))["tiny/0"]

    base = fingerprint(num_prompts=5)
    assert base["prompts"] == 5 and base == fingerprint(num_prompts=5)
    assert len({base["sha256"], *(fingerprint(num_prompts=5, shuffle=s)["sha256"] for s in (1, 2))}) == 3


@pytest.mark.parametrize(
    ("dataset", "message"),
    [
        ({"path": "p.csv", "field": "prompt"}, "no column 'prompt': expected field= one of"),
        ({"path": "p.csv", "field": "id"}, "row 0: a prompt is a string or a list of turns, got int"),
        ({"path": "missing.csv"}, "no such file"),
        ({"path": "missing.txt"}, "cannot read missing.txt"),
        ({"path": "p.txt", "num_prompts": 9}, "has 2 distinct prompts, 9 are asked for"),
    ],
)
def test_what_cannot_be_read_is_named(files, monkeypatch, dataset, message) -> None:
    monkeypatch.chdir(files["csv"].parent)
    with pytest.raises(UsageError, match=message):
        prompts_of(**dataset)


def test_a_dry_run_needs_no_hub(entrgi, monkeypatch, tmp_path, capsys) -> None:
    """Nothing is reached, the plan is shown all the same, and nothing is written."""
    datasets = pytest.importorskip("datasets")

    def unreachable(*arguments, **options):
        raise ConnectionError("no route")

    monkeypatch.setattr(datasets, "load_dataset", unreachable)
    monkeypatch.chdir(tmp_path)
    assert entrgi("evaluate", "paper", "--dry-run", "--tflops", 500) == 0
    out = capsys.readouterr().out
    assert out.count("no route; stand-ins take its place") == 3 and "at 500 TFLOP/s sustained (given)" in out
    assert "Dream-org/Dream-v0-Instruct-7B" in out and "7.62 G  14.2" in out and "576 batches" in out
    assert "memory of a process: about" in out and "hours on one process" in out
    assert list(tmp_path.iterdir()) == []
    assert entrgi("evaluate", "paper") == 2 and "no route" in capsys.readouterr().err


@pytest.mark.slow
def test_models_and_prompts_by_path(tiny_weights, entrgi, files, tmp_path, capsys) -> None:
    """Folders of models, two of them reward models, and a CSV: what the built-in names stand for, spelled out."""
    from entrgi import tiny

    model, reward, judge = (str(tiny.weights_path(name)) for name in tiny.MODELS)
    config = tmp_path / "mine.yaml"
    content = {
        "model": model, "rewards": [reward, judge], "methods": ["none", "entrgi"], "device": "cpu", "best_of": "auto",
        "datasets": [{"path": str(files["csv"]), "field": "question", "num_prompts": 1}],
        "settings": {"max_new_tokens": 8, "steps": 2, "num_samples": 2, "guidance_steps": 1},
        "judges": [{"name": "other", "kind": "reward", "model": judge}],
    }  # fmt: skip
    config.write_text(json.dumps(content), encoding="utf-8")
    assert entrgi("evaluate", config, "-o", tmp_path / "r", "--no-report") == 0
    assert f"p, reward model {judge}, τ = 0.7" in capsys.readouterr().out
    lines = [json.loads(line) for line in (tmp_path / "r" / "samples.jsonl").read_text().splitlines()]
    rewards = {line["reward_model"]: line["reward"] for line in lines if line["method"] == "Best-of-N"}
    assert set(rewards) == {reward, judge} and rewards[reward] != rewards[judge]
