"""The masked diffusion language model: a Qwen3 backbone that looks both ways, Dream's right shift."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F

from .architecture import small_qwen3
from .data import PROMPT_SLOTS, RESPONSE_SLOTS, Encoded, bidirectional_mask, encode, positions
from .grammar import reviews
from .optim import Optimizers, batches, round_weights

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase, Qwen3ForCausalLM


@dataclasses.dataclass(frozen=True)
class Phase:
    """A stretch of training with its own reviews and its own learning-rate schedule."""

    steps: int
    batch: int
    lr: float
    corpus: int = 60_000
    decay_from: float = 0.3  # the share of the steps after which the rate falls to zero in a line


# After the first phase texts are fluent but drift from the prompt's topic: which things belong to which item is learned
# late. The second phase, of many small steps, is for that.
PHASES = (Phase(steps=1000, batch=64, lr=2e-3), Phase(steps=1500, batch=32, lr=1.2e-3, corpus=48_000, decay_from=0.0))


def new_model(tokenizer: PreTrainedTokenizerBase, seed: int) -> Qwen3ForCausalLM:
    """An untrained model: 4 layers, width 192, about 2.2 million parameters."""
    from transformers import Qwen3ForCausalLM

    torch.manual_seed(seed)
    config = small_qwen3(tokenizer, layers=4, width=192, intermediate=512)
    config.entrgi = {
        "kind": "masked_diffusion",
        "mask_token_id": tokenizer.mask_token_id,
        "shift": True,
        "prompt_slots": PROMPT_SLOTS,
        "response_slots": RESPONSE_SLOTS,
    }
    return Qwen3ForCausalLM(config)


def masked_logits(
    model: Qwen3ForCausalLM, prompt: torch.Tensor, canvas: torch.Tensor, masked: torch.Tensor
) -> torch.Tensor:
    """Logits at the masked slots, [number of them, V].

    Args:
        model: the diffusion model.
        prompt: [B, P], padded left with the padding id.
        canvas: [B, R], the response with mask ids in it.
        masked: [B, R] bool.
    """
    ids = torch.cat([prompt, canvas], dim=1)
    seen = torch.ones_like(ids, dtype=torch.bool)
    seen[:, : prompt.shape[1]] = prompt != model.config.pad_token_id
    hidden = model.model(
        input_ids=ids, attention_mask=bidirectional_mask(seen), position_ids=positions(seen), use_cache=False
    ).last_hidden_state
    # Slot i is predicted from position i - 1: Dream's shift, inherited from its autoregressive parent.
    return model.lm_head(hidden[:, prompt.shape[1] - 1 : -1][masked])


def draw_masks(batch: int, slots: int, generator: torch.Generator) -> torch.Tensor:
    """Masks [batch, slots] whose counts are spread evenly over 1..slots, a low-discrepancy draw over the batch."""
    offset = torch.rand((), generator=generator)
    level = (torch.arange(batch) / batch + offset) % 1.0
    count = (level * slots).long() + 1
    rank = torch.rand(batch, slots, generator=generator).argsort(1).argsort(1)
    return rank < count[:, None]


def diffusion_loss(
    model: Qwen3ForCausalLM, prompt: torch.Tensor, response: torch.Tensor, masked: torch.Tensor, mask_id: int
) -> torch.Tensor:
    """Nats per response slot: an unbiased estimate of the bound that 1/t weighting gives, exact counts for t."""
    logits = masked_logits(model, prompt, response.masked_fill(masked, mask_id), masked)
    nats = F.cross_entropy(logits.float(), response[masked], reduction="none")
    # The mean over each row's masked slots, then over rows: the weight R/count over R slots.
    weight = (1.0 / masked.sum(1, keepdim=True)).expand_as(masked)[masked]
    return (nats * weight).sum() / len(response)


@torch.no_grad()
def evaluate(model: Qwen3ForCausalLM, data: Encoded, mask_id: int, seed: int = 0, batch: int = 64) -> float:
    """Mean nats per response slot over all rows of ``data``."""
    generator = torch.Generator().manual_seed(seed)
    model.eval()
    total = 0.0
    for start in range(0, len(data.prompt), batch):
        prompt, response = data.prompt[start : start + batch], data.response[start : start + batch]
        masked = draw_masks(len(prompt), response.shape[1], generator)
        total += float(diffusion_loss(model, prompt, response, masked, mask_id)) * len(prompt)
    model.train()
    return total / len(data.prompt)


def held_out(tokenizer: PreTrainedTokenizerBase, n: int = 512) -> Encoded:
    """Reviews of a seed that no training run uses."""
    return encode(tokenizer, [(r.prompt, r.text) for r in reviews(n, seed=990_001)], opened=True)


def run_phase(
    model: Qwen3ForCausalLM,
    tokenizer: PreTrainedTokenizerBase,
    phase: Phase,
    *,
    seed: int,
    check: Encoded,
    log: Callable[[str], None],
) -> Qwen3ForCausalLM:
    """One phase of training on its own reviews; returns the model with rounded weights."""
    data = encode(tokenizer, [(r.prompt, r.text) for r in reviews(phase.corpus, seed=seed + 11)], opened=True)
    model.train()
    optimizers = Optimizers(model, phase.steps, lr=phase.lr, decay_from=phase.decay_from)
    generator = torch.Generator().manual_seed(seed)
    fits = {slots: (data.length < slots).nonzero()[:, 0] for slots in (16, 20, 24, 28)}
    rows = batches(phase.corpus, phase.batch, generator)
    short = {slots: batches(len(index), phase.batch, generator) for slots, index in fits.items()}
    mask_id, running = tokenizer.mask_token_id, 0.0
    for step, turn in zip(range(phase.steps), itertools.cycle(range(20))):
        # Every fifth batch has a shorter canvas, so that 16 to 32 new tokens all work.
        slots = (16, 20, 24, 28)[turn // 5] if turn % 5 == 4 else RESPONSE_SLOTS
        pick = next(rows) if slots == RESPONSE_SLOTS else fits[slots][next(short[slots])]
        response = data.response[pick, :slots]
        masked = draw_masks(len(response), slots, generator)
        with torch.autocast("cpu", torch.bfloat16):
            loss = diffusion_loss(model, data.prompt[pick], response, masked, mask_id)
        loss.backward()
        optimizers.step()
        running = float(loss.detach()) if step == 0 else 0.97 * running + 0.03 * float(loss.detach())
        if (step + 1) % 50 == 0 or step + 1 == phase.steps:
            log(f"diffusion {step + 1}/{phase.steps} loss {running:.3f}")
        if (step + 1) % 500 == 0:
            log(f"diffusion {step + 1}/{phase.steps} held out {evaluate(model, check, mask_id):.4f}")
    round_weights(model)
    return model


def train(
    tokenizer: PreTrainedTokenizerBase,
    *,
    seed: int = 0,
    steps: int | None = None,
    batch: int | None = None,
    corpus: int | None = None,
    log: Callable[[str], None] = print,
) -> tuple[Qwen3ForCausalLM, dict[str, Any]]:
    """Train the diffusion model for fixed numbers of steps; returns (model, metrics).

    ``steps``, ``batch`` and ``corpus`` replace those of every phase, for tests.
    """
    given = {"steps": steps, "batch": batch, "corpus": corpus}
    changes = {name: value for name, value in given.items() if value is not None}
    phases = [dataclasses.replace(phase, **changes) for phase in PHASES]
    check = held_out(tokenizer, 64 if changes else 512)
    model = new_model(tokenizer, seed)
    model.set_attn_implementation("eager")
    for number, phase in enumerate(phases):
        model = run_phase(model, tokenizer, phase, seed=seed + number * 1_000, check=check, log=log)
    nats = evaluate(model, check, tokenizer.mask_token_id)
    log(f"diffusion held-out nats per slot {nats:.4f}")
    metrics = {name: [getattr(phase, name) for phase in phases] for name in ("steps", "batch", "corpus", "lr")}
    return model, {**metrics, "seed": seed, "held_out_nats_per_slot": nats}
