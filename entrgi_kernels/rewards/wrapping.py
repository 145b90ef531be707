"""Recognising a reward."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from torch import nn

from ..models.modules import output_head
from ..text.vocabulary import check_unmatched
from .base import Reward
from .decoding.savings import parse_savings
from .judge import JudgeReward
from .likelihood import LikelihoodReward
from .sequence_classification import SequenceClassifierReward, has_head, is_classifier
from .similarity import SimilarityReward

_EXPECTED = (
    "expected, each loaded and with its tokenizer: a sequence classifier with one label "
    "(AutoModelForSequenceClassification), another reward model that gives one number to a text, a causal language "
    "model (AutoModelForCausalLM; with question= a judge), a sentence-embedding model (AutoModel) with target=; or an "
    "object that follows entrgi_kernels.rewards.Reward"
)


def wrap(
    model_or_reward: Any,
    tokenizer: Any = None,
    *,
    question: str | None = None,
    target: str | None = None,
    unmatched: str = "unk",
    chat_template: str | None = None,
    exact_savings: str | Iterable[str] | None = "all",
) -> Reward:
    """Make a reward of a model by its class, or return the reward that is given.

    ====================================  ======================================================================
    ``*ForSequenceClassification``        :class:`SequenceClassifierReward`
    another reward model                  the same (``*ForRewardModel``, a value head, a network of one's own)
    ``*ForCausalLM``                      :class:`LikelihoodReward`; with ``question=``, :class:`JudgeReward`
    a network without a head (AutoModel)  :class:`SimilarityReward`, needs ``target=``
    a reward                              itself
    ====================================  ======================================================================

    Args:
        model_or_reward: one of these.
        tokenizer: the model's tokenizer; not needed for a reward, which has its own.
        question: to be answered by yes or no, for a causal LM as a judge.
        target: a text to come close to, for a sentence-embedding model.
        unmatched: what stands for tokens of the diffusion LM that the reward model does not know: ``"unk"``,
            ``"zero"`` or ``"pieces"`` (see :class:`VocabularyMap`).
        chat_template: a template to use instead of the tokenizer's own.
        exact_savings: work that a decoder's reward leaves out without changing a result: "all", "none" or a set of
            names (see :class:`NetworkReward`); a reward that is returned as it is keeps its own.

    Raises:
        TypeError: neither a model of these kinds nor a reward, or the tokenizer or the target is missing.
        ValueError: see the classes.
    """
    check_unmatched(unmatched)
    parse_savings(exact_savings)
    if isinstance(model_or_reward, Reward) and not isinstance(model_or_reward, type):
        return model_or_reward
    if isinstance(model_or_reward, str):
        raise TypeError(f"a reward cannot be the string {model_or_reward!r}; load the model first; {_EXPECTED}")
    name = type(model_or_reward).__name__
    if not isinstance(model_or_reward, nn.Module):
        if callable(model_or_reward):
            name = getattr(model_or_reward, "__name__", name)
            raise TypeError(
                f"a function ({name}) needs an embedding table: pass "
                "entrgi_kernels.rewards.CallableReward(function, table, tokenizer); one of (prompt, text) ranks "
                "samples: entrgi_kernels.rewards.verifier(function)"
            )
        if isinstance(model_or_reward, (list, tuple)):
            raise TypeError(
                f"a reward cannot be a {name}: pass entrgi_kernels.rewards.WeightedSum([(weight, reward), ...]), or "
                "0.7 * a + 0.3 * b"
            )
        raise TypeError(f"a reward cannot be {name}; {_EXPECTED}")
    if tokenizer is None:
        raise TypeError(f"the reward model {name} needs its tokenizer; pass it as the reward tokenizer")
    common: dict[str, Any] = {"unmatched": unmatched}
    savings: dict[str, Any] = {"chat_template": chat_template, "exact_savings": exact_savings}
    if question is not None and target is not None:
        raise TypeError("question= makes a judge and target= a similarity; pass one of them")
    if target is not None:
        return SimilarityReward(model_or_reward, tokenizer, target, **common)
    if question is not None:
        return JudgeReward(model_or_reward, tokenizer, question, **common, **savings)
    if is_classifier(model_or_reward):
        return SequenceClassifierReward(model_or_reward, tokenizer, **common, **savings)
    # A reward model may call its own head, of one number, its output embeddings.
    weight = getattr(output_head(model_or_reward), "weight", None)
    if output_head(model_or_reward) is not None and (weight is None or len(weight) > 1):
        return LikelihoodReward(model_or_reward, tokenizer, **common, **savings)
    # No head at all: an embedding model, unless a reward model of somebody's own is meant.
    if name.endswith("Model") and not has_head(model_or_reward):
        raise TypeError(
            f"{name} has no head, so it makes no reward without target= (a text to come close to); {_EXPECTED}"
        )
    return SequenceClassifierReward(model_or_reward, tokenizer, **common, **savings)
