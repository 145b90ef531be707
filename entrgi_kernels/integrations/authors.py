"""The published code: its test-time script (a module with ``optimize_logits``) and its training sampler.

Source: arXiv 2602.05000 and the code published with it. Only the interfaces are theirs.
"""

from __future__ import annotations

import types
from collections.abc import Sequence
from typing import Any

import torch

from .. import rewards
from ..guidance.canvas import Canvas, OpenSlots, left_padded
from ..guidance.config import GuidanceConfig
from ..guidance.inner import InnerLoop
from ..guidance.keys import prompt_keys, row_keys
from ..guidance.memory import Memory
from ..guidance.results import Stats
from ..guidance.sampler import GuidedSampler, evaluating
from ..guidance.scoring import Scorer
from ..rewards import PreparedPrompts, SequenceClassifierReward
from ..text.template import conversation_from_ids
from .base import Guidance, Integration, Parts


class ScriptIntegration(Integration):
    """The test-time script, as a module: its ``optimize_logits`` is replaced, which its ``generate`` calls by name."""

    name = "script"

    @staticmethod
    def recognises(target: Any) -> bool:
        return isinstance(target, types.ModuleType) and callable(getattr(target, "optimize_logits", None))

    @staticmethod
    def attach(target: Any, guidance: Guidance, parts: Parts) -> None:
        if parts.reward_model is not None or parts.tokenizer is not None:
            raise TypeError("the script hands its own reward model and tokenizers over: guide(module) takes none")
        guidance.patch("optimize_logits", OptimizeLogits(target.optimize_logits, guidance, parts.settings))


class OptimizeLogits:
    """`optimize_logits` with the script's signature and return, on the fused loop.

    Method, M, eta, temperature and filters are the script's; the settings of guide() give the rest (state_dtype,
    backend, ...). No token is suppressed, as published.

    Args:
        own: the function replaced.
        guidance: its handle.
        settings: of :class:`GuidanceConfig`.
    """

    def __init__(self, own: Any, guidance: Guidance, settings: dict[str, Any]) -> None:
        self._own, self._guidance = own, guidance
        self._settings = GuidanceConfig().replace(**settings)
        self._memory = Memory()
        self._reward: SequenceClassifierReward | None = None
        self._caches: Any = None

    def __call__(
        self,
        base_logits: torch.Tensor,
        mask_indices: Sequence[torch.Tensor],
        trajectories: torch.Tensor,
        max_prompt_len: int,
        trajectory_pad_lens: torch.Tensor,
        B: int,
        K: int,
        reward_model: Any,
        caches: Sequence[Any],
        token_mapping: torch.Tensor,
        mapped_embeds: torch.Tensor,
        reward_embed_layer: Any,
        eos_token_id: int,
        pad_token_id: int | None,
        cfg: Any,
    ) -> tuple[torch.Tensor | None, torch.Tensor | None]:
        """(phi moved [N, V], phi as it was [N, V]), or (None, None) where nothing is masked."""
        if not self._guidance.active:
            return self._own(
                base_logits,
                mask_indices,
                trajectories,
                max_prompt_len,
                trajectory_pad_lens,
                B,
                K,
                reward_model,
                caches,
                token_mapping,
                mapped_embeds,
                reward_embed_layer,
                eos_token_id,
                pad_token_id,
                cfg,
            )
        with torch.inference_mode(False), torch.no_grad():
            masked = torch.stack(list(mask_indices)).clone()
            phi = base_logits[masked].clone()
            if not len(phi):
                return None, None
            before = phi.clone()
            if self._reward is None or self._reward.module is not reward_model:
                self._reward = SequenceClassifierReward(reward_model, None)
                self._caches = None
            if self._caches is not caches:
                self._begin(caches, trajectories, max_prompt_len, K)
            method = "entrgi" if cfg.use_entrgi else "aps" if cfg.use_aps else "expectation"
            config = self._settings.replace(
                method=method,
                weight=self._settings.weight if method == "entrgi" else None,
                guidance_steps=cfg.M,
                learning_rate=cfg.eta,
                temperature=cfg.temperature,
                top_p=cfg.top_p if cfg.top_p < 1 else None,
                top_k=cfg.top_k,
                seed=self._seed,
            )
            if not config.guided:
                return phi, before
            # A mask token within a prompt is the script's to fill; it reaches no reward.
            response = masked.nonzero()[:, 1] >= max_prompt_len
            inside = phi if bool(response.all()) else phi[response]
            tokens = trajectories[:, max_prompt_len:].clone()
            opened = masked[:, max_prompt_len:]
            pad = eos_token_id if pad_token_id is None else pad_token_id
            # A classifier looks at no tokens, so nobody asks for the tokenizer.
            of_model = eos_token_id, pad, None, mapped_embeds.shape[0]
            score = Scorer(self._reward, self._prepared, self._index, config, *of_model)
            slots = OpenSlots.of(opened, self._keys, opened.sum(dim=1).tolist())
            with evaluating(self._reward):
                loop = InnerLoop(score, mapped_embeds.detach(), config, self._memory)
                guided = loop(inside, slots, tokens, self._step)
            if inside is not phi:
                phi[response] = inside
            self._guidance.stats.steps += 1
            self._guidance.stats.reward_evaluations += config.inner_steps
            self._guidance.stats.add_weights(guided.weights)
            self._step += 1
            return phi, before

    def _begin(self, caches: Sequence[Any], trajectories: torch.Tensor, start: int, samples: int) -> None:
        """A batch of the script starts: it hands the same list of caches to all steps of one."""
        assert self._reward is not None
        prefixes, suffixes = (
            [getattr(cache, name)[0] for cache in caches] for name in ("prefix_embeds", "suffix_embeds")
        )
        prefix, prefix_valid = _right_aligned(prefixes)
        suffix, suffix_valid = _right_aligned(suffixes)
        self._prepared = PreparedPrompts(
            [[{"role": "user", "content": cache.user_content}] for cache in caches],
            # The ids are not known, only how many there are, and that is all that is asked.
            [[0] * len(part) for part in prefixes],
            [[0] * len(part) for part in suffixes],
            prefix,
            prefix_valid,
            suffix,
            suffix_valid,
        )
        device = trajectories.device
        self._index = torch.arange(len(caches), device=device).repeat_interleave(samples)
        keys = prompt_keys(trajectories[::samples, :start].tolist())
        self._keys = row_keys(keys, samples, trajectories.shape[1] - start, device)
        self._caches, self._step, self._seed = caches, 0, self._guidance.seed()
        self._guidance.stats = Stats()


def _right_aligned(rows: list[torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
    """Embeddings [R, T, D] of rows [T, D], zeros on the left of short ones, and which positions are real [R, T]."""
    longest = max(map(len, rows))
    pad = torch.nn.functional.pad
    embeddings = torch.stack([pad(row, (0, 0, longest - len(row), 0)) for row in rows])
    valid = [pad(torch.ones(len(row), dtype=torch.bool, device=row.device), (longest - len(row), 0)) for row in rows]
    return embeddings, torch.stack(valid)


class TrainingSamplerIntegration(Integration):
    """An object with ``.sample(inputs, config)`` and ``._optimize_logits``: ``.sample`` is bound to the fused loop."""

    name = "training-sampler"

    @staticmethod
    def recognises(target: Any) -> bool:
        wanted = ("sample", "_optimize_logits", "model", "tokenizer")
        return not isinstance(target, (type, torch.nn.Module)) and all(hasattr(target, name) for name in wanted)

    @staticmethod
    def attach(target: Any, guidance: Guidance, parts: Parts) -> None:
        guidance.patch("sample", TrainingSample(target, guidance, parts))


class TrainingSample:
    """`.sample` of the training sampler, same signature and return.

    Args:
        target: the sampler; its `model` is looked up at each call, since trainers wrap and unwrap it.
        guidance: its handle.
        parts: what guide() was given; the sampler's own reward model, tokenizers and table where nothing was.
    """

    def __init__(self, target: Any, guidance: Guidance, parts: Parts) -> None:
        self._target, self._guidance, self._own = target, guidance, target.sample
        given = parts.reward_model is not None
        model = parts.reward_model if given else getattr(target, "reward_model", None)
        tokenizer = parts.reward_tokenizer or (None if given else getattr(target, "reward_tokenizer", None))
        self._reward = None
        if model is not None:
            self._reward = rewards.wrap(model, tokenizer or target.tokenizer, unmatched=parts.unmatched)
            table = getattr(target, "mapped_embeds", None)
            if not given and table is not None:
                self._reward.embedding_table = lambda tokenizer, vocab_size: table  # type: ignore[method-assign]
        parts.reward_model, parts.reward_tokenizer = self._reward, None
        # As published: every token may be drawn.
        parts.settings.setdefault("suppress_undrawable", False)
        self._parts = parts
        self._samplers: dict[bool, tuple[Any, GuidedSampler]] = {}
        GuidanceConfig().replace(**parts.settings)

    def __call__(self, inputs: Sequence[Any], config: Any, **kwargs: Any) -> Any:
        """Guided `sample`: [B, T] int64, or the target's output object with `return_dict`.

        Raises:
            ValueError: a number of tokens to commit that is drawn at random, or rows that are not K of each prompt.
        """
        given = {name: kwargs.get(name, getattr(config, name)) for name in _SETTINGS}
        samples = config.num_generations
        if not self._guidance.active or self._reward is None or config.M < 1 or samples < 1:
            return self._own(inputs, config, **kwargs)
        if given["stochastic_transfer"]:
            raise ValueError("stochastic_transfer=True: expected False, the fused loop plans its commits ahead")
        prompts = [list(ids) if isinstance(ids, (list, tuple)) else ids.tolist() for ids in inputs]
        if len(prompts) % samples:
            raise ValueError(f"{len(prompts)} inputs: expected num_generations={samples} of each prompt, side by side")
        sampler = self._sampler(bool(given["right_shift_logits"]))
        settings = sampler.config.replace(
            method=config.guidance_type,
            guidance_steps=config.M,
            learning_rate=config.eta,
            num_samples=samples,
            deprioritize_eos=config.deprioritize_eos,
            schedule="even",
            confidence="guided",
            seed=self._guidance.seed(),
            **{
                name: given[name]
                for name in ("max_new_tokens", "steps", "alg", "alg_temp", "temperature", "top_p", "top_k")
            },
        )
        with torch.inference_mode(False):
            sampler.stats = Stats()
            canvas, index = self._canvas(sampler, prompts, samples, settings.max_new_tokens)
            conversations = [conversation_from_ids(self._target.tokenizer, ids) for ids in prompts[::samples]]
            responses = sampler.denoise(canvas, conversations, index, settings, stats=sampler.stats)
        sampler.stats.finish(0.0)
        self._target._last_entropy_weight_mean = sampler.stats.mean_weight
        self._guidance.rewards = sampler.score([conversations[i] for i in index.tolist()], responses.tolist())
        if not given["return_dict"]:
            return canvas.tokens
        return type(self._target).sample.__globals__["BaseSamplerOutput"](sequences=canvas.tokens, histories=None)

    def _sampler(self, shift: bool) -> GuidedSampler:
        model, sampler = self._samplers.get(shift, (None, None))
        if sampler is None or model is not self._target.model:
            self._parts.shift = shift
            sampler = self._parts.sampler(self._target.model, self._target.tokenizer)
            self._samplers[shift] = self._target.model, sampler
        self._guidance.sampler = sampler
        return sampler

    def _canvas(
        self, sampler: GuidedSampler, prompts: list[list[int]], samples: int, slots: int
    ) -> tuple[Canvas, torch.Tensor]:
        # The published sampler pads with the end-of-sequence token.
        device, eos = sampler.model.device, self._target.tokenizer.eos_token_id
        first = prompts[::samples]
        same = all(ids == first[row // samples] for row, ids in enumerate(prompts))
        keys = row_keys(prompt_keys(first), samples, slots, device)
        repeats = samples if same else 1
        canvas = Canvas.blank(*left_padded(prompts, eos), sampler.model.mask_token_id, keys, repeats=repeats)
        return canvas, torch.arange(len(first), device=device).repeat_interleave(samples)


# Settings that both know by the same name, and those of the target alone.
_SAMPLING = ("max_new_tokens", "steps", "alg", "alg_temp", "temperature", "top_p", "top_k")
_SETTINGS = (*_SAMPLING, "right_shift_logits", "stochastic_transfer", "return_dict")
