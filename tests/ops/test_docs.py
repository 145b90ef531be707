"""docs/ops.md: its code blocks are one program, and it runs."""

from __future__ import annotations

import re
from pathlib import Path

PAGE = Path(__file__).parents[2] / "docs" / "ops.md"


def test_the_page_runs():
    blocks = re.findall(r"```python\n(.*?)```", PAGE.read_text(encoding="utf-8"), flags=re.DOTALL)
    assert len(blocks) == 9
    names: dict[str, object] = {"__name__": "docs.ops"}
    for block in blocks:
        exec(compile(block, str(PAGE), "exec"), names)
    assert names["soft_loss"] < names["first"] and names["prompt"].shape == (8,)
