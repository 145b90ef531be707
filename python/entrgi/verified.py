"""Verifiers where the name of a reward model may stand: ``verifier:NAME[=ARG]``."""

from __future__ import annotations

from typing import TYPE_CHECKING

from .errors import UsageError

if TYPE_CHECKING:
    from entrgi_kernels.guidance.config import GuidanceConfig

VERIFIER = "verifier:"


def is_verifier(name: str | None) -> bool:
    """Whether the name of a reward is that of a verifier."""
    return name is not None and name.startswith(VERIFIER)


def check_guided(reward: str | None, config: GuidanceConfig) -> None:
    """Raise UsageError where a verifier, by its name, is to guide; models need not load for that."""
    if config.guided and is_verifier(reward):
        raise UsageError(
            f"{reward} has no gradient and cannot guide by method {config.method}: expected method none, which ranks "
            "samples by it"
        )
