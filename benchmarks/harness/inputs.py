"""Inputs of the benchmarks: logits peaked like a trained model's, embedding tables, canvases, shapes, settings.

How the logits are made. Every row is

    background_v = 2 * gauss + bias_v;  bias_v = -log(rank of v), centred: a Zipf-like unigram bias shared by the rows
    candidates   = 1 to 64 tokens per row, the best at logsumexp(background) + margin, each next one 0.4 to 3 lower
    margin       = evenly spread over [-6, 12] over the rows, shuffled

so that rows run from certain (margin 12: about 0 nats, a nucleus of one token) to open (margin -6: several nats, a
nucleus of thousands of tokens), as the masked positions of a half-denoised text do. Logits of zeros, or plain Gaussian
ones, would flatter or punish a sampler that looks at the tail: rows of one shape are not what it meets.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch

from entrgi_kernels.names import WEIGHT_MODES

VOCABULARY = 151_936
# (N, D) of the canonical shapes; V is VOCABULARY. The first two stay within 24 GiB for every baseline on a CPU.
CANONICAL = ((64, 1024), (512, 1024), (1024, 2048), (2048, 2048), (4096, 2560))
CPU_SHAPES = ((64, 1024), (512, 1024))
SMALL_N = (1, 7)

Reward = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]


@dataclass(frozen=True)
class Shape:
    """Rows, vocabulary and embedding width of one measurement."""

    n: int
    d: int
    v: int = VOCABULARY

    @property
    def label(self) -> str:
        return f"N{self.n} V{self.v} D{self.d}"

    def to_dict(self) -> dict[str, int]:
        return {"N": self.n, "V": self.v, "D": self.d}

    @classmethod
    def parse(cls, text: str) -> Shape:
        """Read "N,D" or "N,D,V".

        Raises:
            ValueError: anything else, or a number below 1.
        """
        try:
            numbers = [int(part) for part in text.lower().replace("x", ",").split(",")]
        except ValueError:
            numbers = []
        if len(numbers) not in (2, 3) or min(numbers) < 1:
            raise ValueError(f"shape {text!r}: expected N,D or N,D,V with positive integers, for example 64,1024")
        return cls(*numbers)


@dataclass(frozen=True)
class StepSettings:
    """Settings of a guidance step; the defaults are the published ones. `weight`: "entropy", "one" or "zero"."""

    temperature: float = 0.7
    top_p: float = 0.95
    top_k: int | None = None
    lr: float = 0.5
    weight: str = "entropy"
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-8

    def __post_init__(self) -> None:
        if self.weight not in WEIGHT_MODES:
            raise ValueError(f"weight={self.weight!r}: expected one of {WEIGHT_MODES}")


@dataclass
class Canvas:
    """The response part of the trajectories that a guidance step works on.

    Attributes:
        tokens: [B, L] int64, the committed tokens; the entries under `masked` are not read.
        masked: [B, L] bool, True where a token is still to be found; these positions, row by row, are phi's rows.
        eos_id: the token after which a response is dead.
        pad_id: the token that is dead itself.
    """

    tokens: torch.Tensor
    masked: torch.Tensor
    eos_id: int
    pad_id: int


def peaked_logits(
    n: int, v: int = VOCABULARY, *, dtype: torch.dtype = torch.float32, device: str = "cpu", seed: int = 0
) -> torch.Tensor:
    """Logits [n, v] peaked like a trained model's (see the module's text).

    Args:
        n: rows. v: vocabulary size.
        dtype: of the result; the values are made in float32.
        seed: same seed, same values on the same device type.
    """
    generator = torch.Generator(device).manual_seed(seed)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator, device=device)

    def uniform(*shape: int) -> torch.Tensor:
        return torch.rand(*shape, generator=generator, device=device)

    rank = torch.randperm(v, generator=generator, device=device).float() + 1
    bias = -rank.log()
    bias -= bias.mean()
    spread = torch.linspace(-6.0, 12.0, n, device=device) if n > 1 else torch.full((1,), 3.0, device=device)
    margins = spread[torch.randperm(n, generator=generator, device=device)]
    counts = (2.0 ** (6 * uniform(n))).long()
    logits = torch.empty(n, v, dtype=dtype, device=device)
    block = max(1, (1 << 25) // v)  # rows at a time, so that float32 copies of all rows never exist
    for start in range(0, n, block):
        rows = range(start, min(n, start + block))
        chunk = normal(len(rows), v).mul_(2.0).add_(bias)
        top = torch.logsumexp(chunk, dim=-1)
        for i, row in enumerate(rows):
            count = min(int(counts[row]), v)
            places = torch.randint(0, v, (count,), generator=generator, device=device)
            steps = 0.4 + 2.6 * uniform(count)
            chunk[i, places] = top[i] + margins[row] - (steps.cumsum(0) - steps[0])
        logits[rows.start : rows.stop] = chunk.to(dtype)
    return logits


def embedding_table(
    v: int, d: int, *, dtype: torch.dtype = torch.float32, device: str = "cpu", seed: int = 1
) -> torch.Tensor:
    """Reward embedding table [v, d]: Gaussian with deviation 0.02, the usual scale of trained tables."""
    generator = torch.Generator(device).manual_seed(seed)
    table = torch.empty(v, d, dtype=dtype, device=device)
    block = max(1, (1 << 25) // d)
    for start in range(0, v, block):
        stop = min(v, start + block)
        table[start:stop] = torch.randn(stop - start, d, generator=generator, device=device).mul_(0.02).to(dtype)
    return table


def canvas(n: int, v: int, *, length: int = 128, device: str = "cpu", seed: int = 2) -> Canvas:
    """A canvas with `n` masked positions over trajectories of `length` response slots.

    At least 4 trajectories (the published K) where n allows, at most `length` masked positions in each.
    """
    generator = torch.Generator(device).manual_seed(seed)
    batch = max(min(4, n), math.ceil(n / length))
    tokens = torch.randint(0, v, (batch, length), generator=generator, device=device)
    masked = torch.zeros(batch, length, dtype=torch.bool, device=device)
    for b in range(batch):
        count = n // batch + (b < n % batch)
        masked[b, torch.randperm(length, generator=generator, device=device)[:count]] = True
    eos_id, pad_id = v - 1, v - 2 if v > 1 else v - 1
    return Canvas(tokens, masked, eos_id, pad_id)


def linear_reward(board: Canvas, d: int, *, dtype: torch.dtype = torch.float32, seed: int = 3) -> Reward:
    """A reward that costs next to nothing: <response embeddings, G> over the living positions, G fixed Gaussian.

    Its gradient is G, so a step measured with it is the vocabulary-sized work alone, with no reward model.
    """
    device = board.tokens.device
    generator = torch.Generator(device).manual_seed(seed)
    direction = torch.randn(*board.tokens.shape, d, generator=generator, device=device).mul_(d**-0.5).to(dtype)

    def reward(embeddings: torch.Tensor, alive: torch.Tensor) -> torch.Tensor:
        return (embeddings * direction * alive.unsqueeze(-1)).sum(dim=(1, 2))

    return reward
