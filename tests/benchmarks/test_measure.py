"""The measuring code: no speed without a green check, honest percentiles, rows that can be read back."""

import json
import math
import subprocess
from pathlib import Path

import pytest
import torch

from benchmarks import run_cpu
from benchmarks.baselines.step import Vectorized
from benchmarks.harness import measure
from benchmarks.harness.inputs import Shape
from benchmarks.harness.measure import Candidate, GateError
from benchmarks.harness.oracle import Check
from benchmarks.suites.step import Problem, maker, measure_step, step_candidates

SHAPE = Shape(5, 8, 127)


def group_of(*candidates, **options):
    return measure.measure("op", torch.float32, SHAPE, candidates, budget=0.0, rounds=(2, 2), memory=False, **options)


def green():
    return Check(True, "fine")


@pytest.mark.parametrize(
    "check",
    [
        lambda: Check(False, "error 1.0 (bound 0.1)"),
        lambda: 1 / 0,
        None,
    ],
)
def test_red_check_means_no_speed_and_no_run(check):
    calls = []
    bad = Candidate("fast but wrong", lambda: calls.append(1), check)
    group = group_of(bad, Candidate("right", lambda: None, green))
    assert calls == []
    assert list(group.timings) == ["right"] and "fast but wrong" in group.refused
    assert all(row["backend"] == "right" for row in measure.rows(group))
    text = measure.table([group], ["right"])
    speeds, refusal = text.split("REFUSED")
    assert "fast but wrong" not in speeds and "fast but wrong" in refusal
    with pytest.raises(GateError, match="fast but wrong"):
        group.speed("fast but wrong")
    assert group.ratio("fast but wrong", "right") is None


class WrongGradient(Vectorized):
    """As fast as the right one, and wrong: Adam walks the other way."""

    def update(self):
        self.phi.grad.neg_()
        super().update()


class WrongDraw(Vectorized):
    """Ignores the nucleus when it draws."""

    def step(self, reward, tokens=None):
        result = super().step(reward, tokens)
        if tokens is None:
            result.tokens = self.phi.argmin(dim=-1)
        return result


class NotANumber(Vectorized):
    def step(self, reward, tokens=None):
        result = super().step(reward, tokens)
        result.embedding[0, 0] = math.nan
        return result


@pytest.mark.parametrize(
    "broken, word", [(WrongGradient, "flips"), (WrongDraw, "drawn token"), (NotANumber, "embedding")]
)
def test_the_step_gate_catches_broken_steps(broken, word):
    problem = Problem.make(SHAPE, torch.float32)
    arguments = (problem.phi, problem.table, problem.canvas, problem.settings)
    assert problem.check(lambda: Vectorized(*arguments), own=True).passed
    check = problem.check(lambda: broken(*arguments), own=True)
    assert not check.passed and word in check.detail


def test_a_missing_backend_is_refused_with_its_reason():
    group = measure_step(SHAPE, torch.float32, ["vectorized", "cuda"], budget=0.0, rounds=(2, 2))
    assert "cuda" in group.refused and "BackendUnavailableError" in group.refused["cuda"]
    assert "vectorized" in group.timings


def test_runs_are_interleaved_and_prepared():
    log = []
    made = [
        Candidate(name, lambda name=name: log.append(name), green, lambda name=name: log.append(f"prepare {name}"))
        for name in ("a", "b")
    ]
    measure.measure("op", torch.float32, SHAPE, made, budget=0.0, rounds=(2, 2), warmup=0, memory=False)
    assert log == ["prepare a", "a", "prepare b", "b", "prepare b", "b", "prepare a", "a"]


def test_timed_steps_start_from_the_same_phi():
    problem = Problem.make(SHAPE, torch.float32)
    candidate = step_candidates(problem, ["vectorized"])[0]
    held = []
    candidate.prepare()
    for _ in range(2):
        candidate.prepare()
        candidate.run()
    held = maker(problem, "vectorized")()
    assert torch.equal(held.phi.detach(), problem.phi)  # the problem's own phi was never written to


def test_percentiles_ratios_and_rates():
    timing = measure.Timing("x", [3.0, 1.0, 2.0])
    assert timing.median == 2.0 and timing.percentile(0.2) == pytest.approx(1.4) and timing.percentile(1.0) == 3.0
    group = measure.Group(
        "op",
        "float32",
        SHAPE,
        {
            "fast": measure.Timing("fast", [0.5]),
            "slow": measure.Timing("slow", [2.0]),
            "floor": measure.Timing("floor", [0.25], floor=True),
        },
        {},
        flop=4e12,
        bytes_moved=1e9,
    )
    assert group.ratio("fast", "slow") == 4.0
    row = {r["backend"]: r for r in measure.rows(group)}["fast"]
    assert row["p50"] == 500.0 and row["TFLOP/s"] == 8.0 and row["GB/s"] == 2.0 and row["share of floor"] == 0.5
    needed = {
        "op",
        "backend",
        "dtype",
        "shape",
        "p20",
        "p50",
        "p80",
        "GB/s",
        "TFLOP/s",
        "share of floor",
        "peak MB",
        "device",
        "torch",
        "triton",
        "revision",
    }
    assert needed <= set(row)
    assert row["shape"] == {"N": 5, "V": 127, "D": 8}


def test_peak_memory_sees_a_large_temporary():
    def allocate():
        return torch.ones(16 << 20)  # 64 MiB, touched

    peak = measure.peak_memory(Candidate("x", allocate))
    if peak is None:
        pytest.skip("this kernel does not let a process reset its memory peak")
    assert 60e6 < peak < 90e6

    pins = []

    def many():  # blocks that the C library would keep after they are freed, under a small one that stays
        blocks = [torch.ones(5 << 20) for _ in range(6)]  # 6 x 20 MiB
        pins.append(torch.ones(4 << 10))
        return blocks

    torch.ones(7 << 20)  # freed: from now on, blocks up to 28 MiB come from the heap
    many()
    assert 110e6 < measure.peak_memory(Candidate("many", many)) < 160e6
    kept = torch.ones(16 << 20)
    assert measure.peak_memory(Candidate("y", lambda: kept.add_(1))) < 20e6


def test_saved_rows_replace_their_predecessors(tmp_path):
    path = tmp_path / "x" / "rows.json"
    group = group_of(Candidate("a", lambda: None, green), Candidate("b", lambda: None, green))
    rows = measure.rows(group)
    measure.save(rows, path)
    measure.save([{**rows[0], "p50": 123.0}], path)
    read = json.loads(path.read_text())
    assert len(read) == 2 and {row["backend"]: row["p50"] for row in read}["a"] == 123.0


@pytest.mark.parametrize("text, shape", [("64,1024", Shape(64, 1024)), ("7x16x31", Shape(7, 16, 31))])
def test_shapes_are_read(text, shape):
    assert Shape.parse(text) == shape


@pytest.mark.parametrize("text", ["", "64", "0,8", "a,b", "1,2,3,4"])
def test_bad_shapes_are_named(text):
    with pytest.raises(ValueError, match="expected N,D"):
        Shape.parse(text)


def run_step(path: Path, baselines: str, parts: str = "step") -> int:
    """The command on one small step of the eager backend, rows to `path`; its exit status."""
    flags = "--shapes 3,8,127 --dtypes float32 --backends eager --budget 0.1".split()
    return run_cpu.main([*flags, "--parts", parts, "--baselines", baselines, "--json", str(path)])


def test_the_command_prints_a_table_and_writes_rows(tmp_path, capsys):
    path = tmp_path / "rows.json"
    code = run_step(path, "published,vectorized")
    printed = capsys.readouterr().out
    assert code == 0 and "vs published" in printed and "two GEMMs" in printed and "REFUSED" not in printed
    assert {row["backend"] for row in json.loads(path.read_text())} == {"published", "vectorized", "eager", "two GEMMs"}


def test_an_interrupted_command_keeps_the_rows_it_has(monkeypatch, tmp_path):
    def interrupted(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr(run_cpu, "measure_ops", interrupted)
    with pytest.raises(KeyboardInterrupt):
        run_step(tmp_path / "rows.json", "vectorized", "step,ops")
    assert "eager" in {row["backend"] for row in json.loads((tmp_path / "rows.json").read_text())}


def test_the_command_fails_when_a_check_is_red(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(Problem, "check", lambda self, make, own: Check(not own, "made red by the test"))
    path = tmp_path / "rows.json"
    code = run_step(path, "vectorized")
    printed = capsys.readouterr().out
    assert code == 1 and "made red by the test" in printed
    assert "eager" not in {row["backend"] for row in json.loads(path.read_text())}


def test_rows_of_a_run_do_not_make_its_revision_dirty(tmp_path):
    def git(*words):
        identity = ["-c", "user.name=a", "-c", "user.email=a@b"]
        subprocess.run(["git", *identity, *words], cwd=tmp_path, check=True, capture_output=True)

    folder = tmp_path / "benchmarks"
    assert measure.revision(tmp_path) == "unknown"
    (folder / "results").mkdir(parents=True)
    (folder / "results" / "a.json").write_text("[]")
    (tmp_path / "code.py").write_text("1")
    git("init", "-q")
    git("add", ".")
    git("commit", "-qm", "one")
    clean = measure.revision(folder)
    assert len(clean) == 12 and "dirty" not in clean
    (folder / "results" / "a.json").write_text("[1]")
    assert measure.revision(folder) == clean
    (tmp_path / "code.py").write_text("2")
    assert measure.revision(folder) == f"{clean}-dirty"
