"""Results on disk: what was asked for, and JSON lines that every process appends to a file of its own.

::

    results/tiny/
        config.json       the evaluation, its cells, its prompts' digests, versions
        samples.jsonl     one line a sample, in the grid's order, once all are there
        batches.jsonl     seconds and statistics of every batch: what differs from run to run is here alone
        judgements.jsonl  what judges say of samples
        traces.jsonl      recorded denoising, for replays
        parts/            the same four while the run lasts, one file a process

A line is on the disk before the next batch is begun. Whoever continues reads the finished files and all parts; what is
there is not made again. At the end the parts are merged, in one step, into files that do not depend on how often the
run was killed or on how many processes made it.
"""

from __future__ import annotations

import collections
import contextlib
import dataclasses
import json
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from entrgi_kernels.names import SEARCHES

from .. import jsonl
from ..errors import UsageError, differences
from ..prompts import check_prompt

FORMAT = 1
_PER_SLOT = ("entropy", "weight")
_STEP = {"step", "tokens", "committed", "reward", "reward_before", "reward_after", *_PER_SLOT}
STREAMS = ("samples", "batches", "judgements", "traces")
# A batch that was killed after these were noted notes them again; the last ones are of the samples that are kept.
_LATEST = ("batches", "traces")
_MEND = "restore it from a copy, or remove the line: what it held is made again"
_NUMBER, _SCORE = (int, float), (int, float, type(None))
# What config.json, a cell in it and a line of each stream hold, as far as it is read again.
_HEADER = {"config": dict, "identity": dict, "cells": dict, "samples": int, "shapes": dict, "versions": dict}
_CELL = {"label": str, "dataset": str, "reward_model": str, "compared": int, "settings": dict}
_LINE: dict[str, dict[str, Any]] = {
    "samples": {
        "key": str, "dataset": str, "seed": int, "index": int, "prompt": (str, list), "sample": int, "reward": _SCORE,
        "text": str, "tokens": list,
    },
    "batches": {
        "key": str, "cell": str, "prompts": int, "traced": bool, "prompt_tokens": int, "seconds": _NUMBER,
        "mean_weight": _SCORE,
    },
    "judgements": {"key": str, "judge": str, "sample": str, "score": _SCORE},
    "traces": {"key": str, "steps": list},
}  # fmt: skip


class Store:
    """A folder of results.

    Args:
        folder: made when something is written.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = Path(folder)
        self.parts = self.folder / "parts"
        self._appenders: dict[str, jsonl.Appender] = {}

    # -- the evaluation ------------------------------------------------------------------------------------------------

    def read_header(self) -> dict[str, Any] | None:
        """The content of config.json; None where there is none yet.

        Raises:
            UsageError: a file that is not of this version's making.
        """
        path = self.folder / "config.json"
        if not path.exists():
            return None
        try:
            header = json.loads(path.read_text(encoding="utf-8"))
        except OSError as error:
            raise UsageError(f"cannot read {path}: {error.strerror or error}") from None
        except (ValueError, RecursionError) as error:
            raise UsageError(f"{path} is not JSON ({error}): restore it, or choose another folder") from None
        if not isinstance(header, dict) or header.get("format") != FORMAT:
            raise UsageError(f'{path} is no evaluation of this version: expected "format": {FORMAT}')
        _check_fields(header, _HEADER, str(path), "restore it from a copy, or choose another folder")
        for key, cell in header["cells"].items():
            where = f"{path}, cell {key}"
            _check_fields(cell if isinstance(cell, dict) else {}, _CELL, where, "restore it from a copy")
            _check_settings(cell["settings"], where)
        return header

    def begin(self, header: Mapping[str, Any], *, extend: bool = False) -> None:
        """Start or continue an evaluation.

        Args:
            header: for config.json; its "identity" must be that of the results in the folder.
            extend: accept another identity: finished samples that it shares are kept, and none is removed.

        Raises:
            UsageError: results of another evaluation are here, or files that are no results.
        """
        stored = self.read_header()
        if stored is None and any([*self.folder.glob("*.jsonl"), *self.parts.glob("*.jsonl")]):
            raise UsageError(f"{self.folder} has .jsonl files but no config.json: choose another --output")
        if stored is not None and stored["identity"] != header["identity"] and not extend:
            lines = "\n".join(differences(stored["identity"], header["identity"]))
            raise UsageError(
                f"{self.folder} holds the results of another configuration:\n{lines}\n"
                "Choose another --output, or give --extend: finished samples that both share are kept, the rest is run"
            )
        try:
            self.parts.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UsageError(f"cannot write {self.parts}: {error.strerror or error}") from None
        if stored is not None:
            # What was measured at the start stays, so that a run continued elsewhere is seen to be one.
            header = {**header, "versions": stored["versions"]}
        if stored != header:
            text = json.dumps(header, ensure_ascii=False, indent=1) + "\n"
            jsonl.write_atomically(self.folder / "config.json", [text])

    @contextlib.contextmanager
    def lock(self) -> Iterator[None]:
        """Only one run at a time writes here; the lock goes with the process, however it ends.

        Raises:
            UsageError: when another run does.
        """
        with jsonl.lock_folder(self.folder):
            yield

    # -- lines ---------------------------------------------------------------------------------------------------------

    def recover(self) -> None:
        """Cut torn last lines off the parts. For one process, before any writes.

        Raises:
            UsageError: a file that is damaged elsewhere.
        """
        for path in self.parts.glob("*.jsonl"):
            jsonl.repair(path)

    def read(self, stream: str) -> list[dict[str, Any]]:
        """All records of a stream, each key once: the finished file's, then the parts' in order of their writers.

        Raises:
            UsageError: a line that is no record of this stream, or a second one of a key.
        """
        found: dict[str, dict[str, Any]] = {}
        for path in self._files(stream):
            places: dict[str, str] = {}
            again = stream in _LATEST and path.parent == self.parts
            for where, value in jsonl.read(path, lambda line, where: (where, _record(stream, line, where))):
                key = value["key"]
                if places.setdefault(key, where) != where and not again:
                    raise UsageError(f"{where}: its key is that of {places[key]} too: remove one of the two lines")
                if stream in _LATEST or key not in found:
                    found[key] = value
                elif found[key] != value:
                    # A kill while files are merged leaves a record in both, but then it is the same.
                    raise UsageError(f"{where}: another file of {stream} has this key and is not the same: remove one")
        return list(found.values())

    def keys(self, stream: str) -> set[str]:
        """Keys of the records of a stream."""
        return {record["key"] for record in self.read(stream)}

    def warn_of_lost_times(self) -> None:
        """Say so where batches.jsonl lacks batches whose samples are there: seconds and FLOPs are then of the rest."""
        there = collections.Counter(cell for cell, _ in {tuple(key.split("-")[:2]) for key in self.keys("samples")})
        for record in self.read("batches"):
            there[record["cell"]] -= record["prompts"]
        lost = sum((+there).values())
        if lost:
            path = self.folder / "batches.jsonl"
            jsonl.logger.warning("%s: the batches of %d finished prompts are missing; evaluate again", path, lost)

    def append(self, stream: str, records: Sequence[Mapping[str, Any]], writer: int = 0) -> None:
        """Append records to this writer's part of a stream; they are on the disk when this returns."""
        if not records:
            return
        if stream not in self._appenders:
            self._appenders[stream] = jsonl.Appender(self.parts / f"{stream}-{writer:05d}.jsonl")
        self._appenders[stream].append(records)

    def close(self) -> None:
        """Close this process's files."""
        for appender in self._appenders.values():
            appender.close()
        self._appenders.clear()

    def finish(self, order: Mapping[str, Iterable[str]]) -> None:
        """Merge the parts into the finished files.

        Args:
            order: keys of each stream in the order they are to stand in; other records (of an evaluation that this one
                extends) come last, by key.
        """
        self.close()
        merged = []
        for stream in STREAMS:
            parts = [path for path in self._files(stream) if path.parent == self.parts]
            if not parts:
                continue
            place = {key: index for index, key in enumerate(order.get(stream, ()))}
            records = sorted(self.read(stream), key=lambda r: (place.get(r["key"], len(place)), r["key"]))
            jsonl.write_atomically(self.folder / f"{stream}.jsonl", map(jsonl.dumps, records))
            merged += parts
        # Only now: a kill before this leaves parts whose records are in the finished files too, once each when read.
        for path in merged:
            path.unlink()
        with contextlib.suppress(OSError):
            os.rmdir(self.parts)

    def _files(self, stream: str) -> list[Path]:
        finished = self.folder / f"{stream}.jsonl"
        return [*([finished] if finished.exists() else []), *sorted(self.parts.glob(f"{stream}-*.jsonl"))]


def _check_fields(record: Mapping[str, Any], fields: Mapping[str, Any], where: str, advice: str = _MEND) -> None:
    for name, kind in fields.items():
        value = record.get(name)
        if name not in record or not isinstance(value, kind) or (isinstance(value, bool) and kind is not bool):
            raise UsageError(f"{where}: {name!r} is missing or damaged; {advice}")


def _record(stream: str, line: bytes, where: str) -> dict[str, Any]:
    """A line of a stream; UsageError for any other."""
    record = jsonl.parse(line, where)
    _check_fields(record, _LINE[stream], where)
    if stream == "samples":
        check_prompt(record["prompt"], where)
        cell, *rest = record["key"].split("-")
        if not cell or rest != [*rest[:1], f"{record['sample']:04d}"] or not _is_list(record["tokens"], int):
            raise UsageError(f"{where}: 'key', 'sample' or 'tokens' is damaged; {_MEND}")
    if stream == "batches":
        lengths = record.get("prompt_lengths", [])  # older records have none, nor "work"
        if not _is_list(lengths, int) or "prompt_lengths" in record and len(lengths) != record["prompts"]:
            raise UsageError(f"{where}: 'prompt_lengths' is damaged; {_MEND}")
        if not _is_work(record.get("work", [])):
            raise UsageError(f"{where}: 'work' is damaged; {_MEND}")
    if stream == "traces" and not all(_is_step(step) for step in record["steps"]):
        raise UsageError(f"{where}: 'steps' is damaged; {_MEND}")
    return record


def _is_list(value: Any, *kinds: type) -> bool:
    return isinstance(value, list) and all(type(item) in kinds for item in value)


def _is_work(value: Any) -> bool:
    """Whether a value is what :attr:`Stats.work` holds."""
    blocks = value if isinstance(value, list) else [None]
    if not all(_is_list(one, int) and len(one) == 3 and 0 <= min(one) <= max(one) < 1 << 63 for one in blocks):
        return False
    # Whoever was run took a step. (It may have had no slots: a search can make all of a block's those that have ended.)
    return all(begun <= steps and (begun > 0 or steps == slots == 0) for begun, steps, slots in blocks)


def _is_step(step: Any) -> bool:
    """Whether a value is what :meth:`StepTrace.to_dict` gives."""
    return (
        isinstance(step, dict)
        and set(step) == _STEP
        and all(type(step[name]) in _SCORE for name in _STEP if name.startswith("reward"))
        and _is_list(step["tokens"], int)
        and all(_is_list(step[name], *_SCORE) and len(step[name]) == len(step["tokens"]) for name in _PER_SLOT)
        and _is_list(step["committed"], int)
        and all(0 <= slot < len(step["tokens"]) for slot in step["committed"])
    )


def _check_settings(settings: dict[str, Any], where: str) -> None:
    from entrgi_kernels.guidance.config import GuidanceConfig

    for kind in SEARCHES.values():  # results of before there were any
        for name in ("search", *kind.settings):
            settings.setdefault(name, getattr(GuidanceConfig, name))
    try:
        GuidanceConfig(**{**settings, "weight": None, "betas": tuple(settings["betas"])})
        [settings[field.name] for field in dataclasses.fields(GuidanceConfig)]
    except (KeyError, TypeError, ValueError) as error:
        raise UsageError(f"{where}: its settings are damaged ({error}); restore it from a copy") from None
