"""Steer the built-in diffusion LM by two rewards at once, each with a tokenizer of its own.

python examples/rewards/weighted_sum.py      (needs the extra "real")
"""

from before_after import before_after

from entrgi import packaged, tiny
from entrgi_kernels.rewards import SimilarityReward, WeightedSum, wrap


def make(encoder, encoder_tokenizer) -> WeightedSum:
    """What the built-in reward model likes, told about a garden. Weights level the two scales."""
    liked = wrap(*tiny.load_reward())
    garden = SimilarityReward(encoder, encoder_tokenizer, "There is a beautiful garden.", unmatched="pieces")
    return 0.5 * liked + 4 * garden


if __name__ == "__main__":
    before_after(make(*packaged.load_minilm()))
