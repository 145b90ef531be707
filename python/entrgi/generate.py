"""``entrgi generate``: guided texts for prompts from arguments, files or standard input.

Results leave prompt by prompt. A JSON-lines file is written one whole line per system call, so an interrupted run
leaves a valid file, and ``--resume`` goes on where it ended.
"""

from __future__ import annotations

import argparse
import collections
import contextlib
import hashlib
import json
import os
import sys
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

from . import __version__, flags, jsonl, loading
from .digests import fingerprint
from .errors import UsageError, check_writable, differences, telling
from .prompts import Prompt, prompt_text, read_placed
from .prompts import add_arguments as add_prompt_arguments
from .statistics import number

if TYPE_CHECKING:
    from entrgi_kernels.guidance.config import GuidanceConfig
    from entrgi_kernels.guidance.results import GenerationResult, Sample

# What every line of the JSON-lines output holds, as far as it is read again.
_FIELDS = {"key": str, "prompt": (str, list), "best": (str, type(None)), "samples": list, "settings": dict}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Flags of ``entrgi generate``."""
    parser.description = "Generate reward-guided texts; --method none is best-of-N without guidance."
    add_prompt_arguments(parser, "standard input")
    group = parser.add_argument_group("output")
    group.add_argument("-o", "--output", metavar="FILE", help="where results go (default: standard output)")
    group.add_argument(
        "--format", choices=("text", "jsonl"), help="default: jsonl when --output ends in .jsonl, else text"
    )
    group.add_argument("--best-only", action="store_true", help="keep the best sample of each prompt, not all K")
    group.add_argument(
        "--resume",
        action="store_true",
        help="continue a JSON-lines file: prompts finished there under the same settings are skipped",
    )
    group.add_argument("--overwrite", action="store_true", help="replace the output file if it exists")
    group.add_argument("--quiet", action="store_true", help="no progress bar")
    group.add_argument("--traceback", action="store_true", help="show where an error came from")
    flags.add_sampler_arguments(parser)
    flags.add_model_arguments(parser)


def run(args: argparse.Namespace) -> int:
    """Generate as asked.

    Returns:
        0 when all prompts are done.

    Raises:
        UsageError: for bad input; the command line turns it into one line and exit code 2.
    """
    tiny = loading.uses_tiny(args)
    as_jsonl = _is_jsonl(args)
    placed = read_placed(args.prompts, args.file, field=args.prompt_field)
    prompts = [prompt for _, prompt in placed]
    config = loading.config_from(args, tiny=tiny)
    with _output(args) as out:
        identity = identity_of(args, config) if as_jsonl else {}
        items = keyed(prompts, identity)
        done = repair(Path(args.output), identity) if args.resume else set()
        todo = {index: key for index, (key, _) in enumerate(items) if key not in done}
        if len(todo) < len(items):
            print(f"{len(items) - len(todo)} of {len(items)} prompts were already done", file=sys.stderr)
        if not todo:
            return 0
        loaded = loading.load(args)
        loading.check_prompts(prompts, loaded, lambda index: placed[index][0])
        sampler = loading.make_sampler(loaded, config)
        if args.overwrite and args.output and Path(args.output).is_file():
            os.truncate(args.output, 0)
        finished, missing, hint = 0, 0, "; go on with --resume" if as_jsonl and args.output else ""

        def kept() -> str:
            return f"{finished} of {len(todo)} prompts done{hint}"

        with telling(kept):
            options = {"progress": False if args.quiet else None, "only": set(todo)}
            results = loading.stream(sampler, prompts, **options)
            start = time.perf_counter()
            for index, result in results:
                if as_jsonl:
                    entry = record(todo[index], prompts[index], result, identity, best_only=args.best_only)
                    text = jsonl.dumps(entry)
                else:
                    text = render(prompts[index], result, best_only=args.best_only)
                try:
                    _write(out, text)
                except BrokenPipeError:
                    raise
                except OSError as error:
                    place = f"cannot write {args.output or 'standard output'}: {error.strerror or error}"
                    raise UsageError(f"{place}; {kept()}") from None
                finished += 1
                missing += len(result.samples) - len(result.rewarded)
    if missing:
        said = "have no reward: none of them is the best or part of a mean"
        print(f"{missing} of {finished * config.num_samples} samples {said}", file=sys.stderr)
    if not args.quiet and args.output:
        seconds = time.perf_counter() - start
        print(f"wrote {finished} prompts to {args.output} in {seconds:.1f} s", file=sys.stderr)
    return 0


def identity_of(args: argparse.Namespace, config: GuidanceConfig) -> dict[str, Any]:
    """All that texts and rewards depend on, but for the prompt; in every line of the output.

    Raises:
        UsageError: a model's file that cannot be read.
    """
    from entrgi_kernels.guidance.keys import revision

    drawn = revision(config)
    return {
        "model": args.model or loading.TINY,
        "model_files": fingerprint("diffusion", args.model),
        "reward": args.reward or loading.TINY,
        "reward_files": fingerprint("reward", args.reward),
        "reward_kind": args.reward_kind,
        **{name: getattr(args, name) for name in ("question", "target") if getattr(args, name) is not None},
        "dtype": args.dtype,
        "trust_remote_code": args.trust_remote_code,
        "entrgi_kernels": __version__,
        **({"draws_revision": drawn} if drawn > 1 else {}),  # lines of before there were revisions are gone on with
        "samples": "best" if args.best_only else "all",
        **{name: value for name, value in config.to_dict().items() if name not in loading.SPEED_ONLY},
    }


def render(prompt: Prompt, result: GenerationResult, *, best_only: bool = False) -> str:
    """One prompt's results for a human reader, the best sample first marked with a star."""
    lines = [f"> {line}" for line in prompt_text(prompt).splitlines()]
    best = result.best if result.rewarded else None
    for sample in _kept(result, best_only):
        mark = "*" if sample is best else " "
        text = sample.text.strip().replace("\n", "\n            ")
        reward = "no rew." if number(sample.reward) is None else f"{sample.reward:+.3f}"
        lines.append(f"{mark} {reward:>8}  {text}")
    return "\n".join(lines) + "\n\n"


def record(
    key: str, prompt: Prompt, result: GenerationResult, identity: dict[str, Any], *, best_only: bool = False
) -> dict[str, Any]:
    """One line of the JSON-lines output: texts, tokens, rewards, and every setting that led to them."""
    return {
        "key": key,
        "prompt": prompt,
        "best": result.best.text if result.rewarded else None,
        "top1": number(result.top1),
        "mean": number(result.mean),
        "samples": [
            {"text": s.text, "reward": number(s.reward), "tokens": list(s.tokens)} for s in _kept(result, best_only)
        ],
        "settings": identity,
    }


def _kept(result: GenerationResult, best_only: bool) -> list[Sample]:
    """The best sample alone if so wanted; all where none has a reward."""
    return [result.best] if best_only and result.rewarded else result.samples


def repair(path: Path, identity: dict[str, Any]) -> set[str]:
    """Keys of the finished prompts of a JSON-lines file; a last line torn by a kill or a full disk is cut off.

    Args:
        path: the file.
        identity: the settings that its lines must have been made under.

    Raises:
        UsageError: an unreadable file, a line before the last that is none of ours, one of other settings, or a key
            that comes twice: such a file is left alone.
    """
    expected, found = json.loads(json.dumps(identity)), {}

    def check(line: bytes, where: str) -> None:
        entry = jsonl.parse(line, where)
        if not all(isinstance(entry.get(name), kind) for name, kind in _FIELDS.items()):
            raise UsageError(f"{where}: not a result of `entrgi generate`; --resume needs a file that it wrote")
        if entry["settings"] != expected:
            lines = "\n".join(differences(entry["settings"], expected))
            raise UsageError(f"{where}: a result of other settings:\n{lines}\ngive those, or another --output")
        if entry["key"] in found:
            raise UsageError(f"{where}: its key is in {found[entry['key']]} too; remove one of the two lines")
        found[entry["key"]] = where.rpartition(", ")[2]

    jsonl.repair(path, check)
    return set(found)


def keyed(prompts: Iterable[Prompt], identity: dict[str, Any]) -> list[tuple[str, Prompt]]:
    """(key, prompt) in order: the key is that of the prompt, the settings, and how often the prompt came before."""
    seen: collections.Counter[str] = collections.Counter()
    out = []
    for prompt in prompts:
        content = json.dumps(prompt, ensure_ascii=False, sort_keys=True)
        whole = json.dumps([content, seen[content], identity], ensure_ascii=False, sort_keys=True)
        seen[content] += 1
        out.append((hashlib.sha256(whole.encode()).hexdigest()[:24], prompt))
    return out


def _is_jsonl(args: argparse.Namespace) -> bool:
    named = bool(args.output) and Path(args.output).suffix.lower() in (".jsonl", ".ndjson")
    as_jsonl = args.format == "jsonl" if args.format else named
    if args.resume and not (as_jsonl and args.output):
        raise UsageError("--resume needs JSON lines in a file: --output FILE.jsonl, or --format jsonl --output FILE")
    if args.resume and args.overwrite:
        raise UsageError("--resume and --overwrite exclude each other")
    if args.output:
        check_writable(Path(args.output))
        _refuse_to_replace(args)
    return as_jsonl


def _refuse_to_replace(args: argparse.Namespace) -> None:
    path = Path(args.output)
    # An empty file, and what is no file (/dev/stdout, a named pipe), has nothing to lose.
    if path.is_file() and path.stat().st_size and not args.resume and not args.overwrite:
        raise UsageError(f"{path} exists: --resume continues it (JSON lines), --overwrite replaces it")


@contextlib.contextmanager
def _output(args: argparse.Namespace) -> Iterator[BinaryIO]:
    """Where results go: unbuffered, so that one result is one write and an interrupt cannot fall inside it.

    A file is this process's alone while it is open.
    """
    if not args.output:
        sys.stdout.flush()
        yield sys.stdout.buffer
        return
    path = Path(args.output)
    try:
        file = open(path, "ab", buffering=0)
    except OSError as error:
        raise UsageError(f"cannot write {path}: {error.strerror or error}") from None
    with file:
        if path.is_file():
            jsonl.lock(file, path)
            _refuse_to_replace(args)  # whoever held the lock a moment ago may have written
        yield file


def _write(out: BinaryIO, text: str) -> None:
    from tqdm import tqdm

    data = memoryview(text.encode("utf-8"))
    with tqdm.external_write_mode(file=sys.stdout):  # bars make way when both are terminals
        while data:  # a pipe may take less than all of it
            data = data[out.write(data) :]
        out.flush()
