"""Training of the built-in tiny models: ``entrgi tiny train``, or ``python -m entrgi.tiny.train``.

Everything runs for fixed numbers of steps under fixed seeds, so that a second run on the same kind of CPU, with the
same torch and number of threads, gives the same bytes; elsewhere it gives models of the same quality.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import hashlib
import json
import os
import platform
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from ..errors import UsageError

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase, PreTrainedTokenizerFast

WEIGHTS = Path(__file__).parent / "weights"
PARTS = ("tokenizer", "diffusion", "reward", "judge")
MODELS = PARTS[1:]
CHECKSUMS = "checksums.json"


@dataclasses.dataclass(frozen=True)
class Budget:
    """How long to train. The defaults made the shipped weights; tests use a few steps."""

    diffusion_steps: int | None = None
    lm_steps: int | None = None
    reward_steps: int | None = None
    corpus: int | None = None
    tokenizer_corpus: int | None = None
    batch: int | None = None

    def arguments(self, **names: str) -> dict[str, int]:
        """Keyword arguments for a training function: those of the named fields that are set."""
        return {key: value for key, field in names.items() if (value := getattr(self, field)) is not None}


@contextlib.contextmanager
def _deterministic(threads: int) -> Iterator[None]:
    import torch

    settings = torch.utils.deterministic
    before = torch.get_num_threads(), torch.are_deterministic_algorithms_enabled(), settings.fill_uninitialized_memory
    torch.set_num_threads(threads)
    torch.use_deterministic_algorithms(True)
    # Filling every fresh buffer finds bugs in kernels and costs time; nothing here reads unwritten memory.
    settings.fill_uninitialized_memory = False
    try:
        yield
    finally:
        torch.set_num_threads(before[0])
        torch.use_deterministic_algorithms(before[1])
        settings.fill_uninitialized_memory = before[2]


def sha256(path: Path) -> str:
    """Hex digest of a file."""
    return hashlib.sha256(path.read_bytes()).hexdigest()


def _save(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, directory: Path) -> None:
    import torch

    directory.mkdir(parents=True, exist_ok=True)
    model.to(torch.bfloat16).save_pretrained(directory)
    (directory / "model.safetensors").chmod(0o644)
    _save_tokenizer(tokenizer, directory)


def _save_tokenizer(tokenizer: PreTrainedTokenizerBase, directory: Path) -> None:
    # The template inside tokenizer_config.json is read by older releases of transformers too.
    tokenizer.save_pretrained(directory, save_jinja_files=False)


def build_tokenizer(seed: int = 0, corpus: int = 30_000) -> PreTrainedTokenizerFast:
    """Train the tokenizer on ``corpus`` reviews and their prompts."""
    from .grammar import reviews
    from .tokenizer import train_tokenizer

    data = reviews(corpus, seed=seed + 1)
    return train_tokenizer([text for r in data for text in (r.prompt, r.text)])


def train_all(
    out_dir: str | os.PathLike[str],
    *,
    only: str | None = None,
    seed: int = 0,
    threads: int = 1,
    budget: Budget | None = None,
    log: Callable[[str], None] = print,
) -> dict[str, dict]:
    """Train the tokenizer and the three models, and write them as Hugging Face directories.

    Args:
        out_dir: receives ``diffusion/``, ``reward/``, ``judge/`` and ``checksums.json``.
        only: one of "tokenizer", "diffusion", "reward", "judge", or None for all. A single model uses the tokenizer
            that ``out_dir`` already holds, or trains it.
        seed: moves every seed of the run.
        threads: CPU threads; results are reproducible for a given number.
        budget: step counts other than the shipped ones.
        log: receives progress, one line at a time.

    Returns:
        What ``checksums.json`` says: per model its sha256, step counts, seeds and measured figures.

    Raises:
        ValueError: for an unknown ``only``.
    """
    if only is not None and only not in PARTS:
        raise ValueError(f"only must be one of {', '.join(PARTS)}; got {only!r}")
    # Set before transformers starts: its tokenizer warns about forks otherwise.
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    from transformers import AutoTokenizer

    from . import diffusion, reward

    out, budget = Path(out_dir), budget or Budget()
    out.mkdir(parents=True, exist_ok=True)
    path = out / CHECKSUMS
    with _deterministic(threads):
        present = [name for name in MODELS if (out / name / "tokenizer.json").exists()]
        if only in (None, "tokenizer") or not present:
            log("tokenizer")
            tokenizer = build_tokenizer(seed, **budget.arguments(corpus="tokenizer_corpus"))
            for name in MODELS:
                (out / name).mkdir(exist_ok=True)
                _save_tokenizer(tokenizer, out / name)
        else:
            tokenizer = AutoTokenizer.from_pretrained(out / present[0])
        jobs: dict[str, Callable[[], tuple]] = {
            "diffusion": lambda: diffusion.train(
                tokenizer,
                seed=seed,
                log=log,
                **budget.arguments(steps="diffusion_steps", corpus="corpus", batch="batch"),
            ),
            "reward": lambda: reward.train(
                tokenizer,
                seed=seed + 100,
                log=log,
                **budget.arguments(steps="reward_steps", lm_steps="lm_steps", corpus="corpus", batch="batch"),
            ),
            # Another seed, other texts, and another rater's taste in the labels.
            "judge": lambda: reward.train(
                tokenizer,
                seed=seed + 200,
                taste=seed + 7,
                log=log,
                **budget.arguments(steps="reward_steps", lm_steps="lm_steps", corpus="corpus", batch="batch"),
            ),
        }
        for name, job in jobs.items():
            if only not in (None, name):
                continue
            start = time.monotonic()
            model, metrics = job()
            _save(model, tokenizer, out / name)
            seconds = round(time.monotonic() - start)
            parameters = sum(p.numel() for p in model.parameters())
            log(f"{name}: {parameters} parameters, {seconds} s")
            # Read late: another process may have finished another part meanwhile.
            record = _read_record(path)
            record[name] = {
                "model.safetensors": sha256(out / name / "model.safetensors"),
                "parameters": parameters,
                **{key: round(value, 4) if isinstance(value, float) else value for key, value in metrics.items()},
                "threads": threads,
                "wall_seconds": seconds,
                "torch": _torch_version(),
                "machine": platform.machine(),
            }
            path.write_text(json.dumps(record, indent=2) + "\n")
    return _read_record(path)


def _read_record(path: Path) -> dict[str, dict]:
    return json.loads(path.read_text()) if path.exists() else {}


def _torch_version() -> str:
    import torch

    return torch.__version__.split("+")[0]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of ``entrgi tiny train``."""
    parser.add_argument(
        "--out",
        type=Path,
        default=Path("tiny-weights"),
        metavar="DIR",
        help="where to write the models (default: ./tiny-weights)",
    )
    parser.add_argument("--only", choices=PARTS, help="train one part instead of all")
    parser.add_argument("--seed", type=int, default=0, help="moves every seed of the run (default: 0)")
    parser.add_argument(
        "--threads",
        type=int,
        default=1,
        help="CPU threads; same number, same result (default: 1, as the shipped weights)",
    )


def run(args: argparse.Namespace) -> int:
    """Run ``entrgi tiny train`` with parsed arguments; returns the exit status.

    Raises:
        UsageError: no thread to train on.
    """
    if args.threads < 1:
        raise UsageError(f"--threads {args.threads}: expected at least 1")
    start = time.monotonic()
    train_all(
        args.out,
        only=args.only,
        seed=args.seed,
        threads=args.threads,
        log=lambda line: print(f"[{time.monotonic() - start:6.0f} s] {line}", flush=True),
    )
    print(f"written to {args.out}")
    return 0


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point of ``python -m entrgi.tiny.train``."""
    parser = argparse.ArgumentParser(prog="entrgi tiny train", description="Train the built-in tiny models on a CPU.")
    add_arguments(parser)
    return run(parser.parse_args(argv))


if __name__ == "__main__":
    sys.exit(main())
