"""A function of the finished text as a reward: it ranks, and does not guide."""

from __future__ import annotations

import collections
import logging
import math
from typing import Any

import torch

from ..text.template import Conversation
from .base import Targets, check_differentiable, check_texts
from .decoding.sequences import PreparedPrompts
from .verifiers.naming import named
from .verifiers.pool import Function, Pool
from .weighted_sum import Combinable

logger = logging.getLogger("entrgi_kernels")


class Verifier(Combinable):
    """A function of (prompt, text) as a reward without a gradient; :func:`verifier` makes one.

    Attributes:
        differentiable: False: guidance refuses it.
        takes_ended, takes_targets: True: :meth:`score_embeddings` reads the tokens.
    """

    differentiable = False
    takes_ended = True
    takes_targets = True

    def __init__(
        self,
        function: Function,
        *,
        workers: int = 4,
        timeout: float | None = 10.0,
        processes: bool = False,
        failed: float = 0.0,
    ) -> None:
        if isinstance(function, type) or not callable(function):
            raise TypeError(
                f"a verifier cannot be {function!r:.100}: expected a function of (prompt, text), or a verifier's name"
            )
        if not isinstance(workers, int) or isinstance(workers, bool) or workers < 1:
            raise ValueError(f"workers={workers!r}: expected an integer >= 1")
        for name, value in (("timeout", timeout), ("failed", failed)):
            if isinstance(value, bool) or not isinstance(value, (int, float, type(None) if name == "timeout" else int)):
                raise TypeError(f"{name}={value!r}: expected a number" + (" or None" if name == "timeout" else ""))
        if timeout is not None and not 0 < timeout < math.inf:
            raise ValueError(f"timeout={timeout!r}: expected a number of seconds above 0, or None for no limit")
        own = getattr(function, "timeout", None)
        if timeout is not None and isinstance(own, (int, float)) and own >= timeout:
            raise ValueError(
                f"timeout={timeout:g}: {type(function).__name__} has a limit of {own:g} s of its own, expected a "
                "longer one or None"
            )
        self.function, self.failed = function, float(failed)
        self._pool = Pool(function, workers, timeout, processes)

    def __repr__(self) -> str:
        name = getattr(self.function, "__name__", None)
        return f"Verifier({name or repr(self.function)[:60]})"

    def embedding_table(self, tokenizer: Any, vocab_size: int) -> torch.Tensor:
        """[V, 0]: it reads no embeddings."""
        return torch.empty(vocab_size, 0)

    def prepare(self, conversations: list[Conversation]) -> PreparedPrompts:
        """The prompts themselves."""
        return PreparedPrompts([list(turns) for turns in conversations], prefix=torch.empty(len(conversations), 0, 0))

    def score_embeddings(
        self,
        prepared: PreparedPrompts,
        index: torch.Tensor,
        response: torch.Tensor,
        alive: torch.Tensor,
        *,
        ended: torch.Tensor | None = None,
        targets: Targets | None = None,
    ) -> torch.Tensor:
        """Rewards [B] of the texts that the tokens of ``targets`` stand for, up to the first slot of ``ended``.

        Raises:
            ValueError: a gradient is asked for, or the tokens are missing.
        """
        if torch.is_grad_enabled() and response.requires_grad:
            check_differentiable(self)
        if targets is None:
            raise ValueError(f"{self!r} reads texts, not embeddings: expected targets=, the tokens")
        stops = torch.zeros_like(alive) if ended is None else ended
        texts = [
            targets.tokenizer.decode(ids[: stop.index(True) if True in stop else None], skip_special_tokens=True)
            for ids, stop in zip(targets.tokens.tolist(), stops.tolist(), strict=True)
        ]
        values = self.score_texts([prepared.conversations[place] for place in index.tolist()], texts)
        return torch.tensor(values, device=response.device)

    def score_texts(self, conversations: list[Conversation], responses: list[str], batch_size: int = 8) -> list[float]:
        """What the function says of finished responses, in order; `batch_size` plays no part.

        A text that the function fails on (an exception, too long a time, a value that is no finite number) is given
        ``failed``; a warning counts them.

        Raises:
            ValueError, TypeError: as for :meth:`NetworkReward.score_texts`.
        """
        check_texts(conversations, responses, batch_size)
        prompts = [turns[-1]["content"] if turns else "" for turns in conversations]
        verdicts = self._pool(list(zip(prompts, responses, strict=True)))
        reasons = collections.Counter(reason for value, reason in verdicts if value is None)
        if reasons:
            logger.warning(
                "%r failed on %d of %d texts, which are given %g: %s",
                self,
                reasons.total(),
                len(verdicts),
                self.failed,
                "; ".join(f"{count} x {reason}" for reason, count in reasons.most_common(3)),
            )
        return [self.failed if value is None else value for value, _ in verdicts]


def verifier(
    function: Function | str,
    *,
    workers: int = 4,
    timeout: float | None = 10.0,
    processes: bool = False,
    failed: float = 0.0,
) -> Verifier:
    """Make a reward of a function of the finished text: it ranks samples, and has no gradient to guide with.

    ::

        reward = verifier(lambda prompt, text: text.count("a") > 3)
        reward = verifier(verifiers.PythonTests("assert add(1, 2) == 3"))
        reward = verifier("regex=^[a-z ]+$")
        GuidedSampler(model, reward, tokenizer, method="none").generate(prompts)[0].best

    Args:
        function: f(prompt, text) -> bool or a finite number, the prompt being the text of the conversation's last turn;
            or one of :mod:`entrgi_kernels.rewards.verifiers` by its name, as :func:`verifiers.named` takes it.
        workers: texts that are looked at at a time. Results do not depend on it.
        timeout: seconds for one text; None for no limit.
        processes: look at texts in processes, whose time limit holds whatever the function does; it must be at the top
            of a module. In threads, a function that takes too long is left behind and goes on; one that never lets go
            of the interpreter (a regular expression that backtracks) holds everything.
        failed: the reward of a text that the function fails on.

    Raises:
        TypeError, ValueError: no function or name of a verifier, or a setting out of range.
    """
    function = named(function) if isinstance(function, str) else function
    return Verifier(function, workers=workers, timeout=timeout, processes=processes, failed=failed)
