"""What the flags of ``entrgi serve`` offer: rewards by name, limits, keys; and the models that they mean."""

from __future__ import annotations

import argparse
import dataclasses
import ipaddress
import math
import os
import re
from pathlib import Path
from typing import TYPE_CHECKING

from .. import loading
from ..errors import UsageError, read_text
from ..verified import VERIFIER, check_guided
from .settings import Limits, Refusal, Served

if TYPE_CHECKING:
    from entrgi_kernels import GuidedSampler

KEY_VARIABLE = "ENTRGI_API_KEY"
_NAMED = re.compile(r"([A-Za-z0-9][A-Za-z0-9._-]*)=(.*)", re.DOTALL)
# Flags of a reward that may be given for each of several, as NAME=VALUE.
_OF_A_REWARD = ("reward_kind", "question", "target")
# Each flag of a limit: its field of `Limits`, and what it counts.
LIMITS = {
    "--max-body": ("body", "bytes"),
    "--max-prompt-tokens": ("prompt_tokens", "tokens of the messages"),
    "--max-tokens": ("max_tokens", "response slots"),
    "--max-samples": ("num_samples", "n, or num_samples times candidates"),
    "--max-steps": ("steps", "denoising steps"),
    "--max-guidance-steps": ("guidance_steps", "Adam steps of a denoising step"),
    "--max-trace": ("trace", "samples x slots x steps where a trace is asked for"),
    "--max-queue": ("queue", "requests that wait, of all clients"),
    "--timeout": ("timeout", "seconds from a request's arrival to its answer"),
}


def describe(args: argparse.Namespace) -> Served:
    """What the flags offer, models not loaded yet.

    Raises:
        UsageError: flags that do not go together.
    """
    numbers = {field: getattr(args, flag[2:].replace("-", "_")) for flag, (field, _) in LIMITS.items()}
    for flag, (field, _) in LIMITS.items():
        if not 0 < numbers[field] < math.inf:
            raise UsageError(f"{flag} {numbers[field]:g}: expected a finite number above 0")
    keys = _keys(args)
    if not keys and not _is_loopback(args.host):
        raise UsageError(
            f"--host {args.host} lets other machines in: expected API keys, by --api-key-file FILE or {KEY_VARIABLE}, "
            "or the host 127.0.0.1"
        )
    rewards = reward_flags(args)
    tiny = all([loading.uses_tiny(own) for own in rewards.values()])
    own = {"reward": None, "batch_size": "auto" if args.batch_size is None else args.batch_size}
    config = loading.config_from(argparse.Namespace(**{**vars(args), **own}), tiny=tiny)
    try:
        config = config.replace(memory_budget=args.memory_budget)
    except (ValueError, TypeError) as error:
        raise UsageError(str(error)) from None
    first = next(iter(rewards.values())).reward
    check_guided(first, config)
    limits = Limits(**numbers)
    try:  # who says nothing is to be served; the steps are the request's slots unless they are given
        limits.check(config if args.steps is not None else config.replace(steps=1))
    except Refusal as refusal:
        raise UsageError(f"what a request gets that does not say otherwise: {refusal.message}") from None
    return Served(
        model=args.name or ("tiny" if tiny else os.path.basename(os.path.normpath(args.model))),
        rewards=tuple(rewards),
        mask_token_id=-1,
        defaults=config,
        steps_given=args.steps is not None,
        limits=limits,
        tiny=tiny,
        keys=keys,
        # With keys a page of another site gains nothing by this server's address, and proxies may call it anything.
        hosts=() if keys else ("localhost", "127.0.0.1", "[::1]", args.host),
    )


def reward_flags(args: argparse.Namespace) -> dict[str, argparse.Namespace]:
    """The flags of each reward by its name, as the other commands have them for their one.

    Raises:
        UsageError: names that come twice, or that no reward has.
    """
    given: dict[str, str | None] = {}
    for text in args.reward or []:
        match = _NAMED.fullmatch(text)
        name, path = match.groups() if match else (_plain_name(text), text)
        if name in given:
            raise UsageError(f"--reward {text}: there is a reward {name!r} already; expected another NAME=")
        given[name] = path
    given = given or {"tiny": None}
    own: dict[str, dict[str, str]] = {name: {} for name in given}
    for flag in _OF_A_REWARD:
        for text in getattr(args, flag) or []:
            match = _NAMED.fullmatch(text)
            name, value = match.groups() if match and match.group(1) in given else (None, text)
            if name is None and len(given) > 1:
                names = ", ".join(given)
                raise UsageError(f"--{flag.replace('_', '-')} {text}: expected NAME=VALUE with a NAME out of {names}")
            own[name or next(iter(given))][flag] = value
    kinds = loading.REWARD_KINDS
    for said in own.values():
        if said.get("reward_kind", "classifier") not in kinds:
            raise UsageError(f"--reward-kind {said['reward_kind']}: expected one of {', '.join(kinds)}")
    plain = {"reward_kind": "classifier", "question": None, "target": None}
    return {
        name: argparse.Namespace(**{**vars(args), **plain, **own[name], "reward": path}) for name, path in given.items()
    }


def load(args: argparse.Namespace, served: Served) -> dict[str, GuidedSampler]:
    """A sampler for each reward; they share one diffusion model.

    Raises:
        UsageError: models that cannot be loaded, or cannot serve.
    """
    samplers: dict[str, GuidedSampler] = {}
    loaded: loading.Loaded | None = None
    for name, own in reward_flags(args).items():
        found = loading.load(own, reuse=loaded)
        if loaded is not None:
            found = dataclasses.replace(found, model=loaded.model, tokenizer=loaded.tokenizer)
        sampler = loading.make_sampler(found, served.defaults)
        loaded = dataclasses.replace(found, model=sampler.model)
        samplers[name] = sampler
    return samplers


def _plain_name(text: str) -> str:
    name = text.removeprefix(VERIFIER).partition("=")[0] if text.startswith(VERIFIER) else os.path.normpath(text)
    return os.path.basename(name)


def _keys(args: argparse.Namespace) -> tuple[str, ...]:
    keys = [os.environ.get(KEY_VARIABLE, "").strip()]
    if args.api_key_file:
        found = [line.strip() for line in read_text(Path(args.api_key_file)).splitlines()]
        if not any(found):
            raise UsageError(f"{args.api_key_file} holds no key: expected one per line")
        keys += found
    keys = [key for key in keys if key]
    for key in keys:
        if not key.isascii() or len(key.split()) != 1:
            raise UsageError("an API key has spaces or letters beyond ASCII in it: expected one word a line")
    return tuple(keys)


def _is_loopback(host: str) -> bool:
    try:
        return host == "localhost" or ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False
