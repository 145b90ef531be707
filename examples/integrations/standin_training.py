"""A stand-in for the published training sampler: its interface (`.sample`, `._optimize_logits`), in small.

It guides the plain way, as `standin_script` does, whose guidance of one step it shares.
"""

from __future__ import annotations

from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import torch
from standin_script import filtered, optimize_logits, reward_cache


@dataclass
class SamplerConfig:
    """What `.sample` takes; each of these settings may also be given by name."""

    M: int = 1
    eta: float = 0.5
    num_generations: int = 1
    guidance_type: str = "entrgi"
    deprioritize_eos: bool = True
    right_shift_logits: bool = True
    max_new_tokens: int = 20
    steps: int = 8
    alg: str = "entropy"
    alg_temp: float | None = 0.0
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int | None = 50
    stochastic_transfer: bool = False
    return_dict: bool = False


@dataclass
class Sampler:
    """Rollouts for training: K = num_generations completions of each prompt, side by side in `inputs`."""

    model: Any
    tokenizer: Any
    reward_model: Any = None
    reward_tokenizer: Any = None
    token_mapping: torch.Tensor | None = None
    mapped_embeds: torch.Tensor | None = None

    def _optimize_logits(self, logits, masked, x, start, caches, config, sampling):
        """The logits of the masked rows, moved by M Adam steps."""
        cfg = SimpleNamespace(
            M=config.M, eta=config.eta, use_entrgi=config.guidance_type == "entrgi",
            use_aps=config.guidance_type == "aps", **sampling,
        )  # fmt: skip
        return optimize_logits(
            logits, list(masked), x, start, None, len(caches), config.num_generations, self.reward_model, caches,
            self.token_mapping, self.mapped_embeds, self.reward_model.get_input_embeddings(),
            self.tokenizer.eos_token_id, self.tokenizer.pad_token_id, cfg,
        )[0]  # fmt: skip

    def sample(self, inputs, config, **kwargs):
        """[B, S] tokens; prompts on the right, padded with end-of-sequence tokens."""
        given = {name: kwargs.get(name, value) for name, value in vars(config).items()}
        sampling = {name: given[name] for name in ("temperature", "top_p", "top_k")}
        eos, mask, slots = self.tokenizer.eos_token_id, self.tokenizer.mask_token_id, given["max_new_tokens"]
        prompts = [torch.as_tensor(ids).tolist() for ids in inputs]
        width = max(map(len, prompts))
        x = torch.tensor([[eos] * (width - len(ids)) + ids + [mask] * slots for ids in prompts])
        real = torch.arange(width + slots) >= torch.tensor([[width - len(ids)] for ids in prompts])
        texts = [_user(self.tokenizer.decode(ids)) for ids in prompts[:: config.num_generations]]
        caches = [reward_cache(self.reward_model, self.reward_tokenizer, text) for text in texts]
        left = slots
        for remaining in range(given["steps"], 0, -1):
            count = round(left / remaining)
            if not count:
                continue
            left -= count
            with torch.no_grad():
                logits = self.model(x, attention_mask=real.long()).logits
            if given["right_shift_logits"]:
                logits = torch.cat([logits[:, :1], logits[:, :-1]], dim=1)
            masked = x == mask
            phi = self._optimize_logits(logits, masked, x, width, caches, config, sampling)
            p = filtered(phi, SimpleNamespace(**sampling))
            drawn = torch.multinomial(p, 1)[:, 0]
            p = p / p.sum(-1, keepdim=True)
            sure = p.gather(1, drawn[:, None])[:, 0]
            if given["alg"] == "entropy":
                sure = torch.special.entr(p).sum(-1).neg()
            if config.deprioritize_eos:
                sure = sure.masked_fill(drawn == eos, -torch.inf)
            rows = masked.nonzero()[:, 0]
            for row in range(len(x)):
                here = rows == row
                chosen = torch.topk(sure[here], count)[1]
                x[row, masked[row].nonzero()[chosen, 0]] = drawn[here][chosen]
        return x


def _user(text):
    """What the user said, from a prompt with ChatML's markers."""
    return text.rpartition("<|im_start|>user\n")[2].partition("<|im_end|>")[0]
