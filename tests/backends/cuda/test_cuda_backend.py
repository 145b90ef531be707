"""The cuda backend in the registry: what it says where it cannot serve, and when "auto" may take it."""

from __future__ import annotations

import dataclasses
import json
import types
from pathlib import Path

import pytest
import torch

from entrgi_kernels import backends, ops
from entrgi_kernels.backends import cuda, eager, evidence, extension

RESULTS = Path(__file__).parents[3] / "benchmarks" / "results"
ROW = evidence.Evidence("cuda", "sample_tokens", "A100", torch.bfloat16, (64, 1024), (1000, 2000), "a100.json")
X = torch.zeros(64, 1000, dtype=torch.bfloat16)


@pytest.fixture
def stand_ins(monkeypatch):
    """A registry where cuda serves the CPU with functions of the eager backend, and lacks the products."""
    module = types.ModuleType("stand_in")
    module.why_not = lambda device, dtype: None
    module.LACKING = cuda.LACKING
    for name in ("softmax_entropy", "sample_tokens", "unmask_confidence"):
        setattr(module, name, getattr(eager, name))
    known = {"eager": eager, "native": "no native here", "triton": "no triton here", "cuda": module}
    monkeypatch.setattr(backends, "_load", known.__getitem__)
    monkeypatch.setattr(evidence, "_device_name", lambda device: "A100")
    monkeypatch.delenv("ENTRGI_BACKEND", raising=False)
    backends._choose.cache_clear(), backends._resolved.cache_clear()
    yield known
    backends._choose.cache_clear(), backends._resolved.cache_clear()


def test_why_not_names_the_first_thing_that_is_missing(monkeypatch):
    device = torch.device("cuda", 0)
    monkeypatch.setattr(torch.version, "cuda", None)
    assert "built without CUDA" in cuda.why_not(device, torch.float32)
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(extension, "load", lambda name: f"the extension {name} is not built: no nvcc")
    assert "_C_cuda is not built: no nvcc" in cuda.why_not(device, torch.float32)
    with pytest.raises(RuntimeError, match="no nvcc"):
        cuda.build_info()
    monkeypatch.setattr(extension, "load", lambda name: types.ModuleType(name))
    assert "not on cpu" in cuda.why_not(torch.device("cpu"), torch.float32)
    assert "not torch.float64" in cuda.why_not(device, torch.float64)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert "no CUDA device" in cuda.why_not(device, torch.float32)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    for capability, reason in (((7, 5), "8.0 or newer"), ((9, 0), None)):
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device, capability=capability: capability)
        said = cuda.why_not(device, torch.bfloat16)
        assert said is None if reason is None else reason in said


def test_a_missing_extension_is_explained_from_the_record(monkeypatch, tmp_path):
    monkeypatch.setattr(extension, "_RECORD", tmp_path / "record.json")
    name = "entrgi_kernels._C_no_such_module"
    assert "setup.py build_ext --inplace" in extension.load.__wrapped__(name)
    (tmp_path / "record.json").write_text(json.dumps({"extensions": {name: "the compiler was on strike"}}))
    assert extension.load.__wrapped__(name) == f"the extension {name} is not built: the compiler was on strike"


def test_it_has_the_functions_it_claims_with_the_oracles_signatures():
    import inspect

    for name in ("softmax_entropy", "softmax_entropy_backward", "sample_tokens", "unmask_confidence"):
        assert inspect.signature(getattr(cuda, name)) == inspect.signature(getattr(eager, name))
    for name in ("soft_embedding", "entrgi_embedding", "guidance_update_", "token_log_prob"):
        assert hasattr(eager, name) and not hasattr(cuda, name)


def test_chosen_by_name_it_serves_what_it_has_and_says_why_not_the_rest(stand_ins):
    table = torch.zeros(1000, 4, dtype=torch.bfloat16)
    assert ops.sample_tokens(X, backend="cuda").shape == (64,)
    assert backends.resolve("cuda", X) is stand_ins["cuda"]
    with pytest.raises(backends.BackendUnavailableError, match="cannot serve soft_embedding .*backend='triton'"):
        ops.soft_embedding(X, table, backend="cuda")
    with pytest.raises(backends.BackendUnavailableError, match="cannot serve entrgi_embedding .*backend='triton'"):
        ops.entrgi_embedding(X, table, backend="cuda")


def test_auto_takes_it_where_the_table_speaks_and_only_there(stand_ins, monkeypatch):
    assert backends.resolve("auto", X, "sample_tokens") is eager
    monkeypatch.setattr(evidence, "TABLE", (ROW,))
    assert backends.resolve("auto", X, "sample_tokens") is stand_ins["cuda"]
    assert backends.resolve("auto", X) is eager
    assert backends.resolve("auto", X, "softmax_entropy") is eager
    assert backends.resolve("auto", X[:63], "sample_tokens") is eager
    assert backends.resolve("auto", X[:, :999], "sample_tokens") is eager
    assert backends.resolve("auto", X.float(), "sample_tokens") is eager
    assert backends.resolve("eager", X, "sample_tokens") is eager
    stand_ins["cuda"].why_not = lambda device, dtype: "not built"
    backends._resolved.cache_clear()
    assert backends.resolve("auto", X, "sample_tokens") is eager
    monkeypatch.setattr(evidence, "_device_name", lambda device: "another")
    assert evidence.fastest("sample_tokens", X) is None


def unsupported(row: evidence.Evidence, measured: list[dict]) -> str | None:
    """Why the timings of a result do not bear a row of the table out; None when they do."""
    times: dict[tuple[int, int], dict[str, float]] = {}
    for entry in measured:
        key = entry["op"], entry["device"], entry["dtype"]
        if key == (row.op, row.device, str(row.dtype).removeprefix("torch.")):
            times.setdefault((entry["shape"]["N"], entry["shape"]["V"]), {})[entry["backend"]] = entry["p50"]
    inside = {
        shape: found
        for shape, found in times.items()
        if row.rows[0] <= shape[0] <= row.rows[1] and row.columns[0] <= shape[1] <= row.columns[1]
    }
    for axis, ends in enumerate((row.rows, row.columns)):
        if not set(ends) <= {shape[axis] for shape in inside}:
            return f"{ends} are not both measured"
    for shape, found in inside.items():
        own = found.get(row.backend)
        others = {name: time for name, time in found.items() if name in backends.NAMES and name != row.backend}
        if own is None or "triton" not in others:
            return f"{shape}: {row.backend} and triton were not both measured"
        if own >= min(others.values()):
            return f"{shape}: {row.backend} takes {own}, {others}"
    return None


def _measured(**times: float) -> list[dict]:
    shapes = [(64, 1000), (1024, 2000)]
    common = {"op": "sample_tokens", "device": "A100", "dtype": "bfloat16"}
    return [
        {**common, "shape": {"N": n, "V": v}, "backend": name, "p50": time}
        for n, v in shapes
        for name, time in times.items()
    ]


def test_every_row_of_the_table_is_borne_out_by_its_result():
    for row in evidence.TABLE:
        path = RESULTS / row.result
        assert path.exists(), f"{row}: no such result"
        assert (reason := unsupported(row, json.loads(path.read_text(encoding="utf-8")))) is None, f"{row}: {reason}"


def test_rows_without_evidence_are_found_out():
    assert unsupported(ROW, _measured(cuda=1.0, triton=2.0, vectorized=0.5)) is None
    assert "takes 2.0" in unsupported(ROW, _measured(cuda=2.0, triton=1.0))
    assert "not both measured" in unsupported(ROW, _measured(cuda=1.0))
    assert "not both measured" in unsupported(ROW, _measured(triton=1.0))
    wider = dataclasses.replace(ROW, rows=(1, 1024))
    assert "(1, 1024) are not both measured" in unsupported(wider, _measured(cuda=1.0, triton=2.0))
    assert "not both measured" in unsupported(ROW, [])
