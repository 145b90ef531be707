"""JSON lines that survive a kill: appended whole and synced, a torn last line cut off before the file goes on."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from .errors import UsageError


def dumps(record: Any) -> str:
    """One line, newline included; NaN and infinities are refused."""
    return json.dumps(record, ensure_ascii=False, allow_nan=False) + "\n"


def read(path: Path) -> list[dict[str, Any]]:
    """The objects of a file of JSON lines, one torn at the end left out; the file is not touched.

    Raises:
        UsageError: an unreadable file, or a line before the last that is no JSON object.
    """
    return _parse(path, _object)[0]


def repair(path: Path, check: Callable[[bytes, str], Any] | None = None) -> list[Any]:
    """The lines of a file, after its last one, torn by a kill or a full disk, has been cut off.

    Args:
        path: the file.
        check: turns (line, place) into what is wanted of it and raises UsageError for a line that is none of ours.

    Raises:
        UsageError: an unreadable file, or a bad line before the last: such a file is left alone.
    """
    values, end, size = _parse(path, check or _object)
    if end < size or (size and not _ends_line(path, end)):
        try:
            with path.open("r+b") as file:
                file.truncate(end)
                file.seek(end)
                if end and not _ends_line(path, end):
                    file.write(b"\n")  # whole, but for its newline
                file.flush()
                os.fsync(file.fileno())
        except OSError as error:
            raise UsageError(f"cannot repair {path}: {error.strerror or error}") from None
    return values


def write_atomically(path: Path, lines: Iterable[str]) -> None:
    """Replace a file by these lines in one step: a reader, or a kill, finds the old content or the new.

    Raises:
        UsageError: when it cannot be written.
    """
    temporary = path.with_name(f".{path.name}.new")
    try:
        with temporary.open("w", encoding="utf-8", newline="\n") as file:
            file.writelines(lines)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
        sync_folder(path.parent)
    except OSError as error:
        raise UsageError(f"cannot write {path}: {error.strerror or error}") from None


def sync_folder(folder: Path) -> None:
    """Make names that were added to a folder last over a power failure, where the system can."""
    try:
        handle = os.open(folder, os.O_RDONLY)
    except OSError:  # Windows opens no folders
        return
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


class Appender:
    """A file of JSON lines that this process alone appends to, each group of records in one write, then synced."""

    def __init__(self, path: Path) -> None:
        new = not path.exists()
        try:
            self._file = open(path, "ab", buffering=0)
        except OSError as error:
            raise UsageError(f"cannot write {path}: {error.strerror or error}") from None
        if new:
            sync_folder(path.parent)

    def append(self, records: Iterable[Any]) -> None:
        """Write the records; they are on the disk when this returns."""
        data = memoryview("".join(map(dumps, records)).encode("utf-8"))
        if not data:
            return
        while data:
            data = data[self._file.write(data) :]
        os.fsync(self._file.fileno())

    def close(self) -> None:
        """Close the file."""
        self._file.close()


def _parse(path: Path, check: Callable[[bytes, str], Any]) -> tuple[list[Any], int, int]:
    """(values, end of the last good line, size of the file) in bytes."""
    try:
        data = path.read_bytes()
    except OSError as error:
        raise UsageError(f"cannot read {path}: {error.strerror or error}") from None
    values: list[Any] = []
    start = good = 0
    number = 0
    while start < len(data):
        number += 1
        stop = data.find(b"\n", start) + 1 or len(data)
        line = data[start:stop]
        if line.strip():
            try:
                values.append(check(line, f"{path}, line {number}"))
            except UsageError:
                # A line is written newline last. Zeros are what a power failure may leave of blocks not yet written.
                if data[stop:].strip(b"\n\0") or (line.endswith(b"\n") and b"\0" not in line):
                    raise
                break
        start = good = stop
    return values, good, len(data)


def _ends_line(path: Path, end: int) -> bool:
    with path.open("rb") as file:
        file.seek(end - 1)
        return file.read(1) == b"\n"


def _object(line: bytes, where: str) -> dict[str, Any]:
    try:
        value = json.loads(line)
    except ValueError:
        value = None
    if not isinstance(value, dict):
        raise UsageError(f"{where}: not a JSON object")
    return value
