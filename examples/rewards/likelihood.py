"""Steer the built-in diffusion LM toward texts that SmolLM2 finds likely, across tokenizers.

python examples/rewards/likelihood.py        (needs the extra "real")
"""

from before_after import before_after

from entrgi import packaged
from entrgi_kernels.rewards import LikelihoodReward


def make(model, tokenizer) -> LikelihoodReward:
    """Mean log-likelihood under any causal LM; tokens it lacks are predicted as the mean of their pieces."""
    return LikelihoodReward(model, tokenizer, unmatched="pieces")


if __name__ == "__main__":
    before_after(make(*packaged.load_smollm2()))
