"""Runs cases in worker processes: a crash or a hang costs one case, and each failure is one line that reproduces it."""

from __future__ import annotations

import argparse
import collections
import faulthandler
import json
import mmap
import os
import platform
import re
import signal
import struct
import subprocess
import sys
import tempfile
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tqdm.auto import tqdm

ROOT = Path(__file__).resolve().parents[2]


@dataclass(frozen=True)
class Kind:
    """A kind of cases.

    Attributes:
        module: of this package; its run(draws) raises Failure, its prepare() makes a process ready.
        share: cases a case of `make fuzz N=...`.
        limit: seconds after which a case counts as hanging.
        block: cases that a worker takes at a time.
        environment: of its workers.
    """

    module: str
    share: float
    limit: float = 60.0
    block: int = 200
    environment: dict[str, str] = field(default_factory=dict)


KINDS = {
    "operators": Kind("operators", 1.0),
    "arguments": Kind("arguments", 0.2),
    "files": Kind("files", 0.02, block=50),
    "sampler": Kind("sampler", 0.01, limit=300.0, block=10),
    "triton": Kind("operators", 0.0005, limit=300.0, block=2, environment={"TRITON_INTERPRET": "1"}),
    "dying": Kind("dying", 0, limit=3.0, block=10),  # for the driver's own test
}


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="make fuzz", description=__doc__)
    parser.add_argument("-n", type=int, default=10_000, help="operator cases; the other kinds follow in proportion")
    parser.add_argument("--seed", type=int, default=None, help="default: the time, in seconds")
    usual = [name for name, kind in KINDS.items() if kind.share]
    parser.add_argument("--kinds", default=",".join(usual), help=f"of {', '.join(usual)}; NAME:COUNT sets its number")
    parser.add_argument("--case", help="KIND:SEED:NUMBER, run here and now, with its traceback")
    parser.add_argument("--workers", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--most", type=int, default=20, help="failures printed of one kind of message")
    parser.add_argument("--report", type=Path, default=Path("build/fuzz.json"))
    parser.add_argument("--worker", nargs=3, help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    if options.worker:
        kind, seed, slot = options.worker
        return work(kind, int(seed), Path(slot))
    if options.case:
        return one(options.case)
    seed = int(time.time()) if options.seed is None else options.seed
    totals = {}
    for name in options.kinds.split(","):
        name, _, count = name.partition(":")
        if name not in KINDS:
            parser.error(f"no kind {name!r}: expected {', '.join(KINDS)}")
        totals[name] = int(count) if count else max(1, round(options.n * KINDS[name].share))
    report = Campaign(seed, totals, options.workers, options.most).run()
    options.report.parent.mkdir(parents=True, exist_ok=True)
    options.report.write_text(json.dumps(report, indent=1) + "\n")
    summarise(report, options.report)
    return 1 if report["failures"] else 0


# --- in a worker ---


def functions(kind: str) -> tuple[Callable[[], None], Callable[[Any], dict[str, int]]]:
    """(prepare, run) of a kind."""
    import importlib

    module = importlib.import_module(f".{KINDS[kind].module}", __package__)
    return module.prepare, module.run


def case(kind: str, seed: int, number: int, run: Callable[[Any], dict[str, int]]) -> tuple[dict[str, int], str, Any]:
    """(counts, the failure's message or "", its exception) of one case."""
    from .draws import Draws, Failure

    draws = Draws(kind, seed, number)
    try:
        return run(draws), "", None
    except Failure as failure:
        about = ", ".join(f"{name}={value}".replace("torch.", "") for name, value in draws.about.items())
        return {}, f"{failure} | {about}", failure.__cause__ or failure
    except Exception as error:  # the harness's own fault, or a property that was not thought of
        return {}, f"{type(error).__name__}: {error} | {draws.about}", error


def work(kind: str, seed: int, slot: Path) -> int:
    """Take "first last" lines from standard input, run those cases, and answer with a line of JSON each time."""
    faulthandler.enable()
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)  # what libraries print must not come between the answers
    prepare, run = functions(kind)
    prepare()
    with slot.open("r+b") as file:
        now = mmap.mmap(file.fileno(), 16)
    for line in sys.stdin:
        first, last = map(int, line.split())
        counts: collections.Counter[str] = collections.Counter()
        failures = []
        for number in range(first, last):
            now[:16] = struct.pack("<qd", number, time.time())
            found, message, _ = case(kind, seed, number, run)
            counts.update(found)
            if message:
                failures.append((number, " ".join(message.split())[:600]))
        answers.write(json.dumps({"counts": counts, "failures": failures}) + "\n")
    return 0


def one(name: str) -> int:
    """Run a single case in this process, started anew where its kind wants another environment."""
    kind, seed, number = name.split(":")
    wanted = KINDS[kind].environment
    if any(os.environ.get(key) != value for key, value in wanted.items()):
        return subprocess.run([sys.executable, *command(), "--case", name], env={**os.environ, **wanted}).returncode
    faulthandler.enable()
    prepare, run = functions(kind)
    prepare()
    _, message, error = case(kind, int(seed), int(number), run)
    if error is not None:
        traceback.print_exception(error)
    print(f"{name}: {message or 'passed'}")
    return bool(message)


def command() -> list[str]:
    return [str(Path(__file__).parent)]


# --- in the parent ---


class Worker(threading.Thread):
    """A thread that feeds one process, and starts another after a crash or a hang."""

    def __init__(self, campaign: Campaign, number: int) -> None:
        super().__init__(daemon=True)
        self.campaign = campaign
        self.slot = campaign.folder / f"slot{number}"
        self.errors = campaign.folder / f"errors{number}"
        self.slot.write_bytes(bytes(16))
        self.process: subprocess.Popen[str] | None = None
        self.kind = ""
        self.killed = False

    def start_process(self, kind: str) -> None:
        self.stop_process()
        self.kind, self.killed = kind, False
        self.slot.write_bytes(struct.pack("<qd", -1, time.time()))
        # As many processes as cores are at work: each with one thread, but where a case asks for two.
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "PASSIVE", **KINDS[kind].environment}
        with self.errors.open("wb") as errors:
            self.process = subprocess.Popen(
                [sys.executable, *command(), "--worker", kind, str(self.campaign.seed), str(self.slot)],
                stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=errors, text=True, env=environment,
            )  # fmt: skip

    def stop_process(self) -> None:
        if self.process is not None:
            self.process.stdin.close()  # type: ignore[union-attr]
            try:
                self.process.wait(10)
            except subprocess.TimeoutExpired:
                self.process.kill()
                self.process.wait()
            self.process = None

    def run(self) -> None:
        for kind, first, last in self.campaign.blocks():
            if self.process is None or self.kind != kind:
                self.start_process(kind)
            while first < last:
                answer = self.ask(first, last)
                if answer is not None:
                    self.campaign.add(kind, last - first, answer["counts"], answer["failures"])
                    break
                first = self.buried(kind, first)
        self.stop_process()

    def ask(self, first: int, last: int) -> dict[str, Any] | None:
        try:
            self.process.stdin.write(f"{first} {last}\n")  # type: ignore[union-attr]
            self.process.stdin.flush()  # type: ignore[union-attr]
            line = self.process.stdout.readline()  # type: ignore[union-attr]
        except OSError:
            line = ""
        return json.loads(line) if line else None

    def buried(self, kind: str, first: int) -> int:
        """The case after the one at which the process died, which is told; a new process is started."""
        number, _ = struct.unpack("<qd", self.slot.read_bytes())
        code = self.process.wait()  # type: ignore[union-attr]
        self.process = None
        lines = [line for line in self.errors.read_text(errors="replace").splitlines() if line.strip()]
        how = "hang" if self.killed else f"crash: {signal_name(code)}"
        begin = next((i for i, line in enumerate(lines) if "Fatal" in line or "ERROR" in line), max(0, len(lines) - 8))
        message = f"{how}: {' / '.join(lines[begin : begin + 12])[:400]}"
        if number < first:  # it did not even begin
            self.campaign.add(kind, 0, {}, [(first, f"the worker did not start: {message}")])
            raise SystemExit
        # What the block had found before is found again: blocks are small, and a crash is rare.
        before = [] if number == first else None
        self.start_process(kind)
        if before is None:
            answer = self.ask(first, number) or {"counts": {}, "failures": []}
            before = answer["failures"]
            self.campaign.add(kind, number - first, answer["counts"], before)
        self.campaign.add(kind, 1, {}, [(number, message)])
        return number + 1

    def check_hang(self) -> None:
        process = self.process
        if process is None or process.poll() is not None:
            return
        number, since = struct.unpack("<qd", self.slot.read_bytes())
        limit = KINDS[self.kind].limit + (240 if number < 0 else 0)
        if since and self.busy and time.time() - since > limit:
            self.killed = True
            process.kill()

    @property
    def busy(self) -> bool:
        return self.is_alive()


class Campaign:
    """All cases of one run.

    Args:
        seed, totals: cases are (kind, seed, number) with number below totals[kind].
        workers: processes.
        most: failures of one kind of message that are kept.
    """

    def __init__(self, seed: int, totals: dict[str, int], workers: int, most: int = 20) -> None:
        self.seed, self.totals, self.most = seed, totals, most
        self.count = workers
        self.folder = Path(tempfile.mkdtemp(prefix="fuzz"))
        self._queue = self._all_blocks()
        self._lock = threading.Lock()
        self.done: collections.Counter[str] = collections.Counter()
        self.calls: dict[str, collections.Counter[str]] = collections.defaultdict(collections.Counter)
        self.failures: dict[str, list[tuple[str, str]]] = collections.defaultdict(list)
        self.failed = 0
        self.seconds: collections.Counter[str] = collections.Counter()

    def _all_blocks(self) -> Iterator[tuple[str, int, int]]:
        for kind, total in self.totals.items():
            block = max(1, min(KINDS[kind].block, total // (2 * self.count)))
            for first in range(0, total, block):
                yield kind, first, min(first + block, total)

    def blocks(self) -> Iterator[tuple[str, int, int]]:
        while True:
            with self._lock:
                block = next(self._queue, None)
            if block is None:
                return
            yield block

    def add(self, kind: str, cases: int, counts: dict[str, int], failures: list[tuple[int, str]]) -> None:
        with self._lock:
            self.done[kind] += cases
            self.calls[kind].update(counts)
            self.bar.update(cases)
            for number, message in failures:
                self.failed += 1
                group = self.failures[f"{kind}: {grouped(message)}"]
                name = f"{kind}:{self.seed}:{number}"
                if len(group) < self.most:
                    tqdm.write(f"make fuzz CASE={name}   # {message}", file=sys.stderr)
                group.append((name, message))
            self.bar.set_postfix_str(f"{self.failed} failed", refresh=False)

    def run(self) -> dict[str, Any]:
        start = time.perf_counter()
        with tqdm(total=sum(self.totals.values()), unit="case", smoothing=0.05, mininterval=1) as self.bar:
            workers = [Worker(self, number) for number in range(self.count)]
            for worker in workers:
                worker.start()
            while any(worker.is_alive() for worker in workers):
                for worker in workers:
                    worker.join(0.5)
                    worker.check_hang()
        for path in self.folder.iterdir():
            path.unlink()
        self.folder.rmdir()
        missing = {kind: total - self.done[kind] for kind, total in self.totals.items() if self.done[kind] < total}
        if missing:
            self.failures["driver: cases were not run"].append((f"driver:{self.seed}:0", json.dumps(missing)))
        return {
            "revision": revision(),
            "machine": machine(),
            "seed": self.seed,
            "seconds": round(time.perf_counter() - start, 1),
            "workers": self.count,
            "cases": dict(self.done),
            "calls": {kind: dict(sorted(calls.items())) for kind, calls in self.calls.items()},
            "failed": self.failed,
            "failures": {
                message: {"count": len(found), "cases": found[: self.most]}
                for message, found in sorted(self.failures.items(), key=lambda item: -len(item[1]))
            },
        }


def grouped(message: str) -> str:
    """The message without numbers and without what is told of the case: what failures of one cause share."""
    return re.sub(r"-?\d[\d.,e+-]*|\bnan\b|\b-?inf\b", "#", message.partition(" |")[0])[:200]


def signal_name(code: int) -> str:
    return signal.Signals(-code).name if code < 0 else f"exit status {code}"


def revision() -> str:
    """The commit, with "+" where files differ from it."""
    try:
        git = [
            subprocess.run(["git", *words], cwd=ROOT, capture_output=True, text=True, check=True).stdout.strip()
            for words in (["rev-parse", "--short=12", "HEAD"], ["status", "--porcelain", "--untracked-files=no"])
        ]
        return git[0] + "+" * bool(git[1])
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


def machine() -> dict[str, Any]:
    import torch

    from entrgi_kernels.backends import native

    cpu = platform.processor() or platform.machine()
    try:
        cpu = re.search(r"model name\s*: (.*)", Path("/proc/cpuinfo").read_text()).group(1)  # type: ignore[union-attr]
    except (OSError, AttributeError):
        pass
    here = native.why_not(torch.device("cpu"), torch.float32) is None
    return {
        "cpu": cpu,
        "cores": os.cpu_count(),
        "instruction_sets": native.build_info()["supported_isas"] if here else [],
        "python": platform.python_version(),
        "torch": torch.__version__,
    }


def summarise(report: dict[str, Any], path: Path) -> None:
    for kind, count in report["cases"].items():
        print(f"{kind}: {count} cases")
        rows: dict[str, dict[str, int]] = collections.defaultdict(dict)
        for name, number in report["calls"].get(kind, {}).items():
            what, _, where = name.rpartition(" ")
            rows[what or where][where] = number
        for what, numbers in rows.items():
            print(f"  {what:24}" + "  ".join(f"{where} {number}" for where, number in numbers.items()))
    for message, found in report["failures"].items():
        print(f"FAILED {found['count']} times: {message}\n  make fuzz CASE={found['cases'][0][0]}")
    print(f"{report['failed']} failures; seed {report['seed']}, {report['seconds']} s; {path}")
