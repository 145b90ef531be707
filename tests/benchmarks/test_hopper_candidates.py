"""The family `hopper` of benchmarks.tools.tune: its gate, on stand-ins for the operators."""

from __future__ import annotations

import pytest
import torch

from benchmarks.harness.inputs import Shape
from benchmarks.tools import hopper_candidates, tables, tune

SHAPE = Shape(5, 16, 203)


def update(logits, grad, table, delta, lse, m, s, reads, writes, temperature, step, root, beta1, beta2, eps, *, off=0):
    """The operator's formula; `off`: added to the product of the last row and column."""
    product = grad.float() @ table.float().T
    product[-1, -1] += off
    p = (logits.float() / temperature - lse[:, None]).exp()
    g = p * (product - delta[:, None]) / temperature
    first = (beta1 * m.float() if reads else 0) + (1 - beta1) * g
    second = (beta2 * s.float() if reads else 0) + (1 - beta2) * g * g
    logits.copy_(logits.float() - step * first / (second.sqrt() * root + eps))
    if writes:
        m.copy_(first)
        s.copy_(second)


def blind(logits, *arguments):
    """It forgets the logits, which integers do not show: they are given at logits of 0."""
    logits.zero_()
    update(logits, *arguments)


def test_wrong_candidates_have_no_time():
    updates = {"serves": update, "off": lambda *a: update(*a, off=1), "blind": blind, "equal": update}
    rows = hopper_candidates.updates_at(updates, SHAPE, "cpu")
    assert [(row["family"], row["tile"]) for row in rows] == [(k, n) for k in hopper_candidates.KINDS for n in updates]
    for row in rows:
        assert row["same"] == (row["tile"] in ("serves", "equal"))
        assert (row["ms"] is None) == (row["share of gemm"] is None) == (not row["same"])
        assert row["gemm ms"] > 0
    lines = hopper_candidates.advice(rows)
    assert len(lines) == 2 and all("WRONG: off; WRONG: blind" in line and SHAPE.label in line for line in lines)
    page = tables.page("tune-x", rows)
    assert page is not None and "The fastest of 8 candidates" in page


def forward(logits, table, maximum, logsum, soft, parts, count, slices, length, temperature, *, off=0):
    """The operator's formula; `off`: added to the last sum."""
    p = ((logits.float() - maximum[:, None]) / temperature - logsum[:, None]).exp()
    for part, out in enumerate([soft, *parts]):
        own = slice(part * length, (part + 1) * length)
        out.copy_(p[:, own] @ table[own].float())
    soft[-1, -1] += off


def test_wrong_forward_products_have_no_time():
    forwards = {"alone": forward, "off": lambda *a: forward(*a, off=0.125)}
    rows = hopper_candidates.forwards_at(forwards, Shape(3, 16, 203), (2, 128), "cpu")
    assert [(row["tile"], row["same"], row["ms"] is None) for row in rows] == [
        ("alone", True, False),
        ("off", False, True),
    ]


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU here")
def test_without_a_gpu_it_says_so(capsys):
    assert tune.main(["--family", "hopper"]) == 2
    assert "needs a CUDA GPU" in capsys.readouterr().err
