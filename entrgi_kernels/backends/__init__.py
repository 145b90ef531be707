"""Engines that compute the operators, and the choice among them.

A backend is a module of raw functions on tensors (no autograd, no validation), with the names and the signatures of
:mod:`entrgi_kernels.backends.eager`, the oracle. It states its ``NAME``, and says by ``why_not`` what it cannot serve.
(``token_log_prob`` is eager's alone: for the others the operator is written once, on their passes.) What several of
them take together is one argument of :mod:`.arguments`.

:func:`resolve` picks a backend; an explicit choice that cannot serve raises, only ``"auto"`` falls back. A backend that
has some of the functions alone says why in ``LACKING``. What is picked on a GPU stands behind :mod:`.proof`: kernels
serve once they have been compared with eager arithmetic there.
"""

from __future__ import annotations

import importlib
import logging
import os
from dataclasses import dataclass
from functools import cache
from types import ModuleType

import torch

from ..names import BACKENDS
from . import proof
from .proof import BackendUnavailableError as BackendUnavailableError

logger = logging.getLogger("entrgi_kernels")

NAMES = EAGER, NATIVE, TRITON, CUDA = BACKENDS
_MODULES = {name: f"{__name__}.{name}" for name in NAMES}

# What "auto" tries on a device type, in order: the first that can serve the device and the dtype and has the operator.
# Where :data:`.proof.DEVICES` has the device type, those of _PROVEN also have to pass their proof on the machine at
# hand, and where `entrgi check` has timed several that do, the fastest goes first.
PREFERENCE: dict[str, tuple[str, ...]] = {"cpu": (NATIVE, EAGER), "cuda": (TRITON, CUDA, EAGER)}
_PROVEN = (TRITON, CUDA)


@dataclass(frozen=True)
class BackendInfo:
    """Whether a backend can run on this machine.

    Attributes:
        name: the backend's name, as accepted by ``backend=``.
        available: True when it can serve tensors of at least one device of this machine.
        devices: device types it serves here.
        reason: why it is not available; None when it is.
        proof: of an available GPU backend, what is known of its kernels on this machine, in words; else None.
    """

    name: str
    available: bool
    devices: tuple[str, ...]
    reason: str | None
    proof: str | None = None


@cache
def load(name: str) -> ModuleType | str:
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


def why_not(name: str, device: torch.device, dtype: torch.dtype, op: str | None = None) -> str | None:
    """Why a backend cannot serve a device and dtype, or has no raw function `op`; None when it can."""
    module = load(name)
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
def _choose(device_type: str, dtype: torch.dtype, op: str | None) -> tuple[str, ...]:
    """The backends that "auto" means, best first; says once why the very first of its list is passed over."""
    device, names = torch.device(device_type), PREFERENCE.get(device_type, (EAGER,))
    reasons = {name: why_not(name, device, dtype, op) for name in names}
    if reasons[names[0]] is not None:
        proof.say_once(f"backend {names[0]!r} is not used on {device_type}: {reasons[names[0]]}")
    return tuple(name for name, reason in reasons.items() if reason is None) or (EAGER,)


def check_name(name: str, source: str = "backend") -> str:
    """Return `name` if it is a backend's name or "auto"; raise ValueError, naming the `source`, otherwise."""
    if not isinstance(name, str) or (name != "auto" and name not in NAMES):
        raise ValueError(f"{source}={name!r}: expected 'auto' or one of {', '.join(map(repr, NAMES))}")
    return name


def resolve(name: str, tensor: torch.Tensor, op: str | None = None) -> ModuleType:
    """The backend module that serves `tensor`.

    Args:
        name: "auto" or a backend's name. "auto" follows the environment variable ENTRGI_BACKEND where it is set, else
            it is the best engine for the tensor's device and dtype.
        tensor: the logits of the call; device and dtype decide.
        op: the raw function that is going to be called; None when any will do.

    Returns:
        A module, or on a GPU a :class:`.proof.Proven` with the same functions, whose calls may raise
        BackendUnavailableError for a backend chosen by name.

    Raises:
        ValueError: no such backend.
        BackendUnavailableError: an explicit backend that cannot serve this tensor; the message says why.
    """
    check_name(name)
    if name == "auto":
        name = check_name(os.environ.get("ENTRGI_BACKEND") or "auto", "ENTRGI_BACKEND")
    return _resolved(name, tensor.device, tensor.dtype, op)


@cache
def _resolved(name: str, device: torch.device, dtype: torch.dtype, op: str | None) -> ModuleType:
    """:func:`resolve`, asked once: a call of an operator must not cost more than its kernel."""
    names: tuple[str, ...] = (name,)
    if name == "auto":
        names = _choose(device.type, dtype, op)
    else:
        reason = why_not(name, device, dtype, op)
        if reason is not None:
            raise BackendUnavailableError(
                f"backend={name!r} cannot serve {op or 'operators'} on {dtype} tensors on {device.type}: {reason}"
            )
    if names[0] in _PROVEN and device.type in proof.DEVICES:
        engines = [(one, load(one)) for one in names if one in _PROVEN]
        return proof.proven(engines, strict=name != "auto")  # type: ignore[arg-type, return-value]
    module = load(names[0])
    assert not isinstance(module, str)
    return module


def forget() -> None:
    """Choose, prove and say everything anew, as a new process would; the file of proofs stays."""
    _choose.cache_clear()
    _resolved.cache_clear()
    proof.forget()


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
        reasons = {device: why_not(name, torch.device(device), torch.float32) for device in devices}
        served = tuple(device for device, reason in reasons.items() if reason is None)
        reason = None if served else "; ".join(dict.fromkeys(str(r) for r in reasons.values()))
        here = [device for device in served if device in proof.DEVICES and name in _PROVEN]
        known = _proofs(name, torch.device(here[0], 0)) if here else None
        infos[name] = BackendInfo(name, bool(served), served, reason, known)
    return infos


def _proofs(name: str, device: torch.device) -> str:
    """What is known of a backend's kernels on this device (of several GPUs: the first)."""
    try:
        known = proof.verdicts(device)
    except Exception as error:
        return f"unknown ({type(error).__name__}: {error})"
    found = {key: verdict for key, verdict in known.items() if key.startswith(f"{name} ")}
    if not found:
        return "no kernel proven here yet (each is at its first use; all by `entrgi check`)"
    failed = [f"{key}: {verdict.figures}" for key, verdict in found.items() if not verdict.passed]
    words = f"{len(found) - len(failed)} kinds of calls proven here"
    return words + "".join(f"; FAILED, eager serves: {one}" for one in failed)
