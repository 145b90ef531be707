"""`entrgi plot`: the right numbers, and a picture of them."""

from __future__ import annotations

import json

import pytest

from entrgi.train import plot, records


def _run(folder, method: str, lift: float) -> None:
    folder.mkdir()
    (folder / "run.json").write_text(json.dumps({"method": method}))
    for step in (0, 50, 100):
        rewards = [lift * step + place for place in (0.0, 1.0, 2.0, 3.0)]
        records.append(folder, records.EVALUATIONS, {"step": step, "reward": rewards, "length": [3.0] * 4})
        records.append(folder, records.LOG, {"step": step, "loss": 1.0 - step / 200, "reward": 9.0})


def test_curves_are_means_over_held_out_prompts_with_their_errors(tmp_path):
    _run(tmp_path / "a", "rgrl-entrgi", 0.02)
    label, steps, means, errors = plot.curve(str(tmp_path / "a"), "reward")
    assert label == "rgrl-entrgi" and steps == [0, 50, 100]
    assert means == pytest.approx([1.5, 2.5, 3.5]) and errors == pytest.approx([(5 / 3 / 4) ** 0.5] * 3)
    assert plot.curve(f"mine={tmp_path / 'a'}", "reward")[0] == "mine"
    assert plot.curve(str(tmp_path / "a"), "loss")[2:] == ([1.0, 0.75, 0.5], [0.0] * 3)
    assert plot.curve(str(tmp_path / "a"), "reward", log=True)[2] == [9.0] * 3


@pytest.mark.parametrize("name", ["curves.png", "curves.svg"])
def test_several_runs_in_one_picture(entrgi, tmp_path, name, capsys):
    pytest.importorskip("matplotlib")
    for place, method in enumerate(("rgrl-entrgi", "rgrl-aps", "diffu-grpo")):
        _run(tmp_path / method, method, 0.01 * place)
    runs = [tmp_path / method for method in ("rgrl-entrgi", "rgrl-aps", "diffu-grpo")]
    assert entrgi("plot", *runs, "-o", tmp_path / name, "--title", "Rewards") == 0
    content = (tmp_path / name).read_bytes()
    assert len(content) > 5000 and content[:4] in (b"\x89PNG", b"<?xm")
    assert str(tmp_path / name) in capsys.readouterr().out


def test_errors_name_what_is_there(entrgi, tmp_path, capsys):
    pytest.importorskip("matplotlib")
    _run(tmp_path / "a", "rgrl-entrgi", 0.02)
    assert entrgi("plot", tmp_path / "none") == 2
    assert "holds no training run" in capsys.readouterr().err
    assert entrgi("plot", tmp_path / "a", "--metric", "elo", "-o", tmp_path / "x.png") == 2
    assert "expected one of length, loss, reward" in capsys.readouterr().err
    assert entrgi("plot", tmp_path / "a", "-o", tmp_path / "x.gif3") == 2
    assert "cannot write" in capsys.readouterr().err
