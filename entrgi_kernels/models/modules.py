"""Small guards for other people's modules: what guidance changes on a model while it runs, it changes back."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from torch.overrides import TorchFunctionMode


@contextmanager
def evaluating(module: nn.Module) -> Iterator[None]:
    """Put a module and all its children into evaluation mode, and each back into its own mode afterwards.

    Dropout that stays alive while samples are drawn makes them irreproducible, so guidance never runs in training
    mode. Modes are restored one by one: a model may be partly in training mode on purpose.
    """
    training = [child for child in module.modules() if child.training]
    for child in training:
        child.training = False
    try:
        yield
    finally:
        for child in training:
            child.training = True


@contextmanager
def frozen(module: nn.Module) -> Iterator[None]:
    """Leave a module's parameters out of the graph built inside, without changing them for good.

    ``requires_grad`` is read when the graph is built, so it may be given back before ``backward`` runs.
    """
    trainable = [parameter for parameter in module.parameters() if parameter.requires_grad]
    for parameter in trainable:
        parameter.requires_grad_(False)
    try:
        yield
    finally:
        for parameter in trainable:
            parameter.requires_grad_(True)


@contextmanager
def plain_precision(device: torch.device) -> Iterator[None]:
    """Run in the model's own dtype: no autocast, and ordinary tensors even under ``torch.inference_mode()``.

    An inference tensor could neither be saved for backward nor be written in place by the guidance step later.
    Gradients stay on or off as they were: ``inference_mode(False)`` alone would switch them on.
    """
    grad = torch.is_grad_enabled()
    with (
        torch.inference_mode(False),
        torch.set_grad_enabled(grad),
        torch.autocast(device_type=device.type, enabled=False),
    ):
        yield


def accepted_arguments(module: nn.Module) -> set[str]:
    """Names of the keyword arguments of a module's forward; ``"**"`` is among them when it takes any."""
    parameters = inspect.signature(module.forward).parameters.values()
    names = {p.name for p in parameters if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)}
    if any(p.kind is p.VAR_KEYWORD for p in parameters):
        names.add("**")
    return names


def first_nonfinite_parameter(module: nn.Module) -> str | None:
    """Name of the first parameter that holds a NaN or an infinity, None when all are finite.

    One sum per parameter and one transfer per device: a NaN or an infinity anywhere makes the sum non-finite.
    Quantised and meta parameters are not looked at.
    """
    names: list[str] = []
    sums: list[torch.Tensor] = []
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            if parameter.is_meta or parameter.dtype not in (
                torch.float16,
                torch.bfloat16,
                torch.float32,
                torch.float64,
            ):
                continue
            # Doubles, because the sum of finite float32 values may overflow float32 (and float16 much sooner).
            wide = torch.float64 if parameter.device.type != "mps" else torch.float32
            names.append(name)
            sums.append(parameter.detach().sum(dtype=wide))
        if not sums:
            return None
        finite = torch.stack([s.to(sums[0].device) for s in sums]).isfinite().tolist()
    return next((name for name, ok in zip(names, finite, strict=True) if not ok), None)


class _Lookups(TorchFunctionMode):
    """Notes the ids and the rows of every embedding table that is read inside."""

    def __init__(self) -> None:
        self.seen: list[tuple[torch.Tensor, int]] = []

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is nn.functional.embedding and len(args) > 1:
            self.seen.append((args[0], args[1].shape[0]))
        return func(*args, **(kwargs or {}))


def learned_positions(run: Callable[[], Any], length: int) -> int | None:
    """How many positions a network has learned; None where it computes them.

    A table that is read at one row after the other, a row a place, is one of positions, whatever it is called.

    Args:
        run: runs the network on texts of ``length`` tokens, without padding and not of consecutive ids.
        length: at least 2.
    """
    with _Lookups() as lookups:
        run()
    limits = []
    for ids, rows in lookups.seen:
        if ids.dim() and ids.shape[-1] == length and ids.numel() and bool((ids.diff(dim=-1) == 1).all()):
            limits.append(rows - int(ids.min()))  # RoBERTa and its kin begin behind their padding token's row
    return min(limits, default=None)


def module_device(module: nn.Module) -> torch.device:
    """The device that a module takes its inputs on: its input embedding's, else its first parameter's."""
    embedding = input_embedding(module)
    weight = getattr(embedding, "weight", None)
    if isinstance(weight, torch.Tensor) and not weight.is_meta:
        return weight.device
    return next((p.device for p in module.parameters()), torch.device("cpu"))


def module_dtype(module: nn.Module) -> torch.dtype:
    """The floating dtype that a module computes in: its first floating parameter's (float32 when it has none)."""
    return next((p.dtype for p in module.parameters() if p.is_floating_point()), torch.float32)


def input_embedding(module: nn.Module) -> nn.Embedding | None:
    """The module's token embedding, or that of the network it is put around; None when none is exposed."""
    owners: list[Any] = [module, *module.children()]
    for owner in owners:
        try:
            found = owner.get_input_embeddings()
        except (AttributeError, NotImplementedError):
            continue
        if found is not None:
            return found
    return None


def output_head(module: Any) -> nn.Module | None:
    """The module's vocabulary projection, None when it exposes none."""
    try:
        head = module.get_output_embeddings()
    except (AttributeError, NotImplementedError):
        return None
    return head if isinstance(head, nn.Module) else None
