"""The one place where kernels are launched, and what tensors must look like before they are."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, TypeAlias

import torch
import triton
import triton.language as tl
from triton.tools.tensor_descriptor import TensorDescriptor

# What a kernel says of each of its pointers, as an annotation. The machine code for a Matrix knows whether it starts on
# 16 bytes, which decides how wide loads are. A Vector is over rows, or the random state: many are views into a buffer,
# at a place that depends on N, which must not decide what is compiled. A program reads few of their entries, so nothing
# is lost by not knowing. (Triton lets a kernel name no globals but constants of its own.)
if TYPE_CHECKING:
    Matrix: TypeAlias = Any
    Vector: TypeAlias = Any
else:
    Matrix, Vector = tl.constexpr("matrix"), tl.constexpr("vector")

# The ahead-of-time gate puts a function here that records a launch instead of making it: what is compiled for other
# machines is then exactly what the raw functions would launch, argument for argument.
recorder: Callable[..., None] | None = None


def kernel(*counts: str) -> Callable[[Callable[..., None]], Any]:
    """triton.jit for a kernel whose arguments `counts` follow from the number of rows.

    That number changes from step to step, so Triton is told to specialise for none of them (it would tell 1 and
    multiples of 16 apart): a new N compiles nothing. Strides and V stay specialised: the width of loads hangs on them.

    Raises:
        TypeError: a parameter whose name ends in `_ptr` is marked neither Matrix nor Vector.
    """

    def made(function: Callable[..., None]) -> Any:
        marks, names = function.__annotations__, inspect.signature(function).parameters
        bare = [name for name in names if name.endswith("_ptr") and marks.get(name) not in ("Vector", "Matrix")]
        if bare:
            raise TypeError(f"{function.__name__}: {', '.join(bare)} not marked: expected Vector or Matrix")
        vectors = [name for name in names if marks.get(name) == "Vector"]
        return triton.jit(function, do_not_specialize=counts, do_not_specialize_on_alignment=vectors)

    return made


# What Triton compiled for a launch, by :func:`key`, and the constants that follow the arguments in the kernel's order.
compiled_kinds: dict[tuple[Any, ...], tuple[Any, tuple[Any, ...]]] = {}


def launch(function: Any, grid: tuple[int, ...], *args: Any, num_warps: int, num_stages: int = 2, **meta: Any) -> None:
    """Launch `function` over `grid` (nothing when the grid is empty) on the device of the first tensor argument.

    Triton's own dispatch looks at every argument, prints its options and compares all globals at every launch: on a
    slow core 90 microseconds, several kernels' time where rows are few. A launch of a kind that was made before goes to
    the compiled kernel directly.
    """
    if min(grid) == 0:
        return
    # Fused multiply-adds, said aloud: what Triton does unasked changes between its releases.
    options = {"num_warps": num_warps, "num_stages": num_stages, "enable_fp_fusion": True}
    if recorder is not None:
        recorder(function, args, options | meta)
        return
    first = args[0].base if isinstance(args[0], TensorDescriptor) else args[0]
    device = first.device
    if device.type != "cuda":
        function[grid](*args, **options, **meta)
    elif device.index == torch.cuda.current_device():
        launch_on(function, grid, args, options, meta, device.index)
    else:
        with torch.cuda.device(device):
            launch_on(function, grid, args, options, meta, device.index)


def launch_on(
    function: Any,
    grid: tuple[int, ...],
    args: Sequence[Any],
    options: dict[str, Any],
    meta: dict[str, Any],
    device: int,
) -> None:
    """Launch on the GPU of this number: through Triton the first time of a kind, then directly."""
    kind = (device, *key(function, args, options, meta))
    found = compiled_kinds.get(kind)
    if found is None:
        compiled = function[grid](*args, **options, **meta)
        if compiled is not None:  # a hook of Triton's may have kept it from compiling
            compiled_kinds[kind] = compiled, tuple(meta[name] for name in function.arg_names[len(args) :])
    else:
        compiled, constants = found
        compiled[(*grid, 1, 1)[:3]](*args, *constants)


def key(function: Any, args: Sequence[Any], options: dict[str, Any], meta: dict[str, Any]) -> tuple[Any, ...]:
    """All that Triton looks at when it chooses or compiles machine code for a launch; coarser where it may be."""
    looks = _looks.get(function.fn)
    if looks is None:
        counts, vectors = set(function.do_not_specialize), set(function.do_not_specialize_on_alignment)
        looks = _looks[function.fn] = [
            _of_count if name in counts else _of_vector if name in vectors else _of_argument
            for name in function.arg_names[: len(args)]
        ]
    kinds = [look(arg) for look, arg in zip(looks, args, strict=True)]
    return function.fn, *options.values(), *meta.values(), *kinds


_looks: dict[Any, list[Callable[[Any], Any]]] = {}


def _of_count(x: int) -> Any:
    return -0x80000000 <= x < 0x80000000


def _of_vector(x: torch.Tensor) -> Any:
    return x.dtype


def _of_argument(x: Any) -> Any:
    kind = type(x)
    if kind is int:
        return x == 1, x % 16 == 0, -0x80000000 <= x < 0x80000000
    if kind is float:
        return kind
    if kind is TensorDescriptor:
        return x.base.dtype, *x.block_shape, getattr(x, "padding", None)
    return x.dtype, x.data_ptr() % 16 == 0


def rows_of(tensor: torch.Tensor) -> torch.Tensor:
    """`tensor` [N, X] itself when its rows are dense (any row stride), else a dense copy."""
    return tensor if tensor.stride(1) == 1 or tensor.shape[1] == 1 else tensor.contiguous()


def vector(tensor: torch.Tensor) -> torch.Tensor:
    """`tensor` [N] with stride 1."""
    return tensor.contiguous()


def cdiv(a: int, b: int) -> int:
    """a / b rounded up."""
    return -(-a // b)


def bulk(*tensors: torch.Tensor) -> bool:
    """Whether tiles of every [N, X] tensor can be copied in bulk: base and rows on 16 bytes, rows apart."""
    return all(
        tensor.numel() > 0
        and tensor.stride(0) >= tensor.shape[1]
        and tensor.stride(0) * tensor.element_size() % 16 == 0
        and tensor.data_ptr() % 16 == 0
        for tensor in tensors
    )


def tiles(tensor: torch.Tensor, rows: int, columns: int) -> TensorDescriptor:
    """A descriptor by which a kernel reads [rows, columns] of a tensor that :func:`bulk` lets pass; zeros outside it.

    It is made on the host at every launch (some 10 microseconds on a slow core) and goes to the kernel by value, so
    that a captured graph holds it. Its sizes are ordinary arguments of what is compiled.
    """
    return TensorDescriptor(tensor, list(tensor.shape), [tensor.stride(0), 1], [rows, columns])


def aligned(*tensors: torch.Tensor) -> bool:
    """Whether every row starts on a multiple of 16 entries and 16 bytes: what Triton asks for wide, pipelined loads."""
    return all(tensor.stride(0) % 16 == 0 and tensor.data_ptr() % 16 == 0 for tensor in tensors)
