"""The suite of overheads: a row an operator, and no time for a public call that does something else."""

from __future__ import annotations

import importlib.util
import json

from benchmarks.suites import overhead as suite
from entrgi_kernels import ops


def test_command(tmp_path, capsys):
    assert suite.main(["--backend", "eager", "--blocks", "1", "--json", str(tmp_path / "rows.json")]) == 0
    rows = json.loads((tmp_path / "rows.json").read_text())
    launches = {"9 launches"} if importlib.util.find_spec("triton") else set()
    assert {row["op"].removeprefix("overhead ") for row in rows} == {*suite.pairs("cpu", "eager"), *launches}
    assert all(row["public us"] > 0 and row["raw us"] > 0 for row in rows)
    assert "guidance_update_" in capsys.readouterr().out


def test_another_answer_is_refused(monkeypatch):
    right = ops.softmax_entropy
    monkeypatch.setattr(ops, "softmax_entropy", lambda *a, **k: tuple(x + 1 for x in right(*a, **k)))
    rows = {row["op"]: row for row in suite.measure_overhead("cpu", "eager", 1)}
    row = rows["overhead softmax_entropy"]
    assert "refused" in row and "public us" not in row
    assert "REFUSED" in suite.table([row]) and "public us" in rows["overhead sample_tokens"]
