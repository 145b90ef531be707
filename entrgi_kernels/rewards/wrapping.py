"""Recognising a reward."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from torch import nn

from entrgi_kernels.rewards.base import Reward
from entrgi_kernels.rewards.savings import parse_savings
from entrgi_kernels.rewards.sequence_classification import SequenceClassifierReward
from entrgi_kernels.rewards.vocabulary import check_unmatched

_ACCEPTED = (
    "accepted: a loaded sequence classifier with one label (AutoModelForSequenceClassification) together with its "
    "tokenizer, or an object that follows entrgi_kernels.rewards.Reward"
)


def wrap(
    model_or_reward: Any,
    tokenizer: Any = None,
    *,
    unmatched: str = "unk",
    chat_template: str | None = None,
    exact_savings: str | Iterable[str] | None = "all",
) -> Reward:
    """Make a reward of a model, or return the reward that is given.

    Args:
        model_or_reward: a sequence classifier with one label, or something that follows the :class:`Reward` protocol.
        tokenizer: the model's tokenizer; not needed for a reward, which has its own.
        unmatched: what stands for tokens of the diffusion LM that the reward model does not know: ``"unk"``,
            ``"zero"`` or ``"pieces"`` (see :class:`VocabularyMap`).
        chat_template: a template to use instead of the tokenizer's own.
        exact_savings: work that a decoder's reward leaves out without changing a result: "all", "none" or a set of
            names (see :class:`SequenceClassifierReward`); a reward that is returned as it is keeps its own.

    Raises:
        TypeError: neither a classifier nor a reward, or the tokenizer is missing.
        ValueError: see :class:`SequenceClassifierReward`.
    """
    check_unmatched(unmatched)
    parse_savings(exact_savings)
    if isinstance(model_or_reward, Reward) and not isinstance(model_or_reward, type):
        return model_or_reward
    if isinstance(model_or_reward, str):
        raise TypeError(f"a reward cannot be the string {model_or_reward!r}; load the model first; {_ACCEPTED}")
    if not isinstance(model_or_reward, nn.Module):
        raise TypeError(f"a reward cannot be {type(model_or_reward).__name__}; {_ACCEPTED}")
    name = type(model_or_reward).__name__
    if _has_vocabulary_head(model_or_reward):
        raise TypeError(f"{name} predicts tokens and is no sequence classifier; {_ACCEPTED}")
    if tokenizer is None:
        raise TypeError(f"the reward model {name} needs its tokenizer; pass it as the reward tokenizer")
    return SequenceClassifierReward(
        model_or_reward, tokenizer, unmatched=unmatched, chat_template=chat_template, exact_savings=exact_savings
    )


def _has_vocabulary_head(module: nn.Module) -> bool:
    if "SequenceClassification" in type(module).__name__:
        return False
    try:
        return module.get_output_embeddings() is not None
    except (AttributeError, NotImplementedError):
        return False
