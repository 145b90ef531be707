"""The reward model and its judge: tiny causal classifiers, started from a language model of the same texts."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F

from .architecture import small_qwen3
from .data import Encoded, encode, labelled_pairs, plain_rows, reward_rows
from .grammar import rater
from .optim import Optimizers, batches, round_weights
from .tokenizer import split_chat

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase, Qwen3ForCausalLM, Qwen3ForSequenceClassification

LM_STEPS = 800
STEPS = 1000
BATCH = 64
PAIRS = 48_000
HOLES = 0.6  # share of batches laid out as guidance does it


def new_language_model(tokenizer: PreTrainedTokenizerBase, seed: int) -> Qwen3ForCausalLM:
    """An untrained causal model: 3 layers, width 128, about 0.75 million parameters."""
    from transformers import Qwen3ForCausalLM

    torch.manual_seed(seed)
    return Qwen3ForCausalLM(small_qwen3(tokenizer, layers=3, width=128, intermediate=256))


def to_classifier(language_model: Qwen3ForCausalLM) -> Qwen3ForSequenceClassification:
    """The same backbone under a scoring head of one label."""
    from transformers import Qwen3Config, Qwen3ForSequenceClassification

    fields = language_model.config.to_dict()
    for name in ("architectures", "id2label", "label2id"):
        fields.pop(name, None)
    config = Qwen3Config(**{**fields, "num_labels": 1})
    config.entrgi = {"kind": "reward", "layout": "prefix-response-suffix"}
    model = Qwen3ForSequenceClassification(config)
    model.model.load_state_dict(language_model.model.state_dict())
    torch.nn.init.zeros_(model.score.weight)
    return model


def score_rows(
    model: Qwen3ForSequenceClassification, ids: torch.Tensor, mask: torch.Tensor, position_ids: torch.Tensor
) -> torch.Tensor:
    """Rewards [B], read at the last position as guidance does."""
    hidden = model.model(
        input_ids=ids, attention_mask=mask, position_ids=position_ids, use_cache=False
    ).last_hidden_state
    return model.score(hidden[:, -1])[:, 0]


def preference_loss(
    rewards: torch.Tensor, gold: torch.Tensor, gap: float = 0.4, sharpness: float = 1.5
) -> tuple[torch.Tensor, torch.Tensor]:
    """Bradley–Terry over all pairs of a batch whose gold scores differ by more than ``gap``; labels are soft.

    Returns:
        (loss, share of those pairs ranked right).
    """
    difference = gold[:, None] - gold[None, :]
    keep = difference > gap
    margin = (rewards[:, None] - rewards[None, :])[keep]
    target = torch.sigmoid(sharpness * difference[keep])
    loss = F.binary_cross_entropy_with_logits(margin, target)
    # Differences alone leave the level free; a whiff of a penalty keeps it near zero.
    return loss + 1e-3 * rewards.mean().square(), (margin > 0).float().mean()


def train_language_model(
    tokenizer: PreTrainedTokenizerBase,
    data: Encoded,
    suffix: torch.Tensor,
    *,
    seed: int,
    steps: int,
    batch: int,
    log: Callable[[str], None],
) -> tuple[Qwen3ForCausalLM, float]:
    """Next-token training on the chats that the reward model will read; returns (model, running loss in nats)."""
    model = new_language_model(tokenizer, seed)
    model.set_attn_implementation("eager")
    model.train()
    optimizers = Optimizers(model, steps, lr=2e-3)
    generator = torch.Generator().manual_seed(seed)
    rows, running, pad = batches(len(data.prompt), batch, generator), 0.0, tokenizer.pad_token_id
    for step in range(steps):
        pick = next(rows)
        ids, mask, position_ids = plain_rows(data.prompt[pick], data.response[pick], suffix, pad)
        with torch.autocast("cpu", torch.bfloat16):
            hidden = model.model(
                input_ids=ids, attention_mask=mask, position_ids=position_ids, use_cache=False
            ).last_hidden_state
            known = (mask[:, :-1] * mask[:, 1:]).bool()
            logits = model.lm_head(hidden[:, :-1][known])
            loss = F.cross_entropy(logits.float(), ids[:, 1:][known])
        loss.backward()
        optimizers.step()
        running = float(loss.detach()) if step == 0 else 0.97 * running + 0.03 * float(loss.detach())
        if (step + 1) % 50 == 0 or step + 1 == steps:
            log(f"language model {step + 1}/{steps} loss {running:.3f}")
    return model, running


@torch.no_grad()
def pair_accuracy(
    model: Qwen3ForSequenceClassification,
    tokenizer: PreTrainedTokenizerBase,
    pairs: Sequence[tuple[str, str]],
    gold: list[float],
    *,
    holes: bool,
    batch: int = 128,
) -> float:
    """Share of pairs with gold scores more than 0.4 apart that the model ranks right."""
    data = encode(tokenizer, pairs, opened=False)
    suffix = torch.tensor(split_chat(tokenizer, "x")[1])
    lay = reward_rows if holes else plain_rows
    model.eval()
    rewards = []
    for start in range(0, len(pairs), batch):
        part = slice(start, start + batch)
        rewards.append(score_rows(model, *lay(data.prompt[part], data.response[part], suffix, tokenizer.pad_token_id)))
    model.train()
    return float(preference_loss(torch.cat(rewards), torch.tensor(gold))[1])


def train(
    tokenizer: PreTrainedTokenizerBase,
    *,
    seed: int,
    taste: int | None = None,
    steps: int = STEPS,
    lm_steps: int = LM_STEPS,
    batch: int = BATCH,
    corpus: int = PAIRS,
    log: Callable[[str], None] = print,
) -> tuple[Qwen3ForSequenceClassification, dict[str, Any]]:
    """Train one reward model for fixed numbers of steps; returns (model, metrics).

    Args:
        tokenizer: the tiny tokenizer.
        seed: of weights, data and order.
        taste: the seed of another rater's taste for the labels, or None for the gold score itself.
        steps: preference steps.
        lm_steps: next-token steps before them.
        batch: texts per step.
        corpus: texts.
        log: receives one line at a time.
    """
    offsets = None if taste is None else rater(taste)
    pairs, scores, flags = labelled_pairs(corpus, seed + 21, offsets=offsets)
    data, gold = encode(tokenizer, pairs, opened=False), torch.tensor(scores)
    suffix, pad = torch.tensor(split_chat(tokenizer, "x")[1]), tokenizer.pad_token_id
    # The language model reads the undamaged half, as a real one has read text and not noise.
    clean = torch.tensor([not flag for flag in flags]).nonzero()[:, 0]
    text = Encoded(data.prompt[clean], data.response[clean], data.length[clean])
    lm, lm_loss = train_language_model(tokenizer, text, suffix, seed=seed, steps=lm_steps, batch=batch, log=log)
    torch.manual_seed(seed + 1)
    model = to_classifier(lm)
    model.set_attn_implementation("eager")
    model.train()
    optimizers = Optimizers(model, steps, lr=1e-3)
    generator, rng = torch.Generator().manual_seed(seed + 1), random.Random(f"layout/{seed}")
    rows, loss_mean, hit_mean = batches(corpus, batch, generator), 0.0, 0.0
    for step in range(steps):
        pick = next(rows)
        if rng.random() < HOLES:
            # Guidance may run on any canvas from 16 slots up; texts that do not fit are cut, their label stays close.
            inputs = reward_rows(data.prompt[pick], data.response[pick], suffix, pad)
        else:
            inputs = plain_rows(data.prompt[pick], data.response[pick], suffix, pad)
        with torch.autocast("cpu", torch.bfloat16):
            rewards = score_rows(model, *inputs)
        loss, hit = preference_loss(rewards.float(), gold[pick])
        loss.backward()
        optimizers.step()
        loss_mean = float(loss.detach()) if step == 0 else 0.97 * loss_mean + 0.03 * float(loss.detach())
        hit_mean = float(hit) if step == 0 else 0.97 * hit_mean + 0.03 * float(hit)
        if (step + 1) % 50 == 0 or step + 1 == steps:
            log(f"preferences {step + 1}/{steps} loss {loss_mean:.3f} pairs right {hit_mean:.3f}")
    round_weights(model)
    metrics = {
        "lm_steps": lm_steps,
        "steps": steps,
        "batch": batch,
        "corpus": corpus,
        "seed": seed,
        "taste": taste,
        "lm_loss": lm_loss,
    }
    n = 1024 if steps >= 100 else 64
    for name, share in (("clean", 0.0), ("with_corrupted", 0.5)):
        check, labels, _ = labelled_pairs(n, 990_002, corrupted=share)
        for holes in (True, False):
            key = f"pair_accuracy_{name}_{'slots' if holes else 'plain'}"
            metrics[key] = pair_accuracy(model, tokenizer, check, labels, holes=holes)
            log(f"{key} {metrics[key]:.4f}")
    return model, metrics
