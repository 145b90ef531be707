"""Savings of a decoder's reward that change nothing: what need not be computed again, or at all.

=====================  =================================================================================================
name                   what is saved
=====================  =================================================================================================
``reward_prefix``      keys and values of what comes before the response are computed once per prompt and used by every
                       step and trajectory
``reward_committed``   so are those of the leading slots that are committed in all rows of the batch
``reward_dead``        slots that nothing attends to are cut out, the others keeping their position ids; on a CPU only:
                       how many are left must be known on the host, and an accelerator would be waited for each time
``reward_last_layer``  the last layer (but for its keys and values), the final norm and the head are run where they are
                       read: at the one position of a score, or from the response on for a likelihood
``reward_attention``   attention with gradients on a CPU is two batched products, see
                       :mod:`entrgi_kernels.rewards.decoding.attention`
=====================  =================================================================================================

Which of them a model can be served with is found out by trying (:meth:`ExactSavings.probe`), not read off its name.
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

import torch

from .decoder import KNOWN_FAMILIES, CachedDecoder, KeyValues, Past, Rows
from .sequences import PreparedPrompts, Sequences, last_real

logger = logging.getLogger("entrgi_kernels")

PREFIX, COMMITTED, DEAD, LAST_LAYER, ATTENTION = NAMES = (
    "reward_prefix",
    "reward_committed",
    "reward_dead",
    "reward_last_layer",
    "reward_attention",
)

# Relative difference (of rewards, largest; of gradients, in norm) below which two ways through one network are the
# same: far below what a wrong position or mask makes of random tokens, above what rounding does.
_SAME = {torch.float64: 1e-5, torch.float32: 1e-3, torch.float16: 0.05, torch.bfloat16: 0.15}


def parse_savings(names: str | Iterable[str] | None) -> frozenset[str]:
    """The set that ``exact_savings=`` stands for: "all", "none" (or None), a name, or names.

    Raises:
        ValueError: a name is not one of :data:`NAMES`.
        TypeError: neither a string nor a set of strings.
    """
    expected = f"expected 'all', 'none', or a set of {', '.join(map(repr, NAMES))}"
    if names is None or isinstance(names, str) and names in ("all", "none"):
        return frozenset(NAMES if names == "all" else ())
    try:
        found = frozenset([names] if isinstance(names, str) else names)
    except TypeError:
        raise TypeError(f"exact_savings={names!r}: {expected}") from None
    unknown = [name for name in found if name not in NAMES]
    if unknown:
        raise ValueError(f"exact_savings holds {', '.join(sorted(map(repr, unknown)))}: {expected}")
    return found


@dataclass
class _Committed:
    """Keys and values of the committed slots at the left of every response of a batch.

    Attributes:
        rows: the rows they belong to.
        layers: of ``count`` slots.
        response, alive: the slots themselves [B, count, D], zero where dead, and [B, count].
        read: what a reward read off them, by name, [B, count, ...] each.
        given, version, wanted: the tensor of counts that was last read, its version, and what was read.
    """

    rows: Rows
    count: int = 0
    layers: KeyValues = field(default_factory=list)
    response: Any = None
    alive: Any = None
    read: dict[str, torch.Tensor] = field(default_factory=dict)
    given: torch.Tensor | None = None
    version: int = -1
    wanted: int = 0

    def crop(self, count: int) -> None:
        """Forget all but the first slots."""
        if count < self.count:
            assert self.response is not None and self.alive is not None
            self.layers = [(key[..., :count, :], value[..., :count, :]) for key, value in self.layers]
            self.response, self.alive, self.count = self.response[:, :count], self.alive[:, :count], count
            self.read = {name: values[:, :count] for name, values in self.read.items()}

    def permute(self, index: torch.Tensor) -> None:
        """Row i becomes a copy of row index[i]."""
        self.layers = [(key.index_select(0, index), value.index_select(0, index)) for key, value in self.layers]
        self.read = {name: values.index_select(0, index) for name, values in self.read.items()}
        if self.count:
            self.response, self.alive = self.response.index_select(0, index), self.alive.index_select(0, index)

    def extend(
        self, layers: KeyValues, response: torch.Tensor, alive: torch.Tensor, read: dict[str, torch.Tensor]
    ) -> None:
        """Add the slots that follow; ``response`` and ``alive`` are all slots up to there, the rest is of the new."""
        if self.count:
            old = self.layers
            self.layers = [
                (torch.cat([k, key], -2), torch.cat([v, value], -2))
                for (k, v), (key, value) in zip(old, layers, strict=True)
            ]
            self.read = {name: torch.cat([self.read[name], values], 1) for name, values in read.items()}
        else:
            self.layers = [(key.clone(), value.clone()) for key, value in layers]  # not views of whole sequences
            self.read = {name: values.clone() for name, values in read.items()}
        self.response, self.alive, self.count = response.clone(), alive.clone(), response.shape[1]


@dataclass
class PartialRun:
    """Final hidden states of the part of a batch that had to be run.

    Attributes:
        hidden: [B, T', D]; T' is 1 where each row is read at its last real position alone.
        columns, valid: [B, T'], which column of the sequences each of these is, and whether it is a live one; None in
            the former case, as is ``before``.
        before: [B, D], the state at the last position of the prefix; None where the prefix is among the columns.
    """

    hidden: torch.Tensor
    sequences: Sequences
    prefix_width: int
    past: Past | None
    state: _Committed | None
    grow: int
    columns: torch.Tensor | None = None
    valid: torch.Tensor | None = None
    before: torch.Tensor | None = None

    @property
    def kept(self) -> dict[str, torch.Tensor]:
        """What was read off the committed slots that were not run, by name [B, count, ...]; empty without any."""
        return self.state.read if self.state is not None else {}

    @property
    def kept_alive(self) -> torch.Tensor:
        """[B, count] bool: which of these are alive."""
        assert self.state is not None and self.state.alive is not None
        return self.state.alive

    def keep(self, **read: torch.Tensor) -> None:
        """Keep keys and values of the slots that are committed now, and what was read off each slot run [B, T', ..]."""
        if self.state is None or not self.grow:
            return
        assert self.past is not None
        kept = slice(self.prefix_width, self.prefix_width + self.state.count + self.grow)
        alive = self.sequences.mask[:, kept]
        response = self.sequences.embeddings[:, kept].detach().masked_fill(~alive[..., None], 0)
        new = {name: values[:, : self.grow].detach() for name, values in read.items()}
        self.state.extend(self.past.recorded(), response, alive, new)


class ExactSavings:
    """Which savings a decoder is served with, and the forward that makes them.

    Args:
        decoder: the backbone.
        requested: names asked for.

    Attributes:
        requested: may be changed at any time.
        refused: reasons, by name, found at construction or by the probe.
    """

    def __init__(self, decoder: CachedDecoder, requested: frozenset[str]) -> None:
        self.decoder = decoder
        self.requested = requested
        self.refused: dict[str, str] = {}
        if decoder.why_not is not None:
            self.refused = dict.fromkeys(NAMES, decoder.why_not)
            return
        if decoder.why_no_prefix is not None:
            self.refused |= dict.fromkeys((PREFIX, COMMITTED), decoder.why_no_prefix)
        if decoder.why_no_last_layer is not None:
            self.refused[LAST_LAYER] = decoder.why_no_last_layer
        if decoder.why_no_products is not None:
            self.refused[ATTENTION] = decoder.why_no_products

    def reasons(self, device: torch.device) -> dict[str, str]:
        """Why each saving that is not in use on a device is not."""
        off = {name: "switched off" for name in NAMES if name not in self.requested} | self.refused
        if not reads_are_free(device):
            off.setdefault(DEAD, f"on {device.type}, counting the live slots would mean waiting for the device")
        if device.type != "cpu":
            off.setdefault(ATTENTION, f"on {device.type}, torch's own kernels are made for it")
        if PREFIX in off:
            off.setdefault(COMMITTED, f"it builds on {PREFIX}, which is not in use ({off[PREFIX]})")
        return {name: off[name] for name in NAMES if name in off}

    def warn(self) -> None:
        """Warn of savings that a network of a known family should have and has not: once for each reason.

        What its configuration rules out (a rotary embedding, eager attention) is no surprise and not warned of.
        """
        if self.decoder.family not in KNOWN_FAMILIES:
            return
        explained = {self.decoder.why_no_prefix, self.decoder.why_no_products} - {None}
        lost: dict[str, list[str]] = {}
        for name in NAMES:
            reason = self.refused.get(name)
            if name in self.requested and reason is not None and reason not in explained:
                lost.setdefault(reason, []).append(name)
        for reason, names in lost.items():
            warn_once(f"{type(self.decoder.backbone).__name__} is guided without {', '.join(names)}: {reason}")

    def for_call(self, prepared: PreparedPrompts, columns: int, device: torch.device) -> frozenset[str]:
        """The savings that a call over sequences of this many positions is served with."""
        if not self.decoder.serves(columns):
            return frozenset()
        use = set(NAMES) - self.reasons(device).keys()
        if not all(prepared.suffix_ids):
            use -= {PREFIX, COMMITTED}  # a response that is dead throughout is then read at the prefix
        return frozenset(use)

    # ---- the forward

    def run(
        self,
        use: frozenset[str],
        prepared: PreparedPrompts,
        index: torch.Tensor,
        sequences: Sequences,
        committed: torch.Tensor | int | None,
        *,
        everywhere: bool = False,
    ) -> PartialRun:
        """Run what has to be run of a batch.

        Args:
            use: what :meth:`for_call` allows.
            prepared: the prompts.
            index: [B], the prompt of each row.
            sequences: as ``assemble`` lays them out.
            committed: how many leading slots of each row [B], or of every row, stay what they are.
            everywhere: the states are read from the last position of the prefix on; else at each row's last real
                position alone.
        """
        embeddings, mask, positions = sequences.embeddings, sequences.mask, sequences.positions
        prefix_width, suffix_width = prepared.prefix_valid.shape[1], prepared.suffix_valid.shape[1]
        end = embeddings.shape[1] - suffix_width
        start = grow = 0
        past = state = before = None
        if PREFIX in use and prefix_width:
            shared, rows, before = self._prefix(prepared, index)
            past, start = Past(prefix_width, shared, rows), prefix_width
            if COMMITTED in use and committed is not None and end > start:
                response, alive = embeddings[:, start:end].detach(), mask[:, start:end]
                state, grow = self._committed(prepared, rows, response, alive, committed)
                past.columns, past.own, past.record = start + state.count, state.layers or None, grow
                start += state.count
        tokens, valid, places = embeddings[:, start:], mask[:, start:], positions[:, start:]
        columns = torch.arange(start, embeddings.shape[1], device=embeddings.device).expand(len(tokens), -1)
        if grow:  # constants from now on: what they are in later calls, they are in this one
            tokens = torch.cat([tokens[:, :grow].detach(), tokens[:, grow:]], dim=1)
        if DEAD in use:
            first = grow if start else prefix_width
            tokens, valid, places, columns = _without_dead(tokens, valid, places, columns, first, end - start)
        key_valid = torch.cat([mask[:, :start], valid], dim=1)
        key_places = torch.cat([positions[:, :start], places], dim=1)
        # Behind an empty suffix the last slot may be a dead one; otherwise the last position is the last token.
        last = None if everywhere or all(prepared.suffix_ids) else last_real(valid)
        at: torch.Tensor | int | None = None
        if LAST_LAYER in use:
            if not everywhere:
                at = 1 if last is None else last
            elif not start and prefix_width > 1:
                at = tokens.shape[1] - prefix_width + 1
        hidden = self.decoder.hidden(
            tokens, places, valid, key_places, key_valid, past, last_layer_at=at, products=ATTENTION in use
        )
        if not everywhere and at is None:
            hidden = hidden[:, -1:] if last is None else hidden.take_along_dim(last[:, None, None], 1)
        if not everywhere:
            return PartialRun(hidden, sequences, prefix_width, past, state, grow)
        count = hidden.shape[1]
        return PartialRun(
            hidden, sequences, prefix_width, past, state, grow, columns[:, -count:], valid[:, -count:], before
        )

    def end_of_texts(self, sequences: Sequences, count: int) -> torch.Tensor:
        """Final hidden states [B, count, D] at the end of whole sequences, the last layer being run there alone."""
        mask, positions = sequences.mask, sequences.positions
        return self.decoder.hidden(sequences.embeddings, positions, mask, positions, mask, last_layer_at=count)

    def _prefix(self, prepared: PreparedPrompts, index: torch.Tensor) -> tuple[KeyValues, Rows, torch.Tensor]:
        extra = prepared.extra
        if "prefix_states" not in extra:
            positions = (prepared.prefix_valid.long().cumsum(1) - 1).clamp_min(0)
            extra["prefix_states"] = self.decoder.encode(prepared.prefix, positions, prepared.prefix_valid)
        seen = extra.get("rows")
        if seen is None or seen[0] is not index or seen[1] != _version(index):
            extra["rows"] = seen = index, _version(index), Rows.of(index, len(prepared))
        layers, last = extra["prefix_states"]
        return layers, seen[2], last[index]

    def _committed(
        self,
        prepared: PreparedPrompts,
        rows: Rows,
        response: torch.Tensor,
        alive: torch.Tensor,
        committed: torch.Tensor | int,
    ) -> tuple[_Committed, int]:
        """What is kept of the committed slots, made to fit this call, and by how many slots it grows now."""
        length = response.shape[1]
        state: _Committed | None = prepared.extra.get("committed")
        if state is None or state.rows is not rows:
            state = _Committed(rows)
        given = committed if isinstance(committed, torch.Tensor) else None
        free = reads_are_free(response.device)
        repeated = given is not None and given is state.given and _version(given) == state.version != -1
        if repeated and not free:
            wanted, same = state.wanted, True
        elif given is None and not free:
            wanted, same = int(committed), True  # the caller's word: looking would mean waiting for the device
        else:
            # One transfer for both: the count, and whether the slots kept are still what they were.
            least = given.min() if given is not None else torch.tensor(int(committed))
            unchanged = self._unchanged(state, response, alive)
            wanted, same = torch.stack([least.to(unchanged), unchanged]).tolist()
        state = state if same else _Committed(rows)
        state.given, state.version, state.wanted = given, -1 if given is None else _version(given), wanted
        wanted = max(0, min(wanted, length))
        state.crop(wanted)
        prepared.extra["committed"] = state
        return state, wanted - state.count

    @staticmethod
    def _unchanged(state: _Committed, response: torch.Tensor, alive: torch.Tensor) -> torch.Tensor:
        if not state.count:
            return torch.ones((), dtype=torch.long, device=response.device)
        now, live = response[:, : state.count], alive[:, : state.count]
        same = torch.eq(now.masked_fill(~live[..., None], 0), state.response).all() & torch.eq(live, state.alive).all()
        return same.long()

    @staticmethod
    def permute(prepared: PreparedPrompts, index: torch.Tensor) -> None:
        """What is kept of committed slots follows: row i is a copy of row index[i] from now on."""
        state: _Committed | None = prepared.extra.get("committed")
        if state is not None:
            state.permute(index)

    # ---- the probe

    def probe(self, measure: Callable[[frozenset[str]], tuple[torch.Tensor, torch.Tensor]]) -> None:
        """Refuse each saving with which rewards or gradients are not those of the plain forward.

        Args:
            measure: gives rewards and the gradient of their sum for a few sequences, with the savings it is handed.
        """
        tried = [name for name in NAMES if name not in self.refused]
        if not tried:
            return
        plain = measure(frozenset())
        if self._difference(measure, frozenset(tried), plain) is None:
            return
        for name in tried:
            alone = {PREFIX, COMMITTED} if name == COMMITTED else {name}
            if name == COMMITTED and PREFIX in self.refused:
                self.refused[name] = self.refused[PREFIX]
                continue
            reason = self._difference(measure, frozenset(alone), plain)
            if reason is not None:
                self.refused[name] = reason
        rest = frozenset(tried) - self.refused.keys()
        reason = self._difference(measure, rest, plain) if len(rest) > 1 else None
        if reason is not None:
            self.refused |= dict.fromkeys(rest, f"together with the others: {reason}")

    @staticmethod
    def _difference(
        measure: Callable[[frozenset[str]], tuple[torch.Tensor, torch.Tensor]],
        use: frozenset[str],
        plain: tuple[torch.Tensor, torch.Tensor],
    ) -> str | None:
        try:
            rewards, gradient = measure(use)
        except Exception as error:  # other people's networks fail in ways of their own; the plain path is always there
            return f"the network does not run that way ({type(error).__name__}: {error})"[:300]
        bound = _SAME.get(gradient.dtype, 0.15)
        far = float((rewards - plain[0]).abs().max() / plain[0].abs().max().clamp_min(1e-12))
        apart = float((gradient - plain[1]).double().norm() / plain[1].double().norm().clamp_min(1e-30))
        if far <= bound and apart <= bound:
            return None
        return f"not exact for this network: rewards differ by {far:.1e}, gradients by {apart:.1e} (relative)"


@functools.cache
def warn_once(text: str) -> None:
    logger.warning("%s; rewards are right, but cost up to twice the time (docs/savings.md)", text)


def reads_are_free(device: torch.device) -> bool:
    """Whether the host may look at a result without waiting for anything."""
    return device.type == "cpu"


def _version(tensor: torch.Tensor) -> int:
    return -1 if tensor.is_inference() else tensor._version


def _without_dead(
    tokens: torch.Tensor, valid: torch.Tensor, places: torch.Tensor, numbers: torch.Tensor, first: int, end: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Cut dead columns of ``[first, end)`` out of a batch, down to the most live ones that a row has.

    Args:
        tokens, valid, places, numbers: [B, T, D], [B, T], [B, T], [B, T].
        first, end: the columns in which dead ones may be; the rest stays.
    """
    live = valid[:, first:end]
    width = int(live.sum(1).max()) if live.numel() else 0
    if width >= live.shape[1]:
        return tokens, valid, places, numbers
    order = torch.argsort(~live, dim=1, stable=True)[:, :width] + first
    columns = torch.arange(tokens.shape[1], device=tokens.device).expand(len(tokens), -1)
    columns = torch.cat([columns[:, :first], order, columns[:, end:]], dim=1)
    return (
        tokens.take_along_dim(columns[..., None], 1),
        valid.take_along_dim(columns, 1),
        places.take_along_dim(columns, 1),
        numbers.take_along_dim(columns, 1),
    )
