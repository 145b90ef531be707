"""The operators' truth: float64 formulas of the method, one line each, and plain torch in the caller's own dtype.

Nothing here comes from the package. Shapes: logits [N, V], embedding [V, D]; temperatures are positive.
"""

from __future__ import annotations

import pytest
import torch

from entrgi_kernels import backends

DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]


def served(backend: str, *tensors: torch.Tensor) -> None:
    """Skip where an explicitly named backend says that it cannot serve the first tensor."""
    try:
        backends.resolve(backend, tensors[0])
    except backends.BackendUnavailableError as error:
        pytest.skip(str(error))
    if backend == backends.TRITON and tensors[0].device.type == "cpu":
        # Triton's interpreter: wrong for bfloat16 products by its own account, and slow.
        if any(t.dtype == torch.bfloat16 for t in tensors) or any(t.numel() > 1 << 14 for t in tensors):
            pytest.skip("not for Triton's interpreter: bfloat16, or more than 16,384 entries")


def accumulation(*tensors: torch.Tensor) -> torch.dtype:
    return torch.float64 if torch.float64 in {t.dtype for t in tensors} else torch.float32


def peaked(n: int, v: int, dtype: torch.dtype = torch.float64, seed: int = 0, spread: float = 3.0) -> torch.Tensor:
    """Logits with a few large entries a row, as a language model's are; exact in `dtype`."""
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(n, v, generator=g, dtype=torch.float64) * spread
    if v > 8:
        x[:, :8] += 6 * torch.rand(n, 8, generator=g, dtype=torch.float64)
        x = x[:, torch.randperm(v, generator=g)]
    return x.to(dtype)


def table(v: int, d: int, dtype: torch.dtype = torch.float64, seed: int = 1) -> torch.Tensor:
    return torch.randn(v, d, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


# --- truth in float64 ---


def log_p(logits: torch.Tensor, temperature: float) -> torch.Tensor:
    return torch.log_softmax(logits.double() / temperature, dim=-1)


def entropy(logits: torch.Tensor, temperature: float = 1.0) -> torch.Tensor:
    return torch.special.entr(log_p(logits, temperature).exp()).sum(dim=-1)


def soft(logits: torch.Tensor, embedding: torch.Tensor, temperature: float) -> torch.Tensor:
    return log_p(logits, temperature).exp() @ embedding.double()


def kept(logits: torch.Tensor, temperature: float, top_k: int | None, top_p: float | None) -> torch.Tensor:
    """bool [N, V]: what top-p, then top-k keep, each entry judged by the entries above it."""
    larger = (logits[:, None, :] > logits[:, :, None]).double()  # [n, v, u]: u's logit is above v's
    mask = logits > -torch.inf
    if top_p is not None:
        mask &= (larger @ log_p(logits, temperature).exp()[:, :, None])[..., 0] <= top_p
    if top_k is not None:
        mask &= larger.sum(dim=-1) < top_k
    return mask


def filtered(logits: torch.Tensor, temperature: float, top_k: int | None, top_p: float | None) -> torch.Tensor:
    """Probabilities [N, V] after the filters."""
    p = log_p(logits, temperature).exp() * kept(logits, temperature, top_k, top_p)
    return p / p.sum(dim=-1, keepdim=True)


def confidence(
    logits: torch.Tensor, tokens: torch.Tensor, alg: str, temperature: float, top_k: int | None, top_p: float | None
) -> torch.Tensor:
    p = filtered(logits, temperature, top_k, top_p)
    if alg == "entropy":
        return -torch.special.entr(p).sum(dim=-1)
    if alg == "topk_margin":
        ranked = torch.nn.functional.pad(p, (0, 1)).sort(dim=-1, descending=True).values
        return ranked[:, 0] - ranked[:, 1]
    return (logits.double() if alg == "anchor" else p)[torch.arange(len(p)), tokens]


# --- judging ---


def assert_accurate(
    ours: torch.Tensor, truth: torch.Tensor, naive: torch.Tensor, k: float = 2.0, ulps: float = 4.0, floor: float = 0.0
) -> None:
    """error <= k x the error of plain torch in the same dtype + a few ulps of the largest value (or of `floor`, the
    size of the terms where they cancel).

    The truth of float64 inputs is itself a sum of up to 151,936 terms in float64, often the very sum that plain torch
    makes, whose error then is 0. What such a sum rounds off in any order, sqrt(V) ulps, is no error of ours.
    """
    assert torch.isfinite(ours).all()
    scale = max(float(truth.abs().amax()), floor) if truth.numel() else floor
    error, theirs = (((x.double() - truth).abs().amax() if truth.numel() else 0.0) for x in (ours, naive))
    if ours.dtype == torch.float64:
        ulps = max(ulps, 400.0)
    bound = k * theirs + ulps * torch.finfo(ours.dtype).eps * scale
    assert error <= bound, f"error {float(error):.3g}, plain torch {float(theirs):.3g}, bound {float(bound):.3g}"


def layouts(x: torch.Tensor) -> dict[str, torch.Tensor]:
    """The same [N, V] values under other strides; what lies between them is NaN and must not be read."""
    n, v = x.shape
    wide = x.new_full((2 * n + 1, 3 * v + 2), torch.nan)
    wide[1::2, 2::3] = x
    tall = x.new_full((v + 3, n + 1), torch.nan)
    tall[2 : v + 2, :n] = x.T
    padded = x.new_full((n, v + 5), torch.nan)
    padded[:, 3 : v + 3] = x
    return {"strided": wide[1::2, 2::3], "transposed": tall[2 : v + 2, :n].T, "sliced": padded[:, 3 : v + 3]}


def good_and_bad(v: int, dtype: torch.dtype = torch.float64) -> tuple[torch.Tensor, torch.Tensor]:
    """(logits [8, V], bool [8] of the good rows): bad rows lie between good ones."""
    x = peaked(8, v, dtype, seed=5)
    x[1, v // 2] = torch.nan
    x[2, v - 1] = torch.inf
    x[4] = -torch.inf
    x[5] = torch.nan
    x[6, 0], x[6, v - 1] = torch.inf, torch.nan
    return x, torch.tensor([True, False, False, True, False, False, False, True])
