"""Post-training of diffusion language models on reward-guided samples (RGRL), and diffu-GRPO beside it.

On transformers.Trainer, accelerate and peft; docs/training.md tells how to use it.
"""

from .arguments import METHODS, PUBLISHED_SAMPLING, GuidedTrainingArguments
from .trainer import GuidedTrainer

__all__ = ["METHODS", "PUBLISHED_SAMPLING", "GuidedTrainer", "GuidedTrainingArguments"]
