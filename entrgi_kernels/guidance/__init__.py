"""Reward guidance of diffusion language models: the drop-in, the sampler, and their parts for loops of one's own."""

from .canvas import Canvas, NonFiniteLogitsError, NonFiniteRewardError, Statistics
from .config import GuidanceConfig
from .denoising import Denoiser
from .guide import guide
from .hosts import DreamHooks, Guidance
from .optimizer import LogitOptimizer
from .results import GenerationResult, Sample, StepTrace
from .sampler import GuidedSampler
from .weights import Step, Threshold

__all__ = [
    "Canvas",
    "Denoiser",
    "DreamHooks",
    "GenerationResult",
    "Guidance",
    "GuidanceConfig",
    "GuidedSampler",
    "LogitOptimizer",
    "NonFiniteLogitsError",
    "NonFiniteRewardError",
    "Sample",
    "Statistics",
    "Step",
    "StepTrace",
    "Threshold",
    "guide",
]
