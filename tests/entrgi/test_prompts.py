"""Reading prompts: every way in, and every way in which a file can be wrong."""

from __future__ import annotations

import io
from pathlib import Path

import pytest

from entrgi.errors import UsageError
from entrgi.prompts import prompt_text, read_prompts


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_arguments_come_before_files(tmp_path: Path) -> None:
    file = tmp_path / "p.txt"
    file.write_text("one\n\n  two\r\nthree\u2028still three\n", encoding="utf-8")
    assert read_prompts(["zero"], [str(file)]) == ["zero", "one", "  two", "three\u2028still three"]


def test_standard_input_as_text_and_as_json() -> None:
    assert read_prompts(stdin=io.StringIO("a\nb")) == ["a", "b"]
    assert read_prompts(files=["-"], stdin=io.StringIO('\ufeff{"prompt": "a"}\n')) == ["a"]


def test_json_lines(tmp_path: Path) -> None:
    turns = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hi"}]
    file = tmp_path / "p.jsonl"
    file.write_text(
        '{"prompt": "a"}\n\n"b"\n{"messages": [{"role": "system", "content": "Be brief."}, '
        '{"role": "user", "content": "Hi", "name": "x"}]}\n'
    )
    assert read_prompts(files=[str(file)]) == ["a", "b", turns]
    file.write_text('{"question": "c", "prompt": "wrong one"}\n')
    assert read_prompts(files=[str(file)], field="question") == ["c"]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("p.txt", b"", "no prompts in"),
        ("p.txt", b"\n \n", "no prompts in"),
        ("p.txt", b"\xff\xfe", "not UTF-8"),
        ("p.jsonl", b'{"prompt": "a"}\n{"prompt": ', "line 2: not JSON"),
        ("p.jsonl", b'{"text": "a"}', "no field 'prompt'; the fields there are ['text']"),
        ("p.jsonl", b'{"prompt": " "}', "the prompt is empty"),
        ("p.jsonl", b'{"prompt": 3}', "a string or a list of turns, got int"),
        ("p.jsonl", b'{"prompt": []}', "a string or a list of turns, got list"),
        ("p.jsonl", b'{"prompt": [{"role": "user"}]}', "a turn must be"),
        ("p.jsonl", b'{"prompt": "\\ud800"}', "not valid Unicode"),
        (
            "p.jsonl",
            b'"a"\n[{"role": "assistant", "content": "b"}]',
            "line 2: the prompt's last turn is the assistant's",
        ),
        ("p.jsonl", b'"a"\n[{"role": "wizard", "content": "b"}]', "line 2: turn 0 of the prompt has role 'wizard'"),
    ],
)
def test_refusals_name_the_place(tmp_path: Path, name: str, content: bytes, message: str) -> None:
    file = tmp_path / name
    file.write_bytes(content)
    with pytest.raises(UsageError) as error:
        read_prompts(files=[str(file)])
    assert message in str(error.value) and name in str(error.value) and "\n" not in str(error.value)


def test_nothing_given() -> None:
    with pytest.raises(UsageError, match="no prompts: give them as arguments"):
        read_prompts(stdin=Terminal())
    with pytest.raises(UsageError, match="prompt 2 is empty|prompt 2: the prompt is empty"):
        read_prompts(["a", " "])
    with pytest.raises(UsageError, match="cannot read"):
        read_prompts(files=["/no/such/file"])


def test_for_a_human_reader() -> None:
    assert prompt_text("a") == prompt_text([{"role": "user", "content": "a"}]) == "a"
    turns = [{"role": "system", "content": "s"}, {"role": "user", "content": "u"}]
    assert prompt_text(turns) == "system: s\nuser: u"
