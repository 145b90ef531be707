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

import contextlib
import json
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from .. import jsonl
from ..errors import UsageError, differences

FORMAT = 1
STREAMS = ("samples", "batches", "judgements", "traces")
# A batch that was killed after its times were noted notes them again; the last time is of the samples that are kept.
_LATEST = ("batches",)


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
        except (OSError, ValueError) as error:
            raise UsageError(f"cannot read {path}: {error}") from None
        if not isinstance(header, dict) or header.get("format") != FORMAT:
            raise UsageError(f'{path} is no evaluation of this version: expected "format": {FORMAT}')
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
        if stored is None and self.folder.is_dir() and any(self.folder.glob("*.jsonl")):
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
        try:
            import fcntl
        except ImportError:  # pragma: no cover - Windows
            yield
            return
        if self.folder.exists() and not self.folder.is_dir():
            raise UsageError(f"cannot write {self.folder}: expected a folder, or a name for a new one")
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            file = open(self.folder / ".lock", "w", encoding="utf-8")
        except OSError as error:
            raise UsageError(f"cannot write {self.folder}: {error.strerror or error}") from None
        with file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise UsageError(f"another run is writing to {self.folder}: wait for it or end it") from None
            except OSError:
                pass  # a file system without locks
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
        """All records of a stream, each key once: the finished file's, then the parts' in order of their writers."""
        found: dict[str, dict[str, Any]] = {}
        for path in self._files(stream):
            for record in jsonl.read(path):
                if stream in _LATEST or record["key"] not in found:
                    found[record["key"]] = record
        return list(found.values())

    def keys(self, stream: str) -> set[str]:
        """Keys of the records of a stream."""
        return {record["key"] for record in self.read(stream)}

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
