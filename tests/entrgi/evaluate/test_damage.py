"""Damaged results: each is refused in a line that names the place, or made again; no traceback, no other figure."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

GRID = ("--methods", "none,entrgi", "-n", 2, "--batch-size", 1, "-L", 8, "-T", 8, "-K", 2, "--best-of", 2,
        "--traces", 1, "--set", "judges=[{kind: rule}]", "--no-report", "--quiet")  # fmt: skip
STREAMS = ("samples", "batches", "judgements", "traces")
EQUAL = ("samples", "judgements", "traces")
Spoil = Callable[[list[bytes]], list[bytes]]


def changed(name: str, value: object) -> Spoil:
    """The second line with another value; None takes it away."""

    def spoil(lines: list[bytes]) -> list[bytes]:
        record = json.loads(lines[1])
        record[name] = value
        if value is None:
            del record[name]
        return [lines[0], json.dumps(record).encode() + b"\n", *lines[2:]]

    return spoil


def with_reward(value: bytes) -> Spoil:
    return lambda lines: [lines[0].replace(b'"reward": ', b'"reward": ' + value + b', "was": '), *lines[1:]]


def replaced(line: bytes) -> Spoil:
    return lambda lines: [lines[0], line, *lines[2:]]


REFUSED: dict[str, tuple[tuple[str, ...], Spoil, str]] = {
    "no key": (STREAMS, changed("key", None), "line 2: 'key' is missing or damaged"),
    "no reward": (("samples",), changed("reward", None), "line 2: 'reward' is missing or damaged"),
    "reward as text": (("samples",), changed("reward", "3"), "line 2: 'reward' is missing or damaged"),
    "another sample": (("samples",), changed("sample", 7), "line 2: 'key', 'sample' or 'tokens' is damaged"),
    "no turn": (("samples",), changed("prompt", [1]), "line 2: a turn must be"),
    "no score": (("judgements",), changed("score", None), "line 2: 'score' is missing or damaged"),
    "no seconds": (("batches",), changed("seconds", None), "line 2: 'seconds' is missing or damaged"),
    "steps": (("traces",), changed("steps", [{"step": 0}]), "line 2: 'steps' is damaged"),
    "twice": (STREAMS, lambda lines: [lines[0], lines[0], *lines[1:]], "line 2: its key is that of"),
    "a list": (STREAMS, replaced(b"[1]\n"), "line 2: not a JSON object"),
    "garbage": (STREAMS, replaced(b"\x93\xfe\n"), "line 2: not a JSON object"),
    "nested": (STREAMS, replaced(b"[" * 100_000 + b"\n"), "line 2: not a JSON object"),
    "not UTF-8": (STREAMS, lambda lines: [lines[0].replace(b'"key"', b'"k\xffy"'), *lines[1:]], "line 1: not a JSON"),
    "infinite": (
        ("samples",),
        with_reward(b"1e999"),
        "line 1: not",
    ),
    "NaN": (("samples",), with_reward(b"NaN"), "line 1: not"),
    "half a character": (("samples",), changed("text", "\ud800"), "line 2: not a JSON object"),
    "torn in the middle": (STREAMS, lambda lines: [lines[0][:-20], *lines[1:]], "line 1: not a JSON object"),
}


@pytest.fixture(scope="module")
def made(tmp_path_factory) -> Path:
    """Where the first test puts a finished evaluation, for the others to copy."""
    return tmp_path_factory.mktemp("made") / "r"


@pytest.fixture
def results(made, fake, entrgi, tmp_path) -> Path:
    """A finished evaluation."""
    if not made.exists():
        assert entrgi("evaluate", "tiny", *GRID, "-o", made) == 0
    return Path(shutil.copytree(made, tmp_path / "r"))


def content(folder: Path) -> dict[str, bytes]:
    return {name: (folder / f"{name}.jsonl").read_bytes() for name in EQUAL}


@pytest.mark.parametrize("damage", REFUSED)
def test_a_damaged_line_is_named(results, fake, entrgi, capsys, damage: str) -> None:
    streams, spoil, message = REFUSED[damage]
    for stream in streams:
        path = results / f"{stream}.jsonl"
        whole = path.read_bytes()
        path.write_bytes(b"".join(spoil(whole.splitlines(keepends=True))))
        spoilt = path.read_bytes()
        for command in (("report", results), ("evaluate", "tiny", *GRID, "-o", results)):
            capsys.readouterr()
            assert entrgi(*command) == 2, (stream, command)
            err = capsys.readouterr().err.strip().splitlines()[-1]
            assert err.startswith(f"entrgi {command[0]}: error: {path}, {message}"), err
        assert path.read_bytes() == spoilt, "left alone"
        path.write_bytes(whole)


@pytest.mark.parametrize("loss", ["removed", "emptied", "torn"])
@pytest.mark.parametrize("stream", STREAMS)
def test_what_is_lost_is_made_again(results, fake, entrgi, capsys, caplog, stream: str, loss: str) -> None:
    expected, path = content(results), results / f"{stream}.jsonl"
    whole = path.read_bytes()
    if loss == "removed":
        path.unlink()
    else:
        path.write_bytes(b"" if loss == "emptied" else whole[:-30])
    entrgi("report", results)
    assert (f"{path}: the batches of" in caplog.text) == (stream == "batches")
    assert entrgi("evaluate", "tiny", *GRID, "-o", results) == 0
    assert content(results) == expected
    assert path.read_bytes().count(b"\n") == whole.count(b"\n")
    err = capsys.readouterr().err
    if stream in ("batches", "traces"):
        assert "finished batches: they are run again, their samples stay" in err


@pytest.mark.parametrize(
    ("header", "message"),
    [
        ('{"format": 1}', "'config' is missing or damaged"),
        ("", "is not JSON"),
        ('{"format": 1, "config"', "is not JSON"),
        ("[" * 100_000, "is not JSON"),
        ("[]", "is no evaluation of this version"),
    ],
)
def test_a_damaged_configuration_is_named(results, entrgi, capsys, header: str, message: str) -> None:
    path = results / "config.json"
    path.write_text(header)
    for command in (("report", results), ("evaluate", "tiny", *GRID, "-o", results)):
        assert entrgi(*command) == 2
        err = capsys.readouterr().err.strip().splitlines()[-1]
        assert str(path) in err and message in err, err


@pytest.mark.parametrize("name", ["samples", "settings", "temperature"])
def test_a_damaged_cell_is_named(results, entrgi, capsys, name: str) -> None:
    path = results / "config.json"
    header = json.loads(path.read_text())
    cell = next(iter(header["cells"].values()))
    {"samples": header, "settings": cell, "temperature": cell["settings"]}[name].pop(name)
    path.write_text(json.dumps(header))
    assert entrgi("report", results) == 2
    err = capsys.readouterr().err
    assert f"'{name}'" in err and str(path) in err and err.count("\n") == 1


@pytest.mark.parametrize("name", ["samples.jsonl", "batches.jsonl", "config.json", ".lock"])
def test_a_folder_where_a_file_is_expected_is_named(results, entrgi, capsys, name: str) -> None:
    path = results / name
    path.unlink()
    path.mkdir()
    assert entrgi("evaluate", "tiny", *GRID, "-o", results) == 2
    err = capsys.readouterr().err.strip().splitlines()[-1]
    assert "s a directory" in err and str(path if name != ".lock" else results) in err


@pytest.mark.parametrize("share", [0.0, 0.3, 0.6, 0.95])
def test_a_full_disk_loses_nothing(made, results, fake, entrgi, tmp_path, limited_files, capsys, share: float) -> None:
    """Files that fit in part are named; when there is room again they end as an undisturbed run's."""
    folder = tmp_path / "full"
    largest = max(results.glob("*.jsonl"), key=lambda path: path.stat().st_size)
    with limited_files(int(share * largest.stat().st_size)):
        assert entrgi("evaluate", "tiny", *GRID, "-o", folder) == 2
    err = capsys.readouterr().err.strip().splitlines()[-1]
    assert f"cannot write {folder}/" in err and err.endswith(": File too large"), err
    assert entrgi("evaluate", "tiny", *GRID, "-o", folder) == 0
    assert content(folder) == content(results) and not list(folder.glob(".*.new"))


def test_parts_without_a_configuration_are_left_alone(results, entrgi, capsys) -> None:
    (results / "parts").mkdir()
    for stream in STREAMS:
        (results / f"{stream}.jsonl").rename(results / "parts" / f"{stream}-00000.jsonl")
    (results / "config.json").unlink()
    assert entrgi("evaluate", "tiny", *GRID, "-o", results) == 2
    assert "no config.json" in capsys.readouterr().err


def test_other_weights_under_the_same_name_are_other_work(fake, entrgi, tmp_path, capsys) -> None:
    """What keys a sample is the content of a model's files, not their path."""
    for role in ("m", "r"):
        (tmp_path / role).mkdir()
        (tmp_path / role / "config.json").write_text("{}")
        (tmp_path / role / "model.safetensors").write_bytes(b"1")
    command = ("evaluate", "tiny", *GRID, "--model", tmp_path / "m", "--rewards", tmp_path / "r", "-o", tmp_path / "e")
    command += ("--datasets", tmp_path / "p.txt", "--set", "judges=null")
    (tmp_path / "p.txt").write_text("a\nb\n")
    assert entrgi(*command) == 0
    assert entrgi(*command) == 0
    (tmp_path / "r" / "model.safetensors").write_bytes(b"2")
    assert entrgi(*command) == 2
    assert "files:" in capsys.readouterr().err
