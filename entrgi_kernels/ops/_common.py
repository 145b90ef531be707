"""What every operator file shares: checks of arguments, and their canonical form for the backends."""

from __future__ import annotations

import numbers
from collections.abc import Callable
from typing import Any

import torch

from .. import backends
from ..backends.eager import accumulation_dtype as accumulation_dtype  # that of statistics and of sums
from ._operator import Operator

_FLOATS = (torch.float64, torch.float32, torch.bfloat16, torch.float16)

# Temperatures and Adam's numbers are served in this range: all that is formed of them, 1 / temperature and squares of
# gradients among it, then stays within float32.
_LEAST, _MOST = 1e-12, 1e12

ALGS = ("entropy", "maskgit_plus", "topk_margin", "anchor")


def check_logits(logits: torch.Tensor, name: str = "logits") -> None:
    """Raise unless `logits` is a floating [N, V] tensor with V >= 1."""
    check_matrix(logits, name, "[N, V] with V >= 1")


def check_matrix(tensor: torch.Tensor, name: str, expected: str) -> None:
    """Raise unless `tensor` is a floating matrix with at least one column; `expected` words its shape."""
    if not isinstance(tensor, torch.Tensor):
        raise TypeError(f"{name} is {type(tensor).__name__}: expected a torch.Tensor of shape {expected}")
    if tensor.dim() != 2 or tensor.shape[1] == 0:
        raise ValueError(f"{name} has shape {list(tensor.shape)}: expected {expected}")
    check_dtype(tensor, name)


def check_dtype(tensor: torch.Tensor, name: str) -> None:
    """Raise unless the tensor has one of the floating dtypes that are served."""
    if tensor.dtype not in _FLOATS:
        raise TypeError(f"{name} is {tensor.dtype}: expected one of {', '.join(map(str, _FLOATS))}")


def check_table(logits: torch.Tensor, table: torch.Tensor) -> None:
    """Raise unless `table` is floating, [V, D] and on the logits' device."""
    check_matrix(table, "table", "[V, D] with D >= 1")
    if table.shape[0] != logits.shape[1]:
        raise ValueError(
            f"table has {table.shape[0]} rows but logits have {logits.shape[1]} columns: expected one row per "
            "vocabulary entry (map a reward model's table through the vocabulary first)"
        )
    check_same_device(logits, table=table)


def check_same_device(logits: torch.Tensor, called: str = "logits", /, **others: torch.Tensor | None) -> None:
    """Raise unless all the named tensors are where the logits are (or whatever the first tensor is called)."""
    for name, tensor in others.items():
        if tensor is not None and tensor.device != logits.device:
            verb = "are" if called == "logits" else "is"
            raise ValueError(
                f"{name} is on {tensor.device} but {called} {verb} on {logits.device}: expected one device"
            )


def check_apart(out: torch.Tensor, called: str, /, **others: torch.Tensor) -> None:
    """Raise if what is written overlaps, from first to last byte, a tensor that is read. For tensors with storage."""
    first, last = _bytes(out)
    for name, tensor in others.items():
        begin, end = _bytes(tensor)
        if first < end and begin < last:
            raise ValueError(f"{called} shares memory with {name}, which is read while it is written: expected its own")


def _bytes(tensor: torch.Tensor) -> tuple[int, int]:
    """Addresses of a tensor's first byte and of the one behind its last."""
    if tensor.numel() == 0:
        return 0, 0
    entries = 1 + sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
    return tensor.data_ptr(), tensor.data_ptr() + entries * tensor.element_size()


def check_vector(
    logits: torch.Tensor,
    tensor: torch.Tensor,
    name: str,
    dtype: torch.dtype | None = None,
    called: str = "logits",
) -> None:
    """Raise unless `tensor` has one entry a row of the logits (or of whatever the first tensor is called)."""
    if not isinstance(tensor, torch.Tensor):
        raise TypeError(f"{name} is {type(tensor).__name__}: expected a torch.Tensor of shape [{logits.shape[0]}]")
    if tensor.dim() != 1 or tensor.shape[0] != logits.shape[0]:
        raise ValueError(f"{name} has shape {list(tensor.shape)}: expected [{logits.shape[0]}], one entry a row")
    if dtype is not None and tensor.dtype != dtype:
        raise TypeError(f"{name} is {tensor.dtype}: expected {dtype}")
    check_same_device(logits, called, **{name: tensor})


def check_number(value: float, name: str, expected: str) -> float:
    """The value as a float; raise TypeError unless it is a real number (a tensor would cost a wait for the device)."""
    if type(value) is float:
        return value
    if isinstance(value, bool) or not isinstance(value, numbers.Real):
        raise TypeError(f"{name}={value!r} is {type(value).__name__}: expected {expected}")
    return float(value)


def check_temperature(temperature: float, name: str = "temperature", zero: str = "draws the argmax") -> float:
    """The temperature as a float; raise ValueError unless it is 0 or in the range that is served."""
    expected = f"a finite number >= 0: 0 ({zero}), or from {_LEAST:g} to {_MOST:g}"
    temperature = check_number(temperature, name, expected)
    # Comparisons alone: unlike math.isfinite they trace when torch.compile has made the number symbolic.
    if temperature != 0 and not _LEAST <= temperature <= _MOST:
        raise ValueError(f"{name}={temperature}: expected {expected}")
    return temperature


def distribution_temperature(temperature: float) -> float:
    """The temperature of a distribution: itself, or 1 at temperature 0, as Dream's own code has it."""
    return check_temperature(temperature) or 1.0


def check_rate(lr: float, name: str = "lr") -> float:
    """The learning rate as a float; raise ValueError where Adam cannot take it."""
    expected = f"a finite number >= 0, at most {_MOST:g}"
    lr = check_number(lr, name, expected)
    if not 0 <= lr <= _MOST:
        raise ValueError(f"{name}={lr}: expected {expected}")
    return lr


def check_eps(eps: float) -> float:
    """Adam's eps as a float; raise ValueError where Adam cannot take it.

    A gradient's square vanishes in float32 long before the gradient does: what is left then divides it by eps alone.
    At 0 an entry without gradient, as those of -inf are, would even become 0 / 0.
    """
    expected = f"a finite number > 0, from {_LEAST:g} to {_MOST:g}"
    eps = check_number(eps, "eps", expected)
    if not _LEAST <= eps <= _MOST:
        raise ValueError(f"eps={eps}: expected {expected}")
    return eps


def check_filters(top_k: int | None, top_p: float | None) -> tuple[int, float]:
    """(top_k, top_p) in the backends' form, where 0 and 1.0 mean no filter."""
    if top_k is not None:
        if not _is_integer(top_k):
            raise TypeError(f"top_k={top_k!r} is {type(top_k).__name__}: expected None or an integer >= 1")
        if top_k < 1:
            raise ValueError(f"top_k={top_k}: expected None or an integer >= 1")
    if top_p is not None:
        top_p = check_number(top_p, "top_p", "None or a number in (0, 1]")
        if not 0 < top_p <= 1:
            raise ValueError(f"top_p={top_p}: expected None or a number in (0, 1]")
    return 0 if top_k is None else int(top_k), 1.0 if top_p is None else top_p


def make_rng(logits: torch.Tensor, seed: int | torch.Tensor, counter: int | torch.Tensor) -> torch.Tensor:
    """int64 [2] = (seed, counter) on the logits' device, without waiting for the device.

    `seed` may already be such a tensor (then `counter` must be 0 and is ignored): a CUDA graph replays with new numbers
    when the tensor's content is changed between replays.
    """
    if isinstance(seed, torch.Tensor) and seed.dim() == 1:
        if seed.shape[0] != 2 or seed.dtype != torch.int64:
            raise ValueError(f"seed is a {seed.dtype} tensor of shape {list(seed.shape)}: expected int64 [2]")
        check_same_device(logits, seed=seed)
        if isinstance(counter, torch.Tensor) or counter != 0:
            raise ValueError(
                f"counter={counter}: expected 0 where seed is a tensor of (seed, counter), which holds the counter"
            )
        return seed
    seed = _scalar(seed, "seed", -(1 << 63), 1 << 63)
    counter = _scalar(counter, "counter", 0, 1 << 32)
    # Filled, not copied from the host: a copy to a GPU would wait for it.
    rng = torch.full((2,), 0 if isinstance(seed, torch.Tensor) else seed, dtype=torch.int64, device=logits.device)
    if isinstance(seed, torch.Tensor):
        rng[:1].copy_(seed)
    if isinstance(counter, torch.Tensor):
        rng[1:].copy_(counter)
    else:
        rng[1:].fill_(counter)
    return rng


def _scalar(value: int | torch.Tensor, name: str, low: int, high: int) -> int | torch.Tensor:
    """The value, an int in [low, high) or an int64 scalar tensor; raises for anything else."""
    if isinstance(value, torch.Tensor):
        if value.dim() != 0 or value.dtype != torch.int64:
            raise ValueError(f"{name} is a {value.dtype} tensor of shape {list(value.shape)}: expected an int64 scalar")
        return value
    if not _is_integer(value):
        raise TypeError(f"{name}={value!r} is {type(value).__name__}: expected an int or an int64 tensor")
    if not low <= value < high:
        raise ValueError(f"{name}={value}: expected an integer from {low} to {high - 1}")
    return int(value)


def _is_integer(value: object) -> bool:
    """Whether it is an integer, numpy's included, and no bool."""
    return type(value) is int or (isinstance(value, numbers.Integral) and not isinstance(value, bool))


def make_keys(logits: torch.Tensor, keys: torch.Tensor | None) -> torch.Tensor:
    """What the rows' draws are keyed by, int64 [N]; 0 .. N-1 where none are given."""
    if keys is None:
        return torch.arange(logits.shape[0], dtype=torch.int64, device=logits.device)
    check_vector(logits, keys, "keys", torch.int64)
    return keys


def detached(tensor: torch.Tensor) -> torch.Tensor:
    """The tensor, outside of autograd."""
    return tensor.detach() if tensor.requires_grad else tensor


def refuse_double_backward(operator: str, *backward_operators: Operator) -> None:
    """Make the gradient of a gradient of `operator` a plain error; without this torch asks the user for a formula."""

    def refuse(ctx, *_):
        raise RuntimeError(
            f"entrgi_kernels.ops.{operator} is differentiable once: its gradient has no gradient. For second "
            "derivatives write it with torch.softmax."
        )

    for backward_operator in backward_operators:
        backward_operator.register_autograd(refuse)


def check_backend(backend: str) -> str:
    """Return `backend`; raise ValueError unless it is "auto" or a backend's name."""
    return backends.check_name(backend)


def run(op: str, backend: str, tensor: torch.Tensor) -> Callable[..., Any]:
    """The raw function `op` of the backend that serves `tensor`; see :func:`entrgi_kernels.backends.resolve`."""
    return getattr(backends.resolve(backend, tensor, op), op)
