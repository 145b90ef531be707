"""What a sample costs, in floating-point operations, from the models' shapes and the settings.

A product of an [a, b] and a [b, c] matrix counts 2abc; everything else (norms, softmax, filters, Adam) is left out, as
``torch.utils.flop_counter`` leaves it out. With P prompt tokens, L slots, S = P + L, n_t slots masked at step t, V the
vocabulary, D the reward model's width, R = L + suffix the reward positions that are not in the prefix cache:

====================  ==================================================================================================
diffusion model       every step that commits something: S (2 W + 4 l a S) + 2 n_t d V, with W the weights of its l
                      layers, a the width of its attention heads together, d its own width; twice that with cfg_scale
reward, guidance      M times a step, forward and backward to its inputs: 2 R (2 W) + 3 R (4 l a (P + R)); its last
                      layer is run at one position alone
vocabulary            M times a step: 2 n_t V D for the soft embedding, and as much for its gradient; in the last of the
                      M the gradient is that of the committed rows alone; "first_order" has M = 1 and no soft embedding
reward, search        "svdd" once a step, "smc" once in r: a forward of R positions, its last layer at one; at the end
                      one over P + L. The self-rewarding form asks for none
reward, final score   one forward over P + L positions
====================  ==================================================================================================

The B candidates of "svdd" are rows of their own to the diffusion model and to the search's reward; guidance moves them
as one row, before they part. Under a search all open rows count for the last of the M gradients.

By blocks n_t are a block's slots. The reward reads up to the block's end, and finished blocks are in its cache: L is
then a block, P all before it; a block's first step also reads the one before. The diffusion model's forwards are, with
B the block length and C the position at which a block begins:

====================  ==================================================================================================
whole canvases        of S positions, as above
block-causal          of B positions that see C + B; a block's first one also runs the block before it, the very first
                      one the prompt
model_cache           a block's first one of S positions; later ones of the block ("dual") or of all from it on
                      ("prefix"), which see S. The very first block's is made anew once its samples part. Models whose
                      logits are shifted run one position more
====================  ==================================================================================================

The savings that are counted are those that depend on the settings alone (idle steps, prefix cache, finished blocks,
last layer, committed rows); the others make a guided sample cheaper than it is counted here, never dearer. All K
samples of a prompt share its first forward: that one is counted 1/K.

A plan counts all steps of all blocks. After the run each block is counted by what was run of it (:attr:`Stats.work`):
a threshold takes fewer steps, and behind the end of a text no block is begun. Under a search the trajectories of a
batch go on together until the last has ended; until then one that has ended costs forwards, but no products with V.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from entrgi_kernels.names import METHODS

if TYPE_CHECKING:
    from entrgi_kernels.guidance.config import GuidanceConfig

_SUFFIX = 2  # tokens after the response in ChatML templates: end of turn, newline


@dataclasses.dataclass(frozen=True)
class Shape:
    """A decoder's dimensions: as far as they matter for its products.

    ``block_length``: of a model trained with block-causal attention; None for one that sees whole canvases.
    ``shift``: whether slot i's logits are read at position i - 1.
    """

    layers: int
    hidden: int
    intermediate: int
    attention: int
    key_value: int
    vocabulary: int
    tied: bool = True
    block_length: int | None = None
    shift: bool = False

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
        mark = config.get("entrgi")
        mark = mark if isinstance(mark, dict) else {}
        named = [mark.get("block_length"), config.get("block_length")]
        if "auto_map" in config:  # names that mean other things in transformers' own architectures
            named += [config.get("block_size"), config.get("bd_size")]
        blocks = [length for length in named if isinstance(length, int) and not isinstance(length, bool)]
        groups = text.get("num_key_value_heads") or text.get("n_kv_heads") or heads
        return cls(
            layers=first("num_hidden_layers", "n_layers"),
            hidden=hidden,
            intermediate=first("intermediate_size", "mlp_hidden_size"),
            attention=heads * width,
            key_value=groups * width,
            vocabulary=first("vocab_size", "embedding_size"),
            tied=bool(text.get("tie_word_embeddings", False)),
            block_length=(blocks[0] or None) if blocks else None,
            shift=bool(mark.get("shift", str(config.get("model_type")).lower() == "dream")),
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


def sample_flops(
    model: Shape,
    reward: Shape,
    config: GuidanceConfig,
    prompt_tokens: float,
    work: Sequence[Sequence[float]] | None = None,
) -> dict[str, float]:
    """FLOPs of one sample, by part: "model", "reward", "vocabulary", "search", "scoring".

    Args:
        model, reward: dimensions of the diffusion and the reward model.
        config: the sampler's settings.
        prompt_tokens: of the prompt with its chat template.
        work: what was run of each block, a trajectory (:attr:`Stats.work`); None counts all that is planned.
    """
    from entrgi_kernels.guidance.schedules import plan, steps_of_block

    slots, sequence = config.max_new_tokens, prompt_tokens + config.max_new_tokens
    length = open_slots(model, config)
    # Blocks of a block-causal model are counted from the prompt's first token.
    offset = round(prompt_tokens) % length if model.block_length else 0
    parts = {"model": 0.0, "reward": 0.0, "vocabulary": 0.0, "search": 0.0}
    alike = config.num_samples * config.copies > 1  # before the very first commit
    shared, finished = 1 / config.num_samples, 0  # of the very first forward; slots that the reward need not read
    for number in range(math.ceil((slots + offset) / length)):
        begin, end = max(0, number * length - offset), min(slots, (number + 1) * length - offset)
        first_step, steps = steps_of_block(config.steps, number, slots // length)
        counts = plan(config.schedule, [end - begin], steps, config.schedule_eps).counts
        masked = end - begin
        working = [(step, row[0]) for step, row in enumerate(counts, first_step) if row[0]]
        shares = [(1.0, 1.0)] * len(working)
        if work is not None:
            shares = _shares(masked, [count for _, count in working], work[number] if number < len(work) else (0, 0, 0))
        for step, ((numbered, count), (ran, opened)) in enumerate(zip(working, shares, strict=True)):
            first = (number, step) == (0, 0)
            # Where samples part a block's cache is made anew.
            fresh = step == 0 or (step == 1 and number == 0 and alike)
            forward = _forward(model, config, prompt_tokens, number * length - offset, length, fresh, first)
            forward = ran * forward + opened * 2 * masked * model.hidden * model.vocabulary
            parts["model"] += (shared if first else config.copies) * (2 if config.cfg_scale else 1) * forward
            if _searches(config, numbered) and not first:
                shown = min(slots, (number + 1) * length)
                parts["search"] += ran * config.copies * _reward_forward(reward, shown + _SUFFIX, prompt_tokens)
            if config.guided:
                inner = config.inner_steps
                shown = min(slots, (number + 1) * length) - finished
                parts["reward"] += ran * inner * _reward_step(reward, shown + _SUFFIX, prompt_tokens + finished)
                finished = begin if config.saves("reward_committed") else 0
                product = 2 * model.vocabulary * reward.hidden
                ranked_before = config.alg == "entropy" and config.confidence == "base" and config.search == "best"
                # A soft embedding (none around hard tokens alone) and a gradient each inner step.
                soft = inner if METHODS[config.method].adam else 0
                rows = soft * masked + (inner - 1) * masked + (count if ranked_before else masked)
                parts["vocabulary"] += opened * product * rows
            masked -= count
    parts["scoring"] = reward.forward(sequence + _SUFFIX, sequence + _SUFFIX)
    if config.search != "best" and not config.self_rewarding:
        parts["search"] += config.copies * parts["scoring"]
    return parts


def _shares(masked: int, counts: list[int], work: Sequence[float]) -> list[tuple[float, float]]:
    """What was run of each planned step of a block, of its trajectories and of its open slots; 1 is all of it.

    Args:
        masked: the block's slots.
        counts: commits of each planned step.
        work: a block's of :attr:`Stats.work`, a trajectory.
    """
    begun, steps, slots = work
    if not begun:
        return [(0.0, 0.0)] * len(counts)
    # The first steps are those that were run; a last one stands for all beyond the plan.
    last, mean = len(counts) - 1, steps / begun
    ran = [begun * max(0.0, mean - step if step == last else min(1.0, mean - step)) for step in range(len(counts))]
    opened = [masked - done for done in itertools.accumulate(counts[:-1], initial=0)]
    planned = sum(share * count for share, count in zip(ran, opened, strict=True))
    return [(share, share * slots / planned) for share in ran]


def _searches(config: GuidanceConfig, step: int) -> bool:
    """Whether a search asks for rewards in a step."""
    if config.search == "best" or config.self_rewarding:
        return False
    return config.search == "svdd" or (step > 0 and step % config.search_every == 0)


def open_slots(model: Shape, config: GuidanceConfig) -> int:
    """Slots that are open at once: a block's, without blocks the response's."""
    return config.block_length or model.block_length or config.max_new_tokens


def _forward(
    model: Shape, config: GuidanceConfig, prompt: float, begin: float, length: int, fresh: bool, first: bool
) -> float:
    """One forward of the diffusion model without its head.

    Args:
        prompt: its tokens.
        begin: where the block begins, counted from the first slot; in the prompt where that ends within a block.
        length: of the block.
        fresh: whether what the block keeps is still to be made.
        first: whether it is the run's very first forward.
    """
    sequence = prompt + config.max_new_tokens
    if model.block_length is not None:
        context = prompt + begin + length
        return model.forward(context if first else 2 * length if fresh and begin > 0 else length, context)
    if config.model_cache is None or fresh:
        return model.forward(sequence, sequence)
    again = length if config.model_cache == "dual" else config.max_new_tokens - begin
    return model.forward(again + model.shift, sequence)


def _reward_forward(reward: Shape, tokens: float, prefix: float) -> float:
    """Forward alone; its last layer makes keys and values of all positions, the rest of one."""
    context = prefix + tokens
    inner = dataclasses.replace(reward, layers=reward.layers - 1).forward(tokens, context)
    at_all = 2 * 2 * reward.hidden * reward.key_value * tokens
    at_one = 2 * (reward.layer_weights - 2 * reward.hidden * reward.key_value) + 4 * reward.attention * context
    return inner + at_all + at_one


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
