"""The published guided generation, whole: written here from the method's description, as people run it.

Every position's logits are computed and shifted; masked rows are gathered trajectory by trajectory; phi, Adam and the
reward model's input are made anew at every denoising step, also where it commits nothing; draws and commits go
trajectory by trajectory; the final texts are scored one at a time. The inner steps are :mod:`.step`'s, so the
loop can be run with the batched step in place of the published one.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F

from benchmarks.baselines.step import Published, filtered
from benchmarks.harness.inputs import Canvas, StepSettings

Draw = Callable[[torch.Tensor], torch.Tensor]


@dataclass(frozen=True)
class LoopSettings:
    """Settings of a generation: K samples a prompt, L response slots, T denoising steps, M inner steps."""

    num_samples: int = 4
    max_new_tokens: int = 32
    steps: int = 32
    guidance_steps: int = 3
    step: StepSettings = field(default_factory=StepSettings)


def vocabulary_map(tokenizer: Any, reward_tokenizer: Any, v: int) -> torch.Tensor:
    """[v] int64: the reward tokenizer's id of every token's string; its unk, else its eos, where it has none."""
    fallback = reward_tokenizer.unk_token_id
    if fallback is None:
        fallback = reward_tokenizer.eos_token_id
    known, ids = reward_tokenizer.get_vocab(), torch.full((v,), fallback)
    for token, index in tokenizer.get_vocab().items():
        if index < v and token in known:
            ids[index] = known[token]
    return ids


class PublishedLoop:
    """The loop over one batch of prompts.

    Args:
        model: called as model(input_ids, attention_mask=[B, 1, S, S] bool, position_ids).logits; its logits are
            shifted right by one.
        reward_model: a sequence classifier with one label, called with inputs_embeds.
        draw: from probabilities [n, V] to tokens [n]; torch.multinomial unless a test injects its own.
        step: the inner step's class.
    """

    def __init__(
        self,
        model: Any,
        tokenizer: Any,
        reward_model: Any,
        reward_tokenizer: Any,
        settings: LoopSettings,
        *,
        draw: Draw | None = None,
        step: Callable[..., Any] = Published,
    ) -> None:
        self.model, self.tokenizer, self.settings, self.step = model, tokenizer, settings, step
        self.reward_model, self.reward_tokenizer = reward_model, reward_tokenizer
        self.draw = draw or (lambda p: torch.multinomial(p, 1).squeeze(-1))
        table = reward_model.get_input_embeddings().weight
        mapping = vocabulary_map(tokenizer, reward_tokenizer, model.lm_head.out_features)
        self.table = table[mapping.to(table.device)].detach()

    def generate(self, prompts: list[str]) -> list[list[tuple[list[int], float]]]:
        """(response ids, reward) of every sample of every prompt."""
        s, k, length = self.settings, self.settings.num_samples, self.settings.max_new_tokens
        mask_id, pad_id, eos_id = (getattr(self.tokenizer, f"{name}_token_id") for name in ("mask", "pad", "eos"))
        encoded = [self._prompt(prompt) for prompt in prompts]
        start = max(map(len, encoded))
        tokens = torch.full((len(prompts) * k, start + length), mask_id)
        valid = torch.ones_like(tokens, dtype=torch.bool)
        for row in range(tokens.shape[0]):
            ids = encoded[row // k]
            tokens[row, : start - len(ids)], valid[row, : start - len(ids)] = pad_id, False
            tokens[row, start - len(ids) : start] = torch.tensor(ids)
        tokens, valid = tokens.to(self.table.device), valid.to(self.table.device)
        # A padded query sees itself, or its softmax would be over nothing.
        sees = valid[:, None, None, :] | torch.eye(tokens.shape[1], dtype=torch.bool, device=tokens.device)
        positions = (valid.long().cumsum(dim=-1) - 1).clamp_min(0)
        reward = self._reward(prompts)
        times = torch.linspace(1, 1e-3, s.steps + 1)
        for step in range(s.steps):
            with torch.no_grad():
                logits = self.model(tokens, attention_mask=sees, position_ids=positions).logits
                logits = torch.cat([logits[:, :1], logits[:, :-1]], dim=1)[:, start:]
            masked = tokens[:, start:] == mask_id
            if masked.sum().item() == 0:
                break
            phi = torch.cat([logits[row][masked[row]] for row in range(tokens.shape[0])])
            base = phi.clone()
            inner = self.step(phi, self.table, Canvas(tokens[:, start:], masked, eos_id, pad_id), s.step)
            for _ in range(s.guidance_steps):
                inner.step(reward)
            share = 1 - (times[step + 1] / times[step]).item() if step < s.steps - 1 else 1.0
            self._commit(tokens[:, start:], masked, inner.phi.detach(), base, share, eos_id)
        responses = tokens[:, start:].tolist()
        samples = [(ids, self._final(prompts[row // k], ids, eos_id)) for row, ids in enumerate(responses)]
        return [samples[i : i + k] for i in range(0, len(samples), k)]

    def _commit(
        self,
        response: torch.Tensor,
        masked: torch.Tensor,
        phi: torch.Tensor,
        base: torch.Tensor,
        share: float,
        eos_id: int,
    ) -> None:
        """Draw at every masked position and commit the most confident share of them, trajectory by trajectory."""
        s, begin = self.settings.step, 0
        for row in range(response.shape[0]):
            places = torch.where(masked[row])[0]
            if len(places) == 0:
                continue
            rows = slice(begin, begin + len(places))
            begin += len(places)
            drawn = self.draw(F.softmax(filtered(phi[rows] / s.temperature, s), dim=-1))
            p = F.softmax(base[rows] / s.temperature, dim=-1)
            confidence = (p * torch.log(p + Published.log_epsilon)).sum(dim=-1)
            confidence = confidence.masked_fill(drawn == eos_id, -torch.inf)
            count = int(len(places) * share)
            if count > 0:
                best = confidence.topk(count).indices
                response[row, places[best]] = drawn[best]

    def _prompt(self, prompt: str) -> list[int]:
        turns = [{"role": "user", "content": prompt}]
        text = self.tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)
        return self.tokenizer(text, add_special_tokens=False)["input_ids"]

    def _text(self, prompt: str, response: str) -> str:
        turns = [{"role": "user", "content": prompt}, {"role": "assistant", "content": response}]
        return self.reward_tokenizer.apply_chat_template(turns, tokenize=False)

    def _reward(self, prompts: list[str]) -> Callable[[torch.Tensor, torch.Tensor], torch.Tensor]:
        """Rewards [R] of response embeddings [R, L, D]: [prefix | response | suffix], prefixes padded on the left."""
        k, layer = self.settings.num_samples, self.reward_model.get_input_embeddings()
        parts = [self._text(prompt, "@@@").split("@@@") for prompt in prompts]
        ids = [[self.reward_tokenizer(half, add_special_tokens=False)["input_ids"] for half in part] for part in parts]
        device, width = self.table.device, max(len(prefix) for prefix, _ in ids)

        def embed(tokens: list[int]) -> torch.Tensor:
            return layer(torch.tensor(tokens, dtype=torch.int64, device=device)).detach()

        prefixes = torch.stack([F.pad(embed(prefix), (0, 0, width - len(prefix), 0)) for prefix, _ in ids])
        seen = torch.stack([torch.arange(width, device=device) >= width - len(prefix) for prefix, _ in ids])
        suffixes = torch.stack([embed(suffix) for _, suffix in ids])
        prefixes, seen, suffixes = (part.repeat_interleave(k, dim=0) for part in (prefixes, seen, suffixes))

        def reward(response: torch.Tensor, alive: torch.Tensor) -> torch.Tensor:
            mask = torch.cat([seen, alive, torch.ones(suffixes.shape[:2], dtype=torch.bool, device=device)], dim=1)
            embeddings = torch.cat([prefixes, response, suffixes], dim=1)
            return self.reward_model(inputs_embeds=embeddings, attention_mask=mask.long()).logits[:, 0]

        return reward

    def _final(self, prompt: str, ids: list[int], eos_id: int) -> float:
        """The reward of the finished text, decoded and tokenised again, by itself."""
        end = ids.index(eos_id) if eos_id in ids else len(ids)
        text = self._text(prompt, self.tokenizer.decode(ids[:end], skip_special_tokens=True))
        tokens = torch.tensor([self.reward_tokenizer(text, add_special_tokens=False)["input_ids"]])
        with torch.no_grad():
            return self.reward_model(tokens.to(self.table.device)).logits[0, 0].item()
