"""Trainers small enough for tests, also run as a script by tests of several processes and of killed ones.

python train_cases.py FOLDER JSON        trains as the JSON of :func:`make_trainer`'s arguments says
"""

from __future__ import annotations

import copy
import json
import math
import os
import sys
from pathlib import Path
from typing import Any

import torch

from entrgi import tiny
from entrgi.train import PUBLISHED_SAMPLING, GuidedTrainer, GuidedTrainingArguments, records

PROMPTS = tiny.prompts(12, seed=5)


def make_trainer(models: Any, folder: Path, *, guidance: dict | None = None, extra: dict | None = None, **changes: Any):
    """A trainer in `folder`: 2 prompts a step, K = 2, 6 slots, 3 denoising steps, no dropout, float64."""
    diffusion, tokenizer, reward = models
    settings = {
        "output_dir": str(folder),
        "method": "rgrl-entrgi",
        "max_steps": 3,
        "learning_rate": 1e-3,
        "per_device_train_batch_size": 2,
        "save_strategy": "no",
        "report_to": "none",
        "use_cpu": True,
        "disable_tqdm": True,
        "sample_steps": 0,
    }
    sampling = {"max_new_tokens": 6, "steps": 3, "num_samples": 2, "batch_size": 2} | (guidance or {})
    return GuidedTrainer(
        copy.deepcopy(diffusion),
        reward,
        tokenizer,
        args=GuidedTrainingArguments(**(settings | changes)),
        guidance=PUBLISHED_SAMPLING.replace(**sampling),
        train_prompts=PROMPTS[:8],
        eval_prompts=PROMPTS[8:],
        **(extra or {}),
    )


def parameters(trainer: Any) -> dict[str, torch.Tensor]:
    """What was trained."""
    model = trainer.accelerator.unwrap_model(trainer.model)
    return {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}


def losses(folder: Path) -> list[tuple[int, float]]:
    """(step, loss) of a run's log."""
    return [(record["step"], record["loss"]) for record in records.read(folder, records.LOG) if "loss" in record]


def spoil_rewards(trainer: Any, places: Any = slice(None), value: float = math.nan, step: int = 1) -> None:
    """Give completions of one rollout no reward."""
    score = trainer.sampler.reward.score_texts

    def spoiled(*args: Any, **kwargs: Any) -> list[float]:
        found = torch.tensor(score(*args, **kwargs))
        if trainer.state.global_step == step:
            found[places] = value
        return found.tolist()

    # Not on the reward itself, which other tests share.
    trainer.sampler.reward = _Spoiled(trainer.sampler.reward, spoiled)


class _Spoiled:
    def __init__(self, reward: Any, score_texts: Any) -> None:
        self._reward, self.score_texts = reward, score_texts

    def __getattr__(self, name: str) -> Any:
        return getattr(self._reward, name)


def spoil_gradient(trainer: Any, step: int = 1) -> None:
    """Make a parameter's gradient NaN."""
    parameter = next(p for p in trainer.model.parameters() if p.requires_grad)
    parameter.register_hook(lambda grad: grad * math.nan if trainer.state.global_step == step else grad)


def main() -> None:
    folder, changes = Path(sys.argv[1]), json.loads(sys.argv[2])
    torch.set_num_threads(1)
    resume = changes.pop("resume", False)
    models = (*tiny.load_diffusion(torch.float64), tiny.load_reward(torch.float64)[0])
    spoil = changes.pop("spoil", None)
    trainer = make_trainer(models, folder, **changes)
    if spoil and int(os.environ.get("RANK", "0")) == 1:
        {"rewards": spoil_rewards, "gradient": spoil_gradient}[spoil](trainer)
    trainer.train(resume_from_checkpoint=resume)
    if os.environ.get("RANK", "0") == "0":
        torch.save(parameters(trainer), folder / "parameters.pt")
    trainer.accelerator.end_training()  # leaves the group, as the command does


if __name__ == "__main__":
    main()
