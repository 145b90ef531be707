"""Flags shared by the commands that generate: which models, which sampler settings. :mod:`.loading` reads them."""

from __future__ import annotations

import argparse

from entrgi_kernels import names

from .loading import REWARD_KINDS


def _batch_size(text: str) -> int | str:
    try:
        return text if text == "auto" else int(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"expected an integer or auto, got {text!r}") from None


def add_model_arguments(parser: argparse.ArgumentParser, *, several: bool = False) -> None:
    """Flags that choose the models; `several` rewards have names, and what is said of one begins with NAME=."""
    action, name, choices = ("append", "NAME=", None) if several else ("store", "", tuple(REWARD_KINDS))
    group = parser.add_argument_group("models (the built-in tiny ones unless given)")
    group.add_argument("--model", metavar="PATH", help="diffusion language model: a folder or a Hugging Face name")
    group.add_argument(
        "--reward",
        action=action,
        metavar=f"{name}PATH",
        help="reward model: a folder or a Hugging Face name; or verifier:NAME[=ARG], which ranks and cannot guide "
        "(docs/rewards.md)",
    )
    group.add_argument(
        "--reward-kind",
        action=action,
        default=None if several else "classifier",
        choices=choices,
        metavar=f"{name}KIND" if several else None,
        help="what it is: a sequence classifier with one label, a causal LM taken for its likelihood or asked as a "
        "judge, or a sentence-embedding model (default: classifier)",
    )
    for flag, help in (
        ("--question", "for a judge: what it answers by yes or no, as in 'Is the response polite?'"),
        ("--target", "for similarity: the text to come close to"),
    ):
        group.add_argument(flag, action=action, metavar=f"{name}TEXT", help=help)
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
    group.add_argument(
        "-K", "--num-samples", type=int, default=4, metavar="K", help="samples per prompt (default: %(default)s)"
    )
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
