"""`entrgi compare`: the numbers of the table, the check, and the files it writes."""

from __future__ import annotations

import json
import math
import statistics

import pytest

from entrgi.compare import render
from entrgi.comparison import Comparison, MethodRun
from entrgi_kernels.names import METHODS

SIZE = ("-L", 8, "-T", 8)
PROMPTS = ["a", "b", "c </script>", "d"]
OURS = ("entrgi", "none")


def compare(entrgi, tmp_path, *arguments) -> tuple[int, dict]:
    out = tmp_path / "c.json"
    code = entrgi("compare", *PROMPTS, *SIZE, "--json", out, *arguments)
    return code, json.loads(out.read_text(encoding="utf-8"))


def test_numbers_against_the_samples(fake, entrgi, tmp_path, capsys) -> None:
    code, got = compare(entrgi, tmp_path)
    assert code == 0
    assert [m["method"] for m in got["methods"]] == list(METHODS)
    best = {m["method"]: [max(s["reward"] for s in samples) for samples in m["samples"]] for m in got["methods"]}
    for method in got["methods"]:
        values = best[method["method"]]
        assert method["estimates"]["top1"]["mean"] == pytest.approx(statistics.mean(values))
        assert method["estimates"]["top1"]["error"] == pytest.approx(statistics.stdev(values) / math.sqrt(4))
        rewards = [s["reward"] for samples in method["samples"] for s in samples]
        assert method["estimates"]["avg"]["mean"] == pytest.approx(statistics.mean(rewards))
    pairs = {(d["method"], d["reference"]): d for d in got["differences"]}
    guided, others = [name for name in METHODS if name != "none"], [name for name in METHODS if name not in OURS]
    assert list(pairs) == [*((name, "none") for name in guided), *(("entrgi", name) for name in others)]
    gains = [a - b for a, b in zip(best["entrgi"], best["aps"], strict=True)]
    assert pairs["entrgi", "aps"]["top1"]["mean"] == pytest.approx(statistics.mean(gains))
    assert pairs["entrgi", "none"]["avg"] == pytest.approx({"mean": 2.5, "error": 0.0, "n": 4})
    out = capsys.readouterr().out
    assert "check passed" in out and "EntRGi - Best-of-N" in out and "+2.50 ± 0.00" in out


def test_the_check_fails_when_guidance_does_not_help(fake, entrgi, tmp_path, capsys) -> None:
    fake.lift["aps"] = -0.5
    code, got = compare(entrgi, tmp_path)
    assert code == 1 and got["check"]["passed"] is False
    assert "check FAILED: not above best-of-N: APS (Top@1 -0.50" in capsys.readouterr().out
    code, _ = compare(entrgi, tmp_path, "--no-check")
    assert code == 0


def test_a_tie_and_a_nan_are_failures() -> None:
    def run(method: str, values: list[float]) -> MethodRun:
        return MethodRun(method, [], 1.0, {"top1": values, "avg": values})

    assert Comparison(["a"], [run("none", [1.0]), run("aps", [1.0])], {}).verdict()[0] is False
    assert Comparison(["a"], [run("none", [1.0]), run("aps", [math.nan])], {}).verdict()[0] is False
    assert Comparison(["a"], [run("none", [1.0]), run("aps", [1.1])], {}).verdict()[0] is True
    assert Comparison(["a"], [run("aps", [1.1])], {}).verdict()[0] is None


def test_the_same_prompts_and_seed_for_every_method(fake, entrgi, tmp_path) -> None:
    code, got = compare(entrgi, tmp_path, "--seed", 5, "--weight", "step(1.0)")
    assert code == 0
    assert [s.prompts_seen for s in fake.samplers] == [PROMPTS] * len(METHODS)
    assert [s.config.seed for s in fake.samplers] == [5] * len(METHODS)
    assert [s.config.weight for s in fake.samplers] == ["step(1.0)" if name == "entrgi" else None for name in METHODS]
    assert got["settings"]["seed"] == 5 and "method" not in got["settings"]


def test_methods_beside_searches(fake, entrgi, tmp_path, capsys, parse_page) -> None:
    page = tmp_path / "c.html"
    chosen = ("--methods", "none,aps", "--searches", "best,smc", "--candidates", 2, "--report", page)
    code, got = compare(entrgi, tmp_path, *chosen)
    assert code == 0 and [s.config.search for s in fake.samplers] == ["best", "smc"] * 2
    labels = ["Best-of-N", "SMC", "APS", "APS + SMC"]
    assert [(m["label"], m["search"]) for m in got["methods"]] == list(zip(labels, ["best", "smc"] * 2, strict=True))
    pairs = [(d["method"], d["reference"]) for d in got["differences"]]
    assert pairs == [("none+smc", "none"), ("aps", "none"), ("aps+smc", "none")]
    assert "check passed" in capsys.readouterr().out, "of guided methods alone: SMC is level with best-of-N here"
    data = parse_page(page.read_text(encoding="utf-8")).data
    assert [m["label"] for m in data["methods"]] == labels and len(data["samples"]) == len(data["traces"]) == 4
    assert compare(entrgi, tmp_path, "--methods", "none", "--search", "svdd")[1]["methods"][0]["label"] == "SVDD"


def test_a_choice_of_methods(fake, entrgi, tmp_path, capsys) -> None:
    code, got = compare(entrgi, tmp_path, "--methods", "entrgi, aps")
    assert code == 0 and [m["method"] for m in got["methods"]] == ["entrgi", "aps"]
    assert "nothing checked" in capsys.readouterr().out
    assert [(d["method"], d["reference"]) for d in got["differences"]] == [("entrgi", "aps")]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--methods", "entrgi,best"], f"distinct names out of {', '.join(METHODS)}"),
        (["--methods", "aps,aps"], "distinct names"),
        (["--methods", ""], "distinct names"),
        (["-n", "0"], "--num-prompts must be at least 1"),
        (["--report", "/no/such/folder/r.html"], "there is no folder"),
        (["--json", "."], "it is a folder"),
        (["-T", "0"], "steps=0"),
        (["--weight", "bogus"], "bogus"),
    ],
)
def test_bad_input(fake, entrgi, capsys, arguments, message) -> None:
    assert entrgi("compare", "a", *arguments) == 2
    err = capsys.readouterr().err
    assert message in err and err.count("\n") == 1 and fake.loads == 0


def test_narrow_terminals_get_texts_below_each_other(fake, entrgi, tmp_path, monkeypatch, capsys) -> None:
    monkeypatch.setenv("COLUMNS", "50")
    compare(entrgi, tmp_path)
    texts = capsys.readouterr().out.split("prompt 1:")[1]
    assert all(len(line) <= 50 for line in texts.split("wrote")[0].splitlines())
    assert " | " not in texts


def test_one_prompt_has_no_errors_to_show(fake, entrgi, capsys) -> None:
    assert entrgi("compare", "a", *SIZE) == 0
    assert "±" not in capsys.readouterr().out.replace("± standard error", "")


@pytest.mark.slow
def test_the_real_thing(tiny_weights, entrgi, tmp_path, capsys) -> None:
    """The demo's short form: guidance helps, and the independent measures are there."""
    code = entrgi("compare", "--short", "--json", tmp_path / "c.json", "--report", tmp_path / "r.html")
    out = capsys.readouterr().out
    assert code == 0, out
    got = json.loads((tmp_path / "c.json").read_text(encoding="utf-8"))
    for method in got["methods"]:
        assert set(method["estimates"]) == {"top1", "avg", "judge", "rule", "nats"}
        assert 0.2 < method["estimates"]["nats"]["mean"] < 5
    assert "no benchmark" in out and (tmp_path / "r.html").stat().st_size > 50_000


def test_render_without_guided_methods() -> None:
    run = MethodRun("none", [], 1.0, {"top1": [1.0, 2.0], "avg": [0.0, 1.0]})
    settings = {
        "prompts": 2, "num_samples": 4, "max_new_tokens": 8, "steps": 8, "guidance_steps": 3, "learning_rate": 0.5,
        "temperature": 0.7, "top_p": 0.95, "seed": 0, "tiny": False,
    }  # fmt: skip
    text = render(Comparison(["a", "b"], [run], settings), texts=0)
    assert "1.50 ± 0.50" in text and "paired differences" not in text
