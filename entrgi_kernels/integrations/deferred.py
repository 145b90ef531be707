"""Logits over a large vocabulary that answer what a sampling loop asks of them without forming another [N, V] tensor.

A loop written in plain torch goes from logits to probabilities, from those to draws, entropies, confidences and
expected embeddings, with a tensor of the logits' size at every step of the way. A :class:`Deferred` stands in for the
logits: ``softmax`` and the like of it are noted down, and only what comes out small in the end is computed, by the
fused operators. Whatever is not known here forms the tensor after all, and so is right, only slower.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch.utils._pytree import tree_map

from .. import ops

LOGITS, LOG_P, P, P_LOG_P = "logits", "log_p", "p", "p_log_p"


@dataclass
class Arithmetic:
    """How small results are computed.

    Attributes:
        draws: "keyed" for the package's own draws, keyed by a seed that torch's generator gives at each draw; "torch"
            for torch.multinomial itself, which needs the probabilities.
        backend: of the operators.
    """

    draws: str = "keyed"
    backend: str = "auto"


class Deferred:
    """logits / temperature, or what softmax makes of them, as a tensor [..., V] that is not formed.

    Args:
        logits: [..., V] float32.
        how: the arithmetic.
        temperature: tau > 0.
        kind: LOGITS (logits / tau), LOG_P (their log-softmax), P (their softmax) or P_LOG_P (the product of both).
        known: statistics of the rows that were computed already; shared by all that stem from the same rows.
    """

    def __init__(
        self,
        logits: torch.Tensor,
        how: Arithmetic,
        temperature: float = 1.0,
        kind: str = LOGITS,
        known: dict[str, torch.Tensor] | None = None,
    ) -> None:
        self.source, self.temperature, self.kind = logits, temperature, kind
        self._how, self._known = how, {} if known is None else known

    # ---- as a tensor

    shape = property(lambda self: self.source.shape)
    dtype = property(lambda self: self.source.dtype)
    device = property(lambda self: self.source.device)
    ndim = property(lambda self: self.source.ndim)

    def size(self, *dim: int) -> Any:
        return self.source.size(*dim)

    def dim(self) -> int:
        return self.source.ndim

    ndimension = dim

    def formed(self) -> torch.Tensor:
        """The tensor [..., V], float32."""
        x = self.source if self.temperature == 1 else self.source / self.temperature
        if self.kind == LOGITS:
            return x
        if self.kind == P:
            return x.softmax(dim=-1)
        log_p = x.log_softmax(dim=-1)
        return log_p if self.kind == LOG_P else log_p.exp() * log_p.clamp(min=torch.finfo(log_p.dtype).min)

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):  # protocols that a tensor has and this has not: copying, arrays, ...
            raise AttributeError(name)
        return getattr(self.formed(), name)

    def __repr__(self) -> str:
        return f"Deferred({self.kind}, shape={list(self.shape)}, temperature={self.temperature})"

    @classmethod
    def __torch_function__(
        cls, function: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        rule = _RULES.get(function)
        result = NotImplemented if rule is None else rule(*args, **kwargs)
        if result is NotImplemented:
            args, kwargs = tree_map(_formed, (args, kwargs))
            result = function(*args, **kwargs)
        return result

    def _like(self, kind: str) -> Deferred:
        return Deferred(self.source, self._how, self.temperature, kind, self._known)

    # ---- what stays deferred

    def float(self) -> Any:
        return self if self.dtype == torch.float32 else self.formed().float()

    def reshape(self, *shape: Any) -> Any:
        source = self.source.reshape(*shape)
        if source.shape[-1:] != self.shape[-1:]:
            return self.formed().reshape(*shape)
        return Deferred(source, self._how, self.temperature, self.kind, self._known)

    view = reshape

    def __truediv__(self, other: Any) -> Any:
        if self.kind == LOGITS and isinstance(other, (int, float)) and other > 0:
            return self if other == 1 else Deferred(self.source, self._how, self.temperature * other)
        return self.formed() / other

    def softmax(self, dim: int, dtype: torch.dtype | None = None) -> Any:
        if self.kind in (LOGITS, LOG_P) and self._is_last(dim) and dtype in (None, self.dtype):
            return self._like(P)
        return self.formed().softmax(dim, dtype)

    def __sub__(self, other: Any) -> Any:
        # Less its own log-sum-exp, as torch.distributions writes log-softmax.
        own = self.kind == LOGITS and other is self._known.get("subtracted")
        return self._like(LOG_P) if own else self.formed() - other

    def __mul__(self, other: Any) -> Any:
        if isinstance(other, Deferred) and other._known is self._known and {self.kind, other.kind} == {P, LOG_P}:
            return self._like(P_LOG_P)
        return self.formed() * _formed(other)

    # ---- what is computed

    @property
    def _rows(self) -> torch.Tensor:
        return self.source.reshape(-1, self.shape[-1])

    def _is_last(self, dim: Any) -> bool:
        return dim in (-1, self.ndim - 1)

    def _statistics(self) -> tuple[torch.Tensor, torch.Tensor]:
        """(log-sum-exp, entropy) [N]."""
        if "entropy" not in self._known:
            lse, entropy = ops.softmax_entropy(self._rows, self.temperature, backend=self._how.backend)
            self._known.update(lse=lse, entropy=entropy)
        return self._known["lse"], self._known["entropy"]

    def logsumexp(self, dim: Any, keepdim: bool = False) -> torch.Tensor:
        if self.kind != LOGITS or not self._is_last(dim) or not keepdim:
            return self.formed().logsumexp(dim, keepdim)
        self._known["subtracted"] = self._statistics()[0].view(*self.shape[:-1], 1)
        return self._known["subtracted"]

    def sum(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        if self.kind == P_LOG_P and args in ((-1,), (self.ndim - 1,)) and not kwargs:
            return -self._statistics()[1].view(self.shape[:-1])
        return self.formed().sum(*args, **kwargs)

    def argmax(self, dim: Any = None, keepdim: bool = False) -> torch.Tensor:
        if not self._is_last(dim):
            return self.formed().argmax(dim, keepdim)
        if "argmax" not in self._known:
            best = ops.sample_tokens(self._rows, temperature=0, backend=self._how.backend)
            self._known["argmax"] = _checked(best)
        best = self._known["argmax"].view(self.shape[:-1])
        return best.unsqueeze(-1) if keepdim else best

    def clamp(self, min: Any = None, max: Any = None) -> Any:
        if self.kind == LOG_P and max is None and min == torch.finfo(self.dtype).min:
            return self  # that changes -inf alone, whose probability is 0
        return self.formed().clamp(min, max)

    def multinomial(
        self, num_samples: int, replacement: bool = False, *, generator: torch.Generator | None = None
    ) -> torch.Tensor:
        if self.kind != P or self.ndim != 2 or num_samples != 1 or self._how.draws == "torch":
            return self.formed().multinomial(num_samples, replacement, generator=generator)
        where = "cpu" if generator is None else generator.device
        seed: Any = torch.randint(1 << 62, (), generator=generator, device=where)
        if seed.device.type == "cpu":
            seed = int(seed)
        drawn = ops.sample_tokens(self._rows, temperature=self.temperature, seed=seed, backend=self._how.backend)
        return _checked(drawn)[:, None]

    def gather(self, dim: Any, index: torch.Tensor) -> torch.Tensor:
        if self.kind != P or self.ndim != 2 or not self._is_last(dim) or index.shape != (self.shape[0], 1):
            return self.formed().gather(dim, index)
        tau, backend = self.temperature, self._how.backend
        p = ops.unmask_confidence(self._rows, index[:, 0], alg="maskgit_plus", temperature=tau, backend=backend)
        return p[:, None]

    def __eq__(self, other: object) -> Any:
        # Asked of itself, as torch.distributions does, it tells where there is a NaN: one answer a row.
        if other is self:
            return ~self._statistics()[1].isnan().view(*self.shape[:-1], 1)
        return self.formed() == _formed(other)

    __hash__ = object.__hash__


def _formed(value: Any) -> Any:
    return value.formed() if isinstance(value, Deferred) else value


def _checked(tokens: torch.Tensor) -> torch.Tensor:
    """The tokens; an error, on a GPU as late as torch.multinomial's own, where a row had none."""
    torch._assert_async((tokens >= 0).all(), "logits hold a NaN or +inf, or a row without a finite entry")
    return tokens


def _where(condition: torch.Tensor, one: Any, other: Any) -> Any:
    if isinstance(other, Deferred) and other.kind == LOGITS and isinstance(one, torch.Tensor):
        mixed = torch.where(condition, one, other.formed())
        return Deferred(mixed, other._how) if mixed.dtype == torch.float32 else mixed
    return NotImplemented


def _method(name: str) -> Callable[..., Any]:
    def rule(*args: Any, **kwargs: Any) -> Any:
        if not args or not isinstance(args[0], Deferred):
            return NotImplemented
        kwargs.pop("_stacklevel", None)  # of torch.nn.functional.softmax
        return getattr(args[0], name)(*args[1:], **kwargs)

    return rule


_RULES: dict[Any, Callable[..., Any]] = {
    torch.where: _where,
    torch.nn.functional.softmax: _method("softmax"),
    **{getattr(torch, n): _method(n) for n in ("softmax", "argmax", "multinomial", "gather", "clamp", "logsumexp")},
}


def _plain(name: str) -> Callable[..., Any]:
    return lambda self, *args: getattr(self.formed(), name)(*map(_formed, args))


# Python asks the class alone for these.
for _name in ("add", "radd", "rsub", "rmul", "neg", "lt", "le", "gt", "ge", "ne", "getitem"):
    setattr(Deferred, f"__{_name}__", _plain(f"__{_name}__"))
