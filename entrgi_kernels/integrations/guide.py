"""One line in existing code: a model, a sampler or a pipeline whose own generation call is guided.

The instance is patched, never its class; removing the guidance restores it exactly.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from transformers import PreTrainedTokenizerBase

from .base import ATTRIBUTE, Guidance, Parts, check_free
from .registry import find


def guide(
    target: Any,
    reward_model: Any = None,
    tokenizer: PreTrainedTokenizerBase | None = None,
    reward_tokenizer: PreTrainedTokenizerBase | None = None,
    *,
    integration: str | None = None,
    seed: int | None = None,
    unmatched: str = "unk",
    mask_token_id: int | None = None,
    shift: bool | None = None,
    cfg_scale: float | None = None,
    canvas: Callable[..., Any] | None = None,
    **settings: Any,
) -> Any:
    """Guide a diffusion language model, or whatever samples from one, in place; existing calls stay as they are.

    ::

        model = entrgi_kernels.guide(model, reward_model, tokenizer, reward_tokenizer, learning_rate=0.5)
        model.diffusion_generate(...)                   # Dream's own call, now guided
        generate(model, prompt, ...)                    # LLaDA's function, now guided: it calls model(x).logits
        model.entrgi.generate(["..."], num_samples=4)   # or from text, for every model
        model.entrgi.rewards, model.entrgi.stats
        model.entrgi.remove()

        with entrgi_kernels.guide(model, reward_model, tokenizer).entrgi as guidance:
            ...                                         # removed at the end

    docs/integrations.md lists the targets, what is guided in each, and the limits.

    Args:
        target: a diffusion language model, or something else of that table.
        reward_model, reward_tokenizer, unmatched, mask_token_id, shift: as for :class:`GuidedSampler`. Targets that
            bring a reward model of their own need none.
        tokenizer: of the diffusion model; None takes the target's own, where it has one.
        integration: the name of a way in, to have that one; None finds it out.
        seed: of the guided calls; None draws one from torch's own generator each time, so that torch.manual_seed
            reproduces a run.
        cfg_scale, canvas: for loops that call ``model(x).logits``; see :class:`LogitsHook`.
        **settings: of :class:`GuidanceConfig`. The target's own arguments (steps, temperature, top_p, ...) win over
            them, where it has them.

    Returns:
        The same object, with the handle :class:`Guidance` as its attribute ``entrgi``.

    Raises:
        ValueError: the target is guided or accelerated already, or models, tokenizers or settings cannot serve.
        TypeError: a target that no integration knows, or something that this one needs is missing.
    """
    check_free(target)
    kind = find(target, integration)
    guidance = Guidance(target, kind.name, seed)
    parts = Parts(
        reward_model=reward_model,
        tokenizer=tokenizer,
        reward_tokenizer=reward_tokenizer,
        unmatched=unmatched,
        mask_token_id=mask_token_id,
        shift=shift,
        cfg_scale=cfg_scale,
        canvas=canvas,
        settings=settings,
    )
    try:
        kind.attach(target, guidance, parts)
    except BaseException:
        guidance.remove()  # a target is guided or untouched, nothing between
        raise
    guidance.patch(ATTRIBUTE, guidance)
    return target
