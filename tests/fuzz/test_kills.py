"""A few cases of the campaign of kills; `python -m tests.fuzz.kills` runs as many as one likes."""

from __future__ import annotations

import os
import random

import pytest

from tests.fuzz import kills

GENERATE = next(command for command in kills.COMMANDS if command.name == "generate")

pytestmark = [pytest.mark.slow, pytest.mark.skipif(os.name != "posix", reason="signals")]


@pytest.fixture(scope="module")
def runner(tmp_path_factory) -> kills.Runner:
    return kills.Runner(tmp_path_factory.mktemp("kills"), ["transformers", "entrgi_kernels", "entrgi.generate"])


def test_a_kill_inside_of_a_write_leaves_nothing_behind(runner, tmp_path) -> None:
    """In the midst of a batch; and what is compared can differ."""
    n = 5
    expected, *_ = runner.unbroken(GENERATE)
    codes, _ = runner.run(GENERATE, tmp_path, moment=kills.Moment("write", n))
    found = tmp_path / GENERATE.output
    assert codes == [-9] and found.read_bytes().count(b"\n") == n - 1
    assert kills.difference(GENERATE, found, expected) == "o.jsonl differs"
    codes, said = runner.run(GENERATE, tmp_path)
    assert codes == [0], said
    assert f"{n - 1} of {len(kills.PROMPTS)} prompts were already done" in said
    assert kills.difference(GENERATE, found, expected) == ""


def test_two_writers(runner, tmp_path) -> None:
    expected, *_ = runner.unbroken(GENERATE)
    steps = list(kills.two_writers(runner, GENERATE, tmp_path, random.Random(3)))
    assert steps == ["two at once"], steps
    assert kills.difference(GENERATE, tmp_path / GENERATE.output, expected) == ""
