"""Dream's `diffusion_generate`, guided: the same signature, the same return."""

from __future__ import annotations

import inspect
import logging
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any, cast

import torch
from transformers.utils import ModelOutput

from ..guidance.canvas import Canvas
from ..guidance.keys import prompt_keys, row_keys
from ..guidance.results import Stats
from ..guidance.sampler import GuidedSampler
from ..models import DiffusionModel
from ..models.forwards import WholeCanvas
from ..text.template import conversation_from_ids
from .base import Guidance, Integration, Parts
from .steering import Steering

logger = logging.getLogger("entrgi_kernels")

# Dream's own defaults, for models that bring no generation config of that kind.
_DEFAULTS: dict[str, Any] = dict(
    temperature=0.0,
    top_p=None,
    top_k=None,
    max_length=20,
    max_new_tokens=None,
    eps=1e-3,
    steps=512,
    alg="origin",
    alg_temp=None,
    num_return_sequences=1,
    return_dict=False,
    output_history=False,
)


@dataclass
class DiffusionOutput(ModelOutput):
    """What `diffusion_generate(return_dict=True)` returns where the model's own class cannot be found."""

    sequences: torch.Tensor | None = None
    history: tuple[torch.Tensor, ...] | None = None


class DreamIntegration(Integration):
    """A model with a ``diffusion_generate``: that call is replaced on the instance by the fused loop."""

    name = "dream"

    @staticmethod
    def recognises(target: Any) -> bool:
        if not isinstance(target, torch.nn.Module) or not hasattr(target, "diffusion_generate"):
            return False
        # Fast-dLLM's loop, by blocks on a cache: its forwards are guided instead.
        loop: Any = getattr(target, "_sample", target.diffusion_generate)
        return "dual_cache" not in inspect.signature(loop).parameters

    @staticmethod
    def attach(target: Any, guidance: Guidance, parts: Parts) -> None:
        guidance.sampler = parts.sampler(target)
        guidance.claim(target)
        guidance.patch("diffusion_generate", DreamGeneration(target, guidance))


class DreamGeneration:
    """A replacement of a model's bound `diffusion_generate`.

    Args:
        model: the target.
        guidance: its handle.
    """

    def __init__(self, model: Any, guidance: Guidance) -> None:
        self._model = model
        self._guidance = guidance
        self._own = model.diffusion_generate

    def __call__(self, inputs: torch.Tensor | None = None, generation_config: Any = None, **kwargs: Any) -> Any:
        """Guided `diffusion_generate`.

        Args:
            inputs: [B, P] int64 prompt ids, left-padded where `attention_mask` says so.
            generation_config: Dream's; the model's own where None. Keyword arguments win over it.
            **kwargs: as for Dream: attention_mask, generation_tokens_hook_func(step, x, logits),
                generation_logits_hook_func(step, x, logits), and any generation setting.

        Returns:
            [B * num_return_sequences, P + L] int64, or the model's output class with `return_dict`.

        Raises:
            ValueError: no inputs, or a length that leaves nothing to generate.
        """
        if inputs is None or inputs.dim() != 2 or inputs.shape[1] == 0:
            raise ValueError(f"inputs={None if inputs is None else list(inputs.shape)}: expected prompt ids [B, P]")
        if not self._guidance.active:
            return self._own(inputs, generation_config, **kwargs)
        tokens_hook = kwargs.pop("generation_tokens_hook_func", None)
        logits_hook = kwargs.pop("generation_logits_hook_func", None)
        attention_mask = kwargs.pop("attention_mask", None)
        settings = self._settings(generation_config, kwargs, inputs.shape[1])
        with torch.inference_mode(False), torch.no_grad():
            return self._generate(inputs.clone(), attention_mask, settings, tokens_hook, logits_hook)

    def _settings(self, generation_config: Any, kwargs: dict[str, Any], width: int) -> SimpleNamespace:
        # The model's own resolution: arguments, then the config object, then defaults. Not through its
        # _prepare_generation_config: transformers' mixin has a method of that name that refuses other configs.
        values = {name: getattr(generation_config, name, default) for name, default in _DEFAULTS.items()}
        values.update((name, value) for name, value in kwargs.items() if name in _DEFAULTS)
        settings = SimpleNamespace(**{n: _DEFAULTS[n] if v is None else v for n, v in values.items()})
        if settings.max_new_tokens is None:
            # Dream counts its default length from the prompt's end, a given one from the start.
            given = "max_length" in kwargs or settings.max_length != _DEFAULTS["max_length"]
            settings.max_new_tokens = settings.max_length - (width if given else 0)
        if settings.max_new_tokens < 1:
            raise ValueError(
                f"max_length={settings.max_length} with a prompt of {width} tokens: expected room for at least one new "
                "token (set max_new_tokens)"
            )
        return settings

    def _generate(
        self,
        inputs: torch.Tensor,
        attention_mask: torch.Tensor | None,
        settings: SimpleNamespace,
        tokens_hook: Any,
        logits_hook: Any,
    ) -> Any:
        guidance, sampler = self._guidance, cast(GuidedSampler, self._guidance.sampler)
        mask_id, slots = sampler.model.mask_token_id, settings.max_new_tokens
        config = sampler.config.replace(
            seed=guidance.seed(),
            num_samples=settings.num_return_sequences,
            max_new_tokens=slots,
            schedule_eps=settings.eps,
            **{name: getattr(settings, name) for name in ("steps", "temperature", "top_p", "top_k", "alg", "alg_temp")},
        )
        attention = torch.ones_like(inputs, dtype=torch.bool) if attention_mask is None else attention_mask.bool()
        prompts = [ids[keep].tolist() for ids, keep in zip(inputs, attention, strict=True)]
        if any(mask_id in ids for ids in prompts):
            logger.warning("a prompt holds the mask token: it is kept as it is, guidance fills the response alone")
        k = settings.num_return_sequences
        keys = row_keys(prompt_keys(prompts), k, slots, inputs.device)
        canvas = Canvas.blank(inputs, attention, mask_id, keys)
        if tokens_hook is not None:
            canvas.tokens = tokens_hook(None, canvas.tokens, None)
            canvas.masked = canvas.response == mask_id
        history: list[torch.Tensor] = []
        hooked = _Hooked(sampler.model, logits_hook)
        hooks = logits_hook is not None or tokens_hook is not None

        def on_step(step: int, tokens: torch.Tensor) -> torch.Tensor | None:
            hooked.step = step + 1
            if tokens_hook is not None:
                tokens = tokens_hook(step, tokens, hooked.logits)
            if settings.output_history:
                history.append(tokens.clone())
            return None if tokens_hook is None else tokens

        sampler.stats = Stats()
        conversations = [conversation_from_ids(sampler.tokenizer, ids) for ids in prompts]
        index = torch.arange(len(prompts), device=inputs.device).repeat_interleave(k)
        responses = sampler.denoise(
            canvas,
            conversations,
            index,
            config,
            stats=sampler.stats,
            on_step=on_step,
            model=hooked if hooks else None,
            every_step=hooks,
        )
        repeated = [conversation for conversation in conversations for _ in range(k)]
        guidance.rewards = sampler.score(repeated, responses.tolist())
        if not settings.return_dict:
            return canvas.tokens
        return self._output_class()(sequences=canvas.tokens, history=history if settings.output_history else None)

    def _output_class(self) -> type:
        method = getattr(type(self._model), "diffusion_generate", None)
        module = sys.modules.get(getattr(method, "__module__", ""), None)
        return getattr(module, "DreamModelOutput", DiffusionOutput)


class _Hooked:
    """The model's adapter with the user's logits hook between the forward and the guidance.

    A hook sees the logits of the whole canvas, as in the model's own loop, so they are computed in full.
    """

    def __init__(self, model: DiffusionModel, logits_hook: Any) -> None:
        self._model = model
        self._hook = logits_hook
        self.step = 0
        self.logits: torch.Tensor | None = None

    def __getattr__(self, name: str) -> Any:
        return getattr(self._model, name)

    def forwards(self, tokens: torch.Tensor, attention: torch.Tensor, start: int, repeats: int = 1) -> WholeCanvas:
        """Whole canvases, through the hook."""
        return WholeCanvas(self, attention)

    def masked_logits(self, canvas: torch.Tensor, attention: torch.Tensor, masked: torch.Tensor) -> torch.Tensor:
        """As the adapter's, after the hook."""
        everywhere = torch.ones_like(masked)
        logits = self._model.masked_logits(canvas, attention, everywhere).view(*canvas.shape, -1)
        self.logits = logits if self._hook is None else self._hook(self.step, canvas, logits)
        return self.logits[masked]


class DreamHooks(Mapping[str, Any]):
    """The pair of hooks that guides an unpatched ``diffusion_generate``; unpacked, its two arguments::

        hooks = DreamHooks(model, reward_model, tokenizer, reward_tokenizer, learning_rate=0.5)
        model.diffusion_generate(input_ids, attention_mask=mask, **hooks)
        hooks.rewards

    The loop stays Dream's: it draws and ranks from the guided logits (confidence "guided", no postponed EOS) and takes
    every step. dllm's ``DreamSampler.sample`` takes the same pair. One call at a time.

    Args:
        model, reward_model, tokenizer, reward_tokenizer, settings: as for :class:`GuidedSampler`. Set `temperature`
            (and top_p, top_k) to those of the call: a hook cannot see them.
        seed: of the draws; None takes one from torch's own generator for each call.

    Attributes:
        sampler: holds models and settings.
        rewards: final rewards of the last finished call, one a row.
    """

    def __init__(
        self,
        model: Any,
        reward_model: Any,
        tokenizer: Any,
        reward_tokenizer: Any = None,
        *,
        seed: int | None = None,
        **settings: Any,
    ) -> None:
        self.sampler = GuidedSampler(model, reward_model, tokenizer, reward_tokenizer, **settings)
        self.rewards: list[float] = []
        self._steering = Steering(self.sampler)
        self._seed, self._start, self._scored = seed, 0, False
        self._hooks = {"generation_tokens_hook_func": self.on_tokens, "generation_logits_hook_func": self.on_logits}

    def __getitem__(self, name: str) -> Any:
        return self._hooks[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._hooks)

    def __len__(self) -> int:
        return len(self._hooks)

    def on_logits(self, step: int, x: torch.Tensor, logits: torch.Tensor) -> torch.Tensor:
        """Move the logits [B, S, V], shifted already, of the masked positions of x [B, S]; in place."""
        masked = x == self.sampler.model.mask_token_id
        if step == 0:
            self._begin(x, masked)
        response, opened = x[:, self._start :], masked[:, self._start :]
        if opened.any():
            rows, slots = opened.nonzero(as_tuple=True)
            logits[rows, slots + self._start] = self._steering(logits[rows, slots + self._start], response, opened)
        return logits

    def on_tokens(self, step: int | None, x: torch.Tensor, logits: torch.Tensor | None) -> torch.Tensor:
        """Leave the tokens alone; score them once none is masked."""
        if step is not None and not (x == self.sampler.model.mask_token_id).any():
            if not self._scored:
                self.rewards = self._steering.score(x)
            self._scored = True
        return x

    def _begin(self, x: torch.Tensor, masked: torch.Tensor) -> None:
        self._start, self._scored = int(masked.any(dim=0).long().argmax()), False
        pad, prompts = self.sampler.pad_token_id, []
        for ids in x[:, : self._start].tolist():
            # The attention mask is not shown; a template's own end-of-turn token never stands at the very left.
            first = next((place for place, token in enumerate(ids) if token != pad), 0)
            prompts.append(ids[first:])
        seed = int(torch.randint(1 << 62, ()).item()) if self._seed is None else self._seed
        self._steering.begin(prompts, [self._start] * len(x), seed=seed)
