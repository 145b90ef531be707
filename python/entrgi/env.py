"""``entrgi env``: what this machine has and what is missing, for a first look and for bug reports. It never raises.

Every fact comes from a probe of its own; a probe that fails says ``unavailable: <reason>`` and the rest go on.
"""

from __future__ import annotations

import argparse
import importlib
import importlib.metadata
import importlib.util
import json
import logging
import os
import platform
import subprocess
import sys
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

PACKAGES = ("torch", "transformers", "triton", "tokenizers", "safetensors", "numpy", "jinja2", "tqdm")
EXTENSIONS = ("entrgi_kernels._C", "entrgi_kernels._C_cuda")
# Ours first, then those of other projects that change what we do.
VARIABLES = (
    "ENTRGI_BACKEND",
    "ENTRGI_DISABLE_EXTENSION",
    "CUDA_VISIBLE_DEVICES",
    "HF_HOME",
    "HF_HUB_OFFLINE",
    "OMP_NUM_THREADS",
    "TRITON_INTERPRET",
)
# Flags of /proc/cpuinfo that decide which kernel runs, x86 and then ARM.
INSTRUCTION_SETS = (
    "avx avx2 fma f16c avx512f avx512bw avx512vl avx512_vnni avx512_bf16 avx512_fp16 amx_tile amx_bf16 amx_fp16 "
    "asimd asimdhp asimddp bf16 i8mm sve sve2"
).split()


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Flags of ``entrgi env``."""
    form = parser.add_mutually_exclusive_group()
    form.add_argument("--json", action="store_true", help="print JSON, for bug reports and scripts")
    form.add_argument("--brief", action="store_true", help="print the version, the backends and what is missing only")


def run(args: argparse.Namespace) -> int:
    """Print the diagnostics.

    Returns:
        0, whatever the probes met.
    """
    wanted = BRIEF if args.brief else tuple(PROBES)
    facts = collect(wanted)
    if args.brief:  # the extension is worth a line only when it is missing
        missing = {name: fact for name, fact in facts.pop("extension", {}).items() if "unavailable" in fact}
        facts.update({"extension": missing} if missing else {})
    text = json.dumps(facts, indent=2) if args.json else render(facts)
    encoding = sys.stdout.encoding or "utf-8"
    print(text.encode(encoding, "backslashreplace").decode(encoding))  # a bare C locale prints ASCII only
    return 0


def collect(sections: tuple[str, ...] | None = None) -> dict[str, dict[str, Any]]:
    """Run the probes.

    Args:
        sections: names of those wanted; None for all.

    Returns:
        Section to (label to fact). A fact is JSON-safe; that of a probe which failed is
        ``{"unavailable": "<reason>"}``.
    """
    level = logging.root.manager.disable
    logging.disable(logging.CRITICAL)  # what a probe finds is printed once, by us
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return {section: _section(PROBES[section]) for section in sections or tuple(PROBES)}
    finally:
        logging.disable(level)


def render(facts: Mapping[str, Mapping[str, Any]]) -> str:
    """The facts as indented text."""
    lines = []
    for section, entries in facts.items():
        lines.append(section)
        width = max((len(label) for label in entries), default=0)
        for label, value in entries.items():
            first, *rest = _text(value).splitlines() or ["-"]
            lines.append(f"  {label:<{width}}  {first}")
            lines.extend(f"  {'':<{width}}  {line}" for line in rest)
    return "\n".join(lines)


def _text(value: Any) -> str:
    if isinstance(value, Mapping):
        if set(value) == {"unavailable"}:
            return f"unavailable: {value['unavailable']}"
        parts = [f"{key} {_text(item)}" for key, item in value.items()]
        return ("\n" if len(parts) > 4 else ", ").join(parts)
    if isinstance(value, (list, tuple)):
        return " ".join(map(_text, value)) or "none"
    return "-" if value in (None, "") else str(value)


def guarded(probe: Callable[[], Any]) -> Any:
    """What the probe returns, made JSON-safe, or why it failed. SystemExit is caught too: a library may call it."""
    try:
        value = probe()
        return json.loads(json.dumps(value, default=str))
    except KeyboardInterrupt:
        raise
    except BaseException as error:
        return {"unavailable": _reason(error)}


def _reason(error: BaseException) -> str:
    try:
        message = str(error)
    except Exception:
        message = ""
    if isinstance(error, Unavailable):
        return message
    return f"{type(error).__name__}: {message}" if message else type(error).__name__


def _section(probes: Mapping[str, Callable[[], Any]] | Callable[[], Mapping[str, Callable[[], Any]]]) -> dict[str, Any]:
    if callable(probes):
        found = None
        try:
            found = probes()
        except KeyboardInterrupt:
            raise
        except BaseException as error:
            return {"all": {"unavailable": _reason(error)}}
        probes = found
    return {label: guarded(probe) for label, probe in probes.items()}


class Unavailable(Exception):
    """Raised by a probe whose reason needs no exception name in front."""


# -- probes ------------------------------------------------------------------------------------------------------------


def _version() -> str:
    from . import __version__

    return __version__


def location() -> str:
    spec = importlib.util.find_spec("entrgi_kernels")
    if spec is None or spec.origin is None:
        raise Unavailable("entrgi_kernels cannot be found")
    return str(Path(spec.origin).parent)


def _revision() -> str:
    root = Path(location()).parent
    if not (root / ".git").exists():
        raise Unavailable("installed without a git checkout")
    git = ["git", "-C", str(root)]
    head = _output([*git, "rev-parse", "--short=12", "HEAD"])
    changed = _output([*git, "status", "--porcelain", "--untracked-files=no"])
    return f"{head} (with local changes)" if changed else head


def _output(command: list[str]) -> str:
    run = subprocess.run(command, capture_output=True, text=True, timeout=10, check=False, stdin=subprocess.DEVNULL)
    if run.returncode:
        raise Unavailable((run.stderr.strip().splitlines() or [f"exit code {run.returncode}"])[-1])
    return run.stdout.strip()


def _package(name: str) -> Callable[[], str]:
    def probe() -> str:
        try:
            version = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            raise Unavailable("not installed") from None
        if name in ("torch", "triton", "transformers"):  # present is not enough: a broken one fails when imported
            return str(getattr(importlib.import_module(name), "__version__", version))
        return version

    return probe


def _cpu_fields() -> dict[str, str]:
    path = Path("/proc/cpuinfo")
    if not path.exists():
        raise Unavailable(f"no {path} on {platform.system()}")
    block = path.read_text(encoding="utf-8", errors="replace").split("\n\n")[0]
    pairs = (line.partition(":") for line in block.splitlines())
    return {key.strip().lower(): value.strip() for key, _, value in pairs}


def _cpu_model() -> str:
    try:
        fields = _cpu_fields()
        model = fields.get("model name") or fields.get("hardware") or fields.get("cpu part")
    except Unavailable:
        model = _output(["sysctl", "-n", "machdep.cpu.brand_string"])
    return model or platform.processor() or platform.machine()


def _instruction_sets() -> list[str]:
    fields = _cpu_fields()
    flags = set((fields.get("flags") or fields.get("features") or "").split())
    return [name for name in INSTRUCTION_SETS if name in flags]


def _cores() -> dict[str, Any]:
    usable = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return {"logical": os.cpu_count(), "usable": usable}


def _threads() -> int:
    import torch

    return torch.get_num_threads()


def _capability() -> str:
    import torch

    return torch.backends.cpu.get_cpu_capability()


def _memory() -> dict[str, str]:
    path = Path("/proc/meminfo")
    if not path.exists():
        total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
        return {"total": f"{total / 2**30:.1f} GiB"}
    fields = dict(line.split(":") for line in path.read_text().splitlines() if ":" in line)
    gib = {name: int(fields[key].split()[0]) / 2**20 for name, key in (("total", "MemTotal"), ("free", "MemAvailable"))}
    return {name: f"{value:.1f} GiB" for name, value in gib.items()}


def _cuda() -> str:
    import torch

    if torch.version.cuda is None and torch.version.hip is None:
        raise Unavailable("this torch was built for CPUs only")
    return f"CUDA {torch.version.cuda}" if torch.version.cuda else f"ROCm {torch.version.hip}"


def _driver() -> str:
    path = Path("/proc/driver/nvidia/version")
    if not path.exists():
        raise Unavailable("no NVIDIA driver is loaded")
    return path.read_text().splitlines()[0].partition(":")[2].strip()


def _gpus() -> dict[str, Callable[[], Any]]:
    import torch

    if not torch.cuda.is_available():
        raise Unavailable("torch sees no CUDA device")
    return {f"gpu {index}": lambda index=index: _gpu(index) for index in range(torch.cuda.device_count())}


def _gpu(index: int) -> dict[str, Any]:
    import torch

    facts = torch.cuda.get_device_properties(index)
    return {
        "name": facts.name,
        "sm": f"{facts.major}.{facts.minor}",
        "memory": f"{facts.total_memory / 2**30:.0f} GiB",
        "processors": facts.multi_processor_count,
    }


def _gpu_section() -> dict[str, Callable[[], Any]]:
    probes: dict[str, Callable[[], Any]] = {"torch built for": _cuda, "driver": _driver}
    try:
        probes.update(_gpus())
    except Exception as error:
        reason = _reason(error)

        def absent() -> None:
            raise Unavailable(reason)

        probes["devices"] = absent
    return probes


def _backend_section() -> dict[str, Callable[[], Any]]:
    from entrgi_kernels import ops

    return {name: lambda info=info: backend_line(info) for name, info in ops.backends().items()}


def backend_line(info: Any) -> str:
    if not info.available:
        raise Unavailable(info.reason)
    return f"available on {', '.join(info.devices)}" + (f"; {info.proof}" if info.proof else "")


def _record() -> dict[str, Any]:
    """What setup.py wrote when this package was installed."""
    path = Path(location()) / "_build_info.json"
    return json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}


def extension_facts(name: str) -> Any:
    record = guarded(_record)
    if importlib.util.find_spec(name) is None:
        recorded = record.get("extensions", {})
        if name not in recorded:
            why = "not built: no record of an installation; run `pip install --no-build-isolation .` beside setup.py"
        elif recorded[name] is None:
            why = f"built for Python {record.get('python')}, this is {platform.python_version()}: install again"
        else:
            why = recorded[name]
        raise Unavailable(why)
    import torch  # its libraries must be loaded first

    try:
        module = importlib.import_module(name)
    except ImportError as error:
        built = record.get("torch")
        hint = f" (built for torch {built}, this is {torch.__version__}: install again)" if built else ""
        raise Unavailable(f"importing it failed: {error}{hint}") from None
    facts = dict(module.build_info()) if hasattr(module, "build_info") else {}
    return {**facts, **{f"built with {key}": record[key] for key in ("torch", "compiler") if key in record}}


def _extension_section() -> dict[str, Callable[[], Any]]:
    recorded = set(guarded(_record).get("extensions", {}))
    return {
        name: lambda name=name: extension_facts(name)
        for name in EXTENSIONS
        if name == EXTENSIONS[0] or name in recorded or guarded(lambda name=name: importlib.util.find_spec(name))
    }


def _tiny_section() -> dict[str, Callable[[], Any]]:
    from . import tiny

    return {name: lambda name=name: _tiny(name) for name in tiny.MODELS}


def _tiny(name: str) -> str:
    from . import tiny

    path = tiny.weights_path(name)
    size = sum(file.stat().st_size for file in path.rglob("*") if file.is_file())
    return f"{size / 1e6:.1f} MB"


PROBES: dict[str, Mapping[str, Callable[[], Any]] | Callable[[], Mapping[str, Callable[[], Any]]]] = {
    "entrgi-kernels": {"version": _version, "revision": _revision, "location": location},
    "python": {
        "version": platform.python_version,
        "executable": lambda: sys.executable,
        "platform": platform.platform,
    },
    "packages": {name: _package(name) for name in PACKAGES},
    "cpu": {
        "model": _cpu_model,
        "instruction sets": _instruction_sets,
        "torch uses": _capability,
        "cores": _cores,
        "torch threads": _threads,
        "memory": _memory,
    },
    "gpu": _gpu_section,
    "backends": _backend_section,
    "extension": _extension_section,
    "built-in models": _tiny_section,
    "environment": {name: lambda name=name: os.environ.get(name) for name in VARIABLES},
}
BRIEF = ("entrgi-kernels", "backends", "extension")
