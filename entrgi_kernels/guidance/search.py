"""What is done with the trajectories of a prompt beside guidance: resampling them, or proposing several continuations.

Both permute rows of the canvas at the beginning of a step, when the model's logits say where each trajectory is likely
to end. Draws are keyed by row, so that copies part at once. Neither needs a gradient.

smc   Feynman-Kac steering (arXiv 2501.06848). The trajectories of a prompt are particles. Every r steps a particle's
      weight is multiplied by a potential of the predicted rewards: exp((r_t - r_last) / lambda) ("difference"),
      exp(max r / lambda) ("max") or exp(sum r / lambda) ("sum"). Where the effective sample size falls below a share of
      K the particles are resampled. The last potential is of the finished text, divided by all before it, so that what
      is returned is distributed as p(x) exp(r(x) / lambda) in the limit. The self-rewarding form (arXiv 2602.01849)
      takes the log-probabilities of the committed tokens for a reward, and needs none.
svdd  Soft value-based decoding (arXiv 2408.08252): B candidates of each trajectory are drawn at every step, and the one
      whose predicted end has the highest reward goes on.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from ..backends import philox
from ..ops import make_rng
from .canvas import Canvas
from .config import MAX_STEPS, GuidanceConfig
from .keys import RESAMPLING, draw_counter


class Search:
    """Which rows of a canvas go on, and as copies of which.

    Args:
        config: settings; `search` is "smc" or "svdd".
        canvas: all trajectories, those of a group one after the other.
        groups: each row's group: the particles of a prompt, or the candidates of a trajectory.
        predicted: rewards [R] of likely completions, tokens [R, L].
        finished: rewards [R] of finished responses, tokens [R, L].

    Attributes:
        log_probs: [R], of the tokens committed since the last potential; the loop adds to it.
        evaluations: how often rewards were asked for.
        canvas: the trajectories. A block's canvas takes its place while the block is filled.
        also: further tensors [R, ..] that are permuted with it.
    """

    def __init__(
        self,
        config: GuidanceConfig,
        canvas: Canvas,
        groups: list[int],
        predicted: Callable[[torch.Tensor], torch.Tensor],
        finished: Callable[[torch.Tensor], torch.Tensor],
    ) -> None:
        self._config, self._predicted, self._finished = config, predicted, finished
        self.canvas: Canvas = canvas
        self.also: list[torch.Tensor] = []
        self._groups = [[row for row, group in enumerate(groups) if group == one] for one in dict.fromkeys(groups)]
        rows = len(groups)
        self.log_probs = torch.zeros(rows, dtype=torch.float64, device=canvas.tokens.device)
        self.evaluations = 0
        self._log_weights, self._potentials = torch.zeros(rows, dtype=torch.float64), torch.zeros(rows).double()
        self._last, self._highest, self._sum = (torch.zeros(rows, dtype=torch.float64) for _ in range(3))
        self._seen = False

    def permute(self, index: torch.Tensor) -> None:
        """Every row of the canvas becomes a copy of the row in `index`, int64 [R]; its keys stay its own."""
        for tensor in (self.canvas.tokens, self.canvas.masked, *self.also):
            tensor.copy_(tensor[index])

    def due(self, step: int) -> bool:
        """Whether rows may change places in a step."""
        return self._config.search == "svdd" or (step > 0 and step % self._config.search_every == 0)

    def select(self, step: int, best: torch.Tensor) -> list[int] | None:
        """Which row each row is a copy of from now on; None where all stay. Waits for the device.

        Args:
            step: the denoising step.
            best: [R, L], likely completions.
        """
        return self._choose(step, self._values(self._predicted, best), last=False)

    def finish(self, step: int, response: torch.Tensor) -> list[int] | None:
        """As :meth:`select`, of finished responses; of svdd's candidates the first of each group is the one kept."""
        return self._choose(step, self._values(self._finished, response), last=True)

    def finish_rows(self, step: int, canvas: Canvas, traces: list[list[Any]] | None) -> None:
        """Take the last choice, of a finished canvas and its traces."""
        self.canvas, self.also = canvas, []
        ancestors = self.finish(step % MAX_STEPS, canvas.response)
        if ancestors is None:
            return
        self.permute(torch.tensor(ancestors, device=canvas.tokens.device))
        if traces is not None:
            traces[:] = [list(traces[one]) for one in ancestors]

    def _values(self, score: Callable[[torch.Tensor], torch.Tensor], tokens: torch.Tensor) -> torch.Tensor:
        if self._config.self_rewarding:
            return self.log_probs.cpu()
        self.evaluations += 1
        return score(tokens).detach().double().cpu()

    def _choose(self, step: int, values: torch.Tensor, last: bool) -> list[int] | None:
        # A value that is not finite is no reward: such a row is never chosen over one that has any.
        values = torch.where(values.isfinite(), values, -torch.inf)
        if self._config.search == "svdd":
            ancestors = list(range(len(values)))
            for rows in self._groups:
                chosen = rows[int(values[rows].argmax())]
                for row in rows:
                    ancestors[row] = chosen
        else:
            ancestors = self._resampled(step, values, last)
        if ancestors == list(range(len(ancestors))):
            return None
        index = torch.tensor(ancestors)
        for name in ("_log_weights", "_potentials", "_last", "_highest", "_sum"):
            setattr(self, name, getattr(self, name)[index])
        self.log_probs = self.log_probs[index.to(self.log_probs.device)]
        return ancestors

    def _resampled(self, step: int, values: torch.Tensor, last: bool) -> list[int]:
        config = self._config
        scaled = values / config.search_temperature
        if config.self_rewarding:
            potential = scaled
            self.log_probs = torch.zeros_like(self.log_probs)
        elif last:
            potential = scaled - self._potentials
        elif config.potential == "difference":
            potential = scaled - self._last
        elif config.potential == "max":
            potential = torch.maximum(self._highest, scaled) if self._seen else scaled
        else:
            potential = self._sum + scaled
        self._highest = torch.maximum(self._highest, scaled) if self._seen else scaled
        self._last, self._sum, self._seen = scaled, self._sum + scaled, True
        self._potentials = self._potentials + potential
        # -inf - -inf: a particle without a reward stays without a weight.
        self._log_weights = (self._log_weights + potential).nan_to_num(nan=-torch.inf, posinf=torch.inf)
        ancestors = list(range(len(values)))
        for rows in self._groups:
            weights = self._log_weights[rows]
            if not bool(weights.isfinite().any()):
                continue  # nothing tells them apart
            shares = torch.softmax(weights, dim=0)
            effective = 1 / float(shares.square().sum())
            # At the end particles of unequal weight are no samples; copies are.
            if config.resample_below and (last or effective < config.resample_below * len(rows)):
                for row, chosen in zip(rows, systematic(shares, self._uniform(step, rows[0])), strict=True):
                    ancestors[row] = rows[chosen]
                self._log_weights[rows] = 0.0
        return ancestors

    def _uniform(self, step: int, row: int) -> float:
        """In [0, 1), of the prompt and the step alone."""
        key = self.canvas.keys[row, :1]
        rng = make_rng(key, self._config.seed, draw_counter(step, RESAMPLING))
        return float(philox.uniform(rng, key, torch.zeros_like(key)))


def systematic(shares: torch.Tensor, uniform: float) -> list[int]:
    """Systematic resampling: K places at (i + uniform) / K on the cumulated shares [K].

    A member of share w is drawn K w times, rounded down or up. Those that go on keep their places.

    Returns:
        For each place the member it is a copy of.
    """
    count = len(shares)
    places = (torch.arange(count, dtype=shares.dtype) + uniform) / count
    drawn = torch.searchsorted(shares.cumsum(0), places, right=True).clamp(max=count - 1).tolist()
    copies = [drawn.count(member) for member in range(count)]
    spare = [member for member, times in enumerate(copies) for _ in range(times - 1)]
    return [place if copies[place] else spare.pop(0) for place in range(count)]
