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

from collections.abc import Callable, Sequence
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
        self._last, self._sum = (torch.zeros(rows, dtype=torch.float64) for _ in range(2))
        self._highest = torch.full((rows,), -torch.inf, dtype=torch.float64)
        self._started = [False] * len(self._groups)

    def permute(self, index: torch.Tensor) -> None:
        """Every row of the canvas becomes a copy of the row in `index`, int64 [R]; its keys stay its own."""
        for tensor in (self.canvas.tokens, self.canvas.masked, *self.also):
            tensor.copy_(tensor[index])

    def working(self, step: int, commits: Sequence[int]) -> list[list[int]]:
        """The groups whose rows may change places in a step; to be asked at every step.

        A step in which nothing is committed to a group is none to it: whether one is taken at all depends on the other
        prompts of the batch and on the savings. Nor is the first, before which its rows are one and the same.

        Args:
            step: the denoising step.
            commits: how many slots of each row the step may commit.

        Returns:
            The rows of each such group.
        """
        due = self._config.search == "svdd" or (step > 0 and step % self._config.search_every == 0)
        found = []
        for number, rows in enumerate(self._groups):
            if any(commits[row] for row in rows):
                if due and self._started[number]:
                    found.append(rows)
                self._started[number] = True
        return found

    def select(self, step: int, best: torch.Tensor, groups: list[list[int]]) -> list[int] | None:
        """Which row each row is a copy of from now on; None where all stay. Waits for the device.

        Args:
            step: the denoising step.
            best: [R, L], likely completions.
            groups: of :meth:`working`; the others stay as they are.
        """
        return self._choose(step, self._values(self._predicted, best), groups, last=False)

    def finish(self, step: int, response: torch.Tensor) -> list[int] | None:
        """As :meth:`select`, of finished responses; of svdd's candidates the first of each group is the one kept."""
        return self._choose(step, self._values(self._finished, response), self._groups, last=True)

    def finish_rows(self, step: int, canvas: Canvas, traces: list[list[Any]] | None) -> None:
        """Take the last choice, of a finished canvas and its traces.

        Args:
            step: a number that no denoising step had, for its draws.
        """
        self.canvas, self.also = canvas, []
        # Nothing is resampled at step 0, so that its number is free where there is none above.
        ancestors = self.finish(step if step < MAX_STEPS else 0, canvas.response)
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

    def _choose(self, step: int, values: torch.Tensor, groups: list[list[int]], last: bool) -> list[int] | None:
        # A value that is not finite is no reward: such a row is never chosen over one that has any.
        values = torch.where(values.isfinite(), values, -torch.inf)
        if self._config.search == "svdd":
            ancestors = list(range(len(values)))
            for rows in groups:
                chosen = rows[int(values[rows].argmax())]
                for row in rows:
                    ancestors[row] = chosen
        else:
            ancestors = self._resampled(step, values, groups, last)
        if ancestors == list(range(len(ancestors))):
            return None
        index = torch.tensor(ancestors)
        for name in ("_log_weights", "_potentials", "_last", "_highest", "_sum"):
            setattr(self, name, getattr(self, name)[index])
        self.log_probs = self.log_probs[index.to(self.log_probs.device)]
        return ancestors

    def _resampled(self, step: int, values: torch.Tensor, groups: list[list[int]], last: bool) -> list[int]:
        config = self._config
        here = torch.tensor([row for rows in groups for row in rows], dtype=torch.int64)
        scaled = values[here] / config.search_temperature
        highest, total = torch.maximum(self._highest[here], scaled), self._sum[here] + scaled
        if config.self_rewarding:
            potential = scaled
            self.log_probs = self.log_probs.index_fill(0, here.to(self.log_probs.device), 0.0)
        elif last:
            potential = scaled - self._potentials[here]
        elif config.potential == "difference":
            potential = scaled - self._last[here]
        else:
            potential = highest if config.potential == "max" else total
        self._highest[here], self._last[here], self._sum[here] = highest, scaled, total
        self._potentials[here] += potential
        # -inf - -inf: a particle without a reward stays without a weight.
        self._log_weights[here] = (self._log_weights[here] + potential).nan_to_num(nan=-torch.inf, posinf=torch.inf)
        ancestors = list(range(len(values)))
        for rows in groups:
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
