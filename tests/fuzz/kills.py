"""kill -9, full disks and two writers over the commands that go on where they ended: the files are an unbroken run's.

    python -m tests.fuzz.kills --seed 1 --count 100             # from the root; PYTHONPATH=.:python in a checkout
    python -m tests.fuzz.kills --seed 1 --case 17               # one of them again
    python -m tests.fuzz.kills --seed 1 --count 10 --only generate

Each case starts a command, disturbs it, runs the same command to its end and compares. A case prints one line: seed and
case, command, disturbance, and `equal` or what differs. Commands are processes forked from one that has imported
everything, so that a kill costs the models' loading and no more.

A kill falls at a random time or at a chosen point, counted in the unbroken run: inside a write (half of the bytes are
written), before an fsync, before or after a rename, before a file is opened or removed.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import io
import json
import multiprocessing
import os
import random
import shutil
import signal
import socket
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

PRELOAD = (
    "torch", "transformers", "transformers.trainer", "accelerate", "peft", "scipy.stats", "entrgi.generate",
    "entrgi.evaluate.processes", "entrgi.evaluate.judges", "entrgi.report.evaluation", "entrgi.train.trainer",
    "entrgi.train.command",
)  # fmt: skip
# What differs from run to run: times, and what Trainer averages over the steps since it was started.
CLOCK = {"seconds", "rollout_seconds", "train_loss"}
CLOCK_ENDS = ("_runtime", "_per_second")
TIMEOUT = 240.0
NOBODY = 65534

SOUP = "What did you think of the soup?"
PROMPTS = (
    SOUP,
    "What did you think of the room?",
    SOUP,
    "Tell me about the inn.",
    SOUP,
    "How was the film?",
    "The bar?",
)
EVALUATE = ("evaluate", "tiny", "-n", "3", "--batch-size", "2", "--methods", "none,entrgi", "-K", "2", "--best-of", "2",
            "-T", "3", "-L", "8", "-M", "1", "--traces", "1", "--device", "cpu", "--no-report", "--quiet",
            "--set", "judges=[{kind: reward}, {kind: rule}]")  # fmt: skip
GENERATE = (
    "generate",
    *PROMPTS,
    "-K",
    "2",
    "-T",
    "3",
    "-L",
    "8",
    "-M",
    "1",
    "--batch-size",
    "3",
    "--quiet",
    "--resume",
)
TRAIN = ("train", "--max-steps", "4", "--save-steps", "1", "--eval-steps", "2", "--eval-prompts", "2", "--set",
         "eval_samples=1", "-K", "2", "-T", "2", "-L", "4", "-M", "1", "--max-prompts", "12", "--sample-steps", "2",
         "--device", "cpu", "--quiet", "--resume")  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Command:
    """A command line and the files that it must leave.

    Attributes:
        arguments: but for the output.
        output: its name in the case's folder: a file or a folder.
        exact: files that are equal byte for byte, and `timed` ones that are so but for wall-clock fields.
        processes: that do it together.
    """

    name: str
    arguments: tuple[str, ...]
    output: str
    exact: tuple[str, ...]
    timed: tuple[str, ...] = ()
    processes: int = 1


_RESULTS = ("samples.jsonl", "judgements.jsonl", "traces.jsonl", "config.json")
_RUN = ("evaluations.jsonl", "samples.jsonl")
_LORA = (*TRAIN, "--prompts", "1", "--lora-r", "2", "--lora-dropout", "0.1")
COMMANDS = (
    Command("evaluate", EVALUATE, "e", _RESULTS, ("batches.jsonl",)),
    Command("evaluate x2", EVALUATE, "e", _RESULTS, ("batches.jsonl",), 2),
    Command("generate", GENERATE, "o.jsonl", ("",)),
    Command("train rgrl", (*TRAIN, "--prompts", "1"), "t", (*_RUN, "model.safetensors"), ("log.jsonl",)),
    Command("train grpo", (*_LORA, "--method", "diffu-grpo", "--set", "num_iterations=3"), "t",
            (*_RUN, "adapter_model.safetensors"), ("log.jsonl",)),
    Command("train x2", _LORA, "t", (*_RUN, "adapter_model.safetensors"), ("log.jsonl",), 2),
)  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Moment:
    """When a process is killed: after a share of the unbroken run's time, or at the n-th event of a kind."""

    kind: str
    n: float

    def __str__(self) -> str:
        return f"at {self.n:.0%} of its time" if self.kind == "time" else f"{self.kind} {self.n:.0f}"


@dataclasses.dataclass(frozen=True)
class Orders:
    """What a process is to do with itself beside its command."""

    folder: str
    environment: dict[str, str]
    moment: Moment | None = None
    counts: str | None = None  # where to write how often each event came
    largest_file: int | None = None
    as_nobody: bool = False


# -- in the process that is killed ------------------------------------------------------------------------------------


def work(arguments: Sequence[str], orders: Orders, said: Any) -> None:
    """A command in a process of its own; its words go to the connection `said`."""
    for stream in (1, 2):
        os.dup2(said.fileno(), stream)
    os.environ.update(orders.environment)
    import torch

    torch.set_num_threads(1)
    counts = _watch(orders)
    if orders.largest_file is not None:
        import resource

        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (orders.largest_file, orders.largest_file))
    if orders.as_nobody and os.getuid() == 0:  # root may write to any folder
        import importlib.readers  # noqa: F401  # imported late, and an interpreter of root's may be out of reach by then

        os.setgroups([])
        os.setgid(NOBODY)
        os.setuid(NOBODY)
    from entrgi.cli import main

    code = main(list(arguments))
    if orders.counts:
        Path(orders.counts).write_text(json.dumps(counts))
    sys.exit(code)


def _watch(orders: Orders) -> Counter[str]:
    """Count what is done to files of the folder, and kill this process at its moment."""
    counts: Counter[str] = Counter()

    def due(kind: str) -> bool:
        counts[kind] += 1
        return orders.moment is not None and (kind, counts[kind]) == (orders.moment.kind, orders.moment.n)

    def die() -> None:
        os.kill(os.getpid(), signal.SIGKILL)

    def ours(path: Any) -> bool:
        return isinstance(path, (str, os.PathLike)) and os.fspath(path).startswith(orders.folder)

    def hook(event: str, arguments: tuple[Any, ...]) -> None:
        kind = {"open": "open", "os.remove": "remove", "os.rmdir": "remove", "os.truncate": "cut"}.get(event)
        if kind and ours(arguments[0]) and (kind != "open" or _writes(*arguments[1:3])) and due(kind):
            die()

    class Torn(io.FileIO):
        def write(self, data: Any) -> int:
            if due("write"):
                super().write(memoryview(data)[: max(1, len(data) // 2)])
                die()
            return super().write(data)

    def opened(path: Any, mode: str = "r", **options: Any) -> Any:
        return Torn(path, mode) if options.get("buffering") == 0 else open(path, mode, **options)

    fsync, replace = os.fsync, os.replace

    def synced(handle: int) -> None:
        if due("fsync"):
            die()
        fsync(handle)

    def replaced(old: Any, new: Any, **options: Any) -> None:
        if ours(new) and due("rename"):
            die()
        replace(old, new, **options)
        if ours(new) and due("renamed"):
            die()

    from entrgi import generate, jsonl

    jsonl.open = generate.open = opened
    os.fsync, os.replace = synced, replaced
    sys.addaudithook(hook)
    return counts


def _writes(mode: Any, flags: Any) -> bool:
    if isinstance(mode, str):
        return any(letter in mode for letter in "wax+")
    return isinstance(flags, int) and bool(flags & (os.O_WRONLY | os.O_RDWR))


# -- beside it --------------------------------------------------------------------------------------------------------


class Runner:
    """Starts commands, and knows their unbroken runs.

    Args:
        folder: for everything; each case has one of its own in it.
        preload: modules that commands are not to import again.
    """

    def __init__(self, folder: Path, preload: Sequence[str] = PRELOAD) -> None:
        self.folder = folder
        self._known: dict[str, tuple[Path, float, list[Counter[str]]]] = {}
        self._context = multiprocessing.get_context("forkserver")
        self._context.set_forkserver_preload(list(preload))
        first = self._context.Process(target=str)  # with it the others' origin starts and imports
        first.start()
        first.join()

    def unbroken(self, command: Command) -> tuple[Path, float, list[Counter[str]]]:
        """(output, seconds, events of each process) of a run that nobody disturbed."""
        if command.name not in self._known:
            place = self.folder / f"unbroken {command.name}"
            place.mkdir()
            begin = time.monotonic()
            codes, said = self.run(command, place, count=True)
            if set(codes) != {0}:
                raise RuntimeError(f"{command.name} fails undisturbed: {said[-2000:]}")
            seconds = time.monotonic() - begin
            events = [Counter(json.loads((place / f"counts {r}").read_text())) for r in range(command.processes)]
            self._known[command.name] = place / command.output, seconds, events
        return self._known[command.name]

    def start(self, command: Command, place: Path, **orders: Any) -> tuple[list[Any], list[Any]]:
        """(processes, connections that they speak to) of a command; `orders` of one process go by `victim`."""
        victim, count = orders.pop("victim", 0), orders.pop("count", False)
        group = {"OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true", "HF_HUB_OFFLINE": "1"}
        if command.processes > 1:
            with socket.socket() as free:
                free.bind(("127.0.0.1", 0))
                port = free.getsockname()[1]
            size = str(command.processes)
            group |= {
                "MASTER_ADDR": "127.0.0.1",
                "MASTER_PORT": str(port),
                "WORLD_SIZE": size,
                "LOCAL_WORLD_SIZE": size,
            }
        processes, ears = [], []
        for rank in range(command.processes):
            ear, mouth = self._context.Pipe(duplex=False)
            own = {**group, "RANK": str(rank), "LOCAL_RANK": str(rank)} if command.processes > 1 else group
            told = Orders(
                str(place / command.output), own, counts=str(place / f"counts {rank}") if count else None,
                **(orders if rank == victim else {}),
            )  # fmt: skip
            arguments = [*command.arguments, "-o", str(place / command.output)]
            process = self._context.Process(target=work, args=(arguments, told, mouth))
            process.start()
            mouth.close()
            processes.append(process)
            ears.append(ear)
        return processes, ears

    def end(self, processes: list[Any], ears: list[Any], kill_at: float | None = None) -> tuple[list[int], str]:
        """(exit codes, what was said) once all are at their end; a process that failed takes the others along."""
        deadline = time.monotonic() + TIMEOUT
        late = False
        while any(process.is_alive() for process in processes):
            failed = any(process.exitcode not in (None, 0) for process in processes)
            late = time.monotonic() > deadline
            if failed or late or (kill_at is not None and time.monotonic() > kill_at):
                for process in processes:
                    process.kill()  # as launchers do
            time.sleep(0.005)
        words = ["timed out"] if late else []
        for ear in ears:
            with contextlib.closing(ear):
                while part := os.read(ear.fileno(), 1 << 16):
                    words.append(part.decode("utf-8", "replace"))
        return [process.exitcode for process in processes], "".join(words)

    def run(self, command: Command, place: Path, **orders: Any) -> tuple[list[int], str]:
        """A command from its start to its end."""
        return self.end(*self.start(command, place, **orders))


def difference(command: Command, found: Path, expected: Path) -> str:
    """How a command's files differ from an unbroken run's; empty where they do not."""
    for name in command.exact:
        a, b = (root / name if name else root for root in (found, expected))
        if not a.is_file():
            return f"no {a.name}"
        if a.read_bytes() != b.read_bytes():
            return f"{a.name} differs"
    for name in command.timed:
        if _untimed(found / name) != _untimed(expected / name):
            return f"{name} differs"
    names = [{str(p.relative_to(root)) for p in root.rglob("*")} - {"run.json"} for root in (found, expected)]
    extra = sorted(names[0] ^ names[1])
    return f"other files: {', '.join(extra[:4])}" if extra else ""


def _untimed(path: Path) -> list[dict[str, Any]]:
    lines = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    return [{k: v for k, v in line.items() if k not in CLOCK and not k.endswith(CLOCK_ENDS)} for line in lines]


# -- what is done to a command ----------------------------------------------------------------------------------------


def killed(runner: Runner, command: Command, place: Path, rng: random.Random) -> Iterator[str]:
    """kill -9 of one process, or a few in a row; the others of its group fall with it."""
    _, seconds, events = runner.unbroken(command)
    for count in range(1 + (rng.random() < 0.3)):
        victim = rng.randrange(command.processes)
        kinds = sorted(events[victim])
        kind = "time" if rng.random() < 0.3 or not kinds else rng.choice(kinds)
        moment = Moment(kind, rng.random() if kind == "time" else rng.randint(1, events[victim][kind]))
        begin = time.monotonic()
        processes, ears = runner.start(command, place, victim=victim, moment=moment)
        kill_at = begin + moment.n * seconds if kind == "time" else None
        codes, said = runner.end(processes, ears, kill_at)
        yield (
            ("then " if count else "")
            + f"kill -9 {moment}"
            + (f" of process {victim}" if command.processes > 1 else "")
        )
        # A process whose peer is gone may see it, and fail, before it is killed.
        usual = {0, -signal.SIGKILL} | ({1} if -signal.SIGKILL in codes and len(codes) > 1 else set())
        if not set(codes) <= usual or "timed out" in said:
            yield f"FAILED with {codes}: {said[-500:]}"
        if set(codes) == {0}:
            yield "(too late)"


def full_disk(runner: Runner, command: Command, place: Path, rng: random.Random) -> Iterator[str]:
    """Files cannot grow beyond a size: one line that names a file or folder of ours, and a code."""
    output, *_ = runner.unbroken(command)
    sizes = [path.stat().st_size for path in ([output] if output.is_file() else output.rglob("*")) if path.is_file()]
    limit = int(rng.choice(sizes) * rng.random())
    victim = rng.randrange(command.processes)
    yield f"full disk, files up to {limit} bytes" + (f" in process {victim}" if command.processes > 1 else "")
    codes, said = runner.run(command, place, victim=victim, largest_file=limit)
    yield from _refused(codes, said, place, may_pass=True)


def read_only(runner: Runner, command: Command, place: Path, rng: random.Random) -> Iterator[str]:
    """Results that may only be read: one line that names them, a code, and not a byte of them changed."""
    output, _, events = runner.unbroken(command)
    runner.run(command, place, moment=Moment("write", rng.randint(1, max(1, events[0]["write"]))))
    tree = [path for path in [place, *place.rglob("*")] if path.exists()]
    before = {path: path.read_bytes() for path in tree if path.is_file()}
    for path in tree:
        path.chmod(path.stat().st_mode & ~0o222 | 0o444 | (0o111 if path.is_dir() else 0))
    yield "a folder that may only be read"
    codes, said = runner.run(command, place, as_nobody=True)
    for path in tree:
        path.chmod(path.stat().st_mode | 0o200)
    if {path: path.read_bytes() for path in before} != before:
        yield "FAILED: something was changed"
    yield from _refused(codes, said, place, may_pass=False)


def two_writers(runner: Runner, command: Command, place: Path, rng: random.Random) -> Iterator[str]:
    """The same command twice at once: one does it, the other is refused or finds it done."""
    yield "two at once"
    _, seconds, _ = runner.unbroken(command)
    first = runner.start(command, place)
    time.sleep(rng.random() * seconds / 2)
    second = runner.start(command, place)
    codes, said = zip(*(runner.end(*started) for started in (first, second)), strict=True)
    # Where the first process of a group is refused the others fall, by the launcher's hand or for want of a peer.
    flat = [set(group) - ({-signal.SIGKILL, 1} if 2 in group else set()) for group in codes]
    if {0} not in flat or not set().union(*flat) <= {0, 2}:
        yield f"FAILED with {codes}: {said[0][-300:]} {said[1][-300:]}"
    elif any(2 in group and "another run is writing to" not in words for group, words in zip(flat, said, strict=True)):
        yield f"FAILED: refused for another reason: {said[0][-300:]} {said[1][-300:]}"


def _refused(codes: list[int], said: str, place: Path, may_pass: bool) -> Iterator[str]:
    if may_pass and set(codes) == {0}:
        yield "(room enough)"
    elif "Traceback" in said or str(place) not in said or not {1, 2} & set(codes):
        yield f"FAILED with {codes}: {said[-700:]}"


DISTURBANCES: tuple[tuple[Callable[..., Iterator[str]], float], ...] = (
    (killed, 0.82), (full_disk, 0.1), (two_writers, 0.04), (read_only, 0.04),
)  # fmt: skip


def case(runner: Runner, seed: int, index: int, commands: Sequence[Command] = COMMANDS) -> tuple[bool, str]:
    """(whether all is well, the line that says so) of one case."""
    rng = random.Random(f"{seed}/{index}")
    command = commands[index % len(commands)]
    how = rng.choices([d for d, _ in DISTURBANCES], [weight for _, weight in DISTURBANCES])[0]
    place = runner.folder / f"case {index}"
    place.mkdir()
    expected, *_ = runner.unbroken(command)
    steps = list(how(runner, command, place, rng))
    codes, said = runner.run(command, place)
    wrong = [step for step in steps if step.startswith("FAILED")]
    if set(codes) != {0}:
        wrong.append(f"FAILED to go on with {codes}: {said[-700:]}")
    verdict = "; ".join(wrong) or difference(command, place / command.output, expected) or "equal"
    if verdict == "equal":
        shutil.rmtree(place)
    told = ", ".join(step for step in steps if not step.startswith("FAILED"))
    return verdict == "equal", f"seed {seed} case {index}: {command.name}, {told} -> {verdict}"


def campaign(
    seed: int, cases: Sequence[int], commands: Sequence[Command] = COMMANDS, say: Callable[[str], None] = print
) -> int:
    """Run cases; the number that failed. Folders of those are kept."""
    folder = Path(tempfile.mkdtemp(prefix="kills-"))
    folder.chmod(0o755)
    runner, failed = Runner(folder), 0
    for index in cases:
        fine, line = case(runner, seed, index, commands)
        say(line)
        failed += not fine
    if failed:
        say(f"{failed} of {len(cases)} differ; their folders are in {folder}")
    else:
        say(f"{len(cases)} of {len(cases)} equal")
        shutil.rmtree(folder)
    return failed


def main() -> int:
    """The command line; 1 if anything differs."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--count", type=int, default=100, help="cases (100)")
    parser.add_argument("--case", type=int, help="this one alone")
    parser.add_argument("--only", help="commands whose name begins so: evaluate, generate, train, 'train x2', ...")
    args = parser.parse_args()
    commands = [command for command in COMMANDS if not args.only or command.name.startswith(args.only)]
    cases = range(args.count) if args.case is None else [args.case]
    return int(bool(campaign(args.seed, cases, commands, lambda line: print(line, flush=True))))


if __name__ == "__main__":
    sys.exit(main())
