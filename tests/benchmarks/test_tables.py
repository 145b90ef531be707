"""Pages of the committed rows: what they say, and that they are of the rows beside them."""

from __future__ import annotations

import json

import pytest

from benchmarks.harness.measure import RESULTS
from benchmarks.tools import tables

COMMON = {"dtype": "bfloat16", "device": "d", "torch": "2", "triton": None, "p20": 1.0, "p80": 1.0, "revision": "abc"}


def row(op, backend, n, p50, share):
    return {
        "op": op,
        "backend": backend,
        "shape": {"N": n, "V": 9, "D": 4},
        "p50": p50,
        "share of floor": share,
    } | COMMON


def test_a_line_is_a_shape_and_a_column_a_candidate():
    rows = [
        row("step", "auto", 64, 1234.5, 0.5),
        row("step", "floor", 64, 12.345, 1.0),
        row("step", "auto", 7, 3.0, 2.0),
    ]
    rows.append(row("draw", "auto", 7, None, None) | {"revision": "abc-dirty"})
    lines = tables.page("some", rows).splitlines()
    assert lines[0] == "# some" and "`some.json`. d, torch 2." in lines[2]
    assert "| shape | dtype | auto | floor | revision |" in lines
    step = lines.index("## step")
    assert lines[step + 4] == "| N 7 D 4 | bfloat16 | 3 (200%) | – | abc |"
    assert lines[step + 5] == "| N 64 D 4 | bfloat16 | 1234 (50%) | 12.3 | abc |"
    assert lines[-1] == "| N 7 D 4 | bfloat16 | – | abc-dirty |"
    assert tables.page("none", {}) is None


def test_of_candidates_the_fastest_is_shown():
    rows = [
        {"family": "forward", "shape": "a", "tile": [1, name], "ms": ms}
        for name, ms in (("x", 2.0), ("y", 1.0), ("z", None))
    ]
    assert tables.page("tiles", rows).splitlines()[-1] == "| forward | a | 1 y | 1 |"


@pytest.mark.parametrize("path", sorted(RESULTS.glob("*.json")), ids=lambda path: path.stem)
def test_the_committed_page_is_of_the_committed_rows(path):
    page = tables.page(path.stem, json.loads(path.read_text(encoding="utf-8")))
    assert path.with_suffix(".md").read_text(encoding="utf-8") == page, "run python -m benchmarks.tools.tables"
