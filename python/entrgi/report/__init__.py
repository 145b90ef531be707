"""One self-contained HTML page about a comparison: replay of the denoising, curves, tables, texts, settings.

The page needs no network (its content security policy forbids any) and no server. Data go in as JSON inside a script
element, with every ``<`` escaped, and reach the document as text nodes only, so no prompt can become markup.
"""

from __future__ import annotations

import html
import json
import math
from collections.abc import Iterable, Sequence
from importlib import resources
from pathlib import Path
from typing import TYPE_CHECKING, Any

from entrgi_kernels.names import METHODS

from ..comparison import EXPLAINED, METRICS, TINY_NOTE, Comparison
from ..errors import write_text
from ..prompts import prompt_text

if TYPE_CHECKING:
    from entrgi_kernels.guidance.results import StepTrace

TITLE = "EntRGi: a diffusion language model, steered"
HEADING = "A diffusion language model, steered by a reward model"
# A report loads nothing and is sent nowhere.
POLICY = (
    "default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'; base-uri 'none'; form-action 'none'"
)
# Replays grow with steps x slots; beyond this many numbers only the best samples are replayed, then fewer prompts.
REPLAY_BUDGET = 1_500_000


def write_report(path: Path, comparison: Comparison, tokenizer: Any) -> int:
    """Write the page of a comparison that was run with traces.

    Args:
        path: the HTML file.
        comparison: of :func:`entrgi.compare.compare`; samples without a trace are listed but not replayed.
        tokenizer: the diffusion model's, which turns token ids into text.

    Returns:
        The size of the file in bytes.

    Raises:
        UsageError: when the file cannot be written.
    """
    page = build_page(payload(comparison, tokenizer))
    write_text(path, page)
    return len(page.encode())


def build_page(data: dict[str, Any], section: str = "", **parts: str) -> str:
    """The page around ``data``: template, style and script are files of this package.

    Args:
        data: of :func:`payload`.
        section: markup of an evaluation, which comes first and takes the place of the table of results.
        parts: of the template, in place of a report's own; ``entrgi serve`` makes its page of them.
    """
    template = _asset("page.html")
    parts = {
        "policy": POLICY,
        "title": html.escape(data["title"]),
        "heading": html.escape(data["heading"]),
        "section": section,
        "first": "evaluation" if section else "results",
        "results": " hidden" if section else "",
        "style": page_style(),
        "methods": _methods(),
        "script": page_script(),
        "data": embed(data),
    } | parts
    # One pass over the template, so that nothing inside a part is taken for a placeholder.
    pieces = template.split("{{")
    out = [pieces[0]]
    for piece in pieces[1:]:
        name, rest = piece.split("}}", 1)
        out += [parts[name.strip()], rest]
    return "".join(out)


def page_style() -> str:
    """The style sheet of a page, with the methods' colours by theme."""
    return _colours() + _asset("style.css")


def page_script() -> str:
    """The program of a page. It draws the page's data where these are a :func:`payload`; else it waits to be called."""
    return _asset("charts.js") + "\n" + _asset("app.js")


def embed(data: Any) -> str:
    """JSON that is safe inside a script element: no ``<``, ``>``, ``&``, and no line separators of JavaScript."""
    text = json.dumps(data, ensure_ascii=False, allow_nan=False, separators=(",", ":"))
    for character in "<>&\u2028\u2029":
        text = text.replace(character, f"\\u{ord(character):04x}")
    return text


def payload(comparison: Comparison, tokenizer: Any) -> dict[str, Any]:
    """What the page's script reads; plain JSON values only."""
    settings = comparison.settings
    traces, strings = _replays(comparison, tokenizer)
    names = [name for name in METRICS if all(name in run.metrics for run in comparison.runs)]
    levels = [h for per_method in traces.values() for t in _flat(per_method) if t for step in t["h"] for h in step]
    return {
        "title": TITLE,
        "heading": HEADING,
        "lead": _lead(comparison),
        "note": " ".join([*([TINY_NOTE] if settings.get("tiny") else []), *comparison.notes()]),
        "footer": f"{comparison.verdict()[1]}. Written by entrgi compare",
        "samplesPerPrompt": settings["num_samples"],
        "top": max(0.5, math.ceil(max(levels, default=100) / 50) / 2),  # nats at the end of the colour scale
        "methods": [
            {
                "key": run.key,
                "label": run.label,
                "color": f"var(--{run.method if run.method in METHODS else 'accent'})",
                "seconds": round(run.seconds, 2),
                "estimates": {name: value.to_dict() for name, value in run.estimates().items() if name in names},
            }
            for run in comparison.runs
        ],
        "metrics": [
            {"key": name, "label": METRICS[name], "about": EXPLAINED[name], "lower": name == "nats"} for name in names
        ],
        "differences": [
            {"a": a.label, "b": b.label, "values": {name: d[name].to_dict() for name in names}}
            for a, b, d in comparison.differences()
        ],
        "prompts": [prompt_text(prompt) for prompt in comparison.prompts],
        "samples": {run.key: [_samples(result) for result in run.results] for run in comparison.runs},
        "traces": traces,
        "strings": strings,
        "eos": tokenizer.eos_token_id,
        "settings": [[name.replace("_", " "), _plain(value)] for name, value in settings.items()],
    }


def _lead(comparison: Comparison) -> str:
    base, ours = comparison.run_of("none"), comparison.run_of("entrgi")
    s = comparison.settings
    count = f"{s['prompts']} prompt" + "s" * (s["prompts"] != 1)
    pairs = comparison.differences()
    difference = next((d["top1"] for a, b, d in pairs if a is ours and b is base), None)
    if not base or not ours or not difference or not difference.n:
        return f"{count}, {s['num_samples']} samples each, under {', '.join(run.label for run in comparison.runs)}."
    margin = "" if difference.error is None else f" ± {difference.error:.2f}"
    return (
        f"Over {count}, the best of {s['num_samples']} unguided samples earns a mean reward of "
        f"{base.estimates()['top1'].mean:.2f}. With the reward model steering every denoising step, the best of "
        f"{s['num_samples']} earns {ours.estimates()['top1'].mean:.2f}: "
        f"a paired difference of {difference.mean:+.2f}{margin}."
    )


def _samples(result: Any) -> list[dict[str, Any]]:
    best = result.best if result.rewarded else None
    return [{"text": s.text, "reward": _number(s.reward), "best": s is best} for s in result.samples]


def _replays(comparison: Comparison, tokenizer: Any) -> tuple[dict[str, list[list[Any]]], dict[str, str]]:
    """(traces by method, prompt and sample; text of every token that occurs)."""
    used: set[int] = set()
    budget = REPLAY_BUDGET
    cost = max((_cost(s) for run in comparison.runs for r in run.results for s in r.samples), default=0)
    everything = sum(len(r.samples) for run in comparison.runs for r in run.results) * cost <= REPLAY_BUDGET
    traces: dict[str, list[list[Any]]] = {run.key: [] for run in comparison.runs}
    for index in range(len(comparison.prompts)):
        for run in comparison.runs:
            result = run.results[index]
            best = result.best if result.rewarded else result.samples[0]
            row: list[Any] = []
            for sample in result.samples:
                wanted = sample.trace and (everything or sample is best) and budget > 0
                row.append(_compact(sample.trace) if wanted else None)
                if wanted:
                    budget -= _cost(sample)
                    used.update(row[-1]["tokens"])
            traces[run.key].append(row)
    return traces, {str(token): token_text(tokenizer, token) for token in sorted(used)}


def _cost(sample: Any) -> int:
    return len(sample.trace) * len(sample.trace[0].tokens) if sample.trace else 0


def compact_step(step: StepTrace) -> dict[str, Any]:
    """One step as a page reads it: plain JSON values, numbers of the slots alone that were masked before it.

    Returns:
        "tokens", of all slots; "committed", slots; "h" and "w", entropies in hundredths of a nat and weights in
        hundredths, of the masked slots in order; "reward", "before" and "after", None where there is none.
    """
    masked = [slot for slot, value in enumerate(step.entropy) if value is not None]
    return {
        "tokens": list(step.tokens),
        "committed": list(step.committed),
        "h": [_hundredths(step.entropy[slot]) for slot in masked],
        "w": [_hundredths(step.weight[slot]) for slot in masked],  # None throughout without guidance
        "reward": _number(step.reward),
        "before": _number(step.reward_before),
        "after": _number(step.reward_after),
    }


def _compact(trace: Sequence[StepTrace]) -> dict[str, Any]:
    """A trace without its redundancy: the last tokens and when each slot was committed, and numbers step by step."""
    steps = [compact_step(step) for step in trace]
    at = [-1] * len(steps[-1]["tokens"])
    for index, step in enumerate(steps):
        for slot in step["committed"]:
            at[slot] = index
    flat = {value for step in steps for value in step["w"]}
    return {
        "tokens": steps[-1]["tokens"],
        "at": at,
        # Unless the method has a weight that varies, one number says it.
        "w": [step["w"] for step in steps] if len(flat) > 1 else next(iter(flat), 0),
        **{name: [step[name] for step in steps] for name in ("h", "reward", "before", "after")},
    }


def _hundredths(value: float | None) -> int:
    return round(100 * value) if value is not None and math.isfinite(value) else 0


def _number(value: float | None) -> float | None:
    return round(float(value), 3) if value is not None and math.isfinite(value) else None


def token_text(tokenizer: Any, token: int) -> str:
    """What a page shows of a token."""
    return tokenizer.decode([token], skip_special_tokens=False)


def _plain(value: Any) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    return "off" if value is None else str(value)


def _flat(rows: Iterable[Iterable[Any]]) -> Iterable[Any]:
    return (item for row in rows for item in row)


def _colours() -> str:
    """The methods' colours as CSS variables, by theme."""
    light = " ".join(f"--{name}: {method.light};" for name, method in METHODS.items())
    dark = " ".join(f"--{name}: {method.dark};" for name, method in METHODS.items())
    return f':root {{ {light} }}\n:root[data-theme="dark"] {{ {dark} }}\n'


def _methods() -> str:
    """What differs between the methods, as entries of a list of definitions; the paper's own first."""
    entries = [(html.escape(method.label), html.escape(method.about)) for method in reversed(METHODS.values())]
    return "\n".join(f"    <dt>{label}</dt><dd>{about}</dd>" for label, about in entries)


def _asset(name: str) -> str:
    return resources.files(__package__).joinpath(name).read_text(encoding="utf-8")
