"""JSON lines: torn ends are cut, damage elsewhere is left alone."""

from __future__ import annotations

import pytest

from entrgi import jsonl
from entrgi.errors import UsageError

WHOLE = b'{"key": "a"}\n{"key": "b"}\n'


@pytest.mark.parametrize(
    ("tail", "kept"),
    [
        (b"", 2),
        (b'{"key": "c', 2),
        (b'{"key": "\xc3', 2),
        (b'{"key": "c"}', 3),  # whole but for its newline
        (b"\0\0\0\0", 2),  # blocks that a power failure left empty
        (b"\0\0\n\0", 2),
        (b"7", 2),
    ],
)
def test_a_torn_end_is_cut_off(tmp_path, tail: bytes, kept: int) -> None:
    path = tmp_path / "x.jsonl"
    path.write_bytes(WHOLE + tail)
    assert len(jsonl.read(path)) == kept and path.read_bytes() == WHOLE + tail
    assert len(jsonl.repair(path)) == kept
    assert path.read_bytes() == WHOLE + (b'{"key": "c"}\n' if kept == 3 else b"")
    before = path.stat().st_mtime_ns
    assert len(jsonl.repair(path)) == kept and path.stat().st_mtime_ns == before


@pytest.mark.parametrize("data", [b'{"key": \n{"key": "b"}\n', b"some text\n", b'{"key": "a"}\n[1]\n'])
def test_damage_elsewhere_is_refused_and_left_alone(tmp_path, data: bytes) -> None:
    path = tmp_path / "x.jsonl"
    path.write_bytes(data)
    with pytest.raises(UsageError, match="line [12]: not a JSON object"):
        jsonl.repair(path)
    assert path.read_bytes() == data


@pytest.mark.parametrize(
    "line",
    [b'{"x": NaN}', b'{"x": -Infinity}', b'{"x": 1e999}', b'{"x": "\\ud800"}', b'{"x": "\xff"}', b'{"x": "\0"}', b"[]",
     b"[" * 100_000, '{"x": 1}'.encode("utf-16"), b"9" * 5000],
)  # fmt: skip
def test_what_could_not_be_written_again_is_no_line(line: bytes) -> None:
    with pytest.raises(UsageError, match="^here: not a JSON object$"):
        jsonl.parse(line, "here")
    assert jsonl.parse(b'{"x": "\\u00e4\\ud83d\\ude00", "y": 1e3}\n', "here") == {"x": "ä😀", "y": 1000.0}


def test_a_lock_is_one_process_s_and_goes_with_the_file(tmp_path) -> None:
    first = jsonl.lock_folder(tmp_path / "new")
    with pytest.raises(UsageError, match=f"another run is writing to {tmp_path}"):
        jsonl.lock_folder(tmp_path / "new")
    first.close()
    jsonl.lock_folder(tmp_path / "new").close()
    (tmp_path / "file").touch()
    with pytest.raises(UsageError, match="expected a folder"):
        jsonl.lock_folder(tmp_path / "file")


def test_a_full_disk_names_the_file_and_leaves_the_old_one(tmp_path, limited_files) -> None:
    path = tmp_path / "x.jsonl"
    jsonl.write_atomically(path, ['{"key": "a"}\n'])
    with limited_files(50):
        with pytest.raises(UsageError, match=f"cannot write {path}: File too large"):
            jsonl.write_atomically(path, ["x" * 100])
        appender = jsonl.Appender(path)
        with pytest.raises(UsageError, match=f"cannot write {path}: File too large"):
            appender.append([{"key": "b" * 100}])
    appender.close()
    assert [entry.name for entry in tmp_path.iterdir()] == ["x.jsonl"]
    assert jsonl.repair(path) == [{"key": "a"}] and path.read_bytes() == b'{"key": "a"}\n'


def test_appending_and_replacing(tmp_path) -> None:
    path = tmp_path / "x.jsonl"
    for records in ([{"key": "ä\u2028"}], [], [{"key": "b"}, {"key": "c"}]):
        appender = jsonl.Appender(path)
        appender.append(records)
        appender.close()
    assert [record["key"] for record in jsonl.read(path)] == ["ä\u2028", "b", "c"]
    jsonl.write_atomically(path, ["{}\n"])
    assert path.read_text() == "{}\n" and [entry.name for entry in tmp_path.iterdir()] == ["x.jsonl"]
    with pytest.raises(ValueError):
        jsonl.dumps({"x": float("nan")})
    with pytest.raises(UsageError, match="cannot write"):
        jsonl.Appender(tmp_path / "no" / "x.jsonl")
