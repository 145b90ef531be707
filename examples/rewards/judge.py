"""Steer the built-in diffusion LM by SmolLM2's answer to a question about the text.

python examples/rewards/judge.py             (needs the extra "real")
"""

from before_after import before_after

from entrgi import packaged
from entrgi_kernels.rewards import JudgeReward


def make(model, tokenizer) -> JudgeReward:
    """Log-odds of yes over no, of any causal LM."""
    return JudgeReward(model, tokenizer, "Is the response a complaint?", unmatched="pieces")


if __name__ == "__main__":
    before_after(make(*packaged.load_smollm2()))
