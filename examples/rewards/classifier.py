"""Steer the built-in diffusion LM by the built-in reward model, a sequence classifier.

python examples/rewards/classifier.py
"""

from before_after import before_after

from entrgi import tiny
from entrgi_kernels.rewards import SequenceClassifierReward


def make(model, tokenizer) -> SequenceClassifierReward:
    """The score of a reward model."""
    return SequenceClassifierReward(model, tokenizer)


if __name__ == "__main__":
    before_after(make(*tiny.load_reward()))
