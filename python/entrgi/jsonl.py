"""JSON lines that survive a kill: appended whole and synced, a torn last line cut off before the file goes on."""

from __future__ import annotations

import contextlib
import json
import logging
import math
import os
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import IO, Any, NoReturn

from .errors import UsageError

LOCK = ".lock"  # in a folder that only one run at a time may write to

logger = logging.getLogger("entrgi")


def dumps(record: Any) -> str:
    """One line, newline included; NaN and infinities are refused."""
    return json.dumps(record, ensure_ascii=False, allow_nan=False) + "\n"


def parse(line: bytes, where: str) -> dict[str, Any]:
    """The object of a line.

    Args:
        line: in UTF-8.
        where: file and line, for the message.

    Raises:
        UsageError: no JSON object, or one that JSON lines of ours cannot hold (NaN, infinities, half a character).
    """
    try:
        value = json.loads(line.decode("utf-8"), parse_constant=_no_number, parse_float=_number)
        if b"\\u" in line:
            json.dumps(value, ensure_ascii=False).encode("utf-8")  # fails for a lone surrogate
    except (ValueError, RecursionError):
        value = None
    if not isinstance(value, dict):
        raise UsageError(f"{where}: not a JSON object")
    return value


def read(path: Path, check: Callable[[bytes, str], Any] = parse) -> list[Any]:
    """The objects of a file of JSON lines, one torn at the end left out; the file is not touched.

    Args:
        path: the file.
        check: turns (line, place) into what is wanted of it and raises UsageError for a line that is none of ours.

    Raises:
        UsageError: an unreadable file, or a bad line before the last.
    """
    return _parse(path, check)[0]


def repair(path: Path, check: Callable[[bytes, str], Any] = parse) -> list[Any]:
    """The lines of a file, after its last one, torn by a kill or a full disk, has been cut off.

    Args:
        path, check: as for :func:`read`.

    Raises:
        UsageError: an unreadable file, or a bad line before the last: such a file is left alone.
    """
    values, end, size = _parse(path, check)
    if end < size or (size and not _ends_line(path, end)):
        if end < size:
            logger.warning("%s: its last line was not written whole: %d bytes are cut off", path, size - end)
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
        with contextlib.suppress(OSError):  # on a full disk its bytes are wanted
            temporary.unlink()
        raise UsageError(f"cannot write {path}: {error.strerror or error}") from None


def lock(file: IO[Any], path: Path) -> None:
    """Make an open file, or the folder that it stands for, this process's alone until it is closed or the process ends.

    Args:
        file: open.
        path: what the message names.

    Raises:
        UsageError: another process has it.
    """
    try:
        import fcntl
    except ImportError:  # pragma: no cover - Windows
        return
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise UsageError(f"another run is writing to {path}: wait for it or end it") from None
    except OSError:
        pass  # a file system without locks


def lock_folder(folder: Path) -> IO[Any]:
    """A lock on a folder, which is made where there is none; it lasts until what is returned is closed.

    Raises:
        UsageError: another process has it, or it cannot be written.
    """
    if folder.exists() and not folder.is_dir():
        raise UsageError(f"cannot write {folder}: expected a folder, or a name for a new one")
    try:
        folder.mkdir(parents=True, exist_ok=True)
        file = open(folder / LOCK, "w", encoding="utf-8")
    except OSError as error:
        raise UsageError(f"cannot write {folder}: {error.strerror or error}") from None
    try:
        lock(file, folder)
    except UsageError:
        file.close()
        raise
    return file


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
        self._path, new = path, not path.exists()
        try:
            self._file = open(path, "ab", buffering=0)
            if new:
                sync_folder(path.parent)
        except OSError as error:
            raise UsageError(f"cannot write {path}: {error.strerror or error}") from None

    def append(self, records: Iterable[Any]) -> None:
        """Write the records; they are on the disk when this returns.

        Raises:
            UsageError: when they cannot be written; a line of them may then be torn.
        """
        data = memoryview("".join(map(dumps, records)).encode("utf-8"))
        if not data:
            return
        try:
            while data:
                data = data[self._file.write(data) :]
            os.fsync(self._file.fileno())
        except OSError as error:
            raise UsageError(f"cannot write {self._path}: {error.strerror or error}") from None

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


def _no_number(name: str) -> NoReturn:
    raise ValueError(f"{name} is no JSON")


def _number(text: str) -> float:
    value = float(text)
    if not math.isfinite(value):
        raise ValueError(f"{text} is no number of ours")
    return value
