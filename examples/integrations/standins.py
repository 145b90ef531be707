"""Small stand-ins for third-party loops whose code cannot be shipped, written from their documented interfaces.

The examples run on them unless they are given the real thing; so do the tests where it is absent.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from transformers import AutoTokenizer, DynamicCache, Qwen3ForCausalLM
from transformers.modeling_outputs import CausalLMOutput, CausalLMOutputWithPast

from entrgi.tiny import weights_path


class Network(Qwen3ForCausalLM):
    """The built-in diffusion LM behind those loops' way of calling: any attention mask, or none.

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


class CachedNetwork(Network):
    """The same on top of keys and values, in the ways that loops hand them over.

    A cache object grows in place; ``store_kv=False`` or ``update_past_key_values=False`` leave it as it is. A tuple of
    (keys, values) by layer comes back longer, or with the positions replaced that ``replace_position`` tells, a mask.
    With ``use_block_cache`` a second cache holds the block at hand: returned when none is given, else replaced from
    ``replace_position`` on, a number.
    """

    def forward(
        self, input_ids=None, attention_mask=None, position_ids=None, past_key_values=None, use_cache=False,
        store_kv=None, update_past_key_values=None, replace_position=None, use_block_cache=False,
        block_past_key_values=None, **kwargs: Any,
    ):  # fmt: skip
        """Logits [B, n, V] and the caches."""
        past, inner = past_key_values, block_past_key_values
        layers = [(layer.keys, layer.values) for layer in past.layers] if isinstance(past, DynamicCache) else past or []
        layers = [pair for pair in layers if pair[0] is not None]
        length, (batch, count) = layers[0][0].shape[2] if layers else 0, input_ids.shape
        columns = torch.arange(length, length + count)
        others = torch.arange(length)
        if inner is not None:
            columns = columns + replace_position
            pairs = [(layer.keys, layer.values) for layer in inner.layers]
            layers = [
                (torch.cat([k, ik], dim=2), torch.cat([v, iv], dim=2))
                for (k, v), (ik, iv) in zip(layers, pairs, strict=True)
            ]
            others = torch.arange(length + pairs[0][0].shape[2])
            others = others[~torch.isin(others, columns)]
        elif replace_position is not None:
            columns = replace_position[0].nonzero()[:, 0]
            others = others[~torch.isin(others, columns)]
        work = DynamicCache()
        for number, (keys, values) in enumerate(layers):
            work.update(keys[:, :, others], values[:, :, others], number)
        seen = torch.ones(batch, 1, count, len(others) + count, dtype=torch.bool)
        if isinstance(attention_mask, torch.Tensor):
            mask = attention_mask if not attention_mask.is_floating_point() else attention_mask > 0
            seen = mask.bool()[(slice(None), *[None] * (4 - mask.dim()))].expand_as(seen)
        itself = torch.cat([torch.zeros(count, len(others)), torch.eye(count)], dim=1).bool()
        places = columns.expand_as(input_ids) if position_ids is None else position_ids
        hidden = self.model(
            input_ids, attention_mask=seen | itself, position_ids=places, past_key_values=work, use_cache=True
        )
        logits = self.lm_head(hidden.last_hidden_state)
        if self.in_place:
            logits = torch.cat([logits[:, :1], logits[:, :-1]], dim=1)
        fresh = [(layer.keys[:, :, -count:], layer.values[:, :, -count:]) for layer in work.layers]
        if use_block_cache and inner is None:
            inner = DynamicCache()
            for number, pair in enumerate(fresh):
                inner.update(*pair, number)
        elif inner is not None:
            for layer, pair in zip(inner.layers, fresh, strict=True):
                for old, new in zip((layer.keys, layer.values), pair, strict=True):
                    old[:, :, replace_position : replace_position + count] = new
        stores = use_cache if store_kv is None else store_kv
        stores = stores if update_past_key_values is None else update_past_key_values
        if isinstance(past, DynamicCache):
            for number, pair in enumerate(fresh if stores else []):
                past.update(*pair, number)
        elif replace_position is not None and inner is None:
            for held, pair in zip(past, fresh, strict=True):
                for old, new in zip(held, pair, strict=True):
                    old[:, :, columns] = new
        elif stores:
            held = past or [(pair[0][:, :, :0], pair[1][:, :, :0]) for pair in fresh]
            past = tuple(
                (torch.cat([k, new_k], dim=2), torch.cat([v, new_v], dim=2))
                for (k, v), (new_k, new_v) in zip(held, fresh, strict=True)
            )
        output = CausalLMOutputWithPast(logits=logits, past_key_values=past)
        output.block_past_key_values = inner
        return output


def network(in_place: bool = False, kind: type[Network] = Network) -> tuple[Network, Any]:
    """(the network, its tokenizer)."""
    model = kind.from_pretrained(weights_path("diffusion"), dtype=torch.float32).eval()
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


@torch.no_grad()
def block_generate(
    model, prompt, mask_id, gen_length=16, block_length=4, temperature=0.0, threshold=0.9, attention_mask=None
):  # fmt: skip
    """Block diffusion on a cache, as SDAR and its kin run it: [B, P + gen_length] tokens, whole blocks.

    The prompt's whole blocks fill the cache; then each block is denoised on top of it, surest tokens first, and added.
    """
    batch, width = prompt.shape
    total = -(-(width + gen_length) // block_length) * block_length
    x = torch.cat([prompt, prompt.new_full((batch, total - width), mask_id)], dim=1)
    real = x.new_ones(x.shape)
    real[:, :width] = real[:, :width] if attention_mask is None else attention_mask
    places = (real.cumsum(-1) - 1).clamp(min=0)
    cache, start = DynamicCache(), width // block_length * block_length
    if start:
        seen = real[:, None, :start].expand(batch, start, start)
        model(
            x[:, :start], attention_mask=seen, position_ids=places[:, :start], past_key_values=cache, use_cache=True,
            store_kv=True,
        )  # fmt: skip
    for begin in range(start, total, block_length):
        block = x[:, begin : begin + block_length]
        told = dict(
            attention_mask=real[:, None, : begin + block_length].expand(batch, block_length, -1),
            position_ids=places[:, begin : begin + block_length],
            past_key_values=cache,
            use_cache=True,
        )
        while (open_slots := block == mask_id).any():
            logits = model(block, **told, store_kv=False).logits.double()
            if temperature > 0:
                logits = logits / temperature - (-torch.rand_like(logits).log()).log()
            drawn = logits.argmax(dim=-1)
            sure = logits.softmax(dim=-1).gather(-1, drawn[..., None])[..., 0].masked_fill(~open_slots, -1)
            commit = open_slots & ((sure > threshold) | (sure == sure.amax(dim=1, keepdim=True)))
            block[commit] = drawn[commit]
        model(block, **told, store_kv=True)
    return x


@dataclass
class Sampler:
    """dllm's kind of sampler in small: prompts of any length as lists of ids, settings by name."""

    model: Any
    tokenizer: Any

    def sample(self, inputs, config=None, **kwargs):
        """[B, S] tokens; prompts on the right, padded with end-of-sequence tokens."""
        mask, eos = self.tokenizer.mask_token_id, self.tokenizer.eos_token_id
        width = max(map(len, inputs))
        prompts = torch.tensor([[eos] * (width - len(ids)) + list(ids) for ids in inputs])
        real = torch.tensor([[0] * (width - len(ids)) + [1] * len(ids) for ids in inputs])
        slots = kwargs.get("max_new_tokens", 16)
        settings = dict(temperature=kwargs.get("temperature", 0.0), steps=kwargs.get("steps", slots))
        return llada_generate(self.model, prompts, real, gen_length=slots, block_length=slots, mask_id=mask, **settings)

    def infill(self, inputs, config=None, **kwargs):
        """Not in this stand-in."""
        raise NotImplementedError


def diffusion_gemma(tokenizer: Any, seed: int = 0, canvas_length: int = 8):
    """A random DiffusionGemma of the real architecture, small: transformers' own class."""
    from transformers import DiffusionGemmaConfig, DiffusionGemmaForBlockDiffusion

    text = dict(
        vocab_size=len(tokenizer),
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=16,
        global_head_dim=16,
        num_experts=2,
        top_k_experts=1,
        moe_intermediate_size=16,
        layer_types=["sliding_attention", "full_attention"],
        pad_token_id=tokenizer.pad_token_id,
        eos_token_id=tokenizer.eos_token_id,
        initializer_range=0.2,
    )
    vision = dict(
        hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=1, num_key_value_heads=1,
        head_dim=16, global_head_dim=16,
    )  # fmt: skip
    config = DiffusionGemmaConfig(
        text_config=text, vision_config=vision, canvas_length=canvas_length, image_token_id=len(tokenizer) + 9
    )
    torch.manual_seed(seed)
    model = DiffusionGemmaForBlockDiffusion(config).eval()
    model.generation_config.pad_token_id = tokenizer.pad_token_id
    model.generation_config.eos_token_id = tokenizer.eos_token_id
    return model


@dataclass
class DreamModelOutput:
    """What `diffusion_generate(return_dict=True)` returns."""

    sequences: torch.Tensor
    history: list[torch.Tensor] | None = None


class Dream(Network):
    """The built-in diffusion LM with Dream's `diffusion_generate` in small, hooks and histories included."""

    @torch.no_grad()
    def diffusion_generate(
        self, inputs, generation_config=None, *, attention_mask=None, max_new_tokens=16, steps=16, temperature=0.0,
        top_k=None, top_p=None, alg="entropy", eps=1e-3, return_dict=False, output_history=False,
        generation_tokens_hook_func=lambda step, x, logits: x,
        generation_logits_hook_func=lambda step, x, logits: logits,
    ):  # fmt: skip
        """[B, P + max_new_tokens] tokens, or the output object."""
        mask, history = self.config.mask_token_id, []
        x = torch.nn.functional.pad(inputs, (0, max_new_tokens), value=mask)
        real = torch.ones_like(inputs) if attention_mask is None else attention_mask
        real = torch.nn.functional.pad(real, (0, max_new_tokens), value=1)
        places = (real.cumsum(-1) - 1).masked_fill(real == 0, 1)
        times = torch.linspace(1, eps, steps + 1)
        x = generation_tokens_hook_func(None, x, None)
        for step in range(steps):
            logits = self(x, real, places).logits
            logits = generation_logits_hook_func(step, x, torch.cat([logits[:, :1], logits[:, :-1]], dim=1))
            open_slots = x == mask
            scores = logits / (temperature or 1)
            if top_k is not None:
                scores = scores.masked_fill(scores < scores.topk(top_k).values[..., -1:], -torch.inf)
            p = scores.softmax(-1)
            drawn = p.argmax(-1) if not temperature else torch.distributions.Categorical(p).sample()
            sure = (p * (p + 1e-10).log()).sum(-1)
            if alg == "maskgit_plus":
                sure = p.gather(-1, drawn[..., None])[..., 0]
            share = 1 - times[step + 1] / times[step] if step < steps - 1 else 1
            count = int(open_slots.sum() / len(x) * share)
            if count:
                best = torch.topk(sure.masked_fill(~open_slots, -torch.inf), count).indices
                x = x.scatter(1, best, drawn.gather(1, best))
            x = generation_tokens_hook_func(step, x, logits)
            history.append(x.clone())
        if not return_dict:
            return x
        return DreamModelOutput(sequences=x, history=history if output_history else None)


def dream() -> tuple[Dream, Any]:
    """(the network, its tokenizer)."""
    model, tokenizer = network()
    model.__class__ = Dream
    return model, tokenizer
