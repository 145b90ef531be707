"""The one exception that commands turn into a single line and exit code 2, and checks that are worth making early."""

from __future__ import annotations

import importlib
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any


class UsageError(ValueError):
    """What the user asked for cannot be done as asked; the message says what is accepted instead."""


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
