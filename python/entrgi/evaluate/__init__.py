"""``entrgi evaluate``: a grid of methods, models, temperatures, seeds and datasets, resumable, with its tables."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

from entrgi_kernels.names import METHODS, SEARCHES

from ..errors import UsageError, require
from .config import EvaluationConfig, presets, read_config

# Flag -> where its value goes in the configuration.
_SETTINGS = {
    "num_samples": "settings.num_samples",
    "max_new_tokens": "settings.max_new_tokens",
    "steps": "settings.steps",
    "guidance_steps": "settings.guidance_steps",
    "learning_rate": "settings.learning_rate",
    "guidance_scale": "settings.guidance_scale",
    "top_p": "settings.top_p",
    "batch_size": "settings.batch_size",
    "backend": "settings.backend",
    "model": "model",
    "rewards": "rewards",
    "methods": "methods",
    "searches": "searches",
    "temperatures": "temperatures",
    "seeds": "seeds",
    "best_of": "best_of",
    "traces": "traces",
    "device": "device",
    "dtype": "dtype",
    "trust_remote_code": "trust_remote_code",
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Flags of ``entrgi evaluate``."""
    parser.description = (
        "Run a grid of methods, reward models, temperatures, seeds and datasets, and write its tables and report. "
        "Run again after an interruption: it goes on; when all is there it only reports."
    )
    parser.add_argument(
        "config",
        nargs="?",
        default="tiny",
        metavar="CONFIG",
        help=f"a .yaml file, or one that comes with the package: {', '.join(presets())} (default: tiny)",
    )
    group = parser.add_argument_group("output")
    group.add_argument("-o", "--output", metavar="FOLDER", help="where results go (default: results/NAME)")
    group.add_argument(
        "--extend",
        action="store_true",
        help="continue results of another configuration: samples that both share are kept, the rest is run",
    )
    group.add_argument("--dry-run", action="store_true", help="show the plan, models, memory and time; run nothing")
    group.add_argument(
        "--tflops", type=float, metavar="X", help="for --dry-run: TFLOP/s that the device sustains (default: guessed)"
    )
    group.add_argument("--no-report", action="store_true", help="write no report.html and report.md into the folder")
    group.add_argument("--quiet", action="store_true", help="no progress bar")
    group.add_argument("--traceback", action="store_true", help="show where an error came from")
    parser.add_argument("--ray", type=int, metavar="N", help="run on N actors of a Ray cluster (extra: ray)")
    group = parser.add_argument_group("in place of what CONFIG says (lists are comma-separated)")
    group.add_argument("--model", metavar="PATH", help="diffusion language model: tiny, a folder or a hub name")
    group.add_argument("--rewards", type=_list, metavar="LIST", help="reward models, likewise, or verifier:NAME[=ARG]")
    group.add_argument(
        "--datasets",
        type=_list,
        metavar="LIST",
        help="names of CONFIG's datasets, tiny, files (.jsonl, .csv, .txt, ...) or hub names",
    )
    group.add_argument("-n", "--num-prompts", type=int, metavar="N", help="prompts of every dataset")
    group.add_argument("--methods", type=_list, metavar="LIST", help=", ".join(METHODS))
    group.add_argument("--searches", type=_list, metavar="LIST", help=f"beside each: {', '.join(SEARCHES)}")
    group.add_argument("--temperatures", type=_values, metavar="LIST")
    group.add_argument("--seeds", type=_values, metavar="LIST")
    group.add_argument("-K", "--num-samples", type=int, metavar="K", help="samples per prompt")
    group.add_argument("--best-of", type=_value, metavar="N", help="samples of best-of-N: a number or auto")
    group.add_argument("-L", "--max-new-tokens", type=int, metavar="L", help="slots of the response")
    group.add_argument("-T", "--steps", type=int, metavar="T", help="denoising steps")
    group.add_argument("-M", "--guidance-steps", type=int, metavar="M", help="gradient steps a denoising step")
    group.add_argument("--learning-rate", type=float, metavar="ETA")
    group.add_argument("--guidance-scale", type=float, metavar="GAMMA", help="of first_order")
    group.add_argument("--top-p", type=float)
    group.add_argument("--batch-size", type=int, metavar="B", help="prompts denoised together")
    group.add_argument("--traces", type=int, metavar="N", help="prompts of each dataset recorded for replays")
    group.add_argument("--backend", help="engine of the kernels")
    group.add_argument("--device", help="cpu, cuda, cuda:1, ... (one process per device under torchrun)")
    group.add_argument("--dtype", help="number format of the models")
    group.add_argument("--trust-remote-code", action="store_true", default=None, help="run code that comes with models")
    group.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="KEY=VALUE",
        help="any other key of the configuration, the value in YAML, as in --set settings.alg=maskgit_plus",
    )


def run(args: argparse.Namespace) -> int:
    """Evaluate as asked.

    Returns:
        0 when all samples are there.

    Raises:
        UsageError: for bad input; the command line turns it into one line and exit code 2.
    """
    if args.ray is not None and args.ray < 1:
        raise UsageError(f"--ray takes a number of actors >= 1, got {args.ray}")
    config = configure(args)
    folder = Path(args.output or f"results/{config.name}")
    from .plan import make_plan

    if not args.dry_run:  # said now, not after hours of generation
        require("scipy.stats", "an interval", "evaluate")
        if not args.no_report:
            require("matplotlib", "a report (--no-report does without)", "evaluate")
    plan = make_plan(config, dry=args.dry_run)
    if args.dry_run:
        from .estimate import describe

        print(describe(plan, folder, tflops=args.tflops))
        return 0
    from .processes import evaluate

    options = {"extend": args.extend, "progress": not args.quiet, "ray_actors": args.ray}
    if not evaluate(plan, folder, **options):
        return 0  # another process reports
    from ..report.evaluation import write_reports
    from .analysis import read_results
    from .render import as_text

    results = read_results([folder])
    print(as_text(results))
    print()
    if not args.no_report:
        for path in write_reports(results, [folder / "report.html", folder / "report.md"]):
            print(f"wrote {path}")
    print(f"results: {folder}", file=sys.stderr)
    return 0


def configure(args: argparse.Namespace) -> EvaluationConfig:
    """The configuration that the flags mean.

    Raises:
        UsageError: for what it does not accept.
    """
    overrides: dict[str, Any] = {}
    for flag, key in _SETTINGS.items():
        value = getattr(args, flag)
        if value is not None:
            overrides[key] = value
    for text in args.set:
        key, mark, value = text.partition("=")
        if not mark or not key:
            raise UsageError(f"--set takes KEY=VALUE, got {text!r}")
        try:
            overrides[key] = _value(value)
        except argparse.ArgumentTypeError as error:
            raise UsageError(f"--set {key}: {error}") from None
    if args.datasets or args.num_prompts is not None:
        overrides["datasets"] = _datasets(read_config(args.config), args.datasets, args.num_prompts)
    return read_config(args.config, overrides)


def _datasets(config: EvaluationConfig, names: list[str] | None, count: int | None) -> list[dict[str, Any]]:
    """The chosen datasets: those that the configuration knows keep its split, field and order."""
    known = {dataset["name"]: dataset for dataset in config.to_dict()["datasets"]}
    chosen = [known.get(name, {"path": name}) for name in names or known]
    return [{**entry, "num_prompts": count} if count is not None else entry for entry in chosen]


def _list(text: str) -> list[str]:
    return [part.strip() for part in text.split(",") if part.strip()]


def _value(text: str) -> Any:
    yaml = require("yaml", "reading a configuration", "evaluate")
    try:
        return yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise argparse.ArgumentTypeError(f"{text!r} is no YAML value: {' '.join(str(error).split())}") from None


def _values(text: str) -> list[Any]:
    return [_value(part) for part in _list(text)]
