"""Every script of examples/integrations runs and tells what it is about; on the loops' own code where given."""

from __future__ import annotations

import runpy
import sys
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parents[2] / "examples" / "integrations"
SHARED = {"common", "standins", "standin_script", "standin_training"}
SCRIPTS = sorted(path.stem for path in EXAMPLES.glob("*.py") if path.stem not in SHARED | {"accelerate"})


def run(monkeypatch, name: str, *arguments: str) -> tuple[float, float]:
    monkeypatch.setattr(sys, "argv", [f"{name}.py", *arguments])
    monkeypatch.syspath_prepend(str(EXAMPLES))
    for module in (*SHARED, *SCRIPTS):
        monkeypatch.delitem(sys.modules, module, raising=False)
    return runpy.run_path(str(EXAMPLES / f"{name}.py"))["main"]()


@pytest.mark.parametrize("name", SCRIPTS)
def test_a_script_runs(name, monkeypatch, capsys, of_a_working_pair):
    if name.startswith("diffusers"):
        pytest.importorskip("diffusers", reason="needs the extra entrgi_kernels[diffusers]")
    with of_a_working_pair():
        plain, guided = run(monkeypatch, name, "--tokens", "16")
    assert capsys.readouterr().out.count("mean reward") == 2
    if name not in ("published", "training_sampler"):  # there both runs are guided
        assert guided > plain


def test_the_script_without_a_reward(monkeypatch, capsys):
    assert run(monkeypatch, "accelerate", "--tokens", "16") == (1.0, 1.0)
    assert "100% with torch's draws, 100% when given back" in capsys.readouterr().out


def test_the_hooks_of_dream(monkeypatch):
    plain, guided = run(monkeypatch, "dream", "--hooks", "yes")
    assert guided > plain


def test_llada_on_its_own_code(monkeypatch, integration_code):
    plain, guided = run(monkeypatch, "llada", "--code", str(integration_code("llada", "generate.py")))
    assert guided > plain


def test_the_published_script_itself(monkeypatch, integration_code):
    run(monkeypatch, "published", "--code", str(integration_code("entrgi", "main_expts")), "--tokens", "8")


def test_the_training_sampler_itself(monkeypatch, dllm_code):
    module = "dllm.pipelines.rl.rgrl.sampler"
    dllm_code("entrgi-rgrl", module)
    run(monkeypatch, "training_sampler", "--sampler", f"{module}:RgrlDreamSampler", "--tokens", "8")
