"""Filtered sampling without a sort.

    x ~ softmax(phi / tau) restricted to top-p, then top-k

Top-p keeps an entry iff the mass of strictly larger logits is at most p, top-k iff its logit is at least the k-th: both
are thresholds on the logit, and all ties at a threshold are kept. The draw is an exponential race on Philox words keyed
by (seed, counter, row key, vocabulary index): see docs/philox.md. Not differentiable.

Source: arXiv 2602.05000, the hard token of the interpolation and the denoising draw; filters as in Dream's generation
code, but for ties, which a sort breaks arbitrarily.
"""

from __future__ import annotations

import torch

from ..backends.arguments import Draw
from . import _common
from ._operator import operator


@operator(numbers={"temperature": _common.check_temperature, "top_p": _common.check_top_p})
def _sample_tokens(
    logits: torch.Tensor,
    rng: torch.Tensor,
    keys: torch.Tensor,
    temperature: float,
    top_k: int,
    top_p: float,
    backend: str,
) -> torch.Tensor:
    return _common.run("sample_tokens", backend, logits)(logits, Draw(rng, keys, temperature, top_k, top_p))


@_sample_tokens.register_fake
def _(logits, rng, keys, temperature, top_k, top_p, backend):
    return logits.new_empty((logits.shape[0],), dtype=torch.int64)


def sample_tokens(
    logits: torch.Tensor,
    *,
    temperature: _common.Number = 1.0,
    top_k: int | None = None,
    top_p: _common.Number | None = None,
    seed: int | torch.Tensor = 0,
    counter: int | torch.Tensor = 0,
    keys: torch.Tensor | None = None,
    backend: str = "auto",
) -> torch.Tensor:
    """One token a row from the filtered softmax(logits / temperature).

    A row's draw depends on its logits, seed, counter and key alone: not on the other rows, the tiling or the backend
    (but for scores that tie within rounding).

    Args:
        logits: [N, V], float64/float32/bfloat16/float16, any strides; entries of -inf are never drawn.
        temperature: tau, from 1e-12 to 1e12; a number or a 0-d tensor on the CPU; 0 takes the argmax (the lowest
            index of ties).
        top_k: keep entries at least as large as the k-th largest; None keeps all.
        top_p: keep the smallest set whose mass reaches it, in (0, 1], a number or a 0-d tensor on the CPU; None keeps
            all.
        seed: 64-bit seed, or an int64 [2] tensor (seed, counter) on the logits' device, which may be changed between
            replays of a CUDA graph.
        counter: 32-bit, counts the caller's draws of one seed.
        keys: int64 [N], what each row's draw is keyed by; None numbers the rows 0 .. N-1.
        backend: "auto" or the name of a backend.

    Returns:
        Tokens [N], int64; -1 for a row that holds a NaN or +inf, or no finite entry.

    Raises:
        ValueError, TypeError: bad shape, dtype, temperature, filter, seed or keys.
        BackendUnavailableError: an explicit backend that cannot serve.
    """
    _common.check_logits(logits)
    temperature = _common.check_temperature(temperature)
    top_k, top_p = _common.check_filters(top_k, top_p)
    rng, keys = _common.make_rng(logits, seed, counter), _common.make_keys(logits, keys)
    backend = _common.check_backend(backend)
    return _sample_tokens(_common.detached(logits), rng, keys, temperature, top_k, top_p, backend)
