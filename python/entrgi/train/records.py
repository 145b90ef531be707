"""A run's own files: JSON lines that survive a kill and are cut back when a run resumes."""

from __future__ import annotations

import contextlib
import json
import math
import shutil
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

from .. import jsonl
from ..digests import sha256
from ..errors import UsageError, read_text

LOG, EVALUATIONS, SAMPLES = "log.jsonl", "evaluations.jsonl", "samples.jsonl"
COMPLETE = "entrgi_complete"


def append(folder: str | Path, name: str, record: dict[str, Any]) -> None:
    """Add one line, in one write: a kill tears the last line at most. What is no finite number becomes null."""
    with closing(jsonl.Appender(Path(folder) / name)) as file:
        file.append([_finite(record)])


def read(folder: str | Path, name: str) -> list[dict[str, Any]]:
    """All whole lines; none where there is no such file. A null among a held-out prompt's figures is NaN.

    Raises:
        UsageError: a line before the last that is none of a training run.
    """
    path = Path(folder) / name

    def check(line: bytes, where: str) -> dict[str, Any]:
        record = jsonl.parse(line, where)
        figures = [value for key, value in record.items() if key != "step"] if name == EVALUATIONS else []
        if type(record.get("step")) is not int or not all(map(_is_numbers, figures)):
            raise UsageError(f"{where}: not a line of a training run")
        return record

    return jsonl.read(path, check) if path.exists() else []


def rewind(folder: str | Path, step: int) -> None:
    """Forget what was recorded after the checkpoint of `step`: the resumed run records it again."""
    for name in (LOG, EVALUATIONS, SAMPLES):
        path = Path(folder) / name
        if path.exists():
            kept = (record for record in read(folder, name) if _is_before(name, record, step))
            jsonl.write_atomically(path, map(jsonl.dumps, kept))


def _is_before(name: str, record: dict[str, Any], step: int) -> bool:
    # Samples bear the step that follows their drawing's checkpoint. A run's summary is written after its last one.
    return record["step"] < step if name == SAMPLES else record["step"] <= step and "train_runtime" not in record


def last_complete_checkpoint(folder: str | Path) -> Path | None:
    """The newest checkpoint that was written to its end; None where there is none."""
    found = [path.parent for path in Path(folder).glob(f"checkpoint-*/{COMPLETE}")]
    return max(found, key=lambda path: int(path.name.rpartition("-")[2]), default=None)


def sweep(folder: str | Path) -> None:
    """Remove checkpoints that a kill left torn, while they were written or removed: nothing goes on from them."""
    for checkpoint in Path(folder).glob("checkpoint-*"):
        mark = checkpoint / COMPLETE
        names: list[str] = []
        if mark.is_file():
            with contextlib.suppress(ValueError, KeyError, TypeError, RecursionError):
                names = list(json.loads(mark.read_text(encoding="utf-8"))["files"])
        if checkpoint.is_dir() and not all((checkpoint / name).is_file() for name in [COMPLETE, *names]):
            shutil.rmtree(checkpoint)


def complete(checkpoint: Path) -> None:
    """Mark a checkpoint as written to its end, with a digest of each of its files."""
    files = _files(checkpoint)
    found = dict(zip((str(path.relative_to(checkpoint)) for path in files), sha256(files), strict=True))
    jsonl.write_atomically(checkpoint / COMPLETE, [json.dumps({"files": found}, indent=1) + "\n"])


def check_checkpoint(checkpoint: Path) -> None:
    """Refuse a checkpoint whose files are no longer what :func:`complete` saw.

    Raises:
        UsageError: names the file.
    """
    mark, advice = (
        checkpoint / COMPLETE,
        f"remove {checkpoint}: --resume then goes on from an earlier one, or starts anew",
    )
    text = read_text(mark)
    if text.startswith("step "):  # of an earlier version, which noted no digests
        return
    try:
        said = dict(json.loads(text)["files"])
        places = [checkpoint / name for name in said]
    except (ValueError, KeyError, TypeError, RecursionError):
        raise UsageError(f"{mark} is damaged: {advice}") from None
    for path in places:
        if not path.is_file():
            raise UsageError(f"{path} is missing: {advice}")
    for path, found in zip(places, sha256(places), strict=True):
        if found != said[str(path.relative_to(checkpoint))]:
            raise UsageError(f"{path} is damaged, it is not what was saved: {advice}")


@contextlib.contextmanager
def saving(folder: str | Path) -> Iterator[None]:
    """Turn what goes wrong on the disk while a model is saved into one line that names the folder.

    Raises:
        UsageError: in place of such an error; others go through.
    """
    try:
        yield
    except UsageError:
        raise
    except (OSError, RuntimeError, SafetensorError) as error:
        said = " ".join(str(error).split())
        # torch's own writer has no error class: it says where in its file it failed.
        if isinstance(error, RuntimeError) and "inline_container" not in said and "PytorchStreamWriter" not in said:
            raise
        reason = (isinstance(error, OSError) and error.strerror) or said
        raise UsageError(f"cannot write {folder}: {reason}; with room on the disk, go on with --resume") from error


def _files(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*") if path.is_file() and path.name != COMPLETE)


def _is_numbers(value: Any) -> bool:
    return isinstance(value, list) and all(x is None or type(x) in (int, float) for x in value)


def _finite(value: Any) -> Any:
    """The value with null for NaN and infinities, which a diverging run has and JSON has not."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, dict):
        return {name: _finite(item) for name, item in value.items()}
    return [_finite(item) for item in value] if isinstance(value, (list, tuple)) else value
