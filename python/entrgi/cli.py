"""The ``entrgi`` command: a table of subcommands, each in a module of its own that is imported only when it is used.

A subcommand's module has ``add_arguments(parser)`` and ``run(args) -> exit code``; to add one, add a row to COMMANDS.
"""

from __future__ import annotations

import argparse
import importlib
import logging
import os
import sys
import textwrap
from collections.abc import Sequence
from typing import NamedTuple

from . import __version__
from .errors import UsageError, is_the_machines, out_of_memory
from .interrupts import Interrupts, listening


class Command(NamedTuple):
    """One row of the table: the module that implements the subcommand and its line in ``entrgi --help``."""

    module: str
    help: str


COMMANDS = {
    "generate": Command("entrgi.generate", "reward-guided texts for prompts from arguments, files or standard input"),
    "compare": Command("entrgi.compare", "the same prompts with and without guidance: rewards, texts, a report"),
    "train": Command("entrgi.train.command", "post-training on reward-guided samples (RGRL), or by diffu-GRPO"),
    "plot": Command("entrgi.train.plot", "reward curves of training runs in one picture"),
    "evaluate": Command("entrgi.evaluate", "a grid of methods, models, temperatures, seeds and datasets; resumable"),
    "report": Command("entrgi.report.command", "tables and pictures of evaluations, as HTML, Markdown or LaTeX"),
    "serve": Command("entrgi.serve.command", "an OpenAI-compatible server, with a page that shows guidance at work"),
    "tiny train": Command("entrgi.tiny.train", "train the built-in tiny models again (about twenty minutes on a CPU)"),
    "check": Command("entrgi.check", "are the kernels right on this machine, and how fast: for a GPU, run this first"),
    "env": Command("entrgi.env", "what this machine has: versions, devices, backends and why the rest are missing"),
}
GROUPS = {"tiny": "the built-in tiny models"}
EXIT_FAILURE, EXIT_USAGE = 1, 2
_LENGTH = 240  # of what an error says, in characters
_SIZES = ("batch_size", "prompts", "num_samples", "max_new_tokens")  # flags that memory goes by


def process() -> int:
    """``entrgi`` and ``python -m entrgi``: :func:`main` in a process that ends with it."""
    return _main(sys.argv[1:], for_good=True)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line, and leave the process as it was.

    Args:
        argv: arguments without the program's name; None takes those of the process.

    Returns:
        Exit code: 0 done, 1 failed, 2 bad input (one line on standard error, as for want of memory or disk), 130
        interrupted.
    """
    return _main(sys.argv[1:] if argv is None else argv, for_good=False)


def _main(argv: Sequence[str], *, for_good: bool) -> int:
    try:
        with listening(for_good=for_good) as interrupts:
            try:
                return _run(list(argv), interrupts)
            except KeyboardInterrupt:
                return interrupts.say()
            except Exception as error:
                if interrupts.told and not interrupts.traceback:
                    return interrupts.say(error)
                raise
            finally:
                sys.stdout.flush()
    except BrokenPipeError:
        # The reader is gone (`| head`). Python flushes standard output once more at exit: let that go nowhere.
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        return 0


def _run(arguments: list[str], interrupts: Interrupts) -> int:
    # OpenMP reads it when torch is loaded. Threads that spin at a barrier take the core from those they wait for: on a
    # busy machine the demo used 60 s of CPU without finishing, and 19 s with threads that sleep.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    logging.basicConfig(format="%(name)s: %(message)s", level=logging.WARNING)
    try:
        args = parse(arguments)
    except ImportError as error:
        if interrupts.told:
            raise
        print(f"entrgi: error: cannot load this command: {error} (`entrgi env` shows what is here)", file=sys.stderr)
        return EXIT_FAILURE
    name = interrupts.name = f"entrgi {args.command}"
    interrupts.traceback = getattr(args, "traceback", False)
    try:
        return int(args.run(args) or 0)
    except Exception as error:
        if interrupts.told or interrupts.traceback:
            raise
        if isinstance(error, UsageError):
            print(f"{name}: error: {error}", file=sys.stderr)
            return EXIT_USAGE
        if not is_the_machines(error):
            raise
        said = _want_of_memory(error, args) if out_of_memory(error) else str(error) or type(error).__name__
        print(f"{name}: error: {said}", file=sys.stderr)
        return EXIT_FAILURE


def _want_of_memory(error: Exception, args: argparse.Namespace) -> str:
    """One line: what did not fit, and the flags of this command that lower it."""
    said = " ".join(str(error).split())
    if len(said) > _LENGTH:  # of a whole trace, as Ray sends it, the line that tells
        lines = [line.strip() for line in str(error).splitlines() if line.strip()]
        said = next((line for line in reversed(lines) if out_of_memory(RuntimeError(line))), lines[-1])
    said = textwrap.shorten(said, _LENGTH, placeholder=" ...")
    sizes = []
    for name in _SIZES:
        value = getattr(args, name, [])  # lists are prompts themselves, not their number
        if not isinstance(value, list):
            sizes.append(f"--{name.replace('_', '-')}" + ("" if value is None else f" (now {value})"))
    hint = f": lower {' or '.join(sizes)}, or take smaller models or a smaller --dtype" if sizes else ""
    return f"out of memory{f' ({said})' if said else ''}{hint}"


def parse(arguments: list[str]) -> argparse.Namespace:
    """A subcommand's flags; `run` is its function. Only its own module is imported."""
    parser = argparse.ArgumentParser(
        prog="entrgi", description="Reward guidance for discrete diffusion language models (EntRGi)."
    )
    parser.add_argument("--version", action="version", version=f"entrgi-kernels {__version__}")
    top = parser.add_subparsers(dest="command", required=True, metavar="COMMAND", title="commands")
    groups = {}
    words = [argument for argument in arguments if not argument.startswith("-")]
    for name, command in COMMANDS.items():
        path = name.split()
        subparsers = top
        if len(path) > 1:
            if path[0] not in groups:
                group = top.add_parser(path[0], help=GROUPS[path[0]], description=GROUPS[path[0]])
                groups[path[0]] = group.add_subparsers(required=True, metavar="COMMAND", title="commands")
            subparsers = groups[path[0]]
        subparser = subparsers.add_parser(path[-1], help=command.help, description=command.help)
        if words[: len(path)] == path:  # the rest stay unimported: `entrgi env` works however broken they are
            module = importlib.import_module(command.module)
            module.add_arguments(subparser)
            subparser.set_defaults(command=name, run=module.run)
    return parser.parse_args(arguments)


if __name__ == "__main__":
    raise SystemExit(process())
