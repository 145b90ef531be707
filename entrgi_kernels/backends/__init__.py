"""Engines that compute the operators, and the choice among them.

A backend is a module of raw functions on tensors (no autograd, no validation), with the names and the signatures of
:mod:`entrgi_kernels.backends.eager`, the oracle. :func:`resolve` picks one; an explicit choice that cannot serve
raises, only ``"auto"`` falls back. A backend that has some of the functions alone says why in ``LACKING``.
"""

from __future__ import annotations

import importlib
import logging
import os
from dataclasses import dataclass
from functools import cache
from types import ModuleType

import torch

from . import evidence

logger = logging.getLogger("entrgi_kernels")

EAGER, NATIVE, TRITON, CUDA = "eager", "native", "triton", "cuda"
NAMES = (EAGER, NATIVE, TRITON, CUDA)
_MODULES = {name: f"{__name__}.{name}" for name in NAMES}

# What "auto" tries first on a device type; the rest of the list is what it falls back to. An engine is listed only
# where a committed result shows it correct and fastest: native by benchmarks/results/ of a CPU. The triton backend has
# not run on a GPU yet: `make gpu` makes the result that will put it in front of eager here; until then it is asked for
# by name.
_PREFERENCE: dict[str, tuple[str, ...]] = {"cpu": (NATIVE, EAGER), "cuda": (EAGER,)}


class BackendUnavailableError(RuntimeError):
    """An explicitly chosen backend cannot serve these tensors on this machine."""


@dataclass(frozen=True)
class BackendInfo:
    """Whether a backend can run on this machine.

    Attributes:
        name: the backend's name, as accepted by ``backend=``.
        available: True when it can serve tensors of at least one device of this machine.
        devices: device types it serves here.
        reason: why it is not available; None when it is.
    """

    name: str
    available: bool
    devices: tuple[str, ...]
    reason: str | None


@cache
def _load(name: str) -> ModuleType | str:
    """The backend's module, or the reason why it cannot be imported."""
    try:
        module = importlib.import_module(_MODULES[name])
        # A folder without an __init__.py imports as an empty package.
        return module if hasattr(module, "why_not") else f"this version of entrgi_kernels has no {name} backend"
    except ModuleNotFoundError as error:
        if error.name == _MODULES[name]:
            return f"this version of entrgi_kernels has no {name} backend"
        return f"it needs the package {error.name!r}, which is not installed"
    except Exception as error:  # a broken driver or extension must not take the other backends down with it
        return f"importing it failed: {type(error).__name__}: {error}"


def _why_not(name: str, device: torch.device, dtype: torch.dtype, op: str | None = None) -> str | None:
    module = _load(name)
    if isinstance(module, str):
        return module
    try:
        reason = module.why_not(device, dtype)
    except Exception as error:
        return f"asking whether it can serve failed: {type(error).__name__}: {error}"
    # A backend need not have every operator; one that has not says why in LACKING.
    if reason is None and op is not None and hasattr(module, "LACKING") and not hasattr(module, op):
        return module.LACKING
    return reason


@cache
def _choose(device_type: str, dtype: torch.dtype) -> str:
    """The backend that "auto" means for a device type and dtype; says once why a preferred one is passed over."""
    device = torch.device(device_type)
    for name in _PREFERENCE.get(device_type, (EAGER,)):
        reason = _why_not(name, device, dtype)
        if reason is None:
            return name
        _say_once(f"backend {name!r} is not used on {device_type}: {reason}")
    return EAGER


@cache
def _say_once(message: str) -> None:
    logger.warning("%s", message)


def check_name(name: str, source: str = "backend") -> str:
    """Return `name` if it is a backend's name or "auto"; raise ValueError, naming the `source`, otherwise."""
    if name != "auto" and name not in NAMES:
        raise ValueError(f"{source}={name!r}: expected 'auto' or one of {', '.join(map(repr, NAMES))}")
    return name


def resolve(name: str, tensor: torch.Tensor, op: str | None = None) -> ModuleType:
    """The backend module that serves `tensor`.

    Args:
        name: "auto" or a backend's name. "auto" follows the environment variable ENTRGI_BACKEND where it is set, else
            the table of :mod:`.evidence`, else the best engine for the tensor's device and dtype.
        tensor: the logits of the call; device and dtype decide, and shape where the table speaks of it.
        op: the raw function that is going to be called; None when any will do.

    Raises:
        ValueError: no such backend.
        BackendUnavailableError: an explicit backend that cannot serve this tensor; the message says why.
    """
    check_name(name)
    if name == "auto":
        name = check_name(os.environ.get("ENTRGI_BACKEND") or "auto", "ENTRGI_BACKEND")
    fastest = evidence.fastest(op, tensor) if name == "auto" else None
    return _resolved(name, fastest, tensor.device, tensor.dtype, op)


@cache
def _resolved(name: str, fastest: str | None, device: torch.device, dtype: torch.dtype, op: str | None) -> ModuleType:
    """:func:`resolve`, asked once: a call of an operator must not cost more than its kernel."""
    if name == "auto":
        name = fastest or "auto"
        if name == "auto" or _why_not(name, device, dtype, op) is not None:
            name = _choose(device.type, dtype)
    else:
        reason = _why_not(name, device, dtype, op)
        if reason is not None:
            raise BackendUnavailableError(
                f"backend={name!r} cannot serve {op or 'operators'} on {dtype} tensors on {device.type}: {reason}"
            )
    module = _load(name)
    assert not isinstance(module, str)
    return module


def backends() -> dict[str, BackendInfo]:
    """Every backend, whether it is available on this machine, and why the rest are not.

    Returns:
        Name to :class:`BackendInfo`, in the order eager, native, triton, cuda. Never raises.
    """
    devices = ["cpu"]
    try:
        if torch.cuda.is_available():
            devices.append("cuda")
    except Exception:
        logger.debug("cannot tell whether CUDA is available", exc_info=True)
    infos = {}
    for name in NAMES:
        reasons = {device: _why_not(name, torch.device(device), torch.float32) for device in devices}
        served = tuple(device for device, reason in reasons.items() if reason is None)
        reason = None if served else "; ".join(dict.fromkeys(str(r) for r in reasons.values()))
        infos[name] = BackendInfo(name, bool(served), served, reason)
    return infos
