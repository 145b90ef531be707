"""The choice among backends: explicit ones raise and say why, only "auto" falls back, and says so once."""

from __future__ import annotations

import json
import logging
import types

import pytest
import torch

from entrgi_kernels import backends, ops

X = torch.zeros(2, 3)
CPU = torch.device("cpu")


def _module(reason: str | None) -> types.ModuleType:
    module = types.ModuleType("stand_in")
    module.why_not = lambda device, dtype: reason
    return module


@pytest.fixture
def registry(monkeypatch):
    """Backends by name -> module or the reason why it cannot be imported; caches emptied before and after."""

    known: dict[str, types.ModuleType | str] = {name: f"no {name} here" for name in backends.NAMES}
    known["eager"] = _module(None)
    monkeypatch.setattr(backends, "load", known.__getitem__)
    monkeypatch.delenv("ENTRGI_BACKEND", raising=False)
    backends.forget()
    yield known
    backends.forget()


def test_every_name_is_listed_in_order(registry):
    infos = backends.backends()
    assert list(infos) == ["eager", "native", "triton", "cuda"]
    assert infos["eager"].available and "cpu" in infos["eager"].devices and infos["eager"].reason is None
    assert not infos["native"].available and infos["native"].devices == ()
    assert infos["native"].reason == "no native here"


def test_a_backend_that_fails_when_asked_is_unavailable_and_says_why(registry):
    def broken(device, dtype):
        raise OSError("driver went away")

    registry["triton"] = _module(None)
    registry["triton"].why_not = broken
    assert "driver went away" in backends.backends()["triton"].reason
    with pytest.raises(backends.BackendUnavailableError, match="driver went away"):
        backends.resolve("triton", X)


def test_an_explicit_backend_that_cannot_serve_raises_and_says_why(registry):
    registry["triton"] = _module("Triton needs a GPU")
    with pytest.raises(backends.BackendUnavailableError, match="backend='triton'.*float32.*cpu.*Triton needs a GPU"):
        backends.resolve("triton", X)
    with pytest.raises(backends.BackendUnavailableError, match="no native here"):
        ops.softmax_entropy(X, backend="native")


def test_auto_prefers_what_serves_and_falls_back_once_aloud(registry, caplog):
    with caplog.at_level(logging.WARNING, logger="entrgi_kernels"):
        assert backends.resolve("auto", X) is registry["eager"]
        assert backends.resolve("auto", X.double()) is registry["eager"]
        assert backends.resolve("auto", X) is registry["eager"]
    assert [r.getMessage() for r in caplog.records] == ["backend 'native' is not used on cpu: no native here"]
    backends.forget()
    registry["native"] = _module(None)
    assert backends.resolve("auto", X) is registry["native"]


def test_auto_takes_eager_on_a_device_without_preference(registry):
    registry["native"] = _module(None)
    assert backends.resolve("auto", X.to("meta")) is registry["eager"]


def test_environment_variable_is_the_default_of_auto_alone(registry, monkeypatch):
    registry["native"] = _module(None)
    monkeypatch.setenv("ENTRGI_BACKEND", "eager")
    assert backends.resolve("auto", X) is registry["eager"]
    assert backends.resolve("native", X) is registry["native"]
    for empty in ("", "auto"):
        monkeypatch.setenv("ENTRGI_BACKEND", empty)
        assert backends.resolve("auto", X) is registry["native"]
    monkeypatch.setenv("ENTRGI_BACKEND", "triton")  # chosen by hand, so it does not fall back
    with pytest.raises(backends.BackendUnavailableError, match="no triton here"):
        backends.resolve("auto", X)


def test_unknown_names(registry, monkeypatch):
    with pytest.raises(ValueError, match="backend='mps': expected 'auto' or one of 'eager', 'native', 'triton'"):
        backends.resolve("mps", X)
    monkeypatch.setenv("ENTRGI_BACKEND", "fast")
    with pytest.raises(ValueError, match="ENTRGI_BACKEND='fast': expected 'auto'"):
        backends.resolve("auto", X)


@pytest.mark.parametrize(
    ("error", "words"),
    [
        (ModuleNotFoundError("No module named 'triton'", name="triton"), "needs the package 'triton'"),
        (ImportError("undefined symbol: x"), "ImportError: undefined symbol: x"),
        (RuntimeError("no driver"), "RuntimeError: no driver"),
        (ModuleNotFoundError("gone", name="entrgi_kernels.backends.triton"), "has no triton backend"),
    ],
)
def test_a_backend_that_cannot_be_imported_takes_no_other_down(monkeypatch, error, words):
    real = backends.importlib.import_module

    def import_module(name):
        if name.endswith(".triton"):
            raise error
        return real(name)

    backends.load.cache_clear()
    monkeypatch.setattr(backends.importlib, "import_module", import_module)
    try:
        infos = backends.backends()
    finally:
        backends.load.cache_clear()
    assert infos["eager"].available and words in infos["triton"].reason


def test_the_real_ones():
    for name, info in backends.backends().items():
        assert info.available == bool(info.devices) == (info.reason is None) and info.name == name
    assert backends.resolve("eager", X).NAME == "eager"


def test_each_backend_states_its_own_name():
    modules = {name: backends.load(name) for name in backends.NAMES}
    stated = {name: module.NAME for name, module in modules.items() if not isinstance(module, str)}
    assert "eager" in stated and all(name == own for name, own in stated.items())


def test_an_extension_that_could_have_been_built_is_warned_of_once(monkeypatch, caplog, tmp_path):
    from entrgi_kernels.backends import extension, native

    missing = "the extension entrgi_kernels._C is not built: building failed"
    monkeypatch.setattr(native.extension, "load", lambda name: missing)
    monkeypatch.setattr(extension, "RECORD", tmp_path / "record.json")

    def said(reason: str | None, compiler: str | None) -> int:
        caplog.clear()
        extension.warn_of_loss.cache_clear()
        extension.RECORD.write_text(json.dumps({"extensions": {"entrgi_kernels._C": reason}}))
        monkeypatch.setattr(extension.shutil, "which", lambda name: compiler)
        assert [native.why_not(device, torch.float32) for device in (CPU, CPU, torch.device("meta"))] == [missing] * 3
        return len(caplog.records)

    with caplog.at_level(logging.WARNING, "entrgi_kernels"):
        assert said("building entrgi_kernels._C failed: CompileError", None) == 1
        assert "building failed; eager serves" in caplog.text
        assert said("torch is not installed where the package is built", None) == 1
        assert said(None, "/usr/bin/c++") == 1
        assert said(None, None) == 0
        assert said("no C++ compiler was found", "/usr/bin/c++") == 0  # at the time, and known
        assert said("ENTRGI_DISABLE_EXTENSION is set", "/usr/bin/c++") == 0
    extension.warn_of_loss.cache_clear()
