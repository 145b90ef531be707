"""What serves "auto" on a GPU: kernels that were proven on the machine at hand.

:class:`Proven` stands before the raw functions of a GPU backend. A call whose kernels have not been met is
described (:class:`.trials.Trial`), looked up in a file, and else compared with eager arithmetic there and then
(:func:`.comparison.run`). What passes serves from then on. What fails is told once with its figures, and eager serves;
where the backend was asked for by name, the call raises. After that a call costs one look into a dictionary.

The file, ``entrgi_kernels/proofs.json`` in $XDG_CACHE_HOME or ~/.cache, holds the verdicts of each machine: device,
driver, torch, Triton, and the revision of the kernels. ``entrgi check`` proves everything anew and adds timings: of
several proven engines the fastest then serves.

Nothing can be proven while a CUDA graph is captured, since that waits for the device: what is known by then serves,
and eager in place of the rest.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import math
import os
import platform
import re
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from functools import cache
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

import torch

from ..shortage import is_out_of_memory
from . import comparison, eager, ranges, trials

logger = logging.getLogger("entrgi_kernels")

# Device types on which kernels need a proof. On a CPU the engines are compared by the tests of the package.
DEVICES = {"cuda"}
_MOST_KEYS = 1 << 14  # calls of so many kinds are known at a time
_MOST_MACHINES = 16  # kept in the file
_LOCK_SECONDS = 5.0
_LARGEST = 1e30  # stands for infinity in the file, which other readers of JSON do not know
_lock = threading.RLock()


class BackendUnavailableError(RuntimeError):
    """An explicitly chosen backend cannot serve these tensors on this machine."""


class Verdict(NamedTuple):
    """Outcome of one proof: whether it passed, figures in words, worst error over its bound, and seconds it took."""

    passed: bool
    figures: str
    excess: float
    seconds: float


# -- the machine and its file -----------------------------------------------------------------------------------------


@cache
def machine(device: torch.device) -> str:
    """What a verdict holds for: device, driver, versions, revision of the kernels."""
    return " | ".join(
        (device_facts(device), f"torch {torch.__version__}", f"triton {triton_facts()}", f"kernels {revision()}")
    )


def device_facts(device: torch.device) -> str:
    """Name, compute capability, driver and runtime of a GPU."""
    if device.type != "cuda":
        return f"{device.type} {platform.machine()}"
    facts = torch.cuda.get_device_properties(device)
    runtime = f"HIP {torch.version.hip}" if torch.version.hip else f"CUDA {torch.version.cuda}"
    return f"{facts.name} {facts.major}.{facts.minor} | {driver()} | {runtime}"


def driver() -> str:
    """The driver's release, or the newest CUDA that it serves."""
    with contextlib.suppress(OSError):
        text = Path("/proc/driver/nvidia/version").read_text(encoding="utf-8", errors="replace")
        if found := re.search(r"\d{3,}\.\d+(?:\.\d+)?", text):
            return f"driver {found[0]}"
    with contextlib.suppress(AttributeError, RuntimeError):
        return f"driver for CUDA {torch._C._cuda_getDriverVersion()}"  # type: ignore[attr-defined]
    return "driver unknown"


def triton_facts() -> str:
    """Triton's release, and the assembler where one was given by hand."""
    try:
        import triton

        version = triton.__version__
    except Exception:  # a broken one has no kernels to prove
        return "none"
    # Another assembler makes other machine code.
    tools = ("TRITON_PTXAS_PATH", "TRITON_PTXAS_BLACKWELL_PATH")
    return " ".join((version, *(f"{name}={os.environ[name]}" for name in tools if name in os.environ)))


@cache
def revision() -> str:
    """A hash of all that decides what kernels compute, and of what proves them."""
    folder = Path(__file__).parent
    files = [*sorted(folder.rglob("*.py")), *sorted(folder.parent.glob("_C_cuda*.so"))]
    found = hashlib.sha256()
    for file in files:
        found.update(file.name.encode())
        found.update(file.read_bytes())
    return found.hexdigest()[:16]


def path() -> Path | None:
    """The file of verdicts; None where no folder for it is known."""
    folder = os.environ.get("XDG_CACHE_HOME", "")
    try:
        cache_folder = Path(folder) if os.path.isabs(folder) else Path.home() / ".cache"
    except RuntimeError:  # no home
        return None
    return cache_folder / "entrgi_kernels" / "proofs.json"


def _read(file: Path) -> dict[str, dict[str, Any]]:
    """{machine: {"proofs": {...}, "timings": {...}}}; empty where the file is missing, torn, or somebody else's."""
    try:
        machines = json.loads(file.read_text(encoding="utf-8"))["machines"]
        return {name: kept for name, kept in machines.items() if isinstance(kept, dict)}
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return {}


def _entries(kept: dict[str, Any], part: str) -> list[tuple[str, Any]]:
    entries = kept.get(part)
    return list(entries.items()) if isinstance(entries, dict) else []


def _sound(kept: dict[str, Any]) -> tuple[dict[str, Verdict], dict[str, dict[str, float]]]:
    """(verdicts, timings) of a machine in the file; what is not whole is left out."""
    proofs: dict[str, Verdict] = {}
    timings: dict[str, dict[str, float]] = {}
    for key, one in _entries(kept, "proofs"):
        with contextlib.suppress(AttributeError, KeyError, TypeError, ValueError):
            proofs[key] = _verdict(one)
    for key, one in _entries(kept, "timings"):
        with contextlib.suppress(AttributeError, KeyError, TypeError, ValueError):
            timings[key] = _milliseconds(one)
    return proofs, timings


def _verdict(one: dict[str, Any]) -> Verdict:
    """A verdict that was written down; what says that it passed and does not look so was not."""
    passed, excess = one["passed"], float(one["excess"])
    if not isinstance(passed, bool) or passed != (excess <= 1):
        raise ValueError(f"passed={passed!r} and excess={excess!r}")
    return Verdict(passed, str(one["figures"]), excess, float(one["seconds"]))


def _milliseconds(one: dict[str, Any]) -> dict[str, float]:
    found = {str(engine): float(ms) for engine, ms in one.items()}
    if not all(0 <= ms < math.inf for ms in found.values()):
        raise ValueError(f"times {found}")
    return found


@contextlib.contextmanager
def _locked(file: Path) -> Iterator[None]:
    """Alone among processes, where the system can; else, or after a few seconds, not."""
    try:
        import fcntl
    except ImportError:  # not on this system: the last writer wins
        yield
        return
    with open(file.with_suffix(".lock"), "w") as lock:
        until = time.monotonic() + _LOCK_SECONDS
        while time.monotonic() < until:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except OSError:
                time.sleep(0.02)
        yield


class _Memory:
    """Verdicts and timings of this process, by machine; the file is read and written beside them."""

    def __init__(self) -> None:
        self.verdicts: dict[str, dict[str, Verdict]] = {}
        self.timings: dict[str, dict[str, dict[str, float]]] = {}
        self.told = False

    def read(self, name: str) -> None:
        """Take over what the file has of a machine."""
        file = path()
        proofs, timings = _sound({} if file is None else _read(file).get(name, {}))
        self.verdicts[name] = proofs | self.verdicts.get(name, {})
        self.timings[name] = timings | self.timings.get(name, {})

    def write(self, name: str) -> None:
        """Add what this process knows of a machine to the file."""
        file = path()
        try:
            if file is None:
                raise OSError("no home folder, and XDG_CACHE_HOME is not set")
            file.parent.mkdir(parents=True, exist_ok=True)
            with _locked(file):
                machines = _read(file)
                proofs, timings = _sound(machines.pop(name, {}))
                proofs |= self.verdicts.get(name, {})
                machines[name] = {
                    "proofs": {key: verdict._asdict() for key, verdict in proofs.items()},
                    "timings": timings | self.timings.get(name, {}),
                }
                kept = dict(list(machines.items())[-_MOST_MACHINES:])
                handle, temporary = tempfile.mkstemp(dir=file.parent, suffix=".tmp")
                try:
                    with os.fdopen(handle, "w", encoding="utf-8") as to:
                        json.dump({"machines": kept}, to, indent=1)
                    os.replace(temporary, file)
                except BaseException:
                    with contextlib.suppress(OSError):
                        os.unlink(temporary)
                    raise
        except OSError as error:
            if not self.told:
                self.told = True
                logger.info("proofs of GPU kernels are kept for this process alone: %s", error)


_memory = _Memory()


def forget() -> None:
    """Forget what this process knows and has said; the file stays."""
    global _memory
    with _lock:
        _memory = _Memory()
        machine.cache_clear()
        say_once.cache_clear()
        for guard in _guards.values():
            guard.clear()


# -- proving ----------------------------------------------------------------------------------------------------------


def no_verdict(error: Exception) -> bool:
    """Whether an error says nothing about the kernels: no memory, no disk."""
    return isinstance(error, OSError) or is_out_of_memory(error)


def examine(name: str, kernels: Any, trial: trials.Trial, device: torch.device, launches: int | None = None) -> Verdict:
    """Compare a backend's kernels with eager arithmetic, now; nothing is remembered. See :func:`.comparison.run`.

    Raises:
        RuntimeError, MemoryError, OSError: no memory, no disk (:func:`no_verdict`).
    """
    started = time.perf_counter()
    listeners, ranges.listeners = ranges.listeners, ()  # whoever profiles did not ask for this
    try:
        findings = comparison.run(trial, kernels, device, launches)
        excess = max(finding.excess for finding in findings)
        told = [finding for finding in findings if finding.excess > 1 or finding.excess == excess]
        figures = "; ".join(map(_words, told[: 1 if excess <= 1 else None]))
    except Exception as error:
        if no_verdict(error):
            raise
        excess, figures = math.inf, f"{type(error).__name__}: {str(error)[:500]}"
    finally:
        ranges.listeners = listeners
    seconds = round(time.perf_counter() - started, 3)
    verdict = Verdict(excess <= 1, figures, min(excess, _LARGEST), seconds)
    logger.info("%s: %s %s in %.1f s: %s", name, trial, "proven" if verdict.passed else "FAILED", seconds, figures)
    return verdict


def prove(name: str, kernels: Any, trial: trials.Trial, device: torch.device) -> Verdict:
    """:func:`examine`, whatever is known; the verdict is remembered, in the file too."""
    verdict = examine(name, kernels, trial, device)
    with _lock:
        where = machine(device)
        _memory.verdicts.setdefault(where, {})[f"{name} {trial}"] = verdict
        _memory.write(where)
    return verdict


def _words(finding: comparison.Finding) -> str:
    return f"{finding.name} off by {finding.error:.2g} ({finding.excess:.2g} of its bound)"


def known(name: str, trial: trials.Trial, device: torch.device) -> Verdict | None:
    """The verdict of this process or of the file; None where there is none yet."""
    where, key = machine(device), f"{name} {trial}"
    with _lock:
        if key not in _memory.verdicts.get(where, {}):
            _memory.read(where)
        return _memory.verdicts.get(where, {}).get(key)


def remember_timings(trial: trials.Trial, device: torch.device, milliseconds: dict[str, float]) -> None:
    """Write down how long engines took for calls of a trial's kind; the fastest proven one then serves "auto"."""
    where = machine(device)
    with _lock:
        _memory.timings.setdefault(where, {})[str(trial)] = dict(milliseconds)
        _memory.write(where)


def verdicts(device: torch.device) -> dict[str, Verdict]:
    """What is known of this machine: "<backend> <trial>" to its verdict."""
    where = machine(device)
    with _lock:
        _memory.read(where)
        return dict(_memory.verdicts.get(where, {}))


def capturing(device: torch.device) -> bool:
    """Whether a CUDA graph is being captured here, so that nothing may wait for the device."""
    return device.type == "cuda" and torch.cuda.is_available() and torch.cuda.is_current_stream_capturing()


# -- serving ----------------------------------------------------------------------------------------------------------


class Proven:
    """Raw functions of backends, each behind its proof; stands where a backend's module would.

    Args:
        engines: (name, module), in the order of preference.
        strict: an engine was asked for by name: a failed proof raises.
    """

    def __init__(self, engines: Sequence[tuple[str, ModuleType]], strict: bool) -> None:
        self._engines, self._strict = tuple(engines), strict
        self._functions: dict[str, _Function] = {}
        self.NAME = engines[0][0]

    def __getattr__(self, op: str) -> Callable[..., Any]:
        if op not in trials.READERS:
            raise AttributeError(f"backend {self.NAME!r} has no {op}")
        function = self._functions[op] = _Function(op, self._engines, self._strict)
        setattr(self, op, function)
        return function

    def clear(self) -> None:
        """Forget which engine serves what."""
        for function in self._functions.values():
            function.served.clear()


class _Function:
    """One raw function: which engine's serves, by what the call's matrices look like."""

    __slots__ = ("_engines", "_op", "_read", "_strict", "served")

    def __init__(self, op: str, engines: Sequence[tuple[str, ModuleType]], strict: bool) -> None:
        self._op, self._strict = op, strict
        self._engines = [(name, module) for name, module in engines if hasattr(module, op)]
        self._read = trials.READERS[op]
        self.served: dict[Any, Callable[..., Any]] = {}

    def __call__(self, *args: Any) -> Any:
        matrices, flags = self._read(*args)
        key = [matrices[0].get_device(), flags]
        for x in matrices:
            if x is not None:
                key += (x.shape, x.stride(), x.dtype, x.data_ptr() & 15)
            else:
                key.append(None)
        function = self.served.get(tuple(key))
        if function is None:
            function = self._decide(tuple(key), matrices, flags)
        return function(*args)

    def _decide(self, key: Any, matrices: Sequence[torch.Tensor | None], flags: tuple[Any, ...]) -> Callable[..., Any]:
        first = matrices[0]
        assert first is not None
        device = first.device
        trial = trials.describe(self._op, matrices, flags, device)
        unknown = False
        with _lock:
            for name, module in self._ordered(trial, device):
                verdict, why = self._verdict(name, module, trial, device)
                if verdict is not None and verdict.passed:
                    return self._keep(key, getattr(module, self._op))
                unknown |= verdict is None
                message = f"{name}: {trial} on {device_facts(device)}: {why}"
                if self._strict:
                    raise BackendUnavailableError(f"backend={name!r} is not used: {message}")
                say_once(f"eager torch serves in place of {message}")
        function = getattr(eager, self._op)
        return function if unknown else self._keep(key, function)

    def _verdict(
        self, name: str, module: ModuleType, trial: trials.Trial, device: torch.device
    ) -> tuple[Verdict | None, str]:
        """(the verdict, or None where it cannot be had now; why the engine is not used)."""
        verdict = known(name, trial, device)
        if verdict is None:
            if capturing(device):
                return None, (
                    "it has not been proven on this machine, and cannot be while a CUDA graph is captured; run `entrgi "
                    "check`, or make the same call once before capturing"
                )
            try:
                verdict = prove(name, module, trial, device)
            except Exception as error:
                if not no_verdict(error):
                    raise
                return None, f"its kernels could not be compared with eager arithmetic: {type(error).__name__}: {error}"
        return verdict, f"its kernels failed the comparison with eager arithmetic: {verdict.figures}"

    def _ordered(self, trial: trials.Trial, device: torch.device) -> list[tuple[str, ModuleType]]:
        """Engines by the file's timings where it has them of this trial, else as they were given."""
        where = machine(device)
        if where not in _memory.timings:
            _memory.read(where)
        timings = _memory.timings.get(where, {}).get(str(trial))
        if self._strict or not timings:
            return self._engines
        # Eager stays last: it takes many times the memory, for which a call may have no room.
        return sorted(self._engines, key=lambda engine: timings.get(engine[0], math.inf))

    def _keep(self, key: Any, function: Callable[..., Any]) -> Callable[..., Any]:
        if len(self.served) >= _MOST_KEYS:
            self.served.clear()
        self.served[key] = function
        return function


_guards: dict[tuple[tuple[str, ...], bool], Proven] = {}


def proven(engines: Sequence[tuple[str, ModuleType]], strict: bool) -> Proven:
    """The one :class:`Proven` of these engines."""
    key = tuple(name for name, _ in engines), strict
    found = _guards.get(key)
    if found is None or any(a is not b for (_, a), (_, b) in zip(found._engines, engines, strict=True)):
        found = _guards[key] = Proven(engines, strict)
    return found


@cache
def say_once(message: str) -> None:
    """Warn, unless this process has said so already."""
    logger.warning("%s", message)
