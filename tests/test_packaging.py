"""The house: what is installed, how it imports on bare machines, how the optional extension is built or left out."""

from __future__ import annotations

import fnmatch
import importlib
import importlib.metadata
import importlib.util
import json
import os
import re
import runpy
import shutil
import subprocess
import sys
import sysconfig
import textwrap
from pathlib import Path
from typing import Any

import pytest

import entrgi_kernels

ROOT = Path(__file__).resolve().parents[1]
PACKAGES = {"entrgi_kernels": ROOT / "entrgi_kernels", "entrgi": ROOT / "python" / "entrgi"}
# At most four, all on one docs page.
VARIABLES = {"ENTRGI_BACKEND", "ENTRGI_DISABLE_EXTENSION", "ENTRGI_HOPPER_CANDIDATES"}
LONGEST_FILE = 600

# Runs `code` where importing the named modules fails, as on a machine without them.
BLOCKED = """
import sys
class Block:
    def find_spec(self, name, path=None, target=None):
        if name in {blocked!r} or name.partition(".")[0] in {blocked!r}:
            raise ModuleNotFoundError(f"No module named {{name!r}}", name=name)
sys.meta_path.insert(0, Block())
{code}
"""


def run_blocked(code: str, *blocked: str) -> subprocess.CompletedProcess[str]:
    program = BLOCKED.format(blocked=set(blocked), code=textwrap.dedent(code))
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "python")])}
    return subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, env=environment, check=False, timeout=120
    )


def pyproject() -> dict[str, Any]:
    tomllib = pytest.importorskip("tomllib", reason="Python 3.10 has no tomllib")
    return tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))


def tracked(*folders: str) -> list[Path]:
    """Files that git knows below `folders`; all files where there is no git checkout."""
    if (ROOT / ".git").exists() and shutil.which("git"):
        command = ["git", "-C", str(ROOT), "ls-files", "-z", *folders]
        names = subprocess.run(command, capture_output=True, text=True, check=True).stdout.split("\0")
        return [ROOT / name for name in names if name and (ROOT / name).is_file()]
    return [path for folder in folders for path in (ROOT / folder).rglob("*") if path.is_file()]


# -- metadata ----------------------------------------------------------------------------------------------------------


def test_installed_metadata_agree_with_the_source() -> None:
    try:
        distribution = importlib.metadata.distribution("entrgi-kernels")
    except importlib.metadata.PackageNotFoundError:
        pytest.skip("the package is run from its source tree, not installed")
    assert distribution.version == entrgi_kernels.__version__
    scripts = {point.name: point for point in distribution.entry_points if point.group == "console_scripts"}
    assert callable(scripts["entrgi"].load())


def test_build_requirements_leave_torch_out() -> None:
    # With torch among them, `pip install .` would fetch gigabytes into a throw-away environment.
    requires = pyproject()["build-system"]["requires"]
    assert not [name for name in requires if name.startswith("torch")]


def test_every_folder_of_modules_is_a_package() -> None:
    """setuptools' finder passes a folder without __init__.py over: it would be missing from the wheel."""
    missing = {
        path.parent
        for path in tracked("entrgi_kernels", "python/entrgi")
        if path.suffix == ".py" and not (path.parent / "__init__.py").exists()
    }
    assert not missing


def test_every_data_file_is_packaged() -> None:
    patterns = pyproject()["tool"]["setuptools"]["package-data"]
    forgotten = []
    for package, folder in PACKAGES.items():
        for path in tracked(str(folder.relative_to(ROOT))):
            name = path.relative_to(folder).as_posix()
            subfolder, _, base = name.rpartition("/")
            inner = f"{package}.{subfolder.replace('/', '.')}" if subfolder else package
            known = [*patterns.get(package, []), *patterns.get("*", [])]
            matched = any(fnmatch.fnmatch(name, pattern.replace("**/", "*")) for pattern in known)
            matched |= any(fnmatch.fnmatch(base, pattern) for pattern in patterns.get(inner, []))
            if path.suffix != ".py" and path.name != ".gitignore" and not matched:
                forgotten.append(name)
    assert not forgotten, "neither Python nor in [tool.setuptools.package-data]"


@pytest.mark.parametrize("lock", ["requirements.lock", "requirements-oldest.lock"])
@pytest.mark.parametrize("machine", ["x86_64", "aarch64"])
@pytest.mark.parametrize("python", ["3.10", "3.11", "3.12", "3.13"])
def test_the_lock_pins_once_what_pyproject_asks_for(python: str, machine: str, lock: str) -> None:
    requirements = pytest.importorskip("packaging.requirements")
    version = pytest.importorskip("packaging.version").Version
    here = {"python_version": python, "python_full_version": f"{python}.0", "platform_machine": machine, "extra": ""}
    here |= {"sys_platform": "linux", "platform_system": "Linux"}

    def applying(lines: list[str]) -> list[Any]:
        parsed = [requirements.Requirement(line) for line in lines if line and not line.startswith("#")]
        return [item for item in parsed if item.marker is None or item.marker.evaluate(here)]

    pins: dict[str, list[str]] = {}
    for pin in applying((ROOT / lock).read_text(encoding="utf-8").splitlines()):
        assert re.fullmatch(r"==[\w.]+", str(pin.specifier)), pin
        pins.setdefault(pin.name.lower(), []).append(str(pin.specifier)[2:])
    assert all(len(versions) == 1 for versions in pins.values()), pins
    # torch is the Makefile's own, and with it what only its CUDA builds need.
    assert not [name for name in pins if name == "torch" or name.startswith("nvidia-")]

    project = pyproject()["project"]
    extras = project["optional-dependencies"]
    for wanted in applying([*project["dependencies"], *extras["test"], *extras["real"], *extras["dev"]]):
        if wanted.name != "torch":
            pin = pins[wanted.name.lower()][0]
            assert wanted.specifier.contains(pin), wanted
            floors = [bound.version for bound in wanted.specifier if bound.operator == ">="]
            assert "oldest" not in lock or version(pin) == version(floors[0]), f"{wanted}: the oldest lock has {pin}"


# -- imports -----------------------------------------------------------------------------------------------------------


def test_import_needs_nothing_but_python() -> None:
    result = run_blocked(
        "import entrgi_kernels, entrgi; print(entrgi_kernels.__version__)", "torch", "numpy", "triton", "transformers"
    )
    assert result.stdout.strip() == entrgi_kernels.__version__, result.stderr


def test_public_names_without_triton_and_extension() -> None:
    code = """
        import entrgi_kernels
        for name in entrgi_kernels.__all__:
            getattr(entrgi_kernels, name)
        import torch
        logsumexp, entropy = entrgi_kernels.ops.softmax_entropy(torch.zeros(2, 4))
        assert torch.allclose(entropy, torch.tensor(4.0).log()), entropy
        print("done")
    """
    result = run_blocked(code, "triton", "entrgi_kernels._C", "entrgi_kernels._C_cuda")
    assert result.stdout.strip() == "done", result.stderr


def test_the_tests_are_collected_without_the_extras() -> None:
    """`pytest -m gpu` reads every file, on GPU machines that have what the package requires and no more."""
    extras = ["accelerate", "datasets", "diffusers", "fastapi", "matplotlib", "openai", "peft", "prometheus_client"]
    extras += ["psutil", "ray", "scipy", "uvicorn"]
    found = run_blocked(f"""
        sys.modules.update(dict.fromkeys({extras!r}))  # not there, for `import` and for `find_spec`
        import pytest
        sys.exit(pytest.main(["--collect-only", "-q", "-m", "gpu", "-p", "no:cacheprovider", {str(ROOT / "tests")!r}]))
    """)
    assert found.returncode == 0, found.stdout[-2000:]


def test_dir_and_unknown_names() -> None:
    assert set(entrgi_kernels.__all__) <= set(dir(entrgi_kernels))
    with pytest.raises(AttributeError, match="no attribute 'guided'"):
        _ = entrgi_kernels.guided


def test_the_library_does_not_print_its_log_uninvited() -> None:
    code = "import logging, entrgi_kernels; logging.getLogger('entrgi_kernels').warning('noise')"
    result = run_blocked(code)
    assert (result.returncode, result.stderr) == (0, "")


def test_house_rules() -> None:
    """No file above 600 lines; no environment variable that the docs do not name."""
    for path in tracked("setup.py", "entrgi_kernels", "csrc", "python", "benchmarks", "tests"):
        if path.suffix in {".py", ".cpp", ".h", ".hpp", ".cu", ".cuh"}:
            text = path.read_text(encoding="utf-8")
            assert text.count("\n") <= LONGEST_FILE, f"{path}: {text.count(chr(10))} lines"
            if path.parent.name != "tests" and "tests" not in path.relative_to(ROOT).parts:
                used = set(re.findall(r"environ[^\n]*?[\"'](ENTRGI_\w+)", text))
                used |= set(re.findall(r"getenv\(\s*[\"'](ENTRGI_\w+)", text))
                assert used <= VARIABLES, path


# -- the extension -----------------------------------------------------------------------------------------------------


@pytest.fixture
def build_script(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """setup.py's functions, with nothing built."""
    setuptools = pytest.importorskip("setuptools", minversion="77")
    monkeypatch.setattr(setuptools, "setup", lambda **arguments: None)
    monkeypatch.setattr(sys, "argv", ["setup.py", "egg_info"])
    monkeypatch.setenv("PATH", os.environ.get("PATH", os.defpath))  # changed by the script, restored here
    monkeypatch.delenv("ENTRGI_DISABLE_EXTENSION", raising=False)
    monkeypatch.delenv("CXX", raising=False)
    monkeypatch.chdir(ROOT)
    functions = runpy.run_path(str(ROOT / "setup.py"))
    monkeypatch.setitem(functions["obstacle"].__globals__, "sources", lambda *patterns: ["csrc/cpu/ops.cpp"])
    return functions


def test_obstacles_are_named_with_a_remedy(
    build_script: dict[str, Any], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    obstacle = build_script["obstacle"]
    names = obstacle.__globals__

    with monkeypatch.context() as patch:
        patch.setenv("ENTRGI_DISABLE_EXTENSION", "1")
        assert "ENTRGI_DISABLE_EXTENSION is set" in obstacle()
    with monkeypatch.context() as patch:
        patch.setitem(names, "sources", lambda *patterns: [])
        assert "no csrc/cpu/*.cpp" in obstacle()
    with monkeypatch.context() as patch:
        patch.setattr(names["importlib"].util, "find_spec", lambda name: None)
        assert "torch is not installed" in obstacle() and "--no-build-isolation" in obstacle()
    with monkeypatch.context() as patch:
        patch.setenv("PATH", str(tmp_path))
        assert "no C++ compiler was found" in obstacle() and "apt-get install g++" in obstacle()
    with monkeypatch.context() as patch:
        patch.setenv("CXX", "no-such-compiler")
        assert "CXX='no-such-compiler'" in obstacle()
    with monkeypatch.context() as patch:
        patch.setattr(names["sysconfig"], "get_path", lambda name: str(tmp_path))
        patch.setitem(names, "choose_compiler", lambda: "c++")
        assert "no Python.h" in obstacle()


def test_cuda_architectures_are_the_given_ones_or_those_that_nvcc_knows(
    build_script: dict[str, Any], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    architectures, nvcc = build_script["cuda_architectures"], tmp_path / "nvcc"
    monkeypatch.delenv("TORCH_CUDA_ARCH_LIST", raising=False)
    for known, expected in (("sm_75 sm_80 sm_90 sm_100", "8.0+PTX;9.0a;10.0a"), ("sm_80 sm_90", "8.0+PTX;9.0a")):
        nvcc.write_text(f"#!/bin/sh\necho {known}\n")
        nvcc.chmod(0o755)
        assert architectures(str(nvcc)) == expected
    monkeypatch.setenv("TORCH_CUDA_ARCH_LIST", "9.0a")
    assert architectures(str(nvcc)) == "9.0a"


def test_the_toolkit_is_found_by_its_headers(
    build_script: dict[str, Any], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    toolkit, real, wrapper = build_script["toolkit"], tmp_path / "cuda-13", tmp_path / "bin" / "nvcc"
    for folder in (real / "bin", real / "include", wrapper.parent):
        folder.mkdir(parents=True)
    (real / "bin" / "nvcc").write_text(f"#!/bin/sh\necho '#$ TOP={real}/bin/..' >&2\n")
    wrapper.write_text(f'#!/bin/sh\nexec {real}/bin/nvcc "$@"\n')
    for path in (real / "bin" / "nvcc", wrapper):
        path.chmod(0o755)
    monkeypatch.setenv("PATH", f"{wrapper.parent}{os.pathsep}{os.defpath}")
    monkeypatch.delenv("CUDA_HOME", raising=False)
    monkeypatch.delenv("CUDA_PATH", raising=False)

    def found() -> Path | None:
        toolkit.cache_clear()
        return toolkit()

    assert found() in (None, Path("/usr/local/cuda").resolve())  # an nvcc without headers is no toolkit
    (real / "include" / "cuda_runtime_api.h").touch()
    assert found() == real  # the wrapper was asked
    monkeypatch.setenv("CUDA_HOME", str(wrapper.parents[1]))
    assert found() == real  # a CUDA_HOME without headers is passed over


def test_the_cuda_module_is_tried_where_it_is_wanted_and_can_be_built(
    build_script: dict[str, Any], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    torch = pytest.importorskip("torch")
    cpp_extension = pytest.importorskip("torch.utils.cpp_extension")
    names = build_script["extensions"].__globals__
    monkeypatch.setitem(names, "sources", lambda *patterns: [p.replace("*", "a") for p in patterns])
    monkeypatch.setattr(cpp_extension, "CUDA_HOME", None)
    monkeypatch.setenv("CUDA_HOME", "")  # set by the script, restored here
    monkeypatch.delenv("FORCE_CUDA", raising=False)
    monkeypatch.setenv("TORCH_CUDA_ARCH_LIST", "9.0a")
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)

    def modules() -> list[str]:
        return [module.name for module in build_script["extensions"]()]

    cpu, both = ["entrgi_kernels._C"], ["entrgi_kernels._C", "entrgi_kernels._C_cuda"]
    monkeypatch.setitem(names, "toolkit", lambda: None)
    assert modules() == cpu
    monkeypatch.setitem(names, "toolkit", lambda: tmp_path)
    assert modules() == both and cpp_extension.CUDA_HOME == str(tmp_path)
    monkeypatch.delenv("TORCH_CUDA_ARCH_LIST")
    assert modules() == cpu  # no GPU, and nobody asked
    monkeypatch.setitem(names, "cuda_architectures", lambda compiler: "9.0a")
    monkeypatch.setenv("FORCE_CUDA", "1")
    assert modules() == both
    monkeypatch.delenv("FORCE_CUDA")
    monkeypatch.delenv("TORCH_CUDA_ARCH_LIST")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert modules() == both
    monkeypatch.setattr(torch.version, "cuda", None)
    assert modules() == cpu


def build_in_place(tree: Path, **variables: str) -> tuple[str, dict[str, Any]]:
    environment = {**os.environ, "ENTRGI_DISABLE_EXTENSION": "0", **variables}
    command = [sys.executable, "setup.py", "build_ext", "--inplace"]
    output = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    run = subprocess.run(command, cwd=tree, env=environment, **output, check=False, timeout=300)
    assert run.returncode == 0, run.stdout
    return run.stdout, json.loads((tree / "entrgi_kernels" / "_build_info.json").read_text(encoding="utf-8"))


GOOD = """
#include <Python.h>
static PyModuleDef definition = {PyModuleDef_HEAD_INIT, "_C"};
PyMODINIT_FUNC PyInit__C() { return PyModule_Create(&definition); }
"""


@pytest.mark.slow
def test_extension_is_built_or_its_absence_explained(build_script: dict[str, Any], tmp_path: Path) -> None:
    if build_script["obstacle"]() is not None:
        pytest.skip(build_script["obstacle"]())
    for name in ("setup.py", "pyproject.toml", "LICENSE", "entrgi_kernels/__init__.py"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        shutil.copy(ROOT / name, tmp_path / name)
    (tmp_path / "python" / "entrgi").mkdir(parents=True)
    source = tmp_path / "csrc" / "cpu" / "ops.cpp"
    source.parent.mkdir(parents=True)
    built = tmp_path / "entrgi_kernels" / f"_C{sysconfig.get_config_var('EXT_SUFFIX')}"

    source.write_text(GOOD)
    _, record = build_in_place(tmp_path)
    assert record["extensions"] == {"entrgi_kernels._C": None} and record["torch"] and built.exists()

    source.write_text("#error broken on purpose\n")
    output, record = build_in_place(tmp_path)
    assert "broken on purpose" in record["extensions"]["entrgi_kernels._C"]
    assert "installing without the compiled extension" in output and "broken on purpose" in output
    assert not built.exists(), "a module of older sources must not survive a failed build"

    source.write_text(GOOD)
    build_in_place(tmp_path)
    assert built.exists()
    output, record = build_in_place(tmp_path, ENTRGI_DISABLE_EXTENSION="1")
    assert "ENTRGI_DISABLE_EXTENSION is set" in record["extensions"]["entrgi_kernels._C"]
    assert "ENTRGI_DISABLE_EXTENSION is set" in output and not built.exists()


def test_every_public_name_is_in_the_lazy_table() -> None:
    for name in entrgi_kernels.__all__:
        assert getattr(entrgi_kernels, name) is not None
    for name, module in entrgi_kernels._EXPORTS.items():
        assert name in importlib.import_module(module).__all__, f"{module} does not export {name}"


def test_extension_shares_torchs_openmp_runtime() -> None:
    """A second runtime's threads would spin on the same cores."""
    if importlib.util.find_spec("entrgi_kernels._C") is None or not Path("/proc/self/maps").exists():
        pytest.skip("no compiled extension, or no /proc to look it up")
    code = """
        import torch, entrgi_kernels._C
        files = {line.split()[-1] for line in open("/proc/self/maps") if "/" in line}
        for name in files:
            if any(kind in name for kind in ("libgomp", "libomp", "libiomp")):
                print(name)
    """
    result = run_blocked(code)
    assert result.returncode == 0, result.stderr
    assert len(result.stdout.splitlines()) <= 1, result.stdout
