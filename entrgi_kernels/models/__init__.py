"""Diffusion language models: adapters that give the guided sampler the logits of the masked slots.

``wrap`` picks the adapter for a loaded network, ``load`` loads a checkpoint and wraps it. A new kind of model is one
file beside these: a subclass of :class:`BackboneModel` with its own ``inputs``, or anything that follows the
:class:`DiffusionModel` protocol.
"""

from .base import BackboneModel, DiffusionModel
from .block_causal import BlockCausal
from .dream import Dream
from .forwards import Forwards, forwards_of
from .llada import LLaDA
from .loading import load, wrap
from .masked_diffusion import MaskedDiffusion

__all__ = [
    "BackboneModel",
    "BlockCausal",
    "DiffusionModel",
    "Dream",
    "Forwards",
    "LLaDA",
    "MaskedDiffusion",
    "forwards_of",
    "load",
    "wrap",
]
