"""What the examples beside this file share: their flags, the built-in models, and the before and after."""

from __future__ import annotations

import argparse
import importlib.util
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from entrgi.tiny import load_reward, prompts

PROMPTS = prompts(4)


def arguments(description: str | None, **flags: str) -> argparse.Namespace:
    """The flags of an example: --model, --reward, and those given as name=help."""
    parser = argparse.ArgumentParser(description=(description or "").split("\n\n")[0])
    parser.add_argument("--model", help="checkpoint of the model, a folder or a Hub name; a tiny one unless given")
    parser.add_argument("--reward", help="sequence classifier with one label; the built-in one unless given")
    for name, text in flags.items():
        parser.add_argument("--" + name, help=text)
    parser.add_argument("--tokens", type=int, default=16, help="response slots")
    parser.add_argument("--seed", type=int, default=0)
    return parser.parse_args()


def reward(path: str | None) -> tuple[Any, Any]:
    """(reward model, its tokenizer)."""
    if path is None:
        return load_reward()
    model = AutoModelForSequenceClassification.from_pretrained(path, num_labels=1).eval()
    return model, AutoTokenizer.from_pretrained(path)


def encode(tokenizer: Any, texts: list[str]) -> Any:
    """Prompts through the chat template, left-padded: input_ids and attention_mask [B, P]."""
    tokenizer.padding_side = "left"
    return tokenizer.apply_chat_template(
        [[{"role": "user", "content": text}] for text in texts],
        add_generation_prompt=True,
        padding=True,
        return_dict=True,
        return_tensors="pt",
    )


def load_code(path: str | Path, name: str) -> Any:
    """A Python file of somebody else's as a module."""
    spec = importlib.util.spec_from_file_location(name, path)
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module


def compare(
    target: Any,
    call: Callable[[], torch.Tensor],
    start: int,
    args: argparse.Namespace,
    texts: list[str] = PROMPTS,
) -> tuple[float, float]:
    """Run the target's call as it is and guided, and report.

    Args:
        target: what guide() was given.
        call: the target's own call; returns sequences [B, S].
        start: first response column of the sequences.
        args: of :func:`arguments`.
        texts: the prompt of each sequence.
    """

    def plain() -> torch.Tensor:
        with target.entrgi.paused():
            return call()

    return report(plain, call, target.entrgi.sampler, start, args, texts)


def report(
    plain: Callable[[], torch.Tensor],
    guided: Callable[[], torch.Tensor],
    sampler: Any,
    start: int,
    args: argparse.Namespace,
    texts: list[str] = PROMPTS,
) -> tuple[float, float]:
    """Run two calls with the same random numbers, print texts, rewards and times; the mean rewards of both."""
    means = []
    for name, call in (("as it was", plain), ("guided", guided)):
        torch.manual_seed(args.seed)
        began = time.perf_counter()
        responses = [row[start:] for row in call().tolist()]
        seconds = time.perf_counter() - began
        prompts = [[{"role": "user", "content": text}] for text in texts]
        rewards = sampler.score(prompts, responses)
        means.append(sum(rewards) / len(rewards))
        print(f"{name}: mean reward {means[-1]:+.3f}, {seconds:.1f} s")
        for row, value in zip(responses, rewards, strict=True):
            print(f"  {value:+.3f}  {' '.join(sampler.decode(row).split())[:100]}")
    return means[0], means[1]
