"""Having finished samples judged, batch by batch, resumable as their generation is."""

from __future__ import annotations

import collections
from collections.abc import Sequence
from typing import Any

from tqdm import tqdm

from ..statistics import number
from .judges import Candidate, make_judge
from .plan import Plan
from .runner import Worker
from .specs import JudgeSpec, check_judges
from .store import Store


def pending(plan: Plan, store: Store) -> list[tuple[JudgeSpec, list[Candidate]]]:
    """(judge, samples that it has not seen yet) in the grid's order, a batch of prompts at a time."""
    specs = check_judges(plan.config.judges, plan.config.model)
    if not specs:
        return []
    records = {record["key"]: record for record in store.read("samples")}
    done = store.keys("judgements")
    out = []
    for spec in specs:
        for batch in plan.batches:
            chosen = []
            for item in batch.items:
                group = [records[key] for key in batch.compared_keys(item)]
                best = best_record(group)
                chosen += group if spec.samples == "all" else [] if best is None else [best]
            missing = [record for record in chosen if judgement_key(record["key"], spec) not in done]
            if missing:
                # The whole batch is scored again: the company that a text is scored in may change its last bits.
                out.append((spec, [Candidate(r["key"], r["prompt"], r["text"], r["tokens"]) for r in chosen]))
    return out


def run_judges(
    work: Sequence[tuple[JudgeSpec, list[Candidate]]],
    plan: Plan,
    worker: Worker,
    store: Store,
    done: set[str],
    *,
    writer: int = 0,
    progress: bool = True,
) -> None:
    """Score, and append what is new.

    Args:
        work: of :func:`pending`, or a share of it.
        plan: of the evaluation.
        worker: has the diffusion model where a judge needs it.
        store: where judgements go.
        done: keys that are there already.
        writer: number of this process.
        progress: a bar on standard error, where it is a terminal.

    Raises:
        UsageError: a judge that cannot be loaded or does not answer.
    """
    made: dict[str, Any] = {}

    def diffusion() -> tuple[Any, Any]:
        sampler = worker.sampler(plan.config.rewards[0])
        return sampler.model, sampler.tokenizer

    with tqdm(total=sum(len(c) for _, c in work), unit="judgement", disable=None if progress else True) as bar:
        for spec, candidates in work:
            if spec.name not in made:
                made[spec.name] = make_judge(spec, worker.device, diffusion)
            lines = []
            for candidate, judgement in zip(candidates, made[spec.name].judge(candidates), strict=True):
                key = judgement_key(candidate.key, spec)
                tests = {} if judgement.tests is None else {"tests": judgement.tests}
                line = {"key": key, "judge": spec.name, "sample": candidate.key, "score": judgement.score, **tests}
                lines += [line] if key not in done else []
            store.append("judgements", lines, writer)
            bar.update(len(candidates))


def judgement_key(sample: str, spec: JudgeSpec) -> str:
    """Key of what a judge, as it is now, says of a sample."""
    return f"{sample}-{spec.key}"


def best_record(group: Sequence[dict[str, Any]]) -> dict[str, Any] | None:
    """The sample line of the highest reward, the first of ties; None where none has a reward."""
    rewarded = [record for record in group if number(record["reward"]) is not None]
    return max(rewarded, key=lambda record: record["reward"], default=None)


def order(plan: Plan, store: Store) -> list[str]:
    """Keys of all judgements in the order of the finished file: by judge, then by sample."""
    by_sample = collections.defaultdict(list)
    for record in store.read("judgements"):
        by_sample[record["sample"]].append(record["key"])
    keys = [key for batch in plan.batches for sample in batch.sample_keys() for key in by_sample[sample]]
    places = {spec.key: index for index, spec in enumerate(check_judges(plan.config.judges, plan.config.model))}
    return sorted(keys, key=lambda key: places.get(key.rsplit("-", 1)[1], len(places)))
