"""DiffusionGemma without a reward: its own arithmetic over the vocabulary, on the fused operators.

A denoising step of DiffusionGemma makes probabilities of its logits three times and more: for the draw, for the
entropies that decide what is accepted and when a canvas is done, and for the expected embedding that the next step is
conditioned on. Each is a tensor of canvas x 262,144 entries, several of them alive at once. Here the loop stays the
model's (or the pipeline's) own, unedited; the logits it is handed are :class:`Deferred`, and the decoder is handed the
expected embedding.
"""

from __future__ import annotations

import functools
import inspect
import weakref
from typing import Any

import torch
from torch import nn
from transformers import LogitsProcessor, LogitsProcessorList

from .. import backends, ops
from .base import ATTRIBUTE, Handle, check_free
from .deferred import Arithmetic, Deferred
from .diffusers_pipelines import DiffusionGemmaPipelineIntegration
from .diffusion_gemma import DiffusionGemmaIntegration

DRAWS = ("keyed", "torch")
_ARGUMENT = "self_conditioning_logits"
# Networks and schedulers that are accelerated, with what accelerate() was given.
_accelerated: weakref.WeakKeyDictionary[Any, str] = weakref.WeakKeyDictionary()


def accelerate(target: Any, *, draws: str = "keyed", backend: str = "auto") -> Any:
    """Put the fused operators in place of DiffusionGemma's own arithmetic over the vocabulary; calls stay as they are.

    ::

        model = entrgi_kernels.accelerate(model)     # DiffusionGemmaForBlockDiffusion, or a DiffusionGemmaPipeline
        model.generate(...)                          # its own call: the same loop, without N x V temporaries
        model.entrgi.remove()

        with entrgi_kernels.accelerate(model).entrgi:
            ...                                      # removed at the end

    Tokens are those of the model's own arithmetic, up to ties within rounding; draws have its distribution.

    Args:
        target: transformers' ``DiffusionGemmaForBlockDiffusion`` or diffusers' ``DiffusionGemmaPipeline``, whose
            scheduler is accelerated with it.
        draws: "keyed" for draws without probabilities, from a seed that torch's generator (or the one given to the
            call) gives at each step; "torch" for torch.multinomial itself, which draws what it drew before and forms
            [N, V] probabilities for it.
        backend: "auto" or the name of a backend.

    Returns:
        The same object, with the handle :class:`Acceleration` as its attribute ``entrgi``.

    Raises:
        TypeError: another kind of target, or embeddings of a dtype that is not served.
        ValueError: no such draws or backend, or the target is guided or accelerated already.
        BackendUnavailableError: an explicit backend that cannot serve on the model's device.
    """
    if draws not in DRAWS:
        raise ValueError(f"draws={draws!r}: expected one of {', '.join(map(repr, DRAWS))}")
    backends.check_name(backend)
    check_free(target)
    pipeline = DiffusionGemmaPipelineIntegration.recognises(target)
    network = target.model if pipeline else target
    if not DiffusionGemmaIntegration.recognises(network) or not _has_parts(network):
        what = f"{type(target).__name__} of a {type(network).__name__}" if pipeline else type(target).__name__
        raise TypeError(
            f"accelerate() cannot serve {what}: expected transformers' DiffusionGemmaForBlockDiffusion or diffusers' "
            "DiffusionGemmaPipeline (guide() takes more, with a reward)"
        )
    table = network.model.decoder.embed_tokens.weight
    if table.dtype not in (torch.float64, torch.float32, torch.bfloat16, torch.float16) or table.is_meta:
        raise TypeError(
            f"the embeddings of this {type(network).__name__} are {table.dtype} on {table.device}: expected float64, "
            "float32, bfloat16 or float16 on the device that computes"
        )
    logits = torch.empty(0, device=table.device)  # DiffusionGemma's are float32 whatever its weights
    for operator in ("soft_embedding", "softmax_entropy", "sample_tokens", "unmask_confidence"):
        backends.resolve(backend, logits, operator)
    handle = Acceleration(target, "diffusion-gemma-pipeline" if pipeline else "diffusion-gemma", draws, backend)
    try:
        handle.claim(network)
        handle.accelerate_decoder(network)
        if pipeline:
            handle.accelerate_scheduler(target.scheduler)
        else:
            handle.accelerate_generate()
    except BaseException:
        handle.remove()  # a target is accelerated or untouched, nothing between
        raise
    handle.patch(ATTRIBUTE, handle)
    return target


def _has_parts(network: Any) -> bool:
    decoder = getattr(getattr(network, "model", None), "decoder", None)
    wanted = (hasattr(decoder, name) for name in ("self_conditioning", "embed_tokens"))
    return all(wanted) and hasattr(network, "_prepare_logits_processor")


class Acceleration(Handle):
    """The handle that accelerate() leaves on its target.

    Attributes:
        draws, backend: as given.
    """

    state = "accelerated"

    def __init__(self, target: Any, integration: str, draws: str, backend: str) -> None:
        super().__init__(target, integration)
        self.draws, self.backend = draws, backend
        self._how = Arithmetic(draws, backend)

    def claim(self, part: Any) -> None:
        """Note that a network or scheduler is accelerated.

        Raises:
            ValueError: it is already.
        """
        if part in _accelerated:
            raise ValueError(
                f"the {type(part).__name__} of this {type(self._target).__name__} is accelerated already, through "
                f"{_accelerated[part]}: remove() that first"
            )
        _accelerated[part] = type(self._target).__name__
        self.on_remove(lambda: _accelerated.pop(part, None))

    def defer(self, logits: Any) -> Any:
        """Logits [..., V] to compute with; what is not float32, as DiffusionGemma's are, stays as it is."""
        plain = isinstance(logits, torch.Tensor) and logits.dtype == torch.float32 and logits.ndim > 1
        return Deferred(logits, self._how) if plain and self.active else logits

    def accelerate_decoder(self, network: Any) -> None:
        """The expected embedding of the logits that the next step is conditioned on."""
        scaled = network.model.decoder.embed_tokens

        def condition(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
            logits = kwargs.get(_ARGUMENT)
            if not self.active or not isinstance(logits, (torch.Tensor, Deferred)):
                return None
            return args, {**kwargs, _ARGUMENT: _Expectation.of(logits, scaled.weight, self.backend)}

        # generate() goes round the network's own hooks, by its forward; a decoder compiled by the user is best handed
        # what is computed already.
        for module in (network, network.model.decoder):
            self.on_remove(module.register_forward_pre_hook(condition, with_kwargs=True).remove)

    def accelerate_generate(self) -> None:
        """transformers' loop: what its logits processors return in the end is deferred."""
        model = self._target
        own_processors, own_compile = model._prepare_logits_processor, model._compile_functions

        @functools.wraps(own_processors)
        def processors(*args: Any, **kwargs: Any) -> LogitsProcessorList:
            return LogitsProcessorList([*own_processors(*args, **kwargs), _Defer(self)])

        @functools.wraps(own_compile)
        def compile_functions(sampler: Any, criteria: Any) -> Any:
            compiled = own_compile(sampler, criteria)
            if self.active:
                for name in ("accept_canvas", "renoise_canvas"):
                    sampler.__dict__.pop(name, None)  # what is small is not worth it, and logits are no tensor
            return compiled

        self.patch("_prepare_logits_processor", processors)
        self.patch("_compile_functions", compile_functions)
        # The model keeps compiled functions, which do not notice hooks that come or go.
        content, mark = model.__dict__, "_compiled_"
        held = {name: content.pop(name) for name in list(content) if name.startswith(mark)}

        def give_back() -> None:
            for name in [name for name in content if name.startswith(mark)]:
                del content[name]
            content.update(held)

        self.on_remove(give_back)

    def accelerate_scheduler(self, scheduler: Any) -> None:
        """diffusers' loop: the logits that the scheduler's step is handed, and hands on, are deferred."""
        self.claim(scheduler)
        own = scheduler.step
        signature = inspect.signature(own)
        if "model_output" not in signature.parameters:
            raise TypeError(f"{type(scheduler).__name__}.step{signature} takes no model_output: expected logits by it")

        @functools.wraps(own)  # the pipeline looks at the step's signature
        def step(*args: Any, **kwargs: Any) -> Any:
            bound = signature.bind(*args, **kwargs)
            bound.arguments["model_output"] = self.defer(bound.arguments["model_output"])
            return own(*bound.args, **bound.kwargs)

        self.patch("step", step, scheduler)


class _Defer(LogitsProcessor):
    """The last logits processor."""

    def __init__(self, handle: Acceleration) -> None:
        self._handle = handle

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> Any:
        return self._handle.defer(scores)


class _Expectation:
    """What the decoder takes for logits: their softmax, times the table of embeddings, is known already.

    Args:
        soft: softmax(logits) @ table, [B, C, D] of the table's dtype.
    """

    def __init__(self, soft: torch.Tensor) -> None:
        self.soft = soft

    @classmethod
    def of(cls, logits: Any, table: torch.Tensor, backend: str) -> _Expectation:
        """Of logits [B, C, V], a tensor or deferred."""
        temperature = 1.0
        if isinstance(logits, Deferred):
            logits, temperature = logits.source, logits.temperature
        rows = logits.reshape(-1, logits.shape[-1])
        soft = ops.soft_embedding(rows, table, temperature=temperature, backend=backend)
        return cls(soft.view(*logits.shape[:-1], -1))

    def softmax(self, dim: int, dtype: torch.dtype | None = None) -> _Expectation:
        return self

    def to(self, dtype: torch.dtype) -> _Expectation:
        return self

    @classmethod
    def __torch_function__(cls, function: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        if function is not torch.matmul:
            raise TypeError(
                f"DiffusionGemma's decoder calls {function} on its {_ARGUMENT}: expected matmul(softmax, embeddings) "
                "alone, as of transformers 5.17 to 5.24; call .entrgi.remove()"
            )
        return args[0].soft
