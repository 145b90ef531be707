"""Pictures of an evaluation with matplotlib: reward against compute, and histograms of rewards.

Inside a page they are SVG whose colours are the page's CSS variables, so that they follow its theme; as files they are
whatever matplotlib writes.
"""

from __future__ import annotations

import collections
import io
import re
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from entrgi_kernels.names import METHODS, SEARCHES

from ..errors import UsageError, require

if TYPE_CHECKING:
    from ..evaluate.analysis import Results, Row, Slice

# Colours that a page replaces by its variables; in files they are what is seen.
_INK, _LINE = "#1c1b22", "#e2ded6"
_MORE = (
    "#8f3f97",
    "#a58200",
    "#c0392b",
    "#3d6b9e",
    "#5d8a1f",
    "#7a5230",
    "#b0457b",
    "#2a8c8c",
    "#666f00",
    "#44506b",
    "#d07a9a",
    "#4f7f5f",
    "#9c5d2e",
    "#7c6fd0",
)
_MOST_BANDS = 6  # rows; beyond that bands hide each other
_VARIABLES = {_INK: "--ink", _LINE: "--line", **{method.light: f"--{name}" for name, method in METHODS.items()}}
_STYLE = {
    "font.size": 10,
    "font.family": ["DejaVu Sans"],
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.edgecolor": _LINE,
    "axes.labelcolor": _INK,
    "axes.titlesize": 10,
    "axes.titlecolor": _INK,
    "text.color": _INK,
    "xtick.color": _INK,
    "ytick.color": _INK,
    "axes.grid": True,
    "grid.color": _LINE,
    "grid.linewidth": 0.6,
    "legend.frameon": False,
    "svg.hashsalt": "entrgi",
    "figure.facecolor": "none",
    "axes.facecolor": "none",
}


def figures_of(results: Results) -> Iterator[tuple[Slice, str, str, Any]]:
    """(slice, name, what it shows, matplotlib figure), the pictures of every slice in order."""
    matplotlib = require("matplotlib", "a report's pictures", "evaluate")
    from matplotlib.figure import Figure

    for part in results.slices:
        colors = _colors(part.rows)
        with matplotlib.rc_context(_STYLE):
            units = [unit for unit in ("seconds", "flops") if any(getattr(row, unit) for row in part.rows)]
            if units:
                figure = Figure(figsize=(4.9 * len(units), 3.9), layout="constrained")
                for axes, unit in zip(figure.subplots(1, len(units), squeeze=False)[0], units, strict=True):
                    _curves(axes, part, unit, colors)
                _legend(figure, axes)
                caption = (
                    "Expected highest reward of n samples against what n samples of a prompt cost, n from 1 to all"
                )
                caption += " that were drawn"
                if not all(SEARCHES[row.search].independent for row in part.rows):
                    caption += " (particles of one search: all together)"
                caption += "; bands: 95% bootstrap intervals over prompts." if len(part.rows) <= _MOST_BANDS else "."
                yield part, "reward-compute", caption, figure
            figure = Figure(figsize=(9.8, 3.6), layout="constrained")
            left, right = figure.subplots(1, 2)
            _histogram(left, part, colors, "all samples", lambda row: row.all_rewards)
            _histogram(right, part, colors, "best of each prompt's samples", lambda row: row.metrics["top1"].values())
            _legend(figure, left)
            yield part, "histogram", "Rewards of all samples, and of the best sample of each prompt.", figure


def svg(figure: Any) -> str:
    """A figure as an SVG element that takes its colours from the page."""
    import matplotlib

    buffer = io.StringIO()
    with matplotlib.rc_context({**_STYLE, "svg.fonttype": "none"}):
        figure.savefig(buffer, format="svg", metadata={"Date": None, "Creator": None, "Format": None, "Type": None})
    text = buffer.getvalue()
    text = text[text.index("<svg") :]
    text = re.sub(r"<metadata>.*?</metadata>", "", text, flags=re.DOTALL)
    text = re.sub(r'<svg [^>]*?viewBox="([^"]*)"[^>]*>', r'<svg viewBox="\1" role="img" class="figure">', text, count=1)
    text = text.replace("xlink:href", "href")
    for color, variable in _VARIABLES.items():
        text = text.replace(color, f"var({variable})")
    return text


def save(figure: Any, path: Path) -> None:
    """Write a figure; the suffix says how.

    Raises:
        UsageError: when the file cannot be written.
    """
    import matplotlib

    try:
        with matplotlib.rc_context(_STYLE):
            dated = {"CreationDate": None} if path.suffix == ".pdf" else {"Date": None} if path.suffix == ".svg" else {}
            figure.savefig(path, dpi=160, facecolor="white", metadata=dated)
    except OSError as error:
        raise UsageError(f"cannot write {path}: {error.strerror or error}") from None


def _colors(rows: list[Row]) -> dict[str, str]:
    """A colour for every label: the methods have theirs, and the only one with a search its method's."""
    spare = iter(_MORE * (1 + len(rows) // len(_MORE)))
    own = {method.label: method.light for method in METHODS.values()}
    searched = collections.Counter((row.method, row.search) for row in rows if row.search != "best")
    own |= {row.label: METHODS[row.method].light for row in rows if searched[row.method, row.search] == 1}
    return {row.label: own.get(row.label) or next(spare) for row in rows}


def _curves(axes: Any, part: Slice, unit: str, colors: dict[str, str]) -> None:
    from matplotlib import ticker

    from ..statistics import bootstrap_interval

    for row in part.rows:
        cost = getattr(row, unit)
        if not cost or not row.best_of(1):
            continue
        kind = SEARCHES[row.search]
        counts = _counts(row.samples) if kind.independent else [row.samples]
        values = [list(row.best_of(n).values()) for n in counts]
        means = [sum(v) / len(v) for v in values]
        x = [cost * n for n in counts]
        color = colors[row.label]
        style = {"linestyle": kind.line, "marker": kind.marker, "markersize": 4, "linewidth": 1.6}
        axes.plot(x, means, color=color, label=row.label, **style)
        bounds = [bootstrap_interval(v, resamples=2000) for v in values] if len(part.rows) <= _MOST_BANDS else [None]
        if all(bounds):
            axes.fill_between(x, *zip(*bounds, strict=True), color=color, alpha=0.13, linewidth=0)
    axes.set_xscale("log")
    axes.xaxis.set_major_locator(ticker.LogLocator(subs=(1.0, 2.0, 5.0)))
    axes.xaxis.set_major_formatter(ticker.EngFormatter(unit="s" if unit == "seconds" else ""))
    axes.xaxis.set_minor_formatter(ticker.NullFormatter())
    axes.set_xlabel("time per prompt" if unit == "seconds" else "FLOPs per prompt")
    axes.set_ylabel("reward of the best sample")


def _counts(samples: int) -> list[int]:
    """1, 2, 4, ... and all."""
    return [*(n for n in (1 << i for i in range(samples.bit_length())) if n < samples), samples]


def _histogram(axes: Any, part: Slice, colors: dict[str, str], title: str, values_of: Any) -> None:
    import math

    from ..statistics import finite

    values = {row.label: finite(values_of(row)) for row in part.rows}
    lines = {row.label: SEARCHES[row.search].line for row in part.rows}
    everything = [v for some in values.values() for v in some]
    if not everything:
        return
    low, high = min(everything), max(everything)
    count = max(5, min(30, round(math.sqrt(max(map(len, values.values())))) * 2))
    edges = [low + (high - low or 1.0) * i / count for i in range(count + 1)]
    for label, some in ((label, some) for label, some in values.items() if some):
        # Shares, not counts: best-of-N has more samples.
        axes.hist(some, bins=edges, weights=[1 / len(some)] * len(some), histtype="step", linewidth=1.6,
                  color=colors[label], linestyle=lines[label], label=label)  # fmt: skip
    axes.set_title(title)
    axes.set_xlabel("reward")
    axes.set_ylabel("share")


def _legend(figure: Any, axes: Any) -> None:
    handles, labels = axes.get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=min(4, len(labels)), fontsize=9)
