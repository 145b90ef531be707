"""Searches beside methods: the grid's cells, their labels and keys, and how each is compared with best-of-N."""

from __future__ import annotations

import json
import sys
import types
from pathlib import Path

import pytest

from entrgi.errors import UsageError
from entrgi.evaluate import diversity
from entrgi.evaluate.analysis import read_results
from entrgi.evaluate.config import cells_of, from_dict, methods_of, settings_identity
from entrgi.evaluate.render import as_text
from entrgi_kernels.guidance.config import GuidanceConfig
from entrgi_kernels.guidance.schedules import plan
from entrgi_kernels.names import METHODS, SEARCHES

SEARCHED = ["best", {"search": "smc", "search_every": [2, 4]}, {"search": "svdd", "candidates": 2, "label": "Prism"}]
ARGUMENTS = ("tiny", "-n", 4, "-L", 8, "-T", 8, "-K", 3, "--best-of", 6, "--methods", "none,aps", "--searches",
             "best,smc,svdd", "--no-report", "--set", "judges=null", "--set", "traces=0")  # fmt: skip


def cells(**content) -> list[tuple]:
    return [(label, s.method, s.search, s.num_samples, k) for label, s, k in methods_of(from_dict(content))]


@pytest.fixture
def folder(fake, entrgi, tmp_path) -> Path:
    assert entrgi("evaluate", *ARGUMENTS, "-o", tmp_path / "r") == 0
    return tmp_path / "r"


def test_every_search_goes_with_every_method() -> None:
    assert cells(methods=["none", {"method": "entrgi", "guidance_steps": 1}], searches=SEARCHED, best_of=9) == [
        ("Best-of-N", "none", "best", 9, 4),
        ("SMC, r = 2", "none", "smc", 4, 4),
        ("SMC, r = 4", "none", "smc", 4, 4),
        ("Prism", "none", "svdd", 4, 4),
        ("EntRGi, M = 1", "entrgi", "best", 4, 4),
        ("EntRGi + SMC, M = 1, r = 2", "entrgi", "smc", 4, 4),
        ("EntRGi + SMC, M = 1, r = 4", "entrgi", "smc", 4, 4),
        ("EntRGi + Prism, M = 1", "entrgi", "svdd", 4, 4),
    ]
    assert set(SEARCHES) == {s.search for _, s, _ in methods_of(from_dict({"searches": list(SEARCHES)}))}


def test_a_method_may_name_its_search_and_so_may_the_settings() -> None:
    named = {"method": "aps", "search": ["smc", "svdd"], "self_rewarding": True}
    assert [c[:3] for c in cells(methods=["none", named], searches="svdd")] == [
        ("SVDD", "none", "svdd"),
        ("APS + SMC, self-rewarding", "aps", "smc"),
        ("APS + SVDD, self-rewarding", "aps", "svdd"),
    ]
    assert [c[0] for c in cells(methods=["none", "aps"], settings={"search": "smc"})] == ["SMC", "APS + SMC"]


def test_keys_are_those_of_before_where_there_is_no_search() -> None:
    """A setting of a search that is not run changes no text, so it is in no key: results of old are gone on with."""
    of_searches = {"search", *(name for kind in SEARCHES.values() for name in kind.settings)}
    plain, smc = GuidanceConfig(), GuidanceConfig(search="smc")
    assert not of_searches & set(settings_identity(plain))
    assert settings_identity(plain) == settings_identity(plain.replace(candidates=7, search_every=3))
    assert settings_identity(smc) == settings_identity(smc.replace(candidates=7))
    assert settings_identity(smc) != settings_identity(smc.replace(search_every=3))
    svdd = plain.replace(search="svdd")
    assert settings_identity(svdd) == settings_identity(svdd.replace(search_every=3)) != settings_identity(smc)
    assert settings_identity(svdd) != settings_identity(svdd.replace(candidates=7))
    assert "searches" not in from_dict({}).identity() and from_dict({"searches": "smc"}).identity()["searches"]
    assert len({cell.key for cell in cells_of(from_dict({"searches": SEARCHED}))}) == 4 * len(METHODS)


def test_results_of_before_there_were_searches_are_read(folder, entrgi) -> None:
    path = folder / "config.json"
    header = json.loads(path.read_text(encoding="utf-8"))
    del header["config"]["searches"]
    for cell in header["cells"].values():
        for name in ("search", "candidates", "search_every", "self_rewarding"):
            cell["settings"].pop(name)
    path.write_text(json.dumps(header), encoding="utf-8")
    assert {row.search for row in read_results([folder]).slices[0].rows} == {"best"}


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"searches": ["beam"]}, "search='beam': expected one of 'best', 'smc', 'svdd'"),
        ({"searches": [{"candidates": 2}]}, "a mapping with `search`"),
        ({"searches": [{"search": "smc", "method": "aps"}]}, "method belong to methods"),
        ({"searches": [{"search": "smc", "temperature": 1.0}]}, "temperature belong to"),
        ({"searches": ["smc"], "settings": {"search": "svdd"}}, "use searches"),
        ({"searches": [{"search": "smc", "search_every": [1, 2], "label": "x"}]}, "one label for several"),
        ({"searches": [{"search": "smc", "label": 3}]}, "label: expected text"),
        (
            {"searches": ["svdd", {"search": "smc", "label": "SVDD"}], "methods": "none"},
            "two have the label 'SVDD'",
        ),
        (
            {"searches": [{"search": "smc", "num_samples": 8}], "methods": [{"method": "aps", "num_samples": 2}]},
            "num_samples: set in methods",
        ),
    ],
)
def test_what_is_not_accepted_is_named(content, message) -> None:
    with pytest.raises(UsageError, match=message):
        from_dict(content)


def test_all_are_compared_with_best_of_n_at_equal_cost(folder) -> None:
    (part,) = read_results([folder]).slices
    assert [row.label for row in part.rows] == ["Best-of-N", "SMC", "SVDD", "APS", "APS + SMC", "APS + SVDD"]
    assert part.baseline is part.rows[0] and part.rows[0].samples == 6
    matches = {(match.row.label, match.unit): match for match in part.matches()}
    assert set(matches) == {(row.label, unit) for row in part.rows[1:] for unit in ("flops", "seconds")}
    ratio = {label: match.ratio for (label, unit), match in matches.items() if unit == "flops"}
    assert ratio["SMC"] < ratio["SVDD"] and ratio["APS"] < ratio["APS + SMC"] < ratio["APS + SVDD"]
    against = [(a.label, b.label) for a, b, _ in part.differences("APS")]
    assert ("SVDD", "Best-of-N") in against and ("SMC", "APS") in against


def test_diversity_stands_beside_searches_alone(folder, fake, entrgi, tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(diversity, "has_bleu", lambda: False)
    text = as_text(read_results([folder]))
    assert "distinct-1" in text and "distinct-2" in text
    assert "self-BLEU is left out: it needs pip install 'entrgi_kernels[diversity]'" in text
    assert entrgi("evaluate", *ARGUMENTS, "--searches", "best", "-o", tmp_path / "plain") == 0
    assert "distinct" not in as_text(read_results([tmp_path / "plain"]))


def test_distinct_n() -> None:
    assert diversity.distinct(["a b a", "a b"], 1) == 2 / 5
    assert diversity.distinct(["a b a", "a b"], 2) == 2 / 3
    assert diversity.distinct(["a", ""], 2) is None


def test_self_bleu_is_of_each_text_against_the_others(monkeypatch) -> None:
    class Bleu:
        def __init__(self, effective_order: bool) -> None:
            assert effective_order

        def sentence_score(self, text: str, others: list[str]) -> types.SimpleNamespace:
            return types.SimpleNamespace(score=100.0 * (text in others))

    package = types.ModuleType("sacrebleu")
    package.metrics = types.ModuleType("sacrebleu.metrics")  # type: ignore[attr-defined]
    package.metrics.BLEU = Bleu  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "sacrebleu", package)
    monkeypatch.setitem(sys.modules, "sacrebleu.metrics", package.metrics)
    assert diversity.self_bleu(["a", "a", "b", "c"]) == 0.5
    assert diversity.self_bleu(["a"]) is None


def test_self_bleu_by_sacrebleu() -> None:
    pytest.importorskip("sacrebleu")
    same, other = "the soup was very good today", "nobody likes a cold tea"
    assert diversity.self_bleu([same, same]) == pytest.approx(1.0)
    assert 0 <= diversity.self_bleu([same, other]) < 0.1 < diversity.self_bleu([same, same, other]) < 1
    assert diversity.self_bleu(["", ""]) == 0


def test_pictures_of_searches(folder, entrgi, tmp_path) -> None:
    assert entrgi("report", folder, "--out", tmp_path / "r.html") == 0
    assert "APS + SVDD" in (tmp_path / "r.html").read_text(encoding="utf-8")


def test_flops_are_of_what_was_run_where_that_is_known(folder, caplog) -> None:
    """Results of before there was `work` count all that is planned."""
    path = folder / "batches.jsonl"
    lines = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    planned = {row.label: row.flops for row in read_results([folder]).slices[0].rows}
    cells = json.loads((folder / "config.json").read_text(encoding="utf-8"))["cells"]

    counts = [count for (count,) in plan("linspace", [8], 8).counts if count]
    opened = [8 - sum(counts[:step]) for step in range(len(counts))]

    def write(steps: int, value: object = None) -> None:
        for line in lines:
            settings = cells[line["cell"]]["settings"]
            copies = settings["candidates"] if settings["search"] == "svdd" else 1
            rows = line["prompts"] * settings["num_samples"] * copies
            line["work"] = [[rows, rows * steps, rows * sum(opened[:steps])]] if value is None else value
        path.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")

    write(len(counts))
    assert {row.label: row.flops for row in read_results([folder]).slices[0].rows} == pytest.approx(planned)
    write(len(counts) // 2)
    half = {row.label: row.flops for row in read_results([folder]).slices[0].rows}
    assert "planned" not in caplog.text
    assert all(0.3 * planned[label] < half[label] < 0.8 * planned[label] for label in planned)
    write(len(counts) // 2)
    of_one = next(key for key, cell in cells.items() if cell["label"] == "SVDD")
    for unknown in ({}, {"work": [[1, 8, 36]] * 3}):  # of before there was any; of blocks that no config.json tells of
        for line in lines:
            if line["cell"] == of_one:
                line.pop("work", None)
                line |= unknown
        path.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
        caplog.clear()
        mixed = {row.label: row.flops for row in read_results([folder]).slices[0].rows}
        assert "FLOPs of SVDD are of all that was planned" in caplog.text
        assert mixed == pytest.approx({**half, "SVDD": planned["SVDD"]})
    write(0, [[0, 0, 0]])  # a block of which nothing was run, and one whose trajectories had all ended
    write(0, [[3, 3, 0]])
    assert all(row.flops > 0 for row in read_results([folder]).slices[0].rows)
    for damaged in ([[1, 2]], [[1, 2, -3]], [[1, 2, 1 << 64]], [1], 7, "x", [[5, 0, 10]], [[5, 4, 10]], [[0, 5, 10]]):
        write(1, damaged)
        with pytest.raises(UsageError, match="'work' is damaged"):
            read_results([folder])


def test_the_lengths_of_prompts_are_written_down_and_checked(folder) -> None:
    path = folder / "batches.jsonl"
    whole = path.read_text(encoding="utf-8")
    lines = [json.loads(line) for line in whole.splitlines()]
    for line in lines:
        assert len(line["prompt_lengths"]) == line["prompts"] and sum(line["prompt_lengths"]) == line["prompt_tokens"]
    flops = [row.flops for row in read_results([folder]).slices[0].rows]

    def write(*change: object) -> None:
        changed = [{key: value for key, value in line.items() if key != "prompt_lengths"} for line in lines]
        changed = [{**line, "prompt_lengths": change[0]} for line in changed] if change else changed
        path.write_text("".join(json.dumps(line) + "\n" for line in changed), encoding="utf-8")

    write()  # as before they were: their mean
    assert [row.flops for row in read_results([folder]).slices[0].rows] == pytest.approx(flops, rel=0.02)
    for damaged in ([1], [1.5] * lines[0]["prompts"], 3, None):
        write(damaged)
        with pytest.raises(UsageError, match="'prompt_lengths' is damaged"):
            read_results([folder])
