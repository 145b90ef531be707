"""A GPU that is not there: tensors that say they are on one, and a count of what the host would wait for.

Every operator runs on the CPU on the tensors inside, so that results are real; the code under test sees the device that
the tensors name. Counted is what makes a host wait on a real one: reading a number, copies to the host, copies to the
device from memory that is not pinned, and operators whose result's size depends on its content.
"""

from __future__ import annotations

import contextlib
import traceback
from collections import Counter
from unittest import mock

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map

DEVICE = torch.device("cuda", 0)
_READS = {"_local_scalar_dense", "equal", "is_nonzero", "item"}
_SIZED_BY_CONTENT = {"nonzero", "masked_select", "_unique2", "unique_dim", "unique_consecutive", "bincount"}


class DeviceTensor(torch.Tensor):
    """Claims to be on the simulated device; holds its content on the CPU."""

    @staticmethod
    def __new__(cls, inside: torch.Tensor) -> DeviceTensor:
        return torch.Tensor._make_wrapper_subclass(
            cls,
            inside.shape,
            strides=inside.stride(),
            storage_offset=inside.storage_offset(),
            dtype=inside.dtype,
            device="meta",  # a device that torch's C++ has in every build; Python code is told another
        )

    def __init__(self, inside: torch.Tensor) -> None:
        self.inside = inside

    @property
    def device(self) -> torch.device:
        return DEVICE

    is_meta, is_cuda = False, True

    def tolist(self):
        return self.cpu().tolist()

    def __repr__(self) -> str:
        return f"DeviceTensor({self.inside})"

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        raise RuntimeError(f"{func} outside of a SimulatedDevice")


def unwrap(value):
    return value.inside if isinstance(value, DeviceTensor) else value


def to_device(module: torch.nn.Module) -> torch.nn.Module:
    """The module with its parameters and buffers on the simulated device."""
    for part in module.modules():
        for name, parameter in part._parameters.items():
            if parameter is not None:
                part._parameters[name] = torch.nn.Parameter(DeviceTensor(parameter.data), requires_grad=False)
        for name, buffer in part._buffers.items():
            if buffer is not None:
                part._buffers[name] = DeviceTensor(buffer)
    return module


def _pinned(tensor: torch.Tensor) -> torch.Tensor:
    tensor.stays_for_copies = True
    return tensor


class SimulatedDevice(TorchDispatchMode):
    """Run operators on simulated tensors, and count waits while :meth:`counting` is active.

    Attributes:
        waits: how often the host waited, by what it did.
        places: the same, by the line of code.
    """

    def __init__(self) -> None:
        super().__init__()
        self.waits: Counter[str] = Counter()
        self.places: Counter[str] = Counter()
        self._counts = False

    def __enter__(self) -> SimulatedDevice:
        self._undo = contextlib.ExitStack()
        # As FakeTensorMode does: torch.tensor(..., device=) makes its tensor on the CPU and copies it where we see it.
        self._undo.callback(torch._C._set_only_lift_cpu_tensors, torch._C._only_lift_cpu_tensors())
        torch._C._set_only_lift_cpu_tensors(True)
        self._undo.enter_context(mock.patch.object(torch.cuda, "_lazy_init", lambda: None))
        self._undo.enter_context(mock.patch.object(torch.Tensor, "pin_memory", _pinned))
        return super().__enter__()

    def __exit__(self, *error) -> None:
        super().__exit__(*error)
        self._undo.close()

    @contextlib.contextmanager
    def counting(self):
        self.waits.clear()
        self.places.clear()
        self._counts = True
        try:
            yield self.waits
        finally:
            self._counts = False

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = dict(kwargs or {})
        there = [False]

        def inner(value):
            if isinstance(value, DeviceTensor):
                there[0] = True
                return value.inside
            return value

        plain_args, plain_kwargs = tree_map(inner, args), tree_map(inner, kwargs)
        target = kwargs.get("device")
        wanted = torch.device(target) if target is not None else None
        to_there = wanted is not None and wanted.type in (DEVICE.type, "meta")
        to_host = wanted is not None and wanted.type == "cpu"
        if wanted is not None:
            plain_kwargs["device"] = torch.device("cpu")
        if there[0] and to_there and func is torch.ops.aten._to_copy.default and not args[0].requires_grad:
            if kwargs.get("dtype") in (None, args[0].dtype):
                return args[0]  # it is there already: a real device copies nothing
        if there[0] or to_there:
            self._count(func, plain_args, there[0], to_there, to_host, kwargs)
        out = func(*plain_args, **plain_kwargs)
        on_device = (there[0] and not to_host) or to_there
        if not on_device:
            return out
        return self._wrapped(out, args, plain_args)

    def _count(self, func, args, there, to_there, to_host, kwargs) -> None:
        if not self._counts:
            return
        before = self.waits.total()
        name = func._schema.name.rpartition("::")[2]
        if name in _READS or name in _SIZED_BY_CONTENT:
            self.waits[name] += 1
        elif there and to_host:
            self.waits["copy to the host"] += 1
        elif not there and to_there and name == "_to_copy" and not hasattr(args[0], "stays_for_copies"):
            self.waits["copy from memory that is not pinned"] += 1
        elif name in ("index", "index_put", "index_put_", "_index_put_impl_"):
            if any(i is not None and i.dtype in (torch.bool, torch.uint8) for i in args[1]):
                self.waits["index by a mask"] += 1
        elif name == "repeat_interleave" and kwargs.get("output_size") is None:
            self.waits["repeat_interleave without its size"] += 1
        if self.waits.total() > before:
            ours = [f for f in traceback.extract_stack() if "/torch/" not in f.filename and f.filename != __file__]
            self.places[f"{ours[-1].filename}:{ours[-1].lineno} {ours[-1].line}"] += 1

    @staticmethod
    def _wrapped(out, args, plain_args):
        """Wrap results; what an operator returns of its own arguments stays that very argument."""
        known = {}

        def remember(outer, inner):
            if isinstance(outer, DeviceTensor):
                known[id(inner)] = outer

        for outer, inner in zip(args, plain_args, strict=True):
            if isinstance(outer, (list, tuple)):
                for one, other in zip(outer, inner, strict=True):
                    remember(one, other)
            else:
                remember(outer, inner)

        def wrap(value):
            if not isinstance(value, torch.Tensor) or isinstance(value, DeviceTensor):
                return value
            return known.get(id(value), None) if id(value) in known else DeviceTensor(value)

        return tree_map(wrap, out)
