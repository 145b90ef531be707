"""What the flags of :mod:`.flags` mean: the sampler's settings, and the models that they load.

Nothing heavy is imported at module level, so ``entrgi --help`` stays quick.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import os
import textwrap
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

from .errors import UsageError
from .prompts import Prompt
from .verified import VERIFIER, check_guided, is_verifier

if TYPE_CHECKING:
    from entrgi_kernels import GuidedSampler
    from entrgi_kernels.guidance.config import GuidanceConfig
    from entrgi_kernels.guidance.results import GenerationResult

# Settings that change speed, not texts (kernels agree on every backend but for ties within rounding).
SPEED_ONLY = ("backend", "batch_size", "exact_savings")
# Fields of GuidanceConfig that flags of the same name set.
_OPTIONS = (
    "method",
    "weight",
    "guidance_steps",
    "learning_rate",
    "guidance_scale",
    "num_samples",
    "max_new_tokens",
    "steps",
    "temperature",
    "top_p",
    "top_k",
    "alg",
    "alg_temp",
    "confidence",
    "block_length",
    "threshold",
    "cfg_scale",
    "model_cache",
    "search",
    "search_every",
    "search_temperature",
    "potential",
    "resample_below",
    "self_rewarding",
    "candidates",
    "schedule",
    "deprioritize_eos",
    "batch_size",
    "seed",
    "backend",
)
TINY = "built-in tiny models"
# What --reward-kind loads, and the flag that it needs.
REWARD_KINDS = {
    "classifier": ("AutoModelForSequenceClassification", None),
    "likelihood": ("AutoModelForCausalLM", None),
    "judge": ("AutoModelForCausalLM", "question"),
    "similarity": ("AutoModel", "target"),
}


@dataclasses.dataclass(frozen=True)
class Loaded:
    """Models ready for a sampler. ``judge`` is an independent reward model, there for the tiny models only."""

    model: Any
    tokenizer: Any
    reward: Any
    reward_tokenizer: Any
    judge: Any = None
    judge_tokenizer: Any = None
    model_name: str = TINY
    reward_name: str = TINY
    dtype: str = "float32"
    tiny: bool = True


def config_from(args: argparse.Namespace, *, tiny: bool, method: str | None = None) -> GuidanceConfig:
    """The sampler's settings from parsed flags, with the defaults that depend on the models filled in.

    Raises:
        UsageError: for a value no sampler accepts, so that nobody waits for models to load first.
    """
    from entrgi_kernels.guidance.config import GuidanceConfig

    settings = {name: getattr(args, name) for name in _OPTIONS if hasattr(args, name)}
    if method:
        settings["method"] = method
    if settings["max_new_tokens"] is None:
        settings["max_new_tokens"] = 32 if tiny else 128
    if settings["steps"] is None:
        settings["steps"] = settings["max_new_tokens"]
    if settings["batch_size"] is None:
        settings["batch_size"] = 12 if tiny else 4
    try:
        config = GuidanceConfig(**settings)
    except (ValueError, TypeError) as error:
        raise UsageError(str(error)) from error
    check_guided(getattr(args, "reward", None), config)
    return config


def uses_tiny(args: argparse.Namespace) -> bool:
    """Whether the flags mean the built-in models.

    Raises:
        UsageError: when only one of the two models is given: the tiny ones speak a vocabulary of their own.
    """
    verified = is_verifier(args.reward)
    if (args.model is None) != (args.reward is None) and not (verified and args.model is None):
        missing = "--reward" if args.reward is None else "--model"
        raise UsageError(f"--model and --reward go together: {missing} is missing (give neither for the tiny models)")
    kind = getattr(args, "reward_kind", "classifier")
    for owner, (_, flag) in REWARD_KINDS.items():
        if flag is not None and (getattr(args, flag, None) is not None) != (owner == kind):
            raise UsageError(f"--{flag} and --reward-kind {owner} go together")
    if verified and kind != "classifier":
        raise UsageError(f"--reward {args.reward} and --reward-kind {kind}: a verifier is no model; leave the kind out")
    if args.model is None and kind != "classifier":
        raise UsageError(f"--reward-kind {kind} needs --model and --reward: the tiny reward model is a classifier")
    return args.model is None


def load(args: argparse.Namespace, *, judge: bool = False, reuse: Loaded | None = None) -> Loaded:
    """Load what the flags name.

    Args:
        args: parsed flags of :func:`.flags.add_model_arguments`.
        judge: also load the independent judge, where there is one (tiny models).
        reuse: models loaded before, whose diffusion model is taken where it is the one wanted.

    Raises:
        UsageError: unknown device, missing files, a reward model that is none.
    """
    tiny = uses_tiny(args)
    device = device_of(args.device, tiny)
    quiet()
    loaded = _load_tiny(args.dtype, device, judge) if tiny else _load_paths(args, device, reuse)
    if tiny and args.reward is not None:
        reward, _ = load_reward(args.reward, args.dtype, device)
        loaded = dataclasses.replace(loaded, reward=reward, reward_tokenizer=None, reward_name=args.reward)
    return loaded


def make_sampler(loaded: Loaded, config: GuidanceConfig) -> GuidedSampler:
    """A sampler of these models under these settings.

    Raises:
        UsageError: models or tokenizers that cannot serve, in the sampler's own words.
    """
    from entrgi_kernels import GuidedSampler

    settings = {field.name: getattr(config, field.name) for field in dataclasses.fields(config)}
    try:
        return GuidedSampler(loaded.model, loaded.reward, loaded.tokenizer, loaded.reward_tokenizer, **settings)
    except (ValueError, TypeError) as error:
        raise UsageError(str(error)) from error


def stream(sampler: GuidedSampler, prompts: Sequence[Prompt], **options: Any) -> Iterator[tuple[int, GenerationResult]]:
    """``sampler.stream``: (index of the prompt, result) as prompts are finished.

    Raises:
        UsageError: what the sampler refuses (prompts, a backend, NaN weights), in its own words.
    """
    from entrgi_kernels.backends import BackendUnavailableError

    try:
        yield from sampler.stream(prompts, **options)
    # ArithmeticError: logits or rewards that are not finite. The message names step, sample and prompt.
    except (ValueError, TypeError, ArithmeticError, BackendUnavailableError) as error:
        raise UsageError(str(error)) from error


def check_prompts(prompts: Sequence[Prompt], loaded: Loaded, place: Callable[[int], str]) -> None:
    """Try both chat templates on every prompt, before hours are spent on those that come before a bad one.

    Args:
        prompts: to be tried.
        loaded: the tokenizers, and the reward where it reads prompts in a way of its own.
        place: where prompt i stands, for the message.

    Raises:
        UsageError: a prompt that either side cannot read.
    """
    from entrgi_kernels.text.template import conversation_from, encode_prompt, split_template

    sides: dict[str, Callable[..., Any]] = {"diffusion": functools.partial(encode_prompt, loaded.tokenizer)}
    if not is_verifier(loaded.reward_name):
        split = getattr(loaded.reward, "split", None)
        sides["reward"] = split or functools.partial(split_template, loaded.reward_tokenizer)
    for index, prompt in enumerate(prompts):
        for side, read in sides.items():
            try:
                read(conversation_from(prompt))
            except (ValueError, TypeError) as error:
                raise UsageError(f"{place(index)}, for the {side} model: {error}") from error


def prompt_tokens(sampler: GuidedSampler, prompt: Prompt) -> int:
    """How many tokens the diffusion model sees of a prompt, its chat template included."""
    from entrgi_kernels.text.template import conversation_from, encode_prompt

    return len(encode_prompt(sampler.tokenizer, conversation_from(prompt)))


def quiet() -> None:
    """No progress bars of transformers between our own lines; its warnings stay."""
    from transformers.utils import logging

    logging.disable_progress_bar()


def tokenizer_of(role: str, name: str, trust_remote_code: bool = False) -> Any:
    """The tokenizer of a model by its name ("tiny": the built-in one's of that role), without the model.

    Raises:
        UsageError: it has no chat template.
        OSError, ValueError, ImportError: see :func:`entrgi_kernels.models.loading.load_tokenizer`.
    """
    from entrgi_kernels.models.loading import load_tokenizer

    if name == "tiny":
        from . import tiny

        name = str(tiny.weights_path(role))
    tokenizer = load_tokenizer(name, trust_remote_code=trust_remote_code)
    _check_template(role, name, tokenizer)
    return tokenizer


def device_of(name: str, tiny: bool) -> Any:
    """The ``torch.device`` of a flag; "auto" is a GPU where there is one, but for the tiny models.

    Raises:
        UsageError: a device that is not usable here.
    """
    import torch

    if name == "auto":
        name = "cuda" if torch.cuda.is_available() and not tiny else "cpu"
    try:
        device = torch.device(name)
        torch.zeros(1, device=device).item()  # what holds no numbers ("meta") fails here
    except (RuntimeError, AssertionError) as error:
        here = ", ".join(["auto", "cpu", *(f"cuda:{index}" for index in range(torch.cuda.device_count()))])
        reason = textwrap.shorten(_first_line(error), 120, placeholder=" ...")
        raise UsageError(f"--device {name} is not usable here ({reason}): expected one of {here}") from None
    return device


def dtype_of(name: str, auto: Any) -> Any:
    """The ``torch.dtype`` of a flag; ``auto`` stands for itself."""
    import torch

    return auto if name == "auto" else getattr(torch, name)


def _load_tiny(dtype_name: str, device: Any, judge: bool) -> Loaded:
    import torch

    from . import tiny

    dtype = dtype_of(dtype_name, torch.float32)
    try:
        model, tokenizer = tiny.load_diffusion(dtype)
        reward, reward_tokenizer = tiny.load_reward(dtype)
        judge_model, judge_tokenizer = tiny.load_judge(dtype) if judge else (None, None)
    except FileNotFoundError as error:
        raise UsageError(f"the built-in tiny models are not here ({error}); `entrgi tiny train` makes them") from None
    except (OSError, ValueError) as error:
        raise UsageError(f"cannot load the built-in tiny models: {_first_line(error)}") from error
    return Loaded(
        _to(model, device),
        tokenizer,
        _to(reward, device),
        reward_tokenizer,
        None if judge_model is None else _to(judge_model, device),
        judge_tokenizer,
        dtype=str(dtype).removeprefix("torch."),
    )


def _to(model: Any, device: Any) -> Any:
    """Move a module or an adapter of one, in place (modules move in place)."""
    getattr(model, "module", model).to(device)
    return model


def _load_paths(args: argparse.Namespace, device: Any, reuse: Loaded | None) -> Loaded:
    if reuse is not None and reuse.model_name == args.model:
        model, tokenizer = reuse.model, reuse.tokenizer
    else:
        model, tokenizer = _load_diffusion(args, device)
    kind = getattr(args, "reward_kind", "classifier")
    reward, reward_tokenizer = load_reward(args.reward, args.dtype, device, args.trust_remote_code, kind)
    name, said = args.reward, {key: getattr(args, key, None) for key in ("question", "target")}
    if kind != "classifier":
        from entrgi_kernels import rewards

        name = f"{name} ({': '.join([kind, *filter(None, said.values())])})"
        try:
            reward = rewards.wrap(reward, reward_tokenizer, unmatched="pieces", **said)
        except (ValueError, TypeError) as error:
            raise UsageError(f"--reward {args.reward}: {error}") from error
    return Loaded(
        model,
        tokenizer,
        reward,
        reward_tokenizer,
        model_name=args.model,
        reward_name=name,
        dtype=str(getattr(reward, "dtype", model.dtype)).removeprefix("torch.") if args.dtype == "auto" else args.dtype,
        tiny=False,
    )


def _load_diffusion(args: argparse.Namespace, device: Any) -> tuple[Any, Any]:
    from entrgi_kernels import models

    try:
        model, tokenizer = models.load(
            args.model,
            dtype=dtype_of(args.dtype, "auto"),
            device=device,
            trust_remote_code=args.trust_remote_code,
            quantization_config=getattr(args, "quantization", None),
        )
    except (OSError, ValueError, ImportError) as error:
        raise UsageError(f"cannot load --model {args.model}: {_first_line(error)}") from error
    _check_template("diffusion", args.model, tokenizer)
    return model, tokenizer


def _check_template(role: str, name: str, tokenizer: Any) -> None:
    if not getattr(tokenizer, "chat_template", None):
        there = f"{name}/" if os.path.isdir(name) else "a folder that you save it to, as "
        raise UsageError(
            f"the tokenizer of the {role} model {name} has no chat template: write the Jinja template that the model "
            f"was trained with to {there}chat_template.jinja"
        )


def load_reward(
    name: str, dtype: str, device: Any, trust_remote_code: bool = False, kind: str = "classifier"
) -> tuple[Any, Any]:
    """(model, tokenizer) of a reward model: a sequence classifier with one label, or what another kind takes.

    A verifier's name gives (the reward, None).

    Raises:
        UsageError: missing files, a reward model that is none.
    """
    if is_verifier(name):
        from entrgi_kernels import rewards

        try:
            return rewards.verifier(name.removeprefix(VERIFIER)), None
        except (OSError, ValueError, TypeError, ImportError) as error:
            raise UsageError(f"{name}: {error}") from error
    import transformers

    from entrgi_kernels.models.loading import check_source, is_adapter, load_network, load_tokenizer

    options = {"trust_remote_code": trust_remote_code}
    auto = getattr(transformers, REWARD_KINDS[kind][0])
    try:
        check_source(name)
        if is_adapter(name):
            from .adapters import load_adapted

            reward, tokenizer = load_adapted(name, auto, dtype_of(dtype, "auto"), **options)
        else:
            tokenizer = load_tokenizer(name, **options)
            spared = ("pooler",) if kind == "similarity" else ()  # files often lack it, and it is not read
            reward = load_network(auto, name, spared=spared, dtype=dtype_of(dtype, "auto"), **options)
    except (OSError, ValueError, ImportError) as error:
        raise UsageError(f"cannot load --reward {name}: {_first_line(error)}") from error
    if kind == "classifier" and reward.config.num_labels != 1:
        raise UsageError(f"--reward {name} has {reward.config.num_labels} labels; a reward model has one")
    if kind != "similarity":
        _check_template("reward", name, tokenizer)
    return reward.to(device), tokenizer


def _first_line(error: BaseException) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    if lines and lines[0].endswith(":"):  # a heading says nothing by itself
        return " ".join(lines)
    return lines[0] if lines else type(error).__name__
