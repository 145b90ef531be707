"""Running a causal decoder in parts: on top of kept keys and values, and in its last layer at one position only.

Nothing of an architecture is written down again here. The network's own forward runs, with what transformers offers
for it (input embeddings, position ids, a prepared attention mask, a cache); the last layer is narrowed by a forward
pre-hook. By which argument a cache is taken is found out by handing one over: transformers 5.24 renamed it. What an
architecture makes of all that is for the caller to check against a plain forward.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from ...models.modules import accepted_arguments, input_embedding
from .attention import IN_PLACE_OF, products_in

# Attention implementations that take a prepared 4-D mask, and the kinds of layer such a mask is known for.
_IMPLEMENTATIONS = ("sdpa", "eager")
_LAYER_TYPES = ("full_attention", "sliding_attention")
# Where "sliding_window" in the config means query - key < window, as tests show; elsewhere, no window may be reached.
_WINDOWED = ("qwen2", "qwen3", "mistral", "gemma2", "gemma3_text")
# Families whose savings the tests see in use; one that is not in use there is worth a warning.
KNOWN_FAMILIES = (*_WINDOWED, "llama", "gemma")
# Rotary embeddings whose frequencies depend on the longest position of a call, so that parts would not agree.
_LENGTH_DEPENDENT_ROPE = ("dynamic", "longrope")

KeyValues = list[tuple[torch.Tensor, torch.Tensor]]  # per layer: keys and values [B, heads, T, head width]


@dataclass
class Rows:
    """Which of P prompts each row of a batch belongs to.

    Attributes:
        index: [B] int64.
        group: K when the rows are K of the first prompt, K of the second and so on: then nothing need be gathered.
    """

    index: torch.Tensor
    group: int | None

    @classmethod
    def of(cls, index: torch.Tensor, prompts: int) -> Rows:
        """Look at an index; costs one host synchronisation on an accelerator, so keep the result."""
        group = len(index) // prompts
        even = torch.arange(prompts, device=index.device).repeat_interleave(group)
        return cls(index, group if len(index) and even.shape == index.shape and torch.equal(even, index) else None)

    def join(self, shared: torch.Tensor, *own: torch.Tensor) -> torch.Tensor:
        """[B, heads, A + T.., width] of what prompts share, [P, heads, A, width], and what rows have of their own."""
        if self.group is None:
            return torch.cat([shared.index_select(0, self.index), *own], dim=-2)
        parts = [tensor.unflatten(0, (shared.shape[0], self.group)) for tensor in own]
        return torch.cat([shared[:, None].expand(-1, self.group, -1, -1, -1), *parts], dim=-2).flatten(0, 1)


class Past:
    """What a network sees as its cache: fixed keys and values before the tokens at hand, to which nothing is added.

    transformers' own caches grow with every forward, and those of sliding layers drop what a padded batch still needs.

    Args:
        columns: how many positions are held.
        shared: of each prompt, None when nothing is held.
        rows: the prompt of each row.
        own: of each row, behind the shared ones; None when there are none.
        record: of how many of the first new positions keys and values are kept in :meth:`recorded`.
    """

    def __init__(
        self,
        columns: int = 0,
        shared: KeyValues | None = None,
        rows: Rows | None = None,
        own: KeyValues | None = None,
        record: int = 0,
    ) -> None:
        self.columns, self.shared, self.rows, self.own, self.record = columns, shared, rows, own, record
        self._recorded: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}

    def update(
        self, key: torch.Tensor, value: torch.Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Keys and values that a layer attends to: those held and, behind them, the new ones."""
        if self.record:
            self._recorded[layer_idx] = key[..., : self.record, :].detach(), value[..., : self.record, :].detach()
        if self.shared is None:
            return key, value
        assert self.rows is not None
        before = self.own[layer_idx] if self.own is not None else None
        return (
            self.rows.join(self.shared[layer_idx][0], *(() if before is None else (before[0],)), key),
            self.rows.join(self.shared[layer_idx][1], *(() if before is None else (before[1],)), value),
        )

    def recorded(self) -> KeyValues:
        """What was asked for with ``record``, layer by layer."""
        return [self._recorded[layer] for layer in sorted(self._recorded)]

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Positions held."""
        return self.columns


class CachedDecoder:
    """A decoder backbone of transformers, run in parts.

    Args:
        backbone: the network without a head; called with embeddings, returns hidden states.

    Attributes:
        why_not: why this network cannot be run in parts at all; None when it may be tried.
        why_no_prefix: why its keys and values cannot be kept from one forward to another, None when they may.
        why_no_last_layer: why its last layer cannot be run at some positions alone, None when it may be tried.
        why_no_products: why its attention cannot be given to others, None when it can.
        window: the attention window of its sliding layers, None without any.
    """

    def __init__(self, backbone: nn.Module) -> None:
        self.backbone = backbone
        config: Any = getattr(backbone, "config", None)
        self.config = config.get_text_config() if hasattr(config, "get_text_config") else config
        self._accepts = accepted_arguments(backbone)
        types = set(getattr(self.config, "layer_types", None) or ())
        window = getattr(self.config, "sliding_window", None)
        # Without layer types, as in Mistral, a window is every layer's.
        self.window = window if isinstance(window, int) and (not types or "sliding_attention" in types) else None
        self._types = types
        self._layers: Any = self._decoder_layers()
        # The arguments by which the network and each of its layers take a cache; None where none was found.
        self._cache = self._layer_cache = ""  # the arguments that take a cache, once found
        self.why_not = self._why_not()
        self.why_no_last_layer = self._why_no_last_layer()
        self.why_no_prefix = self._why_no_prefix()
        self.why_no_products = self._why_no_products()

    def serves(self, columns: int) -> bool:
        """Whether sequences of this many positions are covered: elsewhere than in known families, below the window."""
        return self.window is None or self.family in _WINDOWED or columns <= self.window

    @property
    def family(self) -> str | None:
        """What the configuration calls the architecture."""
        return getattr(self.config, "model_type", None)

    def encode(
        self, embeddings: torch.Tensor, positions: torch.Tensor, valid: torch.Tensor
    ) -> tuple[KeyValues, torch.Tensor]:
        """Keys and values of all positions of [B, T, D] embeddings and the last one's final state, without gradient."""
        past = Past(record=embeddings.shape[1])
        with torch.no_grad():
            hidden = self.hidden(embeddings, positions, valid, positions, valid, past)
        return past.recorded(), hidden[:, -1]

    def hidden(
        self,
        embeddings: torch.Tensor,
        positions: torch.Tensor,
        valid: torch.Tensor,
        key_positions: torch.Tensor,
        key_valid: torch.Tensor,
        past: Past | None = None,
        *,
        last_layer_at: torch.Tensor | int | None = None,
        products: bool = False,
    ) -> torch.Tensor:
        """Final hidden states [B, T, D]; with ``last_layer_at``, those of some positions of each row alone.

        Args:
            embeddings: [B, T, D].
            positions, valid: [B, T] int64 and bool, of the tokens at hand.
            key_positions, key_valid: [B, A + T], of what is held and, behind it, the tokens at hand.
            past: what is held, A positions; None when nothing is.
            last_layer_at: where the last layer is run: [B] int64, one place among the T of each row; or an int, that
                many places at the end of all rows.
            products: run attention with gradients by :mod:`entrgi_kernels.rewards.decoding.attention`.

        Raises:
            RuntimeError: the last layer cannot be run at some positions alone.
        """
        arguments: dict[str, Any] = {
            "inputs_embeds": embeddings,
            "position_ids": positions,
            "attention_mask": self._masks(positions, key_positions, key_valid, embeddings.dtype),
        }
        if past is not None:
            arguments[self._cache] = past
        if "use_cache" in self._accepts:
            arguments["use_cache"] = past is not None
        narrowed: AbstractContextManager[list[bool]] = nullcontext([True])
        if last_layer_at is not None:
            if self.why_no_last_layer is not None:
                raise RuntimeError(self.why_no_last_layer)
            narrowed = _at_places(self._layers[-1], self._layer_cache, last_layer_at)
        with narrowed as applied, products_in(self.config) if products else nullcontext():
            output = self.backbone(**arguments)
        if not applied:
            raise RuntimeError("the last layer did not ask a cache for keys and values")
        hidden = getattr(output, "last_hidden_state", None)
        return hidden if isinstance(hidden, torch.Tensor) else output[0]

    def _masks(
        self, positions: torch.Tensor, key_positions: torch.Tensor, key_valid: torch.Tensor, dtype: torch.dtype
    ) -> torch.Tensor | dict[str, torch.Tensor]:
        """4-D attention masks in the form the network wants; causal and windowed by position, not by place.

        So rows may have places cut out or lie behind padding, and every position may look at itself: one that sees
        nothing yields NaN in some kernels, and a NaN value spreads through a zero weight.
        """
        count, total = positions.shape[1], key_positions.shape[1]
        distance = positions[:, :, None] - key_positions[:, None, :]
        itself = torch.ones(count, total, dtype=torch.bool, device=positions.device)
        itself = itself.triu(total - count).tril(total - count)
        seen = (distance >= 0) & key_valid[:, None, :] | itself

        def form(allowed: torch.Tensor) -> torch.Tensor:
            allowed = allowed[:, None]
            if getattr(self.config, "_attn_implementation", None) != "eager":
                return allowed
            # transformers' eager attention adds the mask.
            zero = torch.zeros((), dtype=dtype, device=allowed.device)
            return torch.where(allowed, zero, torch.finfo(dtype).min)

        if self.window is None:
            return form(seen)
        near = form(seen & (distance < self.window) | itself)
        return {"full_attention": form(seen), "sliding_attention": near} if len(self._types) > 1 else near

    def _decoder_layers(self) -> nn.ModuleList | None:
        count = getattr(self.config, "num_hidden_layers", None)
        for name, child in self.backbone.named_modules():
            if name.rpartition(".")[2] == "layers" and isinstance(child, nn.ModuleList) and len(child) == count:
                return child
        return None

    def _why_not(self) -> str | None:
        implementation = getattr(self.config, "_attn_implementation", None)
        if implementation not in _IMPLEMENTATIONS:
            return f"attention implementation {implementation!r}: only 'sdpa' and 'eager' take a prepared 4-D mask"
        if strange := self._types - set(_LAYER_TYPES):
            return f"layers of type {', '.join(sorted(strange))}"
        wanted = {"inputs_embeds", "attention_mask", "position_ids"}
        if not wanted <= self._accepts:
            return f"{type(self.backbone).__name__} takes no {', '.join(sorted(wanted - self._accepts))}"
        return self._find_cache()

    def _find_cache(self) -> str | None:
        """Hand a cache over by one argument after the other until a layer asks it for keys and values.

        Returns:
            Why none was found, None when one was.
        """
        embedding = getattr(input_embedding(self.backbone), "weight", None)
        if not isinstance(embedding, torch.Tensor):
            return f"{type(self.backbone).__name__} exposes no input embedding to try a cache with"
        token = torch.zeros(1, 1, embedding.shape[1], dtype=embedding.dtype, device=embedding.device)
        place = torch.zeros(1, 1, dtype=torch.long, device=embedding.device)
        real = torch.ones_like(place, dtype=torch.bool)
        arguments: dict[str, Any] = {"inputs_embeds": token, "position_ids": place}
        arguments["attention_mask"] = self._masks(place, place, real, token.dtype)
        if "use_cache" in self._accepts:
            arguments["use_cache"] = True
        others = self._accepts - arguments.keys() - {"input_ids", "**"}
        # The likely ones first. A forward that takes anything may hand it on under any name.
        names = sorted(others, key=lambda name: ("cache" not in name and "past" not in name, name))
        names += [name for name in ("cache", "past_key_values") if "**" in self._accepts and name not in names]
        failure: Exception | None = None
        for name in names:
            witness = _Catch(None)
            seen: list[str] = []

            def look(
                module: nn.Module, args: Any, kwargs: dict[str, Any], witness: _Catch = witness, seen: Any = seen
            ) -> None:
                seen.extend(name for name, value in kwargs.items() if value is witness)

            handles = [layer.register_forward_pre_hook(look, with_kwargs=True) for layer in self._layers or ()]
            try:
                with torch.no_grad():
                    self.backbone(**arguments, **{name: witness})
            except _CaughtError:
                self._cache, self._layer_cache = name, seen[0] if seen else ""
                return None
            except Exception as error:  # whatever a network says to a cache where it wants something else
                failure = failure or error
            finally:
                for handle in handles:
                    handle.remove()
        reason = f" ({type(failure).__name__}: {failure})"[:300] if failure is not None else ""
        return f"no argument of {type(self.backbone).__name__}'s forward takes a cache of keys and values{reason}"

    def _why_no_last_layer(self) -> str | None:
        if self._layers is None:
            return "no list of decoder layers was found in the network"
        return None if self._layer_cache else "the decoder layers take no cache by name"

    def _why_no_products(self) -> str | None:
        implementation = getattr(self.config, "_attn_implementation", None)
        return None if implementation == IN_PLACE_OF else f"attention implementation {implementation!r} is kept"

    def _why_no_prefix(self) -> str | None:
        parameters = getattr(self.config, "rope_parameters", None) or {}
        nested = [p for p in parameters.values() if isinstance(p, dict)] or [parameters]
        kinds = {parameter.get("rope_type") for parameter in nested} & set(_LENGTH_DEPENDENT_ROPE)
        return f"rotary embeddings of type {kinds.pop()!r} depend on the whole length" if kinds else None


class _CaughtError(Exception):
    """Ends a layer's forward as soon as its keys and values are known."""


class _Catch:
    """A cache that takes a layer's keys and values and ends its forward."""

    def __init__(self, past: Past | None) -> None:
        self.past = past
        self.states: tuple[torch.Tensor, torch.Tensor] | None = None

    def update(
        self, key: torch.Tensor, value: torch.Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        self.states = (key, value) if self.past is None else self.past.update(key, value, layer_idx)
        raise _CaughtError

    def get_seq_length(self, layer_idx: int = 0) -> int:
        return 0 if self.past is None else self.past.get_seq_length()


class _Given(_Catch):
    """A cache that answers with given keys and values, whatever it is told."""

    def update(
        self, key: torch.Tensor, value: torch.Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        assert self.states is not None
        return self.states


@contextmanager
def _at_places(layer: nn.Module, cache: str, places: torch.Tensor | int) -> Iterator[list[bool]]:
    """Run a decoder layer for some queries, with the keys and values of all; yields a list, non-empty once done.

    Wanted is one place of each row [B], or a number of places at the end of all rows. `cache` names the argument by
    which the layer takes one.

    The layer is run twice: on all positions until it hands its keys and values to the cache, then for the wanted
    positions alone with these as its cache. So projections, norms and rotation of keys are the layer's own. Other
    threads' calls are left alone.
    """
    applied: list[bool] = []
    thread = threading.get_ident()

    def narrow(
        module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        if threading.get_ident() != thread:
            return None

        def pick(tensor: torch.Tensor) -> torch.Tensor:
            if isinstance(places, int):
                return tensor[:, -places:]
            rows = torch.arange(len(places), device=places.device)
            return tensor.expand(len(places), *tensor.shape[1:])[rows, places][:, None]

        catch = _Catch(kwargs.get(cache))
        try:
            # Not the module itself, which would come back here.
            module.forward(*args, **{**kwargs, cache: catch})
        except _CaughtError:
            pass
        if catch.states is None:
            return None
        given = _Given(None)
        given.states = catch.states
        changed = {**kwargs, cache: given}
        if args:
            args = (pick(args[0]), *args[1:])
        else:
            changed["hidden_states"] = pick(kwargs["hidden_states"])
        mask = kwargs.get("attention_mask")
        if isinstance(mask, torch.Tensor):
            changed["attention_mask"] = pick(mask.transpose(1, 2)).transpose(1, 2)
        if isinstance(kwargs.get("position_ids"), torch.Tensor):
            changed["position_ids"] = pick(kwargs["position_ids"])
        if isinstance(kwargs.get("position_embeddings"), tuple):
            changed["position_embeddings"] = tuple(pick(part) for part in kwargs["position_embeddings"])
        applied.append(True)
        return args, changed

    handle = layer.register_forward_pre_hook(narrow, with_kwargs=True)
    try:
        yield applied
    finally:
        handle.remove()
