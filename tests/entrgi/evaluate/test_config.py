"""The configuration: what is read, what the grid becomes, and what is refused."""

from __future__ import annotations

import pytest

from entrgi.errors import UsageError, differences
from entrgi.evaluate.config import cells_of, from_dict, methods_of, presets, read_config
from entrgi_kernels.names import METHODS


def labels(**content) -> list[tuple[str, float]]:
    return [(label, settings.temperature) for label, settings, _ in methods_of(from_dict(content))]


def test_the_grid_is_the_product_of_its_axes() -> None:
    cells = cells_of(from_dict({"seeds": [1, 2], "temperatures": [0.5, 0.7], "datasets": ["tiny", "x.jsonl"]}))
    assert len(cells) == 2 * 2 * 2 * len(METHODS)
    assert len({cell.key for cell in cells}) == len(cells)
    assert {(c.dataset, c.config.seed, c.config.temperature, c.config.method) for c in cells} == {
        (d, s, t, m) for d in ("tiny", "x") for s in (1, 2) for t in (0.5, 0.7)
        for m in METHODS
    }  # fmt: skip


def test_methods_are_swept_and_repetitions_left_out() -> None:
    methods = [
        "none",
        "entrgi",
        {"method": "entrgi", "guidance_steps": [1, 3]},
        {"method": "entrgi", "weight": "step(1)"},
    ]
    assert labels(methods=methods) == [
        ("Best-of-N", 0.7), ("EntRGi", 0.7), ("EntRGi, M = 1", 0.7), ("EntRGi, step(1)", 0.7),
    ]  # fmt: skip
    assert labels(methods=[{"method": ["none", "entrgi"], "temperature": [0.3, 1.0]}]) == [
        ("Best-of-N", 0.3), ("Best-of-N", 1.0), ("EntRGi", 0.3), ("EntRGi", 1.0),
    ]  # fmt: skip
    # To first-order guidance M above 1 and eta mean nothing, and to the others gamma.
    assert labels(methods=[
        {"method": "first_order", "guidance_steps": [1, 3]}, {"method": "first_order", "learning_rate": 0.1},
        {"method": "first_order", "guidance_scale": 4.0}, "entrgi", {"method": "entrgi", "guidance_scale": 4.0},
    ]) == [("First-order, M = 1", 0.7), ("First-order, γ = 4.0", 0.7), ("EntRGi", 0.7)]  # fmt: skip
    # Without guidance M and eta mean nothing.
    assert labels(methods=["none", {"method": "none", "learning_rate": 0.1}]) == [("Best-of-N", 0.7)]


def test_a_key_depends_on_what_changes_texts_alone() -> None:
    def key(**content) -> str:
        return cells_of(from_dict({"methods": ["entrgi"], **content}))[0].key

    base = key()
    assert base == key(name="other", settings={"batch_size": 2, "backend": "eager"}, device="cpu")
    changed = [
        {"settings": {"learning_rate": 0.1}}, {"seeds": [5]}, {"temperatures": [1]}, {"dtype": "bfloat16"},
        {"datasets": ["x.txt"]}, {"model": "a/b", "rewards": ["c/d"]}, {"model": "a/b", "rewards": ["c/e"]},
    ]  # fmt: skip
    assert len({base, *(key(**content) for content in changed)}) == 1 + len(changed)


def test_best_of_raises_unguided_samples_alone() -> None:
    cells = cells_of(from_dict({"best_of": 16, "methods": ["none", "entrgi"]}))
    assert [(c.config.num_samples, c.compared) for c in cells] == [(16, 4), (4, 4)]


@pytest.mark.parametrize("name", presets())
def test_presets_are_read_and_survive_json(name: str) -> None:
    config = read_config(name)
    assert config.name == name and cells_of(config)
    assert from_dict(config.to_dict()) == config


def test_the_ablations_hold_what_reviewers_asked_for() -> None:
    found = {(label, settings.temperature) for label, settings, _ in methods_of(read_config("ablations"))}
    at = {label for label, temperature in found if temperature == 0.7}
    wanted = {f"EntRGi, threshold({theta})" for theta in (0.5, 1.0, 1.5)} | {"EntRGi, step(1.0)", "EntRGi"}
    assert wanted <= at
    assert sum("M =" in label for label in at) >= 3 and sum("η =" in label for label in at) >= 3
    assert len({temperature for label, temperature in found if label == "EntRGi"}) >= 4


def test_overrides_reach_into_settings(tmp_path) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text("settings: {steps: 8}\nseeds: 3\n", encoding="utf-8")
    config = read_config(str(path), {"settings.guidance_steps": 1, "temperatures": [0.2]})
    assert (config.name, config.seeds, config.temperatures) == ("mine", (3,), (0.2,))
    assert config.settings == {"steps": 8, "guidance_steps": 1}


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"method": "none"}, "no key 'method'"),
        ({"methods": []}, "methods is empty"),
        ({"methods": ["bogus"]}, "bogus"),
        ({"methods": [{"weight": "step"}]}, "a mapping with `method`"),
        ({"methods": [{"method": "entrgi", "label": "x", "guidance_steps": [1, 2]}]}, "one label for several"),
        ({"settings": {"temperature": 1}}, "use temperatures"),
        ({"settings": {"eta": 1}}, "no setting 'eta'"),
        ({"settings": {"steps": 0}}, "steps=0"),
        ({"seeds": [1.5]}, "expected integers"),
        ({"seeds": [10**30]}, "expected integers of 64 bits"),
        ({"best_of": 10**30}, "expected a number of samples up to 1024"),
        ({"temperatures": ["hot"]}, "is no number"),
        ({"best_of": "most"}, "best_of='most'"),
        ({"traces": -1}, "traces=-1"),
        ({"datasets": [{"split": "test"}]}, "a mapping with `path`"),
        ({"datasets": [{"path": "tiny", "rows": 3}]}, "no key 'rows'"),
        ({"datasets": ["a/x.csv", "b/x.csv"]}, "two datasets have one name"),
        ({"datasets": [{"path": "tiny", "num_prompts": 0}]}, "num_prompts=0"),
        ({"datasets": [{"path": "tiny", "shuffle": "yes"}]}, "shuffle='yes'"),
        ({"model": "some/model"}, "all tiny or none"),
        ({"judges": [{"kind": "oracle"}]}, "kind='oracle'"),
        ({"judges": [{"kind": "lm"}]}, "give the `model`"),
        ({"judges": [{"kind": "openai", "model": "m"}]}, "endpoint's `url`"),
        ({"judges": [{"kind": "rule"}, {"kind": "rule"}]}, "must be distinct"),
        ({"judges": [{"kind": "rule"}, {"kind": "rule", "name": "r"}]}, "one under two names"),
        ({"judges": ["rule"]}, "a mapping with `kind`"),
        ({"judges": [{"kind": "rule", "key": 1}]}, "no key 'key'"),
    ],
)
def test_what_is_not_accepted_is_named(content, message) -> None:
    with pytest.raises(UsageError, match=message.replace("(", r"\(").replace("'", ".")):
        from_dict(content)


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("nope", None, "expected a .yaml file or one of"),
        ("no.yaml", None, "cannot read"),
        ("a.yaml", "{", "is not YAML"),
        ("a.yaml", b"\xff{", r"not UTF-8 text \(byte 0\)"),
        ("a.yaml", "- x", "expected a mapping"),
    ],
)
def test_files_that_are_none(tmp_path, monkeypatch, name, text, message) -> None:
    monkeypatch.chdir(tmp_path)
    if text is not None:
        (tmp_path / name).write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(UsageError, match=message):
        read_config(name)


def test_differences_name_what_changed() -> None:
    lines = differences({"seeds": [1], "model": "tiny"}, {"seeds": [1, 2], "model": "tiny"})
    assert lines == ["  seeds: [1] there, [1, 2] now"]


def test_a_flag_that_is_no_yaml(entrgi, capsys) -> None:
    assert entrgi("evaluate", "tiny", "--set", "temperatures=[") == 2
    assert "--set temperatures: '[' is no YAML value" in capsys.readouterr().err


@pytest.mark.parametrize(
    "content",
    [
        {"settings": ["a"]},
        {"settings": True},
        {"model": 3},
        {"datasets": [{"path": "tiny", "name": []}]},
        {"datasets": [{"path": "tiny", "field": None}]},
        {"judges": [{"kind": "rule", "name": {}}]},
        {"datasets": [{"path": "\ud800"}]},
    ],
)
def test_values_of_another_kind_are_refused_by_name(content) -> None:
    with pytest.raises(UsageError, match="expected (text|a mapping|plain values)"):
        from_dict(content)
