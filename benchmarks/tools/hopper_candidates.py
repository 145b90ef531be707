"""Candidates of Hopper's products (csrc/cuda/hopper/candidates.cu), the family `hopper` of `benchmarks.tools.tune`.

At every shape each candidate has to give exact sums of integers, and of the update on peaked logits what the one that
serves gives; then all are timed, interleaved, beside cuBLAS's product. The extension holds them where it was built with
ENTRGI_HOPPER_CANDIDATES=1, as `benchmarks/tools/gpu/bundle` builds it.
"""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Mapping
from typing import Any

import torch

from benchmarks.harness import measure
from benchmarks.harness.inputs import Shape, embedding_table, peaked_logits

# Of the operators hopper_update_ and hopper_forward_: tensors and numbers in their order.
Update = Forward = Callable[..., None]
KINDS = {"update": True, "update without moments": False}
FORWARD = "forward product"
PRODUCT = "cuBLAS's product"
ROUNDS = 11


def available() -> tuple[dict[str, Update], dict[str, Forward]] | str:
    """The update and the forward product that serve, each with its candidates by name; or why there are none."""
    from entrgi_kernels.backends.triton import hopper

    if not hopper.ready(torch.device("cuda", torch.cuda.current_device())):
        return "Hopper's candidates need compute capability 9.0 and an extension built for it"
    ops = torch.ops.entrgi_cuda
    if not hasattr(ops, "hopper_update_candidates"):
        return "the extension was built without ENTRGI_HOPPER_CANDIDATES=1: it has no candidates"
    updates: dict[str, Update] = {"serves": ops.hopper_update_}
    for number, name in enumerate(ops.hopper_update_candidates()):
        updates[name] = lambda *arguments, number=number: ops.hopper_update_candidate_(number, *arguments)
    return updates, {"alone": ops.hopper_forward_, "pairs": ops.hopper_forward_candidate_}


def exact(update: Update, shape: Shape, moments: bool, device: str) -> bool:
    """Whether the product is that of integers: p is 1 at logits of 0, and every other factor a power of two."""
    generator = torch.Generator(device).manual_seed(shape.n)

    def integers(rows: int) -> torch.Tensor:
        return torch.randint(-4, 5, (rows, shape.d), generator=generator, device=device).bfloat16()

    grad, table = integers(shape.n), integers(shape.v)
    logits = torch.zeros(shape.n, shape.v, dtype=torch.bfloat16, device=device)
    pair = tuple(torch.zeros_like(logits) for _ in range(2)) if moments else (None, None)
    rows = torch.zeros(shape.n, device=device)
    # beta2 = 1 leaves no second moment, eps = 1 no division: step and first moment are half of the product.
    update(logits, grad, table, rows, rows, *pair, moments, moments, 1.0, 1.0, 1.0, 0.5, 1.0, 1.0)
    truth = 0.5 * (grad.float() @ table.float().T)
    return torch.equal(logits, (-truth).bfloat16()) and (pair[0] is None or torch.equal(pair[0], truth.bfloat16()))


class Problem:
    """Peaked logits, and the operator's arguments after them."""

    def __init__(self, shape: Shape, moments: bool, device: str) -> None:
        self.start = peaked_logits(shape.n, shape.v, dtype=torch.bfloat16, device=device)
        self.logits = self.start.clone()
        self.grad = torch.randn(shape.n, shape.d, generator=torch.Generator(device).manual_seed(1), device=device)
        self.grad = self.grad.bfloat16()
        self.table = embedding_table(shape.v, shape.d, dtype=torch.bfloat16, device=device)
        self.moments = tuple(torch.zeros_like(self.logits) for _ in range(2)) if moments else (None, None)
        lse = torch.cat([(row / 0.7).float().logsumexp(1) for row in self.logits.split(256)])
        rows = (torch.zeros(shape.n, device=device), lse)
        self.arguments = (self.logits, self.grad, self.table, *rows, *self.moments, moments, moments)
        self.arguments += (0.7, 0.01, 1.0, 0.9, 0.999, 1e-8)

    def result(self, update: Update) -> tuple[torch.Tensor, ...]:
        """What one update makes of the logits and of moments of 0."""
        self.logits.copy_(self.start)
        kept = [moment.zero_() for moment in self.moments if moment is not None]
        update(*self.arguments)
        return tuple(tensor.clone() for tensor in (self.logits, *kept))


def _same(result: tuple[torch.Tensor, ...], expected: tuple[torch.Tensor, ...]) -> bool:
    """Equal but for the last bit of a few."""
    for ours, theirs in zip(result, expected, strict=True):
        size = theirs.float().abs()
        apart = (ours.float() - theirs.float()).abs()
        if not (apart <= 2.0**-7 * (size + size.mean())).all() or (apart > 0).float().mean() > 1e-3:
            return False
    return True


def _timed(
    family: str, shape: Shape, runs: Mapping[str, Callable[[], Any] | None], product: Callable[[], Any], device: str
) -> list[dict[str, Any]]:
    """A row for each of `runs` (None: it is not right, and has no time), all timed in turn with cuBLAS's product."""
    from benchmarks.suites.kernels import timed

    scratch = torch.empty(256 << 20 if device == "cuda" else 16, dtype=torch.uint8, device=device)
    common = {"device": measure.device_name(device), **measure.versions(), "revision": measure.revision()}
    good = {PRODUCT: product} | {name: run for name, run in runs.items() if run is not None}
    seconds: dict[str, list[float]] = {name: [] for name in good}
    for turn in range(ROUNDS):
        names = list(good)
        for name in names[turn % len(names) :] + names[: turn % len(names)]:
            seconds[name] += timed(good[name], scratch, 1)
    ms = {name: 1e3 * statistics.median(some) for name, some in seconds.items()}
    rows = []
    for name in runs:
        row = {"family": family, "shape": shape.label, "tile": name, "same": name in ms, "ms": ms.get(name)}
        row |= {"gemm ms": ms[PRODUCT], "share of gemm": ms[PRODUCT] / ms[name] if name in ms else None}
        rows.append(row | common)
    return rows


def updates_at(updates: Mapping[str, Update], shape: Shape, device: str = "cuda") -> list[dict[str, Any]]:
    """A row for each update and kind of moments; milliseconds are None where it is not right."""
    rows: list[dict[str, Any]] = []
    for kind, moments in KINDS.items():
        right = {name: exact(update, shape, moments, device) for name, update in updates.items()}
        problem = Problem(shape, moments, device)
        expected = problem.result(next(iter(updates.values())))
        right = {name: good and _same(problem.result(updates[name]), expected) for name, good in right.items()}
        del expected
        runs = {
            name: (lambda update=updates[name], p=problem: update(*p.arguments)) if good else None
            for name, good in right.items()
        }
        rows += _timed(kind, shape, runs, lambda p=problem: p.grad @ p.table.T, device)
        del problem, runs
        if device == "cuda":
            torch.cuda.empty_cache()
    return rows


def forwards_at(
    forwards: Mapping[str, Forward], shape: Shape, plan: tuple[int, int], device: str = "cuda"
) -> list[dict[str, Any]]:
    """A row for each forward product; milliseconds are None where sums are not exact.

    Args:
        plan: parts of the vocabulary and entries a part.
    """
    parts, length = plan
    generator = torch.Generator(device).manual_seed(shape.n)
    logits = torch.randint(-3, 1, (shape.n, shape.v), generator=generator, device=device).bfloat16()
    table = torch.randint(-4, 5, (shape.v, shape.d), generator=generator, device=device).bfloat16()
    rows = torch.zeros(shape.n, device=device)
    out = torch.empty(parts, shape.n, shape.d, device=device)
    # Powers of two, whose sums with integers have fewer than 24 bits.
    truth = torch.cat([block.float().exp2() @ table.float() for block in logits.split(256)])
    temperature = 1 / math.log(2)

    def run(forward: Forward) -> None:
        forward(logits, table, rows, rows, out[0], out[1:], parts, 1, length, temperature)

    runs: dict[str, Callable[[], Any] | None] = {}
    for name, forward in forwards.items():
        out.fill_(math.nan)
        run(forward)
        runs[name] = (lambda forward=forward: run(forward)) if torch.equal(out.sum(0), truth) else None
    return _timed(FORWARD, shape, runs, lambda: logits @ table, device)


def advice(rows: list[dict[str, Any]]) -> list[str]:
    """A line for each family of one shape: its members, fastest first, the product, and who was wrong."""
    lines = []
    for kind in dict.fromkeys(row["family"] for row in rows):
        own = [row for row in rows if row["family"] == kind]
        good = sorted((row for row in own if row["same"]), key=lambda row: row["ms"])
        times = ", ".join(f"{row['tile']} {row['ms']:.3f}" for row in good)
        wrong = "".join(f"; WRONG: {row['tile']}" for row in own if not row["same"])
        lines.append(f"{kind} at {own[0]['shape']}: {times}; {PRODUCT} {own[0]['gemm ms']:.3f} ms{wrong}")
    return lines


def tune(
    shapes: list[Shape], deadline: float, keep: Callable[[list[dict[str, Any]]], None]
) -> list[dict[str, Any]] | str:
    """Rows of every shape until `deadline` (of time.monotonic), or why there are none.

    Args:
        keep: is given all rows so far after each shape.
    """
    from entrgi_kernels.backends.triton import hopper

    found = available()
    if isinstance(found, str):
        return found
    updates, forwards = found
    sms = torch.cuda.get_device_properties("cuda").multi_processor_count
    rows: list[dict[str, Any]] = []
    for shape in shapes:
        if time.monotonic() > deadline:
            print(f"no time left for {shape.label}", flush=True)
            continue
        made = updates_at(updates, shape)
        if shape.n > 128:  # else there is no pair of rows' tiles
            length = hopper.plan(shape.n, shape.v, shape.d, 64, sms)[2]
            made += forwards_at(forwards, shape, (-(-shape.v // length), length))
        print("\n".join(advice(made)), flush=True)
        rows += made
        keep(rows)
    return rows
