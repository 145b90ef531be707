"""A whole guided generation at a real vocabulary's size: the published loop, the same with batched steps, ours, floor.

The floor is what the two models alone cost: as many forwards of the diffusion LM (head on the masked rows only) and as
many forwards and backwards of the reward model as our sampler makes, nothing between them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from benchmarks.baselines import StepSettings, Vectorized
from benchmarks.inputs import VOCABULARY, Shape
from benchmarks.loop import LoopSettings, PublishedLoop
from benchmarks.measure import Candidate, Group, measure
from benchmarks.models import World, make_world
from benchmarks.oracle import Check

PROMPTS = ["w11 w5 w300 w7 w2 w19", "w800 w20"]
FLOOR = "models alone"


@dataclass(frozen=True)
class Size:
    """How large a generation is measured. `d`: reward embedding width; the rest as in :class:`LoopSettings`."""

    v: int = VOCABULARY
    d: int = 1024
    num_samples: int = 2
    max_new_tokens: int = 16
    steps: int = 8
    guidance_steps: int = 3

    @property
    def settings(self) -> LoopSettings:
        return LoopSettings(self.num_samples, self.max_new_tokens, self.steps, self.guidance_steps)

    @property
    def rows(self) -> int:
        """Masked positions at the first denoising step: N there, falling to N / steps at the last."""
        return len(PROMPTS) * self.num_samples * self.max_new_tokens


QUICK = Size(d=256, max_new_tokens=8, steps=4)


def world_of(size: Size, dtype: torch.dtype) -> World:
    """Random models of that size."""
    return make_world(v=size.v, d=size.d, dtype=dtype)


def sampler(world: World, size: Size, backend: str = "auto") -> Any:
    """Our sampler on the same models and settings."""
    import entrgi_kernels

    model = entrgi_kernels.models.MaskedDiffusion(world.model, world.tokenizer.mask_token_id, shift=True)
    s = size.settings
    return entrgi_kernels.GuidedSampler(
        model,
        world.reward_model,
        world.tokenizer,
        world.reward_tokenizer,
        backend=backend,
        batch_size=len(PROMPTS),
        num_samples=s.num_samples,
        max_new_tokens=s.max_new_tokens,
        steps=s.steps,
        guidance_steps=s.guidance_steps,
        learning_rate=s.step.lr,
        temperature=s.step.temperature,
        top_p=s.step.top_p,
    )


def check_same_tokens(backend: str = "eager") -> Check:
    """The gate: with top_k = 1 nothing is random, and both loops must produce the same tokens, on tiny float64 models.

    The models measured are random and their texts mean nothing, so equality is tested where rounding cannot decide.
    """
    size = Size(v=211, d=16, num_samples=2, max_new_tokens=6, steps=4, guidance_steps=2)
    world = make_world(v=size.v, d=size.d, width=16, dtype=torch.float64)
    s = size.settings
    greedy = LoopSettings(s.num_samples, s.max_new_tokens, s.steps, s.guidance_steps, StepSettings(top_k=1))
    theirs = PublishedLoop(world.model, world.tokenizer, world.reward_model, world.reward_tokenizer, greedy)
    expected = [[ids for ids, _ in samples] for samples in theirs.generate(PROMPTS)]
    results = sampler(world, size, backend).generate(PROMPTS, top_k=1, suppress_undrawable=False, progress=False)
    same = [[sample.tokens for sample in result.samples] for result in results] == expected
    return Check(same, "tokens of a greedy generation equal the published loop's")


def check_ours(world: World, size: Size, backend: str) -> Check:
    """The gate of a backend: the loop's tokens on tiny models, and a short run at full size with finite rewards."""
    tiny = check_same_tokens(backend)
    if not tiny.passed:
        return tiny
    one = Size(size.v, size.d, 1, 4, 2, 1)
    run = sampler(world, one, backend).generate(PROMPTS[:1], progress=False)[0]
    tokens, mask_id = run.samples[0].tokens, world.tokenizer.mask_token_id
    good = bool(torch.isfinite(torch.tensor(run.rewards)).all()) and len(tokens) == 4 and mask_id not in tokens
    return Check(good, "finite rewards and full responses at full size")


def models_alone(world: World, size: Size) -> Candidate:
    """The floor; see the module's text."""
    import entrgi_kernels

    model = entrgi_kernels.models.MaskedDiffusion(world.model, world.tokenizer.mask_token_id, shift=True)
    reward = entrgi_kernels.rewards.wrap(world.reward_model, world.reward_tokenizer)
    count, length = len(PROMPTS) * size.num_samples, size.max_new_tokens
    prepared = reward.prepare([[{"role": "user", "content": prompt}] for prompt in PROMPTS])
    index = torch.arange(len(PROMPTS)).repeat_interleave(size.num_samples)
    prompt = torch.full((count, 9), world.tokenizer.convert_tokens_to_ids("w3"))
    canvas = torch.cat([prompt, torch.full((count, length), world.tokenizer.mask_token_id)], dim=1)
    attention = torch.ones_like(canvas, dtype=torch.bool)
    alive = torch.ones(count, length, dtype=torch.bool)
    dtype = world.reward_model.get_input_embeddings().weight.dtype
    embeddings = torch.randn(count, length, size.d).to(dtype).requires_grad_()

    def run() -> None:
        for step in range(size.steps):
            left = max(1, round(length * (1 - step / size.steps)))
            masked = torch.zeros_like(attention)
            masked[:, -left:] = True
            model.masked_logits(canvas, attention, masked)
            for _ in range(size.guidance_steps):
                torch.autograd.grad(-reward.score_embeddings(prepared, index, embeddings, alive).sum(), embeddings)

    return Candidate(FLOOR, run, floor=True)


def candidates(
    world: World, size: Size, backends: Sequence[str] = ("auto",), vectorized: bool = True
) -> list[Candidate]:
    """The published loop, the same with batched steps, our sampler for each backend, and the floor."""
    parts = (world.model, world.tokenizer, world.reward_model, world.reward_tokenizer, size.settings)
    loops = {"published": PublishedLoop(*parts)}
    if vectorized:
        loops["vectorized"] = PublishedLoop(*parts, step=Vectorized)
    made = [
        Candidate(name, lambda loop=loop: loop.generate(PROMPTS), check_same_tokens) for name, loop in loops.items()
    ]
    for backend in backends:
        ours = sampler(world, size, backend)
        made.append(
            Candidate(
                backend,
                lambda ours=ours: ours.generate(PROMPTS, progress=False),
                lambda backend=backend: check_ours(world, size, backend),
            )
        )
    return [*made, models_alone(world, size)]


def measure_generation(
    *,
    quick: bool = False,
    dtypes: Sequence[torch.dtype] = (torch.bfloat16, torch.float32),
    backends: Sequence[str] = ("auto",),
    budget: float = 60.0,
    size: Size | None = None,
) -> list[Group]:
    """Gate and time whole generations; the shape's N is that of the first denoising step."""
    size = size or (QUICK if quick else Size())
    groups = []
    for dtype in dtypes:
        world = world_of(size, dtype)
        groups.append(
            measure(
                "generation",
                dtype,
                Shape(size.rows, size.d, size.v),
                candidates(world, size, backends),
                budget=budget,
                rounds=(1, 5),
                warmup=0 if not quick else 1,
                memory=False,
            )
        )
    return groups
