"""`entrgi env` prints what it can, whatever is broken."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import sysconfig
from pathlib import Path
from typing import Any

import pytest

from entrgi import cli, env

ROOT = Path(__file__).resolve().parents[2]
NO_PACKAGES = "for name in ('torch', 'numpy', 'transformers', 'triton', 'safetensors'): sys.modules[name] = None"


def run_entrgi(*arguments: str, before: str = "", **variables: str) -> subprocess.CompletedProcess[str]:
    """The command in a fresh process, after the statements `before`."""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "python")]), **variables}
    program = f"import sys\n{before}\nfrom entrgi.cli import main\nsys.exit(main({list(arguments)!r}))"
    return subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, env=environment, check=False, timeout=120
    )


def broken() -> Any:
    raise RuntimeError("broken on purpose")


def test_facts_of_this_machine() -> None:
    import torch

    facts = env.collect()
    assert tuple(facts) == tuple(env.PROBES)
    assert facts["packages"]["torch"] == torch.__version__
    assert facts["python"]["executable"] == sys.executable
    assert facts["backends"]["eager"].startswith("available on cpu")
    assert json.loads(json.dumps(facts)) == facts


def test_json_parses_and_brief_is_short(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["env", "--json"]) == 0
    assert set(json.loads(capsys.readouterr().out)) == set(env.PROBES)
    assert cli.main(["env", "--brief"]) == 0
    text = capsys.readouterr().out
    assert "backends" in text and "executable" not in text


@pytest.mark.parametrize(("fact", "shown"), [({"isa": "avx2"}, False), ({"unavailable": "no compiler"}, True)])
def test_brief_mentions_the_extension_when_it_is_missing(
    fact: dict[str, str], shown: bool, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(env.PROBES, "extension", {"entrgi_kernels._C": lambda: fact})
    assert cli.main(["env", "--brief"]) == 0
    assert ("entrgi_kernels._C  unavailable: no compiler" in capsys.readouterr().out) == shown


def test_every_probe_broken(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    sections = {
        name: broken if callable(probes) else dict.fromkeys(probes, broken) for name, probes in env.PROBES.items()
    }
    monkeypatch.setattr(env, "PROBES", sections)
    assert cli.main(["env"]) == 0
    lines = capsys.readouterr().out.splitlines()
    entries = [line for line in lines if line.startswith(" ")]
    assert len(lines) - len(entries) == len(sections)
    assert len(entries) >= len(sections)
    assert all(line.endswith("unavailable: RuntimeError: broken on purpose") for line in entries)


class _Unprintable(Exception):
    def __str__(self) -> str:
        raise ValueError("no message either")


@pytest.mark.parametrize("error", [SystemExit(3), _Unprintable(), OSError("driver"), MemoryError()])
def test_guarded_survives(error: BaseException) -> None:
    def probe() -> None:
        raise error

    assert type(error).__name__ in env.guarded(probe)["unavailable"]


def test_guarded_makes_values_json_safe_and_lets_interrupts_through() -> None:
    assert env.guarded(lambda: {"path": Path("x")}) == {"path": "x"}

    def interrupted() -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        env.guarded(interrupted)


def test_without_any_dependency() -> None:
    """A broken torch is the first thing that people run this for."""
    result = run_entrgi("env", "--json", before=NO_PACKAGES, PATH="")
    assert result.returncode == 0, result.stderr
    assert result.stderr == ""
    facts = json.loads(result.stdout)
    assert "torch" in facts["packages"]["torch"]["unavailable"]
    assert "unavailable" in facts["backends"]["all"]
    assert facts["python"]["executable"] == sys.executable


def test_ascii_terminal() -> None:
    result = run_entrgi("env", before=NO_PACKAGES, PYTHONIOENCODING="ascii", ENTRGI_BACKEND="näive")
    assert result.returncode == 0, result.stderr
    assert r"n\xe4ive" in result.stdout


def test_absent_extension_is_explained_by_the_record(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(env, "location", lambda: str(tmp_path))
    probe = env.guarded(lambda: env.extension_facts("entrgi_no_such_module"))
    assert "no record of an installation" in probe["unavailable"]

    record = {"extensions": {"entrgi_no_such_module": "line one\nline two"}}
    (tmp_path / "_build_info.json").write_text(json.dumps(record))
    probe = env.guarded(lambda: env.extension_facts("entrgi_no_such_module"))
    assert probe == {"unavailable": "line one\nline two"}
    (tmp_path / "_build_info.json").write_text('{"extensions": {"entrgi_no_such_module": null}, "python": "3.1.4"}')
    again = env.guarded(lambda: env.extension_facts("entrgi_no_such_module"))
    assert "built for Python 3.1.4" in again["unavailable"] and "install again" in again["unavailable"]
    text = env.render({"extension": {"_C": probe}})
    assert text.splitlines() == ["extension", "  _C  unavailable: line one", "      line two"]


def test_extension_that_cannot_be_loaded(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / f"entrgi_torn{sysconfig.get_config_var('EXT_SUFFIX')}").write_bytes(b"torn")
    (tmp_path / "_build_info.json").write_text(json.dumps({"torch": "0.0.1", "extensions": {"entrgi_torn": None}}))
    monkeypatch.setattr(env, "location", lambda: str(tmp_path))
    monkeypatch.syspath_prepend(str(tmp_path))
    reason = env.guarded(lambda: env.extension_facts("entrgi_torn"))["unavailable"]
    assert "importing it failed" in reason and "built for torch 0.0.1" in reason and "install again" in reason


def test_a_gpu_backend_tells_what_is_proven() -> None:
    from entrgi_kernels.backends import BackendInfo

    info = BackendInfo("triton", True, ("cuda",), None, "12 kinds of calls proven here")
    assert env.backend_line(info) == "available on cuda; 12 kinds of calls proven here"
