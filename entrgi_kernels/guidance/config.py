"""Settings of guided generation, checked when they are made."""

from __future__ import annotations

import dataclasses
import math
import numbers
import sys
from dataclasses import dataclass
from typing import Any

import torch

from ..backends import check_name
from ..names import ALGS, CONFIDENCES, METHODS, MODEL_CACHES, POTENTIALS, PROBABLE_ALGS, SCHEDULES, SEARCHES
from ..ops import _common
from ..ops.guidance_update import MOMENT_DTYPES
from .savings import check_savings
from .weights import WeightFunction, method_weight

# Bounds of the fields that a trajectory position's random key is packed from (docs/philox.md).
MAX_SAMPLES, MAX_SLOTS, MAX_STEPS, MAX_INNER = 1 << 10, 1 << 14, 1 << 24, 254


@dataclass(frozen=True)
class GuidanceConfig:
    """Settings of guided generation; the defaults are the paper's.

    Attributes:
        method: "entrgi", "aps", "expectation", "first_order" (D-CBG, TAG), or "none" (best of K without guidance).
        weight: replaces EntRGi's linear weight: a name ("threshold(1.0, 0.5)", "step(1.0)") or a callable
            of (entropy [N] in nats, V).
        guidance_steps: M, Adam steps a denoising step; 0 is no guidance. "first_order" takes one, however many are
            set.
        learning_rate: eta, in logits: Adam's first step moves a logit by about that much. Not for "first_order".
        guidance_scale: gamma, for method "first_order" alone: logits a unit of reward. 1 is Bayes' rule, were the
            reward a log-probability and temperature 1.
        betas, eps: Adam's; eps from 1e-12 to 1e12.
        state_dtype: dtype of Adam's moments, or its name: "float64", "float32" or "bfloat16"; None is the logits' own,
            but "float32" for float16, where squares underflow.
        num_samples: K, trajectories a prompt.
        max_new_tokens: L, response slots.
        steps: T, denoising steps.
        temperature: tau, from 1e-12 to 1e12; 0 takes the most likely token.
        top_p, top_k: filters of every draw; None keeps all.
        alg: how positions are ranked: "entropy", "maskgit_plus", "topk_margin", "anchor" or "origin".
        alg_temp: draws the positions from softmax(confidence / alg_temp), from 1e-12 to 1e12, instead of taking the
            best, as None and 0 do.
        confidence: for alg "entropy", of the logits before guidance and unfiltered ("base"), or after and filtered
            ("guided").
        block_length: slots of a block, which divides max_new_tokens: blocks are filled from left to right, each by its
            share of the steps, and none is begun behind an end-of-sequence token. The reward reads up to the end of
            the block. None fills the whole response at once, or by the blocks that the model was trained with.
        threshold: in (0, 1], for alg "maskgit_plus" and "topk_margin": a step also commits every position whose
            confidence is above it, and at least one, so that a block may take fewer steps. None counts alone.
        cfg_scale: w of classifier-free guidance: logits u + (w + 1)(c - u), with u those behind a masked prompt
            (LLaDA), or a reference model's log-probabilities (RFG); 0 is none, 1e12 the most.
        model_cache: for models that see the whole canvas, what of a block's first forward its others read again:
            "prefix", keys and values before the block, or "dual", those behind it too (Fast-dLLM). Not exact
            (docs/blocks.md), so None unless asked for.
        search: what is done with a prompt's trajectories beside guidance (:mod:`.search`): "best" nothing, the best is
            known at the end; "smc" resamples them by their predicted rewards; "svdd" draws `candidates` of each at
            every step, the one whose predicted end scores best goes on.
        search_every: r, denoising steps from one resampling of "smc" to the next.
        search_temperature: lambda of "smc", in units of the reward.
        potential: of "smc": "difference", "max" or "sum".
        resample_below: "smc" resamples where the effective sample size is below this share of K; 0 never does.
        self_rewarding: "smc" weighs, and "svdd" chooses, by the log-probabilities of the committed tokens: no reward is
            asked.
        candidates: B of "svdd": the models run K B rows a prompt.
        schedule: positions a step, "linspace" or "even".
        schedule_eps: last time of the "linspace" schedule.
        deprioritize_eos: a drawn end-of-sequence token is committed last.
        suppress_undrawable: give ids that stand for no token, and the mask token, probability 0 from the start; False
            leaves their logits alone, as the published code does, but for the mask token's at the last step.
        batch_size: prompts denoised together (times K trajectories), of similar length; "auto" takes as many as the
            memory is estimated to hold (:mod:`.batching`). Does not change any draw (see `seed`). A batch that runs out
            of memory is halved, and the run goes on.
        memory_budget: with batch_size="auto", what a batch may take beyond the weights: bytes, as an int, or a share
            of what is free, as a float up to 1; None is 0.9 of it.
        torch_compile: True, or the name of a torch.compile backend, compiles the norms and MLPs of the reward's layers.
        cuda_graphs: replay the inner loop from CUDA graphs; CUDA devices only.
        exact_savings: work left out without changing a token: "all", "none", or names (:mod:`.savings`).
        seed: of the draws, which depend on it, the prompt and the settings, not on the batch. The numbers that meet
            them are equal in any batch up to rounding. Guidance at a temperature below about 0.1 turns rounding into
            tokens in float32, not in float64 (docs/philox.md).
        backend: "auto" or the name of a backend.

    Raises:
        ValueError, TypeError: a setting out of range; the message names it and what is accepted.
    """

    method: str = "entrgi"
    weight: str | WeightFunction | None = None
    guidance_steps: int = 3
    learning_rate: float = 0.5
    guidance_scale: float = 1.0
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-8
    state_dtype: str | None = None
    num_samples: int = 4
    max_new_tokens: int = 128
    steps: int = 128
    temperature: float = 0.7
    top_p: float | None = 0.95
    top_k: int | None = None
    alg: str = "entropy"
    alg_temp: float | None = None
    confidence: str = "base"
    block_length: int | None = None
    threshold: float | None = None
    cfg_scale: float = 0.0
    model_cache: str | None = None
    search: str = "best"
    search_every: int = 8
    search_temperature: float = 1.0
    potential: str = "difference"
    resample_below: float = 0.5
    self_rewarding: bool = False
    candidates: int = 4
    schedule: str = "linspace"
    schedule_eps: float = 1e-3
    deprioritize_eos: bool = True
    suppress_undrawable: bool = True
    batch_size: int | str = 4
    memory_budget: int | float | None = None
    torch_compile: bool | str = False
    cuda_graphs: bool = False
    exact_savings: str | tuple[str, ...] = "all"
    seed: int = 0
    backend: str = "auto"

    def __post_init__(self) -> None:
        _one_of("method", self.method, tuple(METHODS))
        method_weight(self.method, self.weight)
        _integer("guidance_steps", self.guidance_steps, 0, MAX_INNER - 1)
        for name in ("learning_rate", "guidance_scale", "temperature", "alg_temp"):
            if isinstance(getattr(self, name), torch.Tensor):
                raise TypeError(f"{name}={getattr(self, name)!r}: expected a number, not a tensor")
        _common.check_rate(self.learning_rate, "learning_rate")
        _common.check_rate(self.guidance_scale, "guidance_scale")
        if not isinstance(self.betas, (tuple, list)):
            raise TypeError(f"betas={self.betas!r}: expected two numbers in [0, 1)")
        for beta in self.betas:
            _number("betas", beta, low=0, high=1)
        if len(self.betas) != 2 or 1 in self.betas:
            raise ValueError(f"betas={self.betas!r}: expected two numbers in [0, 1)")
        _common.check_eps(self.eps)
        if isinstance(self.state_dtype, torch.dtype):  # kept by its name, as JSON wants it
            object.__setattr__(self, "state_dtype", str(self.state_dtype).removeprefix("torch."))
        _one_of("state_dtype", self.state_dtype, (None, *MOMENT_DTYPES))
        _integer("num_samples", self.num_samples, 1, MAX_SAMPLES)
        _integer("max_new_tokens", self.max_new_tokens, 1, MAX_SLOTS)
        _integer("steps", self.steps, 1, MAX_STEPS)
        _common.check_temperature(self.temperature)
        if self.top_p is not None:
            _number("top_p", self.top_p, low=0, high=1, open_low=True, none=True)
        if self.top_k is not None:
            _integer("top_k", self.top_k, 1, (1 << 63) - 1, none=True)
        _one_of("alg", self.alg, ALGS)
        if self.alg_temp is not None:
            _common.check_temperature(self.alg_temp, "alg_temp", "or None: takes the best")
        _one_of("confidence", self.confidence, CONFIDENCES)
        if self.block_length is not None:
            _integer("block_length", self.block_length, 1, self.max_new_tokens, none=True)
            if self.max_new_tokens % self.block_length:
                raise ValueError(
                    f"block_length={self.block_length}: expected one that divides max_new_tokens={self.max_new_tokens}"
                )
        if self.threshold is not None:
            _number("threshold", self.threshold, low=0, high=1, open_low=True, none=True)
            if self.alg not in PROBABLE_ALGS:
                raise ValueError(
                    f"threshold={self.threshold} with alg={self.alg!r}, whose confidence is no probability: expected "
                    f"alg {' or '.join(map(repr, PROBABLE_ALGS))}"
                )
        _number("cfg_scale", self.cfg_scale, low=0, high=1e12)
        _one_of("model_cache", self.model_cache, (None, *MODEL_CACHES))
        _one_of("search", self.search, tuple(SEARCHES))
        _integer("search_every", self.search_every, 1, MAX_STEPS)
        _number("search_temperature", self.search_temperature, low=0, open_low=True)
        _one_of("potential", self.potential, POTENTIALS)
        _number("resample_below", self.resample_below, low=0, high=1)
        _integer("candidates", self.candidates, 1, MAX_SAMPLES)
        if self.num_samples * self.copies > MAX_SAMPLES:
            raise ValueError(
                f"candidates={self.candidates} of num_samples={self.num_samples} trajectories: expected at most "
                f"{MAX_SAMPLES} together"
            )
        _one_of("schedule", self.schedule, SCHEDULES)
        _number("schedule_eps", self.schedule_eps, low=0, high=1, open_low=True)
        if isinstance(self.torch_compile, str):
            _one_of("torch_compile", self.torch_compile, (False, True, *torch.compiler.list_backends(exclude_tags=())))
        elif not isinstance(self.torch_compile, bool):
            raise TypeError(f"torch_compile={self.torch_compile!r}: expected True, False or a backend's name")
        for name in ("deprioritize_eos", "suppress_undrawable", "cuda_graphs", "self_rewarding"):
            if not isinstance(getattr(self, name), bool):
                raise TypeError(f"{name}={getattr(self, name)!r}: expected True or False")
        if isinstance(self.batch_size, str):
            if self.batch_size != "auto":
                raise ValueError(f"batch_size={self.batch_size!r}: expected 'auto' or an integer >= 1")
        else:
            _integer("batch_size", self.batch_size, 1, None)
        if isinstance(self.memory_budget, numbers.Integral):
            _integer("memory_budget", self.memory_budget, 1, None)
        elif self.memory_budget is not None:
            _number("memory_budget", self.memory_budget, low=0, high=1, open_low=True)
        _integer("seed", self.seed, -(1 << 63), (1 << 63) - 1)
        check_name(self.backend)
        check_savings(self.exact_savings)
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            # numpy's scalars are welcome, but JSON and the operators want Python's.
            if isinstance(value, numbers.Real) and not isinstance(value, (bool, int, float)):
                object.__setattr__(
                    self, field.name, int(value) if isinstance(value, numbers.Integral) else float(value)
                )

    @property
    def guided(self) -> bool:
        """Whether any logit is moved at all."""
        return self.method != "none" and self.guidance_steps > 0

    @property
    def copies(self) -> int:
        """Rows of the models that each trajectory takes: the candidates of "svdd", else 1."""
        return self.candidates if self.search == "svdd" else 1

    @property
    def inner_steps(self) -> int:
        """M as the method takes it: 1 at most where there is no Adam."""
        return self.guidance_steps if METHODS[self.method].adam else min(self.guidance_steps, 1)

    def saves(self, name: str) -> bool:
        """Whether the exact saving `name` is on."""
        return name in check_savings(self.exact_savings)

    def replace(self, **changes: Any) -> GuidanceConfig:
        """A copy with some settings changed.

        Raises:
            TypeError: no such setting; the message lists them.
        """
        names = [field.name for field in dataclasses.fields(self)]
        unknown = sorted(set(changes) - set(names))
        if unknown:
            raise TypeError(f"no setting {', '.join(map(repr, unknown))}: expected one of {', '.join(names)}")
        return dataclasses.replace(self, **changes)

    def to_dict(self) -> dict[str, Any]:
        """The settings as JSON-safe values; a callable weight by its repr."""
        content = dataclasses.asdict(self)
        content["betas"] = list(self.betas)
        if not isinstance(self.exact_savings, str):
            content["exact_savings"] = sorted(self.exact_savings)
        if self.weight is not None and not isinstance(self.weight, str):
            content["weight"] = repr(self.weight)
        return content


def _one_of(name: str, value: object, accepted: tuple) -> None:
    if not isinstance(value, (str, type(None))) or value not in accepted:
        raise ValueError(f"{name}={value!r}: expected one of {', '.join(map(repr, accepted))}")


def _integer(name: str, value: Any, low: int, high: int | None, none: bool = False) -> None:
    wanted = ("None or " if none else "") + f"an integer >= {low}" + ("" if high is None else f" and <= {high}")
    if isinstance(value, bool) or not isinstance(value, numbers.Integral):
        raise TypeError(f"{name}={value!r}: expected {wanted}")
    if value < low or (high is not None and value > high):  # type: ignore[operator]
        raise ValueError(f"{name}={value}: expected {wanted}")


def _number(
    name: str, value: Any, low: float, high: float = math.inf, open_low: bool = False, none: bool = False
) -> None:
    wanted = "None or a" if none else "a"
    wanted += f" finite number {'>' if open_low else '>='} {low:g}"
    wanted += "" if high == math.inf else f" and <= {high:g}"
    if isinstance(value, bool) or not isinstance(value, numbers.Real):
        raise TypeError(f"{name}={value!r}: expected {wanted}")
    # Compared before it is made a float, which an int may be too large for.
    if not low <= value <= min(high, sys.float_info.max) or (open_low and value == low):  # type: ignore[operator]
        raise ValueError(f"{name}={value}: expected {wanted}")
