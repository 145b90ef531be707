"""Faults planted in the Triton kernels themselves, a family at a time, are caught; the kernels as they are pass.

On a CPU, in a process of its own with Triton's interpreter: it has to be chosen before the kernels are decorated.
"""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("triton")
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
inner = pytest.mark.skipif(not INTERPRETED, reason="runs in an inner process")
LAUNCHES = 4  # of each problem; 50 elsewhere, where a launch is not some tenths of a second


@pytest.mark.slow
@pytest.mark.skipif(INTERPRETED, reason="this is an inner process")
def test_planted_faults_in_an_interpreting_process():
    environment = os.environ | {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "pytest", "-q", "-n", "0", "--tb=short", "-p", "no:cacheprovider", __file__]
    done = subprocess.run(command, env=environment, cwd=Path(__file__).parents[2], capture_output=True, text=True)
    assert done.returncode == 0 and " passed" in done.stdout, done.stdout[-6000:] + done.stderr[-2000:]


if INTERPRETED:
    # Importing those tests speeds the interpreter up.
    _spec = importlib.util.spec_from_file_location("others", Path(__file__).with_name("test_triton_interpreter.py"))
    _spec.loader.exec_module(importlib.util.module_from_spec(_spec))

    from entrgi_kernels import backends
    from entrgi_kernels.backends import comparison, eager, proof
    from entrgi_kernels.backends import triton as kernels
    from entrgi_kernels.backends.arguments import Adam, Draw
    from entrgi_kernels.backends.triton import launch

ADAM = (0.5, 0.9, 0.999, 1e-8)
# (family, raw function, rows, module and kernel that is spoiled, its argument)
FAMILIES = [
    ("statistics", "softmax_entropy", 3, "statistics", "_merge_kernel", "lse_ptr"),
    ("race", "sample_tokens", 3, "sample_tokens", "_race_merge_kernel", "tokens_ptr"),
    ("product", "soft_embedding", 3, "soft_embedding", "_forward_kernel", "soft_ptr"),
    ("chunked", "soft_embedding", 22, "chunked", "_probability_kernel", "out_ptr"),
    ("forward", "entrgi_embedding", 3, "soft_embedding", "_merge_kernel", "out_ptr"),
    ("update", "guidance_update_", 3, "guidance_update", "_backward_kernel", "out_ptr"),
    ("chunked update", "guidance_update_", 22, "chunked", "_update_kernel", "out_ptr"),
    ("first order", "first_order_update_", 3, "guidance_update", "_backward_kernel", "out_ptr"),
    ("its baseline", "first_order_update_", 3, "first_order_update", "_picked_kernel", "out_ptr"),
    ("chunked first order", "first_order_update_", 22, "chunked", "_update_kernel", "out_ptr"),
    ("gradient", "soft_embedding_backward", 3, "guidance_update", "_backward_kernel", "out_ptr"),
    ("table", "soft_embedding_grad_table", 3, "soft_embedding", "_table_kernel", "out_ptr"),
    ("confidence", "unmask_confidence", 3, "unmask_confidence", "_confidence_merge_kernel", "out_ptr"),
]


def call(op: str, n: int) -> tuple:
    logits, table, grad = torch.randn(n, 96), torch.randn(96, 16), torch.randn(n, 16)
    lse = eager.softmax_entropy(logits, 0.7)[0]
    rng, rows, soft = torch.tensor([3, 4]), torch.arange(n), torch.randn(n, 16)
    return {
        "softmax_entropy": (logits, 0.7),
        "sample_tokens": (logits, Draw(rng, rows, 0.7, 0, 1.0)),
        "soft_embedding": (logits, table, 0.7),
        "soft_embedding_backward": (logits, table, grad, soft, lse, 0.7),
        "soft_embedding_grad_table": (logits, grad, lse, 0.7, torch.float32),
        "entrgi_embedding": (logits, table, Draw(rng, rows, 0.7, 0, 1.0), rows, None, "entropy"),
        "guidance_update_": (logits, grad, table, soft, lse, 0.7, Adam(None, None, 1, *ADAM)),
        "first_order_update_": (logits, grad, table, rows, 0.5),
        "unmask_confidence": (logits, rows, "maskgit_plus", 0.7, 0, 1.0),
    }[op]


def outputs(result, args) -> tuple:
    return (args[0],) if result is None else result if isinstance(result, tuple) else (result,)


def wrong_tile(values: torch.Tensor, number: int) -> None:
    tile = values[..., -(-values.shape[-1] * 2 // 3) :]
    tile.copy_(tile.roll(1, -1) + 1)


def a_nan(values: torch.Tensor, number: int) -> None:
    values.view(-1)[-1] = float("nan") if values.is_floating_point() else -1


def now_and_then(values: torch.Tensor, number: int) -> None:
    if number % LAUNCHES == LAUNCHES - 1:
        values.view(-1)[values.numel() // 2] = 7


@pytest.fixture
def door(monkeypatch, tmp_path):
    """The real kernels, interpreted, behind their proof on this CPU."""
    monkeypatch.setattr(comparison, "LAUNCHES", LAUNCHES)
    monkeypatch.setattr(backends, "PREFERENCE", {"cpu": ("triton", "eager")})
    monkeypatch.setattr(proof, "DEVICES", {"cpu"})
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    backends.forget()
    yield
    backends.forget()


@inner
@pytest.mark.parametrize("family", FAMILIES, ids=lambda family: family[0])
def test_the_kernels_as_they_are_pass(door, family):
    _, op, n, *_ = family
    args = call(op, n)
    getattr(backends.resolve("triton", args[0], op), op)(*args)
    assert [verdict.passed for verdict in proof.verdicts(torch.device("cpu")).values()] == [True]


@inner
@pytest.mark.parametrize("fault", [wrong_tile, a_nan, now_and_then])
@pytest.mark.parametrize("family", FAMILIES, ids=lambda family: family[0])
def test_a_planted_fault_is_caught(door, monkeypatch, caplog, family, fault):
    _, op, n, module, kernel, argument = family
    where = sys.modules[f"{kernels.__name__}.{module}"]
    spoiled, count = getattr(where, kernel), iter(range(1_000_000))
    place = spoiled.arg_names.index(argument)

    def launched(function, grid, *args, **options):
        launch.launch(function, grid, *args, **options)
        if function is spoiled:
            fault(args[place], next(count))

    monkeypatch.setattr(where, "launch", launched)
    args = call(op, n)
    mine, theirs = ([x.clone() if isinstance(x, torch.Tensor) else x for x in args] for _ in range(2))
    got = outputs(getattr(backends.resolve("auto", args[0], op), op)(*mine), mine)
    truth = outputs(getattr(eager, op)(*theirs), theirs)
    assert next(count) >= 1 and all(torch.equal(a, b) for a, b in zip(got, truth, strict=True))
    assert "eager torch serves in place of triton" in caplog.text and "of its bound" in caplog.text
    with pytest.raises(backends.BackendUnavailableError, match="failed the comparison"):
        getattr(backends.resolve("triton", args[0], op), op)(*args)
