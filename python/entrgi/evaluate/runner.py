"""Doing the batches of a plan: the part that has the models."""

from __future__ import annotations

import argparse
import dataclasses
import math
import time
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from .. import loading
from ..statistics import number
from ..verified import is_verifier
from .config import EvaluationConfig
from .plan import Batch, Plan
from .specs import TINY
from .store import Store

if TYPE_CHECKING:
    from entrgi_kernels import GuidedSampler

# Lines of each stream, by its name.
Lines = dict[str, list[dict[str, Any]]]


class Worker:
    """Denoises batches with models that stay loaded.

    Args:
        config: which models.
        device: where they are; None takes the configuration's.
    """

    def __init__(self, config: EvaluationConfig, device: str | None = None) -> None:
        self.config = config
        self.device = device or config.device
        self._reward: str | None = None
        self._loaded: loading.Loaded | None = None
        self._sampler: GuidedSampler | None = None

    def run(self, batch: Batch) -> Lines:
        """The lines of a batch: its samples, one of its times and statistics, and the traces where asked for."""
        sampler = self.sampler(batch.cell.reward)
        settings = {f.name: getattr(batch.cell.config, f.name) for f in dataclasses.fields(batch.cell.config)}
        prompts = [item.prompt for item in batch.items]
        start = time.perf_counter()
        results = dict(loading.stream(sampler, prompts, trace=batch.trace, progress=False, **settings))
        seconds = time.perf_counter() - start
        lines: Lines = {"samples": [], "traces": []}
        for offset, item in enumerate(batch.items):
            result = results[offset]
            rewards = [number(sample.reward) for sample in result.samples]
            best = max(range(len(rewards)), key=lambda k: -math.inf if rewards[k] is None else rewards[k])
            for k, sample in enumerate(result.samples):
                key = batch.sample_key(item, k)
                lines["samples"].append(
                    {
                        "key": key,
                        "dataset": batch.cell.dataset,
                        "reward_model": batch.cell.reward,
                        "method": batch.cell.label,
                        "temperature": batch.cell.config.temperature,
                        "seed": batch.cell.config.seed,
                        "index": batch.start + offset,
                        "prompt": item.prompt,
                        "sample": k,
                        "reward": rewards[k],
                        "text": sample.text,
                        "tokens": list(sample.tokens),
                    }
                )
                # One trace a prompt is enough to look at, and K of them would be most of the results' bytes.
                if sample.trace and k == best and batch.start + offset < self.config.traces:
                    lines["traces"].append({"key": key, "steps": [step.to_dict() for step in sample.trace]})
        about = {"key": batch.key, "cell": batch.cell.key, "prompts": len(batch.items), "traced": batch.trace}
        lengths = [loading.prompt_tokens(sampler, prompt) for prompt in prompts]
        about |= {"prompt_tokens": sum(lengths), "prompt_lengths": lengths}
        timed = {"device": self.device, "seconds": round(seconds, 4)}
        lines["batches"] = [{**about, **sampler.stats.to_dict(), **timed}]
        return lines

    def sampler(self, reward: str) -> GuidedSampler:
        """A sampler with this reward model; the models are loaded once, the diffusion model once for all rewards."""
        if self._sampler is None or reward != self._reward:
            config = self.config
            wanted = argparse.Namespace(
                model=None if config.model == TINY else config.model,
                reward=None if reward == TINY else reward,
                dtype=config.dtype,
                device=self.device,
                trust_remote_code=config.trust_remote_code,
            )
            if self._loaded is not None:  # two reward models need not fit at once
                self._sampler, self._loaded = None, dataclasses.replace(self._loaded, reward=None)
            self._loaded = loading.load(wanted, reuse=self._loaded)
            from entrgi_kernels.guidance.config import GuidanceConfig

            self._sampler, self._reward = loading.make_sampler(self._loaded, GuidanceConfig()), reward
            self._warm_up()
        return self._sampler

    @property
    def loaded(self) -> loading.Loaded | None:
        """The models, once a batch was run."""
        return self._loaded

    def _warm_up(self) -> None:
        """What a first call does once (kernels chosen and compiled, threads started) is no batch's time."""
        settings: dict[str, Any] = {"num_samples": 1, "max_new_tokens": 8, "steps": 2, "guidance_steps": 1}
        assert self._sampler is not None
        settings["method"] = "none" if is_verifier(self._reward) else "entrgi"
        for _ in loading.stream(self._sampler, ["Hello"], progress=False, **settings):
            pass


def run_batches(
    plan: Plan,
    places: Sequence[int],
    worker: Worker,
    store: Store,
    done: set[str],
    *,
    writer: int = 0,
    on_batch: Callable[[Batch], None] = lambda batch: None,
) -> None:
    """Run batches and append what they give.

    Args:
        plan: whose batches.
        places: which of them.
        worker: who runs them.
        store: where lines go.
        done: keys of samples that are there already: they are not written again.
        writer: number of this process.
        on_batch: called when a batch is on the disk.
    """
    for place in places:
        batch = plan.batches[place]
        save(store, worker.run(batch), done, writer)
        on_batch(batch)


def save(store: Store, lines: Lines, done: set[str], writer: int) -> None:
    """Append a batch's lines: samples last, since their being there is what says that the batch is done."""
    for stream in ("traces", "batches"):
        store.append(stream, lines.get(stream, []), writer)
    store.append("samples", [line for line in lines["samples"] if line["key"] not in done], writer)
