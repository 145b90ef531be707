"""Settings of a training run: transformers' TrainingArguments and what RGRL and diffu-GRPO add to them."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

from transformers import TrainingArguments

from entrgi_kernels.guidance.config import GuidanceConfig

from .methods import METHODS, WEIGHTINGS

# The published settings of the sampler during training (they differ from those of guided generation).
PUBLISHED_SAMPLING = GuidanceConfig(
    guidance_steps=1,
    learning_rate=0.5,
    temperature=0.9,
    top_p=0.95,
    top_k=50,
    confidence="guided",
    schedule="even",
    max_new_tokens=128,
    steps=128,
    num_samples=4,
    deprioritize_eos=False,
)

LORA_TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj", "up_proj", "down_proj", "gate_proj")


# Counts, and the least that makes sense of each.
_LEAST = {
    "max_steps": 1,
    "per_device_train_batch_size": 1,
    "gradient_accumulation_steps": 1,
    "num_iterations": 1,
    "eval_samples": 1,
    "sample_steps": 0,
    "ref_model_sync_steps": 0,
}


@dataclass
class GuidedTrainingArguments(TrainingArguments):
    """transformers' TrainingArguments with the published defaults of RGRL, and the objectives' own settings.

    `per_device_train_batch_size` counts prompts; each brings K completions. How they are drawn is a
    :class:`entrgi_kernels.guidance.GuidanceConfig` of its own, handed to the trainer.

    Raises:
        ValueError: a setting out of range; the message says what is accepted.
    """

    method: str = field(default="rgrl-entrgi", metadata={"help": f"One of {', '.join(METHODS)}."})
    weighting: str = field(
        default="uniform", metadata={"help": f"RGRL: how completions count, one of {', '.join(WEIGHTINGS)}."}
    )
    p_mask_prompt: float | None = field(
        default=None, metadata={"help": "Probability of masking a prompt token (default: 0.3 RGRL, 0.15 diffu-GRPO)."}
    )
    num_iterations: int | None = field(
        default=None, metadata={"help": "Optimiser steps on each rollout (default: 1 RGRL, 12 diffu-GRPO)."}
    )
    epsilon: float = field(
        default=0.5, metadata={"help": "diffu-GRPO: the ratio is clipped to 1 - epsilon, 1 + epsilon."}
    )
    beta: float = field(default=0.04, metadata={"help": "diffu-GRPO: weight of the KL term; 0 keeps no reference."})
    scale_rewards: bool = field(
        default=False, metadata={"help": "diffu-GRPO: divide advantages by the group's standard deviation."}
    )
    ref_model_sync_steps: int = field(
        default=64, metadata={"help": "diffu-GRPO: the reference becomes the policy every so many steps; 0 for never."}
    )
    ref_model_mixup_alpha: float = field(
        default=1.0, metadata={"help": "diffu-GRPO: how far the reference moves to the policy at each sync."}
    )
    eval_samples: int = field(default=4, metadata={"help": "Unguided completions a held-out prompt."})
    sample_steps: int = field(
        default=20, metadata={"help": "Show a prompt's completions every so many steps; 0: never."}
    )

    # Published, and what this trainer needs, where TrainingArguments has other defaults.
    learning_rate: float = 5e-6
    lr_scheduler_type: str = "linear"
    max_steps: int = 500
    per_device_train_batch_size: int = 1
    logging_steps: float = 1
    save_total_limit: int | None = 3
    remove_unused_columns: bool | None = False
    train_sampling_strategy: str = "sequential"
    logging_nan_inf_filter: bool = False
    ddp_find_unused_parameters: bool | None = False

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.method not in METHODS:
            raise ValueError(f"method={self.method!r}: expected one of {', '.join(map(repr, METHODS))}")
        chosen = METHODS[self.method]
        if self.p_mask_prompt is None:
            self.p_mask_prompt = chosen.p_mask_prompt
        if self.num_iterations is None:
            self.num_iterations = chosen.num_iterations
        if self.weighting not in WEIGHTINGS:
            raise ValueError(f"weighting={self.weighting!r}: expected one of {', '.join(map(repr, WEIGHTINGS))}")
        if chosen.objective != "rgrl" and self.weighting != "uniform":
            raise ValueError(f"weighting={self.weighting!r}: only RGRL weighs completions, not {self.method}")
        if chosen.objective == "rgrl" and self.num_iterations != 1:
            raise ValueError(
                f"num_iterations={self.num_iterations}: RGRL takes one step on each rollout, expected 1 (it has no "
                "ratio that would correct for a policy that has moved on)"
            )
        if not 0 <= self.p_mask_prompt <= 1:
            raise ValueError(f"p_mask_prompt={self.p_mask_prompt}: expected a probability")
        for name, low in _LEAST.items():
            if not getattr(self, name) >= low:
                raise ValueError(f"{name}={getattr(self, name)}: expected an integer >= {low}")
        for name in ("learning_rate", "epsilon", "beta"):
            value = getattr(self, name)
            if not isinstance(value, (int, float)) or not 0 <= value < math.inf:
                raise ValueError(f"{name}={value!r}: expected a finite number >= 0")
        if not 0 < self.ref_model_mixup_alpha <= 1:
            raise ValueError(f"ref_model_mixup_alpha={self.ref_model_mixup_alpha}: expected a number in (0, 1]")
        if self.save_total_limit == 1:
            raise ValueError(
                "save_total_limit=1: expected at least 2, since a run killed while it saves resumes from the one before"
            )
        if self.train_sampling_strategy != "sequential":
            raise ValueError(
                f"train_sampling_strategy={self.train_sampling_strategy!r}: expected 'sequential', the schedule of "
                "prompts is shuffled already"
            )

    @property
    def objective(self) -> str:
        """ "rgrl" or "grpo"."""
        return METHODS[self.method].objective
