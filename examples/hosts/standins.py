"""Small stand-ins for hosts whose code cannot be shipped, written from their documented interfaces.

The examples run on them unless they are given the real thing; so do the tests where it is absent.
"""

from __future__ import annotations

from typing import Any

import torch
from transformers import AutoTokenizer, Qwen3ForCausalLM
from transformers.modeling_outputs import CausalLMOutput

from entrgi.tiny import weights_path


class Network(Qwen3ForCausalLM):
    """The built-in diffusion LM behind the hosts' way of calling: any attention mask, or none.

    Attributes:
        in_place: True to return slot i's logits at position i, as LLaDA does; else at i - 1, as Dream does.
    """

    in_place = False

    def forward(self, input_ids=None, attention_mask=None, position_ids=None, **kwargs: Any) -> CausalLMOutput:
        """Logits [B, S, V]; the mask may be 2-D, 4-D (bool or additive), "full" or None."""
        batch, length = input_ids.shape
        seen = torch.ones(batch, 1, 1, length, dtype=torch.bool, device=input_ids.device)
        if isinstance(attention_mask, torch.Tensor):
            seen = attention_mask if attention_mask.is_floating_point() is False else attention_mask > -1
            seen = seen.bool()[:, None, None] if attention_mask.dim() == 2 else seen.bool()
        itself = torch.eye(length, dtype=torch.bool, device=input_ids.device)
        hidden = self.model(
            input_ids,
            attention_mask=seen.expand(batch, 1, length, length) | itself,
            position_ids=position_ids,
            use_cache=False,
        )
        logits = self.lm_head(hidden.last_hidden_state)
        if self.in_place:
            logits = torch.cat([logits[:, :1], logits[:, :-1]], dim=1)
        return CausalLMOutput(logits=logits)


def network(in_place: bool = False) -> tuple[Network, Any]:
    """(the network, its tokenizer)."""
    model = Network.from_pretrained(weights_path("diffusion"), dtype=torch.float32).eval()
    model.in_place = in_place
    model.config.entrgi = {**model.config.entrgi, "shift": not in_place}
    model.config.mask_token_id = model.config.entrgi["mask_token_id"]
    return model, AutoTokenizer.from_pretrained(weights_path("diffusion"))


@torch.no_grad()
def llada_generate(
    model,
    prompt,
    attention_mask=None,
    steps=128,
    gen_length=128,
    block_length=128,
    temperature=0.0,
    cfg_scale=0.0,
    remasking="low_confidence",
    mask_id=126336,
):
    """LLaDA's `generate` in small: block after block, the surest masked tokens of the block first."""
    batch, width = prompt.shape
    x = torch.cat([prompt, prompt.new_full((batch, gen_length), mask_id)], dim=1)
    if attention_mask is not None:
        attention_mask = torch.cat([attention_mask, attention_mask.new_ones(batch, gen_length)], dim=1)
    given, blocks = x != mask_id, gen_length // block_length
    for end in range(width + block_length, x.shape[1] + 1, block_length):
        for step in range(steps // blocks):
            if cfg_scale > 0:
                both = torch.cat([x, x.masked_fill(given, mask_id)])
                mask = None if attention_mask is None else attention_mask.repeat(2, 1)
                logits, free = model(both, attention_mask=mask).logits.chunk(2)
                logits = free + (cfg_scale + 1) * (logits - free)
            else:
                logits = model(x, attention_mask=attention_mask).logits
            noisy = logits.double()
            if temperature > 0:
                noisy = noisy.exp() / (-torch.rand_like(noisy).log()) ** temperature
            drawn = noisy.argmax(dim=-1)
            sure = logits.softmax(dim=-1).gather(-1, drawn[..., None])[..., 0]
            sure = sure if remasking == "low_confidence" else torch.rand_like(sure)
            sure = sure.masked_fill(x != mask_id, -torch.inf)
            sure[:, end:] = -torch.inf
            left = (x[:, :end] == mask_id).sum(dim=1)
            for row in range(batch):
                count = -(-int(left[row]) // (steps // blocks - step))
                best = sure[row].topk(count).indices
                x[row, best] = drawn[row, best]
    return x
