"""Every raw function, native against eager, over many shapes: `python -m benchmarks.suites.sweep`.

No operator may be slower than eager by more than a tenth at any shape: this prints the worst ratios and writes all of
them as JSON. The functions are called without the operators' argument checks, which cost both engines the same. One
sample is as many calls as take 0.3 ms, and the two engines alternate. Nothing is timed whose results differ.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import ModuleType

import torch

from benchmarks.harness import measure, oracle
from benchmarks.harness.inputs import Shape, embedding_table, peaked_logits
from benchmarks.harness.measure import Group, Timing
from entrgi_kernels.backends import eager, native
from entrgi_kernels.backends.arguments import Adam, Draw
from entrgi_kernels.names import SCORED_ALGS

Call = Callable[[ModuleType], object]
TEMPERATURE = 0.7
SAMPLE = 3e-4  # seconds
ADAM = (2, 1e-4, 0.9, 0.999, 1e-8)  # step, lr, betas, eps


def calls(n: int, v: int, widths: Sequence[int], dtype: torch.dtype) -> Iterator[tuple[str, int, Call]]:
    """(name, D, call of a backend) of every function at a shape; D is 0 where there is no table."""
    x, acc = peaked_logits(n, v, dtype=dtype), torch.float64 if dtype == torch.float64 else torch.float32
    rng, rows, tokens = torch.tensor([1, 2]), torch.arange(n), x.argmax(dim=-1)
    lse, entropy = eager.softmax_entropy(x, TEMPERATURE)
    ones = torch.ones(n, dtype=acc)
    yield "softmax_entropy", 0, lambda b: b.softmax_entropy(x, TEMPERATURE)
    yield (
        "softmax_entropy_backward",
        0,
        lambda b: b.softmax_entropy_backward(x, lse, entropy, ones, ones, TEMPERATURE),
    )
    for label, filters in (("", (0, 1.0)), (" top-p", (0, 0.95)), (" top-k", (50, 1.0))):
        yield f"sample_tokens{label}", 0, lambda b, f=filters: b.sample_tokens(x, Draw(rng, rows, TEMPERATURE, *f))
    yield "sample_tokens argmax", 0, lambda b: b.sample_tokens(x, Draw(rng, rows, 0.0, 0, 1.0))
    for alg in SCORED_ALGS:
        yield f"unmask_confidence {alg}", 0, lambda b, a=alg: b.unmask_confidence(x, tokens, a, TEMPERATURE, 0, 0.95)
    for d in widths:
        table, grad = embedding_table(v, d, dtype=dtype), torch.randn(n, d).to(dtype)
        soft, lse = eager.soft_embedding(x, table, TEMPERATURE)
        draw = Draw(rng, rows, TEMPERATURE, 0, 0.95)
        state = (x.clone(), torch.zeros_like(x), torch.zeros_like(x))
        yield "soft_embedding", d, lambda b, e=table: b.soft_embedding(x, e, TEMPERATURE)
        yield (
            "soft_embedding_backward",
            d,
            lambda b, a=(table, grad, soft, lse): b.soft_embedding_backward(x, *a, TEMPERATURE),
        )
        yield (
            "soft_embedding_grad_table",
            d,
            lambda b, a=(grad, lse), e=table: b.soft_embedding_grad_table(x, *a, TEMPERATURE, e.dtype),
        )
        yield "entrgi_embedding", d, lambda b, e=table, s=draw: b.entrgi_embedding(x, e, s, None, None, "entropy")
        yield (
            "guidance_update_",
            d,
            lambda b, a=(grad, table, soft, lse), s=state: b.guidance_update_(
                s[0], *a, TEMPERATURE, Adam(*s[1:], *ADAM)
            ),
        )


def difference(call: Call) -> float:
    """The largest relative difference of the two engines' results; infinity where tokens differ."""
    worst = 0.0
    pair = [call(backend) for backend in (native, eager)]
    for ours, theirs in zip(*(r if isinstance(r, tuple) else (r,) for r in pair), strict=True):
        if not isinstance(ours, torch.Tensor):
            continue  # an update in place, whose numbers the tests compare
        if not ours.is_floating_point():
            worst = max(worst, 0.0 if torch.equal(ours, theirs) else float("inf"))
        else:
            worst = max(worst, oracle.relative_error(ours, theirs.double()))
    return worst


def timed(call: Call, backend: ModuleType, repeats: int) -> float:
    started = time.perf_counter()
    for _ in range(repeats):
        call(backend)
    return (time.perf_counter() - started) / repeats


def compare(name: str, shape: Shape, dtype: torch.dtype, call: Call, budget: float) -> Group:
    """Check a function, then time both engines, alternating, for `budget` seconds (at least five samples each)."""
    group = Group(name, str(dtype).removeprefix("torch."), shape, {}, {})
    bound = 3e-2 if dtype in (torch.bfloat16, torch.float16) else 1e-3
    if (error := difference(call)) > bound:
        group.refused["native"] = f"it differs from eager by {error:.2g}"
        return group
    engines = {"native": native, "eager": eager}
    repeats = {key: max(1, int(SAMPLE / timed(call, backend, 1))) for key, backend in engines.items()}
    group.timings = {key: Timing(key) for key in engines}
    started = time.perf_counter()
    for number in range(60):
        for key, backend in engines.items():
            group.timings[key].seconds.append(timed(call, backend, repeats[key]))
        if number >= 4 and time.perf_counter() - started > budget:
            break
    return group


def main(argv: Sequence[str] | None = None) -> int:
    """Run the sweep.

    Returns:
        0, or 1 when a function is more than a tenth slower than eager somewhere, or differs from it.
    """
    parser = argparse.ArgumentParser(prog="python -m benchmarks.suites.sweep", description=__doc__.splitlines()[0])
    parser.add_argument("--rows", type=int, nargs="+", default=[1, 7, 64], metavar="N")
    parser.add_argument("--vocabulary", type=int, nargs="+", default=[7, 63, 1000, 32_000, 151_936], metavar="V")
    parser.add_argument("--widths", type=int, nargs="+", default=[64, 1024], metavar="D")
    parser.add_argument("--dtypes", nargs="+", default=["float32", "bfloat16", "float64"])
    parser.add_argument("--budget", type=float, default=0.05, help="seconds of each comparison (default: %(default)s)")
    parser.add_argument("--json", type=Path, help="where to write the rows (default: nowhere)")
    chosen = parser.parse_args(argv)
    if (reason := native.why_not(torch.device("cpu"), torch.float32)) is not None:
        parser.error(f"the native backend is not available: {reason}")
    torch.manual_seed(0)
    groups = []
    for dtype in (getattr(torch, name) for name in chosen.dtypes):
        for v in chosen.vocabulary:
            for n in chosen.rows:
                for name, d, call in calls(n, v, chosen.widths, dtype):
                    groups.append(compare(name, Shape(n, d, v), dtype, call, chosen.budget))
            print(f"{dtype} V={v}: {len(groups)} comparisons so far", flush=True)
    measured = sorted((g for g in groups if g.timings), key=lambda g: g.ratio("native", "eager"))
    print(measure.table(measured[:20], ["eager"]))
    for group in groups:
        for reason in group.refused.values():
            print(f"REFUSED {group.op} {group.dtype} {group.shape.label}: {reason}")
    slow = [g for g in measured if g.ratio("native", "eager") < 0.9]
    print(f"{len(slow)} of {len(measured)} comparisons are more than a tenth slower than eager")
    if chosen.json:
        measure.save([row for group in measured for row in measure.rows(group)], chosen.json)
    return 1 if slow or len(measured) < len(groups) else 0


if __name__ == "__main__":
    sys.exit(main())
