"""Guided generation from prompts: the drop-in sampler."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import gc
import logging
import time
from collections import deque
from collections.abc import Callable, Collection, Iterator, Sequence
from typing import Any

import torch
from tqdm.auto import tqdm
from transformers import PreTrainedTokenizerBase

from .. import models, rewards
from ..models import DiffusionModel
from ..models.base import embedding_rows
from ..models.cached_canvas import CachedCanvas
from ..models.combined import AgainstReference, ClassifierFree
from ..models.forwards import Forwards, forwards_of
from ..rewards import EmbeddingReward, PreparedPrompts, Reward, WeightedSum
from ..shortage import is_out_of_memory
from ..text.template import conversation_from, encode_prompt
from ..text.vocabulary import check_rows
from .batching import Batch, make_batches
from .blocks import fill
from .canvas import Canvas, left_padded
from .capture import compiled
from .config import GuidanceConfig
from .denoising import Denoiser, OnStep
from .errors import NonFiniteLogitsError, NonFiniteRewardError
from .keys import prompt_keys, row_keys
from .memory import Memory, MemoryEstimate
from .results import Conversation, GenerationResult, Progress, Sample, Stats, StepTrace, named, warn_of_missing
from .savings import reward_savings
from .schedules import step_behind
from .scoring import Scorer, check_guides
from .search import Search

logger = logging.getLogger("entrgi_kernels")


class GuidedSampler:
    """Samples from a diffusion language model, steered by a reward model's gradient.

    ::

        sampler = GuidedSampler(model, reward_model, tokenizer, reward_tokenizer)
        results = sampler.generate(["Why is the sky blue?"], num_samples=4, max_new_tokens=128, steps=128)
        results[0].best.text, results[0].rewards

    Args:
        model: a diffusion language model: Dream, LLaDA, any transformers backbone with a mask token, or a
            :class:`entrgi_kernels.models.DiffusionModel`.
        reward_model: a transformers sequence classifier with one label, a causal LM (its likelihood of the response),
            or a :class:`entrgi_kernels.rewards.Reward`.
        tokenizer: of the diffusion model; needs a chat template.
        reward_tokenizer: of the reward model; None takes `tokenizer`.
        unmatched: what stands for ids that the reward tokenizer lacks: "unk", "zero" or "pieces".
        mask_token_id, shift: where the model's own config and tokenizer do not tell.
        reference_model: a second diffusion model over the same tokens, which `cfg_scale` weighs the first against.
        **settings: of :class:`GuidanceConfig`; each call may change them.

    Attributes:
        config: the settings that calls start from.
        stats: what the last call did.

    Raises:
        ValueError, TypeError: models, tokenizers or settings that cannot serve; the message says what is accepted.
    """

    def __init__(
        self,
        model: Any,
        reward_model: Any,
        tokenizer: PreTrainedTokenizerBase,
        reward_tokenizer: PreTrainedTokenizerBase | None = None,
        *,
        unmatched: str = "unk",
        mask_token_id: int | None = None,
        shift: bool | None = None,
        reference_model: Any = None,
        **settings: Any,
    ) -> None:
        self.config = GuidanceConfig().replace(**settings)
        self.tokenizer = tokenizer
        self.model: DiffusionModel = models.wrap(model, tokenizer, mask_token_id=mask_token_id, shift=shift)
        self.reference = None if reference_model is None else self._wrapped_reference(reference_model, shift)
        self.reward: Reward = rewards.wrap(reward_model, reward_tokenizer or tokenizer, unmatched=unmatched)
        if hasattr(self.reward, "savings"):  # also in `reward.savings` and `reward.savings_off`
            logger.info("%r", self.reward)
        self.stats = Stats()
        module = getattr(self.model, "module", None)
        rows = embedding_rows(module) if isinstance(module, torch.nn.Module) else None
        if rows is not None:
            check_rows(tokenizer, rows, f"the diffusion model ({type(module).__name__})")
        if tokenizer.eos_token_id is None:
            raise ValueError("the tokenizer has no eos_token: expected one, it ends responses and pads prompts")
        self._eos: int = tokenizer.eos_token_id
        self._undrawable = rewards.undrawable_ids(tokenizer, self.model.vocab_size, self.model.mask_token_id)
        self._pad: int = self._eos if tokenizer.pad_token_id is None else tokenizer.pad_token_id

    def generate(
        self,
        prompts: str | Sequence[str | Conversation],
        *,
        trace: bool = False,
        progress: bool | None = None,
        callback: Callable[[int, GenerationResult], None] | None = None,
        **settings: Any,
    ) -> list[GenerationResult]:
        """Sample `num_samples` responses to every prompt.

        Args:
            prompts: strings, or conversations as lists of {"role", "content"} dicts that end with a user's turn.
            trace: keep every denoising step of every trajectory (slower: waits for the device each step).
            progress: show a progress bar; None shows it on a terminal alone.
            callback: called with (index of the prompt, result) as each prompt is finished.
            **settings: of :class:`GuidanceConfig`, for this call.

        Returns:
            One result a prompt, in order.

        Raises:
            ValueError, TypeError: bad prompts or settings, a prompt longer than a model's learned positions allow, or
                guidance by a reward that has no gradient.
            NonFiniteLogitsError: NaN or infinite logits; names step, prompt and sample.
            NonFiniteRewardError: likewise of a reward that guides, or its gradient. A *final* reward that is not
                finite is kept and warned of: see :attr:`GenerationResult.rewarded`.
        """
        results: dict[int, GenerationResult] = {}
        for index, result in self.stream(prompts, trace=trace, progress=progress, **settings):
            results[index] = result
            if callback is not None:
                callback(index, result)
        return [results[index] for index in sorted(results)]

    def stream(
        self,
        prompts: str | Sequence[str | Conversation],
        *,
        trace: bool = False,
        progress: bool | None = None,
        only: Collection[int] | None = None,
        seeds: Sequence[int] | None = None,
        watch: Callable[[Progress], None] | None = None,
        **settings: Any,
    ) -> Iterator[tuple[int, GenerationResult]]:
        """As :meth:`generate`, yielding (index of the prompt, result) as prompts are finished.

        Args:
            only: indices of the prompts that are wanted. Batches are those of all prompts, and one that holds a wanted
                prompt is denoised whole: who continues gets the bits that the whole run gives.
            seeds: one a prompt, beside the setting `seed`: prompts of different seeds share a batch, and equal prompts
                of equal seeds get equal samples.
            watch: called after each denoising step of a batch; what it raises ends the run.
        """
        config = self.config.replace(**settings)
        check_guides(self.reward, config)
        if not isinstance(prompts, (str, Sequence)):
            raise TypeError(
                f"prompts is {type(prompts).__name__}: expected a string, or a list of strings or conversations"
            )
        given = [prompts] if isinstance(prompts, str) else list(prompts)
        conversations, encoded = [], []
        for index, prompt in enumerate(given):  # all of them before the first batch, and for both models
            try:
                conversations.append(conversation_from(prompt))
                encoded.append(encode_prompt(self.tokenizer, conversations[-1]))
                for part in self.reward.rewards if isinstance(self.reward, WeightedSum) else [self.reward]:
                    if isinstance(part, EmbeddingReward) and part.tokenizer is not None:
                        part.split(conversations[-1])
            except (ValueError, TypeError) as error:
                kind = ValueError if isinstance(error, ValueError) else TypeError
                raise kind(str(error) if isinstance(prompts, str) else f"prompts[{index}]: {error}") from error
        self._check_lengths(encoded, conversations, config)
        if seeds is not None:
            if len(seeds) != len(encoded):
                raise ValueError(f"{len(seeds)} seeds for {len(encoded)} prompts: expected one each")
            for seed in seeds:
                config.replace(seed=seed)  # an integer in range
        keys = prompt_keys(encoded, seeds)

        def advance(progress: Progress) -> None:
            bar.update()
            if watch is not None:
                watch(progress)

        self.stats = stats = Stats()
        start = time.perf_counter()
        longest = max(range(len(given)), key=lambda i: len(encoded[i]), default=0)

        def estimate() -> MemoryEstimate:
            return self.memory_estimate(conversations[longest], encoded[longest], config)

        batches = make_batches([len(ids) for ids in encoded], config, estimate, self.model.device)
        if only is not None:
            batches = deque(batch for batch in batches if not set(only).isdisjoint(batch.prompts))
        memory = Memory()
        waiting: dict[int, list[Sample]] = {}
        with tqdm(
            total=len(batches) * config.steps, desc=config.method, unit="step", disable=_hide(progress), leave=False
        ) as bar:
            while batches:
                batch, begin, finished, work = batches.popleft(), bar.n, None, [*stats.work]
                try:
                    finished = self._batch(batch, encoded, conversations, keys, config, stats, memory, trace, advance)
                except Exception as error:
                    if not is_out_of_memory(error) or batch.halves() is None:
                        raise
                    if config.search == "smc" and len(batch.prompts) == 1:
                        raise  # its particles are resampled together
                if finished is None:  # outside of the except clause, which keeps the failed call's tensors alive
                    memory, stats.work = Memory(), work
                    batches.extendleft(reversed(self._halved(batch)))
                    bar.total += config.steps
                    bar.update(begin - bar.n)
                    continue
                # The even schedule drops steps: a batch counts in full all the same.
                bar.update(begin + config.steps - bar.n)
                stats.finish(time.perf_counter() - start)
                for index, samples in zip(batch.prompts, finished, strict=True):
                    # Samples of one prompt are apart only where a batch was halved down to it: in order, then.
                    gathered = [*waiting.pop(index, []), *samples]
                    if len(gathered) < config.num_samples:
                        waiting[index] = gathered
                    elif only is None or index in only:
                        yield index, GenerationResult(given[index], gathered, config)

    def memory_estimate(self, conversation: Conversation, prompt: list[int], config: GuidanceConfig) -> MemoryEstimate:
        """What batches take beyond the weights, by rows and length; runs both models on short inputs.

        Args:
            conversation, prompt: the longest of those to be generated for, and its ids.
            config: settings.
        """
        with self.running(config.replace(torch_compile=False)):
            table, _ = self.table(config, self.model.device)  # made once and kept: no part of a batch
            prepared = self.reward.prepare([conversation])

            def scorer(rows: int) -> Scorer:
                index = torch.zeros(rows, dtype=torch.int64, device=self.model.device)
                return self.scorer(prepared, index, config)

            def forwards(canvas: Canvas, length: int) -> Forwards:
                return self._forwards(self.model, canvas, config, length)

            of_model = self.model, forwards, self._block_length(config)
            return MemoryEstimate.measure(*of_model, config, conversation, prompt, self.decode, scorer, table)

    def _wrapped_reference(self, reference_model: Any, shift: bool | None) -> DiffusionModel:
        own = self.model
        found = models.wrap(reference_model, self.tokenizer, mask_token_id=own.mask_token_id, shift=shift)
        for name in ("vocab_size", "mask_token_id", "block_length"):
            mine, theirs = getattr(own, name, None), getattr(found, name, None)
            if mine != theirs:
                raise ValueError(f"the reference model has {name} {theirs}: expected {mine}, the model's own")
        return found

    def _check_lengths(
        self, encoded: list[list[int]], conversations: list[Conversation], config: GuidanceConfig
    ) -> None:
        """Raise ValueError, before anything is run, for prompts that a model's learned positions have no room for."""
        slots = config.max_new_tokens
        if hasattr(self.model, "check_length"):
            for place, ids in enumerate(encoded):
                self.model.check_length(len(ids) + slots, f"prompt {place} with {slots} response slots")
        if hasattr(self.reward, "check_length"):
            # Unguided, the reward reads texts alone, which may be shorter.
            self.reward.check_length(conversations, slots if config.guided else 0)

    def _halved(self, batch: Batch) -> tuple[Batch, Batch]:
        """The halves of a batch that ran out of memory, which is given back; says so."""
        halves = batch.halves()
        assert halves is not None
        gc.collect()
        if self.model.device.type == "cuda":
            torch.cuda.empty_cache()
        logger.warning(
            "out of memory with %d trajectories at a time: going on with %d; nothing is lost. A smaller batch_size (or "
            "batch_size='auto') avoids the attempt",
            len(batch.prompts) * batch.count,
            len(halves[1].prompts) * halves[1].count,
        )
        return halves

    def denoise(
        self,
        canvas: Canvas,
        conversations: list[Conversation],
        index: torch.Tensor,
        config: GuidanceConfig,
        *,
        stats: Stats | None = None,
        traces: list[list[StepTrace]] | None = None,
        on_step: OnStep | None = None,
        model: DiffusionModel | None = None,
        every_step: bool = False,
        memory: Memory | None = None,
        first_sample: int = 0,
    ) -> torch.Tensor:
        """Fill the masked slots of a canvas of one's own, in place: what loops with tokens in hand call.

        Args:
            canvas: trajectories, see :class:`Canvas`.
            conversations: the prompts as the reward model is to see them.
            index: int64 [R], each trajectory's place in `conversations`.
            config: settings.
            stats, traces, on_step, every_step: as in :meth:`Denoiser.run`.
            model: takes the place of the sampler's own adapter (to put something between forward and guidance).
            memory: memory to use again from one call to the next.
            first_sample: number of each prompt's first trajectory, as errors name it.

        Returns:
            [R, L] int64, the responses.

        Raises:
            NonFiniteLogitsError, NonFiniteRewardError: as :meth:`generate`.
            ValueError: guidance by a reward that has no gradient.
        """
        check_guides(self.reward, config)
        with self.running(config):
            table, undrawable = self.table(config, canvas.tokens.device)
            model, block_length = model or self.model, self._block_length(config)
            stats, copies = stats or Stats(), config.copies
            rows, paths, hook = canvas, traces, on_step
            if copies > 1:
                rows, index = canvas.copied(copies), index.repeat_interleave(copies)
                paths = None if traces is None else [[] for _ in range(len(traces) * copies)]
                hook = None if on_step is None else functools.partial(_on_first_copies, on_step, copies)
            score = self.scorer(self.reward.prepare(conversations), index, config)
            search = self._search(config, rows, score, table)
            denoiser = Denoiser(
                model=model,
                forwards=self._forwards(model, rows, config, block_length),
                score=score,
                table=table,
                config=config,
                undrawable=undrawable,
                canvas=rows,
                stats=stats,
                memory=Memory() if memory is None else memory,
                search=search,
            )
            try:
                response = fill(denoiser, block_length, traces=paths, on_step=hook, every_step=every_step)
                if search is not None:
                    blocks = None if block_length is None else canvas.masked.shape[1] // block_length
                    search.finish_rows(step_behind(config.steps, blocks), rows, paths)
                    stats.search_evaluations += not config.self_rewarding
                if copies > 1:
                    canvas.tokens.copy_(rows.tokens[::copies])
                    canvas.masked.copy_(rows.masked[::copies])
                    response = canvas.response
                    if traces is not None and paths is not None:
                        for trace, path in zip(traces, paths[::copies], strict=True):
                            trace.extend(path)
                return response
            except (NonFiniteLogitsError, NonFiniteRewardError) as error:
                places, row = index.tolist()[::copies], error.trajectory // copies
                number = first_sample + places[:row].count(places[row])
                raise error.at(f"sample {number} of {named(conversations[places[row]])}") from error

    def _search(self, config: GuidanceConfig, canvas: Canvas, score: Scorer, table: torch.Tensor) -> Search | None:
        if config.search == "best":
            return None
        groups = score.index.tolist()
        if config.search == "svdd":
            groups = [row // config.copies for row in range(len(canvas.tokens))]
        # What the reward keeps of the guided rows is not for other rows.
        apart = dataclasses.replace(
            score, prepared=dataclasses.replace(score.prepared, extra=dict(score.prepared.extra))
        )
        predicted = functools.partial(apart.of_tokens, table=table)
        return Search(config, canvas, groups, predicted, apart.of_texts)

    def _forwards(
        self, model: DiffusionModel, canvas: Canvas, config: GuidanceConfig, block_length: int | None
    ) -> Forwards:
        """How the models are asked for logits: with the caches and the combinations of a call's settings."""

        def make(of: DiffusionModel, tokens: torch.Tensor, attention: torch.Tensor) -> Forwards:
            if config.model_cache is not None:
                length = block_length or tokens.shape[1] - canvas.start
                return CachedCanvas(of, attention, config.model_cache, length)
            return forwards_of(of, tokens, attention, canvas.start, canvas.repeats)

        given = canvas.tokens, canvas.attention
        if not config.cfg_scale:
            return make(model, *given)
        if self.reference is not None:
            return AgainstReference(make(model, *given), make(self.reference, *given), config.cfg_scale)
        mask, start = model.mask_token_id, canvas.start
        return ClassifierFree(functools.partial(make, model), *given, start, mask, config.cfg_scale)

    def _block_length(self, config: GuidanceConfig) -> int | None:
        """The blocks of a call: the setting's, else those that the model was trained with.

        Raises:
            ValueError: the model was trained with others, or they do not divide the response.
        """
        own = getattr(self.model, "block_length", None)
        if own is None or config.block_length == own:
            return config.block_length
        if config.block_length is not None:
            raise ValueError(
                f"block_length={config.block_length}: {type(self.model).__name__} was trained with blocks of {own}, "
                f"expected block_length={own} or None"
            )
        if config.max_new_tokens % own:
            raise ValueError(
                f"max_new_tokens={config.max_new_tokens}: expected a multiple of {own}, the blocks that "
                f"{type(self.model).__name__} was trained with"
            )
        return own

    def scorer(
        self, prepared: PreparedPrompts, index: torch.Tensor, config: GuidanceConfig, ends: tuple[int, ...] = ()
    ) -> Scorer:
        """The reward of a batch's trajectories.

        Args:
            prepared: the prompts, by the reward's ``prepare``.
            index: int64 [R], each trajectory's place among them.
            config: settings.
            ends: ids that end a response beside :attr:`eos_token_id`.
        """
        of_model = self._eos, self._pad, self.tokenizer, self.model.vocab_size
        return Scorer(self.reward, prepared, index, config, *of_model, ends)

    @property
    def eos_token_id(self) -> int:
        """The id that ends responses."""
        return self._eos

    @property
    def pad_token_id(self) -> int:
        """The id that fills short rows: the tokenizer's pad token, else its end-of-sequence token."""
        return self._pad

    def decode(self, response: list[int]) -> str:
        """The text of a response's ids: up to the first end-of-sequence token, special tokens removed."""
        end = response.index(self._eos) if self._eos in response else len(response)
        return str(self.tokenizer.decode(response[:end], skip_special_tokens=True))

    def score(self, conversations: list[Conversation], responses: list[list[int]], batch_size: int = 16) -> list[float]:
        """Final rewards: responses decoded and tokenised again, as the reward model will be used by others."""
        texts = [self.decode(response) for response in responses]
        with torch.inference_mode(False), torch.no_grad(), evaluating(self.reward):
            return self.reward.score_texts(conversations, texts, batch_size=batch_size)

    def canvas(
        self,
        prompts: list[list[int]],
        keys: list[int],
        num_samples: int,
        slots: int,
        device: torch.device,
        first_sample: int = 0,
    ) -> Canvas:
        """All-masked trajectories for encoded prompts: `num_samples` contiguous rows a prompt, left-padded."""
        keys_of_rows = row_keys(keys, num_samples, slots, device, first_sample)
        return Canvas.blank(
            *left_padded(prompts, self._pad), self.model.mask_token_id, keys_of_rows, repeats=num_samples
        )

    def _batch(
        self,
        batch: Batch,
        encoded: list[list[int]],
        conversations: list[Conversation],
        keys: list[int],
        config: GuidanceConfig,
        stats: Stats,
        memory: Memory,
        trace: bool,
        watch: Callable[[Progress], None],
    ) -> list[list[Sample]]:
        """The samples of each prompt of a batch, denoised and scored."""
        k, count = batch.count, len(batch.prompts)
        conversations = [conversations[i] for i in batch.prompts]
        with torch.inference_mode(False):
            canvas = self.canvas(
                [encoded[i] for i in batch.prompts],
                [keys[i] for i in batch.prompts],
                k,
                config.max_new_tokens,
                self.model.device,
                batch.first,
            )
            index = torch.arange(count, device=self.model.device).repeat_interleave(k)
            traces: list[list[StepTrace]] | None = [[] for _ in range(count * k)] if trace else None

            def on_step(step: int, tokens: torch.Tensor) -> None:
                watch(Progress(batch.prompts, step, tokens[:, canvas.start :], traces))

            responses = self.denoise(
                canvas,
                conversations,
                index,
                config,
                stats=stats,
                traces=traces,
                on_step=on_step,
                memory=memory,
                first_sample=batch.first,
            ).tolist()
        # All at once: as many rows went through the reward model forward and backward a moment ago.
        values = self.score([c for c in conversations for _ in range(k)], responses, batch_size=len(responses))
        samples = [
            Sample(self.decode(response), response, value, None if traces is None else traces[row])
            for row, (response, value) in enumerate(zip(responses, values, strict=True))
        ]
        for number, conversation in enumerate(conversations):
            warn_of_missing(conversation, values[number * k : (number + 1) * k], batch.first)
        return [samples[i : i + k] for i in range(0, len(samples), k)]

    @contextlib.contextmanager
    def running(self, config: GuidanceConfig) -> Iterator[None]:
        """What guided steps need around them: models in evaluation mode, ordinary tensors, no gradients."""
        # Callers under torch.inference_mode() are served: gradients need ordinary tensors.
        with (
            torch.inference_mode(False),
            torch.no_grad(),
            evaluating(self.model, self.reference, self.reward),
            reward_savings(self.reward, config.exact_savings),
            compiled(self.reward, config.torch_compile),
        ):
            yield

    def table(self, config: GuidanceConfig, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
        """(the reward's embeddings seen through the vocabulary map [V, D], the ids that are never drawn).

        Raises:
            ValueError: the reward model is on another device.
        """
        table = self.reward.embedding_table(self.tokenizer, self.model.vocab_size)
        if not table.shape[1]:  # no embeddings, on no device
            table = table.to(device)
        if table.device != device:
            raise ValueError(
                f"the reward model is on {table.device} but the diffusion model is on {device}: expected one device"
            )
        undrawable = self._undrawable if config.suppress_undrawable else self._undrawable[:0]
        return table, undrawable.to(device)


def _on_first_copies(on_step: OnStep, copies: int, step: int, tokens: torch.Tensor) -> None:
    """Show a hook one candidate of each trajectory.

    Raises:
        ValueError: it would change tokens, of which there are several sets.
    """
    if on_step(step, tokens[::copies]) is not None:
        raise ValueError("search='svdd' draws candidates of every trajectory: expected a hook that changes no tokens")


def _hide(progress: bool | None) -> bool | None:
    """tqdm's `disable`: None hides the bar where there is no terminal."""
    return None if progress is None else not progress


@contextlib.contextmanager
def evaluating(*adapters: Any) -> Iterator[None]:
    """Evaluation mode for the adapters' modules (if they have one), each submodule's own mode restored afterwards.

    A model in training keeps dropout (LoRA's too) live: samples and gradients would be noise.
    """
    modules = [adapter.module for adapter in adapters if getattr(adapter, "module", None) is not None]
    training = [part for module in modules for part in module.modules() if part.training]
    try:
        for part in training:
            part.training = False
        yield
    finally:
        for part in training:
            part.training = True
