"""Confidence of drawn tokens, by which a denoising step chooses the positions it commits.

    entropy        -H of filtered softmax(phi / tau)
    maskgit_plus   probability of the token there
    topk_margin    largest probability less the second, there
    anchor         the token's raw logit

Not differentiable.

Source: Dream's generation code (the first three), the EntRGi authors' code (anchor); arXiv 2602.05000.
"""

from __future__ import annotations

import torch

from ..names import SCORED_ALGS
from . import _common
from ._operator import operator


@operator(numbers={"temperature": _common.distribution_temperature, "top_p": _common.check_top_p})
def _unmask_confidence(
    logits: torch.Tensor,
    tokens: torch.Tensor,
    alg: str,
    temperature: float,
    top_k: int,
    top_p: float,
    backend: str,
) -> torch.Tensor:
    return _common.run("unmask_confidence", backend, logits)(logits, tokens, alg, temperature, top_k, top_p)


@_unmask_confidence.register_fake
def _(logits, tokens, alg, temperature, top_k, top_p, backend):
    return logits.new_empty((logits.shape[0],), dtype=_common.accumulation_dtype(logits))


def unmask_confidence(
    logits: torch.Tensor,
    tokens: torch.Tensor,
    *,
    alg: str = "entropy",
    temperature: _common.Number = 1.0,
    top_k: int | None = None,
    top_p: _common.Number | None = None,
    backend: str = "auto",
) -> torch.Tensor:
    """Confidence of each row's token: higher is committed earlier.

    Args:
        logits: [N, V], float64/float32/bfloat16/float16, any strides.
        tokens: [N] int64, the drawn tokens.
        alg: "entropy" (minus the entropy), "maskgit_plus" (the token's probability), "topk_margin" (the two largest
            probabilities' difference) or "anchor" (the token's raw logit).
        temperature: tau of the distribution, from 1e-12 to 1e12; a number or a 0-d tensor on the CPU; 0 stands for 1.
        top_k, top_p: its filters, as in :func:`sample_tokens`; None keeps all.
        backend: "auto" or the name of a backend.

    Returns:
        [N], float32 (float64 for float64 logits); NaN for a row that holds a NaN or +inf, or no finite entry.

    Raises:
        ValueError, TypeError: bad shape, dtype, alg, temperature or filter.
        BackendUnavailableError: an explicit backend that cannot serve.
    """
    _common.check_logits(logits)
    _common.check_vector(logits, tokens, "tokens", torch.int64)
    if not isinstance(alg, str) or alg not in SCORED_ALGS:
        raise ValueError(f"alg={alg!r}: expected one of {', '.join(map(repr, SCORED_ALGS))}")
    temperature = _common.distribution_temperature(temperature)
    top_k, top_p = _common.check_filters(top_k, top_p)
    backend = _common.check_backend(backend)
    return _unmask_confidence(_common.detached(logits), tokens, alg, temperature, top_k, top_p, backend)
