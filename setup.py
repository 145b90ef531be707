"""Builds the optional extension modules; everything else about the package is in pyproject.toml.

The package is complete without them: where torch cannot be imported (build isolation), no C++ compiler is found, the
compilation fails or ENTRGI_DISABLE_EXTENSION=1 is set, one message says what happened and what to do, and pure Python
is installed. The outcome of each module is recorded in entrgi_kernels/_build_info.json, which `entrgi env` reads.
"""

from __future__ import annotations

import contextlib
import datetime
import functools
import glob
import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import tempfile
from collections.abc import Iterator
from pathlib import Path

import setuptools
from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext
from setuptools.command.build_py import build_py
from setuptools.command.sdist import sdist

ROOT = Path(__file__).resolve().parent
PACKAGE = "entrgi_kernels"
CPU_MODULE, CUDA_MODULE = f"{PACKAGE}._C", f"{PACKAGE}._C_cuda"
RECORD = "_build_info.json"
BUILDING = {"bdist_wheel", "build", "build_ext", "develop", "editable_wheel", "install"}
NO_ISOLATION = "pip install --no-build-isolation ."

if int(setuptools.__version__.split(".")[0]) < 77:  # pip's own check is skipped under --no-build-isolation
    raise SystemExit(
        f"{PACKAGE}: building needs setuptools >= 77, found {setuptools.__version__}: "
        f"run `pip install --upgrade setuptools`, then `{NO_ISOLATION}`"
    )
os.chdir(ROOT)
# A ninja that pip installed lies beside the interpreter, which need not be on PATH.
os.environ["PATH"] = os.pathsep.join([sysconfig.get_path("scripts"), os.environ.get("PATH", os.defpath)])


def sources(*patterns: str) -> list[str]:
    """Paths below the repository root, relative to it and sorted, as setuptools wants them."""
    return sorted(path for pattern in patterns for path in glob.glob(pattern, recursive=True))


def choose_compiler() -> str | None:
    """A C++ compiler that can be run, put into CXX (torch reads it) and, if needed, CC; None when there is none."""
    given = os.environ.get("CXX")
    candidates = [given.split()[0]] if given else ["c++", "g++", "clang++"]
    found = next((name for name in candidates if shutil.which(name)), None)
    if found is None:
        return None
    os.environ["CXX"] = given or found
    # Python may have been built with another compiler than this machine's; setuptools would link with that one.
    linker = (sysconfig.get_config_var("LDSHARED") or "cc").split()[0]
    if not os.environ.get("CC") and not shutil.which(linker):
        os.environ["CC"] = os.environ["CXX"]
    return found


def obstacle() -> str | None:
    """Why no extension can be built here, with what to do about it; None when the build may be tried."""
    if os.environ.get("ENTRGI_DISABLE_EXTENSION", "0") not in ("", "0"):
        return "ENTRGI_DISABLE_EXTENSION is set: unset it and install again to build the extension"
    if not sources("csrc/cpu/*.cpp"):
        return "this source tree has no csrc/cpu/*.cpp"
    if sys.platform == "win32":
        return "the extension is built on Linux and macOS only"
    if importlib.util.find_spec("torch") is None:
        return (
            "torch is not installed where the package is built (pip builds in isolation by default): "
            f"install torch first, then run `{NO_ISOLATION}`"
        )
    if choose_compiler() is None:
        return (
            f"no C++ compiler was found (CXX={os.environ.get('CXX', '')!r}, PATH searched for c++, g++, clang++): "
            f"install one (Debian: apt-get install g++), then run `{NO_ISOLATION}`"
        )
    headers = Path(sysconfig.get_path("include"))
    if not (headers / "Python.h").exists():
        return (
            f"{headers} has no Python.h: install the interpreter's headers (Debian: apt-get install python3-dev), "
            f"then run `{NO_ISOLATION}`"
        )
    try:
        import torch.utils.cpp_extension  # noqa: F401
    except Exception as error:
        return f"importing torch failed ({type(error).__name__}: {error}): mend torch, then run `{NO_ISOLATION}`"
    return None


def openmp_link_flags() -> list[str]:
    """Link to the OpenMP runtime that torch has loaded.

    A second runtime would have its own threads, which spin on the same cores. Some torch wheels carry libgomp under
    another name; elsewhere -fopenmp finds the one that is loaded, by its name.
    """
    import torch

    root = Path(torch.__file__).parent
    renamed = [path for folder in (root / "lib", root.parent / "torch.libs") for path in folder.glob("libgomp-*.so*")]
    return [f"-L{renamed[0].parent}", f"-l:{renamed[0].name}"] if renamed else ["-fopenmp"]


def cuda_sources() -> list[str]:
    """Sources of the CUDA module; none where nobody needs it, which needs no word.

    Wanted it is where torch has CUDA and there is a GPU, or it was asked for with torch's own FORCE_CUDA=1 or
    TORCH_CUDA_ARCH_LIST, as on a build machine.
    """
    import torch

    asked = os.environ.get("TORCH_CUDA_ARCH_LIST") or os.environ.get("FORCE_CUDA", "0") not in ("", "0")
    wanted = torch.version.cuda and (asked or torch.cuda.is_available())
    return sources("csrc/cuda/**/*.cu", "csrc/cuda/**/*.cpp") if wanted else []


@functools.cache
def toolkit() -> Path | None:
    """The CUDA toolkit: the folder with nvcc and with cuda_runtime_api.h. None where there is none.

    The nvcc on PATH may be a wrapper in a folder that holds nothing else, so nvcc is asked where it lives.
    """
    candidates = [os.environ.get("CUDA_HOME"), os.environ.get("CUDA_PATH")]
    if compiler := shutil.which("nvcc"):
        candidates += [str(Path(path).parents[1]) for path in (compiler, os.path.realpath(compiler))]
        command = [compiler, "--dryrun", "-E", "-x", "cu", os.devnull]
        run = subprocess.run(command, capture_output=True, text=True, check=False)
        candidates += re.findall(r"^#\$ TOP=(.+)$", run.stderr + run.stdout, re.MULTILINE)
    candidates.append("/usr/local/cuda")
    for root in (Path(given).resolve() for given in candidates if given):
        if (root / "bin" / "nvcc").exists() and (root / "include" / "cuda_runtime_api.h").exists():
            return root
    return None


def nvcc() -> str | None:
    """The toolkit's compiler, with torch told to use that toolkit; None where there is none."""
    from torch.utils import cpp_extension

    root = toolkit()
    if root is None:
        return None
    cpp_extension.CUDA_HOME = os.environ["CUDA_HOME"] = str(root)
    return str(root / "bin" / "nvcc")


def cuda_architectures(compiler: str) -> str:
    """TORCH_CUDA_ARCH_LIST where it is set, else the shipped architectures that this nvcc knows.

    Those with an `a` have instructions of their own and run on no other; PTX of the oldest serves the rest.
    """
    if given := os.environ.get("TORCH_CUDA_ARCH_LIST"):
        return given
    run = subprocess.run([compiler, "--list-gpu-code"], capture_output=True, text=True, check=False)
    known = set(run.stdout.split())
    shipped = {"sm_80": "8.0+PTX", "sm_90": "9.0a", "sm_100": "10.0a"}
    return ";".join(name for code, name in shipped.items() if code in known) or "8.0+PTX"


def extensions() -> list[Extension]:
    """The extension modules to try. Never -march=native: the kernels choose their instruction set at run time."""
    from torch.utils.cpp_extension import CppExtension, CUDAExtension

    openmp = [] if sys.platform == "darwin" else ["-fopenmp"]
    common = {
        "include_dirs": [str(ROOT / "csrc")],
        "depends": sources("csrc/**/*.h", "csrc/**/*.cuh"),
        "optional": True,
    }
    # These follow CFLAGS on the command line: an -O given there (.ci/sanitize) must not be overridden.
    level = [] if "-O" in os.environ.get("CFLAGS", "") else ["-O3"]
    cxx = [*level, "-g0", "-std=c++20", "-fvisibility=hidden", *openmp]
    cpu = sources("csrc/cpu/*.cpp")
    link = openmp_link_flags() if openmp else []
    modules = [CppExtension(CPU_MODULE, cpu, extra_compile_args={"cxx": cxx}, extra_link_args=link, **common)]
    cuda = cuda_sources()
    # Tiles of the update that only `python -m benchmarks.tools.tune` runs: without the define their file is empty.
    candidates = os.environ.get("ENTRGI_HOPPER_CANDIDATES", "0") not in ("", "0")
    defines = ["-DENTRGI_HOPPER_CANDIDATES"] if candidates else []
    if cuda and (compiler := nvcc()):
        os.environ["TORCH_CUDA_ARCH_LIST"] = cuda_architectures(compiler)
        # No --use_fast_math: the race is decided by the relative accuracy of logarithms near 1.
        flags = {"cxx": [*cxx, *defines], "nvcc": ["-O3", "-std=c++20", "-lineinfo", "--threads=4", *defines]}
        modules.append(CUDAExtension(CUDA_MODULE, cuda, extra_compile_args=flags, **common))
    return modules


def compiler_facts() -> dict[str, str]:
    """What the extension was built with, for `entrgi env` and for whoever reads a bug report."""
    import torch

    cxx = os.environ.get("CXX", "c++")
    run = subprocess.run([*cxx.split(), "--version"], capture_output=True, text=True, check=False)
    facts = {"torch": torch.__version__, "compiler": (run.stdout.splitlines() or [cxx])[0]}
    if cuda_sources() and nvcc():
        facts["cuda architectures"] = os.environ["TORCH_CUDA_ARCH_LIST"]
    return facts


def say(reason: str) -> None:
    """The one message about an extension that is not built."""
    line = "-" * 100
    print(
        f"{line}\n{PACKAGE}: installing without the compiled extension.\n{reason}\n{line}", file=sys.stderr, flush=True
    )


def summary(name: str, problem: str, output: list[str]) -> str:
    """Why a module was not built, in a few lines: its first errors and the end of the compiler's output."""
    calm = [line for line in output if " -c " not in line and not line.startswith(("FAILED", "building"))]
    errors = [line for line in calm if "error" in line.lower()][:5]
    return "\n".join(dict.fromkeys([f"building {name} failed: {problem}", *errors, *calm[-6:]]))


def record(folder: Path, outcome: dict[str, str | None], facts: dict[str, str]) -> None:
    """Write beside the package what became of each extension module: None for built, else the reason."""
    folder.mkdir(parents=True, exist_ok=True)
    date = datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds")
    content = {"extensions": outcome, "python": sys.version.split()[0], "date": date, **facts}
    (folder / RECORD).write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def forget(folder: Path) -> None:
    """Remove extension modules of an earlier build: a stale one would be installed, or found, instead of none."""
    for path in folder.glob("_C*.so"):
        path.unlink()


@contextlib.contextmanager
def copied_output() -> Iterator[list[str]]:
    """Let everything written to stdout and stderr, by child processes too, through and keep a copy.

    Yields:
        A list that receives the lines when the block ends.
    """
    lines: list[str] = []
    sys.stdout.flush()
    sys.stderr.flush()
    saved = os.dup(1), os.dup(2)
    with tempfile.TemporaryFile() as copy:
        tee = subprocess.Popen(
            [sys.executable, "-c", TEE], stdin=subprocess.PIPE, stdout=saved[0], stderr=copy.fileno()
        )
        assert tee.stdin is not None
        os.dup2(tee.stdin.fileno(), 1)
        os.dup2(tee.stdin.fileno(), 2)
        tee.stdin.close()
        try:
            yield lines
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            for target, source in zip((1, 2), saved, strict=True):
                os.dup2(source, target)
                os.close(source)
            tee.wait()
            copy.seek(0)
            lines.extend(copy.read().decode("utf-8", "replace").splitlines())


TEE = """
import os
while chunk := os.read(0, 65536):
    os.write(1, chunk)
    os.write(2, chunk)
"""


def settle_for_python(folder: Path, reason: str) -> None:
    """Leave the package in `folder` without extension modules, the reason recorded and said."""
    forget(folder)
    record(folder, {CPU_MODULE: reason}, {})
    say(reason)


class BuildPy(build_py):
    """Copies the packages and, where no extension is going to be built, records why."""

    def run(self) -> None:
        super().run()
        if REASON is not None:
            settle_for_python(ROOT / PACKAGE if self.editable_mode else Path(self.build_lib, PACKAGE), REASON)


class NoBuildExt(build_ext):
    """Stands in for torch's build_ext where no extension can be built (`setup.py build_ext --inplace`)."""

    def run(self) -> None:
        if REASON is not None and self.inplace:
            settle_for_python(ROOT / PACKAGE, REASON)


def make_build_ext() -> type[build_ext]:
    """torch's build_ext, made to survive a failing compilation."""
    from torch.utils.cpp_extension import BuildExtension

    class BuildExt(BuildExtension):
        """Builds each extension module that can be built and records what became of the rest."""

        outcome: dict[str, str | None]

        def finalize_options(self) -> None:
            # pip gives an editable build a new folder each time; a lasting one lets ninja compile only what changed.
            tag = f"{sysconfig.get_platform()}-{sys.implementation.cache_tag}"
            self.build_temp = self.build_temp or str(ROOT / "build" / "extension" / tag)
            super().finalize_options()

        def run(self) -> None:
            self.outcome = {}
            folder = ROOT / PACKAGE if self.inplace else Path(self.build_lib, PACKAGE)
            forget(folder)
            forget(Path(self.build_lib, PACKAGE))
            with copied_output() as lines:
                try:
                    super().run()
                except Exception as error:  # whatever the compiler check or the linker raise
                    problem = f"{type(error).__name__}: {error}"
                    self.outcome = {ext.name: self.outcome.get(ext.name) or problem for ext in self.extensions}
            for name, problem in self.outcome.items():
                if problem is None:
                    continue
                reason = self.outcome[name] = summary(name, problem, lines)
                if name == CUDA_MODULE:
                    self.outcome[name] = (reason.splitlines()[1:] or [problem])[0].strip()
                else:
                    say(f"{reason}\nTo see the compiler's whole output: {NO_ISOLATION} -v")
            if cuda_sources() and nvcc() is None:
                self.outcome[CUDA_MODULE] = (
                    "torch has CUDA but no toolkit with nvcc and cuda_runtime_api.h was found: install one (or set "
                    f"CUDA_HOME), then run `{NO_ISOLATION}`"
                )
            if problem := self.outcome.get(CUDA_MODULE):
                print(f"{PACKAGE}: installing without the CUDA module: {problem}", file=sys.stderr, flush=True)
            record(folder, self.outcome, compiler_facts())

        def build_extension(self, ext: Extension) -> None:
            try:
                super().build_extension(ext)
                self.outcome[ext.name] = None
            except Exception as error:  # ninja's RuntimeError or setuptools' CompileError, LinkError
                self.outcome[ext.name] = f"{type(error).__name__}: {error}"

    return BuildExt


class Sdist(sdist):
    """Adds the sources of the extension also where it cannot be built."""

    def make_distribution(self) -> None:
        self.filelist.extend(sources("csrc/*/*.*", "csrc/*/*/*.*"))
        super().make_distribution()


# Commands that only ask for metadata need no torch.
REASON = obstacle() if BUILDING & set(sys.argv) else "only metadata were asked for"
commands: dict[str, type] = {"build_py": BuildPy, "sdist": Sdist}
commands["build_ext"] = NoBuildExt if REASON is not None else make_build_ext()
setup(ext_modules=extensions() if REASON is None else [], cmdclass=commands)
