"""``entrgi compare``: the same prompts under every method, side by side."""

from __future__ import annotations

import argparse
import itertools
import json
import math
import shutil
import sys
import textwrap
import time
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from entrgi_kernels.names import METHODS, SEARCHES

from . import flags, loading
from .comparison import EXPLAINED, METRICS, TINY_NOTE, Comparison, MethodRun
from .errors import UsageError, check_writable, write_text
from .prompts import Prompt, prompt_text, read_placed
from .prompts import add_arguments as add_prompt_arguments
from .report import write_report
from .tables import text_table

if TYPE_CHECKING:
    from entrgi_kernels import GuidedSampler
    from entrgi_kernels.guidance.config import GuidanceConfig
    from entrgi_kernels.guidance.results import GenerationResult

_SHORT = 4  # prompts of --short


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Flags of ``entrgi compare``."""
    parser.description = (
        f"Run the same prompts under {', '.join(method.label for method in METHODS.values())}. "
        "Exit code 1: a guided method is not above best-of-N."
    )
    add_prompt_arguments(parser, "the tiny models' own")
    parser.add_argument(
        "-n",
        "--num-prompts",
        type=int,
        default=None,
        metavar="N",
        help="how many prompts (default: all that are given; 24 of the tiny models' own)",
    )
    parser.add_argument(
        "--methods", default=",".join(METHODS), metavar="LIST", help="comma-separated (default: %(default)s)"
    )
    parser.add_argument(
        "--searches", metavar="LIST", help=f"beside each, comma-separated: {', '.join(SEARCHES)} (default: --search)"
    )
    parser.add_argument("--short", action="store_true", help="a few prompts only: a check in seconds")
    parser.add_argument("--no-check", action="store_true", help="exit code 0 even when guidance does not help")
    group = parser.add_argument_group("output")
    group.add_argument("--report", metavar="FILE.html", help="one page that replays the denoising; needs no network")
    group.add_argument("--json", metavar="FILE", help="all settings, texts, rewards and statistics")
    group.add_argument("--texts", type=int, default=3, metavar="N", help="prompts whose texts are shown (default: 3)")
    group.add_argument("--quiet", action="store_true", help="no progress bar")
    group.add_argument("--traceback", action="store_true", help="show where an error came from")
    flags.add_sampler_arguments(parser, method=False, steps_help="16 with the tiny models, else one per slot")
    flags.add_model_arguments(parser)


def run(args: argparse.Namespace) -> int:
    """Compare as asked.

    Returns:
        0; 1 when a guided method is not above best-of-N.

    Raises:
        UsageError: for bad input; the command line turns it into one line and exit code 2.
    """
    tiny = loading.uses_tiny(args)
    methods = _names("--methods", args.methods, METHODS)
    searches = _names("--searches", args.searches or args.search, SEARCHES)
    if args.steps is None and tiny:
        args.steps = 16
    for method in methods:  # each is checked before anything is loaded
        # EntRGi's weight may be given; the other methods are weights themselves.
        weight = args.weight if method == "entrgi" else None
        config = loading.config_from(argparse.Namespace(**{**vars(args), "weight": weight}), tiny=tiny, method=method)
    config = config.replace(method="entrgi", weight=args.weight)
    placed = _prompts(args, tiny)
    prompts = [prompt for _, prompt in placed]
    for name in (args.report, args.json):
        if name:
            check_writable(Path(name))

    start = time.perf_counter()
    print(f"loading {loading.TINY if tiny else args.model} ...", file=sys.stderr, flush=True)
    loaded = loading.load(args, judge=True)
    loading.check_prompts(prompts, loaded, lambda index: placed[index][0])
    comparison = compare(
        loaded, prompts, methods, config, searches=searches, trace=bool(args.report), progress=not args.quiet
    )
    comparison.settings["total_seconds"] = round(time.perf_counter() - start, 1)
    if hasattr(sys.stdout, "reconfigure"):  # a terminal without a plus-minus sign shows a question mark
        sys.stdout.reconfigure(errors="replace")
    print(render(comparison, texts=args.texts))
    print()
    if args.json:
        write_text(Path(args.json), json.dumps(comparison.to_dict(), ensure_ascii=False, allow_nan=False, indent=1))
        print(f"wrote {args.json}")
    if args.report:
        size = write_report(Path(args.report), comparison, loaded.tokenizer)
        print(f"wrote {args.report} ({size / 1e6:.1f} MB): open it in a browser to replay the denoising")
    passed, sentence = comparison.verdict()
    print(f"{sentence}; {comparison.settings['total_seconds']:.0f} s in all")
    return 1 if passed is False and not args.no_check else 0


def compare(
    loaded: loading.Loaded,
    prompts: Sequence[Prompt],
    methods: Sequence[str],
    config: GuidanceConfig,
    *,
    searches: Sequence[str] | None = None,
    trace: bool = False,
    progress: bool = False,
) -> Comparison:
    """Run ``methods`` on ``prompts`` under ``config``.

    Args:
        loaded: models; a judge and the rule score are used where they are there.
        prompts: the same for every method; each method also starts from the same random numbers.
        methods: names out of :data:`entrgi_kernels.names.METHODS`.
        config: settings; its method is replaced.
        searches: names out of :data:`entrgi_kernels.names.SEARCHES`, each run with every method; None is the setting's.
        trace: keep every step of the samples, for the report (a reward forward more at each step).
        progress: bars on standard error, where it is a terminal.
    """
    from tqdm import tqdm

    prompts = list(prompts)
    runs = []
    pairs = list(itertools.product(methods, searches or [config.search]))
    hide = None if progress else True  # None: hidden where standard error is no terminal
    with tqdm(total=len(pairs), unit="method", desc="compare", leave=False, disable=hide) as bar:
        for method, search in pairs:
            # EntRGi's weight may be given; the other methods are weights themselves.
            chosen = config.replace(method=method, search=search, weight=config.weight if method == "entrgi" else None)
            sampler = loading.make_sampler(loaded, chosen)
            begin = time.perf_counter()
            results: dict[int, Any] = {}
            for index, result in loading.stream(sampler, prompts, trace=trace, progress=None if progress else False):
                results[index] = result
            seconds = time.perf_counter() - begin
            ordered = [results[index] for index in range(len(prompts))]
            runs.append(MethodRun(method, ordered, seconds, measure(loaded, sampler, prompts, ordered), search))
            bar.update()
    about = {
        "prompts": len(prompts),
        "model": loaded.model_name,
        "reward": loaded.reward_name,
        "dtype": loaded.dtype,
        "tiny": loaded.tiny,
        "traced": trace,
        **versions(),
    }
    return Comparison(
        prompts, runs, {**about, **{k: v for k, v in config.to_dict().items() if k not in ("method", "search")}}
    )


def measure(
    loaded: loading.Loaded, sampler: GuidedSampler, prompts: Sequence[Prompt], results: Sequence[GenerationResult]
) -> dict[str, list[float]]:
    """Every metric that these models allow, one number per prompt."""
    metrics = {"top1": [float(result.top1) for result in results], "avg": [float(result.mean) for result in results]}
    # What is asked of the best sample has no answer for a prompt without any reward.
    places = [place for place, result in enumerate(results) if result.rewarded]
    best, prompts = [results[place].best for place in places], [prompts[place] for place in places]

    def whole(found: Sequence[float]) -> list[float]:
        values = dict(zip(places, map(float, found), strict=True))
        return [values.get(place, math.nan) for place in range(len(results))]

    if loaded.judge is not None:
        from entrgi_kernels import rewards
        from entrgi_kernels.text.template import conversation_from

        judge = rewards.wrap(loaded.judge, loaded.judge_tokenizer)
        texts = [sample.text for sample in best]
        asked = [conversation_from(prompt) for prompt in prompts]
        metrics["judge"] = whole(judge.score_texts(asked, texts, batch_size=64) if texts else [])
    if loaded.tiny:
        from . import tiny
        from .naturalness import nats_per_token

        metrics["rule"] = whole([tiny.gold_score(prompt_text(p), s.text) for p, s in zip(prompts, best, strict=True)])
        tokens = [sample.tokens for sample in best]
        metrics["nats"] = whole(nats_per_token(sampler.model, loaded.tokenizer, prompts, tokens))
    return metrics


def render(comparison: Comparison, *, texts: int = 3) -> str:
    """The comparison for a terminal: what was run, the tables, and some texts side by side."""
    s = comparison.settings
    out = [
        "",
        f"{s['prompts']} prompts, {s['num_samples']} samples each, {s['max_new_tokens']} slots in {s['steps']} "
        f"steps; M = {s['guidance_steps']}, eta = {s['learning_rate']}, tau = {s['temperature']}, "
        f"top-p = {s['top_p']}, seed {s['seed']}",
    ]
    if s["tiny"]:
        out.append(TINY_NOTE)
    names = [name for name in METRICS if all(name in run.metrics for run in comparison.runs)]
    head = ["method", *(METRICS[name] for name in names), "seconds"]
    rows = []
    for run in comparison.runs:
        values = run.estimates()
        rows.append([run.label, *(str(values[name]) for name in names), f"{run.seconds:.1f}"])
    out += ["", "mean over prompts ± standard error", *text_table(head, rows)]
    differences = comparison.differences()
    if differences:
        rows = [[f"{a.label} - {b.label}", *(d[name].signed() for name in names)] for a, b, d in differences]
        out += [
            "",
            "paired differences over the same prompts ± standard error",
            *text_table(["", *(METRICS[name] for name in names)], rows),
        ]
    notes = comparison.notes()
    out += ["", *notes] if notes else []
    width = max(len(METRICS[name]) for name in names)
    out += ["", *(f"{METRICS[name].ljust(width)}  {EXPLAINED[name]}" for name in names)]
    out += _texts(comparison, texts)
    return "\n".join(out)


def _texts(comparison: Comparison, count: int) -> list[str]:
    """Best samples of the first prompts: side by side where the terminal is wide enough for two columns."""
    out: list[str] = []
    left, right = comparison.run_of("none"), comparison.run_of("entrgi")
    columns = [run for run in (left, right) if run] if left and right else comparison.runs
    total = min(shutil.get_terminal_size((100, 24)).columns, 120)
    width = (total - 3 * (len(columns) - 1)) // max(1, len(columns))
    for index in range(min(count, len(comparison.prompts))):
        prompt = " ".join(prompt_text(comparison.prompts[index]).split())
        out += ["", *textwrap.wrap(f"prompt {index + 1}: {prompt}", total)]
        cells = []
        for run in columns:
            result = run.results[index]
            best = result.best if result.rewarded else result.samples[0]
            body = " ".join(best.text.split()) or "(empty)"
            reward = f"{best.reward:+.2f}" if result.rewarded else "no reward"
            cells.append([f"{run.label}  {reward}", *textwrap.wrap(body, max(20, width))])
        if width < 30:
            out += [text for cell in cells for text in cell]
            continue
        for i in range(max(len(cell) for cell in cells)):
            out.append(" | ".join((cell[i] if i < len(cell) else "").ljust(width) for cell in cells).rstrip())
    return out


def _names(flag: str, text: str, known: Collection[str]) -> list[str]:
    names = [name.strip() for name in text.split(",") if name.strip()]
    unknown = [name for name in names if name not in known]
    if unknown or not names or len(set(names)) != len(names):
        raise UsageError(f"{flag} takes distinct names out of {', '.join(known)}, got {text!r}")
    return names


def _prompts(args: argparse.Namespace, tiny: bool) -> list[tuple[str, Prompt]]:
    if args.num_prompts is not None and args.num_prompts < 1:
        raise UsageError(f"--num-prompts must be at least 1, got {args.num_prompts}")
    if tiny and not args.prompts and not args.file:
        from . import tiny as tiny_models

        count = args.num_prompts or (_SHORT if args.short else 24)
        return [("a tiny prompt", prompt) for prompt in tiny_models.prompts(count, seed=args.seed)]
    prompts = read_placed(args.prompts, args.file, field=args.prompt_field)
    return prompts[: args.num_prompts or (_SHORT if args.short else None)]


def versions() -> dict[str, Any]:
    """What the numbers were made with."""
    import torch
    import transformers

    from . import __version__

    return {
        "entrgi_kernels": __version__,
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "threads": torch.get_num_threads(),
    }
