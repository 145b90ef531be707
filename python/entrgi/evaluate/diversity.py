"""How far the samples of a prompt differ: what a search that copies trajectories pays with."""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence

from ..errors import require

# Columns in their order; self-BLEU needs sacrebleu.
METRICS = {"distinct1": "distinct-1", "distinct2": "distinct-2", "selfbleu": "self-BLEU"}


def diversity(texts: Sequence[str]) -> dict[str, float | None]:
    """By metric; None where there is nothing to measure: no n-gram at all, or one text alone.

    Args:
        texts: samples of one prompt.
    """
    values = {"distinct1": distinct(texts, 1), "distinct2": distinct(texts, 2)}
    return {**values, "selfbleu": self_bleu(texts)} if has_bleu() else values


def distinct(texts: Sequence[str], n: int) -> float | None:
    """Different n-grams of words over all n-grams of all texts (distinct-n, arXiv 1510.03055)."""
    words = [text.split() for text in texts]
    grams = [tuple(some[i : i + n]) for some in words for i in range(len(some) - n + 1)]
    return len(set(grams)) / len(grams) if grams else None


def self_bleu(texts: Sequence[str]) -> float | None:
    """Mean BLEU, from 0 to 1, of each text against all others (self-BLEU, arXiv 1802.01886); 1 is all alike.

    Raises:
        UsageError: sacrebleu is not installed.
    """
    metrics = require("sacrebleu.metrics", "self-BLEU", "diversity")
    if len(texts) < 2:
        return None
    bleu = metrics.BLEU(effective_order=True)  # texts may be shorter than four words
    scores = [bleu.sentence_score(text, [*texts[:i], *texts[i + 1 :]]).score for i, text in enumerate(texts)]
    return sum(scores) / len(scores) / 100


def has_bleu() -> bool:
    """Whether sacrebleu is installed."""
    return importlib.util.find_spec("sacrebleu") is not None
