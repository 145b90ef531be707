"""``entrgi check``: are the kernels right on this machine, and how fast are they?

Every kernel that guided generation and training call is compared with eager arithmetic, whatever was known of it: at
each entry of the tables, in bfloat16 and float32. Then each family is timed, caches cold, beside eager torch, and its
rate is set against what this machine gives at its best: the bandwidth of a copy and the rate of a matrix product. On a
GPU verdicts and times go to the file by which ``backend="auto"`` chooses (:mod:`entrgi_kernels.backends.proof`).
"""

from __future__ import annotations

import argparse
import json
import logging
import math
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

from .errors import check_writable, write_text
from .tables import text_table

FAMILIES = {
    "softmax_entropy": "row statistics",
    "softmax_entropy_backward": "their gradient",
    "sample_tokens": "draw",
    "unmask_confidence": "confidence",
    "soft_embedding": "soft embedding",
    "soft_embedding_backward": "its gradient",
    "soft_embedding_grad_table": "gradient of the table",
    "entrgi_embedding": "whole forward",
    "guidance_update_": "guidance update",
    "first_order_update_": "first-order update",
}

_NOT_COMPARED = "not compared"  # for want of memory


class Size(NamedTuple):
    """One shape of the benchmark."""

    n: int
    v: int
    d: int


class Rates(NamedTuple):
    """What the machine gives at its best: bytes a second of a copy (read and written), FLOP a second of a product."""

    bandwidth: float
    product: float


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Flags of ``entrgi check``."""
    parser.add_argument("--json", metavar="PATH", type=Path, help="also write every verdict and time to this file")


def run(args: argparse.Namespace) -> int:
    """Prove and time every engine of this machine's first GPU, or of its CPU.

    Returns:
        0; 1 if a kernel computes something wrong, cannot run, or could not be compared for want of memory.
    """
    import torch

    from entrgi_kernels.backends import proof

    if args.json is not None:
        check_writable(args.json)
    started = time.perf_counter()
    device = torch.device("cuda", 0) if torch.cuda.is_available() else torch.device("cpu")
    engines, absent = engines_of(device)
    print(f"{proof.machine(device)}\n{_said(engines, absent)}", flush=True)
    if engines and device.type == "cuda":
        _compile(engines)
    verdicts = _prove(engines, device)
    wrong = {key: verdict for key, verdict in verdicts.items() if not verdict.passed}
    rates, times = _measure(engines, device)
    print()
    print(*text_table(*_table(engines, verdicts, rates, times)), sep="\n")
    print(
        f"\ncopy {rates.bandwidth / 1e9:.0f} GB/s, product {rates.product / 1e12:.2f} TFLOP/s; "
        f"{time.perf_counter() - started:.0f} s in all"
    )
    for key, verdict in wrong.items():
        print(f"{'' if verdict.figures.startswith(_NOT_COMPARED) else 'WRONG: '}{key}: {verdict.figures}")
    if device.type == "cuda":
        print(f"verdicts and times: {proof.path() or 'not kept, there is no home folder'}")
    if args.json is not None:
        write_text(args.json, json.dumps(_record(device, absent, verdicts, rates, times), indent=2))
    return int(bool(wrong))


def engines_of(device: Any) -> tuple[dict[str, Any], dict[str, str]]:
    """(name to module of what runs on the device beside eager, name to the reason why the rest does not)."""
    import torch

    from entrgi_kernels import backends

    engines, absent = {}, {}
    for name in ("triton", "cuda") if device.type == "cuda" else ("native",):
        module = backends.load(name)
        reason = backends.why_not(name, device, torch.bfloat16)
        if isinstance(module, str) or reason is not None:
            absent[name] = str(reason)
        else:
            engines[name] = module
    return engines, absent


def _said(engines: dict[str, Any], absent: dict[str, str]) -> str:
    lines = [f"not here: {name}: {reason}" for name, reason in absent.items()]
    if not engines:
        lines.append("nothing but eager torch runs here: there is nothing to prove")
    return "\n".join(lines) or f"checking {', '.join(engines)} against eager torch"


def _compile(engines: dict[str, Any]) -> None:
    """Compile what is going to be launched on all cores: Triton itself compiles one kernel after the other."""
    import os

    import torch

    if "triton" not in engines:
        return
    from entrgi_kernels.backends.triton import aot

    started = time.perf_counter()
    rows = sorted({trial.rows[0] for trial in _trials("triton", torch.device("cuda", 0))})
    cases = [(n, 151_936, 1024, *pair) for n in rows for pair in _pairs()]
    try:
        made = aot.fill_cache(cases, os.cpu_count() or 2)
    except Exception as error:  # it saves time, no more: the kernels are compiled where they are launched
        logging.getLogger("entrgi").info("kernels are compiled one by one: %s", error)
        return
    print(f"{made} kernels compiled in {time.perf_counter() - started:.0f} s", flush=True)


def _pairs() -> tuple[tuple[Any, Any], ...]:
    """dtypes of (logits, table)."""
    import torch

    return (torch.bfloat16, torch.bfloat16), (torch.float32, torch.float32), (torch.float32, torch.bfloat16)


def _trials(name: str, device: Any) -> list[Any]:
    from entrgi_kernels.backends import trials

    return list(trials.every(device, _pairs()))


def _prove(engines: dict[str, Any], device: Any) -> dict[str, Any]:
    """ "<engine> <trial>" to its verdict; shows how far it is where somebody looks."""
    from tqdm import tqdm

    from entrgi_kernels.backends import proof

    wanted = [
        (name, module, trial)
        for name, module in engines.items()
        for trial in _trials(name, device)
        if hasattr(module, trial.op)
    ]
    found = {}
    bar = tqdm(wanted, desc="proving", unit="kernel", disable=not sys.stderr.isatty(), leave=False)
    for name, module, trial in bar:
        bar.set_postfix_str(FAMILIES[trial.op])
        try:
            if device.type == "cuda":
                verdict = proof.prove(name, module, trial, device)
            else:  # no race of programs to wait for, and nothing asks for the verdict later
                verdict = proof.examine(name, module, trial, device, launches=3)
        except Exception as error:
            if not proof.no_verdict(error):
                raise
            verdict = proof.Verdict(False, f"{_NOT_COMPARED}: {type(error).__name__}: {error}", 0.0, 0.0)
        found[f"{name} {trial}"] = verdict
    return found


# -- times ------------------------------------------------------------------------------------------------------------


class Clock:
    """Median milliseconds of a call on a device whose caches hold none of its operands."""

    def __init__(self, device: Any) -> None:
        import torch

        self.device = device
        size = 256 << 20 if device.type == "cuda" else 64 << 20  # beyond any last-level cache's reach
        self._scratch = torch.empty(size, dtype=torch.int8, device=device)

    def __call__(self, call: Callable[[], Any], seconds: float = 0.3) -> float:
        import torch

        call()
        taken: list[float] = []
        until = time.perf_counter() + seconds
        while len(taken) < 3 or (len(taken) < 30 and time.perf_counter() < until):
            self._scratch.zero_()
            if self.device.type == "cuda":
                first, last = (torch.cuda.Event(enable_timing=True) for _ in range(2))
                first.record()
                call()
                last.record()
                last.synchronize()
                taken.append(first.elapsed_time(last))
            else:
                started = time.perf_counter()
                call()
                taken.append(1e3 * (time.perf_counter() - started))
        return statistics.median(taken)


def rates_of(device: Any, clock: Clock, dtype: Any) -> Rates:
    import torch

    size = 512 << 20 if device.type == "cuda" else 64 << 20
    source = torch.zeros(size, dtype=torch.int8, device=device)
    to = torch.empty_like(source)
    bandwidth = 2 * size / (1e-3 * clock(lambda: to.copy_(source)))
    n = 8192 if device.type == "cuda" else 1024
    a = torch.randn(n, n, device=device).to(dtype)
    return Rates(bandwidth, 2 * n**3 / (1e-3 * clock(lambda: torch.mm(a, a))))


def _work(size: Size, dtype: Any, device: Any) -> Iterator[tuple[str, tuple[Any, ...], float, float]]:
    """(raw function, arguments, least bytes moved, FLOP of its products) of each family; one of both is 0."""
    import torch

    from entrgi_kernels.backends.arguments import Adam, Draw

    generator = torch.Generator(device).manual_seed(0)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator, device=device, dtype=torch.float32)

    n, v, d = size
    logits = torch.empty(n, v, dtype=dtype, device=device)
    for row in logits:
        row.copy_(3.0 * normal(v))
        row[: v // 50] += 6.0  # a few hundred entries carry the mass, as a trained model's do
    table, grad = normal(v, d).to(dtype), normal(n, d).to(dtype)
    soft, lse = normal(n, d), torch.logsumexp(logits.float() / 0.7, dim=1)
    rng, keys = torch.tensor([1, 2], device=device), torch.arange(n, device=device)
    moments = torch.zeros_like(logits), torch.zeros_like(logits)
    read, product = float(n * v * logits.element_size()), 2.0 * n * v * d
    draw, adam = Draw(rng, keys, 0.7, 0, 0.95), Adam(*moments, 2, 1e-3, 0.9, 0.999, 1e-8)
    yield "softmax_entropy", (logits, 1.0), read, 0.0
    yield "softmax_entropy_backward", (logits, lse, lse, lse, lse, 0.7), 2 * read, 0.0
    yield "sample_tokens", (logits, draw), read, 0.0
    yield "unmask_confidence", (logits, keys, "maskgit_plus", 0.7, 0, 0.95), read, 0.0
    yield "soft_embedding", (logits, table, 0.7), 0.0, product
    yield "entrgi_embedding", (logits, table, draw, None, None, "entropy"), 0.0, product
    yield "soft_embedding_backward", (logits, table, grad, soft, lse, 0.7), 0.0, product
    yield "guidance_update_", (logits, grad, table, soft, lse, 0.7, adam), 0.0, product
    yield "first_order_update_", (logits, grad, table, keys % v, 1e-3), 0.0, product
    yield "soft_embedding_grad_table", (logits, grad, lse, 0.7, dtype), 0.0, product


def sizes_of(device: Any) -> Sequence[Size]:
    import torch

    if device.type != "cuda":
        return (Size(32, 32_768, 512),)
    sizes = Size(64, 151_936, 1024), Size(1024, 151_936, 2048)
    free = torch.cuda.mem_get_info(device)[0]
    return [size for size in sizes if size.n * size.v * 60 < free]  # eager sorts in float64


def _measure(engines: dict[str, Any], device: Any) -> tuple[Rates, list[dict[str, Any]]]:
    """The machine's rates, and a row a family and size: milliseconds of each engine, bytes and FLOP."""
    import torch

    from entrgi_kernels.backends import eager, proof, trials

    clock, dtype = Clock(device), torch.bfloat16 if device.type == "cuda" else torch.float32
    rates, rows = rates_of(device, clock, dtype), []
    for size in sizes_of(device) if engines else ():
        for op, args, moved, flop in _work(size, dtype, device):
            taken: dict[str, float] = {}
            for name, module in {**engines, "eager": eager}.items():
                if not hasattr(module, op):
                    continue
                try:
                    with torch.no_grad():
                        taken[name] = clock(partial(getattr(module, op), *args))
                except Exception as error:  # one kernel that cannot run is no reason to tell nothing of the rest
                    print(f"{FAMILIES[op]}: {name} {size}: {type(error).__name__}: {str(error)[:200]}", flush=True)
            rows.append(
                {"op": op, **size._asdict(), "dtype": str(dtype)[6:], "bytes": moved, "flop": flop, "ms": taken}
            )
            if device.type == "cuda":
                matrices, flags = trials.READERS[op](*args)
                proof.remember_timings(trials.describe(op, matrices, flags, device), device, taken)
    return rates, rows


# -- what is shown ----------------------------------------------------------------------------------------------------


def _table(
    engines: dict[str, Any], verdicts: dict[str, Any], rates: Rates, times: list[dict[str, Any]]
) -> tuple[Sequence[str], list[Sequence[str]]]:
    """Head and rows: a row a family, engine and size."""
    rows: list[Sequence[str]] = []
    for name, module in engines.items():
        for op, family in FAMILIES.items():
            if not hasattr(module, op):
                continue
            mine = [verdict for key, verdict in verdicts.items() if key.startswith(f"{name} {op} ")]
            passed = sum(verdict.passed for verdict in mine)
            compared = [verdict for verdict in mine if not verdict.figures.startswith(_NOT_COMPARED)]
            right = "right" if passed == len(mine) else "WRONG" if passed < len(compared) else _NOT_COMPARED
            worst = max((verdict.excess for verdict in mine), default=0.0)
            said = [family, name, right, f"{passed}/{len(mine)}", _short(worst)]
            timed = [row for row in times if row["op"] == op and name in row["ms"]]
            for row in timed:
                ms, eager = row["ms"][name], row["ms"].get("eager")
                rate, of = (
                    (row["bytes"] / rates.bandwidth, "copy") if row["bytes"] else (row["flop"] / rates.product, "GEMM")
                )
                shown = f"{row['n']}x{row['v']}x{row['d']} {row['dtype']}"
                ratio = "" if eager is None else f"{eager / ms:.1f}x"
                rows.append([*said, shown, f"{ms:.3f}", ratio, f"{100e3 * rate / ms:.0f}% {of}"])
                said = ["", "", "", "", ""]
            if not timed:
                rows.append([*said, "", "", "", ""])
    head = ("kernels", "engine", "", "proven", "worst error / bound", "N x V x D", "ms", "of eager", "share of")
    return head, rows


def _short(excess: float) -> str:
    return f"{excess:.2g}" if excess < 1e6 and math.isfinite(excess) else "none is finite"


def _record(
    device: Any, absent: dict[str, str], verdicts: dict[str, Any], rates: Rates, times: list[dict[str, Any]]
) -> dict[str, Any]:
    from entrgi_kernels.backends import proof

    return {
        "machine": proof.machine(device),
        "absent": absent,
        "bandwidth": rates.bandwidth,
        "flops": rates.product,
        "verdicts": {key: verdict._asdict() for key, verdict in verdicts.items()},
        "times": times,
    }
