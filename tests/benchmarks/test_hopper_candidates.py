"""The family `hopper` of benchmarks.tools.tune: its gate, on stand-ins for the operators."""

from __future__ import annotations

import os
import time

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
    rows = []
    for kind in hopper_candidates.KINDS:
        made = hopper_candidates.updates_at(updates, SHAPE, kind, "cpu")
        assert [(row["family"], row["tile"]) for row in made] == [(kind, name) for name in updates]
        line = hopper_candidates.advice(made)
        assert "WRONG: off; WRONG: blind" in line and SHAPE.label in line
        rows += made
    for row in rows:
        assert row["same"] == (row["tile"] in ("serves", "equal"))
        assert (row["ms"] is None) == (row["share of gemm"] is None) == (not row["same"])
        assert row["gemm ms"] > 0
    page = tables.page("tune-x", rows)
    assert page is not None and "The fastest of 8 candidates" in page


def test_one_wrong_launch_of_many_is_seen():
    launches = []

    def racing(*arguments):
        launches.append(1)
        update(*arguments, off=len(launches) == hopper_candidates.LAUNCHES)

    rows = hopper_candidates.updates_at({"serves": update, "racing": racing}, SHAPE, "update", "cpu")
    assert [row["same"] for row in rows] == [True, False]


def coarse(logits, *arguments):
    """It divides less exactly than torch, as a GPU may: the last bit of every result is off."""
    update(logits, *arguments)
    logits.mul_(1 + 1.2 * 2.0**-8)


def test_a_rounding_of_what_serves_is_everybodys():
    updates = {"serves": coarse, "equal": coarse, "other": update}
    rows = hopper_candidates.updates_at(updates, SHAPE, "update without moments", "cpu")
    assert [row["same"] for row in rows] == [True, True, False]
    rows = hopper_candidates.updates_at({"serves": update, "coarse": coarse}, SHAPE, "update", "cpu")
    assert [row["same"] for row in rows] == [True, False]


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


def hanging(*arguments):
    time.sleep(600)


def fatal(*arguments):
    os._exit(139)


def refused(*arguments):
    raise RuntimeError("CUDA error: an illegal memory access was encountered\nand more")


def stand_ins():
    """In another process, too."""
    updates = {"serves": update, "hanging": hanging, "fatal": fatal, "refused": refused, "equal": update}
    return updates, {"alone": forward, "pairs": fatal}


def test_candidates_that_hang_or_crash_cost_no_other(monkeypatch, capsys):
    monkeypatch.setattr(hopper_candidates, "PATIENCE", 10.0)
    kept = []
    shapes = [Shape(130, 16, 203), SHAPE]  # the second has too few rows for a forward product in pairs
    rows = hopper_candidates.tune(
        shapes, time.monotonic() + 600, lambda rows: kept.append(len(rows)), stand_ins, "cpu", sms=2
    )
    assert kept == [5, 10, 12, 17, 22]
    faults = {"hanging": "hangs", "fatal": "ended its process", "pairs": "ended its process"}
    faults["refused"] = "RuntimeError: CUDA error: an illegal memory access was encountered"
    for row in rows:
        assert row["fault"] == faults.get(row["tile"], "") and row["same"] == (row["tile"] not in faults)
        assert (row["ms"] is None) != row["same"]
    out = capsys.readouterr().out
    assert all(out.count(f"{name} {fault}: going on without it") == 1 for name, fault in faults.items())


def test_time_that_is_up_is_said(capsys):
    assert hopper_candidates.tune([SHAPE], time.monotonic(), print, stand_ins, "cpu", sms=2) == []
    assert f"no time left for update at {SHAPE.label}" in capsys.readouterr().out


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU here")
def test_without_a_gpu_it_says_so(capsys):
    assert tune.main(["--family", "hopper"]) == 2
    assert "needs a CUDA GPU" in capsys.readouterr().err
