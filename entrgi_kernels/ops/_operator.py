"""An operator's registration with torch, and the way round it where nobody needs what registration gives."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, cast

import torch
from torch.autograd import graph

_NAMESPACE = "entrgi"
# What a kernel may be handed as it is. All else is the dispatcher's business: fake tensors, other subclasses, symbols.
_TENSORS = frozenset({torch.Tensor, torch.nn.Parameter})
_VALUES = frozenset({bool, float, int, str, type(None)})


def watched() -> bool:
    """Whether somebody traces, transforms or watches calls, so that nothing may be read from a tensor."""
    return bool(
        # The order matters: while it compiles, torch.compile sees a constant and reads no further.
        torch.compiler.is_compiling()
        or torch._C._len_torch_dispatch_stack()
        or torch._C._are_functorch_transforms_active()
    )


def is_subclass(tensor: torch.Tensor) -> bool:
    """Whether there may be nothing in the tensor that a kernel could read, as in a fake one."""
    return type(tensor) not in _TENSORS


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
        numbers: float arguments that a call may give as 0-d tensors, and the check that makes a float of what such a
            one held. They are served by a second registered operator, ``<name>_of_tensors``, which takes them behind
            the others and reads them when it runs: a graph holds for every value.
    """

    def __init__(
        self,
        kernel: Callable[..., Any],
        mutates: tuple[str, ...] = (),
        numbers: Mapping[str, Callable[[Any], Any]] | None = None,
    ) -> None:
        name = kernel.__name__.removeprefix("_")
        self._kernel, self._function = kernel, cast(Any, None)
        self._definition = torch.library.custom_op(f"{_NAMESPACE}::{name}", kernel, mutates_args=mutates)
        self._registered = getattr(getattr(torch.ops, _NAMESPACE), name).default
        arguments = [argument.name for argument in self._registered._schema.arguments]
        self._mutated = tuple(arguments.index(argument) for argument in mutates)
        self._numbers = tuple((arguments.index(argument), check) for argument, check in (numbers or {}).items())
        self._of_tensors: Any = None
        if numbers:
            inputs, outputs = torch.library.infer_schema(kernel, mutates_args=mutates).rsplit(") -> ", 1)
            schema = "".join((inputs, *(f", Tensor? {number}_tensor" for number in numbers), ") -> ", outputs))
            self._definition_of_tensors = torch.library.custom_op(
                f"{_NAMESPACE}::{name}_of_tensors", self._read, mutates_args=mutates, schema=schema
            )
            self._of_tensors = getattr(getattr(torch.ops, _NAMESPACE), f"{name}_of_tensors").default

    def _placed(self, args: Sequence[Any]) -> list[Any]:
        """The kernel's arguments, from those of ``_of_tensors``: each tensor in its number's place."""
        count = len(args) - len(self._numbers)
        placed = list(args[:count])
        for (place, _), number in zip(self._numbers, args[count:], strict=True):
            if number is not None:
                placed[place] = number
        return placed

    def _read(self, *args: Any) -> Any:
        """The kernel of ``_of_tensors``."""
        placed = self._placed(args)
        for place, check in self._numbers:
            if isinstance(placed[place], torch.Tensor):
                placed[place] = check(placed[place].item())
        return self._kernel(*placed)

    def _refuse_negated(self, args: Sequence[Any]) -> None:
        """Raise: kernels read memory, which here holds minus the values. (The dispatcher makes a copy instead.)"""
        for argument, arg in zip(self._registered._schema.arguments, args, strict=True):
            if isinstance(arg, torch.Tensor) and arg.is_neg():
                raise ValueError(
                    f"{argument.name} is a negated view: expected a tensor that holds its values (.resolve_neg() makes "
                    "one)"
                )

    def _dispatch(self, args: Sequence[Any]) -> Any:
        """Call what is registered."""
        if torch.compiler.is_compiling():
            # A float that changed is a symbol by now. Inductor may take one value's code for another's (torch 2.13).
            guard = torch.fx.experimental.symbolic_shapes.guard_scalar
            args = [guard(arg) if type(arg) is float else arg for arg in args]
        tensors = [args[place] if isinstance(args[place], torch.Tensor) else None for place, _ in self._numbers]
        if all(tensor is None for tensor in tensors):
            return self._registered(*args)
        args = list(args)
        for (place, _), tensor in zip(self._numbers, tensors, strict=True):
            if tensor is not None:
                args[place] = 1.0  # not looked at
        return self._of_tensors(*args, *tensors)

    def register_fake(self, fake: Callable[..., Any]) -> None:
        """Register what gives the outputs' shapes, as torch.library's own method of this name does."""
        self._definition.register_fake(fake)
        if self._numbers:
            self._definition_of_tensors.register_fake(lambda *args: fake(*self._placed(args)))

    def register_autograd(
        self, backward: Callable[..., Any], setup_context: Callable[..., None] = lambda ctx, inputs, output: None
    ) -> None:
        """Register a formula, as torch.library's own method of this name does."""
        self._definition.register_autograd(backward, setup_context=setup_context)
        if self._numbers:

            def setup_of_tensors(ctx, inputs, output):
                # Copies: the backward takes the values of the forward, whatever is done to the tensors in between.
                number = len(inputs) - len(self._numbers)
                copies = (None if tensor is None else tensor.clone() for tensor in inputs[number:])
                setup_context(ctx, self._placed((*inputs[:number], *copies)), output)

            def backward_of_tensors(ctx, *grads):
                return *backward(ctx, *grads), *(None for _ in self._numbers)

            self._definition_of_tensors.register_autograd(backward_of_tensors, setup_context=setup_of_tensors)

        def forward(ctx, *args):
            output = self._kernel(*args)
            setup_context(ctx, args, output)
            return output

        methods = {"forward": staticmethod(forward), "backward": staticmethod(backward)}
        self._function = type(f"{self._kernel.__name__}_function", (torch.autograd.Function,), methods)

    def __call__(self, *args: Any) -> Any:
        """The operator's result; the first argument is a tensor."""
        if watched() or args[0].is_meta:
            return self._dispatch(args)
        learns = False
        for arg in args:
            kind = type(arg)
            if kind in _TENSORS:
                learns = learns or arg.requires_grad
                if arg.is_neg():
                    self._refuse_negated(args)
            elif kind not in _VALUES:
                return self._dispatch(args)
        for place, _ in self._numbers:
            if type(args[place]) is not float:  # a backward whose forward was watched
                return self._dispatch(args)
        if learns and torch.is_grad_enabled():
            return self._registered(*args) if self._function is None else self._function.apply(*args)
        if self._mutated:
            # As the dispatcher does: a graph that saved one of them notices.
            graph.increment_version([args[place] for place in self._mutated if args[place] is not None])
        return self._kernel(*args)


def operator(
    mutates: tuple[str, ...] = (), numbers: Mapping[str, Callable[[Any], Any]] | None = None
) -> Callable[[Callable[..., Any]], Operator]:
    """The decorator that makes an :class:`Operator` of a kernel."""
    return lambda kernel: Operator(kernel, mutates, numbers)


def refuse_double_backward(operator: str, *backward_operators: Operator) -> None:
    """Make the gradient of a gradient of `operator` a plain error; without this torch asks the user for a formula."""

    def refuse(ctx, *_):
        raise RuntimeError(
            f"entrgi_kernels.ops.{operator} is differentiable once: its gradient has no gradient. For second "
            "derivatives write it with torch.softmax."
        )

    for backward_operator in backward_operators:
        backward_operator.register_autograd(refuse)
