"""What a sample costs, in floating-point operations, from the models' shapes and the settings.

A product of an [a, b] and a [b, c] matrix counts 2abc; everything else (norms, softmax, filters, Adam) is left out, as
``torch.utils.flop_counter`` leaves it out. With P prompt tokens, L slots, S = P + L, n_t slots masked at step t, V the
vocabulary, D the reward model's width, R = L + suffix the reward positions that are not in the prefix cache:

====================  ==================================================================================================
diffusion model       every step that commits something: S (2 W + 4 l a S) + 2 n_t d V, with W the weights of its l
                      layers, a the width of its attention heads together, d its own width
reward, guidance      M times a step, forward and backward to its inputs: 2 R (2 W) + 3 R (4 l a (P + R)); its last
                      layer is run at one position alone
vocabulary            M times a step: 2 n_t V D for the soft embedding, and as much for its gradient; in the last of the
                      M the gradient is that of the committed rows alone
reward, final score   one forward over P + L positions
====================  ==================================================================================================

The savings that are counted are those that depend on the settings alone (idle steps, prefix cache, last layer,
committed rows); those that depend on the text make a guided sample cheaper than it is counted here, never dearer. All K
samples of a prompt share its first forward: that one is counted 1/K.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from entrgi_kernels.guidance.config import GuidanceConfig

_SUFFIX = 2  # tokens after the response in ChatML templates: end of turn, newline


@dataclasses.dataclass(frozen=True)
class Shape:
    """A decoder's dimensions: as far as they matter for its products."""

    layers: int
    hidden: int
    intermediate: int
    attention: int
    key_value: int
    vocabulary: int
    tied: bool = True

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> Shape:
        """Of a transformers configuration (LLaMA's names, or LLaDA's).

        Raises:
            KeyError: where a dimension is missing.
        """
        text = config.get("text_config") or config

        def first(*names: str) -> Any:
            found = next((text[name] for name in names if text.get(name) is not None), None)
            if found is None:
                raise KeyError(names[0])
            return found

        hidden, heads = first("hidden_size", "d_model"), first("num_attention_heads", "n_heads")
        width = text.get("head_dim") or hidden // heads
        groups = text.get("num_key_value_heads") or text.get("n_kv_heads") or heads
        return cls(
            layers=first("num_hidden_layers", "n_layers"),
            hidden=hidden,
            intermediate=first("intermediate_size", "mlp_hidden_size"),
            attention=heads * width,
            key_value=groups * width,
            vocabulary=first("vocab_size", "embedding_size"),
            tied=bool(text.get("tie_word_embeddings", False)),
        )

    @property
    def layer_weights(self) -> int:
        """Weights of one layer's products: query, key, value, output, and a gated MLP."""
        return self.hidden * (2 * self.attention + 2 * self.key_value + 3 * self.intermediate)

    def parameters(self, head: bool) -> int:
        """Weights in all, norms left out; ``head`` counts an untied output head."""
        tables = 1 + (head and not self.tied)
        return self.layers * self.layer_weights + tables * self.vocabulary * self.hidden

    def forward(self, tokens: float, context: float) -> float:
        """FLOPs of ``tokens`` positions that look at ``context`` positions; no output head."""
        return self.layers * tokens * (2 * self.layer_weights + 4 * self.attention * context)


def sample_flops(model: Shape, reward: Shape, config: GuidanceConfig, prompt_tokens: float) -> dict[str, float]:
    """FLOPs of one sample, by part: "model", "reward", "vocabulary", "scoring".

    Args:
        model, reward: dimensions of the diffusion and the reward model.
        config: the sampler's settings.
        prompt_tokens: of the prompt with its chat template.
    """
    from entrgi_kernels.guidance.schedules import plan

    slots, sequence = config.max_new_tokens, prompt_tokens + config.max_new_tokens
    parts = {"model": 0.0, "reward": 0.0, "vocabulary": 0.0}
    counts = [row[0] for row in plan(config.schedule, [slots], config.steps, config.schedule_eps).counts]
    masked, first = slots, True
    for count in counts:
        if not count:
            continue
        share = 1 / config.num_samples if first else 1.0
        parts["model"] += share * (model.forward(sequence, sequence) + 2 * masked * model.hidden * model.vocabulary)
        if config.guided:
            inner = config.guidance_steps
            parts["reward"] += inner * _reward_step(reward, slots + _SUFFIX, prompt_tokens)
            product = 2 * model.vocabulary * reward.hidden
            ranked_before = config.alg == "entropy" and config.confidence == "base"
            rows = inner * masked + (inner - 1) * masked + (count if ranked_before else masked)
            parts["vocabulary"] += product * rows
        masked, first = masked - count, False
    parts["scoring"] = reward.forward(sequence + _SUFFIX, sequence + _SUFFIX)
    return parts


def _reward_step(reward: Shape, tokens: float, prefix: float) -> float:
    """Forward, and backward to the embeddings: the weights' own gradients are not computed."""
    context = prefix + tokens
    whole = dataclasses.replace(reward, layers=reward.layers - 1)
    attended = 4 * whole.layers * whole.attention * context * tokens
    inner = 2 * whole.forward(tokens, 0) + 3 * attended
    # The last layer: keys and values of all positions, the rest of one.
    last = 2 * 2 * reward.hidden * (2 * reward.key_value * tokens) + 2 * 2 * (
        reward.layer_weights - 2 * reward.hidden * reward.key_value
    )
    return inner + last + 3 * 4 * reward.attention * context


def total(parts: Mapping[str, float]) -> float:
    """All parts together."""
    return math.fsum(parts.values())
