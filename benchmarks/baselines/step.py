"""Guidance steps to compare with: the published loop, its batched form, and that compiled.

All three are written here from the method's definition and share one interface: an object made from (phi, table,
canvas, settings) holds phi and fresh Adam state; `.step(reward, tokens=None)` makes one gradient step. `tokens` injects
the hard tokens, so that arithmetic can be compared without a common random source.

published    what people run today: a Python loop over trajectories, softmax and entropy as separate passes in phi's
             dtype, a sort for top-p, torch.multinomial, index_put, a scan for EOS that reads one token at a time,
             torch.optim.Adam over N x V gradients.
vectorized   the same maths over all rows at once: no loop, no reads back to Python, an exponential race in place of
             multinomial, fused Adam.
compiled     `vectorized` through torch.compile, Adam included.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

import torch
import torch.nn.functional as F

from benchmarks.harness.inputs import Canvas, Reward, StepSettings


@dataclass
class StepResult:
    """What one step computed: embedding [N, D], tokens [N] int64, weight [N], entropy [N] nats, rewards [B].

    `grad` is the gradient of the loss for phi, [N, V], where the implementation has one; fused ones never do.
    """

    embedding: torch.Tensor
    tokens: torch.Tensor
    weight: torch.Tensor
    entropy: torch.Tensor
    rewards: torch.Tensor
    grad: torch.Tensor | None = None


class GuidanceStep(Protocol):
    """The common interface; see the module's text."""

    phi: torch.Tensor

    def step(self, reward: Reward, tokens: torch.Tensor | None = None) -> StepResult: ...


def sorted_nucleus_filter(scaled: torch.Tensor, top_p: float) -> torch.Tensor:
    """Logits with everything outside the top-p nucleus at the dtype's lowest value; the token that crosses p stays."""
    ordered, order = scaled.sort(dim=-1, descending=True)
    mass = ordered.softmax(dim=-1).cumsum(dim=-1)
    drop = torch.cat([torch.zeros_like(mass[..., :1], dtype=torch.bool), mass[..., :-1] > top_p], dim=-1)
    return scaled.masked_fill(torch.zeros_like(drop).scatter(-1, order, drop), torch.finfo(scaled.dtype).min)


def kth_value_filter(scaled: torch.Tensor, top_k: int) -> torch.Tensor:
    """Logits with everything below the k-th largest at the dtype's lowest value; ties of the k-th value stay."""
    least = scaled.topk(min(top_k, scaled.shape[-1]), dim=-1).values[..., -1:]
    return scaled.masked_fill(scaled < least, torch.finfo(scaled.dtype).min)


def filtered(scaled: torch.Tensor, settings: StepSettings) -> torch.Tensor:
    """top-p, then top-k."""
    if settings.top_p < 1.0:
        scaled = sorted_nucleus_filter(scaled, settings.top_p)
    if settings.top_k is not None:
        scaled = kth_value_filter(scaled, settings.top_k)
    return scaled


def scan_alive(tokens: torch.Tensor, eos_id: int, pad_id: int) -> torch.Tensor:
    """Living positions [B, L], read token by token as the published loop does: one host sync each on a GPU."""
    alive = torch.ones_like(tokens, dtype=torch.bool)
    for row in range(tokens.shape[0]):
        ended = False
        for place in range(tokens.shape[1]):
            token = tokens[row, place].item()
            if ended or token == pad_id:
                alive[row, place] = False
            ended = ended or token == eos_id
    return alive


def batched_alive(tokens: torch.Tensor, eos_id: int, pad_id: int) -> torch.Tensor:
    """The same as :func:`scan_alive` in three tensor operations."""
    eos = tokens == eos_id
    before = eos.long().cumsum(dim=-1) - eos.long()
    return (before == 0) & (tokens != pad_id)


class Published:
    """The per-trajectory loop as people run it today."""

    name = "published"
    # Added to probabilities inside the logarithm of the entropy. It shifts H by up to V * 1e-10 nats: far below what
    # bf16 can tell, but visible in float64, so comparisons with exact arithmetic set it to 0.
    log_epsilon = 1e-10

    def __init__(self, phi: torch.Tensor, table: torch.Tensor, canvas: Canvas, settings: StepSettings) -> None:
        self.phi = phi.detach().clone().requires_grad_(True)
        self.table, self.canvas, self.settings = table, canvas, settings
        self.optimizer = torch.optim.Adam([self.phi], lr=settings.lr, betas=settings.betas, eps=settings.eps)

    def _rows(self, phi: torch.Tensor, tokens: torch.Tensor | None) -> tuple[torch.Tensor, ...]:
        """One trajectory's masked rows: embedding, hard tokens, weight, entropy."""
        settings, table = self.settings, self.table
        probability = F.softmax(phi, dim=-1)
        entropy = -(probability * torch.log(probability + self.log_epsilon)).sum(dim=-1)
        limit = torch.log(torch.tensor(phi.shape[-1], dtype=phi.dtype, device=phi.device))
        weight = {
            "entropy": lambda: (entropy / limit).detach(),
            "one": lambda: torch.ones_like(entropy).detach(),
            "zero": lambda: torch.zeros_like(entropy).detach(),
        }[settings.weight]()
        scaled = phi / settings.temperature
        soft = torch.matmul(F.softmax(scaled, dim=-1).to(table.dtype), table)
        if settings.weight == "zero":
            none = torch.full((phi.shape[0],), -1, dtype=torch.int64, device=phi.device)
            return soft, none, weight, entropy
        if tokens is None:
            tokens = torch.multinomial(F.softmax(filtered(scaled, settings), dim=-1), 1).squeeze(-1)
        elif settings.top_p < 1.0 or settings.top_k is not None:
            filtered(scaled, settings)
        mixed = soft + weight.to(table.dtype).unsqueeze(-1) * (table[tokens] - soft).detach()
        return mixed, tokens, weight, entropy

    def step(self, reward: Reward, tokens: torch.Tensor | None = None) -> StepResult:
        canvas, table = self.canvas, self.table
        self.optimizer.zero_grad()
        ids = canvas.tokens.clone()
        responses, parts, row = [], [], 0
        for b in range(ids.shape[0]):
            response = torch.zeros(ids.shape[1], table.shape[1], dtype=table.dtype, device=table.device)
            fixed = torch.where(~canvas.masked[b])[0]
            if len(fixed) > 0:
                response = response.index_put((fixed,), table[canvas.tokens[b, fixed]])
            places = torch.where(canvas.masked[b])[0]
            if len(places) > 0:
                phi = self.phi[row : row + len(places)]
                part = self._rows(phi, None if tokens is None else tokens[row : row + len(places)])
                response = response.index_put((places,), part[0])
                ids[b, places] = phi.argmax(dim=-1)
                row += len(places)
                parts.append(part)
            responses.append(response)
        alive = scan_alive(ids, canvas.eos_id, canvas.pad_id)
        rewards = reward(torch.stack(responses), alive)
        (-rewards.sum()).backward()
        self.optimizer.step()
        columns = [torch.cat(column).detach() for column in zip(*parts, strict=True)]
        return StepResult(*columns, rewards.detach(), self.phi.grad)


def batched_forward(
    phi: torch.Tensor,
    table: torch.Tensor,
    tokens: torch.Tensor | None,
    temperature: float,
    top_p: float,
    top_k: int | None,
    weight: str,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """All rows at once: (embedding [N, D], tokens [N], weight [N], entropy [N], argmax [N]); differentiable in phi."""
    soft = torch.matmul(F.softmax(phi / temperature, dim=-1).to(table.dtype), table)
    with torch.no_grad():
        entropy = torch.special.entr(F.softmax(phi, dim=-1)).sum(dim=-1)
        best = phi.argmax(dim=-1)
        if weight == "zero":
            return soft, torch.full_like(best, -1), torch.zeros_like(entropy), entropy, best
        share = entropy / math.log(phi.shape[-1]) if weight == "entropy" else torch.ones_like(entropy)
        if tokens is None:
            tokens = batched_draw(phi, temperature, top_p, top_k)
        shift = share.to(table.dtype).unsqueeze(-1) * (table[tokens] - soft)
    return soft + shift, tokens, share, entropy, best


def batched_draw(phi: torch.Tensor, temperature: float, top_p: float, top_k: int | None) -> torch.Tensor:
    """One token per row from the filtered softmax: sort, cumulative mass, exponential race over the sorted row."""
    ordered, order = (phi / temperature).sort(dim=-1, descending=True)
    mass = ordered.softmax(dim=-1)
    keep = mass.cumsum(dim=-1) - mass <= top_p
    keep[..., 0] = True
    if top_k is not None:
        keep &= ordered >= ordered[..., min(top_k, ordered.shape[-1]) - 1, None]
    race = torch.where(keep, mass, 0.0) / torch.empty_like(mass).exponential_().clamp_min_(1e-30)
    return order.gather(-1, race.argmax(dim=-1, keepdim=True)).squeeze(-1)


def adam_(
    phi: torch.Tensor,
    grad: torch.Tensor,
    mean: torch.Tensor,
    square: torch.Tensor,
    scale: torch.Tensor,
    settings: StepSettings,
) -> None:
    """Adam in place. scale [2]: lr / (1 - beta1^t) and sqrt(1 - beta2^t), tensors so that no step number recompiles."""
    beta1, beta2 = settings.betas
    mean.lerp_(grad, 1 - beta1)
    square.mul_(beta2).addcmul_(grad, grad, value=1 - beta2)
    phi.sub_(scale[0] * mean / (square.sqrt() / scale[1] + settings.eps))


class Vectorized:
    """The same step over all rows at once, in eager torch."""

    name = "vectorized"
    forward: Callable[..., Any] = staticmethod(batched_forward)

    def __init__(self, phi: torch.Tensor, table: torch.Tensor, canvas: Canvas, settings: StepSettings) -> None:
        self.phi = phi.detach().clone().requires_grad_(True)
        self.table, self.canvas, self.settings = table, canvas, settings
        self.committed = table[canvas.tokens]
        self.places = canvas.masked.nonzero(as_tuple=True)
        self._make_optimizer()

    def _make_optimizer(self) -> None:
        s = self.settings
        self.optimizer = torch.optim.Adam([self.phi], lr=s.lr, betas=s.betas, eps=s.eps, fused=True)

    def update(self) -> None:
        self.optimizer.step()

    def step(self, reward: Reward, tokens: torch.Tensor | None = None) -> StepResult:
        s, canvas = self.settings, self.canvas
        self.phi.grad = None
        embedding, tokens, weight, entropy, best = self.forward(
            self.phi, self.table, tokens, s.temperature, s.top_p, s.top_k, s.weight
        )
        responses = self.committed.index_put(self.places, embedding)
        alive = batched_alive(canvas.tokens.index_put(self.places, best), canvas.eos_id, canvas.pad_id)
        rewards = reward(responses, alive)
        (-rewards.sum()).backward()
        self.update()
        return StepResult(embedding.detach(), tokens, weight, entropy, rewards.detach(), self.phi.grad)


class Compiled(Vectorized):
    """`Vectorized` with its forward (and through it the backward) and Adam compiled."""

    name = "compiled"
    _compiled: dict[str, Any] = {}

    def _make_optimizer(self) -> None:
        if not self._compiled:
            self._compiled["forward"] = torch.compile(batched_forward, dynamic=False)
            self._compiled["adam"] = torch.compile(adam_, dynamic=False)
        self.forward = self._compiled["forward"]
        self.mean, self.square = torch.zeros_like(self.phi.data), torch.zeros_like(self.phi.data)
        self.count = 0

    def update(self) -> None:
        self.count += 1
        (beta1, beta2), lr = self.settings.betas, self.settings.lr
        scale = torch.tensor(
            [lr / (1 - beta1**self.count), math.sqrt(1 - beta2**self.count)],
            dtype=torch.float64 if self.phi.dtype == torch.float64 else torch.float32,
            device=self.phi.device,
        )
        assert self.phi.grad is not None
        with torch.no_grad():
            self._compiled["adam"](self.phi.data, self.phi.grad, self.mean, self.square, scale, self.settings)


BASELINES: dict[str, Callable[[torch.Tensor, torch.Tensor, Canvas, StepSettings], Any]] = {
    cls.name: cls for cls in (Published, Vectorized, Compiled)
}
