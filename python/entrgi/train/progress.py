"""A bar over the run's steps, and a line for each log."""

from __future__ import annotations

import sys
from typing import Any

from tqdm.auto import tqdm
from transformers import TrainerCallback

_SHOWN = (
    ("reward", "reward {:+.2f}"),
    ("reward_best", "best {:+.2f}"),
    ("reward_missing", "without {:.0f}"),
    ("loss", "loss {:.4g}"),
    ("kl", "kl {:.3f}"),
    ("clipped", "clipped {:.2f}"),
    ("completion_length", "length {:.0f}"),
    ("completion_terminated", "ended {:.0%}"),
    ("entropy_weight", "weight {:.2f}"),
    ("rollout_seconds", "drawn in {:.1f} s"),
)


class Progress(TrainerCallback):
    """Writes to standard error on the main process: a bar where that is a terminal, and what was logged, in short."""

    def __init__(self) -> None:
        self._bar: tqdm | None = None

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.is_world_process_zero:
            self._bar = tqdm(total=state.max_steps, initial=state.global_step, desc=args.method, disable=None)

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self._bar is not None:
            self._bar.update(state.global_step - self._bar.n)

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, float] | None = None, **kwargs: Any) -> None:
        if not state.is_world_process_zero or not logs:
            return
        if "eval_length" in logs:
            names = [name for name in logs if f"{name}_se" in logs]
            shown = ", ".join(f"{name[5:]} {logs[name]:.2f} ± {logs[f'{name}_se']:.2f}" for name in names)
            shown += "".join(f", {logs[n]} without {n[5:-8]}" for n in logs if n.endswith("_missing"))
            text = f"held-out, unguided: {shown}, length {logs['eval_length']:.0f}"
        else:
            text = "  ".join(form.format(logs[name]) for name, form in _SHOWN if name in logs)
        if text:
            tqdm.write(f"step {state.global_step}/{state.max_steps}  {text}", file=sys.stderr)

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self._bar is not None:
            self._bar.close()
            self._bar = None
