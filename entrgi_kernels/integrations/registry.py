"""The third-party loops that guide() knows, and which of them a target is; docs/integrations.md is their table."""

from __future__ import annotations

from typing import Any

from .authors import ScriptIntegration, TrainingSamplerIntegration
from .base import Integration
from .diffusers_pipelines import DiffusionGemmaPipelineIntegration, LLaDA2PipelineIntegration
from .diffusion_gemma import DiffusionGemmaIntegration
from .dllm import DllmIntegration
from .dream import DreamIntegration
from .forward import ForwardIntegration

# In the order in which they are asked whether a target is theirs: the particular before the general.
INTEGRATIONS: dict[str, type[Integration]] = {
    integration.name: integration
    for integration in (
        ScriptIntegration,
        TrainingSamplerIntegration,
        DllmIntegration,
        LLaDA2PipelineIntegration,
        DiffusionGemmaPipelineIntegration,
        DreamIntegration,
        DiffusionGemmaIntegration,
        ForwardIntegration,
    )
}


def find(target: Any, name: str | None = None) -> type[Integration]:
    """The integration that a target is guided by.

    Args:
        target: what is to be guided.
        name: one of INTEGRATIONS, to have that one; None asks them in order.

    Raises:
        ValueError: no integration of that name.
        TypeError: a target that none knows.
    """
    if name is not None:
        if name not in INTEGRATIONS:
            raise ValueError(f"integration={name!r}: expected None or one of {', '.join(map(repr, INTEGRATIONS))}")
        return INTEGRATIONS[name]
    for integration in INTEGRATIONS.values():
        if integration.recognises(target):
            return integration
    raise TypeError(
        f"guide() cannot guide {type(target).__name__}: expected a torch.nn.Module (a diffusion LM), or one of the "
        "integrations in docs/integrations.md; GuidedSampler takes any entrgi_kernels.models.DiffusionModel"
    )
