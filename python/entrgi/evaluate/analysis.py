"""From samples to the numbers of the tables: metrics per prompt, intervals, paired and compute-matched differences.

A prompt that was run under several seeds counts once, with the mean over its seeds; seeds that saw other prompts add
prompts. Intervals are over prompts.
"""

from __future__ import annotations

import collections
import dataclasses
import itertools
import math
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from ..errors import UsageError
from ..jsonl import logger
from ..statistics import Estimate, best_of, bootstrap_interval, estimate, finite, number
from ..tables import missing_note
from . import diversity
from .config import EvaluationConfig, from_dict
from .flops import Shape, block_count, sample_flops, total
from .judging import best_record
from .specs import check_judges
from .store import Store

METRICS = {"top1": "Top@1", "avg": "Avg@N", **diversity.METRICS}
Prompt = str  # the key of a prompt


@dataclasses.dataclass(frozen=True)
class Figure:
    """A mean over prompts, its standard error, and its bootstrap interval at 95%."""

    estimate: Estimate
    interval: tuple[float, float] | None

    @property
    def mean(self) -> float:
        """Over prompts."""
        return self.estimate.mean

    def text(self, signed: bool = False) -> str:
        """As in "1.23 [1.01, 1.48]"."""

        def form(value: float) -> str:
            value = round(value, 2) + 0.0  # no minus before a zero
            return f"{value:+.2f}" if signed else f"{value:.2f}"

        if not self.estimate.n:
            return "–"
        interval = "" if self.interval is None else f" [{form(self.interval[0])}, {form(self.interval[1])}]"
        return f"{form(self.mean)}{interval}".replace("-", "−")


def figure(values: Iterable[float]) -> Figure:
    """The figure of one number per prompt that has one."""
    values = list(values)
    return Figure(estimate(values or [math.nan]), bootstrap_interval(values))


@dataclasses.dataclass
class Row:
    """One method on one dataset, with one reward model, at one temperature; all seeds.

    Attributes:
        source: name of the folder that it was read from.
        label: of the method.
        compared: K: how many of each prompt's samples the metrics are of. Best-of-N may have drawn more.
        rewards: by prompt, then by seed: the rewards of all samples in the order of the draw; None is no reward.
        metrics: by name, then by prompt: the mean over seeds. Prompts without a value are left out.
        settings: of the sampler, as in config.json.
        seconds: a sample, of generation on one process; None where nothing was timed.
        flops: a sample; None where the models' dimensions are not known.
        planned: whether those are of all that was planned, since not every batch says what was run.
        weight: mean share of the hard token; None without guidance.
        grades: by judge, its grades of single tests; None where it gave none.
        records: sample lines by key.
    """

    source: str
    label: str
    dataset: str
    reward: str
    temperature: float
    settings: dict[str, Any]
    compared: int
    rewards: dict[Prompt, dict[int, list[float | None]]]
    metrics: dict[str, dict[Prompt, float]]
    seconds: float | None = None
    flops: float | None = None
    planned: bool = False
    weight: float | None = None
    grades: dict[str, list[float | None]] = dataclasses.field(default_factory=dict, repr=False)
    records: list[dict[str, Any]] = dataclasses.field(default_factory=list, repr=False)

    @property
    def all_rewards(self) -> list[float | None]:
        """Of all samples of all prompts and seeds."""
        return [reward for seeds in self.rewards.values() for rewards in seeds.values() for reward in rewards]

    def missing_note(self) -> list[str]:
        """A line that says what the figures leave out; none where they leave out nothing."""
        drawn, prompts = self.all_rewards, len(self.rewards)
        counts = {"samples without a reward": (len(drawn) - len(finite(drawn)), len(drawn))}
        for name, values in self.metrics.items():
            if name != "avg":  # as Top@1
                counts[f"prompts without {METRICS.get(name, name)}"] = prompts - len(values), prompts
        for name, grades in self.grades.items():
            counts[f"grades that {name} did not give"] = grades.count(None), len(grades)
        return missing_note(self.label, counts)

    @property
    def method(self) -> str:
        """Its name, as in :data:`entrgi_kernels.names.METHODS`."""
        return self.settings["method"]

    @property
    def guided(self) -> bool:
        """Whether a reward moved any logits."""
        return self.method != "none" and self.settings["guidance_steps"] > 0

    @property
    def search(self) -> str:
        """Its name, as in :data:`entrgi_kernels.names.SEARCHES`."""
        return self.settings["search"]

    @property
    def plain(self) -> bool:
        """Whether it is best-of-N: neither guidance nor a search."""
        return not self.guided and self.search == "best"

    @property
    def samples(self) -> int:
        """How many were drawn a prompt."""
        return self.settings["num_samples"]

    def figure(self, metric: str) -> Figure:
        """Mean over prompts of a metric."""
        return figure(self.metrics[metric].values())

    def best_of(self, n: int) -> dict[Prompt, float]:
        """By prompt: the expected highest reward of n of its samples; prompts without any reward are left out."""
        found = {p: [r for r in seeds.values() if finite(r)] for p, seeds in self.rewards.items()}
        return {p: _mean(best_of(rewards, n) for rewards in seeds) for p, seeds in found.items() if seeds}


@dataclasses.dataclass(frozen=True)
class Match:
    """A method against best-of-N with N raised until it costs the same.

    Attributes:
        unit: "flops" or "seconds".
        ratio: how often an unguided sample could be drawn for the price of the method's K.
        n: that, rounded up, at most as many as were drawn.
        capped: whether fewer were drawn than it takes.
        baseline: reward of best-of-n.
        difference: Top@1 of the method minus that, paired over prompts.
    """

    row: Row
    unit: str
    ratio: float
    n: int
    capped: bool
    baseline: Figure
    difference: Figure


@dataclasses.dataclass(frozen=True)
class Slice:
    """The rows that can be compared with each other: one dataset, reward model and temperature."""

    dataset: str
    reward: str
    temperature: float
    rows: list[Row]

    @property
    def title(self) -> str:
        """As a heading of a report."""
        return f"{self.dataset}, reward model {self.reward}, τ = {self.temperature:g}"

    @property
    def baseline(self) -> Row | None:
        """Best-of-N, where it was run."""
        return next((row for row in self.rows if row.plain), None)

    def metrics(self) -> list[str]:
        """Metrics that every row has."""
        first = self.rows[0].metrics
        return [name for name in first if all(name in row.metrics for row in self.rows)]

    def differences(self, reference: str) -> list[tuple[Row, Row, dict[str, Figure]]]:
        """(row, compared with, paired differences): all rows against best-of-N, then others against the reference.

        A difference needs the metric's value for the same prompts in both rows.
        """
        base = self.baseline
        chosen = next((row for row in self.rows if row.label == reference and row is not base), None)
        pairs = [(row, base) for row in self.rows if base is not None and row is not base]
        pairs += [(row, chosen) for row in self.rows if chosen is not None and row is not chosen and row is not base]
        names = [name for name in self.metrics() if name not in diversity.METRICS]
        return [(a, b, {name: paired(a.metrics[name], b.metrics[name]) for name in names}) for a, b in pairs]

    def matches(self) -> list[Match]:
        """Compute-matched comparisons of every other row, by FLOPs and by seconds as far as they are known."""
        base = self.baseline
        if base is None:
            return []
        found = []
        for unit in ("flops", "seconds"):
            price = getattr(base, unit)
            for row in self.rows:
                cost = getattr(row, unit)
                if row.plain or not price or not cost:
                    continue
                ratio = row.compared * cost / price
                n = math.ceil(ratio)
                chosen = min(n, base.samples)
                values = base.best_of(chosen)
                difference = paired(row.metrics["top1"], values)
                found.append(Match(row, unit, ratio, chosen, n > base.samples, figure(values.values()), difference))
        return found


@dataclasses.dataclass(frozen=True)
class Results:
    """Everything that reports show.

    Attributes:
        configs, headers: of each evaluation: its configuration, and all that its config.json holds.
        slices: rows that can be compared with each other.
        missing: samples that the evaluations were to draw and have not.
        traces: recorded denoising steps, by the sample's key.
    """

    configs: list[EvaluationConfig]
    headers: list[dict[str, Any]]
    slices: list[Slice]
    missing: int
    traces: dict[str, list[dict[str, Any]]]

    @property
    def title(self) -> str:
        """The configurations' names, each once."""
        return " · ".join(dict.fromkeys(config.name for config in self.configs))

    @property
    def reference(self) -> str:
        """Label of the method that others are compared with."""
        return self.configs[0].reference

    def with_reference(self, label: str) -> Results:
        """The same, compared with another method."""
        first = dataclasses.replace(self.configs[0], reference=label)
        return dataclasses.replace(self, configs=[first, *self.configs[1:]])


def paired(values: Mapping[Prompt, float], baseline: Mapping[Prompt, float]) -> Figure:
    """Mean of the differences over the prompts that both have; no figure where one has no value at all.

    Raises:
        UsageError: when they have none in common.
    """
    common = [prompt for prompt in values if prompt in baseline]
    if not common and values and baseline:
        raise UsageError("two methods have no finished prompt in common: nothing to compare yet")
    return figure(values[prompt] - baseline[prompt] for prompt in common)


def read_results(folders: Sequence[Path]) -> Results:
    """The results of one or several evaluations, finished or not.

    Raises:
        UsageError: a folder that holds none.
    """
    configs, headers, rows = [], [], []
    missing = 0
    traces: dict[str, list[dict[str, Any]]] = {}
    for folder in folders:
        store = Store(folder)
        header = store.read_header()
        if header is None:
            raise UsageError(f"{folder} holds no results: expected the folder that `entrgi evaluate --output` wrote")
        headers.append(header)
        configs.append(from_dict(header["config"], str(folder / "config.json")))
        found = _rows(folder.resolve().name, configs[-1], header, store)
        missing += header["samples"] - sum(len(row.records) for row in found)
        rows += found
        store.warn_of_lost_times()
        traces.update({record["key"]: record["steps"] for record in store.read("traces")})
    if not rows:
        raise UsageError(f"no finished sample in {', '.join(map(str, folders))}")
    _tell_apart(rows)
    planned = [row.label for row in rows if row.planned]
    if planned and any(row.flops and not row.planned for row in rows):
        said = "FLOPs of %s are of all that was planned, the others' of what was run: not all batches say what that was"
        logger.warning(said, ", ".join(dict.fromkeys(planned)))
    slices: dict[tuple[str, str, float], list[Row]] = collections.defaultdict(list)
    for row in rows:
        slices[row.dataset, row.reward, row.temperature].append(row)
    return Results(configs, headers, [Slice(*key, group) for key, group in slices.items()], missing, traces)


def _rows(source: str, config: EvaluationConfig, header: Mapping[str, Any], store: Store) -> list[Row]:
    cells = header["cells"]
    groups: dict[tuple[Any, ...], Row] = {}
    owner: dict[str, Row] = {}
    for key, cell in cells.items():
        settings = cell["settings"]
        place = (cell["dataset"], cell["reward_model"], settings["temperature"], cell["label"])
        if place not in groups:
            groups[place] = Row(
                source,
                cell["label"],
                cell["dataset"],
                cell["reward_model"],
                settings["temperature"],
                settings,
                cell["compared"],
                {},
                {},
            )
        owner[key] = groups[place]
    samples: dict[tuple[str, str, int], dict[int, dict[str, Any]]] = collections.defaultdict(dict)
    for record in store.read("samples"):
        cell_key, prompt, _ = record["key"].split("-")
        if cell_key in owner:
            owner[cell_key].records.append(record)
            samples[cell_key, prompt, record["seed"]][record["sample"]] = record
    searched = any(row.search != "best" for row in groups.values())
    judges = {spec.key: spec for spec in check_judges(config.judges, config.model)}
    judged: dict[str, dict[str, float | None]] = {spec.name: {} for spec in judges.values()}
    grades: dict[str, dict[str, list[float | None]]] = {spec.name: {} for spec in judges.values()}
    for record in store.read("judgements"):
        key = record["key"].rsplit("-", 1)[1]
        if key in judges:  # else a judge that was changed since
            judged[judges[key].name][record["sample"]] = record["score"]
            grades[judges[key].name][record["sample"]] = record.get("tests") or []
    values: dict[int, dict[str, dict[Prompt, list[float]]]] = collections.defaultdict(
        lambda: collections.defaultdict(lambda: collections.defaultdict(list))
    )
    for (cell_key, prompt, seed), by_sample in samples.items():
        row = owner[cell_key]
        if len(by_sample) < row.samples:
            continue  # killed in the midst of it
        ordered = [by_sample[k] for k in sorted(by_sample)]
        rewards = [number(record["reward"]) for record in ordered]
        row.rewards.setdefault(prompt, {})[seed] = rewards
        ordered, rewards = ordered[: row.compared], rewards[: row.compared]
        mine, given = values[id(row)], finite(rewards)
        mine["top1"][prompt] += [max(given)] if given else []
        mine["avg"][prompt] += [_mean(given)] if given else []
        best = best_record(ordered)
        for spec in judges.values():
            scores = judged[spec.name]
            seen = row.grades.setdefault(spec.name, [])
            seen += [grade for r in ordered for grade in grades[spec.name].get(r["key"], [])]
            if best is None or best["key"] in scores:
                mine[spec.name][prompt] += [] if best is None else finite([scores[best["key"]]])
            if spec.samples == "all" and all(r["key"] in scores for r in ordered):
                given = finite(scores[r["key"]] for r in ordered)
                mine[f"{spec.name}, all"][prompt] += [_mean(given)] if given else []
        if searched:
            for name, value in diversity.diversity([record["text"] for record in ordered]).items():
                mine[name][prompt] += [] if value is None else [value]
    batches = store.read("batches")
    rows = [row for row in groups.values() if row.rewards]
    for row in rows:
        row.metrics = {
            name: {prompt: _mean(v) for prompt, v in by_prompt.items() if v}
            for name, by_prompt in values[id(row)].items()
            # A judge that has not seen every prompt yet says nothing of the mean.
            if len(by_prompt) == len(row.rewards)
        }
        _costs(row, header, [b for b in batches if owner.get(b["cell"]) is row])
    return rows


def _costs(row: Row, header: Mapping[str, Any], batches: list[dict[str, Any]]) -> None:
    # Recording takes time of its own: recorded batches count only where there are no others.
    timed = [b for b in batches if not b["traced"]] or batches
    if timed:
        row.seconds = sum(b["seconds"] for b in timed) / sum(b["prompts"] for b in timed) / row.samples
    weights = [b["mean_weight"] for b in batches if b.get("mean_weight") is not None]
    row.weight = _mean(weights) if weights else None
    shapes = header["shapes"]
    model, reward = shapes.get(f"model:{header['config']['model']}"), shapes.get(f"reward:{row.reward}")
    if model and reward and batches:
        from entrgi_kernels.guidance.config import GuidanceConfig

        settings = GuidanceConfig(**{**row.settings, "weight": None, "betas": tuple(row.settings["betas"])})
        tokens: float | list[int] = sum(b["prompt_tokens"] for b in batches) / sum(b["prompts"] for b in batches)
        if all("prompt_lengths" in batch for batch in batches):  # else of before they were written down
            tokens = [length for batch in batches for length in batch["prompt_lengths"]]
        dimensions = Shape(**model), Shape(**reward)
        work = _work(settings, batches)
        if work is not None and len(work) > block_count(dimensions[0], settings, tokens):
            work = None
        row.flops, row.planned = total(sample_flops(*dimensions, settings, tokens, work)), work is None


def _work(settings: Any, batches: list[dict[str, Any]]) -> list[list[float]] | None:
    """What was run of each block, a trajectory; None where some batches are of before it was written down."""
    if not all(batch.get("work") for batch in batches):
        return None
    rows = sum(batch["prompts"] for batch in batches) * settings.num_samples * settings.copies
    blocks = itertools.zip_longest(*(batch["work"] for batch in batches), fillvalue=(0, 0, 0))
    return [[sum(column) / rows for column in zip(*block, strict=True)] for block in blocks]


def _tell_apart(rows: list[Row]) -> None:
    """Rows of several evaluations may have one label: then the evaluation's folder is named."""

    def place(row: Row) -> tuple[Any, ...]:
        return row.dataset, row.reward, row.temperature, row.label

    counts = collections.Counter(map(place, rows))
    for row in [row for row in rows if counts[place(row)] > 1]:
        row.label = f"{row.label} [{row.source}]"


def _mean(values: Iterable[float]) -> float:
    values = list(values)
    return math.fsum(values) / len(values)
