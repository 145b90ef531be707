"""One line in existing code: a model whose own generation call is guided.

The instance is patched, never its class; removing the guidance restores it exactly.
"""

from __future__ import annotations

from typing import Any

import torch
from transformers import PreTrainedTokenizerBase

from .canvas import Statistics
from .dream import DreamGeneration
from .results import GenerationResult
from .sampler import GuidedSampler

_ATTRIBUTE = "entrgi"


class Guidance:
    """The handle that :func:`guide` leaves on a model as ``model.entrgi``; also a context manager that removes itself.

    Attributes:
        sampler: the :class:`GuidedSampler` that does the work.
        rewards: final rewards of the last guided call: a list a prompt for :meth:`generate`, a list of one number a
            sequence for the host's own call.
        results: what the last :meth:`generate` returned.
    """

    def __init__(self, model: Any, sampler: GuidedSampler, seed: int | None) -> None:
        self.sampler = sampler
        self.rewards: list[Any] = []
        self.results: list[GenerationResult] = []
        self._model = model
        self._seed = seed
        self._saved: dict[str, Any] = {}

    @property
    def stats(self) -> Statistics:
        """What the last guided call did."""
        return self.sampler.statistics

    def seed(self) -> int:
        """The seed of the next host call: the one given to guide(), else one from torch's own generator."""
        return int(torch.randint(1 << 62, ()).item()) if self._seed is None else self._seed

    def generate(self, prompts: Any, **settings: Any) -> list[GenerationResult]:
        """From text: see :meth:`GuidedSampler.generate`. Without a seed, one is drawn from torch's own generator."""
        settings.setdefault("seed", self.seed())
        self.results = self.sampler.generate(prompts, **settings)
        self.rewards = [result.rewards for result in self.results]
        return self.results

    def patch(self, name: str, value: Any) -> None:
        """Set an attribute of the model instance, remembering what the instance itself held."""
        if name in self._model.__dict__:
            self._saved[name] = self._model.__dict__[name]
        else:
            self._saved.setdefault(name, _MISSING)
        self._model.__dict__[name] = value

    def remove(self) -> None:
        """Restore the model; a second call does nothing."""
        for name, value in self._saved.items():
            if value is _MISSING:
                self._model.__dict__.pop(name, None)
            else:
                self._model.__dict__[name] = value
        self._saved.clear()

    def __enter__(self) -> Guidance:
        return self

    def __exit__(self, *_: object) -> None:
        self.remove()


_MISSING = object()


def guide(
    model: Any,
    reward_model: Any,
    tokenizer: PreTrainedTokenizerBase,
    reward_tokenizer: PreTrainedTokenizerBase | None = None,
    *,
    seed: int | None = None,
    unmatched: str = "unk",
    mask_token_id: int | None = None,
    shift: bool | None = None,
    **settings: Any,
) -> Any:
    """Guide a diffusion language model in place; existing calls stay as they are.

    ::

        model = entrgi_kernels.guide(model, reward_model, tokenizer, reward_tokenizer, learning_rate=0.5)
        model.diffusion_generate(...)                   # Dream's own call, now guided
        model.entrgi.generate(["..."], num_samples=4)   # or from text, for every model
        model.entrgi.rewards, model.entrgi.stats
        model.entrgi.remove()

        with entrgi_kernels.guide(model, reward_model, tokenizer).entrgi as guidance:
            ...                                         # removed at the end

    Args:
        model: the diffusion language model, a torch module. With a ``diffusion_generate`` (Dream's), that call is
            replaced on this instance by the guided loop, with the same signature and return.
        reward_model, tokenizer, reward_tokenizer, unmatched, mask_token_id, shift: as for :class:`GuidedSampler`.
        seed: of the guided calls; None draws one from torch's own generator each time, so that torch.manual_seed
            reproduces a run.
        **settings: of :class:`GuidanceConfig`. The host's own arguments (steps, temperature, top_p, ...) win over them.

    Returns:
        The same object.

    Raises:
        ValueError: the model is guided already, or models, tokenizers or settings cannot serve.
    """
    if isinstance(getattr(model, "__dict__", {}).get(_ATTRIBUTE), Guidance):
        raise ValueError("this model is guided already: call model.entrgi.remove() first")
    if not isinstance(model, torch.nn.Module):
        raise TypeError(
            f"model is {type(model).__name__}: expected a torch.nn.Module to patch; GuidedSampler takes more"
        )
    if hasattr(model, _ATTRIBUTE):
        raise ValueError(
            f"this model has an attribute {_ATTRIBUTE!r} of its own: use GuidedSampler, which patches nothing"
        )
    sampler = GuidedSampler(
        model,
        reward_model,
        tokenizer,
        reward_tokenizer,
        unmatched=unmatched,
        mask_token_id=mask_token_id,
        shift=shift,
        **settings,
    )
    guidance = Guidance(model, sampler, seed)
    guidance.patch(_ATTRIBUTE, guidance)
    if hasattr(model, "diffusion_generate"):
        guidance.patch("diffusion_generate", DreamGeneration(model, guidance))
    return model
