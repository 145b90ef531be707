"""Verifiers of answers: arithmetic in GSM8K's form, Countdown, Sudoku."""

from __future__ import annotations

import ast
import math
import operator
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import Any

# Thousands in groups of three; a minus belongs to a number unless something stands right before it.
_NUMBER = re.compile(r"(?:(?<![\w.)])-)?\$?((?:\d{1,3}(?:,\d{3})+(?!\d)|\d+)(?:\.\d+)?|\.\d+)")
_OPERATORS: dict[type, Callable[[Any, Any], Any]] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.Div: operator.truediv,
}
_LONGEST = 500  # characters of an expression that is still looked at
_EMPTY = "0._*?"


def task_of(given: Any, prompt: str) -> Any:
    """What a prompt is to be checked against: of a mapping or function by the prompt, else what is given itself.

    Raises:
        LookupError: the mapping does not have the prompt.
    """
    if isinstance(given, Mapping):
        if prompt not in given:
            raise LookupError(f"nothing is given to check prompt {prompt!r:.80} against")
        return given[prompt]
    return given(prompt) if callable(given) else given


@dataclass(frozen=True)
class Arithmetic:
    """Whether a text's answer is the right number: the first after its last ``####``, else the last number in it.

    Args:
        answers: the right one: a number, or a text in the same form (as GSM8K's solutions are); or by prompt, as a
            mapping or a function.
    """

    answers: Any

    def __call__(self, prompt: str, text: str) -> bool:
        wanted = task_of(self.answers, prompt)
        right = _answer(wanted) if isinstance(wanted, str) else Fraction(str(wanted))
        if right is None:
            raise ValueError(f"answer {wanted!r:.80}: expected a number in it")
        return _answer(text) == right


def _answer(text: str) -> Fraction | None:
    text = text.replace("\N{MINUS SIGN}", "-")
    before, mark, after = text.rpartition("####")
    found = list(_NUMBER.finditer(after))
    if not found:
        return None
    number = found[0 if mark else -1]
    value = Fraction(number[1].replace(",", ""))
    return -value if number[0].startswith("-") else value


@dataclass(frozen=True)
class Countdown:
    """Whether an expression uses the given numbers, each exactly once, with + - * / and brackets, and gives the target.

    The expression is the longest one in the last ``<answer>`` of the text, or else in its last line.

    Args:
        tasks: (numbers, target) by prompt, as a mapping or a function. None reads the prompt: its first list in square
            brackets, and the number after "target", or else the first one after the list.
    """

    tasks: Mapping[str, Any] | Callable[[str], Any] | None = None

    def __call__(self, prompt: str, text: str) -> bool:
        numbers, target = _countdown(prompt) if self.tasks is None else task_of(self.tasks, prompt)
        for sign, plain in (("×", "*"), ("÷", "/"), ("\N{MINUS SIGN}", "-"), (r"\times", "*"), (r"\div", "/")):
            text = text.replace(sign, plain)
        runs = [run.strip() for run in re.findall(r"[-+*/()\d\s]+", _final(text))]
        expression = max(runs, key=len, default="")
        if len(expression) > _LONGEST:
            return False
        used: list[int] = []
        try:
            value = _value(ast.parse(expression, mode="eval").body, used)
        except (SyntaxError, ValueError, ZeroDivisionError, MemoryError, RecursionError):
            return False
        return value == Fraction(str(target)) and sorted(used) == sorted(map(int, numbers))


def _countdown(prompt: str) -> tuple[list[int], int]:
    listed = re.search(r"\[([\d,\s]+)\]", prompt)
    numbers = [int(number) for number in re.findall(r"\d+", listed[1])] if listed else []
    target = re.search(r"target\D{0,20}(\d+)", prompt, re.IGNORECASE)
    target = target or (re.search(r"(\d+)", prompt[listed.end() :]) if listed else None)
    if not numbers or target is None:
        raise ValueError(f"prompt {prompt!r:.80}: expected numbers as [1, 2, 3] and a target; or pass tasks=")
    return numbers, int(target[1])


def _value(node: ast.AST, used: list[int]) -> Fraction:
    if isinstance(node, ast.Constant) and type(node.value) is int:
        used.append(node.value)
        return Fraction(node.value)
    if isinstance(node, ast.BinOp) and type(node.op) in _OPERATORS:
        return _OPERATORS[type(node.op)](_value(node.left, used), _value(node.right, used))
    raise ValueError("no such expression")


def _final(text: str) -> str:
    """The last ``<answer>``, else the last line that is not empty."""
    answers = re.findall(r"<answer>(.*?)</answer>", text, re.DOTALL)
    lines = [line for line in text.splitlines() if line.strip()]
    return answers[-1] if answers else lines[-1] if lines else ""


@dataclass(frozen=True)
class Sudoku:
    """Whether a grid is completed: every row, column and box holds each digit once, and the givens are kept.

    A grid is 9 lines of 9 cells or 4 of 4, parted by spaces, commas or bars or not at all; or one run of 81 or 16
    cells. An empty cell is one of ``0 . _ * ?``. The last grid of prompt and text counts, or of the text's last
    ``<answer>``.

    Args:
        puzzles: the grid with its empty cells by prompt, as a mapping or a function; None reads the prompt.
    """

    puzzles: Mapping[str, str] | Callable[[str], str] | None = None

    def __call__(self, prompt: str, text: str) -> bool:
        given = _grid(prompt if self.puzzles is None else task_of(self.puzzles, prompt))
        if given is None:
            raise ValueError(f"prompt {prompt!r:.80}: expected a grid of 9 by 9 or 4 by 4 cells; or pass puzzles=")
        answers = re.findall(r"<answer>(.*?)</answer>", text, re.DOTALL)
        found = _grid(answers[-1] if answers else text)
        if found is None or len(found) != len(given):
            return False
        kept = all(a in _EMPTY or a == b for a, b in zip(given, found, strict=True))
        return kept and _is_solved(found)


def _grid(text: str) -> str | None:
    """The cells of the last grid in a text, row by row."""
    found: list[tuple[int, str]] = []
    cell = r"[\d._*?]"
    for run in re.finditer(rf"(?<!{cell})(?:{cell}{{81}}|{cell}{{16}})(?!{cell})", text):
        found.append((run.start(), run[0]))
    rows: list[str] = []
    place = 0
    for line in text.splitlines(keepends=True):
        place += len(line)
        if re.fullmatch(r"[-+=|\s]*", line):
            continue  # drawn or left empty between boxes
        row = re.sub(r"[\s|,;\[\]]", "", line)
        if not re.fullmatch(rf"{cell}{{9}}|{cell}{{4}}", row):
            rows = []
            continue
        rows = [*rows, row] if rows and len(rows[-1]) == len(row) and len(rows) < len(row) else [row]
        if len(rows) == len(row):
            found.append((place, "".join(rows)))
    return max(found)[1] if found else None


def _is_solved(cells: Sequence[str]) -> bool:
    size = math.isqrt(len(cells))
    box, digits = math.isqrt(size), {str(digit) for digit in range(1, size + 1)}
    places = range(size)
    rows = [[cells[size * r + c] for c in places] for r in places]
    boxes = [[rows[box * (b // box) + i // box][box * (b % box) + i % box] for i in places] for b in places]
    return all(set(group) == digits for group in (*rows, *zip(*rows, strict=True), *boxes))
