"""The verifiers that are shipped: what passes them and what does not."""

from __future__ import annotations

import importlib.util
import json
import sys

import pytest

from entrgi_kernels.rewards import verifiers
from entrgi_kernels.rewards.verifiers import Arithmetic, Countdown, Json, Length, Regex, Sudoku

SOLVED = """\
534678912
672195348
198342567
859761423
426853791
713924856
961537284
287419635
345286179
"""
GIVENS = """\
5 3 . | . 7 . | . . .
6 . . | 1 9 5 | . . .
. 9 8 | . . . | . 6 .
------+-------+------
8 . . | . 6 . | . . 3
4 . . | 8 . 3 | . . 1
7 . . | . 2 . | . . 6
------+-------+------
. 6 . | . . . | 2 8 .
. . . | 4 1 9 | . . 5
. . . | . 8 . | . 7 9
"""


def test_regex_and_length(tokenizer):
    assert Regex(r"^\w+ \d{2}$")("p", "room 12") and not Regex(r"^\w+ \d{2}$")("p", "room 123")
    assert Length(2, 3)("p", " one  two\nthree ") and not Length(2, 3)("p", "one") and not Length(0, 1)("p", "a b")
    assert Length(3, 3, "characters")("p", "a b") and Length(4)("p", "a b c d e")
    count = len(tokenizer.encode("tasty food", add_special_tokens=False))
    assert Length(count, count, "tokens", tokenizer)("p", "tasty food")
    assert not Length(0, count - 1, "tokens", tokenizer)("p", "tasty food")
    for wrong in (lambda: Regex("("), lambda: Length(3, 2), lambda: Length(-1), lambda: Length(0, 1, "lines")):
        with pytest.raises(ValueError, match="expected"):
            wrong()
    with pytest.raises(ValueError, match="go together"):
        Length(0, 1, "tokens")


def test_json():
    for text, passes in (('{"a": [1, null]}', True), (" 3\n", True), ("{'a': 1}", False), ("NaN", False), ("", False),
                         ('{"a": 1} and more', False)):  # fmt: skip
        assert Json()("p", text) is passes, text


def test_json_schema():
    pytest.importorskip("jsonschema")
    schema = {"type": "object", "required": ["name"], "properties": {"name": {"type": "string"}}}
    check = Json(schema)
    assert check("p", '{"name": "Ann", "age": 3}') and not check("p", '{"name": 3}') and not check("p", '{"n')
    with pytest.raises(ValueError, match="expected a JSON Schema"):
        Json({"type": "thing"})
    with pytest.raises(Exception, match="(?i)unresolvable"):  # and not: fetched
        Json({"$ref": "http://localhost:1/schema.json"})("p", "3")


def test_a_schema_says_what_is_missing(monkeypatch):
    monkeypatch.setitem(sys.modules, "jsonschema", None)
    with pytest.raises(ImportError, match=r"needs the package jsonschema.*entrgi-kernels\[verify\]"):
        Json({})


@pytest.mark.parametrize(
    ("text", "passes"),
    [
        ("She has 3 + 4 = 7.\n#### 1,234", True),
        ("#### 1234.00 dollars, not 5", True),
        ("So the answer is $1,234.", True),
        ("1234 at first, then 12", False),
        ("1234 #### ", False),
        ("#### -1234", False),
        ("2468 - 1234", True),
        ("2468-1234", True),
        ("", False),
        ("none", False),
    ],
)
def test_arithmetic(text, passes):
    for given in (1234, "1234", "He pays 2 * 617 = 1234.\n#### 1,234", {"p": 1234.0}, lambda prompt: "1234"):
        assert Arithmetic(given)("p", text) is passes


def test_arithmetic_of_other_numbers():
    assert Arithmetic(-0.5)("p", "it falls by -.5") and Arithmetic("0.1")("p", "0.10")
    assert not Arithmetic(567)("p", "1,234,567")
    with pytest.raises(LookupError, match="nothing is given to check prompt 'q'"):
        Arithmetic({"p": 1})("q", "1")
    with pytest.raises(ValueError, match="expected a number"):
        Arithmetic("none")("q", "1")


@pytest.mark.parametrize(
    ("text", "passes"),
    [
        ("Let me see: 1 + 2.\n<answer>(55 + 36) - 7 + 14</answer> done", True),
        ("tries: 55 + 36\n 55 + 36 - 7 + 14 = 98", True),
        ("The answer is 98 = 14 + 36 + 55 - 7.", True),
        ("55 + 36 + 7", False),  # not all
        ("55 + 36 + 14 - 7 + 7 - 7", False),  # one of them thrice
        ("55 + 36 + 14 + 7", False),
        ("98", False),
        ("55 + 36 - 7 + 14 +", False),
        ("(55 + 36) / (7 - 7) + 14", False),
        ("(" * 400 + "55 + 36 - 7 + 14", False),
        ("55 ** 36 ** 7 ** 14", False),
        ("", False),
    ],
)
def test_countdown(text, passes):
    prompts = (
        "Using the numbers [55, 36, 7, 14], create an equation that equals 98. You can use + - * / once.",
        "Target: 98. Numbers: [55, 36, 7, 14].",
    )
    for prompt in prompts:
        assert Countdown()(prompt, text) is passes
    assert Countdown({"p": ([55, 36, 7, 14], 98)})("p", text) is passes


def test_countdown_divides_exactly():
    assert Countdown({"p": ([8, 3, 8, 3], 24)})("p", "8 ÷ (3 − 8 / 3)")
    with pytest.raises(ValueError, match="expected numbers as"):
        Countdown()("Add things up", "1 + 2")


def test_sudoku():
    prompt = f"Solve this:\n{GIVENS}\nGive the grid alone."
    assert Sudoku()(prompt, f"Here it is:\n{SOLVED}")
    assert Sudoku()(prompt, "<answer>" + SOLVED.replace("\n", "") + "</answer>")
    assert Sudoku({"p": GIVENS})("p", SOLVED)
    rows = SOLVED.split()
    changed = SOLVED.translate(str.maketrans("12", "21"))  # a right grid, of other givens
    swapped = "\n".join([rows[0], *rows[2:], rows[1]])
    for text in (changed, swapped, SOLVED[:80], GIVENS, "", SOLVED.replace("\n", "")[:80]):
        assert not Sudoku()(prompt, text), text
    with pytest.raises(ValueError, match="expected a grid"):
        Sudoku()("Solve this", SOLVED)


def test_sudoku_of_four():
    assert Sudoku()("Puzzle: 1000040000300002", "1234 3412 ...\n1 2 3 4\n3 4 1 2\n2 1 4 3\n4 3 2 1") is False
    assert Sudoku()("Puzzle: 1000000000000001", "1234\n3412\n2143\n4321")
    assert not Sudoku()("Puzzle: 1000000000000001", "1234\n2341\n3412\n4321")  # boxes
    assert not Sudoku()(GIVENS, "1234\n3412\n2143\n4321")


def test_by_name(tmp_path):
    tasks = tmp_path / "tasks.jsonl"
    tasks.write_text(json.dumps({"prompt": "p", "answer": "#### 4", "tests": "assert x == 1"}) + "\n\n")
    mine = tmp_path / "mine.py"
    mine.write_text("def short(prompt, text):\n    return len(text) < 3\n")
    assert verifiers.named("regex=a=b:c").pattern == "a=b:c"
    assert verifiers.named("length=2-5") == Length(2, 5)
    assert verifiers.named("length=2-:characters") == Length(2, None, "characters")
    assert verifiers.named(f"gsm8k={tasks}")("p", "4") and verifiers.named("gsm8k=4")("p", "4")
    assert verifiers.named(f"python={tasks}").tests == {"p": "assert x == 1"}
    assert verifiers.named("json")("p", "3") and verifiers.named("countdown") == Countdown()
    assert verifiers.named("sudoku") == Sudoku() and verifiers.named(f"{mine}:short")("p", "ab")
    for wrong in ("regex", "length=5-2", "length=2-5:tokens", "length=a-b", "nothing", "countdown=3", f"{mine}:long"):
        with pytest.raises(ValueError, match="expected"):
            verifiers.named(wrong)
    tasks.write_text('{"prompt": "p"}\n')
    with pytest.raises(ValueError, match=r'tasks.jsonl, line 1: expected .*"answer"'):
        verifiers.named(f"gsm8k={tasks}")
    if importlib.util.find_spec("jsonschema"):
        (tmp_path / "schema.json").write_text('{"type": "array"}')
        assert verifiers.named(f"json={tmp_path / 'schema.json'}")("p", "[]")
