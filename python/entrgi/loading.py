"""Flags shared by the commands that generate: which models, which sampler settings; and what they load.

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

from entrgi_kernels import names

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
_REWARD_KINDS = {
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


def _batch_size(text: str) -> int | str:
    try:
        return text if text == "auto" else int(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"expected an integer or auto, got {text!r}") from None


def add_model_arguments(parser: argparse.ArgumentParser) -> None:
    """Flags that choose the models."""
    group = parser.add_argument_group("models (the built-in tiny ones unless given)")
    group.add_argument("--model", metavar="PATH", help="diffusion language model: a folder or a Hugging Face name")
    group.add_argument(
        "--reward",
        metavar="PATH",
        help="reward model: a folder or a Hugging Face name; or verifier:NAME[=ARG], which ranks and cannot guide "
        "(docs/rewards.md)",
    )
    group.add_argument(
        "--reward-kind",
        default="classifier",
        choices=tuple(_REWARD_KINDS),
        help="what it is: a sequence classifier with one label, a causal LM taken for its likelihood or asked as a "
        "judge, or a sentence-embedding model (default: classifier)",
    )
    group.add_argument("--question", help="for a judge: what it answers by yes or no, as in 'Is the response polite?'")
    group.add_argument("--target", metavar="TEXT", help="for similarity: the text to come close to")
    group.add_argument("--trust-remote-code", action="store_true", help="run Python code that comes with the models")
    group.add_argument(
        "--dtype",
        default="auto",
        choices=("auto", "float32", "bfloat16", "float16"),
        help="number format of the models (auto: as stored; float32 for the tiny ones)",
    )
    group.add_argument(
        "--device",
        default="auto",
        help="cpu, cuda, cuda:1, ... (auto: cuda where there is one for models given by path, cpu for the tiny ones)",
    )


def add_sampler_arguments(
    parser: argparse.ArgumentParser, *, method: bool = True, steps_help: str = "one per slot"
) -> None:
    """Flags that set the sampler up, with the published settings as defaults.

    Args:
        parser: where they go.
        method: whether ``--method`` is one of them.
        steps_help: what the help says of the default number of steps.
    """
    group = parser.add_argument_group("guidance")
    if method:
        group.add_argument(
            "--method", default="entrgi", choices=tuple(names.METHODS), help="none is best-of-N (default: entrgi)"
        )
    group.add_argument(
        "--weight",
        default=None,
        metavar="WEIGHT",
        help="for entrgi: another weight of the entropy, as in 'threshold(1.0, 0.5)' or 'step(1.0)'",
    )
    group.add_argument(
        "-M",
        "--guidance-steps",
        type=int,
        default=3,
        metavar="M",
        help="gradient steps at each denoising step (default: 3; first_order takes one)",
    )
    group.add_argument(
        "--learning-rate", type=float, default=0.5, metavar="ETA", help="Adam's step on the logits (default: 0.5)"
    )
    group.add_argument(
        "--guidance-scale",
        type=float,
        default=1.0,
        metavar="GAMMA",
        help="for first_order: logits a unit of reward (default: 1.0)",
    )
    group.add_argument(
        "--backend",
        default="auto",
        choices=("auto", *names.BACKENDS),
        help="engine of the kernels (default: auto)",
    )
    group = parser.add_argument_group("sampling")
    group.add_argument("-K", "--num-samples", type=int, default=4, metavar="K", help="samples per prompt (default: 4)")
    group.add_argument(
        "-L",
        "--max-new-tokens",
        type=int,
        default=None,
        metavar="L",
        help="slots of the response (default: 32 with the tiny models, else 128)",
    )
    group.add_argument(
        "-T", "--steps", type=int, default=None, metavar="T", help=f"denoising steps (default: {steps_help})"
    )
    group.add_argument("--temperature", type=float, default=0.7, help="0 takes the likeliest token (default: 0.7)")
    group.add_argument("--top-p", type=float, default=0.95, help="nucleus mass, 1 for no filter (default: 0.95)")
    group.add_argument("--top-k", type=int, default=None, help="keep the K likeliest tokens (default: no filter)")
    group.add_argument(
        "--alg",
        default="entropy",
        choices=names.ALGS,
        help="confidence by which positions are committed (default: entropy)",
    )
    group.add_argument(
        "--alg-temp", type=float, default=None, help="draw positions at this temperature (default: take the best)"
    )
    group.add_argument(
        "--confidence",
        default="base",
        choices=names.CONFIDENCES,
        help="whose logits give the entropy: before or after guidance (default: base)",
    )
    group.add_argument(
        "--schedule",
        default="linspace",
        choices=names.SCHEDULES,
        help="how many tokens a step commits (default: linspace)",
    )
    group.add_argument(
        "--block-length",
        type=int,
        default=None,
        metavar="B",
        help="fill the response in blocks of B slots, from left to right (default: at once, or the model's own)",
    )
    group.add_argument(
        "--threshold",
        type=float,
        default=None,
        metavar="P",
        help="also commit what is surer than P, for alg maskgit_plus and topk_margin (default: by count alone)",
    )
    group.add_argument(
        "--cfg-scale", type=float, default=0.0, metavar="W", help="classifier-free guidance (default: 0, none)"
    )
    group.add_argument(
        "--model-cache",
        default=None,
        choices=names.MODEL_CACHES,
        help="keep the model's keys and values within a block, which is not exact (default: none)",
    )
    group.add_argument(
        "--deprioritize-eos",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="postpone a drawn end of text (default: yes)",
    )
    _add_search_arguments(parser)
    group.add_argument(
        "--batch-size",
        type=_batch_size,
        default=None,
        metavar="B|auto",
        help="prompts denoised together, or auto: what fits; changes no text (default: 4; 12 with the tiny models)",
    )
    group.add_argument("--seed", type=int, default=0, help="the same seed gives the same texts (default: 0)")


def _add_search_arguments(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("search beside guidance (docs/methods.md)")
    group.add_argument(
        "--search",
        default="best",
        choices=tuple(names.SEARCHES),
        help="best of K at the end, smc resamples the K, svdd draws candidates at every step (default: best)",
    )
    group.add_argument(
        "--search-every", type=int, default=8, metavar="R", help="smc: steps between resamplings (default: 8)"
    )
    group.add_argument(
        "--search-temperature", type=float, default=1.0, metavar="LAMBDA", help="smc: in rewards (default: 1)"
    )
    group.add_argument(
        "--potential",
        default="difference",
        choices=names.POTENTIALS,
        help="smc: how rewards weigh (default: difference)",
    )
    group.add_argument(
        "--resample-below",
        type=float,
        default=0.5,
        metavar="SHARE",
        help="smc: resample where the effective sample size is below this share of K (default: 0.5)",
    )
    group.add_argument(
        "--self-rewarding", action="store_true", help="smc: weigh by the model's own confidence, not by the reward"
    )
    group.add_argument(
        "--candidates", type=int, default=4, metavar="B", help="svdd: candidates of each trajectory (default: 4)"
    )


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
    for owner, (_, flag) in _REWARD_KINDS.items():
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
        args: parsed flags of :func:`add_model_arguments`.
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
    auto = getattr(transformers, _REWARD_KINDS[kind][0])
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
