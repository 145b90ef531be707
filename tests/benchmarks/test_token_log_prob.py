"""The suite of token_log_prob: everybody who is here passes the gate, a wrong answer does not."""

from __future__ import annotations

import json

import pytest
import torch

from benchmarks.harness.inputs import Shape
from benchmarks.suites import token_log_prob as suite

SHAPE = Shape(5, 8, 97)


@pytest.mark.parametrize("case", suite.CASES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_ours_and_plain_pass(case, dtype):
    group = suite.measure_case(case, SHAPE, dtype, ["eager"], budget=0.0)
    assert {"plain", "eager", "products"} <= group.timings.keys()
    assert group.refused.keys() <= {"liger", "cut-cross-entropy"}
    assert group.floor.name == "products"


@pytest.mark.parametrize("learns", [False, True])
def test_wrong_answers_are_refused(learns):
    problem = suite.Problem(SHAPE, torch.float32, "cpu", learns)

    def scaled(hidden, head, targets):
        return suite.plain(hidden, head, targets) * 1.01

    def forgotten(hidden, head, targets):
        return suite.plain(hidden, head.detach() if learns else head, targets) + 0.0 * head.sum()

    assert not problem.check(scaled)().passed
    assert problem.check(suite.plain)().passed
    if learns:
        assert "head" in problem.check(forgotten)().detail and not problem.check(forgotten)().passed


def test_command(tmp_path, capsys):
    arguments = ["--shapes", "4,8,64", "--dtypes", "float32", "--backends", "eager", "--budget", "0"]
    assert suite.main([*arguments, "--json", str(tmp_path / "rows.json")]) == 0
    rows = json.loads((tmp_path / "rows.json").read_text())
    assert {row["op"] for row in rows} == {"token_log_prob, frozen head", "token_log_prob, learning head"}
    assert "vs plain" in capsys.readouterr().out
