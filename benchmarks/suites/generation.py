"""A whole guided generation at a real vocabulary's size: the published loop, the same with batched steps, ours, floor.

The floor is what the two models alone cost: the very forwards of the diffusion LM and forwards and backwards of the
reward model that our sampler's run makes, the final scoring among them, with nothing between. It is measured by
:mod:`benchmarks.suites.end_to_end`.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch

from benchmarks.baselines.loop import LoopSettings, PublishedLoop
from benchmarks.baselines.step import Published, Vectorized
from benchmarks.harness.inputs import VOCABULARY, Shape, StepSettings
from benchmarks.harness.measure import Candidate
from benchmarks.harness.models import DREAM_7B, QWEN3_1_7B, QWEN3_8B, Network, World, make_world
from benchmarks.harness.oracle import Check, combine

PROMPTS = ["w11 w5 w300 w7 w2 w19", "w800 w20"]
FLOOR = "models alone"


@dataclass(frozen=True)
class Size:
    """How large a generation is measured.

    `d`: width of a one-layer reward model, where `reward` gives no other; the loop's numbers as in
    :class:`LoopSettings`, with as many of :data:`PROMPTS` as `prompts` says (in turn), or prompts of `prompt_words`.
    `block_length`: decode block by block and compare that with whole canvases (:func:`block_samplers`).
    """

    v: int = VOCABULARY
    d: int = 1024
    num_samples: int = 2
    max_new_tokens: int = 16
    steps: int = 8
    guidance_steps: int = 3
    prompts: int = 2
    diffusion: Network | None = None
    reward: Network | None = None
    block_length: int | None = None
    prompt_words: int | None = None

    @property
    def settings(self) -> LoopSettings:
        return LoopSettings(self.num_samples, self.max_new_tokens, self.steps, self.guidance_steps)

    @property
    def texts(self) -> list[str]:
        if self.prompt_words is not None:
            return [" ".join(f"w{(37 * j + i) % 800}" for j in range(self.prompt_words)) for i in range(self.prompts)]
        return [PROMPTS[i % len(PROMPTS)] for i in range(self.prompts)]

    @property
    def rows(self) -> int:
        """Masked positions at the first denoising step: N there, falling to N / steps at the last."""
        return self.prompts * self.num_samples * self.max_new_tokens

    @property
    def shape(self) -> Shape:
        return Shape(self.rows, self.reward.width if self.reward else self.d, self.v)

    def world(self, dtype: torch.dtype, device: str = "cpu") -> World:
        """Random models of this size."""
        return make_world(v=self.v, d=self.d, diffusion=self.diffusion, reward=self.reward, dtype=dtype, device=device)


# What `python -m benchmarks.suites.end_to_end --preset` knows.
PRESETS = {
    # Nearly free models: what is left is the guidance itself.
    "guidance": Size(),
    # The published models' depth at an eighth of their width (a seventh, Dream's), with the published K, T = L and
    # prompts of about 1.5 L: as there, most of what remains is the models' own time.
    "small": Size(
        num_samples=4,
        max_new_tokens=8,
        diffusion=Network(512, 28, 2688, 8, 8, 64),
        reward=Network(256, 28, 2048, 4, 2, 64),
    ),
    "quick": Size(d=256, max_new_tokens=8, steps=4),
    # The published models' shapes and batch; 8 denoising steps stand for 128: a step costs the same on average.
    "dream": Size(152_064, 0, 4, 128, 8, 3, 4, DREAM_7B, QWEN3_1_7B),
    "published": Size(152_064, 0, 4, 128, 128, 3, 4, DREAM_7B, QWEN3_1_7B),
    # 256 slots in blocks of 32, four steps a block, on one prompt: about three minutes on two cores.
    "blocks": Size(
        32_000, 0, 2, 256, 32, 1, 1, Network(512, 8, 2688, 8, 8, 64), Network(256, 6, 2048, 4, 2, 64), 32, 64
    ),
    # The same of SDAR-8B's shape under the published reward and batch; 32 denoising steps stand for 256.
    "sdar": Size(VOCABULARY, 0, 4, 256, 32, 3, 4, QWEN3_8B, QWEN3_1_7B, 32, 128),
}
# Of presets by blocks: a block-causal model that keeps finished blocks, the same that keeps nothing, and a model that
# sees the whole canvas under the same settings, without blocks.
KEPT, UNKEPT, WHOLE = "kept blocks", "no caches", "whole canvas"


def sampler(world: World, size: Size, backend: str = "auto", model: Any = None, **settings: Any) -> Any:
    """Our sampler on the same models and settings, but for those given (`model`: another adapter)."""
    import entrgi_kernels

    if model is None:
        model = entrgi_kernels.models.MaskedDiffusion(world.model, world.tokenizer.mask_token_id, shift=True)
    loop = size.settings
    own = dict(
        backend=backend,
        batch_size=size.prompts,
        num_samples=loop.num_samples,
        max_new_tokens=loop.max_new_tokens,
        steps=loop.steps,
        guidance_steps=loop.guidance_steps,
        learning_rate=loop.step.lr,
        temperature=loop.step.temperature,
        top_p=loop.step.top_p,
    )
    models = (model, world.reward_model, world.tokenizer, world.reward_tokenizer)
    return entrgi_kernels.GuidedSampler(*models, **{**own, **settings})


def block_samplers(world: World, size: Size, backend: str = "auto") -> dict[str, Any]:
    """The samplers of a preset by blocks, all on the same network: :data:`KEPT`, :data:`UNKEPT`, :data:`WHOLE`."""
    from entrgi_kernels.models import BlockCausal

    assert size.block_length is not None
    mask = world.tokenizer.mask_token_id
    kept, unkept = (BlockCausal(world.model, mask, size.block_length) for _ in range(2))
    unkept.keeps_blocks = False  # whole canvases up to the open block, as networks are run whose cache does not serve
    whole = sampler(world, size, backend)
    return {KEPT: sampler(world, size, backend, kept), UNKEPT: sampler(world, size, backend, unkept), WHOLE: whole}


def check_same_blocks(keeps: bool, backend: str = "eager", device: str = "cpu") -> Check:
    """The gate of kept blocks: in float64, at a smaller size, they give the tokens of the same model without caches.

    Args:
        keeps: whether the model that is to be timed keeps its blocks.
    """
    size = Size(v=211, d=16, num_samples=2, max_new_tokens=12, steps=6, guidance_steps=2, block_length=4)
    world = make_world(v=size.v, d=size.d, width=16, dtype=torch.float64, device=device)
    made = block_samplers(world, size, "eager" if backend in ("triton", "cuda") else backend)
    same = tokens_of(made[KEPT], PROMPTS) == tokens_of(made[UNKEPT], PROMPTS)
    return combine(
        [
            Check(keeps and made[KEPT].model.keeps_blocks, "finished blocks are kept"),
            Check(same, "tokens are the same with and without kept blocks"),
        ]
    )


def check_same_tokens(backend: str = "eager", device: str = "cpu") -> Check:
    """The gate, on tiny float64 models, where rounding decides nothing.

    With top_k = 1 nothing is random, and both loops must produce the same tokens. Drawn at random, the sampler's tokens
    must be the same with all exact savings and with none.
    """
    size = Size(v=211, d=16, num_samples=2, max_new_tokens=6, steps=4, guidance_steps=2)
    world = make_world(v=size.v, d=size.d, width=16, dtype=torch.float64, device=device)
    s = size.settings
    greedy = LoopSettings(s.num_samples, s.max_new_tokens, s.steps, s.guidance_steps, StepSettings(top_k=1))
    theirs = PublishedLoop(world.model, world.tokenizer, world.reward_model, world.reward_tokenizer, greedy)
    expected = [[ids for ids, _ in samples] for samples in theirs.generate(PROMPTS)]
    ours = sampler(world, size, backend)
    same = tokens_of(ours, PROMPTS, top_k=1, suppress_undrawable=False) == expected
    exact = tokens_of(ours, PROMPTS) == tokens_of(ours, PROMPTS, exact_savings="none")
    return combine(
        [
            Check(same, "tokens of a greedy generation equal the published loop's"),
            Check(exact, "tokens are the same with and without the exact savings"),
        ]
    )


def tokens_of(sampler: Any, prompts: list[str], **settings: Any) -> list[list[list[int]]]:
    """The tokens of every sample of every prompt."""
    results = sampler.generate(prompts, progress=False, **settings)
    return [[sample.tokens for sample in result.samples] for result in results]


def check_ours(world: World, size: Size, backend: str, device: str = "cpu") -> Check:
    """The gate of a backend: the tokens of tiny models, and a short run at full size with finite rewards."""
    # Engines that do not take float64 are judged by their operators' tests; the loop around them is the same.
    tiny = check_same_tokens("eager" if backend in ("triton", "cuda") else backend, device)
    if not tiny.passed:
        return tiny
    run = sampler(world, size, backend, num_samples=1, max_new_tokens=4, steps=2, guidance_steps=1)
    result = run.generate(PROMPTS[:1], progress=False)[0]
    tokens, mask_id = result.samples[0].tokens, world.tokenizer.mask_token_id
    good = bool(torch.isfinite(torch.tensor(result.rewards)).all()) and len(tokens) == 4 and mask_id not in tokens
    return Check(good, "finite rewards and full responses at full size")


class Recording:
    """The very calls that a sampler's run makes of its two models; replayed, they are the floor.

    Nothing is between them then: no operators of the vocabulary, no draws, no decisions. The reward's prefix cache and
    its other savings are at work as in the run (:func:`check_least_work`).
    """

    _OF_THE_REWARD = ("prepare", "score_embeddings", "score_texts")

    def __init__(self, sampler: Any, prompts: list[str]) -> None:
        self._model, self._reward = sampler.model, sampler.reward
        self.calls: list[tuple[str, tuple[Any, ...], dict[str, Any]]] = []
        with self._watched():
            sampler.generate(prompts, progress=False)

    @contextmanager
    def _watched(self) -> Iterator[None]:
        watched = [(self._model, "masked_logits"), *((self._reward, n) for n in self._OF_THE_REWARD)]
        for owner, name in watched:
            setattr(owner, name, self._watch(getattr(owner, name)))
        try:
            yield
        finally:
            for owner, name in watched:
                delattr(owner, name)

    def _watch(self, method: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(method)
        def call(*args: Any, **kwargs: Any) -> Any:
            if method.__name__ == "masked_logits":
                # The canvas and what is masked change in place; the attention mask is known again by its identity.
                canvas, attention, masked = args
                kept: tuple[Any, ...] = (canvas.clone(), attention, masked.clone())
            elif method.__name__ == "score_embeddings":
                _, index, response, alive = args
                kept = (index, response.detach().clone(), alive)
            else:
                kept = args
            self.calls.append((method.__name__, kept, dict(kwargs)))
            return method(*args, **kwargs)

        return call

    def replay(self) -> None:
        """Make the calls again, each reward followed by its backward."""
        prepared = None
        for name, args, kwargs in self.calls:
            if name == "masked_logits":
                self._model.masked_logits(*args, **kwargs)
            elif name == "prepare":
                prepared = self._reward.prepare(*args, **kwargs)
            elif name == "score_texts":
                self._reward.score_texts(*args, **kwargs)
            else:
                index, response, alive = args
                with torch.enable_grad():
                    leaf = response.requires_grad_()
                    value = self._reward.score_embeddings(prepared, index, leaf, alive, **kwargs)
                    torch.autograd.grad(-value.sum(), leaf)


def published_loops(world: World, size: Size, baselines: Sequence[str] = ("published",)) -> list[Candidate]:
    """The published loop, or the same with batched steps."""
    parts = (world.model, world.tokenizer, world.reward_model, world.reward_tokenizer, size.settings)
    steps = {"published": Published, "vectorized": Vectorized}
    made = []
    for name in baselines:
        loop = PublishedLoop(*parts, step=steps[name])
        made.append(Candidate(name, lambda loop=loop: loop.generate(size.texts), check_same_tokens))
    return made


def candidates(
    world: World,
    size: Size,
    backends: Sequence[str] = ("auto",),
    baselines: Sequence[str] = ("published", "vectorized"),
    device: str = "cpu",
) -> list[Candidate]:
    """The published loop, the same with batched steps, our sampler for each backend, and the floor."""
    made = published_loops(world, size, baselines)
    for backend in backends:
        ours = sampler(world, size, backend)
        made.append(
            Candidate(
                backend,
                lambda ours=ours: ours.generate(size.texts, progress=False),
                lambda backend=backend: check_ours(world, size, backend, device),
            )
        )
    leanest = sampler(world, size, backends[0] if backends else "auto")
    floor = Recording(leanest, size.texts)
    return [*made, Candidate(FLOOR, floor.replay, lambda: check_least_work(leanest.reward, device), floor=True)]


def check_least_work(reward: Any, device: str) -> Check:
    """Whether a recording is of the least known work: all savings in use, whatever those of the timed samplers.

    Without one the floor would move with what it is to judge, so there is none then.
    """
    lost = {name: why for name, why in reward.savings_off.items() if not why.startswith(f"on {device.split(':')[0]},")}
    said = "; ".join(f"{name} is not in use: {why}" for name, why in lost.items())
    return Check(not lost, said or "all savings in use")
