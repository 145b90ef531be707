"""Token log-probabilities under a vocabulary head: cuBLAS for a chunk's logits, this backend's kernels for the rest."""

from __future__ import annotations

from types import SimpleNamespace

import torch

from .. import eager, vocabulary_head
from .soft_embedding import soft_embedding
from .statistics import softmax_entropy
from .table_gradient import soft_embedding_grad_table

_PASSES = SimpleNamespace(
    soft_embedding=soft_embedding,
    softmax_entropy=softmax_entropy,
    soft_embedding_grad_table=soft_embedding_grad_table,
)


def token_log_prob(
    hidden: torch.Tensor, head: torch.Tensor, bias: torch.Tensor | None, targets: torch.Tensor, slope: bool
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(log-probability of the targets [N], log-sum-exp [N], slope [N, D] or [0, D]), float32; see the eager twin."""
    if head.dtype == torch.float64:  # its sums have to be float64
        return eager.token_log_prob(hidden, head, bias, targets, slope)
    return vocabulary_head.token_log_prob(_PASSES, hidden, head, bias, targets, slope)


def token_log_prob_backward(
    hidden: torch.Tensor,
    head: torch.Tensor,
    bias: torch.Tensor | None,
    targets: torch.Tensor,
    lse: torch.Tensor,
    grad: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Gradients of hidden [N, D], head [V, D] and bias [V] ([0] without one); see the eager twin."""
    if head.dtype == torch.float64:
        return eager.token_log_prob_backward(hidden, head, bias, targets, lse, grad)
    return vocabulary_head.token_log_prob_backward(_PASSES, hidden, head, bias, targets, lse, grad)
