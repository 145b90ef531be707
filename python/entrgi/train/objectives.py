"""What is minimised: RGRL's likelihood of guided samples, and diffu-GRPO's clipped policy gradient.

Shapes: R rows (completions), K of them a prompt and contiguous, L completion slots; log-probabilities [R, L] in nats,
finite wherever the mask [R, L] is False too.

Sources: RGRL, arXiv 2602.05000 (post-training on reward-guided samples); diffu-GRPO, Zhao et al., "d1: Scaling
Reasoning in Diffusion Large Language Models via Reinforcement Learning", arXiv 2504.12216; GRPO, arXiv 2402.03300.
"""

from __future__ import annotations

import torch

from .methods import WEIGHTINGS

SOFTMAX_TEMPERATURE = 0.1


def completion_mask(completions: torch.Tensor, eos_token_id: int) -> torch.Tensor:
    """[R, L] bool: the slots of completions [R, L] up to and including the first end-of-sequence token."""
    eos = completions == eos_token_id
    return eos.cumsum(dim=1) - eos.long() == 0


def row_weights(rewards: torch.Tensor, num_samples: int, weighting: str = "uniform") -> torch.Tensor:
    """How much each completion counts: weights [R] that sum to 1 over the K completions of a prompt.

    Completions whose reward is not finite have the weight 0; the others of their prompt share the 1.

    Args:
        rewards: [R].
        num_samples: K.
        weighting: "uniform" (1/K: the published RGRL, which only logs rewards), "softmax" (of reward / 0.1 over the
            group) or "best" (the completion of the highest reward alone, the first of ties).

    Raises:
        ValueError: another weighting, or R is no multiple of K.
    """
    groups = _groups(rewards, num_samples)
    scored = groups.isfinite()
    ranked = groups.masked_fill(~scored, -torch.inf)
    if weighting == "uniform":
        weights = scored.to(groups.dtype) / scored.sum(dim=1, keepdim=True)
    elif weighting == "softmax":
        weights = torch.softmax(ranked / SOFTMAX_TEMPERATURE, dim=1)
    elif weighting == "best":
        weights = torch.nn.functional.one_hot(ranked.argmax(dim=1), num_samples).to(groups.dtype)
    else:
        raise ValueError(f"weighting={weighting!r}: expected one of {', '.join(map(repr, WEIGHTINGS))}")
    return weights.masked_fill(~scored, 0).flatten()  # all of them where a prompt has no reward at all


def rgrl_loss(log_probs: torch.Tensor, mask: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    """-sum over rows of w_row [sum_i mask_i log p_i / max(1, sum_i mask_i)], a scalar.

    With the uniform weights 1/K this is the published loss: no advantage, no KL term, no clipping.
    """
    lengths = mask.sum(dim=1).clamp(min=1)
    return -(weights * (log_probs * mask).sum(dim=1) / lengths).sum()


def advantages(rewards: torch.Tensor, num_samples: int, scale: bool = False) -> torch.Tensor:
    """Reward less its group's mean, [R]; with `scale` also over the group's standard deviation (+ 1e-4).

    Rewards that are not finite are no part of either, and have the advantage 0.
    """
    mean, deviation, _ = group_statistics(rewards, num_samples)
    centred = rewards - mean.repeat_interleave(num_samples)
    if scale:
        centred = centred / (deviation.repeat_interleave(num_samples) + 1e-4)
    return centred.masked_fill(~rewards.isfinite(), 0)


def group_statistics(rewards: torch.Tensor, num_samples: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(mean, standard deviation, highest) of the finite rewards of each prompt, [R / K] each.

    One reward has the deviation 0; where a prompt has none, mean and deviation are 0 and the highest is -inf.
    """
    groups = _groups(rewards, num_samples)
    scored = groups.isfinite()
    count = scored.sum(dim=1)
    mean = groups.masked_fill(~scored, 0).sum(dim=1) / count.clamp(min=1)
    centred = (groups - mean[:, None]).masked_fill(~scored, 0)
    deviation = (centred.square().sum(dim=1) / (count - 1).clamp(min=1)).sqrt()
    return mean, deviation, groups.masked_fill(~scored, -torch.inf).amax(dim=1)


def grpo_loss(
    log_probs: torch.Tensor,
    old: torch.Tensor,
    reference: torch.Tensor | None,
    mask: torch.Tensor,
    advantage: torch.Tensor,
    *,
    epsilon: float,
    beta: float,
    tokens: torch.Tensor | float,
) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """The clipped surrogate with a k3 estimate of the KL divergence, summed over completion tokens / `tokens`.

        ratio = exp(log p - log p_old)        k3 = exp(log p_ref - log p) - (log p_ref - log p) - 1
        loss = -sum_i mask_i [min(ratio A, clip(ratio, 1 - epsilon, 1 + epsilon) A) - beta k3] / tokens

    Args:
        log_probs, old, reference: [R, L] under the policy, the policy that drew the completions, and the reference
            (None where beta is 0), all under the same masks of the prompt.
        mask: [R, L] bool.
        advantage: [R].
        epsilon: the ratio is clipped to [1 - epsilon, 1 + epsilon].
        beta: weight of the KL term.
        tokens: completion tokens of the whole step, so that parts of a step add up to the step's loss.

    Returns:
        (loss, {"kl", "clipped"}): sums over the tokens / `tokens`, detached.
    """
    ratio = (log_probs - old).exp()
    gain = advantage[:, None]
    clipped = ratio.clamp(1 - epsilon, 1 + epsilon)
    terms = torch.minimum(ratio * gain, clipped * gain)
    binding = (clipped * gain < ratio * gain).to(ratio.dtype)
    kl = torch.zeros_like(ratio)
    if reference is not None:
        difference = reference - log_probs
        kl = difference.exp() - difference - 1
        terms = terms - beta * kl
    loss = -(terms * mask).sum() / tokens
    return loss, {name: (value.detach() * mask).sum() / tokens for name, value in (("kl", kl), ("clipped", binding))}


def _groups(rewards: torch.Tensor, num_samples: int) -> torch.Tensor:
    if rewards.dim() != 1 or num_samples < 1 or len(rewards) % num_samples:
        raise ValueError(
            f"rewards have shape {list(rewards.shape)}: expected one a completion, groups of num_samples={num_samples}"
        )
    return rewards.view(-1, num_samples)
