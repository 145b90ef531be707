"""A reward that is no finite number: never the best, in no mean, counted wherever a figure is printed."""

from __future__ import annotations

import dataclasses
import itertools
import json
import math
import statistics

import pytest

from entrgi.evaluate.analysis import read_results
from entrgi.evaluate.judges import by_candidate
from entrgi.evaluate.render import as_latex, as_text, tables_of
from entrgi.statistics import best_of, bootstrap_interval, estimate, paired_difference

SIZE = ("-L", 8, "-T", 8, "-K", 3)


@pytest.fixture
def spoil(fake):
    """Takes the reward from samples: of a method, and by (prompt, number of the sample)."""

    def patch(method: str, places: dict[tuple[str, int], float]) -> None:
        def prepare(sampler) -> None:
            draw = sampler.sample

            def drawn(key, trace):
                bad = places.get((json.loads(key[0]), key[2])) if sampler.config.method == method else None
                sample = draw(key, trace)
                return sample if bad is None else dataclasses.replace(sample, reward=bad)

            sampler.sample = drawn

        fake.prepare = prepare

    return patch


def strict(text: str):
    return json.loads(text, parse_constant=pytest.fail)  # no bare NaN


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf, None])
def test_statistics_are_of_what_is_there(bad) -> None:
    assert estimate([bad, 1.0, 3.0]) == estimate([1.0, 3.0]) and estimate([bad, 1.0, 3.0]).n == 2
    assert str(estimate([bad])) == estimate([bad]).signed() == "–" and estimate([bad]).to_dict()["mean"] is None
    assert paired_difference([bad, 5.0, 2.0], [1.0, bad, 1.0]) == estimate([1.0])
    assert bootstrap_interval([1.0, bad, 4.0, 2.0]) == bootstrap_interval([1.0, 4.0, 2.0])
    with pytest.raises(ValueError, match="finite reward"):
        best_of([bad, bad], 1)


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf, None])
@pytest.mark.parametrize("place", range(4))
def test_best_of_n_with_one_missing(bad, place) -> None:
    rewards: list = [2.0, -1.0, 5.0]
    rewards.insert(place, bad)
    for n in range(1, 5):
        draws = [[r for r in some if r in (2.0, -1.0, 5.0)] for some in itertools.combinations(rewards, n)]
        assert best_of(rewards, n) == pytest.approx(statistics.mean(max(some) for some in draws if some))


def test_a_judges_missing_grades_are_counted() -> None:
    found = by_candidate([math.nan, 4.0, None, None, 2.0, 3.0], 2)
    assert [(j.score, j.tests) for j in found] == [(4.0, [None, 4.0]), (None, [None, None]), (2.5, [2.0, 3.0])]


@pytest.mark.parametrize("place", range(3))
def test_generate(spoil, entrgi, tmp_path, capsys, place) -> None:
    spoil("entrgi", {("a", place): math.nan, **{("b", k): math.nan for k in range(3)}})
    out = tmp_path / "o.jsonl"
    assert entrgi("generate", "a", "b", *SIZE, "-o", out) == 0
    a, b = map(strict, out.read_text(encoding="utf-8").splitlines())
    rewards = [sample["reward"] for sample in a["samples"]]
    given = [reward for reward in rewards if reward is not None]
    assert rewards[place] is None and len(given) == 2
    assert a["top1"] == max(given) and a["mean"] == pytest.approx(sum(given) / 2)
    assert a["best"] == a["samples"][rewards.index(max(given))]["text"]
    assert (b["best"], b["top1"], b["mean"]) == (None, None, None) and len(b["samples"]) == 3
    assert "4 of 6 samples have no reward" in capsys.readouterr().err
    assert entrgi("generate", "a", "b", *SIZE, "--best-only") == 0
    shown = capsys.readouterr().out.split("> b")
    assert shown[0].count("*") == 1 and "no rew." not in shown[0]
    assert shown[1].count("no rew.") == 3 and "*" not in shown[1]


def test_compare(spoil, entrgi, tmp_path, capsys, parse_page, fake, monkeypatch) -> None:
    spoil("none", {("a", 0): math.nan, **{("b", k): math.inf for k in range(3)}})
    arguments = ("compare", "a", "b", "c", *SIZE, "--no-check", "--quiet")
    assert entrgi(*arguments, "--json", tmp_path / "o.json", "--report", tmp_path / "o.html") == 0
    got = strict((tmp_path / "o.json").read_text(encoding="utf-8"))
    base = got["methods"][0]
    assert base["samples"][0][0]["reward"] is None and base["per_prompt"]["top1"][1] is None
    a, b, c = ([s["reward"] for s in samples if s["reward"] is not None] for samples in base["samples"])
    assert base["estimates"]["top1"] == {**base["estimates"]["top1"], "n": 2, "mean": statistics.mean([max(a), max(c)])}
    assert base["estimates"]["avg"]["mean"] == pytest.approx(statistics.mean([sum(a) / 2, sum(c) / 3]))
    assert all(d["top1"]["n"] == (2 if d["reference"] == "none" else 3) for d in got["differences"])
    note = "Best-of-N leaves out 4 of 9 samples without a reward, 1 of 3 prompts without Top@1."
    assert got["notes"] == [note]
    out = capsys.readouterr().out
    assert note in out and "Best-of-N  no reward" in out and "nan" not in out
    assert note in parse_page((tmp_path / "o.html").read_text(encoding="utf-8")).data["note"]


@pytest.fixture
def folder(spoil, entrgi, tmp_path):
    """One sample of one prompt, and all that are compared of another, have no reward."""
    prompts = tmp_path / "p.txt"
    prompts.write_text("a\nb\nc\nd\n", encoding="utf-8")
    spoil("none", {("a", 1): math.nan, **{("b", k): math.nan for k in range(6)}})
    code = entrgi("evaluate", "tiny", "--datasets", prompts, *SIZE, "--best-of", 6, "--methods", "none,entrgi",
                  "--no-report", "--set", "judges=[{kind: rule}]", "-o", tmp_path / "r")  # fmt: skip
    assert code == 0
    return tmp_path / "r"


def test_evaluate_has_one_figure_in_every_table(folder, capsys) -> None:
    results = read_results([folder])
    (part,) = results.slices
    base, ours = part.rows
    given: dict = {}
    for line in (folder / "samples.jsonl").read_text(encoding="utf-8").splitlines():
        record = strict(line)
        if record["method"] == "Best-of-N" and record["sample"] < 3 and record["reward"] is not None:
            given.setdefault(record["prompt"], []).append(record["reward"])
    assert {prompt: len(rewards) for prompt, rewards in given.items()} == {"a": 2, "c": 3, "d": 3}
    top = statistics.mean(max(rewards) for rewards in given.values())
    avg = statistics.mean(sum(rewards) / len(rewards) for rewards in given.values())
    assert (base.figure("top1").mean, base.figure("avg").mean) == (pytest.approx(top), pytest.approx(avg))
    assert results.missing == 0 and len(base.rewards) == 4 and len(base.metrics["rule"]) == 3
    differences = part.differences("EntRGi")[0][2]
    assert {f.estimate.n for f in differences.values()} == {3}
    matches = part.matches()
    assert matches and all(m.difference.estimate.n == 3 == m.baseline.estimate.n for m in matches)
    note = (
        "Best-of-N leaves out 7 of 24 samples without a reward, 1 of 4 prompts without Top@1, 1 of 4 prompts without "
    )
    note += "rule."
    (_, tables) = tables_of(results)[0]
    assert len(tables) == 3 and all(note in table.notes for table in tables)
    assert "nan" not in as_text(results) and ".. " not in "\n".join(as_latex(results))


def test_a_judge_without_an_answer_is_left_out_and_counted(folder) -> None:
    path = folder / "judgements.jsonl"
    first, second, *rest = map(json.loads, path.read_text(encoding="utf-8").splitlines())
    before = read_results([folder]).slices[0].rows[0].metrics["rule"]
    lines = [{**first, "score": None, "tests": [None, None]}, {**second, "tests": [None, 4.0]}, *rest]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    row = read_results([folder]).slices[0].rows[0]
    gone = first["sample"].split("-")[1]
    assert row.metrics["rule"] == {prompt: score for prompt, score in before.items() if prompt != gone}
    assert row.missing_note()[0].endswith("2 of 4 prompts without rule, 3 of 4 grades that rule did not give.")


def test_reports_of_missing_rewards(folder, entrgi) -> None:
    assert entrgi("report", folder, "--out", folder / "r.html", "--out", folder / "r.md") == 0
    markdown = (folder / "r.md").read_text(encoding="utf-8")
    assert "nan" not in markdown and markdown.count("7 of 24 samples without a reward") == 3


def test_a_method_without_any_reward_has_no_figures(spoil, entrgi, tmp_path, capsys) -> None:
    prompts = tmp_path / "p.txt"
    prompts.write_text("a\nb\n", encoding="utf-8")
    spoil("entrgi", {(prompt, k): math.nan for prompt in "ab" for k in range(3)})
    arguments = ("--datasets", prompts, *SIZE, "--best-of", 4, "--methods", "none,aps,entrgi")
    assert entrgi("evaluate", "tiny", *arguments, "--set", "judges=null", "-o", tmp_path / "r") == 0
    out = capsys.readouterr().out
    assert "EntRGi leaves out 6 of 6 samples without a reward, 2 of 2 prompts without Top@1." in out
    (line,) = (line for line in out.splitlines() if line.startswith("EntRGi − Best-of-N"))
    assert "nan" not in out and line.count("–") == 2
