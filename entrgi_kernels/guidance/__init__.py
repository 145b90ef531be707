"""Reward guidance of diffusion language models: the sampler, and its parts for loops of one's own."""

from .canvas import Canvas, NonFiniteLogitsError, NonFiniteRewardError, Statistics
from .config import GuidanceConfig
from .denoising import Denoiser
from .optimizer import LogitOptimizer
from .results import GenerationResult, Sample, StepTrace
from .sampler import GuidedSampler
from .weights import Step, Threshold

__all__ = [
    "Canvas",
    "Denoiser",
    "GenerationResult",
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
]
