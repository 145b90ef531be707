"""A server on the tiny models: its engine in this process, and the whole of it in another."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import re
import shutil
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from entrgi.serve.engine import Engine, Order, Outcome
from entrgi.serve.settings import Limits
from entrgi_kernels import GuidedSampler
from entrgi_kernels.guidance.config import GuidanceConfig

ROOT = Path(__file__).resolve().parents[3]
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
SHORT = dict(max_new_tokens=8, steps=4, num_samples=1)


@pytest.fixture(autouse=True)
def _filters_of_the_library(monkeypatch: pytest.MonkeyPatch) -> None:
    """A server filters the library's warnings for good; tests after it want to see them."""
    library = logging.getLogger("entrgi_kernels")
    monkeypatch.setattr(library, "filters", list(library.filters))


@pytest.fixture(scope="session")
def sampler(tiny_weights) -> GuidedSampler:
    from entrgi import tiny

    (model, tokenizer), (reward, reward_tokenizer) = tiny.load_diffusion(), tiny.load_reward()
    return GuidedSampler(model, reward, tokenizer, reward_tokenizer)


@pytest.fixture(scope="session")
def order() -> Callable[..., Order]:
    """Makes an order of a short text."""

    def make(prompt: str = "What did you think of the soup?", **settings: Any) -> Order:
        own = {name: settings.pop(name) for name in ("watched", "trace") if name in settings}
        rewards = settings.pop("rewards", (("tiny", 1.0),))
        return Order([{"role": "user", "content": prompt}], rewards, GuidanceConfig(**{**SHORT, **settings}), **own)

    return make


class Stepper:
    """A sampler that takes a step when it is told to; what it makes is the real one's.

    Attributes:
        batches: prompts of each batch begun.
        entered: set when one has begun.
        steps: counts denoising steps.
    """

    def __init__(self, sampler: GuidedSampler) -> None:
        self._sampler = sampler
        self.batches: list[list[str]] = []
        self.entered, self._go = threading.Event(), threading.Event()
        self.steps = 0

    def __getattr__(self, name: str) -> Any:
        return getattr(self._sampler, name)

    def go(self) -> None:
        """Never wait again."""
        self._go.set()

    def stream(self, prompts: Any, *, watch: Callable[[Any], None], **options: Any) -> Iterator[Any]:
        self.batches.append([turns[-1]["content"] for turns in prompts])
        self.entered.set()

        def stepped(progress: Any) -> None:
            self.steps += 1
            while not self._go.wait(0.01):  # held, but it notices who has gone
                watch(progress)
            watch(progress)

        return self._sampler.stream(prompts, watch=stepped, **options)


@pytest.fixture
def stepper(sampler: GuidedSampler) -> Iterator[Stepper]:
    held = Stepper(sampler)
    yield held
    held.go()


@pytest.fixture
def engine() -> Iterator[Callable[..., Engine]]:
    """Makes engines, which are closed afterwards."""
    made: list[Engine] = []

    def make(sampler: Any, limits: Limits | None = None, **options: Any) -> Engine:
        samplers = sampler if isinstance(sampler, dict) else {"tiny": sampler}
        made.append(Engine(samplers, limits or Limits(), **options))
        return made[-1]

    yield make
    for one in made:
        one.close(timeout=10)


async def outcome_of(engine: Engine, order: Order) -> Outcome:
    """The last event of an order."""
    events = [event async for event in engine.run(order)]
    assert isinstance(events[-1], Outcome)
    return events[-1]


@pytest.fixture
def together() -> Callable[..., list[Any]]:
    """Runs orders at once; an outcome each, or the error that came instead."""

    def run(engine: Engine, orders: list[Order]) -> list[Any]:
        async def gather() -> list[Any]:
            return await asyncio.gather(*(outcome_of(engine, one) for one in orders), return_exceptions=True)

        return asyncio.run(gather())

    return run


class Process:
    """``entrgi serve`` in a process of its own.

    Attributes:
        url: without a path.
    """

    def __init__(self, *flags: Any, environment: dict[str, str] | None = None) -> None:
        command = [sys.executable, "-m", "entrgi", "serve", "--port", "0", *map(str, flags)]
        path = os.pathsep.join([str(ROOT), str(ROOT / "python"), os.environ.get("PYTHONPATH", "")])
        variables = {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1", **(environment or {})}
        self.process = subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=variables
        )
        line = self.process.stdout.readline()
        found = re.search(r"http://\S+", line)
        if not found:
            raise AssertionError(f"no address in {line!r}: {self.process.communicate()[1]}")
        self.url = found.group()

    def stop(self) -> tuple[int, str]:
        """(exit code, standard error) after SIGTERM."""
        self.process.terminate()
        _, said = self.process.communicate(timeout=300)
        return self.process.returncode, said


@pytest.fixture(scope="module")  # no longer: while its driver is there, no other event loop can run
def browser() -> Iterator[Any]:
    if CHROMIUM is None:
        pytest.skip("needs a Chromium")
    playwright = pytest.importorskip("playwright.sync_api", reason="drives the browser")
    with playwright.sync_playwright() as driver:
        chromium = driver.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield chromium
        chromium.close()


@pytest.fixture(scope="session")
def start() -> Iterator[Callable[..., Process]]:
    """Starts servers, which are stopped at the end."""
    made: list[Process] = []

    def make(*flags: Any, **options: Any) -> Process:
        made.append(Process(*flags, **options))
        return made[-1]

    yield make
    for one in made:
        one.process.kill()
        with contextlib.suppress(Exception):
            one.process.communicate(timeout=10)


@pytest.fixture(scope="session")
def server(start, tiny_weights) -> Process:
    """One that many tests ask."""
    return start(
        "-L",
        8,
        "--max-tokens",
        64,
        "--max-body",
        20000,
        "--max-prompt-tokens",
        200,
        "--max-samples",
        4,
        "--max-trace",
        4000,
    )
