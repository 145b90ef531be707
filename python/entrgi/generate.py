"""``entrgi generate``: guided texts for prompts from arguments, files or standard input.

Results leave prompt by prompt. A JSON-lines file is written one whole line per system call, so an interrupted run
leaves a valid file, and ``--resume`` goes on where it ended.
"""

from __future__ import annotations

import argparse
import collections
import hashlib
import json
import sys
import time
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

from . import jsonl, loading
from .errors import UsageError, check_writable
from .prompts import Prompt, prompt_text, read_placed
from .prompts import add_arguments as add_prompt_arguments
from .statistics import number

if TYPE_CHECKING:
    from entrgi_kernels.guidance.results import GenerationResult, Sample


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
    loading.add_sampler_arguments(parser)
    loading.add_model_arguments(parser)


def run(args: argparse.Namespace) -> int:
    """Generate as asked.

    Returns:
        0 when all prompts are done, 130 when interrupted.

    Raises:
        UsageError: for bad input; the command line turns it into one line and exit code 2.
    """
    tiny = loading.uses_tiny(args)
    as_jsonl = _is_jsonl(args)
    placed = read_placed(args.prompts, args.file, field=args.prompt_field)
    prompts = [prompt for _, prompt in placed]
    config = loading.config_from(args, tiny=tiny)
    identity = {
        "model": args.model or loading.TINY,
        "reward": args.reward or loading.TINY,
        "dtype": args.dtype,
        "samples": "best" if args.best_only else "all",
        **{name: value for name, value in config.to_dict().items() if name not in loading.SPEED_ONLY},
    }
    items = keyed(prompts, identity)
    done = repair(Path(args.output)) if args.resume and Path(args.output).exists() else set()
    todo = {key for key, _ in items} - done
    if len(todo) < len(items):
        print(f"{len(items) - len(todo)} of {len(items)} prompts were already done", file=sys.stderr)
    if not todo:
        return 0
    items = needed(items, todo)

    loaded = loading.load(args)
    loading.check_prompts(prompts, loaded, lambda index: placed[index][0])
    sampler = loading.make_sampler(loaded, config)
    finished, missing, hint = 0, 0, "; go on with --resume" if as_jsonl and args.output else ""
    out = _open(args)
    try:
        results = loading.stream(sampler, [prompt for _, prompt in items], progress=False if args.quiet else None)
        start = time.perf_counter()
        for index, result in results:
            key, prompt = items[index]
            if key not in todo:
                continue
            if as_jsonl:
                entry = record(key, prompt, result, identity, best_only=args.best_only)
                text = json.dumps(entry, ensure_ascii=False, allow_nan=False) + "\n"
            else:
                text = render(prompt, result, best_only=args.best_only)
            _write(out, text)
            finished += 1
            missing += len(result.samples) - len(result.rewarded)
    except KeyboardInterrupt:
        print(f"\ninterrupted: {finished} of {len(todo)} prompts done{hint}", file=sys.stderr)
        return 130
    except BrokenPipeError:
        raise
    except OSError as error:
        place, done = args.output or "standard output", f"{finished} of {len(todo)} prompts done{hint}"
        raise UsageError(f"cannot write {place}: {error.strerror or error}; {done}") from None
    finally:
        if args.output:
            out.close()
    if missing:
        said = "have no reward: none of them is the best or part of a mean"
        print(f"{missing} of {finished * config.num_samples} samples {said}", file=sys.stderr)
    if not args.quiet and args.output:
        seconds = time.perf_counter() - start
        print(f"wrote {finished} prompts to {args.output} in {seconds:.1f} s", file=sys.stderr)
    return 0


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


def repair(path: Path) -> set[str]:
    """Keys of the finished prompts of a JSON-lines file; a last line torn by a kill or a full disk is cut off.

    Raises:
        UsageError: an unreadable file, or a line before the last that is none of ours: such a file is left alone.
    """
    return set(jsonl.repair(path, _key_of))


def _key_of(line: bytes, where: str) -> str:
    try:
        return json.loads(line)["key"]
    except (ValueError, KeyError, TypeError):
        raise UsageError(f"{where}: not a result of `entrgi generate`; --resume needs a file that it wrote") from None


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


def needed(items: list[tuple[str, Prompt]], todo: set[str]) -> list[tuple[str, Prompt]]:
    """The items to run for ``todo``: a repeated prompt brings its earlier, finished repetitions along.

    The sampler numbers repetitions by what it is given, and draws by that number; without the earlier ones a resumed
    run would write their texts again.
    """
    last = {json.dumps(prompt): index for index, (key, prompt) in enumerate(items) if key in todo}
    return [item for index, item in enumerate(items) if index <= last.get(json.dumps(item[1]), -1)]


def _is_jsonl(args: argparse.Namespace) -> bool:
    named = bool(args.output) and Path(args.output).suffix.lower() in (".jsonl", ".ndjson")
    as_jsonl = args.format == "jsonl" if args.format else named
    if args.resume and not (as_jsonl and args.output):
        raise UsageError("--resume needs JSON lines in a file: --output FILE.jsonl, or --format jsonl --output FILE")
    if args.resume and args.overwrite:
        raise UsageError("--resume and --overwrite exclude each other")
    if args.output:
        check_writable(Path(args.output))
        # What is no file (/dev/stdout, a named pipe) has nothing to lose.
        if Path(args.output).is_file() and not args.resume and not args.overwrite:
            raise UsageError(f"{args.output} exists: --resume continues it (JSON lines), --overwrite replaces it")
    return as_jsonl


def _open(args: argparse.Namespace) -> BinaryIO:
    """Unbuffered, so that one result is one write and an interrupt cannot fall inside it."""
    if not args.output:
        sys.stdout.flush()
        return sys.stdout.buffer
    try:
        return open(args.output, "ab" if args.resume else "wb", buffering=0)
    except OSError as error:
        raise UsageError(f"cannot write {args.output}: {error.strerror or error}") from None


def _write(out: BinaryIO, text: str) -> None:
    from tqdm import tqdm

    data = memoryview(text.encode("utf-8"))
    with tqdm.external_write_mode(file=sys.stdout):  # bars make way when both are terminals
        while data:  # a pipe may take less than all of it
            data = data[out.write(data) :]
        out.flush()
