"""Candidates of Hopper's products (csrc/cuda/hopper/candidates.cu), the family `hopper` of `benchmarks.tools.tune`.

At every shape each candidate has to give exact sums of integers, launch after launch, and of the update on peaked
logits what the one that serves gives; then all are timed, interleaved, beside cuBLAS's product. The extension holds
them where it was built with ENTRGI_HOPPER_CANDIDATES=1, as `benchmarks/tools/gpu/bundle` builds it.

All of it runs in a process of its own, which names a candidate before it launches it. One that hangs, or that leaves
the device's context broken, takes that process with it; another goes on without that candidate.
"""

from __future__ import annotations

import math
import multiprocessing
import statistics
import time
from collections.abc import Callable, Mapping
from multiprocessing.connection import Connection
from typing import Any

import torch

from benchmarks.harness import measure
from benchmarks.harness.inputs import CANONICAL, Shape, embedding_table, peaked_logits

# Of the operators hopper_update_ and hopper_forward_: tensors and numbers in their order.
Update = Forward = Callable[..., None]
Members = tuple[dict[str, Update], dict[str, Forward]]
Rows = list[dict[str, Any]]
KINDS = {"update": True, "update without moments": False}
FORWARD = "forward product"
PRODUCT = "cuBLAS's product"
SERVING = ("serves", "alone")  # of the updates and of the forward products
SHAPES = [Shape(n, d) for n, d in (*CANONICAL[2:], *CANONICAL[1::-1])]  # in the order of what is not known yet
ROUNDS = 11
LAUNCHES = 20  # of each candidate on integers: a race may be lost once in many
PREPARING, PATIENCE = 90.0, 15.0  # seconds without a word that a process, and a candidate, may take


def available() -> Members | str:
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


class Integers:
    """An update whose product is that of integers: p is 1 at logits of 0, and every other factor a power of two."""

    def __init__(self, shape: Shape, moments: bool, device: str) -> None:
        generator = torch.Generator(device).manual_seed(shape.n)

        def integers(rows: int) -> torch.Tensor:
            return torch.randint(-4, 5, (rows, shape.d), generator=generator, device=device).bfloat16()

        grad, table = integers(shape.n), integers(shape.v)
        self.logits = torch.zeros(shape.n, shape.v, dtype=torch.bfloat16, device=device)
        self.moments = tuple(torch.zeros_like(self.logits) for _ in range(2)) if moments else (None, None)
        rows = torch.zeros(shape.n, device=device)
        # beta2 = 1 leaves no second moment, eps = 1 no division: step and first moment are half of the product.
        self.arguments = (self.logits, grad, table, rows, rows, *self.moments, moments, moments)
        self.arguments += (1.0, 1.0, 1.0, 0.5, 1.0, 1.0)
        truth = 0.5 * (grad.float() @ table.float().T)
        self.wanted = ((-truth).bfloat16(), *([truth.bfloat16()] if moments else []))

    def result(self, update: Update) -> tuple[torch.Tensor, ...]:
        """(logits,) or (logits, first moment) after one update."""
        for tensor in (self.logits, *self.moments):
            if tensor is not None:
                tensor.zero_()
        update(*self.arguments)
        return (self.logits, *self.moments[:1]) if self.moments[0] is not None else (self.logits,)

    def settle(self, serves: Update) -> None:
        """Want what serves gives, where that is a rounding apart: its quotient need not be exact on every GPU."""
        found = self.result(serves)
        if all(((a - b).abs() <= 2.0**-7 * b.abs()).all() for a, b in zip(found, self.wanted, strict=True)):
            self.wanted = tuple(tensor.clone() for tensor in found)

    def right(self, update: Update) -> bool:
        """Whether launch after launch gives what is wanted, bit by bit."""
        return all(
            torch.equal(ours, wanted)
            for _ in range(LAUNCHES)
            for ours, wanted in zip(self.result(update), self.wanted, strict=True)
        )


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


def _row(family: str, shape: Shape, name: str, ms: float | None, gemm: float | None, fault: str = "") -> dict[str, Any]:
    return {
        "family": family, "shape": shape.label, "tile": name, "same": ms is not None, "ms": ms, "gemm ms": gemm,
        "share of gemm": gemm / ms if ms and gemm else None, "fault": fault,
    }  # fmt: skip


def _timed(
    family: str,
    shape: Shape,
    runs: Mapping[str, Callable[[], Any] | None],
    product: Callable[[], Any],
    device: str,
    trying: Callable[[str], None],
) -> Rows:
    """A row for each of `runs` (None: it is not right, and has no time), all timed in turn with cuBLAS's product."""
    trying("")
    from benchmarks.suites.kernels import timed

    scratch = torch.empty(256 << 20 if device == "cuda" else 16, dtype=torch.uint8, device=device)
    common = {"device": measure.device_name(device), **measure.versions(), "revision": measure.revision()}
    good = {PRODUCT: product} | {name: run for name, run in runs.items() if run is not None}
    seconds: dict[str, list[float]] = {name: [] for name in good}
    for turn in range(ROUNDS):
        names = list(good)
        for name in names[turn % len(names) :] + names[: turn % len(names)]:
            trying(name)
            seconds[name] += timed(good[name], scratch, 1)
    ms = {name: 1e3 * statistics.median(some) for name, some in seconds.items()}
    return [_row(family, shape, name, ms.get(name), ms[PRODUCT]) | common for name in runs]


def _nobody(name: str) -> None:
    pass


def updates_at(
    updates: Mapping[str, Update],
    shape: Shape,
    kind: str,
    device: str = "cuda",
    trying: Callable[[str], None] = _nobody,
) -> Rows:
    """A row for each update; milliseconds are None where it is not right.

    Args:
        updates: of which the first is what serves, unless it has been left out.
        kind: of `KINDS`.
        trying: is told whose launches follow, "" for nobody's.
    """
    integers = Integers(shape, KINDS[kind], device)
    right = {}
    for name, update in updates.items():
        trying(name)
        if name == "serves":
            integers.settle(update)
        right[name] = integers.right(update)
    del integers
    trying("")
    problem = Problem(shape, KINDS[kind], device)
    expected = None
    for name, update in updates.items():
        if right[name]:
            trying(name)
            result = problem.result(update)
            expected = result if expected is None else expected
            right[name] = _same(result, expected)
    runs = {name: (lambda u=update: u(*problem.arguments)) if right[name] else None for name, update in updates.items()}
    return _timed(kind, shape, runs, lambda: problem.grad @ problem.table.T, device, trying)


def forwards_at(
    forwards: Mapping[str, Forward],
    shape: Shape,
    plan: tuple[int, int],
    device: str = "cuda",
    trying: Callable[[str], None] = _nobody,
) -> Rows:
    """A row for each forward product; milliseconds are None where sums are not exact.

    Args:
        plan: parts of the vocabulary and entries a part.
        trying: is told whose launches follow, "" for nobody's.
    """
    parts, length = plan
    generator = torch.Generator(device).manual_seed(shape.n)
    integers = torch.randint(-3, 1, (shape.n, shape.v), generator=generator, device=device).bfloat16()
    table = torch.randint(-4, 5, (shape.v, shape.d), generator=generator, device=device).bfloat16()
    zeros = torch.zeros(shape.n, device=device)
    out = torch.empty(parts, shape.n, shape.d, device=device)
    # Powers of two, whose sums with integers have fewer than 24 bits.
    truth = torch.cat([block.float().exp2() @ table.float() for block in integers.split(256)])

    def exact(forward: Forward) -> bool:
        out.fill_(math.nan)
        forward(integers, table, zeros, zeros, out[0], out[1:], parts, 1, length, 1 / math.log(2))
        return torch.equal(out.sum(0), truth)

    right = {}
    for name, forward in forwards.items():
        trying(name)
        right[name] = all(exact(forward) for _ in range(LAUNCHES))
    trying("")
    # Timed on what it meets: on small integers a GPU keeps a higher clock.
    problem = Problem(shape, False, device)
    x, maximum = problem.logits, problem.logits.float().amax(1)
    logsum = problem.arguments[4] - maximum / 0.7

    def run(forward: Forward) -> None:
        forward(x, problem.table, maximum, logsum, out[0], out[1:], parts, 1, length, 0.7)

    runs = {name: (lambda f=forward: run(f)) if right[name] else None for name, forward in forwards.items()}
    return _timed(FORWARD, shape, runs, lambda: x @ problem.table, device, trying)


def families(shape: Shape, sms: int) -> list[tuple[str, Shape, tuple[int, int] | None]]:
    """What is tried at a shape, with the forward product's plan."""
    from entrgi_kernels.backends.triton import hopper

    found: list[tuple[str, Shape, tuple[int, int] | None]] = [(kind, shape, None) for kind in KINDS]
    parts, slices, length = hopper.plan(shape.n, shape.v, shape.d, 64, sms)
    # Pairs of blocks are of two tiles of rows, and take the cluster's place that slices would need.
    return [*found, (FORWARD, shape, (parts, length))] if shape.n > 128 and slices == 1 else found


def _process(
    words: Connection,
    members: Callable[[], Members | str],
    work: list[tuple[str, Shape, tuple[int, int] | None]],
    left_out: set[str],
    device: str,
) -> None:
    """Say by `words` who is tried next, the rows of each family as they are made, and what went wrong last."""
    try:
        found = members()
        assert not isinstance(found, str), found
        updates, forwards = ({name: run for name, run in some.items() if name not in left_out} for some in found)
        for family, shape, plan in work:
            words.send("")
            if plan is None:
                words.send(updates_at(updates, shape, family, device, words.send))
            else:
                words.send(forwards_at(forwards, shape, plan, device, words.send))
            if device == "cuda":
                torch.cuda.empty_cache()
    except Exception as error:
        words.send(RuntimeError(f"{type(error).__name__}: {error}"))  # its own kind need not survive the way


def advice(rows: Rows) -> str:
    """The line of one family at one shape: its members, fastest first, the product, and who was wrong."""
    good = sorted((row for row in rows if row["same"]), key=lambda row: row["ms"])
    times = ", ".join(f"{row['tile']} {row['ms']:.3f}" for row in good) or "nobody is right"
    product = f"; {PRODUCT} {good[0]['gemm ms']:.3f} ms" if good else ""
    wrong = "".join(f"; WRONG: {row['tile']} {row['fault']}".rstrip() for row in rows if not row["same"])
    return f"{rows[0]['family']} at {rows[0]['shape']}: {times}{product}{wrong}"


def tune(
    shapes: list[Shape],
    deadline: float,
    keep: Callable[[Rows], None],
    members: Callable[[], Members | str] = available,
    device: str = "cuda",
    sms: int | None = None,
) -> Rows | str:
    """Rows of every shape until `deadline` (of time.monotonic), or why there are none.

    Args:
        keep: is given all rows so far after each family.
        members: as :func:`available`, a function that another process finds by its name.
        sms: multiprocessors (default: the GPU's).
    """
    found = members()
    if isinstance(found, str):
        return found
    if sms is None:
        sms = torch.cuda.get_device_properties(device).multi_processor_count
    work = [item for shape in shapes for item in families(shape, sms)]
    rows: Rows = []
    faults: dict[str, str] = {}
    context = multiprocessing.get_context("spawn")  # a CUDA context does not survive a fork
    while work and time.monotonic() < deadline:
        words, theirs = context.Pipe(duplex=False)
        process = context.Process(target=_process, args=(theirs, members, work, set(faults), device), daemon=True)
        process.start()
        theirs.close()
        culprit, fault = "", ""
        try:
            while work and not fault:
                if time.monotonic() > deadline:
                    break
                if not words.poll(PATIENCE if culprit else PREPARING):
                    fault = "hangs"
                    break
                word = words.recv()
                if isinstance(word, str):
                    culprit = word
                elif isinstance(word, Exception):
                    fault = str(word).splitlines()[0][:200]
                else:
                    family, shape, _ = work.pop(0)
                    own = found[1] if family == FORWARD else found[0]
                    word += [_row(family, shape, name, None, None, why) for name, why in faults.items() if name in own]
                    print(advice(word), flush=True)
                    rows += word
                    keep(rows)
        except EOFError:
            fault = "ended its process"
        finally:
            process.kill()
            process.join(10)
        if fault and culprit in (*found[0], *found[1]):
            faults[culprit] = fault
            print(f"{culprit} {fault}: going on without it", flush=True)
        elif fault:  # nobody's launch: the family itself
            family, shape, _ = work.pop(0)
            print(f"{family} at {shape.label}: {fault}", flush=True)
    for family, shape, _ in work:
        print(f"no time left for {family} at {shape.label}", flush=True)
    return rows
