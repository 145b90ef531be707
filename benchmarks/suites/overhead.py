"""What a public operator costs beyond its backend's raw function, in microseconds of the caller's time.

    python -m benchmarks.suites.overhead [--device cuda] [--backend triton] [--json FILE]

Shapes are small, so that a call is little but its overhead; nothing waits for a GPU inside a timed block. Blocks of
calls of the two alternate; the figure is the difference of their medians. "step" is the four public lines of a guidance
step without the reward, beside the two raw functions. A pair is timed only after both gave the same answer. "launches"
is what the host does for all kernels of such a step on a GPU that need not be there.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch

from benchmarks.harness import measure
from benchmarks.harness.inputs import Shape
from entrgi_kernels import backends, ops
from entrgi_kernels.backends.arguments import Adam, Draw
from entrgi_kernels.ops import _vocabulary_head

SHAPE = Shape(4, 8, 64)
CALLS = 50  # a block
LIMIT = 25.0  # microseconds of the issue: more is red
LAUNCHES_LIMIT = 150.0  # of all launches of a step of few rows
TAU, TOP_P, LR, BETAS, EPS = 0.7, 0.95, 0.5, (0.9, 0.999), 1e-8
ADAM = (LR, *BETAS, EPS)


class Pair(NamedTuple):
    """A public call and the raw one beside it; `calls` raw functions are called in each."""

    public: Callable[[], Any]
    raw: Callable[[], Any]
    calls: int = 1


def pairs(device: str, backend: str) -> dict[str, Pair]:
    """Name to pair, on one small problem."""
    g = torch.Generator().manual_seed(0)
    n, v, d = SHAPE.n, SHAPE.v, SHAPE.d
    phi, table, grad = (torch.randn(*size, generator=g).to(device) for size in ((n, v), (v, d), (n, d)))
    targets = torch.zeros(n, dtype=torch.int64, device=device)
    rng, keys = ops.make_rng(phi, 3, 0), torch.arange(n, device=device)
    state = ops.entrgi_embedding(phi, table, temperature=TAU, backend=backend).state
    adam, moments = ops.AdamState.zeros(phi), ops.AdamState.zeros(phi)
    zero = torch.zeros_like(grad)  # moves nothing, so that every call has the same work
    draw = {"temperature": TAU, "top_p": TOP_P, "seed": 3, "backend": backend}

    def raw(name: str) -> Callable[..., Any]:
        return getattr(backends.resolve(backend, phi, name), name)

    forward, update = raw("entrgi_embedding"), raw("guidance_update_")
    how, step = Draw(rng, keys, TAU, 0, TOP_P), Adam(moments.exp_avg, moments.exp_avg_sq, 2, *ADAM)
    arguments = (phi, table, how, None, None, "entropy")

    def public_step() -> Any:
        blend = ops.entrgi_embedding(phi, table, **draw)
        ops.guidance_update_(phi, zero, table, blend.state, lr=LR, adam=adam, backend=backend)
        return blend.embedding

    def raw_step() -> Any:
        blend, _, _, _, soft, lse, _ = forward(*arguments)
        update(phi, zero, table, soft, lse, TAU, step)
        return blend

    entropy, sample, soft = raw("softmax_entropy"), raw("sample_tokens"), raw("soft_embedding")
    confidence = raw("unmask_confidence")
    kernels = backends.resolve(backend, phi, "soft_embedding")
    log_prob = getattr(
        kernels, "token_log_prob", partial(_vocabulary_head.token_log_prob, entropy, kernels.soft_embedding)
    )
    return {
        "softmax_entropy": Pair(lambda: ops.softmax_entropy(phi, TAU, backend=backend), lambda: entropy(phi, TAU)),
        "sample_tokens": Pair(lambda: ops.sample_tokens(phi, **draw), lambda: sample(phi, how)),
        "soft_embedding": Pair(
            lambda: ops.soft_embedding(phi, table, temperature=TAU, backend=backend), lambda: soft(phi, table, TAU)
        ),
        "entrgi_embedding": Pair(lambda: ops.entrgi_embedding(phi, table, **draw), lambda: forward(*arguments)),
        "guidance_update_": Pair(
            lambda: ops.guidance_update_(phi, zero, table, state, lr=LR, adam=adam, backend=backend),
            lambda: update(phi, zero, table, *state[:2], TAU, step),
        ),
        "unmask_confidence": Pair(
            lambda: ops.unmask_confidence(phi, targets, temperature=TAU, backend=backend),
            lambda: confidence(phi, targets, "entropy", TAU, 0, 1.0),
        ),
        "token_log_prob": Pair(
            lambda: ops.token_log_prob(grad, table, targets, backend=backend),
            lambda: log_prob(grad, table, None, targets, False),
        ),
        "step": Pair(public_step, raw_step, calls=2),
    }


def same(pair: Pair) -> bool:
    """Whether both gave the same first tensor."""
    ours, theirs = pair.public(), pair.raw()
    if ours is None:
        return True
    ours, theirs = (x if isinstance(x, torch.Tensor) else x[0] for x in (ours, theirs))
    return torch.equal(ours, theirs)


def microseconds(pair: Pair, device: str, blocks: int) -> tuple[float, float]:
    """(public, raw): medians over blocks of calls of what the caller's thread spent on one."""
    spent: tuple[list[float], list[float]] = ([], [])
    for _ in range(blocks):
        for seconds, call in zip(spent, pair[:2], strict=True):
            measure.synchronize(device)
            start = time.perf_counter()
            for _ in range(CALLS):
                call()
            seconds.append((time.perf_counter() - start) / CALLS)
    return 1e6 * statistics.median(spent[0]), 1e6 * statistics.median(spent[1])


def measure_overhead(device: str, backend: str, blocks: int = 40) -> list[dict[str, Any]]:
    """A row an operator, times in microseconds; "refused" instead of times where the answers differ."""
    rows = []
    common = {"device": measure.device_name(device), **measure.versions(), "revision": measure.revision()}
    for name, pair in pairs(device, backend).items():
        row = {"op": f"overhead {name}", "backend": backend, "dtype": "float32", "shape": SHAPE.to_dict()}
        if same(pair):
            public, raw = microseconds(pair, device, blocks)
            row |= {"public us": public, "raw us": raw, "over us": public - raw, "limit us": LIMIT * pair.calls}
        else:
            row["refused"] = "the public call and the raw one differ"
        rows.append(row | common)
    return rows


def launches_row(blocks: int = 40) -> dict[str, Any] | None:
    """What the host does for the launches of a step of 64 rows on an H100, which need not be there.

    The raw functions run on tensors without storage up to the compiled kernels, whose own launch (some 5 microseconds
    each) is left out. "raw us" is the same without any dispatch. None where Triton is missing.
    """
    try:
        from benchmarks.tools import gate
        from entrgi_kernels.backends import triton as kernels
        from entrgi_kernels.backends.triton import config, launch
    except ImportError:
        return None

    def empty(*size: int, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
        return torch.empty(size, dtype=dtype, device="meta")

    n, v, d = 64, 151_936, 1024
    phi, table, grad, moments = empty(n, v), empty(v, d), empty(n, d), (empty(n, v), empty(n, v))
    draw = Draw(empty(2, dtype=torch.int64), empty(n, dtype=torch.int64), TAU, 0, TOP_P)
    made: dict[Any, Callable[..., None]] = {}
    count = 0

    def step() -> None:
        found = kernels.entrgi_embedding(phi, table, draw, None, None, "entropy")
        kernels.guidance_update_(phi, grad, table, found[4], found[5], TAU, Adam(*moments, 2, *ADAM))

    def dispatched(function: Any, args: tuple[Any, ...], options: dict[str, Any]) -> None:
        nonlocal count
        count += 1
        own = {name: options[name] for name in ("num_warps", "num_stages", "enable_fp_fusion")}
        meta = {name: value for name, value in options.items() if name not in own}
        made.setdefault((0, *launch.key(function, args, own, meta)), lambda *_: None)(*args, *meta.values())

    before = config.override, launch.recorder
    try:
        config.override = gate.MACHINES["sm_90"].tables
        launch.recorder = dispatched
        step()
        launches, seconds = count, []
        for launch.recorder in (dispatched, lambda *_: None):
            seconds.append(microseconds(Pair(step, step), "cpu", blocks)[0])
    finally:
        config.override, launch.recorder = before
    row = {"op": f"overhead {launches} launches", "backend": "triton", "dtype": "bfloat16"}
    row |= {"shape": Shape(n, d, v).to_dict(), "public us": seconds[0], "raw us": seconds[1]}
    common = {"device": measure.device_name(), **measure.versions(), "revision": measure.revision()}
    return row | {"over us": seconds[0] - seconds[1], "limit us": LAUNCHES_LIMIT} | common


def table(rows: Sequence[dict[str, Any]]) -> str:
    """The rows as text."""
    lines = [f"{'operator':18}  {'public us':>9}  {'raw us':>7}  {'over us':>7}  {'limit':>5}"]
    for row in rows:
        name = row["op"].removeprefix("overhead ")
        if "refused" in row:
            lines.append(f"{name:18}  REFUSED: {row['refused']}")
        else:
            figures = f"{row['public us']:9.1f}  {row['raw us']:7.1f}  {row['over us']:7.1f}  {row['limit us']:5.0f}"
            lines.append(f"{name:18}  {figures}")
    return "\n".join(lines)


def main(argv: Sequence[str] | None = None) -> int:
    """Measure, print a table, and add the rows to the device's results.

    Returns:
        0, or 1 when an answer differs. A busy machine makes calls slow, so that a figure over the limit is only shown.
    """
    parser = argparse.ArgumentParser(prog="python -m benchmarks.suites.overhead", description=__doc__.split("\n")[0])
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--backend", help="of this project (default: what auto takes)", default="auto")
    parser.add_argument("--blocks", type=int, default=40, help=f"blocks of {CALLS} calls (default: 40)")
    parser.add_argument("--json", type=Path, help="where to write rows (default: benchmarks/results/<device>.json)")
    chosen = parser.parse_args(argv)
    rows = measure_overhead(chosen.device, chosen.backend, chosen.blocks)
    if (launches := launches_row(chosen.blocks)) is not None:
        rows.append(launches)
    print(table(rows))
    measure.save(rows, chosen.json or measure.result_path(chosen.device))
    return 1 if any("refused" in row for row in rows) else 0


if __name__ == "__main__":
    sys.exit(main())
