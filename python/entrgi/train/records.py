"""A run's own files: JSON lines that survive a kill and are cut back when a run resumes."""

from __future__ import annotations

import math
from contextlib import closing
from pathlib import Path
from typing import Any

from .. import jsonl

LOG, EVALUATIONS, SAMPLES = "log.jsonl", "evaluations.jsonl", "samples.jsonl"
COMPLETE = "entrgi_complete"


def append(folder: str | Path, name: str, record: dict[str, Any]) -> None:
    """Add one line, in one write: a kill tears the last line at most. What is no finite number becomes null."""
    with closing(jsonl.Appender(Path(folder) / name)) as file:
        file.append([_finite(record)])


def read(folder: str | Path, name: str) -> list[dict[str, Any]]:
    """All whole lines; none where there is no such file.

    Raises:
        UsageError: a line before the last that is no JSON object.
    """
    path = Path(folder) / name
    return jsonl.read(path) if path.exists() else []


def rewind(folder: str | Path, step: int) -> None:
    """Forget what was recorded after `step`: the resumed run records it again."""
    for name in (LOG, EVALUATIONS, SAMPLES):
        path = Path(folder) / name
        if path.exists():
            kept = (record for record in read(folder, name) if record["step"] <= step)
            jsonl.write_atomically(path, map(jsonl.dumps, kept))


def last_complete_checkpoint(folder: str | Path) -> Path | None:
    """The newest checkpoint that was written to its end; None where there is none."""
    found = [path.parent for path in Path(folder).glob(f"checkpoint-*/{COMPLETE}")]
    return max(found, key=lambda path: int(path.name.rpartition("-")[2]), default=None)


def _finite(value: Any) -> Any:
    """The value with null for NaN and infinities, which a diverging run has and JSON has not."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, dict):
        return {name: _finite(item) for name, item in value.items()}
    return [_finite(item) for item in value] if isinstance(value, (list, tuple)) else value
