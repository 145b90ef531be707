"""Steer the built-in diffusion LM by a function of a few lines: how close some token comes to a word.

python examples/rewards/function.py
"""

import torch
from before_after import before_after

from entrgi import tiny
from entrgi_kernels.rewards import CallableReward


def make(model, tokenizer, word: str = " garden") -> CallableReward:
    """A soft maximum, over a row, of cosines to the word's own embedding."""
    table = model.get_input_embeddings()
    wanted = table.weight[tokenizer(word, add_special_tokens=False)["input_ids"]].mean(0).detach()

    def closeness(inputs_embeds, attention_mask, position_ids):
        close = torch.cosine_similarity(inputs_embeds, wanted, dim=-1).masked_fill(attention_mask == 0, -1)
        return 0.1 * (close / 0.1).logsumexp(1)

    return CallableReward(closeness, table, tokenizer, unmatched="zero")


if __name__ == "__main__":
    before_after(make(*tiny.load_diffusion()))
