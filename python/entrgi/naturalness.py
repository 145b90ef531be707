"""How natural a diffusion language model finds a text: nats per token, lower is more natural.

The figure is the usual bound of masked diffusion models on -log p(text | prompt): mask k random slots of the response
for k spread evenly over 1..L, and average (L / k) times the negative log-likelihood of the hidden tokens. The bound
covers all L slots (fill after the end of text costs next to nothing) and is divided by the text's own length, its end
token included.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from .prompts import Prompt


def nats_per_token(
    model: Any,
    tokenizer: Any,
    prompts: Sequence[Prompt],
    responses: Sequence[Sequence[int]],
    *,
    samples: int = 8,
    rows_per_pass: int = 64,
    seed: int = 0,
) -> list[float]:
    """Nats per token of each response under the diffusion model.

    Args:
        model: an ``entrgi_kernels.models.DiffusionModel``.
        tokenizer: its tokenizer.
        prompts: one per response.
        responses: token ids of all response slots, the fill after the end of text included.
        samples: numbers of hidden slots tried per response; the error falls with their root.
        rows_per_pass: canvases per forward pass.
        seed: of the choice of hidden slots, which is the same for texts of one length, so that methods compare fairly.

    Raises:
        ValueError: when prompts and responses differ in number or a response is empty.
    """
    import torch

    from entrgi_kernels.text.template import conversation_from, encode_prompt

    if len(prompts) != len(responses):
        raise ValueError(f"one prompt per response, got {len(prompts)} and {len(responses)}")
    generator = torch.Generator().manual_seed(seed)
    hidden_of: dict[int, Any] = {}
    rows: list[tuple[int, list[int], list[int], Any]] = []
    for owner, (prompt, response) in enumerate(zip(prompts, responses, strict=True)):
        length = len(response)
        if length == 0:
            raise ValueError(f"response {owner} is empty")
        if length not in hidden_of:
            hidden_of[length] = _hidden(length, min(samples, length), generator)
        ids = list(encode_prompt(tokenizer, conversation_from(prompt)))
        rows.extend((owner, ids, list(response), hidden) for hidden in hidden_of[length])
    totals = [0.0] * len(responses)
    for start in range(0, len(rows), rows_per_pass):
        for owner, nats in _score(model, tokenizer, rows[start : start + rows_per_pass]):
            totals[owner] += nats
    eos = tokenizer.eos_token_id
    lengths = [next((i + 1 for i, token in enumerate(r) if token == eos), len(r)) for r in responses]
    counts = [len(hidden_of[len(response)]) for response in responses]
    return [total / count / length for total, count, length in zip(totals, counts, lengths, strict=True)]


def _hidden(length: int, samples: int, generator: Any) -> list[Any]:
    """Masks [length] hiding k slots, k stratified over 1..length."""
    import torch

    masks = []
    for i in range(samples):
        share = (i + torch.rand((), generator=generator).item()) / samples
        count = min(length, int(share * length) + 1)
        mask = torch.zeros(length, dtype=torch.bool)
        mask[torch.randperm(length, generator=generator)[:count]] = True
        masks.append(mask)
    return masks


def _score(model: Any, tokenizer: Any, rows: list[tuple[int, list[int], list[int], Any]]) -> list[tuple[int, float]]:
    """(owner, weighted negative log-likelihood of the hidden slots) of each row."""
    import torch

    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
    width = max(len(ids) + len(response) for _, ids, response, _ in rows)
    canvas = torch.full((len(rows), width), pad, dtype=torch.int64)
    real = torch.zeros_like(canvas, dtype=torch.bool)
    masked = torch.zeros_like(real)
    for i, (_, ids, response, hidden) in enumerate(rows):
        canvas[i, width - len(ids) - len(response) :] = torch.tensor(ids + response)
        real[i, width - len(ids) - len(response) :] = True
        masked[i, width - len(response) :] = hidden
    truth = canvas[masked]
    canvas[masked] = model.mask_token_id
    with torch.inference_mode():
        logits = model.masked_logits(canvas.to(model.device), real.to(model.device), masked.to(model.device))
        nats = torch.nn.functional.cross_entropy(logits.float(), truth.to(logits.device), reduction="none").cpu()
    per_row = torch.zeros(len(rows)).index_add_(0, masked.nonzero()[:, 0], nats)
    return [
        (owner, per_row[i].item() * len(response) / int(hidden.sum()))
        for i, (owner, _, response, hidden) in enumerate(rows)
    ]
