"""The models behind a queue: requests of one shape are denoised together, in a thread of their own.

A request's shape is its settings and its reward; seeds and prompts may differ within a batch. What a request gets
depends on its own seed, prompt and settings, not on the others (`seeds` of :meth:`GuidedSampler.stream`).
"""

from __future__ import annotations

import asyncio
import collections
import copy
import dataclasses
import logging
import math
import threading
import time
from collections.abc import AsyncIterator, Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any

from entrgi_kernels import GuidedSampler, rewards
from entrgi_kernels.backends import BackendUnavailableError
from entrgi_kernels.guidance.memory import MemoryEstimate, memory_budget
from entrgi_kernels.guidance.results import GenerationResult, Progress, StepTrace
from entrgi_kernels.shortage import is_out_of_memory
from entrgi_kernels.text.template import conversation_from, encode_prompt

from .settings import Limits, Refusal

if TYPE_CHECKING:
    from entrgi_kernels.guidance.config import GuidanceConfig

logger = logging.getLogger("entrgi.serve")

# A burst comes one by one: the first of it waits for as long as others follow within so many seconds, at most so long.
_LINGER, _BURST = 0.01, 0.25
_FRAMES = 64  # that are kept for a slow reader; the oldest go first
_SUMS = 8  # weighted sums of rewards that are kept ready
_ESTIMATES = 64
_BROKEN_AFTER = 3  # batches in a row that failed for no fault of the requests


@dataclasses.dataclass(frozen=True)
class Order:
    """A request as the engine takes it; may be pickled.

    Attributes:
        conversation: turns that end with the user's.
        rewards: names and weights of the rewards; one alone guides by itself.
        config: settings; the request's own seed among them.
        watched: whether frames are wanted.
        trace: whether every step is kept.
    """

    conversation: list[dict[str, str]]
    rewards: tuple[tuple[str, float], ...]
    config: GuidanceConfig
    watched: bool = False
    trace: bool = False

    @property
    def shape(self) -> tuple[Any, ...]:
        """What requests of one batch have in common. A trace makes a batch slower: those who ask for it share one."""
        return self.config.replace(seed=0), self.rewards, self.trace


@dataclasses.dataclass(frozen=True)
class Accepted:
    """The first event of every request: it is in the queue, with so many prompt tokens."""

    prompt_tokens: int


@dataclasses.dataclass(frozen=True)
class Frame:
    """A request after a denoising step.

    Attributes:
        step: index of the step.
        canvases: each sample's text as it stands, with U+2591 for a slot that is open.
        traces: each sample's step, where the order asks for traces; None where the step did nothing.
    """

    step: int
    canvases: list[str]
    traces: list[StepTrace | None] | None


@dataclasses.dataclass(frozen=True)
class Outcome:
    """The last event.

    Attributes:
        result: all samples.
        prompt_tokens: tokens of the prompt, its chat template included.
        eos: the id that ends a response.
        waited, ran: seconds in the queue, and of the batch.
        together: requests of the batch.
        steps: denoising steps that the batch took.
    """

    result: GenerationResult
    prompt_tokens: int
    eos: int
    waited: float
    ran: float
    together: int
    steps: int


Event = Accepted | Frame | Outcome


class _Abandoned(Exception):
    """All clients of a batch have gone."""


class _Job:
    """A request in the engine: written to by the engine's thread, read by an event loop."""

    def __init__(self, order: Order, ids: list[int], arrived: float, timeout: float) -> None:
        self.order, self.ids, self.arrived, self.deadline = order, ids, arrived, arrived + timeout
        self.over = False  # answered, failed, timed out or left by its client
        self.shown = -1  # the last step that a frame was of
        self._loop = asyncio.get_running_loop()
        self._events: collections.deque[Event | Exception] = collections.deque()
        self._wake = asyncio.Event()

    def put(self, event: Event | Exception) -> None:
        """Hand an event over, from any thread; nothing follows an outcome or an error."""
        if self.over:
            return
        if not isinstance(event, Frame):  # never set back: its client may leave at this very moment
            self.over = True
        try:
            self._loop.call_soon_threadsafe(self._put, event)
        except RuntimeError:  # the loop is closed: nobody reads
            self.over = True

    def _put(self, event: Event | Exception) -> None:
        if len(self._events) >= _FRAMES:
            self._events.popleft()
        self._events.append(event)
        self._wake.set()

    async def events(self) -> AsyncIterator[Event]:
        """Frames as they come, and the outcome.

        Raises:
            Refusal: what became of it instead.
        """
        while True:
            await self._wake.wait()
            self._wake.clear()
            while self._events:
                event = self._events.popleft()
                if isinstance(event, Exception):
                    raise event
                yield event
                if isinstance(event, Outcome):
                    return


class Engine:
    """Runs orders.

    Args:
        samplers: by reward; they share one diffusion model.
        limits: of the server.
        batch_size: requests denoised together at most; "auto" is what `memory_budget` holds.
        budget: bytes, or a share of the free memory; None is the sampler's own choice.
    """

    def __init__(
        self,
        samplers: dict[str, GuidedSampler],
        limits: Limits,
        batch_size: int | str = "auto",
        budget: int | float | None = None,
    ) -> None:
        self._samplers: dict[tuple[tuple[str, float], ...], GuidedSampler] = {
            ((name, 1.0),): sampler for name, sampler in samplers.items()
        }
        self._sums: collections.OrderedDict[tuple[tuple[str, float], ...], GuidedSampler] = collections.OrderedDict()
        self._limits, self._batch_size, self._budget = limits, batch_size, budget
        self._first = next(iter(samplers.values()))
        # Fast tokenizers do not like two threads at once: the engine's thread has the samplers' own.
        self._tokenizer = copy.deepcopy(self._first.tokenizer)
        self._admission = ThreadPoolExecutor(1, thread_name_prefix="entrgi-admission")
        self._waiting: collections.deque[_Job] = collections.deque()
        self._running: list[_Job] = []
        self._entering = 0  # requests whose prompts are being turned into tokens
        self._change = threading.Condition()
        self._draining = self._closed = False
        self._estimates: collections.OrderedDict[Any, tuple[int, MemoryEstimate]] = collections.OrderedDict()
        self._pace = 1.0  # seconds of a batch, a moving average
        self._together = 1.0  # requests of a batch, likewise
        self._failed = 0
        self._thread = threading.Thread(target=self._work, name="entrgi-engine", daemon=True)
        self._thread.start()

    # ---- from the event loop

    async def run(self, order: Order) -> AsyncIterator[Event]:
        """Run an order; leaving the iterator gives its place away, and stops a batch that nobody else waits for.

        Yields:
            An :class:`Accepted`, frames where the order is watched, and the :class:`Outcome`.

        Raises:
            Refusal: the request cannot be served, with the HTTP status that says why.
        """
        arrived = time.monotonic()
        with self._change:
            self._check_room()
            self._entering += 1  # a place is kept: a full queue has no prompt turned into tokens
        try:
            ids = await asyncio.get_running_loop().run_in_executor(self._admission, self._admit, order)
            job = _Job(order, ids, arrived, self._limits.timeout)
        finally:
            with self._change:
                self._entering -= 1
        with self._change:
            self._check_room()
            self._waiting.append(job)
            self._change.notify_all()
        try:
            yield Accepted(len(ids))
            async for event in job.events():
                yield event
        finally:
            job.over = True
            with self._change:
                if job in self._waiting:
                    self._waiting.remove(job)

    def _check_room(self) -> None:
        """Raise Refusal where no further request can wait."""
        if self._draining:
            raise Refusal(503, "the server is shutting down", retry_after=5)
        self._forget_expired()
        count = len(self._waiting) + self._entering
        if count >= self._limits.queue:
            said = f"{count} requests are waiting, which is the limit (--max-queue)"
            raise Refusal(429, said, retry_after=self.seconds_ahead())

    def seconds_ahead(self) -> int:
        """About how long a request would wait for the queue to move, at least one second."""
        batches = 1 + len(self._waiting) / max(1.0, self._together)
        return max(1, math.ceil(self._pace * batches / 2))

    @property
    def load(self) -> dict[str, int]:
        """Requests that wait and that run."""
        return {"waiting": len(self._waiting), "running": len(self._running)}

    @property
    def trouble(self) -> str | None:
        """Why no request can be served; None where all is well."""
        if self._draining:
            return "the server is shutting down"
        if not self._thread.is_alive():
            return "the engine's thread has died"
        if self._failed >= _BROKEN_AFTER:
            return f"the last {self._failed} batches failed"
        return None

    def drain(self) -> None:
        """Take no more requests and send away those that wait; what runs is finished."""
        with self._change:
            self._draining = True
            waiting, self._waiting = list(self._waiting), collections.deque()
            self._change.notify_all()
        for job in waiting:
            job.put(Refusal(503, "the server is shutting down", retry_after=5))

    def close(self, timeout: float | None = None) -> bool:
        """Drain, and wait for the engine's thread; whether it has ended."""
        self.drain()
        with self._change:
            self._closed = True
            self._change.notify_all()
        self._thread.join(timeout)
        self._admission.shutdown(wait=False)
        return not self._thread.is_alive()

    def _admit(self, order: Order) -> list[int]:
        """The prompt's ids. What only the reward can judge is found when it runs."""
        try:
            ids = encode_prompt(self._tokenizer, conversation_from(order.conversation))
        except (ValueError, TypeError) as error:
            raise Refusal(400, str(error), param="messages") from None
        if len(ids) > self._limits.prompt_tokens:
            raise Refusal(
                400,
                f"the messages have {len(ids)} tokens: expected at most {self._limits.prompt_tokens} "
                "(--max-prompt-tokens)",
                param="messages",
                code="context_length_exceeded",
            )
        return ids

    def _forget_expired(self) -> None:
        """Send away those that have waited for too long."""
        now = time.monotonic()
        for job in [job for job in self._waiting if job.deadline < now]:
            self._waiting.remove(job)
            job.put(self._late())

    def _late(self) -> Refusal:
        return Refusal(504, f"not done within {self._limits.timeout:g} s (--timeout)", retry_after=self.seconds_ahead())

    # ---- in the engine's thread

    def _work(self) -> None:
        while jobs := self._next():
            started = time.monotonic()
            try:
                self._run_all(jobs)
            finally:
                with self._change:
                    self._running = []
                    self._change.notify_all()
            share = 0.3
            self._pace += share * (time.monotonic() - started - self._pace)
            self._together += share * (len(jobs) - self._together)

    def _next(self) -> list[_Job]:
        """The oldest request and those of its shape that fit beside it; none when closed."""
        while True:
            with self._change:
                idle = not self._waiting
                while not self._waiting and not self._closed:
                    self._change.wait()
                if idle:
                    self._linger()
                self._forget_expired()
                if not self._waiting:
                    if self._closed:
                        return []
                    continue
                shape = self._waiting[0].order.shape
                alike = [job for job in self._waiting if job.order.shape == shape]
            jobs = alike[: self._room(alike)]  # may run the models: not under the lock
            with self._change:
                jobs = [job for job in jobs if job in self._waiting]
                for job in jobs:
                    self._waiting.remove(job)
                self._running = jobs
            if jobs:
                return jobs

    def _linger(self) -> None:
        """Wait while a burst goes on; the lock is held by the caller."""
        end, count = time.monotonic() + _BURST, 0
        while (self._entering or count < len(self._waiting)) and time.monotonic() < end:
            count = len(self._waiting)
            self._change.wait_for(lambda: self._closed, _LINGER)

    def _room(self, jobs: Sequence[_Job]) -> int:
        """How many of the first requests are denoised together."""
        if isinstance(self._batch_size, int) or len(jobs) == 1:
            return min(len(jobs), self._batch_size if isinstance(self._batch_size, int) else 1)
        order = jobs[0].order
        try:
            allowed = memory_budget(self._budget, self._first.model.device)
            longest = max(jobs, key=lambda job: len(job.ids))
            needed = self._estimate(longest)
        except Exception:  # the batch itself will say it better, request by request
            logger.debug("no estimate of the memory", exc_info=True)
            return 1
        rows, count, length = order.config.num_samples * order.config.copies, 1, len(jobs[0].ids)
        for job in jobs[1:]:
            length = max(length, len(job.ids))
            if needed((count + 1) * rows, length) > allowed:
                break
            count += 1
        return count

    def _estimate(self, job: _Job) -> MemoryEstimate:
        # What only moves numbers takes no memory: requests that differ in it share an estimate.
        plain = job.order.config.replace(
            seed=0, temperature=0.7, top_p=None, top_k=None, learning_rate=0.5, guidance_scale=1.0
        )
        key = plain, job.order.rewards
        known = self._estimates.pop(key, None)
        if known is None or known[0] < len(job.ids):
            sampler = self._sampler(job.order.rewards)
            turns = conversation_from(job.order.conversation)
            known = len(job.ids), sampler.memory_estimate(turns, job.ids, plain)
        self._estimates[key] = known
        while len(self._estimates) > _ESTIMATES:
            self._estimates.popitem(last=False)
        return known[1]

    def _sampler(self, wanted: tuple[tuple[str, float], ...]) -> GuidedSampler:
        """The sampler of a reward, or of a weighted sum of several."""
        if wanted in self._samplers:
            return self._samplers[wanted]
        found = self._sums.pop(wanted, None)
        if found is None:
            parts = [(weight, self._samplers[((name, 1.0),)].reward) for name, weight in wanted]
            reward = rewards.WeightedSum(parts)
            found = GuidedSampler(self._first.model, reward, self._first.tokenizer)
        self._sums[wanted] = found
        while len(self._sums) > _SUMS:
            self._sums.popitem(last=False)
        return found

    def _run_all(self, jobs: list[_Job]) -> None:
        """A batch; where it fails, each of its requests alone, so that a bad one spoils no other."""
        try:
            self._run(jobs)
        except _Abandoned:
            logger.info("a batch of %d stopped: all clients have gone", len(jobs))
        except Exception as error:
            left = [job for job in jobs if not job.over]
            if len(jobs) > 1 and left:
                logger.info("a batch of %d failed (%s): its requests run alone", len(jobs), type(error).__name__)
                for job in left:
                    self._run_all([job])
                return
            refusal = refusal_of(error)
            if refusal.status >= 500 or isinstance(error, ArithmeticError):
                # What is not finite, or too large, may come of the request's settings; a message names the prompt.
                own = isinstance(error, ArithmeticError) or is_out_of_memory(error)
                logger.error("a request failed (%s)", type(error).__name__, exc_info=None if own else error)
                self._failed += not own
            for job in left:
                job.put(refusal)

    def _run(self, jobs: list[_Job]) -> None:
        first = jobs[0].order
        sampler, started = self._sampler(first.rewards), time.monotonic()
        watched = any(job.order.watched for job in jobs)
        settings = {f.name: getattr(first.config, f.name) for f in dataclasses.fields(first.config)}
        results = sampler.stream(
            [job.order.conversation for job in jobs],
            trace=first.trace,
            progress=False,
            seeds=[job.order.config.seed for job in jobs],
            watch=self._watcher(jobs, sampler, watched),
            **{**settings, "seed": 0, "batch_size": len(jobs)},
        )
        for index, result in results:
            job, now = jobs[index], time.monotonic()
            own = GenerationResult(result.prompt, result.samples, job.order.config)
            waited, ran = started - job.arrived, now - started
            self._failed = 0
            job.put(Outcome(own, len(job.ids), sampler.eos_token_id, waited, ran, len(jobs), sampler.stats.steps))

    def _watcher(self, jobs: list[_Job], sampler: GuidedSampler, watched: bool) -> Callable[[Progress], None]:
        def watch(progress: Progress) -> None:
            now = time.monotonic()
            for job in jobs:
                if not job.over and job.deadline < now:
                    job.put(self._late())
            with self._change:
                self._forget_expired()
            if all(job.over for job in jobs):
                raise _Abandoned
            if not watched:
                return
            rows = progress.responses.tolist()
            k = len(rows) // len(progress.prompts)
            for place, index in enumerate(progress.prompts):
                job = jobs[index]
                if job.over or not job.order.watched:
                    continue
                # A batch that is halved, or run again, begins anew: no step is shown twice, nor some of the samples.
                if progress.step <= job.shown or k < job.order.config.num_samples:
                    continue
                job.shown = progress.step
                mine = range(place * k, (place + 1) * k)
                traces: list[StepTrace | None] | None = None
                if progress.traces is not None:  # by the step's number: a sample that has ended has no more of them
                    kept = [progress.traces[row] for row in mine]
                    traces = [trace[-1] if trace and trace[-1].step == progress.step else None for trace in kept]
                canvases = [canvas_text(sampler, rows[row]) for row in mine]
                job.put(Frame(progress.step, canvases, traces))

        return watch


def canvas_text(sampler: GuidedSampler, response: list[int]) -> str:
    """A response as it stands, up to its end: runs of tokens as text, U+2591 for a slot that is open."""
    mask, out, run = sampler.model.mask_token_id, [], []
    end = response.index(sampler.eos_token_id) if sampler.eos_token_id in response else len(response)
    for token in response[:end]:
        if token != mask:
            run.append(token)
            continue
        if run:
            out.append(sampler.decode(run))
            run = []
        out.append("░")
    return "".join([*out, sampler.decode(run) if run else ""])


def refusal_of(error: Exception) -> Refusal:
    """What a client is told of an error: its own fault, or the server's."""
    if isinstance(error, Refusal):
        return error
    if is_out_of_memory(error):
        return Refusal(503, "out of memory: ask for fewer samples or tokens, or try again later", retry_after=5)
    if isinstance(error, ArithmeticError):
        # Logits or rewards that are not finite, by the request's settings or the models; tried again they would be so.
        return Refusal(422, str(error))
    if isinstance(error, (ValueError, TypeError, BackendUnavailableError)):
        return Refusal(400, str(error))
    return Refusal(500, f"the server failed ({type(error).__name__}); its log says more")
