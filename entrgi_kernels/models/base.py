"""What the guided sampler asks of a diffusion language model, and the mechanics that its adapters share."""

from __future__ import annotations

import threading
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, Protocol, runtime_checkable

import torch
from torch import nn

from .compat import repair_rotary
from .forwards import Forwards, WholeCanvas, wanted_places
from .modules import (
    accepted_arguments,
    evaluating,
    first_nonfinite_parameter,
    input_embedding,
    learned_positions,
    module_device,
    module_dtype,
    output_head,
    plain_precision,
)

# Relative difference below which two ways through the same network count as the same result. Networks normalise and
# rotate in float32 whatever their dtype, so float64 ones agree no better than this where positions are offset.
SAME = {torch.float64: 1e-6, torch.float32: 1e-3, torch.bfloat16: 0.1, torch.float16: 0.05}


@runtime_checkable
class DiffusionModel(Protocol):
    """A masked diffusion language model as the guided sampler sees it.

    Attributes:
        module: the network itself.
        mask_token_id: the id that stands in a slot still to be decided.
        vocab_size: V, the number of rows of the network's head (it may exceed the tokenizer's length).
        shift: True when the logits of slot i are read at position i - 1, as models grown out of autoregressive
            ones do (Dream).
        device, dtype: of the network.
    """

    module: nn.Module
    mask_token_id: int
    vocab_size: int
    shift: bool

    @property
    def device(self) -> torch.device:
        """Where it takes its inputs."""
        ...

    @property
    def dtype(self) -> torch.dtype:
        """What it computes in."""
        ...

    def masked_logits(self, canvas: torch.Tensor, attention_mask: torch.Tensor, masked: torch.Tensor) -> torch.Tensor:
        """Logits [N, V] of the N slots where ``masked`` is True, in row-major order."""
        ...


def logits_of(output: Any) -> torch.Tensor:
    """The logits of whatever a network returns: an output object, a tuple that starts with them, or a tensor."""
    if isinstance(output, torch.Tensor):
        return output
    logits = getattr(output, "logits", None)
    if logits is None and isinstance(output, (tuple, list)) and output:
        logits = output[0]
    if not isinstance(logits, torch.Tensor):
        raise TypeError(
            f"the network returned {type(output).__name__}, which holds no logits: expected a tensor, a tuple that "
            "starts with the logits, or an object with .logits"
        )
    return logits


def mask_token_error(source: str) -> ValueError:
    """The error for a model whose mask token nobody names."""
    return ValueError(
        f"{source} names no mask token: neither its config (mask_token_id) nor the tokenizer (mask_token) does; "
        "pass mask_token_id=, the id the model was trained with"
    )


class BackboneModel:
    """Adapter of one network: runs it bidirectionally and projects only the rows that are asked for.

    Subclasses say how the network wants its mask and positions (:meth:`inputs`). At construction a handful of tokens
    is run through the network to find out, rather than assume, that attention is bidirectional, whether left padding
    leaves the other positions alone, and whether its head may be applied to some positions only.

    Args:
        module: the network; called as ``module(canvas, ...)``, returns logits [B, S, V].
        mask_token_id: id of the mask token.
        shift: True when slot i's logits are read at position i - 1.

    Attributes:
        head_on_masked_rows: True when the vocabulary projection runs on the wanted rows only (the logits are the
            same; at 152k tokens the projection of a whole canvas is often the largest product of a step).
        pad_invariant: True when left padding does not change the logits of the other positions. Where it does,
            rows are run in groups of equal padding, with the padding cut off.
        position_limit: how many positions the network has learned; None where it computes them.
        block_length: how many tokens a block of block-causal attention has; None: every position sees every other.

    Raises:
        TypeError: ``module`` is no ``torch.nn.Module``.
        ValueError: a parameter is not finite, the mask token lies outside the vocabulary, or attention is causal.
    """

    block_length: int | None = None

    def __init__(self, module: nn.Module, mask_token_id: int, shift: bool) -> None:
        if not isinstance(module, nn.Module):
            raise TypeError(f"module is {type(module).__name__}: expected a torch.nn.Module")
        if not isinstance(mask_token_id, int) or isinstance(mask_token_id, bool):
            raise TypeError(f"mask_token_id={mask_token_id!r}: expected an int")
        if not isinstance(shift, bool):
            raise TypeError(f"shift={shift!r}: expected True or False")
        repair_rotary(module)
        self.module = module
        self.mask_token_id = mask_token_id
        self.shift = shift
        self.vocab_size = 0
        self.head_on_masked_rows = False
        self.pad_invariant = True
        self.position_limit: int | None = None
        self._filler: int | None = None
        self._accepted = accepted_arguments(module)
        self._head = output_head(module)
        self._seen_mask: tuple[weakref.ref[torch.Tensor], int, tuple[bool, dict[str, Any]]] | None = None
        self._check()

    def __repr__(self) -> str:
        return (
            f"{type(self).__name__}({type(self.module).__name__}, mask_token_id={self.mask_token_id}, "
            f"shift={self.shift}, vocab_size={self.vocab_size}, head_on_masked_rows={self.head_on_masked_rows})"
        )

    @property
    def device(self) -> torch.device:
        """The device that the network takes its inputs on."""
        return module_device(self.module)

    @property
    def dtype(self) -> torch.dtype:
        """The dtype that the network computes in."""
        return module_dtype(self.module)

    def inputs(self, attention_mask: torch.Tensor, padded: bool) -> dict[str, Any]:
        """The network's keyword arguments beside the canvas.

        Args:
            attention_mask: [B, S] bool, True at real tokens.
            padded: whether any position is padding (known on the host, so that no synchronisation is needed).
        """
        raise NotImplementedError

    def accepts(self, name: str) -> bool:
        """Whether the network's forward takes the keyword argument ``name``."""
        return name in self._accepted or "**" in self._accepted

    def masked_logits(
        self,
        canvas: torch.Tensor,
        attention_mask: torch.Tensor,
        masked: torch.Tensor,
        *,
        positions: torch.Tensor | None = None,
        out: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Logits of the masked slots: one forward of the network, without gradient, in its own dtype.

        Args:
            canvas: [B, S] int64 token ids, mask tokens in the open slots; what stands in the padding is not read.
            attention_mask: [B, S] bool, True at real tokens; padding is on the left.
            masked: [B, S] bool, True where logits are wanted.
            positions: [N] int64, ``masked.flatten().nonzero()`` when the caller already has it; saves the
                synchronisation that counting the masked slots costs on a GPU.
            out: [N, V] contiguous, memory for the result; it is used where the head is a plain linear layer.

        Returns:
            [N, V] in row-major order of the True positions; slot i of a shifting model reads position max(i - 1, 0).
            It is ``out`` or a tensor of its own.

        Raises:
            ValueError: shapes or dtypes do not fit, or a row is longer than the positions that the network has learned.
        """
        check_canvas(canvas, attention_mask, masked)
        if self.position_limit is not None and canvas.shape[1] > self.position_limit:
            self.check_length(int(attention_mask.sum(1).max()), "a prompt with its response slots")
        positions = wanted_places(masked, positions)
        if positions.numel() == 0:
            return torch.empty(0, self.vocab_size, device=canvas.device, dtype=self.dtype)
        if self.shift:
            # What a row begins with reads itself: padding has nothing to say.
            inside = (positions % canvas.shape[1] != 0) & attention_mask.flatten()[positions - 1]
            positions = torch.where(inside, positions - 1, positions)
        with torch.no_grad(), plain_precision(canvas.device), evaluating(self.module):
            padded, arguments = self._arguments(attention_mask)
            if padded and not self.pad_invariant:
                return self._by_padding(canvas, attention_mask, positions)
            if padded and self._filler is not None:
                # The id that the probe padded with: RoBERTa and its kin count positions by ids.
                canvas = canvas.masked_fill(~attention_mask, self._filler)
            return self._rows(canvas, arguments, positions, out)

    def block_offsets(self, prompt_lengths: list[int]) -> list[int]:
        """How many of each prompt's last tokens stand in the block that its response begins in: 0 without blocks."""
        return [0] * len(prompt_lengths)

    def forwards(self, tokens: torch.Tensor, attention: torch.Tensor, start: int, repeats: int = 1) -> Forwards:
        """The forwards of one batch's generation.

        Args:
            tokens: [R, S] int64, prompts padded on the left, then the responses' slots.
            attention: [R, S] bool, True at real tokens.
            start: column at which the responses begin.
            repeats: this many consecutive rows share their prompt.
        """
        return WholeCanvas(self, attention)

    def check_length(self, length: int, what: str) -> None:
        """Raise ValueError for more tokens than the network has learned positions for; ``what`` says whose they are."""
        if self.position_limit is not None and length > self.position_limit:
            raise ValueError(
                f"{type(self.module).__name__} has learned {self.position_limit} positions, and {what} takes {length} "
                f"tokens: expected at most {self.position_limit} (a shorter prompt or a smaller max_new_tokens)"
            )

    def _arguments(self, attention_mask: torch.Tensor) -> tuple[bool, dict[str, Any]]:
        """``(padded, keyword arguments)``, computed once per mask tensor: a run keeps one for all its steps."""
        version = -1 if attention_mask.is_inference() else attention_mask._version
        seen = self._seen_mask
        if seen is not None and version >= 0 and seen[0]() is attention_mask and seen[1] == version:
            return seen[2]
        padded = not bool(attention_mask.all())
        built = padded, self.inputs(attention_mask, padded)
        if version >= 0:
            self._seen_mask = weakref.ref(attention_mask), version, built
        return built

    def _by_padding(self, canvas: torch.Tensor, attention_mask: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        """Run rows of equal padding together, without it: for networks that padding would disturb."""
        batch, length = canvas.shape
        row, column = positions // length, positions % length
        pads = (~attention_mask).sum(1)
        out: torch.Tensor | None = None
        for pad in pads.unique().tolist():
            members = (pads == pad).nonzero().squeeze(1)
            wanted = (pads[row] == pad).nonzero().squeeze(1)
            if wanted.numel() == 0:
                continue
            place = torch.full((batch,), -1, device=canvas.device)
            place[members] = torch.arange(members.numel(), device=canvas.device)
            cropped = canvas[members, pad:]
            flat = place[row[wanted]] * (length - pad) + (column[wanted] - pad).clamp_min(0)
            logits = self._rows(cropped, self.inputs(torch.ones_like(cropped, dtype=torch.bool), False), flat)
            if out is None:
                out = logits.new_empty(positions.numel(), logits.shape[-1])
            out[wanted] = logits
        assert out is not None  # positions is not empty here
        return out

    def _rows(
        self, canvas: torch.Tensor, arguments: dict[str, Any], positions: torch.Tensor, out: torch.Tensor | None = None
    ) -> torch.Tensor:
        """Logits [N, V] at flat positions of the canvas; the head runs on these alone where it may."""
        return self._picked(canvas, arguments, _at(positions), out)

    def _picked(
        self,
        canvas: torch.Tensor,
        arguments: dict[str, Any],
        pick: Callable[[torch.Tensor], torch.Tensor],
        out: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Logits [N, V] of the rows [N, W] that `pick` takes of all positions' [B * S, W], before or after the head."""
        if self.head_on_masked_rows and self._head is not None:
            with _only_rows(self._head, canvas.shape, pick) as applied, _writing_to(self._head, out):
                logits = logits_of(self.module(canvas, **arguments))
            if applied:
                return logits.reshape(-1, logits.shape[-1])
        else:
            logits = logits_of(self.module(canvas, **arguments))
        return pick(logits.reshape(-1, logits.shape[-1]))

    def _full(self, canvas: torch.Tensor, attention_mask: torch.Tensor) -> torch.Tensor:
        """All logits [B, S, V] of a canvas, unshifted."""
        arguments = self.inputs(attention_mask, not bool(attention_mask.all()))
        return logits_of(self.module(canvas, **arguments))

    def _check(self) -> None:
        """Look at the weights, then at what the network does with a few tokens."""
        name = type(self.module).__name__
        bad = first_nonfinite_parameter(self.module)
        if bad is not None:
            raise ValueError(f"parameter {bad!r} of {name} holds NaN or infinite values; the weights are damaged")
        rows = embedding_rows(self.module)
        if rows is not None and not 0 <= self.mask_token_id < rows:
            raise ValueError(
                f"mask_token_id {self.mask_token_id} is outside the embedding table of {name}: expected 0 to {rows - 1}"
            )
        if any(p.is_meta for p in self.module.parameters()):  # offloaded weights: nothing can be run cheaply
            self.vocab_size = rows or 0
            return
        with torch.no_grad(), plain_precision(self.device), evaluating(self.module):
            self._probe(rows)

    def _probe(self, rows: int | None) -> None:
        """Find out the head's size, whether attention is bidirectional, padding harmless and the head separable."""
        name = type(self.module).__name__
        pad = _pad_token(self.module)
        tokens = _ordinary_tokens(rows or self.mask_token_id + 1, {self.mask_token_id, pad})
        first = torch.tensor([self._probe_canvas(tokens)], device=self.device)
        real = torch.ones_like(first, dtype=torch.bool)
        found: list[torch.Tensor] = []
        self.position_limit = learned_positions(lambda: found.append(self._full(first, real)), first.shape[1])
        (logits,) = found
        if logits.dim() != 3 or logits.shape[:2] != first.shape:
            raise ValueError(
                f"{name} returned logits of shape {tuple(logits.shape)} for a canvas of shape {tuple(first.shape)}"
            )
        if not bool(logits.isfinite().all()):
            raise ValueError(f"{name} returns logits that are not finite for ordinary tokens")
        self.vocab_size = logits.shape[-1]

        self._check_attention(first, logits, tokens)

        # Padding: the same tokens behind two pads must give the same logits, to rounding.
        self._filler = tokens[3] if pad is None or (rows is not None and pad >= rows) else pad
        wide = torch.cat([first.new_full((1, 2), self._filler), first], dim=1)
        valid = torch.cat([real.new_zeros(1, 2), real], dim=1)
        self.pad_invariant = same_result(self._full(wide, valid)[:, 2:], logits)

        if self._head is not None:
            self.head_on_masked_rows = True
            wanted = torch.tensor([1, 3, 4], device=self.device)
            try:
                alone = self._rows(first, self.inputs(real, False), wanted)
                with _only_rows(self._head, first.shape, _at(wanted)) as applied:
                    self.module(first, **self.inputs(real, False))
            except (RuntimeError, ValueError, IndexError, TypeError):
                self.head_on_masked_rows = False
            else:
                self.head_on_masked_rows = bool(applied) and same_result(alone, logits[0, wanted])

    def _probe_canvas(self, tokens: list[int]) -> list[int]:
        """What is run at construction: ordinary tokens and masks, an ordinary one (``tokens[2]``) at the end."""
        return [tokens[0], self.mask_token_id, tokens[1], self.mask_token_id, tokens[2]]

    def _check_attention(self, first: torch.Tensor, logits: torch.Tensor, tokens: list[int]) -> None:
        """Raise ValueError where a later token does not reach an earlier position.

        Args:
            first: [1, S], the canvas that was run.
            logits: [1, S, V], what came of it.
            tokens: six ordinary ids.
        """
        real = torch.ones_like(first, dtype=torch.bool)
        distinct = [token for token in tokens[3:] if token != tokens[2]]
        for token in distinct:  # a second try, should one pair of tokens happen to look the same
            other = first.clone()
            other[0, -1] = token
            if bool((self._full(other, real)[:, 0] != logits[:, 0]).any()):
                return
        if distinct:
            raise ValueError(self.causal_message())

    def causal_message(self) -> str:
        """What to say when a later token does not reach an earlier position."""
        return (
            f"{type(self.module).__name__} attends causally: changing the last token leaves the logits of the first "
            "position as they were, so it cannot be run as a masked diffusion model"
        )


def _at(positions: torch.Tensor) -> Callable[[torch.Tensor], torch.Tensor]:
    """What takes the rows at these positions."""
    return lambda rows: rows.index_select(0, positions.to(rows.device))


@contextmanager
def _only_rows(
    head: nn.Module, shape: torch.Size, pick: Callable[[torch.Tensor], torch.Tensor]
) -> Iterator[list[bool]]:
    """Hand a head only some rows of its input while inside; yields a list that is non-empty once it has happened.

    Whatever the network does to its logits afterwards (soft-capping, scaling, casting) it does to those rows, so
    nothing about an architecture has to be known here. Other threads' calls of the same head are left alone.
    """
    applied: list[bool] = []
    thread = threading.get_ident()

    def select(_module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...] | None:
        hidden = args[0] if args else None
        if (
            threading.get_ident() != thread
            or not isinstance(hidden, torch.Tensor)
            or not hidden.is_floating_point()  # a tied head may be the embedding itself, called with ids first
            or hidden.shape[:-1] != shape
        ):
            return None
        applied.append(True)
        rows = pick(hidden.reshape(-1, hidden.shape[-1]))
        return (rows.unsqueeze(0), *args[1:])

    handle = head.register_forward_pre_hook(select)
    try:
        yield applied
    finally:
        handle.remove()


@contextmanager
def _writing_to(head: nn.Module, out: torch.Tensor | None) -> Iterator[None]:
    """Let a plain linear head write into given memory while inside; any other head is left as it is.

    What the network does to its logits afterwards then works on that memory, or on copies, as it always does.
    """
    weight = getattr(head, "weight", None)
    if out is None or type(head) is not nn.Linear or head.bias is not None or "forward" in vars(head):
        yield
        return
    thread, transposed = threading.get_ident(), weight.t()

    def forward(hidden: torch.Tensor) -> torch.Tensor:
        rows = hidden.reshape(-1, hidden.shape[-1])
        fits = out.shape == (rows.shape[0], transposed.shape[1]) and out.dtype == rows.dtype == transposed.dtype
        if threading.get_ident() != thread or not fits:
            return nn.functional.linear(hidden, head.weight)
        torch.mm(rows, transposed, out=out)
        return out.view(*hidden.shape[:-1], -1)

    head.forward = forward  # type: ignore[method-assign]
    try:
        yield
    finally:
        del head.forward


def same_result(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Whether two results of one computation agree within what their dtype's rounding explains."""
    scale = float(b.abs().amax()) + 1e-12
    return float((a - b).abs().amax()) <= SAME.get(b.dtype, 0.1) * scale


def embedding_rows(module: nn.Module) -> int | None:
    """Number of rows of the input embedding (the config's vocab_size without one), None when unknown."""
    weight = getattr(input_embedding(module), "weight", None)
    if isinstance(weight, torch.Tensor) and weight.dim() == 2:
        return weight.shape[0]
    size = getattr(getattr(module, "config", None), "vocab_size", None)
    return size if isinstance(size, int) else None


def _pad_token(module: nn.Module) -> int | None:
    pad = getattr(getattr(module, "config", None), "pad_token_id", None)
    return pad if isinstance(pad, int) and pad >= 0 else None


def _ordinary_tokens(rows: int, reserved: set[int | None]) -> list[int]:
    """Up to six ids spread over the vocabulary, none of them reserved (repeated when the vocabulary is tiny)."""
    spread = sorted({(rows * k) // 7 for k in range(1, 7)} | set(range(min(rows, 8))))
    ordinary = [token for token in spread if token not in reserved] or [0]
    picked = ordinary[-6:]
    return (picked * 6)[:6] if len(picked) < 6 else picked


def check_canvas(canvas: torch.Tensor, attention_mask: torch.Tensor, masked: torch.Tensor) -> None:
    """Raise ValueError unless the canvas is [B, S] ids, and both masks are bool of its shape."""
    if canvas.dim() != 2 or canvas.is_floating_point() or canvas.dtype == torch.bool:
        raise ValueError(f"canvas has shape {tuple(canvas.shape)} of {canvas.dtype}: expected [B, S] token ids")
    for name, tensor in (("attention_mask", attention_mask), ("masked", masked)):
        if tensor.shape != canvas.shape or tensor.dtype != torch.bool:
            raise ValueError(
                f"{name} is {tensor.dtype} of shape {tuple(tensor.shape)}: "
                f"expected bool of the canvas's shape {tuple(canvas.shape)}"
            )
