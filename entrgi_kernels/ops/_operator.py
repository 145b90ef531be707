"""An operator's registration with torch, and the way round it where nobody needs what registration gives."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch.autograd import graph

_NAMESPACE = "entrgi"
# What a kernel may be handed as it is. All else is the dispatcher's business: fake tensors, other subclasses, symbols.
_TENSORS = frozenset({torch.Tensor, torch.nn.Parameter})
_VALUES = frozenset({bool, float, int, str, type(None)})


class Operator:
    """An operator of the namespace ``entrgi``, called like the kernel it is made of.

    The registered operator serves those who trace, transform or watch calls: torch.compile, fake tensors, dispatch
    modes, functorch. Everybody else gets the kernel itself, and where a gradient is asked for an autograd.Function of
    the formula that is registered: the Python layers of a custom operator cost more than the smaller kernels, and its
    first call imports torch._dynamo, which takes seconds.

    Args:
        kernel: takes positional arguments alone; its annotations give the schema, its name without leading underscores
            the operator's.
        mutates: names of the arguments that it changes in place.
    """

    def __init__(self, kernel: Callable[..., Any], mutates: tuple[str, ...] = ()) -> None:
        name = kernel.__name__.removeprefix("_")
        self._kernel, self._function = kernel, None
        self._definition = torch.library.custom_op(f"{_NAMESPACE}::{name}", kernel, mutates_args=mutates)
        self._registered = getattr(getattr(torch.ops, _NAMESPACE), name).default
        arguments = [argument.name for argument in self._registered._schema.arguments]
        self._mutated = tuple(arguments.index(argument) for argument in mutates)
        self.register_fake = self._definition.register_fake

    def register_autograd(
        self, backward: Callable[..., Any], setup_context: Callable[..., None] = lambda ctx, inputs, output: None
    ) -> None:
        """Register a formula, as torch.library's own method of this name does."""
        self._definition.register_autograd(backward, setup_context=setup_context)

        def forward(ctx, *args):
            output = self._kernel(*args)
            setup_context(ctx, args, output)
            return output

        methods = {"forward": staticmethod(forward), "backward": staticmethod(backward)}
        self._function = type(f"{self._kernel.__name__}_function", (torch.autograd.Function,), methods)

    def __call__(self, *args: Any) -> Any:
        """The operator's result; the first argument is a tensor."""
        # The order matters: while it compiles, torch.compile sees a constant and reads no further.
        if (
            torch.compiler.is_compiling()
            or torch._C._len_torch_dispatch_stack()
            or torch._C._are_functorch_transforms_active()
            or args[0].is_meta
        ):
            return self._registered(*args)
        learns = False
        for arg in args:
            kind = type(arg)
            if kind in _TENSORS:
                learns = learns or arg.requires_grad
            elif kind not in _VALUES:
                return self._registered(*args)
        if learns and torch.is_grad_enabled():
            return self._registered(*args) if self._function is None else self._function.apply(*args)
        if self._mutated:
            # As the dispatcher does: a graph that saved one of them notices.
            graph.increment_version([args[place] for place in self._mutated if args[place] is not None])
        return self._kernel(*args)


def operator(mutates: tuple[str, ...] = ()) -> Callable[[Callable[..., Any]], Operator]:
    """The decorator that makes an :class:`Operator` of a kernel."""
    return lambda kernel: Operator(kernel, mutates)
