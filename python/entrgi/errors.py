"""Errors that commands turn into a single line: the user's (exit code 2), the machine's (1); and early checks."""

from __future__ import annotations

import contextlib
import importlib
import json
import os
import sys
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any


class UsageError(ValueError):
    """What the user asked for cannot be done as asked; the message says what is accepted instead."""


def out_of_memory(error: BaseException) -> bool:
    """Whether there was too little memory, of whatever kind. Loads nothing that is not there."""
    if "torch" not in sys.modules:
        return isinstance(error, MemoryError)
    from entrgi_kernels.shortage import is_out_of_memory

    return is_out_of_memory(error)


def is_the_machines(error: BaseException) -> bool:
    """Whether an error is the machine's (a full disk, too little memory), whose traceback would help nobody."""
    return not isinstance(error, BrokenPipeError) and (isinstance(error, OSError) or out_of_memory(error))


@contextlib.contextmanager
def telling(what_is_kept: Callable[[], str]) -> Iterator[None]:
    """Where the user or the machine ends what runs, say what is kept; the command line says what ended it."""
    try:
        yield
    except BaseException as error:
        if isinstance(error, KeyboardInterrupt) or is_the_machines(error):
            print(f"\n{what_is_kept()}", file=sys.stderr)
        raise


def check_writable(path: Path) -> None:
    """Refuse a file that cannot be written, before minutes are spent on what goes into it.

    Raises:
        UsageError: a folder, a file in no folder, or one without permission.
    """
    if path.is_dir():
        raise UsageError(f"cannot write {path}: it is a folder")
    folder = path.absolute().parent
    if not folder.is_dir():
        raise UsageError(f"cannot write {path}: there is no folder {folder}")
    if not os.access(path if path.exists() else folder, os.W_OK):
        raise UsageError(f"cannot write {path}: permission denied")


def read_text(path: Path) -> str:
    """A UTF-8 file's text, without a byte-order mark.

    Raises:
        UsageError: it cannot be read, or is not UTF-8.
    """
    try:
        return path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise UsageError(f"{path} is not UTF-8 text (byte {error.start})") from None
    except OSError as error:
        raise UsageError(f"cannot read {path}: {error.strerror or error}") from None


def write_text(path: Path, text: str) -> None:
    """Write a UTF-8 file with Unix line ends.

    Raises:
        UsageError: it cannot be written.
    """
    try:
        path.write_text(text, encoding="utf-8", newline="\n")
    except OSError as error:
        raise UsageError(f"cannot write {path}: {error.strerror or error}") from None


def differences(stored: Mapping[str, Any], given: Mapping[str, Any]) -> list[str]:
    """Lines that say where two sets of settings, both of JSON values, differ."""
    return [
        f"  {name}: {json.dumps(stored.get(name))} there, {json.dumps(given.get(name))} now"
        for name in sorted({*stored, *given})
        if stored.get(name) != given.get(name)
    ]


def require(module: str, what: str, extra: str) -> Any:
    """An optional dependency.

    Args:
        module: to import.
        what: needs it, as the message says.
        extra: of this package that brings it.

    Raises:
        UsageError: where it is not installed.
    """
    try:
        return importlib.import_module(module)
    except ImportError as error:
        missing = error.name or module
        raise UsageError(f"{what} needs {missing}: pip install 'entrgi_kernels[{extra}]'") from None
