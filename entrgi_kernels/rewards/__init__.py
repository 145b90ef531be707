"""Rewards: what guidance climbs, differentiable in the embeddings of a response.

``wrap`` makes a reward of a model by its class. A new kind of reward is one file beside these: a class that follows
the :class:`Reward` protocol, most easily a subclass of :class:`EmbeddingReward` with its own ``score_embeddings`` and
``score_texts``. ``template`` turns conversations into token ids and back, ``VocabularyMap`` shows a diffusion LM's
tokens through a reward model's embedding table.
"""

from entrgi_kernels.rewards import template
from entrgi_kernels.rewards.base import EmbeddingReward, PreparedPrompts, Reward, Targets, assemble
from entrgi_kernels.rewards.callable import CallableReward
from entrgi_kernels.rewards.judge import JudgeReward
from entrgi_kernels.rewards.likelihood import LikelihoodReward
from entrgi_kernels.rewards.network import NetworkReward
from entrgi_kernels.rewards.sequence_classification import SequenceClassifierReward
from entrgi_kernels.rewards.similarity import SimilarityReward
from entrgi_kernels.rewards.vocabulary import VocabularyMap, undrawable_ids
from entrgi_kernels.rewards.weighted_sum import WeightedSum
from entrgi_kernels.rewards.wrapping import wrap

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
    "VocabularyMap",
    "WeightedSum",
    "assemble",
    "template",
    "undrawable_ids",
    "wrap",
]
