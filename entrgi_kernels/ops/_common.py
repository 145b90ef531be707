"""What every operator file shares: checks of arguments, and their canonical form for the backends."""

from __future__ import annotations

import math
import numbers
from collections.abc import Callable, Sequence
from typing import Any

import torch

from .. import backends
from ..backends.eager import accumulation_dtype as accumulation_dtype  # that of statistics and of sums
from ._operator import is_subclass, watched

FLOATS = (torch.float64, torch.float32, torch.bfloat16, torch.float16)

Number = float | torch.Tensor  # a number, or the 0-d tensor that holds it

# Temperatures and Adam's numbers are served in this range: all that is formed of them, 1 / temperature and squares of
# gradients among it, then stays within float32.
_LEAST, _MOST = 1e-12, 1e12
# Worded here: where torch.compile takes every number for a symbol it puts none into a text.
_AT_MOST, _SERVED = f"at most {_MOST:g}", f"from {_LEAST:g} to {_MOST:g}"


def check_logits(logits: torch.Tensor, name: str = "logits") -> None:
    """Raise unless `logits` is a floating [N, V] tensor with V >= 1."""
    check_matrix(logits, name, "[N, V] with V >= 1")


def check_matrix(tensor: torch.Tensor, name: str, expected: str) -> None:
    """Raise unless `tensor` is a floating matrix with at least one column; `expected` words its shape."""
    if not isinstance(tensor, torch.Tensor):
        raise TypeError(f"{name} is {type(tensor).__name__}: expected a torch.Tensor of shape {expected}")
    if tensor.layout is not torch.strided or tensor.is_nested:
        refuse_kind(tensor, name)
    if tensor.dim() != 2 or tensor.shape[1] == 0:
        raise ValueError(f"{name} has shape {list(tensor.shape)}: expected {expected}")
    check_dtype(tensor, name)


def refuse_kind(tensor: torch.Tensor, name: str) -> None:
    """Raise: the tensor's entries do not lie in memory by strides."""
    kind = "nested" if tensor.is_nested else str(tensor.layout)
    raise TypeError(f"{name} is a {kind} tensor: expected a dense one, of layout torch.strided")


def check_dtype(tensor: torch.Tensor, name: str) -> None:
    """Raise unless the tensor has one of the floating dtypes that are served."""
    if tensor.dtype not in FLOATS:
        raise TypeError(f"{name} is {tensor.dtype}: expected one of {', '.join(map(str, FLOATS))}")


def check_table(logits: torch.Tensor, table: torch.Tensor, called: str = "logits") -> None:
    """Raise unless `table` is floating, [V, D] and on the logits' device."""
    check_matrix(table, "table", "[V, D] with D >= 1")
    if table.shape[0] != logits.shape[1]:
        raise ValueError(
            f"table has {table.shape[0]} rows but {called} {_verb(called)[1]} {logits.shape[1]} columns: expected one "
            "row per vocabulary entry (map a reward model's table through the vocabulary first)"
        )
    check_same_device(logits, called, table=table)


def check_same_device(logits: torch.Tensor, called: str = "logits", /, **others: torch.Tensor | None) -> None:
    """Raise unless all the named tensors are where the logits are (or whatever the first tensor is called)."""
    for name, tensor in others.items():
        if tensor is not None and tensor.device != logits.device:
            raise ValueError(
                f"{name} is on {tensor.device} but {called} {_verb(called)[0]} on {logits.device}: expected one device"
            )


def _verb(called: str) -> tuple[str, str]:
    """To be and to have, of what a tensor is called."""
    return ("are", "have") if called == "logits" else ("is", "has")


def check_apart(names: Sequence[str], written: Sequence[torch.Tensor | None], *read: torch.Tensor | None) -> None:
    """Raise if an entry of a tensor that is written is one of another tensor too, or of itself at another place.

    For tensors with storage. `names` are those of the tensors, those of the written ones first.
    """
    count, spans, ends = len(written), [], []
    for name, tensor in zip(names, written, strict=False):
        if tensor is not None and tensor.is_inference() and not torch.is_inference_mode_enabled():
            raise ValueError(f"{name} is an inference tensor: expected a clone, or a call under torch.inference_mode()")
    # The usual call, fast: dense tensors, one behind the other.
    for tensor in (*written, *read):
        if tensor is not None:
            if not tensor.is_contiguous():
                break
            first = tensor.data_ptr()
            ends.append((first, first + tensor.nbytes))
    else:
        ends.sort()
        reached = 0
        for first, last in ends:
            if first < reached:
                break
            reached = last
        else:
            return
    for tensor in (*written, *read):
        if tensor is None:
            spans.append((0, 0))
            continue
        first = tensor.data_ptr()
        if tensor.is_contiguous():
            spans.append((first, first + tensor.nbytes))
            continue
        if len(spans) < count:
            _check_own(tensor, names[len(spans)])
        reach = sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
        spans.append((first, first + (reach + 1) * tensor.element_size() if tensor.numel() else first))
    for i in range(count):
        first, last = spans[i]
        for j in range(i + 1, len(spans)):
            begin, end = spans[j]
            if first < end and begin < last:
                tensors = (*written, *read)
                if not _interleaved(tensors[i], tensors[j]):
                    raise ValueError(
                        f"{names[i]} shares memory with {names[j]}, but is written while that is in use: expected its "
                        "own (a clone)"
                    )


def _interleaved(one: torch.Tensor | None, other: torch.Tensor | None) -> bool:
    """Whether two matrices are different columns of one: their rows alternate in memory."""
    if one is None or other is None or one.dim() != 2 or other.dim() != 2 or one.stride(1) != 1 or other.stride(1) != 1:
        return False
    pitch, widths = one.stride(0) * one.element_size(), [t.shape[1] * t.element_size() for t in (one, other)]
    if pitch == 0 or other.stride(0) * other.element_size() != pitch:
        return False
    offset = (other.data_ptr() - one.data_ptr()) % pitch
    return offset >= widths[0] and offset + widths[1] <= pitch


def _check_own(tensor: torch.Tensor, name: str) -> None:
    """Raise if two entries of a matrix are one place in memory."""
    (rows, columns), (stride, inner) = tensor.shape, tensor.stride()
    common = math.gcd(stride, inner) or 1
    # Entries meet that are so many rows and columns apart; 0 and 0 where both strides are 0.
    down, across = inner // common, stride // common
    if (down < rows and across < columns and (down or across)) or (stride == inner == 0 and tensor.numel() > 1):
        raise ValueError(
            f"{name} of shape {list(tensor.shape)} has strides {list(tensor.stride())}: expected a tensor that owns "
            "each of its entries (clone an expanded one)"
        )


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
    if tensor.layout is not torch.strided or tensor.is_nested:
        refuse_kind(tensor, name)
    if tensor.dim() != 1 or tensor.shape[0] != logits.shape[0]:
        raise ValueError(f"{name} has shape {list(tensor.shape)}: expected [{logits.shape[0]}], one entry a row")
    if dtype is not None and tensor.dtype != dtype:
        raise TypeError(f"{name} is {tensor.dtype}: expected {dtype}")
    check_same_device(logits, called, **{name: tensor})


def check_number(value: float, name: str, expected: str) -> float:
    """The value as a float; raise TypeError unless it is a real number (a tensor would cost a wait for the device)."""
    if type(value) is float:
        return value
    if isinstance(value, bool) or not isinstance(value, (numbers.Real, torch.SymFloat)):
        raise TypeError(f"{name}={value!r} is {type(value).__name__}: expected {expected}")
    try:
        return float(value)
    except OverflowError:
        raise ValueError(f"{name}={value}: expected {expected}") from None


def check_scalar(value: Number, name: str, expected: str) -> Number:
    """As :func:`check_number`, but a 0-d tensor on the CPU is read; it is returned as it is where calls are traced.

    What comes out as a tensor is read, and its value checked, when the operator runs.
    """
    if type(value) is float or not isinstance(value, torch.Tensor):
        return check_number(value, name, expected)
    if value.layout is not torch.strided:
        refuse_kind(value, name)
    if value.dim() != 0 or value.is_complex() or value.dtype == torch.bool:
        raise TypeError(
            f"{name} is a {value.dtype} tensor of shape {list(value.shape)}: expected {expected}; a tensor of it is 0-d"
        )
    if value.device.type != "cpu":
        raise ValueError(
            f"{name} is a tensor on {value.device}: expected {expected}, or a 0-d tensor on the CPU (reading one on "
            "another device would wait for it)"
        )
    if value.requires_grad and torch.is_grad_enabled():
        raise ValueError(f"{name}.requires_grad is True, but no gradient flows to it: expected {name}.detach()")
    return value if watched() or is_subclass(value) else float(value.item())


def check_temperature(temperature: Number, name: str = "temperature", zero: str = "draws the argmax") -> Number:
    """The temperature as a float (or a tensor yet to be read); raises unless it is 0 or in the range served."""
    if type(temperature) is float and _LEAST <= temperature <= _MOST:
        return temperature
    expected = f"a finite number >= 0: 0 ({zero}), or {_SERVED}"
    temperature = check_scalar(temperature, name, expected)
    # Comparisons alone: unlike math.isfinite they trace when torch.compile has made the number symbolic.
    if type(temperature) is float and temperature != 0 and not _LEAST <= temperature <= _MOST:
        raise ValueError(f"{name}={temperature}: expected {expected}")
    return temperature


def distribution_temperature(temperature: Number) -> Number:
    """The temperature of a distribution: itself, or 1 at temperature 0, as Dream's own code has it."""
    return positive(check_temperature(temperature))


def check_rate(lr: Number, name: str = "lr") -> Number:
    """The learning rate as a float (or a tensor yet to be read); raise ValueError where Adam cannot take it."""
    if type(lr) is float and 0 <= lr <= _MOST:
        return lr
    expected = f"a finite number >= 0, {_AT_MOST}"
    lr = check_scalar(lr, name, expected)
    if type(lr) is float and not 0 <= lr <= _MOST:
        raise ValueError(f"{name}={lr}: expected {expected}")
    return lr


def check_scale(scale: Number, name: str = "scale") -> Number:
    """A factor of a gradient as a float (or a tensor yet to be read); raise ValueError outside of the range served."""
    if type(scale) is float and -_MOST <= scale <= _MOST:
        return scale
    expected = f"a finite number, of {_AT_MOST} in size"
    scale = check_scalar(scale, name, expected)
    if type(scale) is float and not -_MOST <= scale <= _MOST:
        raise ValueError(f"{name}={scale}: expected {expected}")
    return scale


def check_eps(eps: float) -> float:
    """Adam's eps as a float; raise ValueError where Adam cannot take it.

    A gradient's square vanishes in float32 long before the gradient does: what is left then divides it by eps alone.
    At 0 an entry without gradient, as those of -inf are, would even become 0 / 0.
    """
    if type(eps) is float and _LEAST <= eps <= _MOST:
        return eps
    expected = f"a finite number > 0, {_SERVED}"
    eps = check_number(eps, "eps", expected)
    if not _LEAST <= eps <= _MOST:
        raise ValueError(f"eps={eps}: expected {expected}")
    return eps


def positive(temperature: Number) -> Number:
    """A checked temperature, with 1 for 0; a tensor yet to be read as it is."""
    return temperature or 1.0 if type(temperature) is float else temperature


def check_top_p(top_p: Number) -> Number:
    """The share as a float (or a tensor yet to be read); raise ValueError unless it is in (0, 1]."""
    expected = "None or a number in (0, 1]"
    top_p = check_scalar(top_p, "top_p", expected)
    if type(top_p) is float and not 0 < top_p <= 1:
        raise ValueError(f"top_p={top_p}: expected {expected}")
    return top_p


def check_filters(top_k: int | None, top_p: Number | None) -> tuple[int, Number]:
    """(top_k, top_p) in the backends' form, where 0 and 1.0 mean no filter."""
    if top_k is not None:
        if not is_integer(top_k):
            raise TypeError(f"top_k={top_k!r} is {type(top_k).__name__}: expected None or an integer >= 1")
        if not 1 <= top_k < 1 << 63:
            raise ValueError(f"top_k={top_k}: expected None or an integer >= 1 and < 2**63")
    return 0 if top_k is None else int(top_k), 1.0 if top_p is None else check_top_p(top_p)


def make_rng(logits: torch.Tensor, seed: int | torch.Tensor, counter: int | torch.Tensor) -> torch.Tensor:
    """int64 [2] = (seed, counter) on the logits' device, without waiting for the device.

    `seed` may already be such a tensor (then `counter` must be 0 and is ignored): a CUDA graph replays with new numbers
    when the tensor's content is changed between replays.
    """
    if not isinstance(logits, torch.Tensor):
        raise TypeError(f"logits is {type(logits).__name__}: expected a torch.Tensor")
    if isinstance(seed, torch.Tensor) and seed.dim() == 1:
        if seed.layout is not torch.strided:
            refuse_kind(seed, "seed")
        if seed.shape[0] != 2 or seed.dtype != torch.int64:
            raise ValueError(f"seed is a {seed.dtype} tensor of shape {list(seed.shape)}: expected int64 [2]")
        check_same_device(logits, seed=seed)
        if not is_integer(counter) or counter != 0:
            raise ValueError(
                f"counter={counter}: expected 0 where seed is a tensor of (seed, counter), which holds the counter"
            )
        return seed
    seed = _scalar(logits, seed, "seed", -(1 << 63), 1 << 63)
    counter = _scalar(logits, counter, "counter", 0, 1 << 32)
    # Filled, not copied from the host: a copy to a GPU would wait for it.
    rng = torch.full((2,), 0 if isinstance(seed, torch.Tensor) else seed, dtype=torch.int64, device=logits.device)
    if isinstance(seed, torch.Tensor):
        rng[:1].copy_(seed)
    if isinstance(counter, torch.Tensor):
        rng[1:].copy_(counter)
    else:
        rng[1:].fill_(counter)
    return rng


def _scalar(logits: torch.Tensor, value: int | torch.Tensor, name: str, low: int, high: int) -> int | torch.Tensor:
    """The value, an int in [low, high) or an int64 scalar tensor; raises for anything else."""
    if type(value) is not int and isinstance(value, torch.Tensor):
        if value.layout is not torch.strided:
            refuse_kind(value, name)
        if value.is_meta and not logits.is_meta:
            check_same_device(logits, **{name: value})
        if value.dim() != 0 or value.dtype != torch.int64:
            raise ValueError(f"{name} is a {value.dtype} tensor of shape {list(value.shape)}: expected an int64 scalar")
        return value
    if not is_integer(value):
        raise TypeError(f"{name}={value!r} is {type(value).__name__}: expected an int or an int64 tensor")
    if not low <= value < high:
        raise ValueError(f"{name}={value}: expected an integer from {low} to {high - 1}")
    return int(value)


def is_integer(value: object) -> bool:
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


def check_backend(backend: str) -> str:
    """Return `backend`; raise ValueError unless it is "auto" or a backend's name."""
    return backends.check_name(backend)


def run(op: str, backend: str, tensor: torch.Tensor) -> Callable[..., Any]:
    """The raw function `op` of the backend that serves `tensor`; see :func:`entrgi_kernels.backends.resolve`."""
    return getattr(backends.resolve(backend, tensor, op), op)
