"""Host code of the Triton backend and of the GPU scripts: choices, splits and chunks; no kernel runs here."""

from __future__ import annotations

import dataclasses
import os
import types
import weakref

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

pytest.importorskip("triton")

from benchmarks import run_gpu
from benchmarks.harness.inputs import CANONICAL, VOCABULARY, Shape  # noqa: E402
from benchmarks.tools import gate, profile, tune  # noqa: E402
from entrgi_kernels import backends  # noqa: E402
from entrgi_kernels.backends import triton as kernels  # noqa: E402
from entrgi_kernels.backends.arguments import Adam, Draw, Placement  # noqa: E402
from entrgi_kernels.backends.triton import aot, chunked, config  # noqa: E402
from entrgi_kernels.backends.triton.launch import aligned, bulk  # noqa: E402
from entrgi_kernels.backends.triton.soft_embedding import split_count  # noqa: E402


@pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") == "1", reason="a CPU is served under the interpreter")
def test_a_cpu_is_refused_with_the_way_out():
    assert "TRITON_INTERPRET" in kernels.why_not(torch.device("cpu"), torch.float32)
    with pytest.raises(backends.BackendUnavailableError, match="needs a GPU"):
        backends.resolve("triton", torch.zeros(1))


@pytest.mark.parametrize("script", [run_gpu, tune])
def test_scripts_without_a_gpu_say_so_and_fail(script, monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert script.main([]) == 2
    assert "there is none here" in capsys.readouterr().err


def test_profile_without_a_gpu_says_so_and_fails(monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert profile.main(["step"]) == 2
    assert "there is none here" in capsys.readouterr().err


def test_products_by_descriptors_that_fail_on_a_gpu_give_way_to_pointers_for_the_figures(monkeypatch):
    path, _, test = run_gpu.BULK_TEST.partition("::")
    assert f"def {test.removesuffix('[descriptor]')}(" in (run_gpu.ROOT / path).read_text(encoding="utf-8")
    for passed in (True, False):
        monkeypatch.setattr(config, "override", gate.MACHINES["sm_90"].tables)
        monkeypatch.setattr(run_gpu, "numerics", lambda clock, seconds, tests, passed=passed: passed)
        machine, report = types.SimpleNamespace(device="cuda"), types.SimpleNamespace(red=[])
        run_gpu.Run.bulk_copies(types.SimpleNamespace(machine=machine, clock=None, report=report))
        assert config.override.architecture.bulk == passed and len(report.red) == (not passed)


@pytest.mark.parametrize("name", sorted(config.ARCHITECTURES))
def test_every_table_serves_every_number_of_rows(name):
    architecture = config.ARCHITECTURES[name]
    tables = [architecture.statistics, *architecture.forward.values(), *architecture.backward.values()]
    for entries in tables:
        limits = [entry.most_rows for entry in entries]
        assert limits[-1] is None and limits[:-1] == sorted(limits[:-1])
        for rows in (0, 1, 64, 100_000):
            entry = config.pick(entries, rows)
            assert entry.most_rows is None or rows <= entry.most_rows


def test_what_cannot_be_copied_in_bulk_is_read_by_pointers_and_unaligned_rows_in_small_tiles():
    architecture = config.ARCHITECTURES["sm_90"]
    whole = config.pick_product(architecture, "backward", 2, 5000, aligned=True, bulk=True)
    assert whole.loads == "descriptor"
    pointers = config.pick_product(architecture, "backward", 2, 5000, aligned=True, bulk=False)
    assert pointers == dataclasses.replace(whole, loads="pointer")
    without = dataclasses.replace(architecture, bulk=False)
    assert config.pick_product(without, "backward", 2, 5000, aligned=True, bulk=True) == pointers
    assert config.pick_product(architecture, "backward", 2, 5000, aligned=False, bulk=True) == architecture.unaligned[2]
    assert config.pick_product(architecture, "forward", 2, 5000, aligned=False, bulk=False).engine == "chunked"
    odd, even = torch.zeros(4, 50_257), torch.zeros(4, 64)
    assert aligned(even) and not aligned(even, odd)
    shifted = torch.zeros(4 * 64 + 1)[1:].view(4, 64)
    assert not aligned(shifted) and not bulk(shifted)
    assert bulk(even, torch.zeros(3, 20)) and not bulk(even, odd) and not bulk(even[:1].expand(4, -1))


@pytest.mark.parametrize(
    ("n", "v", "budget"), [(1, 1, 1), (64, 151_936, 32 << 20), (4096, 151_936, 124 << 20), (9, 300, 1)]
)
def test_chunks_cover_the_vocabulary_once_within_the_budget(n, v, budget):
    parts = list(chunked.chunks(n, v, 2, budget))
    assert parts[0][0] == 0 and sum(length for _, length in parts) == v
    assert all(a + length == b for (a, length), (b, _) in zip(parts, parts[1:], strict=False))
    longest = max(length for _, length in parts)
    assert longest <= 256 or n * longest * 2 <= budget + n * 2 * 256


class Memory(TorchDispatchMode):
    """Bytes of the tensors that were made inside and are still held, and their largest sum; works without storage."""

    def __init__(self):
        super().__init__()
        self.held, self.sizes, self.peak = 0, {}, 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        before = {
            t.untyped_storage()._cdata for t in torch.utils._pytree.tree_leaves(args) if isinstance(t, torch.Tensor)
        }
        for tensor in torch.utils._pytree.tree_leaves(result):
            storage = tensor.untyped_storage() if isinstance(tensor, torch.Tensor) else None
            if storage is not None and storage._cdata not in before | self.sizes.keys():
                self.sizes[storage._cdata] = storage.nbytes()
                self.held += storage.nbytes()
                self.peak = max(self.peak, self.held)
                weakref.finalize(storage, self._free, storage._cdata)
        return result

    def _free(self, place):
        self.held -= self.sizes.pop(place)


@pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") == "1", reason="kernels are interpreted in this process")
@pytest.mark.parametrize("engine", ["of the table", "fused", "chunked"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize(("n", "d"), CANONICAL)
def test_a_step_takes_a_tenth_of_the_logits_bytes_at_most(n, d, dtype, engine, monkeypatch):
    """The memory row of the design, beyond logits and moments: outputs, statistics, lists, partial sums and chunks."""
    if dtype != torch.float32:  # a GPU's product of 16-bit operands needs no memory; without one they are widened
        monkeypatch.setattr(chunked, "multiply", lambda a, b, out, add: None)
    machine = gate.MACHINES["sm_90"]
    architecture = machine.tables.architecture
    if engine != "of the table":
        tables = {
            family: {w: tuple(dataclasses.replace(e, engine=engine) for e in entries) for w, entries in table.items()}
            for family, table in (("forward", architecture.forward), ("backward", architecture.backward))
        }
        architecture = dataclasses.replace(architecture, **tables)
    logits, table, grad = (
        torch.empty(shape, dtype=dtype, device="meta") for shape in ((n, VOCABULARY), (VOCABULARY, d), (n, d))
    )
    moments = torch.empty_like(logits), torch.empty_like(logits)
    rng, keys = torch.empty(2, dtype=torch.int64, device="meta"), torch.empty(n, dtype=torch.int64, device="meta")
    with aot.recording(machine, lambda item: None), Memory() as memory:
        config.override = dataclasses.replace(machine.tables, architecture=architecture)
        held = kernels.entrgi_embedding(logits, table, Draw(rng, keys, 0.7, 0, 0.95), None, None, "entropy")
        kernels.guidance_update_(logits, grad, table, *held[4:6], 0.7, Adam(*moments, 1, 0.5, 0.9, 0.999, 1e-8))
    assert n * d * (4 + dtype.itemsize) < memory.held < memory.peak
    assert memory.peak <= n * VOCABULARY * dtype.itemsize // 10


@pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") == "1", reason="kernels are interpreted in this process")
@pytest.mark.parametrize(("parts", "expected"), [(1, 1), (4, 8), (16, 16)])
def test_a_tile_beside_wide_moments_is_taken_apart_once_more_where_the_kernel_can(parts, expected):
    logits, table, grad = (
        torch.empty(shape, dtype=torch.bfloat16, device="meta") for shape in ((512, 4096), (4096, 64), (512, 64))
    )
    moments, soft = [torch.empty(512, 4096, device="meta") for _ in range(2)], torch.empty(512, 64, device="meta")
    machine, launched = gate.MACHINES["sm_90"], []
    entry = config.GemmConfig(128, 256, 64, 8, 4, parts=parts)
    with aot.recording(machine, launched.append):
        config.override = dataclasses.replace(
            machine.tables, architecture=dataclasses.replace(machine.tables.architecture, backward={2: (entry,)})
        )
        kernels.guidance_update_(logits, grad, table, soft, soft[:, 0], 0.7, Adam(*moments, 2, 0.5, 0.9, 0.999, 1e-8))
    assert launched[-1].tile["PARTS"] == expected


class Work(TorchDispatchMode):
    """Names of the torch operators inside that make a device work: neither views nor fresh memory."""

    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if not function.is_view and "empty" not in function.name():
            self.names.append(function.name())
        return function(*args, **(kwargs or {}))


@pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") == "1", reason="kernels are interpreted in this process")
def test_a_step_of_few_rows_is_nine_launches_and_nothing_else():
    """At N = 64 a launch takes about as long as a read of the logits."""
    logits, table, grad = (
        torch.empty(shape, dtype=torch.bfloat16, device="meta")
        for shape in ((64, VOCABULARY), (VOCABULARY, 1024), (64, 1024))
    )
    moments = torch.empty_like(logits), torch.empty_like(logits)
    rng, keys = torch.empty(2, dtype=torch.int64, device="meta"), torch.empty(64, dtype=torch.int64, device="meta")
    launched = []
    with aot.recording(gate.MACHINES["sm_90"], lambda item: launched.append(item.kernel)), Work() as work:
        held = kernels.entrgi_embedding(logits, table, Draw(rng, keys, 0.7, 0, 0.95), None, None, "entropy")
        kernels.guidance_update_(logits, grad, table, *held[4:6], 0.7, Adam(*moments, 2, 0.5, 0.9, 0.999, 1e-8))
    assert launched == [
        "_statistics_kernel", "_merge_kernel", "_cut_kernel", "_collect_kernel", "_pick_kernel", "_forward_kernel",
        "_merge_kernel", "_rowdot_kernel", "_backward_kernel",
    ]  # fmt: skip
    assert work.names == []
    launched.clear()
    with aot.recording(gate.MACHINES["sm_90"], lambda item: launched.append(item.kernel)), Work() as work:
        kernels.first_order_update_(logits, grad, table, keys, 1.0)
    assert launched == ["_picked_kernel", "_backward_kernel"] and work.names == []


def test_splits_fill_the_machine_and_no_more():
    assert split_count(tiles=132, blocks_v=1187, slots=132, most=64) == 1
    assert split_count(tiles=8, blocks_v=1187, slots=132, most=64) == 15  # 120 of 132 slots: less than a tenth idle
    assert split_count(tiles=1, blocks_v=3, slots=132, most=64) == 3
    assert split_count(tiles=1, blocks_v=1187, slots=132, most=0) == 1
    row = config.RowConfig(4096, 8, 8192, 4)
    assert row.splits(100_000, 151_936, 132) == 1
    assert row.splits(1, 151_936, 132) == 18  # slices of 8,192 at the least
    assert row.splits(1, 1 << 30, 132) == config.MOST_SPLITS


@pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") == "1", reason="kernels are interpreted in this process")
@pytest.mark.parametrize("rows", [(1, 2, 7, 16, 31), (33, 34, 48, 64), (257, 258, 260, 272), (1024, 1026, 1027)])
def test_a_new_number_of_rows_compiles_nothing(rows):
    """Triton's own dispatch asks for the same compilations at every N that a table's entry serves."""
    v, d, wanted = 512, 64, {}
    table = torch.zeros(v, d, dtype=torch.bfloat16)
    rng = torch.zeros(2, dtype=torch.int64)
    for n in rows:
        logits, grad = torch.zeros(n, v, dtype=torch.bfloat16), torch.zeros(n, d, dtype=torch.bfloat16)
        # Keys and statistics as a caller has them: views into something larger, wherever that puts them.
        keys, lse = torch.arange(n + 1)[1:], torch.zeros(2, n)[1]
        moments = torch.zeros_like(logits), torch.zeros_like(logits)
        inputs, places = torch.zeros(2 * n, d, dtype=torch.bfloat16), torch.arange(2 * n)[n:]
        found = wanted.setdefault(n, set())
        with aot.recording(gate.MACHINES["sm_90"], found.add):
            kernels.entrgi_embedding(logits, table, Draw(rng, keys, 0.7, 0, 0.95), None, None, "entropy")
            kernels.entrgi_embedding(
                logits, table, Draw(rng, keys, 0.7, 0, 1.0), keys, lse, "given", Placement(inputs, places)
            )
            kernels.guidance_update_(
                logits, grad, table, grad.float(), lse, 0.7, Adam(*moments, 2, 0.5, 0.9, 0.999, 1e-8)
            )
            kernels.soft_embedding_grad_table(logits, grad, lse, 0.7, torch.bfloat16)
            kernels.softmax_entropy_backward(logits, lse, lse, lse, lse, 0.7)
            kernels.sample_tokens(logits, Draw(rng, keys, 0.7, 0, 1.0))
            kernels.sample_tokens(logits, Draw(rng, keys, 0.0, 0, 1.0))
            for alg in ("entropy", "topk_margin"):
                kernels.unmask_confidence(logits, keys, alg, 0.7, 5, 0.95)
        assert len(found) > 10
    first, *others = wanted.values()
    for found in others:
        assert {item.label for item in found ^ first} == set()


def test_tuning_starts_from_the_table_and_tries_the_other_engine():
    target = config.Target(config.ARCHITECTURES["sm_90"], 132, "tf32x3")
    present = tune.present_entry(target, "forward", 2048)
    tried = list(tune.candidates("forward", 2048, present))
    assert tried[0] == present and tried[1].engine != present.engine
    assert len(tried) == len(set(tried)) > 10
    assert {entry.loads for entry in tried} == {"descriptor", "pointer"}
    assert all(entry.loads == "pointer" for entry in tune.candidates("forward", 2048, present, ["pointer"]))
    few = list(tune.candidates("backward", 7, config.pick(target.architecture.backward[2], 7)))
    assert {entry.block_n for entry in few} == {16} and len(few) > 5
    changed = tune.with_entry(target, "forward", tried[2])
    assert tune.present_entry(changed, "forward", 1).block_d == tried[2].block_d
    line = tune.advice("forward", Shape(1, 1), [{"entry": {}, "refused": "no"}])
    assert "nothing ran" in line


@pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") == "1", reason="kernels are interpreted in this process")
def test_tuning_compiles_each_candidates_own_kernels_first(monkeypatch):
    machine, shape = gate.MACHINES["sm_90"], Shape(1600, 64, 4096)
    kernels_of = {"statistics": "_statistics_kernel", "collect": "_collect_kernel", "backward": "_backward_kernel"}
    jobs = [(f, shape, tune.present_entry(machine.tables, f, shape.n)) for f in (*kernels_of, "forward")]
    for family, _, entry in jobs[:3]:
        found = tune.launches((family, shape, entry), machine)
        assert kernels_of[family] in {item.kernel for item in found}
    greedy = dataclasses.replace(jobs[2][2], block_v=256, parts=2)
    assert tune.launches(("backward", shape, greedy), machine)[-1].tile["BLOCK_V"] == 256
    monkeypatch.setattr(aot, "here", lambda: machine)
    monkeypatch.setattr(
        gate,
        "compile_all",
        lambda wanted, workers: [
            gate.Report(*job, spill_bytes=8 * (job[2].tile["BLOCK_V"] if job[2].kernel == "_backward_kernel" else 0))
            for job in wanted
        ],
    )
    verdicts = tune.compiled([*jobs, ("backward", shape, greedy)], 1)
    assert [wrong is None for wrong in verdicts.values()] == [True, True, False, True, False]
    assert "2048 bytes spilled" in verdicts["backward", shape, greedy]
