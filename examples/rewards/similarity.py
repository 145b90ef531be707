"""Steer the built-in diffusion LM toward the meaning of a target text, by all-MiniLM-L6-v2.

python examples/rewards/similarity.py        (needs the extra "real")
"""

from before_after import before_after

from entrgi import packaged
from entrgi_kernels.rewards import SimilarityReward


def make(model, tokenizer) -> SimilarityReward:
    """Cosine to a target, of any sentence-embedding model."""
    return SimilarityReward(model, tokenizer, "The staff were rude and the room was dirty.", unmatched="pieces")


if __name__ == "__main__":
    before_after(make(*packaged.load_minilm()))
