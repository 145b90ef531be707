"""Reading prompts: from arguments, text files (one per line), JSON lines, or standard input.

A prompt is a string, or a conversation: a list of ``{"role": ..., "content": ...}`` turns.
"""

from __future__ import annotations

import argparse
import io
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, TextIO

from .errors import UsageError, read_text

Prompt = str | list[dict[str, str]]


def add_arguments(parser: argparse.ArgumentParser, default: str) -> None:
    """Flags that name prompts; ``default`` says in the help what is read without any."""
    parser.add_argument("prompts", nargs="*", metavar="PROMPT", help=f"prompts (default: {default})")
    parser.add_argument(
        "-f",
        "--file",
        action="append",
        default=[],
        metavar="FILE",
        help="prompts, one per line, or JSON lines when the name ends in .jsonl; - is standard input; may be repeated",
    )
    parser.add_argument(
        "--prompt-field",
        default="prompt",
        metavar="NAME",
        help="field of a JSON line: a string or a list of turns (default: prompt)",
    )


def read_prompts(
    arguments: Sequence[str] = (), files: Sequence[str] = (), *, field: str = "prompt", stdin: TextIO | None = None
) -> list[Prompt]:
    """Prompts in the order in which they were given; see :func:`read_placed`."""
    return [prompt for _, prompt in read_placed(arguments, files, field=field, stdin=stdin)]


def read_placed(
    arguments: Sequence[str] = (), files: Sequence[str] = (), *, field: str = "prompt", stdin: TextIO | None = None
) -> list[tuple[str, Prompt]]:
    """(place, prompt) in the order in which they were given: arguments, then files; places are for messages.

    Args:
        arguments: prompts themselves.
        files: paths; ``-`` is standard input. A name that ends in ``.jsonl`` or ``.json`` holds one JSON value per
            line, and so does standard input when its first character is ``{``.
        field: the field of a JSON object that holds the prompt (a string, or a list of turns).
        stdin: read when ``files`` names ``-``, or when neither arguments nor files are given and it is no terminal.

    Raises:
        UsageError: nothing to read, an unreadable file, an empty prompt, or a line that is no prompt; the message names
            the place.
    """
    stdin = sys.stdin if stdin is None else stdin
    prompts: list[tuple[str, Prompt]] = []
    for number, text in enumerate(arguments, start=1):
        where = f"prompt {number}"
        prompts.append((where, _checked_text(text, where)))
    if not arguments and not files:
        if stdin is None or stdin.isatty():
            raise UsageError("no prompts: give them as arguments, with --file PATH, or on standard input")
        files = ["-"]
    for name in files:
        found = _read_stream(stdin, field) if name == "-" else _read_file(Path(name), field)
        if not found:
            place = "standard input" if name == "-" else name
            raise UsageError(f"no prompts in {place}: one per line is expected, or JSON lines with a {field!r} field")
        prompts.extend(found)
    return prompts


def prompt_text(prompt: Prompt) -> str:
    """The prompt for a human reader: a conversation is written turn by turn."""
    if isinstance(prompt, str):
        return prompt
    if len(prompt) == 1 and prompt[0]["role"] == "user":
        return prompt[0]["content"]
    return "\n".join(f"{turn['role']}: {turn['content']}" for turn in prompt)


def _read_file(path: Path, field: str) -> list[tuple[str, Prompt]]:
    return _parse(read_text(path), str(path), field, path.suffix.lower() in (".jsonl", ".json", ".ndjson"))


def _read_stream(stream: TextIO, field: str) -> list[tuple[str, Prompt]]:
    try:
        text = stream.read()
    except UnicodeDecodeError as error:
        raise UsageError(f"standard input is not UTF-8 text (byte {error.start})") from None
    text = text.removeprefix("\ufeff")
    return _parse(text, "standard input", field, text.lstrip().startswith("{"))


def _parse(text: str, place: str, field: str, as_json: bool) -> list[tuple[str, Prompt]]:
    prompts: list[tuple[str, Prompt]] = []
    # Not str.splitlines: that also cuts at U+2028 and form feeds, which may stand inside a prompt or a JSON string.
    for number, line in enumerate(io.StringIO(text, newline=None), start=1):
        if line.strip():
            where = f"{place}, line {number}"
            found = _from_json(line, where, field) if as_json else _checked_text(line.rstrip("\n"), where)
            prompts.append((where, found))
    return prompts


def _from_json(line: str, where: str, field: str) -> Prompt:
    try:
        value = json.loads(line)
    except json.JSONDecodeError as error:
        raise UsageError(f"{where}: not JSON ({error.msg} at column {error.colno})") from None
    if isinstance(value, dict):
        # Conversations are commonly stored under "messages"; the field asked for comes first.
        name = field if field in value or field != "prompt" else "messages"
        if name not in value:
            raise UsageError(f"{where}: no field {field!r}; the fields there are {sorted(value)}")
        value = value[name]
    return check_prompt(value, where)


def _checked_text(text: str, where: str) -> str:
    if not text.strip():
        raise UsageError(f"{where}: the prompt is empty: give some text")
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:  # a lone surrogate: bytes of another encoding on the command line, or "\\ud800" in JSON
        raise UsageError(f"{where}: the prompt is not valid Unicode text") from None
    return text


def check_prompt(value: Any, where: str) -> Prompt:
    """The value as a prompt; UsageError, naming the place, if it is none."""
    if isinstance(value, str):
        return _checked_text(value, where)
    if isinstance(value, list) and value:
        turns = []
        for turn in value:
            if not isinstance(turn, dict) or not all(isinstance(turn.get(key), str) for key in ("role", "content")):
                raise UsageError(f'{where}: a turn must be {{"role": ..., "content": ...}}, got {turn!r:.80}')
            turns.append({"role": turn["role"], "content": turn["content"]})
        _checked_text("".join(turn["content"] for turn in turns), where)
        from entrgi_kernels.text.template import conversation_from  # not above: it brings torch along

        try:
            conversation_from(turns)
        except (ValueError, TypeError) as error:
            raise UsageError(f"{where}: {error}") from None
        return turns
    raise UsageError(f"{where}: a prompt is a string or a list of turns, got {type(value).__name__}")
