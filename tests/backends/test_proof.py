"""Kernels serve "auto" on a GPU only once they are proven there: planted faults, the file of verdicts, who serves.

The GPU is the CPU here: :data:`proof.DEVICES` says so. Kernels are eager's functions with a fault, and at the end the
real ones in Triton's interpreter, in processes of their own.
"""

from __future__ import annotations

import importlib.util
import json
import logging
import os
import subprocess
import sys
import types
from pathlib import Path

import pytest
import torch

pytest.importorskip("triton")

from entrgi_kernels import backends, ops
from entrgi_kernels.backends import comparison, eager, proof, trials
from entrgi_kernels.backends.arguments import Adam, Draw
from entrgi_kernels.backends.triton import config

ROOT = Path(__file__).parents[2]
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
outer = pytest.mark.skipif(INTERPRETED, reason="runs in the outer process")
CPU = torch.device("cpu")
ADAM = (0.5, 0.9, 0.999, 1e-8)
N, V, D = 3, 304, 32
REAL_PREFERENCE = backends.PREFERENCE


def calls(n: int = N, dtype: torch.dtype = torch.float32) -> dict[str, tuple]:
    """Arguments of every raw function."""
    logits, table, grad = torch.randn(n, V).to(dtype), torch.randn(V, D).to(dtype), torch.randn(n, D).to(dtype)
    rng, rows, soft = torch.tensor([3, 4]), torch.arange(n), torch.randn(n, D)
    lse, entropy = eager.softmax_entropy(logits, 0.7)
    return {
        "softmax_entropy": (logits, 0.7),
        "softmax_entropy_backward": (logits, lse, entropy, lse, entropy, 0.7),
        "sample_tokens": (logits, Draw(rng, rows, 0.7, 0, 0.9)),
        "soft_embedding": (logits, table, 0.7),
        "soft_embedding_backward": (logits, table, grad, soft, lse, 0.7),
        "soft_embedding_grad_table": (logits, grad, lse, 0.7, dtype),
        "entrgi_embedding": (logits, table, Draw(rng, rows, 0.7, 0, 0.9), None, None, "entropy"),
        "guidance_update_": (logits, grad, table, soft, lse, 0.7, Adam(None, None, 1, *ADAM)),
        "first_order_update_": (logits, grad, table, rows, 0.5),
        "unmask_confidence": (logits, rows, "maskgit_plus", 0.7, 0, 0.9),
    }


def copied(args: tuple) -> tuple:
    return tuple(x.clone() if isinstance(x, torch.Tensor) else x for x in args)


def outputs(result, args: tuple) -> tuple[torch.Tensor, ...]:
    """What a raw function returned, or for the one in place its logits."""
    if result is None:
        return (args[0],)
    return result if isinstance(result, tuple) else (result,)


def wrong_tile(values: torch.Tensor, number: int) -> None:
    """The last third of the last axis holds what belongs elsewhere."""
    tile = values[..., -(-values.shape[-1] * 2 // 3) :]
    tile.copy_(tile.roll(1, -1) + 1 if values.dim() == 1 else tile.roll(1, 0).roll(1, 1) * 1.5 + 0.25)


def a_nan(values: torch.Tensor, number: int) -> None:
    values.view(-1)[-1] = float("nan") if values.is_floating_point() else -1


def one_in_fifty(values: torch.Tensor, number: int) -> None:
    if number % 50 == 49:
        values.view(-1)[values.numel() // 2] = 7


@pytest.fixture
def door(monkeypatch, tmp_path):
    """Eager's functions as a GPU backend that "auto" prefers on this "GPU"; caches of the choice emptied."""
    module = types.ModuleType("entrgi_kernels.backends.triton")
    module.why_not = lambda device, dtype: "no float64" if dtype == torch.float64 else None
    for op in trials.READERS:
        setattr(module, op, getattr(eager, op))
    known = {"eager": eager, "native": "no native here", "triton": module, "cuda": "no cuda here"}
    monkeypatch.setattr(backends, "load", known.__getitem__)
    monkeypatch.setattr(backends, "PREFERENCE", {"cpu": ("triton", "cuda", "eager")})
    monkeypatch.setattr(proof, "DEVICES", {"cpu"})
    tables = config.ARCHITECTURES["interpreter"]
    for module_with_it in (trials, comparison):
        monkeypatch.setattr(module_with_it, "architecture", lambda device: tables)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.delenv("ENTRGI_BACKEND", raising=False)
    backends.forget()
    yield module
    monkeypatch.undo()
    backends.forget()


def plant(module: types.ModuleType, op: str, fault) -> None:
    """Spoil the first result of an operator's kernel."""
    right, count = getattr(eager, op), iter(range(1_000_000))

    def wrong(*args):
        result = right(*args)
        kept = [x for x in outputs(result, args) if x.numel()]
        fault(kept[0], next(count))
        return result

    setattr(module, op, wrong)


@outer
def test_a_right_kernel_is_proven_once_and_serves(door, monkeypatch, caplog):
    for op, args in calls().items():
        raw = getattr(backends.resolve("auto", args[0], op), op)
        expected = copied(args)
        truth = outputs(getattr(eager, op)(*expected), expected)
        with caplog.at_level(logging.INFO, logger="entrgi_kernels"):
            got = outputs(raw(*args), args)
        assert all(torch.equal(a, b) for a, b in zip(got, truth, strict=True)), op
        assert f"triton: {op} N" in caplog.records[-1].getMessage() and "proven in" in caplog.records[-1].getMessage()
        with monkeypatch.context() as patch:
            patch.setattr(trials, "describe", lambda *args: pytest.fail("a known call is not described again"))
            patch.setattr(proof, "known", lambda *args: pytest.fail("a known call is not looked up again"))
            raw(*args)
    assert len(proof.verdicts(CPU)) == len(trials.READERS)


@outer
@pytest.mark.parametrize("fault", [wrong_tile, a_nan, one_in_fifty])
@pytest.mark.parametrize("op", list(trials.READERS))
def test_a_planted_fault_is_caught_and_never_served(door, caplog, op, fault):
    plant(door, op, fault)
    args = calls()[op]
    auto = getattr(backends.resolve("auto", args[0], op), op)
    for _ in range(60):  # the fault of one launch in fifty would show
        mine, theirs = copied(args), copied(args)
        got, truth = outputs(auto(*mine), mine), outputs(getattr(eager, op)(*theirs), theirs)
        assert all(torch.equal(a, b) for a, b in zip(got, truth, strict=True))
    said = [record.getMessage() for record in caplog.records if record.levelno == logging.WARNING]
    assert len(said) == 1 and "eager torch serves in place of triton" in said[0]
    assert "of its bound" in said[0] or "launches of 50 that differ off by 1" in said[0]
    with pytest.raises(backends.BackendUnavailableError, match="backend='triton'.*failed the comparison"):
        getattr(backends.resolve("triton", args[0], op), op)(*args)


@outer
def test_a_kernel_that_raises_is_not_used_and_says_why(door, caplog):
    def refused(*args):
        raise RuntimeError("out of resource: shared memory")

    door.softmax_entropy = refused
    x = torch.randn(N, V)
    assert torch.equal(ops.softmax_entropy(x)[0], eager.softmax_entropy(x, 1.0)[0])
    assert "RuntimeError: out of resource" in caplog.text
    with pytest.raises(backends.BackendUnavailableError, match="out of resource: shared memory"):
        ops.softmax_entropy(x, backend="triton")


@outer
@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("full"),
        RuntimeError("Triton Error [CUDA]: out of memory"),
        MemoryError(),
        PermissionError("no such disk"),
    ],
)
def test_want_of_memory_or_disk_is_no_verdict(door, caplog, error):
    def hindered(*args):
        raise error

    right, door.softmax_entropy = door.softmax_entropy, hindered
    x = torch.randn(N, V)
    assert torch.equal(ops.softmax_entropy(x)[0], eager.softmax_entropy(x, 1.0)[0])
    assert f"could not be compared with eager arithmetic: {type(error).__name__}" in caplog.text
    assert proof.verdicts(CPU) == {}
    with pytest.raises(backends.BackendUnavailableError, match="could not be compared"):
        ops.softmax_entropy(x, backend="triton")
    door.softmax_entropy = right
    ops.softmax_entropy(x)
    assert [verdict.passed for verdict in proof.verdicts(CPU).values()] == [True]


@outer
def test_the_callers_settings_of_torch_neither_hinder_a_proof_nor_change(door):
    seen = []

    def looks(*args):
        seen.append((torch.are_deterministic_algorithms_enabled(), torch.is_autocast_enabled("cpu")))
        return eager.soft_embedding(*args)

    door.soft_embedding = looks
    torch.use_deterministic_algorithms(True, warn_only=True)
    state = torch.get_rng_state()
    try:
        with torch.autocast("cpu", torch.bfloat16):
            raw = backends.resolve("auto", torch.ones(1)).soft_embedding
            raw(torch.ones(N, V), torch.ones(V, D), 0.7)
        assert torch.is_deterministic_algorithms_warn_only_enabled()
    finally:
        torch.use_deterministic_algorithms(False)
    assert set(seen[:-1]) == {(False, False)} and seen[-1] == (True, True) and len(seen) == 51
    assert torch.equal(state, torch.get_rng_state())


@outer
def test_float64_is_eagers_and_never_proven(door):
    x = torch.randn(N, V, dtype=torch.float64)
    assert ops.softmax_entropy(x)[0].dtype == torch.float64
    with pytest.raises(backends.BackendUnavailableError, match="no float64"):
        ops.softmax_entropy(x, backend="triton")
    assert proof.verdicts(CPU) == {}


@outer
def test_other_rows_forms_dtypes_and_flags_are_other_proofs(door):
    x = torch.randn(64, V)
    kinds = [x[:3], x[5:8], x[:40], x[:, :303], x[:, 1:], x.half(), x.t().contiguous().t(), x[:1].expand(4, V)]
    described = []
    for logits in kinds:
        raw = backends.resolve("auto", logits).soft_embedding
        raw(logits, torch.randn(logits.shape[1], D), 0.7)
        described.append(len(proof.verdicts(CPU)))
    # The same entry of the tables; more rows; odd V; unaligned rows; half; a copy, dense; rows of distance 0.
    assert described == [1, 1, 2, 3, 4, 5, 5, 6]
    raw = backends.resolve("auto", x).guidance_update_
    args = calls()["guidance_update_"]
    moments = torch.zeros(N, V), torch.zeros(N, V)
    for number, (m, step, keep) in enumerate([((None, None), 1, True), (moments, 1, True), (moments, 2, True)]):
        raw(*args[:5], 0.7, Adam(*m, step, *ADAM, keep))
        assert len(proof.verdicts(CPU)) == described[-1] + 1 + number
    raw(*args[:5], 0.7, Adam(*moments, 1, *ADAM, False))  # neither read nor written: as without any
    assert len(proof.verdicts(CPU)) == described[-1] + 3


@outer
@pytest.mark.slow
@pytest.mark.parametrize(
    ("n", "v", "d", "logits", "table"),
    [
        (64, 151_936, 1024, torch.bfloat16, torch.bfloat16),
        (7, 50_257, 100, torch.bfloat16, torch.bfloat16),  # neither rows nor columns on 16 bytes
        (200, 50_272, 576, torch.float32, torch.bfloat16),  # rows that end inside a tile
        (1600, 8192, 256, torch.bfloat16, torch.bfloat16),  # the chunked engine
    ],
)
def test_a_proof_launches_the_very_machine_code_of_the_call(monkeypatch, n, v, d, logits, table):
    """What Triton would compile for the call on an H100, argument for argument, is what the proof launches there."""
    from benchmarks.tools import gate
    from entrgi_kernels.backends import triton as kernels
    from entrgi_kernels.backends.triton import aot

    machine = gate.SHIPPED["sm_90"]
    for module in (trials, comparison):
        monkeypatch.setattr(module, "architecture", lambda device: machine.tables.architecture)
    monkeypatch.setattr(comparison, "scale_of", lambda device: comparison.GPU)
    wanted = list(trials.calls(n, v, d, logits, table))
    # Rows further apart than they are long.
    for op, args in list(wanted):
        if op in ("softmax_entropy", "soft_embedding"):
            width = args[0].shape[1]
            wanted.append((op, (torch.empty(n, width + 24, dtype=logits, device="meta")[:, :width], *args[1:])))
    for op, args in wanted:
        trial, called, proven = trials.describe(op, *trials.READERS[op](*args), CPU), set(), set()
        with aot.recording(machine, called.add):
            getattr(kernels, op)(*args)
        with aot.recording(machine, proven.add):
            for call, _ in comparison.problems(trial, kernels, CPU):
                call()
        assert called and called <= proven, str(trial)


@outer
def test_while_a_graph_is_captured_what_is_proven_serves_and_nothing_else(door, monkeypatch, caplog):
    served = []

    def marked(*args):
        served.append(1)
        return eager.softmax_entropy(*args)

    door.softmax_entropy = marked
    x, wide = torch.randn(N, V), torch.randn(N, V + 1)
    ops.softmax_entropy(x)
    monkeypatch.setattr(proof, "capturing", lambda device: True)
    served.clear()
    ops.softmax_entropy(x)
    assert served == [1]
    ops.softmax_entropy(wide)
    assert served == [1] and "entrgi check" in caplog.text and "captured" in caplog.text
    with pytest.raises(backends.BackendUnavailableError, match="cannot be while a CUDA graph is captured"):
        ops.softmax_entropy(wide, backend="triton")
    monkeypatch.setattr(proof, "capturing", lambda device: False)
    ops.softmax_entropy(wide)  # eager was for the capture alone
    assert len(served) > 50 and len(proof.verdicts(CPU)) == 2
    proof.forget()
    monkeypatch.setattr(proof, "capturing", lambda device: True)
    served.clear()
    ops.softmax_entropy(wide)  # another process's proof, from the file
    assert served == [1]


@outer
def test_the_compiled_operator_is_proven_when_it_first_runs(door):
    torch._dynamo.reset()

    @torch.compile(fullgraph=True, backend="aot_eager")
    def entropy(x):
        return torch.ops.entrgi.softmax_entropy(x, 0.7, "auto")[1] * 2

    x = torch.randn(N, V)
    assert torch.equal(entropy(x), eager.softmax_entropy(x, 0.7)[1] * 2)
    assert [verdict.passed for verdict in proof.verdicts(CPU).values()] == [True]
    torch._dynamo.reset()


@outer
def test_the_fastest_proven_engine_serves_where_the_file_has_times(door, monkeypatch):
    other = types.ModuleType("entrgi_kernels.backends.cuda")
    other.why_not, other.LACKING = lambda device, dtype: None, "it lacks that"
    served = []
    for name, module in (("triton", door), ("cuda", other)):
        module.softmax_entropy = lambda *args, name=name: (served.append(name), eager.softmax_entropy(*args))[1]
    known = {"eager": eager, "triton": door, "cuda": other, "native": "none"}
    monkeypatch.setattr(backends, "load", known.__getitem__)
    backends.forget()
    x = torch.randn(N, V)

    def who(times=None) -> str:
        if times:
            trial = trials.describe("softmax_entropy", (x,), (), CPU)
            proof.remember_timings(trial, CPU, times)
            proof.forget()
        ops.softmax_entropy(x)
        served.clear()
        ops.softmax_entropy(x)
        return served[0] if served else "eager"

    assert who() == "triton"
    assert who({"triton": 2.0, "cuda": 1.0, "eager": 9.0}) == "cuda"
    assert who({"triton": 1.0, "cuda": 2.0, "eager": 9.0}) == "triton"
    assert who({"triton": 2.0, "cuda": 3.0, "eager": 1.0}) == "triton"
    plant(other, "softmax_entropy", a_nan)
    Path(proof.path()).unlink()
    proof.forget()
    assert who({"triton": 2.0, "cuda": 1.0, "eager": 9.0}) == "triton"
    assert hasattr(backends.resolve("auto", x, "soft_embedding"), "soft_embedding")


def failed_count() -> int:
    return sum(not verdict.passed for verdict in proof.verdicts(CPU).values())


@outer
def test_verdicts_are_remembered_failures_too(door, monkeypatch, caplog):
    plant(door, "softmax_entropy", a_nan)
    x = torch.randn(N, V)
    ops.softmax_entropy(x)
    assert failed_count() == 1
    proof.forget()  # another process
    caplog.clear()
    monkeypatch.setattr(comparison, "run", lambda *args: pytest.fail("it is known already"))
    ops.softmax_entropy(x)
    assert "entropy off by inf" in caplog.text or "lse off by inf" in caplog.text
    info = backends.backends()["triton"]
    assert info.proof is not None and "FAILED, eager serves: triton softmax_entropy" in info.proof


@outer
@pytest.mark.parametrize("part", ["driver", "triton_facts", "revision", "torch"])
def test_another_driver_triton_torch_or_revision_is_another_machine(door, monkeypatch, part):
    monkeypatch.setattr(proof, "device_facts", lambda device: f"a GPU | {proof.driver()}")
    x = torch.randn(N, V)
    ops.softmax_entropy(x)
    before = proof.machine(CPU)
    if part == "torch":
        monkeypatch.setattr(torch, "__version__", "9.9")
    else:
        monkeypatch.setattr(proof, part, lambda: "another")
    proof.forget()
    assert proof.machine(CPU) != before and proof.verdicts(CPU) == {}
    ops.softmax_entropy(x)
    kept = json.loads(proof.path().read_text())["machines"]
    assert set(kept) == {before, proof.machine(CPU)}


@outer
def test_the_revision_is_of_the_kernels_source(monkeypatch, tmp_path):
    (tmp_path / "backends").mkdir()
    file = tmp_path / "backends" / "proof.py"
    file.write_text("1")
    monkeypatch.setattr(proof, "__file__", str(file))
    first = proof.revision.__wrapped__()
    assert first == proof.revision.__wrapped__()
    (tmp_path / "backends" / "triton").mkdir()
    (tmp_path / "backends" / "triton" / "kernel.py").write_text("2")
    assert proof.revision.__wrapped__() != first


@outer
@pytest.mark.parametrize(
    "content",
    ['{"machines": {"a', "[]", '{"machines": 3}', '{"machines": {"HERE": 3}}',
     '{"machines": {"HERE": {"proofs": [1]}}}', "\x00\x01",
     "[" * 100_000, "\ud800", '{"machines": {"HERE": {"timings": {"x": {"triton": NaN, "cuda": -1}}}}}',
     '{"machines": {"HERE": {"proofs": {"triton softmax_entropy": {"passed": 1}}, "timings": 4}}}',
     '{"machines": {"HERE": {"proofs": {"t a": {"passed": "no", "figures": "", "excess": 0.5, "seconds": 1}}}}}',
     '{"machines": {"HERE": {"proofs": {"t a": {"passed": true, "figures": "", "excess": 9, "seconds": 1}}}}}',
     '{"machines": {"HERE": {"proofs": {"t a": {"passed": true, "figures": "", "excess": NaN, "seconds": 1}}}}}'],
)  # fmt: skip
def test_a_torn_or_foreign_file_is_ignored_and_mended(door, content):
    file = proof.path()
    file.parent.mkdir(parents=True)
    file.write_text(content.replace("HERE", proof.machine(CPU)), errors="surrogatepass")
    ops.softmax_entropy(torch.randn(N, V))
    assert len(proof.verdicts(CPU)) == 1
    proof.forget()
    assert len(proof.verdicts(CPU)) == 1
    assert not list(file.parent.glob("*.tmp"))


@outer
def test_without_a_folder_to_write_to_proofs_hold_for_the_process(door, monkeypatch, tmp_path, caplog):
    blocked = tmp_path / "a file"
    blocked.write_text("")

    def homeless():
        raise RuntimeError("no home")

    for number, make in enumerate(("unwritable", "no home")):
        if make == "unwritable":
            monkeypatch.setenv("XDG_CACHE_HOME", str(blocked))
        else:
            monkeypatch.delenv("XDG_CACHE_HOME")
            monkeypatch.setattr(Path, "home", homeless)
            assert proof.path() is None
        proof.forget()
        caplog.clear()
        with caplog.at_level(logging.INFO, logger="entrgi_kernels"):
            for v in (V, V + 1 + number):
                ops.softmax_entropy(torch.randn(N, v))
        said = [record.getMessage() for record in caplog.records if "this process alone" in record.getMessage()]
        assert len(said) == 1 and len(proof.verdicts(CPU)) == 2


@outer
def test_two_processes_at_once_lose_nothing(door, tmp_path):
    (tmp_path / "ready").mkdir()
    program = (
        "import sys, torch\n"
        "from entrgi_kernels.backends import comparison, proof, trials\n"
        "proof.DEVICES = {'cpu'}\n"
        "comparison.run = lambda *args: [comparison.Finding('x', 0.0, 0.0)]\n"
        "import pathlib, time\n"
        "pathlib.Path(sys.argv[2], sys.argv[1]).touch()\n"
        "while len(list(pathlib.Path(sys.argv[2]).iterdir())) < 2: time.sleep(0.001)\n"
        "for number in range(40):\n"
        "    trial = trials.Trial(f'{sys.argv[1]}{number}', (1, None), 0, 0, (), ())\n"
        "    assert proof.prove('triton', None, trial, torch.device('cpu')).passed\n"
        "    proof.forget()\n"  # what is lost stays lost
    )
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "python")])}
    both = [
        subprocess.Popen(
            [sys.executable, "-c", program, name, tmp_path / "ready"], env=environment, cwd=ROOT, stderr=subprocess.PIPE
        )
        for name in ("a", "b")
    ]
    for process in both:
        assert process.wait(120) == 0, process.stderr.read().decode()
    assert len(proof.verdicts(CPU)) == 80


@outer
def test_nobody_who_listens_hears_of_a_proof(door):
    from entrgi_kernels.backends import ranges

    heard = []

    class Listener:
        def begin(self, name):
            heard.append(name)

        def end(self, name):
            pass

    door.softmax_entropy = ranges.ranged(eager.softmax_entropy)
    with ranges.listening(Listener()):
        ops.softmax_entropy(torch.randn(N, V))
    assert heard == ["entrgi::softmax_entropy"]


@outer
@pytest.mark.parametrize("fault", [None, a_nan])
def test_auto_on_a_simulated_gpu(door, monkeypatch, caplog, fault):
    """The real preference, a device called cuda: proven at the first call, and nothing waits for it at the second."""
    file = ROOT / "tests" / "guidance" / "simulated_device.py"
    spec = importlib.util.spec_from_file_location("simulated_device", file)
    simulated = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(simulated)
    facts = types.SimpleNamespace(name="Simulated H100", major=9, minor=0)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: facts)
    monkeypatch.setattr(backends, "PREFERENCE", REAL_PREFERENCE)
    monkeypatch.setattr(proof, "DEVICES", {"cuda"})

    class Generator(torch.Generator):
        def __new__(cls, device):
            return super().__new__(cls, "cpu")

    monkeypatch.setattr(torch, "Generator", Generator)
    served = []

    def marked(*args):
        served.append(1)
        result = eager.softmax_entropy(*args)
        if fault is not None:
            fault(simulated.unwrap(result[0]), 0)
        return result

    door.softmax_entropy = marked
    with simulated.SimulatedDevice() as device:
        x = simulated.DeviceTensor(torch.randn(N, V))
        raw = backends.resolve("auto", x, "softmax_entropy").softmax_entropy
        with device.counting() as waits:
            raw(x, 0.7)
            assert waits.total() > 0
        served.clear()
        with device.counting() as waits:
            lse, _ = raw(x, 0.7)
            assert waits.total() == 0
    assert torch.equal(simulated.unwrap(lse), eager.softmax_entropy(simulated.unwrap(x), 0.7)[0])
    assert len(served) == (fault is None) and ("eager torch serves" in caplog.text) == (fault is not None)
    (verdict,) = proof.verdicts(torch.device("cuda", 0)).values()
    assert verdict.passed == (fault is None)
    assert proof.machine(torch.device("cuda", 0)).startswith("Simulated H100 9.0 | ")
