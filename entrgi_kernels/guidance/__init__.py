"""Reward guidance of diffusion language models: the sampler, and its parts for loops of one's own."""

from .canvas import Canvas
from .config import GuidanceConfig
from .denoising import Denoiser
from .errors import NonFiniteLogitsError, NonFiniteRewardError
from .optimizer import LogitOptimizer
from .results import GenerationResult, Sample, Stats, StepTrace
from .sampler import GuidedSampler
from .weights import StepWeight, ThresholdWeight

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
    "Stats",
    "StepTrace",
    "StepWeight",
    "ThresholdWeight",
]
