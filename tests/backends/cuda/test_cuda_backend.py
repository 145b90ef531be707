"""The cuda backend in the registry: what it says where it cannot serve (tests/backends/test_proof.py: when it may)."""

from __future__ import annotations

import json
import types

import pytest
import torch

from entrgi_kernels import backends, ops
from entrgi_kernels.backends import cuda, eager, extension

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
    monkeypatch.setattr(backends, "load", known.__getitem__)
    monkeypatch.delenv("ENTRGI_BACKEND", raising=False)
    backends.forget()
    yield known
    backends.forget()


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
    monkeypatch.setattr(extension, "RECORD", tmp_path / "record.json")
    name = "entrgi_kernels._C_no_such_module"
    assert "setup.py build_ext --inplace" in extension.load.__wrapped__(name)
    (tmp_path / "record.json").write_text(json.dumps({"extensions": {name: "the compiler was on strike"}}))
    assert extension.load.__wrapped__(name) == f"the extension {name} is not built: the compiler was on strike"


def test_it_has_the_functions_it_claims_with_the_oracles_signatures():
    import inspect

    for name in ("softmax_entropy", "softmax_entropy_backward", "sample_tokens", "unmask_confidence"):
        assert inspect.signature(getattr(cuda, name)) == inspect.signature(getattr(eager, name))
    for name in ("soft_embedding", "entrgi_embedding", "guidance_update_"):
        assert hasattr(eager, name) and not hasattr(cuda, name)


def test_chosen_by_name_it_serves_what_it_has_and_says_why_not_the_rest(stand_ins):
    table = torch.zeros(1000, 4, dtype=torch.bfloat16)
    assert ops.sample_tokens(X, backend="cuda").shape == (64,)
    assert backends.resolve("cuda", X) is stand_ins["cuda"]
    with pytest.raises(backends.BackendUnavailableError, match="cannot serve soft_embedding .*backend='triton'"):
        ops.soft_embedding(X, table, backend="cuda")
    with pytest.raises(backends.BackendUnavailableError, match="cannot serve entrgi_embedding .*backend='triton'"):
        ops.entrgi_embedding(X, table, backend="cuda")
