"""Reports of evaluations: one self-contained page, or Markdown and LaTeX with pictures beside them."""

from __future__ import annotations

import re
from collections.abc import Sequence
from importlib import resources
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..comparison import TINY_NOTE, Comparison, MethodRun
from ..errors import UsageError, check_writable, write_text
from ..evaluate.analysis import Results, Row
from ..evaluate.render import INTERVALS, as_latex, as_markdown, tables_of
from ..tables import LABELS, latex
from . import build_page, payload
from .figures import figures_of, save, svg

if TYPE_CHECKING:
    from entrgi_kernels.guidance.results import GenerationResult

FORMS = (".html", ".md", ".tex")
_TEXTS = 8  # prompts whose texts a page shows when none was recorded


def write_reports(results: Results, paths: Sequence[Path]) -> list[Path]:
    """Write reports; the suffix of each path says which form.

    Pictures of a .md or .tex file go into a folder NAME_files beside it (PNG, PDF).

    Returns:
        The files that were asked for, as written.

    Raises:
        UsageError: another suffix, or a file that cannot be written.
    """
    for path in paths:
        if path.suffix not in FORMS:
            raise UsageError(f"cannot write {path}: a report's name ends in one of {', '.join(FORMS)}")
        check_writable(path)
    for path in paths:
        write_text(path, {".html": _page, ".md": _markdown, ".tex": _tex}[path.suffix](results, path))
    return list(paths)


def _markdown(results: Results, path: Path) -> str:
    lines = [f"# {results.title}", "", _about(results)]
    if results.missing:
        lines += ["", f"Not finished: {results.missing} samples are missing."]
    lines += as_markdown(results)
    for title, caption, file in _picture_files(results, path, ".png"):
        lines += ["", f"![{title}: {caption}]({file.parent.name}/{file.name})"]
    return "\n".join(lines) + "\n"


def _tex(results: Results, path: Path) -> str:
    lines = [f"% {results.title}. Needs \\usepackage{{booktabs,graphicx}}.", f"% {_about(results)}"]
    lines += as_latex(results)
    for title, caption, file in _picture_files(results, path, ".pdf"):
        lines += [
            "",
            r"\begin{figure}[t]",
            r"\centering",
            rf"\includegraphics[width=\linewidth]{{{file.parent.name}/{file.name}}}",
            rf"\caption{{{latex(f'{title}: {caption}')}}}",
            r"\end{figure}",
        ]
    return "\n".join(lines) + "\n"


def _picture_files(results: Results, path: Path, suffix: str) -> list[tuple[str, str, Path]]:
    folder = path.with_name(f"{path.stem}_files")
    try:
        folder.mkdir(exist_ok=True)
    except OSError as error:
        raise UsageError(f"cannot write {folder}: {error.strerror or error}") from None
    out = []
    for part, name, caption, figure in figures_of(results):
        place = re.sub(r"[^\w.]+", "-", f"{name}-{part.dataset}-{part.reward}-{part.temperature:g}").strip("-")
        file = folder / f"{place}{suffix}"
        save(figure, file)
        out.append((part.title, caption, file))
    return out


def _page(results: Results, path: Path) -> str:
    from jinja2 import Environment
    from markupsafe import Markup

    figures: dict[int, list[dict[str, Any]]] = {}
    for part, _, caption, figure in figures_of(results):
        figures.setdefault(id(part), []).append({"caption": caption, "svg": Markup(svg(figure))})
    template = Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True).from_string(
        resources.files(__package__).joinpath("evaluation.html").read_text(encoding="utf-8")
    )
    parts = [
        {"title": part.title, "tables": tables, "figures": figures.get(id(part), [])}
        for part, tables in tables_of(results)
    ]
    section = template.render(parts=parts, missing=results.missing, intervals=INTERVALS)
    comparison = _replay(results)
    data = payload(comparison, tokenizer_of(results))
    data |= {
        "title": f"Evaluation: {results.title}",
        "heading": f"Evaluation: {results.title}",
        "lead": _about(results),
        "note": TINY_NOTE if results.headers[0]["config"]["model"] == "tiny" else "",  # the tables say what is left out
        "footer": "Written by entrgi report",
    }
    return build_page(data, section)


def _replay(results: Results) -> Comparison:
    """The recorded prompts of the first slice that has any, else the first prompts' texts."""
    recorded = {key.rsplit("-", 1)[0] for key in results.traces}
    part = next(
        (s for s in results.slices if any(_place(r) in recorded for row in s.rows for r in row.records)),
        results.slices[0],
    )
    seed = results.configs[0].seeds[0]
    prompts: dict[str, Any] = {}
    for record in part.rows[0].records:
        if record["seed"] == seed and (not recorded or _place(record) in recorded):
            prompts.setdefault(record["key"].split("-")[1], record["prompt"])
    chosen = list(prompts) if recorded else list(prompts)[:_TEXTS]
    runs = []
    for row in part.rows:
        found = [_result(row, prompt, seed, results.traces) for prompt in chosen]
        if all(found):
            metrics = {"top1": [r.top1 for r in found], "avg": [r.mean for r in found]}
            key = next((name for name, label in LABELS.items() if label == row.label), row.label)
            runs.append(MethodRun(key, found, (row.seconds or 0.0) * row.samples * len(found), metrics))
    header = results.headers[0]
    settings = {
        "model": header["config"]["model"],
        "reward": part.reward,
        "dataset": part.dataset,
        "seeds": ", ".join(map(str, results.configs[0].seeds)),
        **{k: v for k, v in part.rows[-1].settings.items() if k not in ("method", "weight", "seed", "num_samples")},
        "num_samples": max(row.samples for row in part.rows),
        "prompts": len(chosen),
        "tiny": header["config"]["model"] == "tiny",
        **header["versions"],
    }
    return Comparison([prompts[key] for key in chosen], runs, settings)


def _result(row: Row, prompt: str, seed: int, traces: dict[str, Any]) -> GenerationResult | None:
    from entrgi_kernels.guidance.config import GuidanceConfig
    from entrgi_kernels.guidance.results import GenerationResult, Sample, StepTrace

    records = [r for r in row.records if r["seed"] == seed and r["key"].split("-")[1] == prompt]
    if len(records) < row.samples:
        return None
    samples = []
    for record in sorted(records, key=lambda r: r["sample"]):
        steps = traces.get(record["key"])
        reward = float("nan") if record["reward"] is None else record["reward"]
        trace = None if steps is None else [StepTrace(**step) for step in steps]
        samples.append(Sample(record["text"], record["tokens"], reward, trace))
    return GenerationResult(records[0]["prompt"], samples, GuidanceConfig())


def _place(record: dict[str, Any]) -> str:
    return record["key"].rsplit("-", 1)[0]


class _NoTokenizer:
    """Stands in where nothing was recorded, so that no tokenizer has to be fetched."""

    eos_token_id = None


def tokenizer_of(results: Results) -> Any:
    """The diffusion model's tokenizer; only recorded denoising needs it."""
    config = results.configs[0]
    if not results.traces:
        return _NoTokenizer()
    if config.model == "tiny":
        from .. import tiny

        return _auto_tokenizer(str(tiny.weights_path("diffusion")), False)
    return _auto_tokenizer(config.model, config.trust_remote_code)


def _auto_tokenizer(name: str, trust_remote_code: bool) -> Any:
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(name, trust_remote_code=trust_remote_code)
    except (OSError, ValueError) as error:
        reason = " ".join(str(error).split())[:200]
        raise UsageError(f"the page replays tokens, but the tokenizer of {name} cannot be loaded: {reason}") from None


def _about(results: Results) -> str:
    rows = [row for part in results.slices for row in part.rows]
    header = results.headers[0]
    seeds = {seed for config in results.configs for seed in config.seeds}
    return (
        f"{len(set(row.label for row in rows))} methods on {', '.join(dict.fromkeys(row.dataset for row in rows))}, "
        f"{len(seeds)} seed{'s' * (len(seeds) != 1)}, {sum(len(row.records) for row in rows)} samples; "
        f"diffusion model {header['config']['model']}, reward model "
        f"{', '.join(dict.fromkeys(row.reward for row in rows))}."
    )
