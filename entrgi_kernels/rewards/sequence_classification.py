"""Reward models with one output: any ``AutoModelForSequenceClassification`` with one label."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from entrgi_kernels.models.base import logits_of, same_result
from entrgi_kernels.models.modules import (
    accepted_arguments,
    evaluating,
    first_nonfinite_parameter,
    frozen,
    plain_precision,
)
from entrgi_kernels.rewards.base import EmbeddingReward, PreparedPrompts, assemble
from entrgi_kernels.rewards.decoder import CachedDecoder
from entrgi_kernels.rewards.savings import LAST_LAYER, NAMES, ExactSavings, last_real, parse_savings
from entrgi_kernels.rewards.template import Conversation, encode_answered


class SequenceClassifierReward(EmbeddingReward):
    """The scalar output of a sequence classifier, as reward models (Skywork-Reward and the like) have it.

    Decoders read the score at the last position. transformers finds that position by looking for padding in the
    token ids, which embeddings do not have, and refuses batches when no padding token is configured; here the
    backbone and the score head are called one after the other and the last real token is picked directly, which
    needs neither. Other classifiers (encoders with a pooler) are run whole, in groups of equal length, without
    padding. Which of the two reproduces the model's own answer on a few tokens is found out at construction.

    Decoders are run with the savings of :mod:`entrgi_kernels.rewards.savings`: same rewards, same gradients, less
    work. Each is compared with the plain forward on a few tokens at construction and is not used where it differs.

    The model is in evaluation mode and its parameters are frozen while it runs; both are given back at once.

    Args:
        module: the classifier.
        tokenizer: its tokenizer, with a chat template (or ``chat_template=``).
        unmatched: what stands for tokens it does not know, see :class:`VocabularyMap`.
        chat_template: a template to use instead of the tokenizer's own.
        exact_savings: "all", "none", or a set of "reward_prefix", "reward_committed", "reward_dead",
            "reward_last_layer".

    Attributes:
        pooling: ``"last"`` (backbone and head apart) or ``"whole"`` (the model's own forward).
        exact_savings: the names asked for; may be set at any time.
        savings: the names in use.
        savings_off: why each of the others is not in use.
        last_savings: the names that the last :meth:`score_embeddings` was served with: fewer than ``savings`` when a
            template ends with the response, or when attention windows of an unknown kind are reached.
        takes_committed: True: :meth:`score_embeddings` takes ``committed=``.

    Raises:
        TypeError: not a classifier, or no tokenizer.
        ValueError: more than one label, no chat template, weights that are not finite, a model that gives another
            score for embeddings than for the tokens they come from, or an unknown name of a saving.
    """

    takes_committed = True

    def __init__(
        self,
        module: nn.Module,
        tokenizer: Any,
        *,
        unmatched: str = "unk",
        chat_template: str | None = None,
        exact_savings: str | Iterable[str] | None = "all",
    ) -> None:
        requested = parse_savings(exact_savings)
        labels = getattr(getattr(module, "config", None), "num_labels", 1)
        if isinstance(module, nn.Module) and labels != 1:
            raise ValueError(
                f"{type(module).__name__} has num_labels={labels}; accepted: a reward model with one label. "
                "Load it with AutoModelForSequenceClassification.from_pretrained(..., num_labels=1), or pass a reward "
                "of your own that makes one number of its outputs"
            )
        super().__init__(module, tokenizer, unmatched=unmatched, chat_template=chat_template)
        bad = first_nonfinite_parameter(module)
        if bad is not None:
            raise ValueError(
                f"parameter {bad!r} of {type(module).__name__} holds NaN or infinite values; the weights are damaged"
            )
        self.pooling = "last"
        self._backbone, self._head = _backbone_and_head(module)
        self._whole_accepts = accepted_arguments(module)
        self._backbone_accepts = accepted_arguments(self._backbone) if self._backbone is not None else set()
        self._takes_positions = self._bears_padding = True
        self._savings: ExactSavings | None = None
        self._requested = requested
        self._no_savings = "the weights are not loaded, so nothing could be tried"
        self.last_savings: frozenset[str] = frozenset()
        self._check()

    def __repr__(self) -> str:
        off = "".join(f"; {name} is not: {reason}" for name, reason in self.savings_off.items())
        return (
            f"SequenceClassifierReward({type(self.module).__name__}, pooling={self.pooling!r}, "
            f"savings in use: {', '.join(self.savings) or 'none'}{off})"
        )

    # ---- savings

    @property
    def exact_savings(self) -> frozenset[str]:
        """The savings asked for."""
        return self._requested

    @exact_savings.setter
    def exact_savings(self, names: str | Iterable[str] | None) -> None:
        self._requested = parse_savings(names)
        if self._savings is not None:
            self._savings.requested = self._requested

    @property
    def savings(self) -> tuple[str, ...]:
        """The savings in use."""
        off = self.savings_off
        return tuple(name for name in NAMES if name not in off)

    @property
    def savings_off(self) -> dict[str, str]:
        """Why each saving that is not in use is not."""
        if self._savings is not None:
            return self._savings.reasons(self.device)
        off = {name: "switched off" for name in NAMES if name not in self._requested}
        return {name: off.get(name, self._no_savings) for name in NAMES}

    # ---- the protocol

    def score_embeddings(
        self,
        prepared: PreparedPrompts,
        index: Tensor,
        response: Tensor,
        alive: Tensor,
        *,
        committed: Tensor | int | None = None,
    ) -> Tensor:
        """Rewards [B] (float32, float64 for a float64 model), differentiable in ``response`` [B, L, D].

        See :meth:`Reward.score_embeddings`. Gradients reach the response alone, never the model's parameters.

        Args:
            prepared, index, response, alive: as there. ``prepared`` holds for the weights it was prepared with, and
                keeps what later calls need again; hand the same ``index`` tensor to all of them.
            committed: int64 [B], how many slots at the left of each row will keep their embedding and their ``alive``
                in all later calls (dead ones keep their ``alive`` alone), or one number that holds for every row.
                No gradient need reach them. Slots that did change are computed anew; on an accelerator that is
                noticed when another tensor of counts is handed over (one synchronisation for each; none for an int,
                which is taken at its word). None keeps nothing.
        """
        with plain_precision(self.device), evaluating(self.module), frozen(self.module):
            embeddings, mask, positions = assemble(prepared, index, response, alive)
            self.last_savings = frozenset()
            if self._savings is not None:
                self.last_savings = self._savings.for_call(prepared, embeddings.shape[1], self.device)
            if self.last_savings:
                return self._saving(self.last_savings, prepared, index, embeddings, mask, positions, committed)
            if not self._pads_freely or self._suffixes_disturb(prepared):
                return self._by_layout(prepared, index, embeddings, mask)
            # Behind an empty suffix the last slot may be a dead one; otherwise the last position is the last token.
            last = None if all(prepared.suffix_ids) else last_real(mask)
            return self._pooled(embeddings, mask, positions, last)

    def score_texts(self, conversations: list[Conversation], responses: list[str], batch_size: int = 8) -> list[float]:
        """Rewards of finished responses: template, tokenise, score. A batch gives what single texts would.

        Args:
            conversations: the prompt of each response.
            responses: the texts; an empty one is scored too.
            batch_size: texts run together at most.

        Raises:
            ValueError: the lists differ in length, or ``batch_size`` is not positive.
        """
        if len(conversations) != len(responses):
            raise ValueError(
                f"there must be one conversation per response, got {len(conversations)} and {len(responses)}"
            )
        if not isinstance(batch_size, int) or isinstance(batch_size, bool) or batch_size < 1:
            raise ValueError(f"batch_size must be a positive int, got {batch_size!r}")
        rows = []
        for turns, response in zip(conversations, responses, strict=True):
            if not isinstance(response, str):
                raise TypeError(f"a response must be a string, got {type(response).__name__}")
            rows.append(encode_answered(self.tokenizer, turns, response, chat_template=self.chat_template))
        scores = [0.0] * len(rows)
        order = sorted(range(len(rows)), key=lambda row: len(rows[row]))  # equal lengths together: least padding
        start = 0
        while start < len(order):
            batch = order[start : start + batch_size]
            if not self._pads_freely:
                batch = [row for row in batch if len(rows[row]) == len(rows[batch[0]])]
            start += len(batch)
            for row, score in zip(batch, self._score_ids([rows[row] for row in batch]), strict=True):
                scores[row] = score
        return scores

    # ---- how the model is run

    @property
    def _pads_freely(self) -> bool:
        """Whether rows of different lengths may share a batch of the model's own forward."""
        return self.pooling == "last" and self._takes_positions and self._bears_padding

    def _suffixes_disturb(self, prepared: PreparedPrompts) -> bool:
        """Whether suffixes of unequal length put padding where an attention window, counted in places, feels it."""
        windowed = getattr(getattr(self.module, "config", None), "sliding_window", None) is not None
        return windowed and len(set(map(len, prepared.suffix_ids))) > 1

    def _saving(
        self,
        use: frozenset[str],
        prepared: PreparedPrompts,
        index: Tensor,
        embeddings: Tensor,
        mask: Tensor,
        positions: Tensor,
        committed: Tensor | int | None = None,
    ) -> Tensor:
        """Rewards [B] of what ``assemble`` returned, with savings."""
        assert self._savings is not None and self._head is not None
        index = index.to(embeddings.device)
        pooled = self._savings.pooled(use, prepared, index, embeddings, mask, positions, committed)
        return _widened(self._head(pooled)[:, 0])

    @torch.no_grad()
    def _score_ids(self, rows: list[list[int]]) -> list[float]:
        with plain_precision(self.device), evaluating(self.module):
            embeddings, mask = self.embed_right_aligned(rows)
            positions = (mask.long().cumsum(1) - 1).clamp_min(0)
            if LAST_LAYER in self.savings and self._pads_freely and self._savings.decoder.serves(mask.shape[1]):
                return _widened(self._head(self._savings.last_of_texts(embeddings, mask, positions))[:, 0]).tolist()
            return self._pooled(embeddings, mask, positions).tolist()

    def _pooled(self, embeddings: Tensor, mask: Tensor, positions: Tensor, last: Tensor | None = None) -> Tensor:
        """Rewards [B], read by a decoder at position ``last`` [B] of each row (None: the last position of all)."""
        arguments: dict[str, Any] = {"inputs_embeds": embeddings, "attention_mask": mask.long()}
        if self._takes_positions:
            arguments["position_ids"] = positions
        if self.pooling == "last":
            assert self._backbone is not None and self._head is not None
            if "use_cache" in self._backbone_accepts:
                arguments["use_cache"] = False
            hidden = _hidden_states(self._backbone(**arguments))
            pooled = hidden[:, -1] if last is None else hidden[torch.arange(len(last), device=last.device), last]
            rewards = self._head(pooled)[:, 0]
        else:
            if "use_cache" in self._whole_accepts:
                arguments["use_cache"] = False
            with _padding_token(self.module):
                rewards = logits_of(self.module(**arguments))[:, 0]
        return _widened(rewards)

    def _by_layout(self, prepared: PreparedPrompts, index: Tensor, embeddings: Tensor, mask: Tensor) -> Tensor:
        """Rewards [B] of rows run in groups of equal prefix and suffix lengths, so that no row holds padding."""
        width, device = mask.shape[1], embeddings.device
        prefix_width, suffix_width = prepared.prefix_valid.shape[1], prepared.suffix_valid.shape[1]
        index = index.tolist()
        layouts: dict[tuple[int, int], list[int]] = {}
        for row, prompt in enumerate(index):
            layout = len(prepared.prefix_ids[prompt]), len(prepared.suffix_ids[prompt])
            layouts.setdefault(layout, []).append(row)
        scores, order = [], []
        for (before, after), rows in layouts.items():
            columns = [*range(prefix_width - before, width - suffix_width), *range(width - after, width)]
            picked = torch.tensor(columns, device=device)
            chosen = torch.tensor(rows, device=device)
            positions = torch.arange(len(columns), device=device).expand(len(rows), -1)
            group_mask = mask[chosen][:, picked]
            last = None if after else last_real(group_mask)
            scores.append(self._pooled(embeddings[chosen][:, picked], group_mask, positions, last))
            order.extend(rows)
        back = torch.tensor(order, device=device).argsort()
        return torch.cat(scores)[back]

    def _check(self) -> None:
        """Find the way of running the model that gives the answer of its own forward on token ids."""
        name = type(self.module).__name__
        if any(parameter.is_meta for parameter in self.module.parameters()):
            return
        rows = self.embedding.weight.shape[0]
        padding = getattr(getattr(self.module, "config", None), "pad_token_id", None)
        ordinary = [index for index in range(rows) if index != padding][:256] or [0]
        texts = [[ordinary[(7 * k + 3 * j * (k + 1)) % len(ordinary)] for j in range(7)] for k in range(4)]
        with plain_precision(self.device), torch.no_grad(), evaluating(self.module):
            # One by one, since a model without a padding token takes no batch.
            answers = [logits_of(self.module(torch.tensor([ids], device=self.device))) for ids in texts]
            if answers[0].shape != (1, 1):
                raise ValueError(
                    f"{name} returns scores of shape {tuple(answers[0].shape)} for one text; "
                    "accepted: one number per text"
                )
            own = torch.cat(answers)[:, 0]
            if not bool(own.isfinite().all()):
                raise ValueError(f"{name} returns {own.tolist()} for ordinary tokens; the weights are damaged")
            embeddings, mask = self.embed_right_aligned(texts)
            positions = torch.arange(len(texts[0]), device=self.device).expand(len(texts), -1)
            for pooling in ("last", "whole"):
                accepts = self._backbone_accepts if pooling == "last" else self._whole_accepts
                if pooling == "last" and (self._backbone is None or self._head is None):
                    continue
                for given in (True, False):
                    if given and not accepts & {"position_ids", "**"}:
                        continue
                    self.pooling, self._takes_positions = pooling, given
                    try:
                        found = self._pooled(embeddings, mask, positions)
                    except (RuntimeError, ValueError, TypeError, AttributeError, IndexError):
                        continue
                    if same_result(found.to(own.dtype), own):
                        # Float64 under eager attention gives NaN where a position sees nothing, as padding does.
                        padded, real = self.embed_right_aligned([texts[0], texts[1][:-1] + texts[1], texts[2]])
                        places = (real.long().cumsum(1) - 1).clamp_min(0)
                        self._bears_padding = bool(self._pooled(padded, real, places).isfinite().all())
                        self._probe_savings(ordinary)
                        return
        raise ValueError(
            f"{name} does not give the same score for input embeddings as for the tokens they come from, so it cannot "
            "guide; accepted: classifiers whose forward takes inputs_embeds"
        )

    @torch.no_grad()
    def _probe_savings(self, ordinary: list[int]) -> None:
        """Find out which savings give this network's own rewards and gradients."""
        if self.pooling != "last" or not self._takes_positions or self._backbone is None:
            self._no_savings = f"{type(self.module).__name__} is run plainly: " + (
                "its backbone takes no position ids" if self.pooling == "last" else "it is no decoder with a score head"
            )
            return
        decoder = CachedDecoder(self._backbone)
        self._savings = savings = ExactSavings(decoder, self._requested)
        # Unequal prompts, samples of one prompt side by side, dead slots inside and at the end, a left part that is
        # committed bit by bit. Past the attention window where that is cheap.
        length, reach = 6, decoder.window if decoder.window is not None and decoder.window <= 32 else 0

        def tokens(count: int, seed: int) -> list[int]:
            return [ordinary[(11 * seed + 5 * place * (seed + 1)) % len(ordinary)] for place in range(count)]

        prefixes, suffixes = [tokens(3, 1), tokens(5 + reach, 2)], [tokens(2, 3), tokens(2, 4)]
        index = torch.tensor([0, 0, 1, 1], device=self.device)
        slots, _ = self.embed_right_aligned([tokens(length, 5 + row) for row in range(4)])
        slots = (slots + slots.roll(1, 0)) / 2  # soft embeddings
        alive = torch.ones(4, length, dtype=torch.bool, device=self.device)
        alive[0, 5:] = alive[1, 3] = alive[2, 1] = alive[2, 4:] = alive[3, 4:] = False

        def measure(use: frozenset[str]) -> tuple[Tensor, Tensor]:
            # Prepared anew, lest anything be left of another attempt.
            prepared = PreparedPrompts(
                [[], []], prefixes, suffixes, *self.embed_right_aligned(prefixes), *self.embed_right_aligned(suffixes)
            )
            found, gradients = [], []
            for count in (2, 3):
                response = slots.clone()
                response[:, count:] *= count / 2
                with torch.enable_grad(), frozen(self.module):
                    response.requires_grad_()
                    embeddings, mask, positions = assemble(prepared, index, response, alive)
                    if use:
                        rewards = self._saving(use, prepared, index, embeddings, mask, positions, count)
                    else:
                        rewards = self._by_layout(prepared, index, embeddings, mask)
                    gradients.append(torch.autograd.grad(rewards.sum(), response)[0][:, count:])
                found.append(rewards.detach())
            return torch.cat(found), torch.cat(gradients, dim=1)

        savings.probe(measure)


def _backbone_and_head(module: nn.Module) -> tuple[nn.Module | None, nn.Module | None]:
    """A decoder classifier's two parts: the network below and the linear layer on top, None where there are not two."""
    core = module.get_base_model() if hasattr(module, "get_base_model") else module  # PEFT wraps the model it adapts
    backbone = getattr(core, getattr(core, "base_model_prefix", "") or "model", None)
    head = getattr(core, "score", None)
    if isinstance(backbone, nn.Module) and isinstance(head, nn.Module):
        return backbone, head
    return None, None


def _widened(rewards: Tensor) -> Tensor:
    return rewards if rewards.dtype == torch.float64 else rewards.float()


def _hidden_states(output: Any) -> Tensor:
    hidden = getattr(output, "last_hidden_state", None)
    return hidden if isinstance(hidden, Tensor) else output[0]


@contextmanager
def _padding_token(module: nn.Module) -> Iterator[None]:
    """Lend the config a padding token: without one, transformers scores no batch, padded or not."""
    config = getattr(module, "config", None)
    text = config.get_text_config() if hasattr(config, "get_text_config") else config
    if text is None or getattr(text, "pad_token_id", 0) is not None:
        yield
        return
    text.pad_token_id = 0
    try:
        yield
    finally:
        text.pad_token_id = None
