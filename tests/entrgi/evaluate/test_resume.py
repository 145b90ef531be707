"""Interruptions: whatever was finished is kept, the rest is done once, and the files end up the same."""

from __future__ import annotations

import json
import random
from pathlib import Path

import pytest

from entrgi_kernels.guidance import keys

GRID = ("--methods", "none,entrgi", "-n", 5, "--seeds", "1,2", "--batch-size", 2, "-L", 8, "-T", 8, "-K", 3,
        "--best-of", 4, "--traces", 1, "--set", "judges=[{kind: rule}]")  # fmt: skip
LINES = 2 * 5 * (4 + 3)
EQUAL = ("samples.jsonl", "judgements.jsonl", "traces.jsonl")


@pytest.fixture
def evaluate(fake, entrgi, tmp_path):
    """Runs the small grid into a folder of this name and returns (exit code, folder)."""

    def run(name: str, *arguments) -> tuple[int, Path]:
        return entrgi("evaluate", "tiny", *GRID, "-o", tmp_path / name, "--no-report", *arguments), tmp_path / name

    return run


def content(folder: Path) -> dict[str, bytes]:
    return {name: (folder / name).read_bytes() for name in EQUAL}


def lines(folder: Path, name: str = "samples") -> list[dict]:
    return [json.loads(line) for line in (folder / f"{name}.jsonl").read_text(encoding="utf-8").splitlines()]


def test_an_unbroken_run(evaluate, fake) -> None:
    code, folder = evaluate("a")
    assert code == 0
    found = lines(folder)
    assert len(found) == LINES == len({line["key"] for line in found})
    assert not (folder / "parts").exists()
    places = [(line["seed"], line["method"], line["index"], line["sample"]) for line in found]
    assert places == sorted(places, key=lambda p: (p[0], ["Best-of-N", "EntRGi"].index(p[1]), p[2:]))
    assert len(lines(folder, "judgements")) == 2 * 2 * 5
    assert len(lines(folder, "batches")) == 2 * 2 * 3
    assert len(lines(folder, "traces")) == 2
    header = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    assert header["samples"] == LINES and header["config"]["seeds"] == [1, 2]
    assert not any("seconds" in line for line in found), "what differs from run to run is in batches.jsonl alone"


def test_a_finished_run_does_nothing(evaluate, fake) -> None:
    _, folder = evaluate("a")
    before = {path.name: (path.stat().st_mtime_ns, path.read_bytes()) for path in folder.iterdir()}
    loads = fake.loads
    code, _ = evaluate("a")
    assert code == 0 and fake.loads == loads, "models were loaded for nothing"
    assert {p.name: (p.stat().st_mtime_ns, p.read_bytes()) for p in folder.iterdir() if p.name != ".lock"} == {
        name: value for name, value in before.items() if name != ".lock"
    }


@pytest.mark.parametrize("error", [KeyboardInterrupt(), MemoryError()], ids=["interrupted", "no memory"])
@pytest.mark.parametrize("stop", [0, 1, 2, 3, 4])
def test_an_interrupted_run_goes_on(evaluate, fake, capsys, stop: int, error: BaseException) -> None:
    _, unbroken = evaluate("a")
    batches = []

    def prepare(sampler) -> None:
        whole = sampler.stream

        def stream(prompts, **options):
            if prompts != ["Hello"]:  # the warm-up
                if len(batches) == stop:
                    raise error
                batches.append(prompts)
            return whole(prompts, **options)

        sampler.stream = stream

    fake.prepare = prepare
    code, broken = evaluate("b")
    assert code == (130 if isinstance(error, KeyboardInterrupt) else 1)
    assert "the same command goes on" in capsys.readouterr().err
    fake.prepare = lambda sampler: None
    code, _ = evaluate("b")
    assert code == 0 and content(broken) == content(unbroken)


@pytest.mark.parametrize("seed", range(6))
def test_files_cut_anywhere_are_mended(evaluate, seed: int) -> None:
    """As a kill may leave them: any prefix of samples and judgements, finished files beside parts not yet removed."""
    rng = random.Random(seed)
    _, unbroken = evaluate("a")
    expected = content(unbroken)
    code, broken = evaluate("b")
    parts = broken / "parts"
    parts.mkdir()
    for name in ("samples", "judgements", "traces", "batches"):
        data = (broken / f"{name}.jsonl").read_bytes()
        # Traces and times are on the disk before the samples that they belong to.
        kept = rng.randrange(len(data) + 1) if name in ("samples", "judgements") else len(data)
        (parts / f"{name}-00000.jsonl").write_bytes(data[:kept])
        if rng.random() < 0.7:
            (broken / f"{name}.jsonl").unlink()
    code, _ = evaluate("b")
    assert code == 0 and content(broken) == expected and not parts.exists()
    assert len(lines(broken, "batches")) == len({line["key"] for line in lines(broken, "batches")})


def test_what_is_there_is_not_written_again(evaluate, fake) -> None:
    """One sample of a batch is lost: the batch is drawn again, the others' lines stay the ones that were."""
    _, folder = evaluate("a")
    expected = (folder / "samples.jsonl").read_bytes()
    kept = expected.splitlines(keepends=True)
    marked = [line.replace(b'"text": "', b'"text": "kept ') for line in kept]
    (folder / "samples.jsonl").write_bytes(b"".join(marked[:7] + marked[8:]))
    fake.samplers.clear()
    assert evaluate("a")[0] == 0
    again = (folder / "samples.jsonl").read_bytes().splitlines(keepends=True)
    assert again == marked[:7] + [kept[7]] + marked[8:]
    assert [len(sampler.prompts_seen) for sampler in fake.samplers] == [1 + 2], "the warm-up's prompt, and one batch"


def test_a_changed_configuration_is_refused(evaluate, capsys) -> None:
    _, folder = evaluate("a")
    before = content(folder)
    code, _ = evaluate("a", "--seeds", "1,2,3", "--learning-rate", 0.1)
    err = capsys.readouterr().err
    assert code == 2 and "seeds: [1, 2] there, [1, 2, 3] now" in err and "learning_rate" in err and "--extend" in err
    assert content(folder) == before
    code, _ = evaluate("a", "--device", "cpu", "--set", "reference=Best-of-N")
    assert code == 0, "how it is run and looked at may change"


def test_results_of_older_draws_are_not_gone_on_with(evaluate, monkeypatch, capsys) -> None:
    """Those alone whose texts would differ; --extend keeps the other cells' samples."""
    monkeypatch.setattr(keys, "REVISION", 1)
    old = [evaluate("a")[1], evaluate("b", "--searches", "best,smc")[1]]
    headers = [json.loads((folder / "config.json").read_text(encoding="utf-8")) for folder in old]
    assert not any("draws_revision" in header["identity"] for header in headers), "as before there were revisions"
    monkeypatch.undo()
    assert evaluate("a")[0] == 0
    capsys.readouterr()
    assert evaluate("b", "--searches", "best,smc")[0] == 2
    assert "draws_revision: null there, 2 now" in capsys.readouterr().err
    before = lines(old[1])
    assert evaluate("b", "--searches", "best,smc", "--extend")[0] == 0
    new = lines(old[1])
    cells = json.loads((old[1] / "config.json").read_text(encoding="utf-8"))["cells"]
    searched = {line["method"] for line in new if "SMC" in line["method"]}
    assert searched and all(line in new for line in before)
    for name in {line["method"] for line in new}:
        of_method = {line["key"].split("-")[0] for line in new if line["method"] == name}
        assert len(of_method) == (4 if name in searched else 2), "two seeds, drawn again or kept"
        assert len(of_method & set(cells)) == 2


def test_extending_keeps_what_is_shared(evaluate, fake) -> None:
    _, folder = evaluate("a")
    old = lines(folder)
    fake.samplers.clear()
    code, _ = evaluate("a", "--seeds", "2,3", "--extend")
    assert code == 0
    new = lines(folder)
    assert {line["seed"] for line in new} == {1, 2, 3} and len(new) == LINES * 3 // 2
    assert all(line in new for line in old), "nothing is lost"
    assert [line["seed"] for line in new if line["seed"] != 1] == [line["seed"] for line in new[: len(new) * 2 // 3]]


def test_changed_prompts_are_a_changed_configuration(entrgi, fake, tmp_path, capsys) -> None:
    path = tmp_path / "p.jsonl"
    path.write_text('{"prompt": "a"}\n{"prompt": "b"}\n', encoding="utf-8")
    arguments = ("evaluate", "tiny", "--datasets", path, "-o", tmp_path / "r", "--no-report", "-L", 8, "-T", 8,
                 "--best-of", 4, "--set", "judges=null", "--traces", 0)  # fmt: skip
    assert entrgi(*arguments) == 0
    path.write_text('{"prompt": "a"}\n{"prompt": "c"}\n', encoding="utf-8")
    assert entrgi(*arguments) == 2 and "prompts:" in capsys.readouterr().err


def test_one_run_at_a_time(evaluate, tmp_path, capsys) -> None:
    from entrgi.evaluate.store import Store

    with Store(tmp_path / "a").lock():
        code, _ = evaluate("a")
    assert code == 2 and "another run is writing" in capsys.readouterr().err
    assert evaluate("a")[0] == 0


def test_a_folder_of_something_else_is_left_alone(evaluate, tmp_path, capsys) -> None:
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "mine.jsonl").write_text("{}\n")
    assert evaluate("a")[0] == 2 and "no config.json" in capsys.readouterr().err
    (tmp_path / "a" / "config.json").write_text("{}")
    assert evaluate("a")[0] == 2 and "no evaluation of this version" in capsys.readouterr().err
    (tmp_path / "b").write_text("mine")
    assert evaluate("b")[0] == 2 and "expected a folder" in capsys.readouterr().err
    assert (tmp_path / "b").read_text() == "mine"
