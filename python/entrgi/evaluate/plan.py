"""The work of an evaluation: batches that are the same however often the run is killed and whoever does them.

A batch is a fixed run of a cell's prompts. Which prompts are denoised together changes no draw, but it may change the
last bits of a sum; since the batches never change, neither do those.
"""

from __future__ import annotations

import dataclasses
import math
from typing import Any

from .. import __version__
from ..digests import digest, fingerprint
from ..errors import UsageError
from ..prompts import prompt_text
from ..verified import is_verifier
from .config import MAX_BEST_OF, Cell, EvaluationConfig, cells_of, is_best_of_n, methods_of
from .flops import Shape, sample_flops, total
from .prompts import Item, PromptSets, fingerprints, load_prompts
from .specs import TINY
from .store import FORMAT, Store


@dataclasses.dataclass(frozen=True)
class Batch:
    """Prompts of one cell that are denoised together.

    Attributes:
        key: of the batch in batches.jsonl.
        cell: what they are denoised with.
        start: place of the first one in its dataset.
        items: the prompts.
        trace: whether every step is recorded.
    """

    key: str
    cell: Cell
    start: int
    items: tuple[Item, ...]
    trace: bool

    def sample_key(self, item: Item, sample: int) -> str:
        """Identifies one sample of one prompt across runs and machines."""
        return f"{self.cell.key}-{item.key}-{sample:04d}"

    def sample_keys(self) -> list[str]:
        """Keys of all samples, in order."""
        return [self.sample_key(item, k) for item in self.items for k in range(self.cell.config.num_samples)]

    def traced_prompts(self, count: int) -> list[str]:
        """Keys, but for the sample, of the prompts whose trace is kept: those among the dataset's first `count`."""
        items = self.items[: max(0, count - self.start)] if self.trace else ()
        return [f"{self.cell.key}-{item.key}" for item in items]

    def compared_keys(self, item: Item) -> list[str]:
        """Keys of a prompt's samples that count in the comparison at equal K."""
        return [self.sample_key(item, k) for k in range(self.cell.compared)]


@dataclasses.dataclass(frozen=True)
class Plan:
    """Everything that is to be done, in order.

    Attributes:
        config: the evaluation.
        cells: of its grid.
        prompts: by (dataset, seed).
        batches: of all cells.
        shapes: dimensions of the models, as far as they were found; see :func:`shapes_of`.
        files: what identifies the models' files, by the same names; see :func:`entrgi.digests.fingerprint`.
        unreachable: datasets that a dry plan could not read, with the reason.
    """

    config: EvaluationConfig
    cells: tuple[Cell, ...]
    prompts: PromptSets
    batches: tuple[Batch, ...]
    shapes: dict[str, dict[str, Any]]
    files: dict[str, str | None]
    unreachable: tuple[str, ...] = ()

    def todo(self, store: Store) -> list[int]:
        """Places of the batches of which a sample, the times or a trace is not in the results."""
        samples, batches = store.keys("samples"), store.keys("batches")
        traced = {key.rpartition("-")[0] for key in store.keys("traces")}  # of one of a prompt's samples
        return [
            place
            for place, batch in enumerate(self.batches)
            if batch.key not in batches
            or not samples.issuperset(batch.sample_keys())
            or not traced.issuperset(batch.traced_prompts(self.config.traces))
        ]

    def order(self) -> dict[str, list[str]]:
        """Keys of the finished files, in the grid's order."""
        samples = [key for batch in self.batches for key in batch.sample_keys()]
        return {"samples": samples, "traces": samples, "batches": [batch.key for batch in self.batches]}

    def header(self) -> dict[str, Any]:
        """What config.json holds."""
        from entrgi_kernels.guidance.keys import revision

        from ..compare import versions

        drawn = max((revision(cell.config) for cell in self.cells), default=1)
        return {
            "format": FORMAT,
            "config": self.config.to_dict(),
            "identity": {
                **self.config.identity(),
                "prompts": fingerprints(self.prompts),
                "files": self.files,
                "entrgi_kernels": __version__,
                **(
                    {"draws_revision": drawn} if drawn > 1 else {}
                ),  # results of before there were revisions are gone on with
            },
            "cells": {cell.key: cell.describe() for cell in self.cells},
            "samples": sum(len(batch.items) * batch.cell.config.num_samples for batch in self.batches),
            "shapes": self.shapes,
            "versions": versions(),
        }


def make_plan(config: EvaluationConfig, *, dry: bool = False) -> Plan:
    """Lay out the grid; reads prompts and the models' configurations, but no weights.

    Args:
        config: the evaluation.
        dry: the plan is only to be looked at: datasets out of reach are no error, `unreachable` says so.

    Raises:
        UsageError: prompts that cannot be read, or `best_of: auto` for models whose size is not to be found.
    """
    unreachable: list[str] = []
    prompts = load_prompts(config, unreachable if dry else None)
    shapes = shapes_of(config)
    best_of = matched_best_of(config, prompts, shapes) if config.best_of == "auto" else None
    files = files_of(config, local=dry)
    cells = cells_of(config, best_of, files)
    batches = []
    for cell in cells:
        items, size = prompts[cell.dataset, cell.config.seed], cell.config.batch_size
        for start in range(0, len(items), size):
            chosen = tuple(items[start : start + size])
            traced = start < config.traces and cell.config.seed == config.seeds[0]
            key = f"{cell.key}-{digest([item.key for item in chosen])[:12]}"
            batches.append(Batch(key, cell, start, chosen, traced))
    return Plan(config, tuple(cells), prompts, tuple(batches), shapes, files, tuple(unreachable))


def files_of(config: EvaluationConfig, *, local: bool = False) -> dict[str, str | None]:
    """What identifies the files of the models, by name, reward models as such; `local` asks no hub."""
    named = {f"model:{config.model}": ("diffusion", config.model)}
    named |= {f"reward:{name}": ("reward", name) for name in config.rewards}
    return {key: fingerprint(role, None if n == TINY else n, local=local) for key, (role, n) in named.items()}


def shapes_of(config: EvaluationConfig) -> dict[str, dict[str, Any]]:
    """Dimensions of the models as far as they can be found without loading them; by name, reward models as such."""
    shapes = {}
    for role, name in [("model", config.model), *(("reward", name) for name in config.rewards)]:
        if role == "reward" and is_verifier(name):  # no model
            shapes[f"{role}:{name}"] = dataclasses.asdict(Shape(*[0] * 6))
            continue
        content = _model_config(role, name, config.trust_remote_code)
        if content is not None:
            shapes[f"{role}:{name}"] = dataclasses.asdict(Shape.from_config(content))
    return shapes


def matched_best_of(config: EvaluationConfig, prompts: PromptSets, shapes: dict[str, dict[str, Any]]) -> int:
    """Samples of best-of-N that cost as many FLOPs as the K of the most expensive other method, rounded up.

    Raises:
        UsageError: without the models' dimensions, or without a method to match.
    """
    model = shapes.get(f"model:{config.model}")
    rewards = [shapes.get(f"reward:{name}") for name in config.rewards]
    if model is None or None in rewards:
        raise UsageError("best_of: auto needs the models' dimensions, which are not to be found: give best_of a number")
    tokens = prompt_length(prompts)
    wanted = 0
    for reward in rewards:
        shape = Shape(**reward)  # type: ignore[arg-type]
        costs: dict[bool, list[float]] = {True: [], False: []}
        for _, settings, _ in methods_of(config):
            cost = total(sample_flops(Shape(**model), shape, settings, tokens))
            plain = is_best_of_n(settings)
            costs[plain].append(cost * (1 if plain else settings.num_samples))
        if costs[True] and costs[False]:
            wanted = max(wanted, math.ceil(max(costs[False]) / min(costs[True])))
    if not wanted:
        raise UsageError("best_of: auto needs method none with search best, and another one to match")
    return min(wanted, MAX_BEST_OF)


def prompt_length(prompts: PromptSets) -> float:
    """Tokens of an average prompt with its template, by rule of thumb: a quarter of its characters, and ten."""
    lengths = [len(prompt_text(item.prompt)) / 4 + 10 for items in prompts.values() for item in items]
    return math.fsum(lengths) / len(lengths)


# Dimensions of the preset's models, for plans on machines that cannot reach the hub.
_QWEN3 = {"head_dim": 128, "num_key_value_heads": 8, "vocab_size": 151936, "tie_word_embeddings": True}
_KNOWN = {
    "Dream-org/Dream-v0-Instruct-7B": {
        "num_hidden_layers": 28, "hidden_size": 3584, "intermediate_size": 18944, "num_attention_heads": 28,
        "num_key_value_heads": 4, "vocab_size": 152064, "model_type": "Dream",
    },
    "Skywork/Skywork-Reward-V2-Qwen3-0.6B": {
        **_QWEN3, "num_hidden_layers": 28, "hidden_size": 1024, "intermediate_size": 3072, "num_attention_heads": 16,
    },
    "Skywork/Skywork-Reward-V2-Qwen3-1.7B": {
        **_QWEN3, "num_hidden_layers": 28, "hidden_size": 2048, "intermediate_size": 6144, "num_attention_heads": 16,
    },
    "Skywork/Skywork-Reward-V2-Qwen3-4B": {
        **_QWEN3, "num_hidden_layers": 36, "hidden_size": 2560, "intermediate_size": 9728, "num_attention_heads": 32,
    },
}  # fmt: skip


def _model_config(role: str, name: str, trust_remote_code: bool) -> dict[str, Any] | None:
    """A model's config.json, without running code that comes with it; None where it is not to be found."""
    if name == TINY:
        from .. import tiny

        name = str(tiny.weights_path("diffusion" if role == "model" else "reward"))
    if name in _KNOWN:
        return _KNOWN[name]
    from transformers import PretrainedConfig

    try:
        content, _ = PretrainedConfig.get_config_dict(name)
        Shape.from_config(content)
    except (OSError, ValueError, KeyError, TypeError, AttributeError):  # loading says what is wrong with it
        return None
    return content
