"""The numbers of the tables, against figures worked out here."""

from __future__ import annotations

import itertools
import json
import math
import statistics
from pathlib import Path

import pytest

from entrgi.errors import UsageError
from entrgi.evaluate.analysis import Figure, paired, read_results
from entrgi.evaluate.flops import Shape, sample_flops, total
from entrgi.evaluate.render import as_latex, as_markdown, as_text, quantity
from entrgi.statistics import Estimate, best_of, bootstrap_interval
from entrgi.tables import latex
from entrgi_kernels.guidance.config import GuidanceConfig

ARGUMENTS = ("tiny", "-n", 6, "--seeds", "1,2", "-L", 8, "-T", 8, "-K", 3, "--best-of", 8, "--methods",
             "none,aps,entrgi", "--no-report", "--set", "judges=[{kind: rule, samples: all}]")  # fmt: skip


@pytest.fixture
def folder(fake, entrgi, tmp_path) -> Path:
    assert entrgi("evaluate", *ARGUMENTS, "-o", tmp_path / "r") == 0
    return tmp_path / "r"


def lines(folder: Path, name: str) -> list[dict]:
    return [json.loads(line) for line in (folder / f"{name}.jsonl").read_text(encoding="utf-8").splitlines()]


def test_metrics_are_of_the_first_k_samples_and_means_over_seeds(folder) -> None:
    results = read_results([folder])
    (part,) = results.slices
    rewards: dict = {}
    for line in lines(folder, "samples"):
        rewards.setdefault((line["method"], line["prompt"]), {}).setdefault(line["seed"], []).append(line["reward"])
    assert [row.label for row in part.rows] == ["Best-of-N", "APS", "EntRGi"] and results.missing == 0
    for row in part.rows:
        mine = [seeds for (label, _), seeds in rewards.items() if label == row.label]
        assert len(mine) == 6 and all(
            len(r) == (8 if row.label == "Best-of-N" else 3) for s in mine for r in s.values()
        )
        top = [statistics.mean(max(r[:3]) for r in seeds.values()) for seeds in mine]
        avg = [statistics.mean(sum(r[:3]) / 3 for r in seeds.values()) for seeds in mine]
        assert row.figure("top1").mean == pytest.approx(statistics.mean(top))
        assert row.figure("top1").estimate.error == pytest.approx(statistics.stdev(top) / math.sqrt(6))
        assert row.figure("avg").mean == pytest.approx(statistics.mean(avg))


def test_judges_see_the_best_of_the_compared_samples(folder) -> None:
    judged = {line["sample"]: line["score"] for line in lines(folder, "judgements")}
    assert len(judged) == 3 * 6 * 2 * 3, "samples beyond K serve the compute-matched comparison alone"
    (part,) = read_results([folder]).slices
    best: dict = {}
    for line in lines(folder, "samples"):
        if line["method"] == "EntRGi":
            group = line["seed"], line["prompt"]
            if group not in best or line["reward"] > best[group]["reward"]:
                best[group] = line
    assert part.rows[2].figure("rule").mean == pytest.approx(statistics.mean(judged[b["key"]] for b in best.values()))
    assert "rule, all" in part.rows[2].metrics


def test_differences_are_paired(folder) -> None:
    results = read_results([folder])
    (part,) = results.slices
    pairs = {(a.label, b.label): values for a, b, values in part.differences("EntRGi")}
    assert list(pairs) == [("APS", "Best-of-N"), ("EntRGi", "Best-of-N"), ("APS", "EntRGi")]
    values, base = part.rows[2].metrics["top1"], part.rows[0].metrics["top1"]
    gains = [values[prompt] - base[prompt] for prompt in values]
    found = pairs["EntRGi", "Best-of-N"]["top1"]
    assert found.mean == pytest.approx(statistics.mean(gains)) and found.interval == bootstrap_interval(gains)
    assert paired({"a": 3.0, "b": 9.0}, {"a": 1.0, "c": 0.0}).mean == 2.0, "over the prompts that both have"
    with pytest.raises(UsageError, match="no finished prompt in common"):
        paired({"a": 1.0}, {"b": 1.0})


def test_matching_costs(folder) -> None:
    (part,) = read_results([folder]).slices
    matches = {(m.row.label, m.unit): m for m in part.matches()}
    assert set(matches) == {(label, unit) for label in ("APS", "EntRGi") for unit in ("flops", "seconds")}
    match = matches["EntRGi", "flops"]
    header = json.loads((folder / "config.json").read_text())
    model, reward = (Shape(**header["shapes"][key]) for key in ("model:tiny", "reward:tiny"))
    cost = {row.label: total(sample_flops(model, reward, _settings(row.settings), 10)) for row in part.rows}
    assert match.ratio == pytest.approx(3 * cost["EntRGi"] / cost["Best-of-N"])
    assert match.n == min(8, math.ceil(match.ratio)) and match.capped == (math.ceil(match.ratio) > 8)
    baseline = [statistics.mean(best_of(r, match.n) for r in s.values()) for s in part.rows[0].rewards.values()]
    assert match.baseline.mean == pytest.approx(statistics.mean(baseline))
    gains = [v - b for v, b in zip(part.rows[2].metrics["top1"].values(), baseline, strict=True)]
    assert match.difference.mean == pytest.approx(statistics.mean(gains))


def _settings(content: dict) -> GuidanceConfig:
    return GuidanceConfig(**{**content, "betas": tuple(content["betas"])})


def test_several_evaluations_are_told_apart(folder, fake, entrgi, tmp_path) -> None:
    fake.lift["aps"] = 9.0
    assert entrgi("evaluate", *ARGUMENTS, "-o", tmp_path / "other", "--methods", "aps") == 0
    (part,) = read_results([folder, tmp_path / "other"]).slices
    assert [row.label for row in part.rows] == ["Best-of-N", "APS [r]", "EntRGi", "APS [other]"]


def test_an_unfinished_evaluation_is_reported_as_such(folder, entrgi, capsys) -> None:
    data = (folder / "samples.jsonl").read_bytes().splitlines(keepends=True)
    (folder / "samples.jsonl").write_bytes(b"".join(data[:-5]))
    assert entrgi("report", folder) == 0
    assert "not finished: 5 samples are missing" in capsys.readouterr().out
    (part,) = read_results([folder]).slices
    assert len(part.rows[2].rewards) == 6 and sum(len(s) for s in part.rows[2].rewards.values()) == 10
    (folder / "samples.jsonl").write_bytes(b"")
    assert entrgi("report", folder) == 2 and "no finished sample" in capsys.readouterr().err
    assert entrgi("report", folder.parent) == 2 and "holds no results" in capsys.readouterr().err


def test_the_same_tables_in_every_form(folder) -> None:
    results = read_results([folder])
    text, markdown, tex = as_text(results), "\n".join(as_markdown(results)), "\n".join(as_latex(results))
    (part,) = results.slices
    for row in part.rows:
        figure = row.figure("top1").text()
        assert figure in text and figure in markdown and latex(figure) in tex
    best = max(row.figure("avg").mean for row in part.rows)
    assert f"**{best:.2f} [" in markdown and rf"\textbf{{{best:.2f} [" in tex
    assert tex.count(r"\begin{tabular}") == tex.count(r"\end{tabular}") == 3
    assert "−" not in tex and "τ" not in tex and "EntRGi $-$ Best-of-N" in tex


def test_bootstrap_intervals() -> None:
    values = [0.0, 0.2, 0.1, 0.9, 0.4, 0.3, 0.8, 0.2, 0.5, 0.1]
    low, high = bootstrap_interval(values)
    assert low < statistics.mean(values) < high
    error = statistics.stdev(values) / math.sqrt(10)
    assert high - low == pytest.approx(2 * 1.96 * error, rel=0.2)
    assert bootstrap_interval(values) == (low, high), "the same draws every time"
    shifted = bootstrap_interval([v + 1 for v in values])
    assert shifted == pytest.approx((low + 1, high + 1), abs=1e-3), "and for every method"
    assert bootstrap_interval([2.0, 2.0, 2.0]) == (2.0, 2.0)
    assert bootstrap_interval([2.5, 2.5 + 4e-16, 2.5]) == pytest.approx((2.5, 2.5))
    assert bootstrap_interval([1.0]) is None and bootstrap_interval([1.0, math.nan]) is None


def test_best_of_n_is_unbiased() -> None:
    rewards = [0.3, -1.0, 2.0, 0.7, 0.7]
    for n in range(1, 6):
        subsets = list(itertools.combinations(rewards, n))
        assert best_of(rewards, n) == pytest.approx(sum(map(max, subsets)) / len(subsets))
    assert math.isfinite(best_of([float(i) for i in range(1024)], 512))
    with pytest.raises(ValueError, match="1 <= n <= 5"):
        best_of(rewards, 6)


def test_figures_as_text() -> None:
    assert Figure(Estimate(-1.004, 0.1, 3), (-1.5, 0.5)).text() == "−1.00 [−1.50, 0.50]"
    assert Figure(Estimate(-0.004, 0.1, 3), (-0.001, 0.5)).text(signed=True) == "+0.00 [+0.00, +0.50]"
    assert Figure(Estimate(2.0, None, 1), None).text() == "2.00"


def test_quantities() -> None:
    assert [quantity(v) for v in (None, 12, 1234, 5.6e9, 2.21e16)] == ["–", "12", "1.23 k", "5.6 G", "22.1 P"]
