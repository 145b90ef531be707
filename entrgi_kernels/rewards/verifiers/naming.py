"""Verifiers by name, as command lines and configurations have them."""

from __future__ import annotations

import importlib.util
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

from .answers import Arithmetic, Countdown, Sudoku
from .python import PythonTests
from .texts import UNITS, Json, Length, Regex

FORMS = (
    "regex=PATTERN",
    "json",
    "json=SCHEMA.json",
    "length=LOW-HIGH (words; with :characters behind it)",
    "python=TESTS.py or .jsonl",
    "gsm8k=ANSWER or .jsonl",
    "countdown",
    "sudoku",
    "FILE.py:FUNCTION",
)


def named(text: str) -> Callable[[str, str], Any]:
    """A verifier by its name and argument.

    Args:
        text: one of :data:`FORMS`. A file of JSON lines holds {"prompt": ..., "answer": ...}, or "tests" for python.

    Raises:
        ValueError: no such verifier, or an argument that is none.
        OSError: a file that cannot be read.
        ImportError: jsonschema is missing.
    """
    name, given, argument = text.partition("=")
    if name in ("countdown", "sudoku") and not given:
        return Countdown() if name == "countdown" else Sudoku()
    if name == "json":
        return Json(json.loads(_read(argument)) if given else None)
    if name == "regex" and given:
        return Regex(argument)
    length = re.fullmatch(r"(\d*)-(\d*)(?::(\w+))?", argument)
    if name == "length" and length and (length[3] or UNITS[0]) in UNITS[:2]:
        return Length(int(length[1] or 0), int(length[2]) if length[2] else None, length[3] or UNITS[0])
    if name == "python" and argument:
        return PythonTests(_by_prompt(argument, "tests") if argument.endswith(".jsonl") else _read(argument))
    if name == "gsm8k" and argument:
        return Arithmetic(_by_prompt(argument, "answer") if argument.endswith(".jsonl") else argument)
    path, _, function = text.rpartition(":")
    if path.endswith(".py") and function.isidentifier():
        return _from_file(path, function)
    raise ValueError(f"verifier {text!r}: expected one of {', '.join(FORMS)}")


def file_of(text: str) -> str | None:
    """The file that a verifier's name speaks of, if any."""
    name, _, argument = text.partition("=")
    path = argument if name in ("json", "python", "gsm8k") else text.rpartition(":")[0]
    return path if path.endswith((".py", ".json", ".jsonl")) else None


def _read(path: str) -> str:
    return Path(path).read_text(encoding="utf-8")


def _by_prompt(path: str, field: str) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for number, line in enumerate(_read(path).splitlines(), start=1):
        if not line.strip():
            continue
        entry = json.loads(line)
        if not isinstance(entry, dict) or not isinstance(entry.get("prompt"), str) or field not in entry:
            raise ValueError(f'{path}, line {number}: expected {{"prompt": "...", "{field}": ...}}')
        found[entry["prompt"]] = entry[field]
    return found


def _from_file(path: str, name: str) -> Callable[[str, str], Any]:
    spec = importlib.util.spec_from_file_location(Path(path).stem, path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    if not callable(getattr(module, name, None)):
        raise ValueError(f"{path} has no function {name}: expected one of (prompt, text)")
    return getattr(module, name)
