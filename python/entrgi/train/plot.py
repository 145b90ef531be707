"""``entrgi plot``: the reward curves of training runs in one picture."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from ..errors import UsageError, check_writable
from ..statistics import estimate
from . import records

# Okabe and Ito's colours: told apart by everyone, and in this order at first sight.
_COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Flags of ``entrgi plot``."""
    parser.description = (
        "Draw the curves of training runs: the mean over held-out prompts with its 95%% interval, or any logged figure."
    )
    parser.add_argument(
        "runs", nargs="+", metavar="RUN", help="output folders of `entrgi train`; NAME=FOLDER names one"
    )
    parser.add_argument("-o", "--output", default="training.png", metavar="FILE", help=".png, .svg or .pdf")
    parser.add_argument(
        "--metric",
        default="reward",
        help="of held-out prompts (reward, length, terminated, judge), else of the log (loss, kl, log_prob, ...)",
    )
    parser.add_argument(
        "--log", action="store_true", help="take the metric from the log of training, not held-out prompts"
    )
    parser.add_argument("--title", help="default: none")
    parser.add_argument("--traceback", action="store_true", help="show where an error came from")


def run(args: argparse.Namespace) -> int:
    """Draw as asked.

    Returns:
        0 when the picture is written.

    Raises:
        UsageError: a folder without a run, a metric that none has, matplotlib missing.
    """
    output = Path(args.output)
    check_writable(output)
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise UsageError("plots need matplotlib: pip install 'entrgi_kernels[train]'") from None
    figure = Figure(figsize=(7, 4.2), layout="constrained")
    axes = figure.add_subplot()
    held_out = False
    for place, text in enumerate(args.runs):
        label, steps, means, errors = curve(text, args.metric, args.log)
        colour = _COLOURS[place % len(_COLOURS)]
        held_out |= any(errors)
        axes.plot(steps, means, color=colour, label=label, marker="o" if any(errors) else None, markersize=4)
        if any(errors):
            low, high = ([m + s * 1.96 * e for m, e in zip(means, errors, strict=True)] for s in (-1, 1))
            axes.fill_between(steps, low, high, color=colour, alpha=0.15, linewidth=0)
    axes.set_xlabel("optimiser step")
    name = args.metric.replace("_", " ")
    axes.set_ylabel(f"{name} of unguided samples, held-out prompts" if held_out else name)
    if args.title:
        axes.set_title(args.title)
    axes.grid(alpha=0.3)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False)
    try:
        figure.savefig(output, dpi=150)
    except ValueError as error:
        raise UsageError(f"cannot write {output}: {error}") from error
    print(f"wrote {output}")
    return 0


def curve(text: str, metric: str, log: bool = False) -> tuple[str, list[int], list[float], list[float]]:
    """(label, steps, means, standard errors) of a run; the errors are 0 for figures of the log.

    Args:
        text: the run's folder, or NAME=FOLDER.
        metric: of the evaluations, else of the log.
        log: take the log even where the evaluations have the metric.

    Raises:
        UsageError: no run there, or no such metric in it.
    """
    name, equals, folder = text.rpartition("=")
    path = Path(folder)
    evaluations, logged = records.read(path, records.EVALUATIONS), records.read(path, records.LOG)
    if not evaluations and not logged:
        raise UsageError(f"{path} holds no training run: expected a folder with {records.LOG}")
    label = name if equals else _method(path) or path.name
    if not log and any(metric in record for record in evaluations):
        points = [(record["step"], estimate(record[metric])) for record in evaluations if metric in record]
        return label, [s for s, _ in points], [e.mean for _, e in points], [e.error or 0.0 for _, e in points]
    points = [(record["step"], record[metric]) for record in logged if type(record.get(metric)) in (int, float)]
    if not points:
        known = sorted({k for record in evaluations + logged for k in record} - {"step"})
        raise UsageError(f"{path} has no metric {metric!r}: expected one of {', '.join(known)}")
    return label, [s for s, _ in points], [v for _, v in points], [0.0] * len(points)


def _method(path: Path) -> str | None:
    try:
        return str(json.loads((path / "run.json").read_text(encoding="utf-8"))["method"])
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return None
