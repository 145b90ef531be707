"""`entrgi check` says which kernels are right, how fast they are, and fails where one is wrong."""

from __future__ import annotations

import json
import types
from pathlib import Path

import pytest
import torch

from entrgi import check, cli
from entrgi_kernels.backends import comparison, eager, proof, trials


@pytest.fixture
def engine(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> types.ModuleType:
    """Eager's functions as the one engine of this CPU, at small sizes."""
    module = types.ModuleType("stand_in")
    for op in trials.READERS:
        setattr(module, op, getattr(eager, op))
    small = comparison.Scale(v=128, d=32, split=270, more=4)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(comparison, "scale_of", lambda device: small)
    monkeypatch.setattr(check, "sizes_of", lambda device: (check.Size(4, 300, 16), check.Size(9, 128, 32)))
    monkeypatch.setattr(check, "engines_of", lambda device: ({"native": module}, {"cuda": "there is no GPU"}))
    monkeypatch.setattr(check, "rates_of", lambda device, clock, dtype: check.Rates(1e10, 1e11))
    monkeypatch.setattr(check.Clock, "__init__", lambda self, device: None)
    monkeypatch.setattr(check.Clock, "__call__", lambda self, call: (call(), 2.0)[1])
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    return module


def test_every_family_is_proven_timed_and_written(engine, capsys, tmp_path) -> None:
    path = tmp_path / "check.json"
    assert cli.main(["check", "--json", str(path)]) == 0
    text = capsys.readouterr().out
    lines = text.splitlines()
    for family in check.FAMILIES.values():
        (row,) = (line for line in lines if line.startswith(f"{family} ") and "native" in line)
        assert "right" in row and "4x300x16 float32" in row and "2.000" in row and "1.0x" in row
    assert text.count("9x128x32 float32") == len(check.FAMILIES)
    statistics = next(line for line in lines if line.startswith("row statistics"))
    assert statistics.endswith("0% copy")  # 4.8 kB in 2 ms, of 10 GB/s
    assert "not here: cuda: there is no GPU" in text and "WRONG" not in text
    kept = json.loads(path.read_text(encoding="utf-8"))
    assert kept["machine"] == proof.machine(torch.device("cpu")) and kept["absent"] == {"cuda": "there is no GPU"}
    assert {key.split()[1] for key in kept["verdicts"]} == set(check.FAMILIES)
    assert all(one["passed"] for one in kept["verdicts"].values())
    assert [row["ms"] for row in kept["times"]] == [{"native": 2.0, "eager": 2.0}] * 2 * len(check.FAMILIES)
    assert not proof.path().exists()  # a CPU's engines are not chosen by it


@pytest.mark.parametrize("op", ["sample_tokens", "guidance_update_"])
def test_a_wrong_kernel_fails_with_its_figures(engine, capsys, op) -> None:
    def wrong(*args):
        result = getattr(eager, op)(*args)
        if result is None:
            args[0][-1, -1] += 0.5
            args[0][0, :3] = 9.0
            return None
        return result.roll(1, 0)

    setattr(engine, op, wrong)
    assert cli.main(["check"]) == 1
    text = capsys.readouterr().out
    row = next(line for line in text.splitlines() if line.startswith(check.FAMILIES[op]))
    assert "WRONG" in row and f"WRONG: native {op} N" in text and "of its bound" in text
    assert sum("right" in line for line in text.splitlines()) == len(check.FAMILIES) - 1


def test_a_kernel_that_raises_is_wrong_and_the_rest_is_told(engine, capsys) -> None:
    def refused(*args):
        raise RuntimeError("out of resource")

    engine.soft_embedding = refused
    assert cli.main(["check"]) == 1
    text = capsys.readouterr().out
    assert "RuntimeError: out of resource" in text and "soft embedding: native Size(n=4" in text
    assert next(line for line in text.splitlines() if line.startswith("draw ")).split()[2] == "right"


def test_want_of_memory_is_told_and_is_no_fault(engine, capsys) -> None:
    def hungry(*args):
        raise torch.OutOfMemoryError("full")

    engine.softmax_entropy_backward = hungry
    assert cli.main(["check"]) == 1
    text = capsys.readouterr().out
    assert "WRONG" not in text and "not compared: OutOfMemoryError: full" in text
    assert "not compared" in next(line for line in text.splitlines() if line.startswith("their gradient "))


def test_a_file_that_cannot_be_written_is_refused_before_anything_runs(engine, monkeypatch, capsys, tmp_path) -> None:
    monkeypatch.setattr(check, "engines_of", lambda device: pytest.fail("kernels were looked for"))
    assert cli.main(["check", "--json", str(tmp_path / "none" / "x.json")]) == 2
    assert "there is no folder" in capsys.readouterr().err


def test_a_machine_with_eager_alone_has_nothing_to_prove(engine, monkeypatch, capsys) -> None:
    monkeypatch.setattr(check, "engines_of", lambda device: ({}, {"native": "it was not built"}))
    assert cli.main(["check"]) == 0
    text = capsys.readouterr().out
    assert "not here: native: it was not built" in text and "nothing to prove" in text


def test_the_engines_of_this_machine_are_those_of_the_registry(monkeypatch) -> None:
    from entrgi_kernels import ops

    engines, absent = check.engines_of(torch.device("cpu"))
    info = ops.backends()["native"]
    assert (list(engines), list(absent)) == ((["native"], []) if info.available else ([], ["native"]))
    assert info.available or absent["native"] == info.reason


def test_the_clock_takes_medians_of_cold_calls() -> None:
    clock, made = check.Clock(torch.device("cpu")), []
    assert clock(lambda: made.append(1), seconds=0.0) >= 0 and len(made) == 4  # one to warm up
