"""What rewards share that run a network on whole conversations: layouts, savings, and a way in found by trial."""

from __future__ import annotations

import functools
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import nn

from ..models.base import same_result
from ..models.modules import (
    accepted_arguments,
    evaluating,
    first_nonfinite_parameter,
    frozen,
    learned_positions,
    plain_precision,
)
from ..text.template import Conversation
from .base import Targets, check_texts
from .decoding.decoder import CachedDecoder
from .decoding.savings import LAST_LAYER, NAMES, ExactSavings, parse_savings
from .decoding.sequences import PreparedPrompts, Sequences, assemble, last_real
from .embedding import EmbeddingReward


class NetworkReward(EmbeddingReward):
    """Base of the rewards that a network gives to a whole conversation.

    A decoder's backbone and its head are called one after the other (``pooling`` "last"), which needs neither token
    ids nor a padding token; any other network is run whole, in groups of equal length, without padding. Which of the
    two reproduces the network's own answer on a few tokens is found out at construction.

    Decoders are run with the savings of :mod:`entrgi_kernels.rewards.decoding.savings`: same rewards, same gradients,
    less work. Each is compared with the plain forward on a few tokens at construction and is not used where it differs.

    The model is in evaluation mode and its parameters are frozen while it runs; both are given back at once.

    A subclass says how a reward is read: :meth:`_own` off the network's own forward on token ids, :meth:`_plain` off
    a plain forward, :meth:`_partial` off a partial one, :meth:`_ends` off the ends of whole texts.

    Args:
        module: the network.
        tokenizer: its tokenizer, with a chat template (or ``chat_template=``).
        backbone: the network below the head, None where it cannot be told.
        unmatched: what stands for tokens it does not know, see :class:`VocabularyMap`.
        chat_template: a template to use instead of the tokenizer's own.
        exact_savings: "all", "none", or a set of "reward_prefix", "reward_committed", "reward_dead",
            "reward_last_layer", "reward_attention".

    Attributes:
        pooling: ``"last"`` (backbone and head apart) or ``"whole"`` (the model's own forward).
        exact_savings: the names asked for; may be set at any time.
        savings: the names in use.
        savings_off: why each of the others is not in use.
        last_savings: the names that the last :meth:`score_embeddings` was served with: fewer than ``savings`` when a
            template ends with the response, or when attention windows of an unknown kind are reached.
        takes_committed: True: :meth:`score_embeddings` takes ``committed=``.
        takes_ended, takes_targets: whether it takes ``ended=`` and ``targets=``.
    """

    takes_committed = True
    takes_ended = False
    takes_targets = False

    def __init__(
        self,
        module: nn.Module,
        tokenizer: Any,
        backbone: nn.Module | None,
        *,
        unmatched: str = "unk",
        chat_template: str | None = None,
        exact_savings: str | Iterable[str] | None = "all",
    ) -> None:
        requested = parse_savings(exact_savings)
        super().__init__(module, tokenizer, unmatched=unmatched, chat_template=chat_template)
        bad = first_nonfinite_parameter(module)
        if bad is not None:
            raise ValueError(
                f"parameter {bad!r} of {type(module).__name__} holds NaN or infinite values; the weights are damaged"
            )
        self.pooling = "last"
        self._backbone = backbone
        self._whole_accepts = accepted_arguments(module)
        self._backbone_accepts = accepted_arguments(backbone) if backbone is not None else set()
        self._takes_positions = self._bears_padding = True
        # Ids before which the reward is read when they end a text, and ids by which the network does more than look
        # up an embedding, with how many of them a text may hold (1: at its end).
        self._passed_over: frozenset[int] = frozenset()
        self._apart: dict[int, int] = {}
        self._savings: ExactSavings | None = None
        self._requested = requested
        self._no_savings = "the weights are not loaded, so nothing could be tried"
        self.last_savings: frozenset[str] = frozenset()

    def __repr__(self) -> str:
        off = "".join(f"; {name} is not: {reason}" for name, reason in self.savings_off.items())
        return (
            f"{type(self).__name__}({type(self.module).__name__}, {self._described()}pooling={self.pooling!r}, "
            f"savings in use: {', '.join(self.savings) or 'none'}{off})"
        )

    # ---- what subclasses fill in

    def _described(self) -> str:
        """What the representation says beyond the network's name, with a comma behind it."""
        return ""

    def _own(self, ids: list[int]) -> torch.Tensor:
        """The reward [] of token ids, read off the network's own forward, with which all else is compared."""
        raise NotImplementedError

    def _sequences(
        self, prepared: PreparedPrompts, index: torch.Tensor, response: torch.Tensor, alive: torch.Tensor, targets: Any
    ) -> Sequences:
        """The rows of a batch of responses; see :meth:`Reward.score_embeddings`."""
        return assemble(prepared, index, response, alive)

    def _text_sequences(self, rows: list[list[int]], starts: list[int]) -> Sequences:
        """Rows of whole texts, whose rewards count from some token on."""
        embeddings, mask = self.embed_right_aligned(rows)
        return Sequences(embeddings, mask, (mask.long().cumsum(1) - 1).clamp_min(0))

    def _plain(self, sequences: Sequences, last: torch.Tensor | None = None) -> torch.Tensor:
        """Rewards [B] of rows, read by a decoder at position ``last`` [B] of each (None: the last position of all)."""
        raise NotImplementedError

    def _partial(
        self,
        use: frozenset[str],
        prepared: PreparedPrompts,
        index: torch.Tensor,
        sequences: Sequences,
        committed: torch.Tensor | int | None,
    ) -> torch.Tensor:
        """Rewards [B] with savings."""
        raise NotImplementedError

    def _ends(self, sequences: Sequences) -> torch.Tensor:
        """Rewards [B] of whole texts, the last layer being run at their ends alone."""
        raise NotImplementedError

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
        index: torch.Tensor,
        response: torch.Tensor,
        alive: torch.Tensor,
        *,
        committed: torch.Tensor | int | None = None,
        ended: torch.Tensor | None = None,
        targets: Targets | torch.Tensor | None = None,
    ) -> torch.Tensor:
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
            ended: [B, L] bool, slots whose token ends the response: dead as well, for rewards with ``takes_ended``,
                whose own template closes it.
            targets: the tokens themselves, for rewards with ``takes_targets``.
        """
        with plain_precision(self.device), evaluating(self.module), frozen(self.module):
            if ended is not None:
                alive = alive & ~ended
            if self.position_limit is not None:
                fixed = (len(a) + len(z) for a, z in zip(prepared.prefix_ids, prepared.suffix_ids, strict=True))
                self._check_fits(max(fixed) + response.shape[1], f"a prompt with {response.shape[1]} response slots")
            sequences = self._sequences(prepared, index, response, alive, targets)
            index = index.to(sequences.mask.device)
            self.last_savings = frozenset()
            if self._savings is not None:
                self.last_savings = self._savings.for_call(prepared, sequences.mask.shape[1], self.device)
            if self.last_savings:
                return self._partial(self.last_savings, prepared, index, sequences, committed)
            if not self._pads_freely or self._suffixes_disturb(prepared):
                return self._by_layout(prepared, index, sequences)
            # Behind an empty suffix the last slot may be a dead one; otherwise the last position is the last token.
            last = None if all(prepared.suffix_ids) else last_real(sequences.mask)
            return self._plain(sequences, last)

    def permute(self, prepared: PreparedPrompts, index: torch.Tensor) -> None:
        """Row i of a batch is a copy of row index[i], of the same prompt, from now on: what is kept of it follows.

        Args:
            prepared: as in :meth:`score_embeddings`.
            index: int64 [B].
        """
        ExactSavings.permute(prepared, index)

    def score_texts(self, conversations: list[Conversation], responses: list[str], batch_size: int = 8) -> list[float]:
        """Rewards of finished responses: template, tokenise, score. A batch gives what single texts would.

        Args:
            conversations: the prompt of each response.
            responses: the texts; an empty one is scored too.
            batch_size: texts run together at most.

        Raises:
            ValueError: the lists differ in length, ``batch_size`` is not positive, or a text is longer than the
                positions that the network has learned.
        """
        check_texts(conversations, responses, batch_size)
        rows = [self.encode(turns, response) for turns, response in zip(conversations, responses, strict=True)]
        rows = [self._as_read([], ids)[1] for ids in rows]
        for place, ids in enumerate(rows):
            self._check_fits(len(ids), f"text {place} with its prompt")
        starts = [self._start(turns, row) for turns, row in zip(conversations, rows, strict=True)]
        scores = [0.0] * len(rows)
        order = sorted(range(len(rows)), key=lambda row: len(rows[row]))  # equal lengths together: least padding
        start = 0
        while start < len(order):
            batch = order[start : start + batch_size]
            if not self._pads_freely:
                batch = [row for row in batch if len(rows[row]) == len(rows[batch[0]])]
            start += len(batch)
            found = self._score_ids([rows[row] for row in batch], [starts[row] for row in batch])
            for row, score in zip(batch, found, strict=True):
                scores[row] = score
        return scores

    def _as_read(self, prefix: list[int], suffix: list[int]) -> tuple[list[int], list[int]]:
        ids = [*prefix, *suffix]
        for index, most in self._apart.items():
            if index in ids[: len(ids) - most]:
                raise ValueError(
                    f"the chat template writes the token {self.tokenizer.convert_ids_to_tokens(index)!r} (id {index}), "
                    f"at which {type(self.module).__name__} does more than look up an embedding (it tells padding or "
                    "the end of a text by it), so it gives another score for embeddings than for tokens: expected a "
                    "template without it (chat_template=), or a config whose pad_token_id no text holds"
                )
        end = len(suffix)
        while end and suffix[end - 1] in self._passed_over:
            end -= 1
        return prefix, suffix[: end if prefix else max(end, 1)]

    def _start(self, conversation: Conversation, ids: list[int]) -> int:
        """From which of a text's tokens on its reward counts, for rewards that count tokens."""
        return 0

    # ---- how the model is run

    @property
    def _config(self) -> Any:
        """The network's configuration, None where it has none."""
        return getattr(self.module, "config", None) or getattr(self._backbone, "config", None)

    @property
    def _pads_freely(self) -> bool:
        """Whether rows of different lengths may share a batch of the model's own forward."""
        return self.pooling == "last" and self._takes_positions and self._bears_padding

    def _suffixes_disturb(self, prepared: PreparedPrompts) -> bool:
        """Whether suffixes of unequal length put padding where an attention window, counted in places, feels it."""
        windowed = getattr(self._config, "sliding_window", None) is not None
        return windowed and len(set(map(len, prepared.suffix_ids))) > 1

    def _output(self, network: nn.Module, accepts: set[str], sequences: Sequences) -> Any:
        """What a network returns for rows of embeddings."""
        arguments: dict[str, Any] = {"inputs_embeds": sequences.embeddings, "attention_mask": sequences.mask.long()}
        if self._takes_positions:
            arguments["position_ids"] = sequences.positions
        if "use_cache" in accepts:
            arguments["use_cache"] = False
        return network(**arguments)

    def _hidden(self, sequences: Sequences) -> torch.Tensor:
        """The backbone's final states [B, T, D]."""
        assert self._backbone is not None
        output = self._output(self._backbone, self._backbone_accepts, sequences)
        hidden = getattr(output, "last_hidden_state", None)
        return hidden if isinstance(hidden, torch.Tensor) else output[0]

    @torch.no_grad()
    def _score_ids(self, rows: list[list[int]], starts: list[int]) -> list[float]:
        with plain_precision(self.device), evaluating(self.module):
            sequences = self._text_sequences(rows, starts)
            serves = LAST_LAYER in self.savings and self._pads_freely
            if serves and self._savings is not None and self._savings.decoder.serves(sequences.mask.shape[1]):
                return self._ends(sequences).tolist()
            return self._plain(sequences).tolist()

    def _by_layout(self, prepared: PreparedPrompts, index: torch.Tensor, sequences: Sequences) -> torch.Tensor:
        """Rewards [B] of rows run in groups of equal prefix and suffix lengths, so that no row holds padding."""
        width, device = sequences.mask.shape[1], sequences.mask.device
        prefix_width, suffix_width = prepared.prefix_valid.shape[1], prepared.suffix_valid.shape[1]
        layouts: dict[tuple[int, int], list[int]] = {}
        for row, prompt in enumerate(index.tolist()):
            layout = len(prepared.prefix_ids[prompt]), len(prepared.suffix_ids[prompt])
            layouts.setdefault(layout, []).append(row)
        scores, order = [], []
        for (before, after), rows in layouts.items():
            columns = [*range(prefix_width - before, width - suffix_width), *range(width - after, width)]
            group = sequences.without_padding(torch.tensor(rows, device=device), torch.tensor(columns, device=device))
            scores.append(self._plain(group, None if after else last_real(group.mask)))
            order.extend(rows)
        back = torch.tensor(order, device=device).argsort()
        return torch.cat(scores)[back]

    # ---- what is found out by trial

    def _find_way(self, expected: str) -> None:
        """Find the way of running the model that gives the answer of its own forward on token ids.

        Args:
            expected: what to name in the error when there is none.
        """
        name = type(self.module).__name__
        if any(parameter.is_meta for parameter in self.module.parameters()):
            return
        rows, special = self.embedding.weight.shape[0], self._special_ids()
        ordinary = [index for index in range(rows) if index not in special][:256] or [0]
        texts = [[ordinary[(7 * k + 3 * j * (k + 1)) % len(ordinary)] for j in range(7)] for k in range(4)]
        with plain_precision(self.device), torch.no_grad(), evaluating(self.module):
            # One by one, since a model without a padding token takes no batch.
            own = torch.stack([self._own(ids) for ids in texts])
            if not bool(own.isfinite().all()):
                raise ValueError(f"{name} returns {own.tolist()} for ordinary tokens; the weights are damaged")
            tried: list[str] = []
            for way in self._ways():
                self.pooling = way
                accepts = self._backbone_accepts if self.pooling == "last" else self._whole_accepts
                for given in (True, False):
                    if given and not accepts & {"position_ids", "**"}:
                        continue
                    self._takes_positions = given
                    try:
                        found = self._plain(self._text_sequences(texts, [1] * len(texts)))
                    except (RuntimeError, ValueError, TypeError, AttributeError, IndexError) as error:
                        tried.append(f"{self._way()}: {type(error).__name__}: {error}"[:200])
                        continue
                    if same_result(found.to(self.dtype), own.to(self.dtype)):
                        self._look_closer(texts, own, special)
                        self._probe_savings(ordinary)
                        return
                    tried.append(f"{self._way()}: {found[0].item():.4g} for embeddings, {own[0].item():.4g} for tokens")
        raise ValueError(
            f"{name} does not give the same score for input embeddings as for the tokens they come from, so it cannot "
            f"guide: expected {expected} whose forward takes inputs_embeds. Tried: {'; '.join(dict.fromkeys(tried))}"
        )

    def _ways(self) -> Iterator[str]:
        """The values of ``pooling`` to try, in turn."""
        if self._backbone is not None:
            yield "last"
        yield "whole"

    def _way(self) -> str:
        """What is being tried, in words."""
        return "its own forward" if self.pooling == "whole" else "its backbone and its head apart"

    def _special_ids(self) -> set[int]:
        """Ids by which a network may tell padding, or the end of a text."""
        config = self._config
        text = config.get_text_config() if hasattr(config, "get_text_config") else config
        found: set[Any] = set()
        for source in (config, text, self.tokenizer):
            for name in ("pad_token_id", "eos_token_id"):
                value = getattr(source, name, None)
                found.update(value if isinstance(value, (list, tuple)) else [value])
        rows = self.embedding.weight.shape[0]
        return {index for index in found if isinstance(index, int) and 0 <= index < rows}

    def _look_closer(self, texts: list[list[int]], own: torch.Tensor, special: set[int]) -> None:
        """Find out what padding, single tokens, masked places and lengths do to a network that is run the right way."""

        @functools.cache
        def answers(ids: tuple[int, ...]) -> torch.Tensor:
            return self._own(list(ids))

        @functools.cache
        def ours(ids: tuple[int, ...]) -> torch.Tensor:
            return self._plain(self._text_sequences([list(ids)], [1]))[0]

        # Float64 under eager attention gives NaN where a position sees nothing, as padding does.
        unequal = [texts[0], texts[1][:-1] + texts[1], texts[2]]
        if self._pads_freely:
            padded = self._plain(self._text_sequences(unequal, [1] * len(unequal)))
            self._bears_padding = bool(padded.isfinite().all())
        self.position_limit = learned_positions(lambda: ours(tuple(texts[0])), len(texts[0]))

        def far(ids: tuple[int, ...], read: tuple[int, ...]) -> float:
            """How far the network's own answer is from ours for what is read of a text; inf where it is another."""
            asked, found = torch.cat([own, answers(ids)[None]]), torch.cat([own, ours(read)[None].to(own.dtype)])
            same = same_result(found.to(self.dtype), asked.to(self.dtype))
            return abs(float(asked[-1] - found[-1])) if same else torch.inf

        def ending(index: int, some: list[tuple[int, ...]]) -> tuple[float, float]:
            """How far ours is from the network's own for texts that end with a token: read, and passed over."""
            whole = [(*text, index) for text in some]
            passed = zip(whole, some, strict=True)
            return sum(far(text, text) for text in whole), sum(far(text, read) for text, read in passed)

        several, passed_over = [tuple(text) for text in texts], set()
        text = several[1]
        for index in sorted(special):
            kept, cut = ending(index, [text])
            if max(kept, cut) < torch.inf:  # in 16 bits one text may fit both ways
                kept, cut = ending(index, several)
            if cut < kept:
                passed_over.add(index)
            if min(kept, cut) == torch.inf:
                self._apart[index] = 0
                continue
            inside, twice = (text[0], index, *text[1:]), (*text, index, index)
            if far(inside, inside) == torch.inf or far(twice, text if cut < kept else twice) == torch.inf:
                self._apart[index] = 1
        self._passed_over = frozenset(passed_over)
        if self.pooling == "whole":
            sequences = self._text_sequences([texts[0]] * 2, [1] * 2)
            sequences.mask[:, 3] = False
            sequences.embeddings[1, 3] += 1
            one, other = self._plain(sequences)
            if not same_result(one, other):
                raise ValueError(
                    f"{type(self.module).__name__} reads places that attention_mask leaves out, so slots behind the "
                    "end of a response would count: expected networks that mask them"
                )

    @torch.no_grad()
    def _probe_savings(self, ordinary: list[int]) -> None:
        """Find out which savings give this network's own rewards and gradients."""
        if self.pooling != "last" or not self._takes_positions or self._backbone is None:
            self._no_savings = f"{type(self.module).__name__} is run plainly: " + (
                "its backbone takes no position ids" if self.pooling == "last" else "it is no decoder under a head"
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
        ids = [tokens(length, 5 + row) for row in range(4)]
        slots, _ = self.embed_right_aligned(ids)
        slots = (slots + slots.roll(1, 0)) / 2  # soft embeddings
        alive = torch.ones(4, length, dtype=torch.bool, device=self.device)
        alive[0, 5:] = alive[1, 3] = alive[2, 1] = alive[2, 4:] = alive[3, 4:] = False
        targets = self._probe_targets(ids)

        def measure(use: frozenset[str]) -> tuple[torch.Tensor, torch.Tensor]:
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
                    sequences = self._sequences(prepared, index, response, alive, targets)
                    if use:
                        rewards = self._partial(use, prepared, index, sequences, count)
                    else:
                        rewards = self._by_layout(prepared, index, sequences)
                    gradients.append(torch.autograd.grad(rewards.sum(), response)[0][:, count:])
                found.append(rewards.detach())
            return torch.cat(found), torch.cat(gradients, dim=1)

        savings.probe(measure)
        savings.warn()

    def _probe_targets(self, ids: list[list[int]]) -> torch.Tensor | None:
        """What the probe's responses hold; ``ids`` are the reward model's own tokens."""
        return None
