"""What `benchmarks.run_gpu` times by itself: the machine's ceilings, kernels alone, and other libraries' kernels."""

from __future__ import annotations

import gc
import importlib
import importlib.util
import time
from collections.abc import Callable
from dataclasses import dataclass
from types import ModuleType
from typing import Any

import torch

from benchmarks.harness import measure
from benchmarks.harness.inputs import CANONICAL, SMALL_N, Shape
from benchmarks.harness.measure import Candidate, Group
from benchmarks.harness.models import Network
from benchmarks.suites.generation import Size

# Clock cycles: about two milliseconds, longer than any one function here takes to enqueue.
_HEAD_START = 4_000_000


@dataclass(frozen=True)
class Machine:
    """Where this runs, and how large: a GPU with this project's kernels for it, or a CPU that rehearses.

    Attributes:
        copy_bytes, product: of the ceilings: far beyond any cache, and a size that fills the chip.
        few: shapes of few rows, for kernels alone.
        preset, size: of the generation; a size replaces the preset's.
    """

    device: str = "cuda"
    backend: str = "triton"
    copy_bytes: int = 4 << 30
    product: int = 8192
    scratch_bytes: int = 256 << 20
    shapes: tuple[Shape, ...] = tuple(Shape(n, d) for n, d in CANONICAL)
    few: tuple[Shape, ...] = tuple(Shape(n, 1024) for n in SMALL_N)
    others: Shape = Shape(512, 64)
    preset: str = "dream"
    size: Size | None = None

    def kernels(self) -> ModuleType:
        """The backend's raw functions."""
        return importlib.import_module(f"entrgi_kernels.backends.{self.backend}")

    def synchronize(self) -> None:
        measure.synchronize(self.device)

    def free(self) -> None:
        """Give back what the last group held."""
        gc.collect()
        if self.device == "cuda":
            torch.cuda.empty_cache()


REHEARSAL = Machine(
    device="cpu",
    backend="eager",
    copy_bytes=1 << 20,
    product=64,
    scratch_bytes=1 << 10,
    shapes=(Shape(6, 16, 301), Shape(9, 8, 211)),
    few=(Shape(1, 8, 211),),
    others=Shape(8, 8, 211),
    preset="quick",
    size=Size(v=211, d=16, max_new_tokens=4, steps=2, guidance_steps=1, diffusion=Network.plain(16, 1)),
)


def timed(run: Callable[[], Any], scratch: torch.Tensor, runs: int = 15) -> list[float]:
    """Seconds of each run by device events, the L2 cache swept before it; by the clock on a CPU.

    The device is kept busy until all of a run is enqueued: what Python takes for its launches is no time of kernels.
    """
    run()
    seconds = []
    for _ in range(runs):
        scratch.zero_()
        if scratch.device.type == "cpu":
            begun = time.perf_counter()
            run()
            seconds.append(time.perf_counter() - begun)
            continue
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda._sleep(_HEAD_START)
        begin.record()
        run()
        end.record()
        end.synchronize()
        seconds.append(begin.elapsed_time(end) / 1e3)
    return sorted(seconds)


def ceilings(machine: Machine, scratch: torch.Tensor) -> tuple[float, float, list[dict[str, Any]]]:
    """(bytes/s of a device copy, reads and writes counted; FLOP/s of a square bf16 product on random data, rows)."""
    size = machine.product
    source = torch.randint(0, 255, (machine.copy_bytes,), dtype=torch.uint8, device=machine.device)
    target = torch.empty_like(source)
    copy = timed(lambda: target.copy_(source), scratch)[7]
    a, b = (torch.randn(size, size, device=machine.device).bfloat16() for _ in range(2))
    product = timed(lambda: a @ b, scratch)[7]
    bandwidth, rate = 2 * machine.copy_bytes / copy, 2 * size**3 / product
    common = {"device": measure.device_name(machine.device), **measure.versions(), "revision": measure.revision()}
    empty = {"p20": None, "p80": None, "share of floor": None, "peak MB": None, "runs": 15}
    figures = (
        ("device copy", "uint8", copy, bandwidth / 1e9, None),
        (f"torch.mm {size}", "bfloat16", product, None, rate / 1e12),
    )
    rows = [
        {"op": "ceiling", "backend": name, "dtype": dtype, "shape": {}, "p50": 1e3 * seconds, "GB/s": moved}
        | {"TFLOP/s": flops, **empty, **common}
        for name, dtype, seconds, moved, flops in figures
    ]
    print(f"ceilings: copy {bandwidth / 1e12:.2f} TB/s, bf16 product {rate / 1e12:.0f} TFLOP/s\n", flush=True)
    return bandwidth, rate, rows


def kernel_group(machine: Machine, shape: Shape, scratch: torch.Tensor, bandwidth: float) -> list[Group]:
    """Kernels alone at a shape in bf16, by device events: no Python or launch gaps between them are left out."""
    from benchmarks.suites.step import Problem
    from entrgi_kernels.backends.arguments import Adam, Draw

    kernels, device = machine.kernels(), machine.device
    p = Problem.make(shape, torch.bfloat16, device=device)
    s, n, v, d = p.settings, shape.n, shape.v, shape.d
    size = float(n * v * 2)
    rng, rows = torch.zeros(2, dtype=torch.int64, device=device), torch.arange(n, device=device)
    soft, lse = kernels.soft_embedding(p.phi, p.table, s.temperature)
    moments = torch.zeros_like(p.phi), torch.zeros_like(p.phi)
    left, out, back = torch.rand_like(p.phi), torch.empty_like(p.grad), torch.empty_like(p.phi)
    n_v_d, read, thrice = 2.0 * n * v * d, size / bandwidth, 3 * size / bandwidth

    def statistics() -> Any:
        if machine.backend != "triton":
            return kernels.softmax_entropy(p.phi, s.temperature)
        from entrgi_kernels.backends.triton.statistics import row_statistics

        return row_statistics(p.phi, 1.0, s.temperature, True)

    def sample(top_p: float) -> torch.Tensor:
        return kernels.sample_tokens(p.phi, Draw(rng, rows, s.temperature, 0, top_p))

    def embed() -> Any:
        draw = Draw(rng, rows, s.temperature, 0, s.top_p)
        return kernels.entrgi_embedding(p.phi, p.table, draw, None, None, "entropy")

    def update(state: tuple[Any, Any], step: int) -> None:
        adam = Adam(*state, step, s.lr, *s.betas, s.eps)
        kernels.guidance_update_(p.phi, p.grad, p.table, soft, lse, s.temperature, adam)

    def step() -> None:
        out = embed()
        adam = Adam(*moments, 2, s.lr, *s.betas, s.eps)
        kernels.guidance_update_(p.phi, p.grad, p.table, out[4], out[5], s.temperature, adam)

    def products() -> None:
        forward_product()
        backward_product()

    def forward_product() -> None:
        torch.mm(left, p.table, out=out)

    def backward_product() -> None:
        torch.mm(p.grad, p.table.t(), out=back)

    # name: (call, bytes, FLOP, floor as a call or in seconds)
    work: dict[str, tuple[Callable[[], Any], float, float, Callable[[], Any] | float]] = {
        "step's kernels": (step, 7 * size, 2 * n_v_d, products),
        "row statistics": (statistics, size, 0.0, read),
        "filtered sampling": (lambda: sample(s.top_p), size, 0.0, thrice),
        "unfiltered sampling": (lambda: sample(1.0), size, 0.0, read),
        "torch.sort": (lambda: p.phi.sort(dim=-1, descending=True), size, 0.0, read),
        "soft embedding": (lambda: kernels.soft_embedding(p.phi, p.table, s.temperature), size, n_v_d, forward_product),
        "whole forward": (embed, size, n_v_d, forward_product),
        "guidance update": (lambda: update(moments, 2), 6 * size, n_v_d, backward_product),
        "guidance update, M = 1": (lambda: update((None, None), 1), 2 * size, n_v_d, backward_product),
    }
    groups = []
    start = p.phi.clone()
    for name, (run, moved, flop, floor) in work.items():
        p.phi.copy_(start)
        group = Group(name, "bfloat16", shape, {}, {}, flop, moved)
        who = "torch" if name.startswith("torch") else machine.backend
        group.timings[who] = measure.Timing(who, timed(run, scratch))
        seconds = timed(floor, scratch) if callable(floor) else [floor]
        label = (
            "two GEMMs"
            if floor is products
            else "one GEMM"
            if callable(floor)
            else "3 reads"
            if name == "filtered sampling"
            else "copy"
        )
        group.timings[label] = measure.Timing(label, seconds, floor=True)
        groups.append(group)
    return groups


def kernels_are_right(machine: Machine, shape: Shape) -> list[str]:
    """What is wrong with the kernels at a shape; their times are reported only when nothing is."""
    from benchmarks.suites.ops import OPS, OpSuite
    from benchmarks.suites.step import Problem

    suite = OpSuite(Problem.make(shape, torch.bfloat16, device=machine.device))
    wrong = []
    for op in OPS:
        candidate = getattr(suite, f"_{op.rstrip('_')}")(machine.backend)
        if reason := measure.gate(candidate):
            wrong.append(f"{op} {shape.label}: {reason}")
    return wrong


def other_draws(machine: Machine) -> Group | None:
    """The filtered draw against flashinfer's, where it is installed."""
    if importlib.util.find_spec("flashinfer") is None:
        return None
    import flashinfer

    from benchmarks.harness import oracle
    from benchmarks.suites.ops import OpSuite
    from benchmarks.suites.step import Problem

    shape = machine.others
    problem = Problem.make(shape, torch.bfloat16, device=machine.device)
    s = problem.settings

    def draw() -> torch.Tensor:
        probability = torch.softmax(problem.phi.float() / s.temperature, dim=-1)
        return flashinfer.sampling.top_p_sampling_from_probs(probability, s.top_p)

    def check() -> oracle.Check:
        tokens = draw().long()[problem.rows]
        return oracle.in_nucleus(problem.phi[problem.rows], tokens, s.temperature, s.top_p, None)

    suite = OpSuite(problem)
    candidates = [*suite.candidates("sample_tokens", [machine.backend]), Candidate("flashinfer", draw, check)]
    return measure.measure("sample_tokens", torch.bfloat16, shape, candidates, device=machine.device, budget=3.0)


def other_statistics(machine: Machine) -> Group:
    """One read of the logits: our statistics against the cross-entropy of torch and, where installed, quack and Liger.

    A cross-entropy is the same pass over the same rows: a log-sum-exp and one entry. It is checked as that.
    """
    from benchmarks.harness import oracle
    from benchmarks.suites.step import Problem
    from entrgi_kernels import ops

    p = Problem.make(machine.others, torch.bfloat16, device=machine.device)
    target = p.phi.argmax(dim=-1)
    exact = torch.nn.functional.cross_entropy(p.phi.double(), target, reduction="none")

    def ours() -> torch.Tensor:
        best = p.phi.gather(1, target[:, None])[:, 0].float()
        return ops.softmax_entropy(p.phi, backend=machine.backend)[0] - best

    def quack() -> torch.Tensor:
        from quack.cross_entropy import cross_entropy

        return cross_entropy(p.phi, target, reduction="none")

    def liger() -> torch.Tensor:
        from liger_kernel.transformers.functional import liger_cross_entropy

        return liger_cross_entropy(p.phi, target, reduction="none")

    def plain() -> torch.Tensor:
        return torch.nn.functional.cross_entropy(p.phi.float(), target, reduction="none")

    runs = {"torch": plain, machine.backend: ours, "quack": quack, "liger_kernel": liger}
    candidates = [
        Candidate(name, run, lambda run=run: oracle.compare("loss", oracle.relative_error(run(), exact), 2e-2))
        for name, run in runs.items()
        if name not in ("quack", "liger_kernel") or importlib.util.find_spec(name) is not None
    ]
    return measure.measure(
        "cross-entropy", torch.bfloat16, machine.others, candidates, device=machine.device, budget=3.0
    )
