"""Prompts of an evaluation: the built-in ones, local files, or datasets of the Hugging Face hub."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

from ..digests import digest
from ..errors import UsageError, require
from ..prompts import Prompt, check_prompt, read_placed
from .config import Dataset, EvaluationConfig
from .specs import TINY, check_judges

_LINES = (".jsonl", ".ndjson", ".json", ".txt")
_TABLES = {".csv": "csv", ".tsv": "csv", ".parquet": "parquet"}
_TINY_PROMPTS = 24
_USUAL_LENGTH = 600  # characters of a benchmark's prompt


@dataclasses.dataclass(frozen=True)
class Item:
    """A prompt and its identity, which is that of its content."""

    key: str
    prompt: Prompt
    place: str = dataclasses.field(default="", compare=False)  # for messages


PromptSets = dict[tuple[str, int], list[Item]]


def load_prompts(config: EvaluationConfig, unreachable: list[str] | None = None) -> PromptSets:
    """The prompts of every (dataset, seed) of the grid.

    A prompt that comes again in a dataset is left out: it would be no new evidence, and intervals would claim it was.

    Args:
        config: which datasets, seeds and numbers.
        unreachable: for a plan that is not carried out: datasets that cannot be read are noted here with the reason,
            and stand-ins of usual length take their prompts' place.

    Raises:
        UsageError: a dataset that cannot be read, lacks the field, or has too few prompts.
    """
    sets: PromptSets = {}
    for dataset in config.datasets:
        try:
            everything = _read(dataset)
        except UsageError as error:
            if unreachable is None or dataset.num_prompts is None:
                raise
            unreachable.append(f"{error}")
            everything = [("", f"{i:04d}" + "." * _USUAL_LENGTH) for i in range(dataset.num_prompts)]
        for seed in config.seeds:
            chosen = _choose(everything, dataset, seed)
            wanted = dataset.num_prompts
            if wanted is not None and len(chosen) < wanted:
                raise UsageError(f"dataset {dataset.name} has {len(chosen)} distinct prompts, {wanted} are asked for")
            sets[dataset.name, seed] = chosen
    return sets


def fingerprints(sets: PromptSets) -> dict[str, dict[str, Any]]:
    """What the results remember of the prompts: how many, and a digest of their content and order."""
    return {
        f"{name}/{seed}": {"prompts": len(items), "sha256": digest([item.key for item in items])}
        for (name, seed), items in sets.items()
    }


def check_templates(config: EvaluationConfig, sets: PromptSets) -> None:
    """Try the chat templates of all models that read prompts on all prompts; no weights are loaded.

    Raises:
        UsageError: a prompt that one of them refuses.
    """
    from .. import loading

    judges = [judge.model for judge in check_judges(config.judges, config.model) if judge.kind == "reward"]
    try:
        tokenizer = loading.tokenizer_of("diffusion", config.model, config.trust_remote_code)
        others = [loading.tokenizer_of("reward", name, config.trust_remote_code) for name in (*config.rewards, *judges)]
    except UsageError:
        raise
    except (OSError, ValueError, ImportError):
        return  # who loads the models says what is wrong; on a cluster they need not be here
    items = list({item.key: item for some in sets.values() for item in some}.values())
    for other in others:
        loaded = loading.Loaded(None, tokenizer, None, other)
        loading.check_prompts([item.prompt for item in items], loaded, lambda index: items[index].place)


def _choose(prompts: list[tuple[str, Prompt]], dataset: Dataset, seed: int) -> list[Item]:
    if dataset.shuffle is not None:
        shuffle_seed = seed if dataset.shuffle == "seed" else int(dataset.shuffle)
        prompts = [prompts[i] for i in _permutation(len(prompts), shuffle_seed)]
    items: dict[str, Item] = {}
    for place, prompt in prompts:
        key = digest(prompt)[:12]
        items.setdefault(key, Item(key, prompt, place))
    return list(items.values())[: dataset.num_prompts]


def _permutation(n: int, seed: int) -> list[int]:
    """The order of ``datasets.Dataset.shuffle(seed)``, so that a published selection is met (for any kind of file)."""
    import numpy

    return numpy.random.default_rng(seed % (1 << 63)).permutation(n).tolist()


def _read(dataset: Dataset) -> list[tuple[str, Prompt]]:
    suffix = Path(dataset.path).suffix.lower()
    if dataset.path == TINY:
        from .. import tiny

        return [("a tiny prompt", prompt) for prompt in tiny.prompts(dataset.num_prompts or _TINY_PROMPTS)]
    if suffix in _LINES:
        return read_placed(files=[dataset.path], field=dataset.field)
    table = _load_dataset(dataset, _TABLES.get(suffix))
    if dataset.field not in table.column_names:
        raise UsageError(
            f"dataset {dataset.path} has no column {dataset.field!r}: expected field= one of {table.column_names}"
        )
    places = ((f"dataset {dataset.path}, row {i}", value) for i, value in enumerate(table[dataset.field]))
    return [(place, check_prompt(_parsed(value), place)) for place, value in places]


def _parsed(value: Any) -> Any:
    """A conversation in a CSV cell is written as JSON."""
    if isinstance(value, str) and value.lstrip().startswith('[{"'):
        try:
            return json.loads(value)
        except ValueError:
            return value
    return value


def _load_dataset(dataset: Dataset, builder: str | None) -> Any:
    datasets = require("datasets", f"reading {dataset.path}", "evaluate")
    if builder and not Path(dataset.path).is_file():
        raise UsageError(f"cannot read {dataset.path}: no such file")
    datasets.disable_progress_bars()
    try:
        if builder:
            options = {"sep": "\t"} if dataset.path.endswith(".tsv") else {}
            return datasets.load_dataset(builder, data_files=dataset.path, split="train", **options)
        return datasets.load_dataset(dataset.path, dataset.subset, split=dataset.split)
    except Exception as error:  # the hub, its client and pyarrow each have their own
        reason = " ".join(str(error).split())[:300] or type(error).__name__
        raise UsageError(f"cannot load dataset {dataset.path} (split {dataset.split}): {reason}") from error
