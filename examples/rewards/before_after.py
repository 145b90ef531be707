"""The same prompts and seed with and without guidance, side by side: what every example beside this one prints."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from entrgi import tiny
from entrgi_kernels import GuidedSampler
from entrgi_kernels.rewards import Reward

PROMPTS = ("How was the noodle bar?", "What did you think of the hotel?")


def before_after(reward: Reward, prompts: Sequence[str] = PROMPTS, **settings: Any) -> dict[str, float]:
    """Steer the built-in diffusion LM by a reward and print what that changes, gain or not.

    Args:
        reward: any.
        prompts: to be answered.
        **settings: of :class:`GuidanceConfig`.

    Returns:
        Mean reward over all samples, and mean over prompts of the best sample's, {"mean", "best"} of each method:
        {"none mean", "none best", "entrgi mean", "entrgi best"}.
    """
    model, tokenizer = tiny.load_diffusion()
    settings = dict(num_samples=4, max_new_tokens=16, steps=8, guidance_steps=2, seed=0, batch_size=12) | settings
    sampler = GuidedSampler(model, reward, tokenizer, **settings)
    found: dict[str, float] = {}
    print(reward)
    for method in ("none", "entrgi"):
        results = sampler.generate(list(prompts), method=method)
        found[f"{method} mean"] = sum(result.mean for result in results) / len(results)
        found[f"{method} best"] = sum(result.top1 for result in results) / len(results)
        print(f"\n{'unguided' if method == 'none' else 'guided'}, {sampler.stats.seconds:.1f} s")
        for result in results:
            print(f"  {result.best.reward:+8.3f}  {result.prompt} -> {result.best.text}")
        if hasattr(reward, "score_components"):
            conversations = [[{"role": "user", "content": result.prompt}] for result in results]
            parts = reward.score_components(conversations, [result.best.text for result in results])
            print("  of the best:", ", ".join(f"{name} {sum(v) / len(v):+.3f}" for name, v in parts.items()))
    gain, best = (found[f"entrgi {what}"] - found[f"none {what}"] for what in ("mean", "best"))
    print(
        f"\nmean reward {found['none mean']:+.3f} -> {found['entrgi mean']:+.3f} ({gain:+.3f}), best of "
        f"{settings['num_samples']} {found['none best']:+.3f} -> {found['entrgi best']:+.3f} ({best:+.3f})"
    )
    return found
