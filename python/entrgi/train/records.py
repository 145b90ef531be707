"""A run's own files: JSON lines that survive a kill and are cut back when a run resumes."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

LOG, EVALUATIONS, SAMPLES = "log.jsonl", "evaluations.jsonl", "samples.jsonl"
COMPLETE = "entrgi_complete"


def append(folder: str | Path, name: str, record: dict[str, Any]) -> None:
    """Add one line, in one write: a kill tears the last line at most."""
    with open(Path(folder) / name, "ab", buffering=0) as file:
        file.write((json.dumps(record, ensure_ascii=False) + "\n").encode())


def read(folder: str | Path, name: str) -> list[dict[str, Any]]:
    """All whole lines; none where there is no such file."""
    path = Path(folder) / name
    if not path.exists():
        return []
    lines = path.read_bytes().split(b"\n")[:-1]  # what follows the last newline is torn, or nothing
    return [json.loads(line) for line in lines if line.strip()]


def rewind(folder: str | Path, step: int) -> None:
    """Forget what was recorded after `step`: the resumed run records it again."""
    for name in (LOG, EVALUATIONS, SAMPLES):
        kept = [record for record in read(folder, name) if record["step"] <= step]
        if (Path(folder) / name).exists():
            whole = "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in kept)
            temporary = Path(folder) / f".{name}"
            temporary.write_text(whole, encoding="utf-8")
            os.replace(temporary, Path(folder) / name)


def last_complete_checkpoint(folder: str | Path) -> Path | None:
    """The newest checkpoint that was written to its end; None where there is none."""
    found = [path.parent for path in Path(folder).glob(f"checkpoint-*/{COMPLETE}")]
    return max(found, key=lambda path: int(path.name.rpartition("-")[2]), default=None)
