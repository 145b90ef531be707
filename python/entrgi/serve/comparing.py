"""What the page asks for: two methods on one prompt, step by step as they denoise, and the comparison at the end."""

from __future__ import annotations

import asyncio
import contextlib
import math
from collections.abc import AsyncIterator, Callable
from typing import TYPE_CHECKING, Any

from pydantic import BaseModel, ConfigDict

from entrgi_kernels.guidance.results import GenerationResult, Sample
from entrgi_kernels.names import METHODS

from .. import report
from ..compare import versions
from ..comparison import TINY_NOTE, Comparison, MethodRun
from .engine import Accepted, Event, Frame, Order, Outcome
from .schema import config_of, rewards_of
from .settings import OPERATORS, Refusal, Served

if TYPE_CHECKING:
    from .app import Runner


class CompareRequest(BaseModel):
    """A request to ``/compare``.

    Attributes:
        prompt: one user turn.
        reward: a name; None is the server's first.
        methods: two different ones.
        settings: of :class:`entrgi_kernels.guidance.GuidanceConfig` by their names.
    """

    model_config = ConfigDict(strict=True, extra="forbid")

    prompt: str
    reward: str | None = None
    methods: list[str]
    settings: dict[str, Any] = {}


class Comparing:
    """Answers such requests.

    Args:
        runner: runs orders.
        served: the server.
        tokenizer: the diffusion model's.
    """

    def __init__(self, runner: Runner, served: Served, tokenizer: Any) -> None:
        self._runner, self._served, self._tokenizer = runner, served, tokenizer

    def about(self) -> dict[str, Any]:
        """What the page is built from; see :func:`.page.build`."""
        served, limits = self._served, self._served.limits
        examples: list[str] = []
        if served.tiny:
            from .. import tiny

            examples = tiny.prompts(4, seed=0)
        return {
            "model": served.model,
            "rewards": list(served.rewards),
            "methods": {name: method.label for name, method in METHODS.items()},
            # One sample is no best of several.
            "defaults": {
                **{name: value for name, value in served.defaults.to_dict().items() if name not in OPERATORS},
                "num_samples": max(served.defaults.num_samples, min(4, limits.num_samples)),
            },
            "limits": {
                "max_new_tokens": limits.max_tokens,
                "steps": limits.steps,
                "num_samples": limits.num_samples,
                "guidance_steps": limits.guidance_steps,
            },
            "examples": examples,
            "note": TINY_NOTE if served.tiny else "",
            "key": bool(served.keys),
        }

    def understand(self, request: CompareRequest) -> list[Order]:
        """An order for each method, of the same seed.

        Raises:
            Refusal: what cannot be served.
        """
        methods = request.methods
        if len(methods) != 2 or len(set(methods)) != 2 or not set(methods) <= set(METHODS):
            raise Refusal(400, f"methods={methods!r:.80}: expected two out of {', '.join(METHODS)}", param="methods")
        rewards = rewards_of(request.reward, self._served)
        first = config_of({**request.settings, "method": methods[0]}, self._served, trace=True)
        turns = [{"role": "user", "content": request.prompt}]
        configs = [
            first,
            config_of({**request.settings, "seed": first.seed, "method": methods[1]}, self._served, trace=True),
        ]
        return [Order(turns, rewards, config, watched=True, trace=True) for config in configs]

    async def run(
        self,
        request: CompareRequest,
        orders: list[Order],
        counted: Callable[[AsyncIterator[Event]], AsyncIterator[Event]],
    ) -> AsyncIterator[dict[str, Any]]:
        """The stream's objects: "start", "step" as steps are done, and "report".

        Args:
            request, orders: what was asked for, understood.
            counted: goes around each order's events.

        Raises:
            Refusal: an order's.
        """
        queue: asyncio.Queue[tuple[int, Event | Exception]] = asyncio.Queue(maxsize=8)  # who reads slowly misses frames

        async def read(place: int) -> None:
            events = counted(self._runner.run(orders[place]))
            try:
                async for event in events:
                    await queue.put((place, event))
            except Exception as error:
                await queue.put((place, error))
            finally:
                await events.aclose()  # type: ignore[attr-defined]

        tasks = [asyncio.ensure_future(read(place)) for place in range(len(orders))]
        outcomes: dict[int, Outcome] = {}
        sent: set[int] = set()
        accepted = 0
        try:
            while len(outcomes) < len(orders):
                place, event = await queue.get()
                if isinstance(event, Exception):
                    raise event
                if isinstance(event, Accepted):
                    accepted += 1
                    if accepted == len(orders):
                        yield {"start": self._blank(request, orders, sent)}
                elif isinstance(event, Outcome):
                    outcomes[place] = event
                elif accepted == len(orders) and (step := self._step(event, orders[place].config.method, sent)):
                    yield step
            yield {"report": self._report(request, orders, [outcomes[place] for place in range(len(orders))])}
        finally:
            for task in tasks:
                task.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await asyncio.gather(*tasks, return_exceptions=True)

    def _step(self, frame: Frame, method: str, sent: set[int]) -> dict[str, Any] | None:
        step = frame.traces[0] if frame.traces else None
        if step is None:
            return None
        new = set(step.tokens) - sent
        sent |= new
        content = {"method": method, "step": step.step, **report.compact_step(step)}
        return {"step": content, "strings": {str(t): report.token_text(self._tokenizer, t) for t in sorted(new)}}

    def _blank(self, request: CompareRequest, orders: list[Order], sent: set[int]) -> dict[str, Any]:
        """A report's data before the first step."""
        mask, config = self._served.mask_token_id, orders[0].config
        tokens = [mask] * config.max_new_tokens
        runs = []
        for order in orders:
            result = GenerationResult(request.prompt, [Sample("", tokens, math.nan)], order.config)
            none_yet = {"top1": [math.nan], "avg": [math.nan]}
            runs.append(MethodRun(order.config.method, [result], 0.0, none_yet))
        data = report.payload(self._comparison(request, orders, runs), self._tokenizer)
        sent.add(mask)
        empty: dict[str, list[Any]] = {"h": [], "w": [], "reward": [], "before": [], "after": []}
        trace = {"tokens": tokens, "at": [-1] * len(tokens), **empty}
        return {
            **data,
            "note": TINY_NOTE if self._served.tiny else "",
            "footer": "",
            "metrics": [],
            "differences": [],
            "samples": {run.key: [[]] for run in runs},
            "traces": {run.key: [[trace]] for run in runs},
            "strings": {str(mask): "…"},
            "mask": mask,
            "steps": config.steps,
        }

    def _report(self, request: CompareRequest, orders: list[Order], outcomes: list[Outcome]) -> dict[str, Any]:
        runs = []
        for outcome in outcomes:
            result = outcome.result
            figures = {"top1": [float(result.top1)], "avg": [float(result.mean)]}
            runs.append(MethodRun(result.config.method, [result], outcome.ran, figures))
        data = report.payload(self._comparison(request, orders, runs), self._tokenizer)
        return {**data, "footer": "Written by entrgi serve"}

    def _comparison(self, request: CompareRequest, orders: list[Order], runs: list[MethodRun]) -> Comparison:
        served, settings = self._served, orders[0].config.to_dict()
        about = {
            "prompts": 1,
            "model": served.model,
            "reward": orders[0].rewards[0][0],
            "tiny": served.tiny,
            **versions(),
            **{name: value for name, value in settings.items() if name not in ("method", *OPERATORS)},
        }
        return Comparison([request.prompt], runs, about)
