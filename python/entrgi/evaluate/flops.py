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

Blocks of a block-causal model are counted from the prompt's first token: responses begin within one, at a place that
is each prompt's own, and most reach into one block more. What pads shorter prompts of a batch is not counted.
"""

from __future__ import annotations

import collections
import dataclasses
import itertools
import math
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

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
    prompt_tokens: float | Sequence[float],
    work: Sequence[Sequence[float]] | None = None,
) -> dict[str, float]:
    """FLOPs of one sample, by part: "model", "reward", "vocabulary", "search", "scoring".

    Args:
        model, reward: dimensions of the diffusion and the reward model.
        config: the sampler's settings.
        prompt_tokens: of each prompt with its chat template, or their mean where that is all that is known. Where in a
            block a prompt ends matters to a block-causal model: of a mean it is taken to be anywhere.
        work: what was run of each block, a trajectory (:attr:`Stats.work`); None counts all that is planned.

    Raises:
        ValueError: work of more than :func:`block_count` blocks.
    """
    slots, length = config.max_new_tokens, open_slots(model, config)
    endings, count = _endings(model, length, prompt_tokens), block_count(model, config, prompt_tokens)
    if work is not None and len(work) > count:
        raise ValueError(f"work of {len(work)} blocks: expected at most {count}, as the model's config.json has them")
    parts = {"model": 0.0, "reward": 0.0, "vocabulary": 0.0, "search": 0.0, "scoring": 0.0}
    alike = config.num_samples * config.copies > 1  # before the very first commit
    shared = 1 / config.num_samples  # of the very first forward
    committed = config.saves("reward_committed")
    for number in range(count):
        done = (work[number] if number < len(work) else (0, 0, 0)) if work is not None else None
        for ending, step, row in _rows(config, length, number, endings, done):
            tokens, begin = ending.tokens, number * length - ending.offset
            first = (number, step) == (0, 0)
            # Where samples part a block's cache is made anew.
            fresh = step == 0 or (step == 1 and number == 0 and alike)
            forward = _forward(model, config, tokens, begin, length, fresh, first)
            forward = row.ran * forward + row.opened * 2 * row.masked * model.hidden * model.vocabulary
            parts["model"] += (shared if first else config.copies) * (2 if config.cfg_scale else 1) * forward
            shown = min(slots, (number + 1) * length)
            if _searches(config, row.step) and not first:
                parts["search"] += row.ran * config.copies * _reward_forward(reward, shown + _SUFFIX, tokens)
            if config.guided:
                inner = config.inner_steps
                # Slots that the reward need not read; a block's first step also reads the block before.
                finished = max(0, begin if step else begin - length) if committed else 0
                shown -= finished
                parts["reward"] += row.ran * inner * _reward_step(reward, shown + _SUFFIX, tokens + finished)
                product = 2 * model.vocabulary * reward.hidden
                ranked_before = config.alg == "entropy" and config.confidence == "base" and config.search == "best"
                # A soft embedding (none around hard tokens alone) and a gradient each inner step.
                soft = inner if METHODS[config.method].adam else 0
                moved = (soft + inner - 1) * row.masked + (row.count if ranked_before else row.masked)
                parts["vocabulary"] += row.opened * product * moved
    for ending in endings:
        sequence = ending.tokens + slots + _SUFFIX
        parts["scoring"] += ending.share * reward.forward(sequence, sequence)
    if config.search != "best" and not config.self_rewarding:
        parts["search"] += config.copies * parts["scoring"]
    return parts


def block_count(model: Shape, config: GuidanceConfig, prompt_tokens: float | Sequence[float]) -> int:
    """Blocks that responses reach into, as far as config.json tells: a model's code may have blocks of its own."""
    length = open_slots(model, config)
    most = max(ending.offset for ending in _endings(model, length, prompt_tokens))
    return math.ceil((config.max_new_tokens + most) / length)


class _Ending(NamedTuple):
    """Prompts that end at one place in a block: their share of all, tokens (mean), and tokens in that block."""

    share: float
    tokens: float
    offset: int


def _endings(model: Shape, length: int, prompt_tokens: float | Sequence[float]) -> list[_Ending]:
    """The prompts, by where they end in a block of a block-causal model; all are one elsewhere."""
    if not isinstance(prompt_tokens, Sequence):
        if not model.block_length:
            return [_Ending(1.0, prompt_tokens, 0)]
        # All places alike, and the mean as it is.
        first = max(0, round(prompt_tokens - (length - 1) / 2))
        prompt_tokens = range(first, first + length)
    by_offset = collections.defaultdict(list)
    for tokens in prompt_tokens:
        by_offset[round(tokens) % length if model.block_length else 0].append(tokens)
    return [
        _Ending(len(some) / len(prompt_tokens), math.fsum(some) / len(some), offset)
        for offset, some in sorted(by_offset.items())
    ]


class _Row(NamedTuple):
    """A step of a trajectory.

    Attributes:
        step: number among all steps.
        masked, count: open slots, and how many are committed.
        ran, opened: how often it was run, of all prompts' trajectories; the same of its open slots.
    """

    step: int
    masked: int
    count: int
    ran: float
    opened: float


def _rows(
    config: GuidanceConfig, length: int, number: int, endings: Sequence[_Ending], work: Sequence[float] | None
) -> Iterator[tuple[_Ending, int, _Row]]:
    """What is run of a block: for each kind of prompt (kind, place of the step among the block's, the step).

    Args:
        work: the block's of :attr:`Stats.work`, a trajectory; None takes all that is planned.
    """
    from entrgi_kernels.guidance.schedules import plan, steps_of_block

    slots, here = config.max_new_tokens, []
    for ending in endings:
        begin, end = (min(slots, max(0, block * length - ending.offset)) for block in (number, number + 1))
        if begin < end:
            here.append((ending, end - begin))
    first_step, steps = steps_of_block(config.steps, number, slots // length)
    # Prompts share batches: where one commits something all are run.
    planned = plan(config.schedule, [masked for _, masked in here], steps, config.schedule_eps).counts
    working = [(step, counts) for step, counts in enumerate(planned, first_step) if any(counts)]
    if not working:
        return
    ran, scale = [1.0] * len(working), 1.0
    opened = []
    for place, (_, masked) in enumerate(here):
        done = itertools.accumulate((counts[place] for _, counts in working[:-1]), initial=0)
        opened.append([masked - count for count in done])
    if work is not None:
        begun, taken, seen = work
        mean, last = taken / begun if begun else 0.0, len(working) - 1
        # Whoever has no slots here was not run (under a search it was: as if it were one of the others). The first
        # steps are those that were run; a last one stands for all beyond the plan.
        begun /= math.fsum(ending.share for ending, _ in here)
        ran = [begun * max(0.0, mean - step if step == last else min(1.0, mean - step)) for step in range(len(working))]
        pairs = zip(here, opened, strict=True)
        whole = math.fsum(e.share * r * n for (e, _), column in pairs for r, n in zip(ran, column, strict=True))
        scale = seen / whole if whole else 0.0
    for place, (ending, _) in enumerate(here):
        for step, (numbered, counts) in enumerate(working):
            share = ending.share * ran[step]
            yield ending, step, _Row(numbered, opened[place][step], counts[place], share, share * scale)


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
