"""Rewards: what guidance climbs, differentiable in the embeddings of a response.

``wrap`` makes a reward of a model by its class. A new kind of reward is one file beside these: a class that follows
the :class:`Reward` protocol, most easily a subclass of :class:`EmbeddingReward` with its own ``score_embeddings`` and
``score_texts``; of :class:`NetworkReward` where a network reads the whole conversation. ``decoding`` runs those
in parts. ``verifier`` makes a reward of a function of the finished text, of those in ``verifiers`` among others.
``template`` and ``VocabularyMap`` are those of :mod:`entrgi_kernels.text`.
"""

from ..text import template
from ..text.vocabulary import VocabularyMap, undrawable_ids
from . import verifiers
from .base import Reward, Targets
from .callable import CallableReward
from .decoding.sequences import PreparedPrompts, assemble
from .embedding import EmbeddingReward
from .judge import JudgeReward
from .likelihood import LikelihoodReward
from .network import NetworkReward
from .sequence_classification import SequenceClassifierReward
from .similarity import SimilarityReward
from .verifying import Verifier, verifier
from .weighted_sum import WeightedSum
from .wrapping import wrap

__all__ = [
    "CallableReward",
    "EmbeddingReward",
    "JudgeReward",
    "LikelihoodReward",
    "NetworkReward",
    "PreparedPrompts",
    "Reward",
    "SequenceClassifierReward",
    "SimilarityReward",
    "Targets",
    "Verifier",
    "VocabularyMap",
    "WeightedSum",
    "assemble",
    "template",
    "undrawable_ids",
    "verifier",
    "verifiers",
    "wrap",
]
