"""The ways into other people's generation code, one file each; docs/hosts.md is their table."""

from __future__ import annotations

from typing import Any

from .authors import ScriptHost, TrainingSamplerHost
from .base import ATTRIBUTE, Guidance, Host, Parts
from .diffusers_pipelines import DiffusionGemmaPipelineHost, LLaDA2PipelineHost
from .diffusion_gemma import DiffusionGemmaHost
from .dllm import DllmHost
from .dream import DreamHooks, DreamHost
from .forward import ForwardHost

# In the order in which they are asked whether a target is theirs: the particular before the general.
HOSTS: dict[str, type[Host]] = {
    host.name: host
    for host in (
        ScriptHost,
        TrainingSamplerHost,
        DllmHost,
        LLaDA2PipelineHost,
        DiffusionGemmaPipelineHost,
        DreamHost,
        DiffusionGemmaHost,
        ForwardHost,
    )
}


def find(target: Any, name: str | None = None) -> type[Host]:
    """The host that a target is for guide().

    Args:
        target: what is to be guided.
        name: one of HOSTS, to have that one; None asks them in order.

    Raises:
        ValueError: no host of that name.
        TypeError: a target that no host knows.
    """
    if name is not None:
        if name not in HOSTS:
            raise ValueError(f"host={name!r}: expected None or one of {', '.join(map(repr, HOSTS))}")
        return HOSTS[name]
    for host in HOSTS.values():
        if host.recognises(target):
            return host
    raise TypeError(
        f"guide() cannot guide {type(target).__name__}: expected a torch.nn.Module (a diffusion LM), or one of the "
        "hosts in docs/hosts.md; GuidedSampler takes any entrgi_kernels.models.DiffusionModel"
    )


__all__ = ["ATTRIBUTE", "HOSTS", "DreamHooks", "Guidance", "Host", "Parts", "find"]
