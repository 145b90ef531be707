"""Diffusion language models: adapters that give the guided sampler the logits of the masked slots.

``wrap`` picks the adapter for a loaded network, ``load`` loads a checkpoint and wraps it. A new kind of model is one
file beside these: a subclass of :class:`BackboneModel` with its own ``inputs``, or anything that follows the
:class:`DiffusionModel` protocol.
"""

from entrgi_kernels.models.base import BackboneModel, DiffusionModel
from entrgi_kernels.models.dream import Dream
from entrgi_kernels.models.llada import LLaDA
from entrgi_kernels.models.loading import load, wrap
from entrgi_kernels.models.masked_diffusion import MaskedDiffusion

__all__ = ["BackboneModel", "DiffusionModel", "Dream", "LLaDA", "MaskedDiffusion", "load", "wrap"]
