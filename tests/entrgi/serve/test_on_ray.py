"""Copies of the models behind one front: requests whose copy dies run again; and once with Ray itself, if here."""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import pickle
import signal
import threading
import time
import urllib.request
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest

from entrgi.errors import UsageError
from entrgi.serve import on_ray
from entrgi.serve.engine import Accepted, Event, Frame, Order, Outcome
from entrgi.serve.on_ray import Models, Replicas, devices
from entrgi.serve.settings import Limits, Refusal, Served
from entrgi_kernels.guidance.config import GuidanceConfig
from entrgi_kernels.guidance.results import GenerationResult

CONFIG = GuidanceConfig(max_new_tokens=8, steps=4, num_samples=1)
ORDER = Order([{"role": "user", "content": "hello"}], (("tiny", 1.0),), CONFIG, watched=True)
OUTCOME = Outcome(GenerationResult("hello", [], CONFIG), 5, 0, 0.0, 0.0, 1, 4)
FRAMES = [Frame(step, [str(step)], None) for step in range(3)]
FOREVER = object()


class Death(Exception):
    """A copy has died."""


class Copy:
    """What comes of a call: events, then perhaps an error, or nothing more, ever."""

    def __init__(self, *events: Any) -> None:
        self._events = list(events)
        self.cancelled = False

    async def __anext__(self) -> Event | Refusal:
        await asyncio.sleep(0)
        if not self._events:
            raise StopAsyncIteration
        if self._events[0] is FOREVER:
            await asyncio.Event().wait()
        event = self._events.pop(0)
        if isinstance(event, BaseException) and not isinstance(event, Refusal):
            raise event
        return event

    def cancel(self) -> None:
        self.cancelled = True


@pytest.fixture
def replicas() -> Iterator[Callable[..., Replicas]]:
    """Makes a runner whose calls go to the given copies, one after another."""
    made: list[Replicas] = []

    def make(*copies: Copy, count: Callable[[], int] = lambda: 1, timeout: float = 60.0) -> Replicas:
        left = list(copies)
        made.append(Replicas(lambda order: left.pop(0), lambda error: isinstance(error, Death), count, timeout))
        return made[-1]

    yield make
    for one in made:
        one.close()


async def collect(runner: Replicas) -> list[Event]:
    return [event async for event in runner.run(ORDER)]


def test_a_request_whose_copy_dies_runs_on_another_and_every_event_comes_once(replicas) -> None:
    first = Copy(Accepted(5), *FRAMES[:2], Death())
    second = Copy(Accepted(5), *FRAMES, OUTCOME)
    assert asyncio.run(collect(replicas(first, second))) == [Accepted(5), *FRAMES, OUTCOME]
    assert first.cancelled and second.cancelled  # a copy out of reach may still be at work


@pytest.mark.parametrize(
    "end", [(), (asyncio.CancelledError(),)], ids=["without an outcome", "cancelled by the other end"]
)
def test_a_stream_that_ends_early_counts_as_a_death(replicas, end: tuple[Any, ...]) -> None:
    runner = replicas(Copy(Accepted(5), *end), Copy(Accepted(5), OUTCOME))
    assert asyncio.run(collect(runner)) == [Accepted(5), OUTCOME]


def test_a_request_that_every_copy_dies_of_is_given_up(replicas) -> None:
    copies = [Copy(Accepted(5), Death()) for _ in range(9)]
    with pytest.raises(Refusal, match="3 copies of the models died") as caught:
        asyncio.run(collect(replicas(*copies)))
    assert caught.value.status == 503
    assert [copy.cancelled for copy in copies] == [True] * 3 + [False] * 6


@pytest.mark.parametrize("error", [Refusal(429, "full", retry_after=7), KeyError("a bug")])
def test_what_a_copy_says_is_passed_on_and_not_tried_again(replicas, error: Exception) -> None:
    with pytest.raises(type(error)) as caught:
        asyncio.run(collect(replicas(Copy(error))))  # there is no second copy to ask
    assert caught.value is error


def test_leaving_stops_the_copys_work(replicas) -> None:
    async def leave(copy: Copy) -> None:
        events = replicas(copy).run(ORDER)
        assert await anext(events) == Accepted(5)
        waiting = asyncio.ensure_future(anext(events))
        await asyncio.sleep(0.01)
        waiting.cancel()
        with pytest.raises(asyncio.CancelledError):
            await waiting
        assert copy.cancelled

    async def close(copy: Copy) -> None:
        events = replicas(copy).run(ORDER)
        await anext(events)
        await events.aclose()
        assert copy.cancelled

    asyncio.run(leave(Copy(Accepted(5), FOREVER)))
    asyncio.run(close(Copy(Accepted(5), FOREVER)))


def test_the_time_of_a_request_is_that_of_all_its_tries(replicas) -> None:
    last = Copy(FOREVER)
    with pytest.raises(Refusal, match="--timeout") as caught:
        asyncio.run(collect(replicas(Copy(Accepted(5), Death()), last, timeout=0.1)))
    assert caught.value.status == 504 and last.cancelled


def test_trouble_is_that_no_copy_runs(replicas, monkeypatch) -> None:
    monkeypatch.setattr(on_ray, "_LOOK", 0.001)
    answers: list[Any] = [2]

    def count() -> int:
        if isinstance(answers[0], Exception):
            raise answers[0]
        return answers[0]

    runner = replicas(count=count)

    def eventually(trouble: str | None) -> None:
        while runner.trouble != trouble:
            time.sleep(0.001)

    for answer, trouble in [
        (0, "no copy of the models runs"),
        (1, None),
        (ConnectionError(), "no copy of the models runs"),
    ]:
        answers[0] = answer
        eventually(trouble)
    runner.drain()
    assert runner.trouble == "the server is shutting down"
    with pytest.raises(Refusal, match="shutting down"):
        asyncio.run(collect(runner))


def flags(*given: str) -> argparse.Namespace:
    from entrgi.cli import parse

    return parse(["serve", "--ray", *given])


SERVED = Served("tiny", ("tiny",), -1, CONFIG, True, Limits(prompt_tokens=50), True, keys=("secret",))


@pytest.mark.parametrize(
    ("given", "tiny", "there", "expected"),
    [
        ([], True, {"CPU": 2, "GPU": 8}, {"num_cpus": 1}),
        ([], False, {"CPU": 2, "GPU": 8}, {"num_cpus": 1, "num_gpus": 1}),
        ([], False, {"CPU": 2}, {"num_cpus": 1}),
        (["--device", "cpu"], False, {"CPU": 2, "GPU": 8}, {"num_cpus": 1}),
        (["--device", "cuda"], True, {"CPU": 2, "GPU": 8}, {"num_cpus": 1, "num_gpus": 1}),
        (["--device", "cuda"], True, {"CPU": 2}, "--replicas 1: expected at most 0, the GPUs of this machine"),
        (["--replicas", "3"], True, {"CPU": 2}, "--replicas 3: expected at most 2, the CPUs of this machine"),
        (["--device", "cuda:1"], False, {"CPU": 2, "GPU": 2}, "--device cuda:1: expected auto, cpu or cuda"),
    ],
)
def test_a_copy_has_a_gpu_where_models_run_on_gpus(given, tiny, there, expected) -> None:
    served = Served(**{**vars(SERVED), "tiny": tiny})
    if isinstance(expected, dict):
        assert devices(flags(*given), served, there, alone=True) == expected
        return
    with pytest.raises(UsageError, match=expected):
        devices(flags(*given), served, there, alone=True)


def test_a_copy_answers_refuses_and_is_left(tiny_weights) -> None:
    pytest.importorskip("fastapi")
    pytest.importorskip("uvicorn")
    pytest.importorskip("prometheus_client")
    copy = Models(flags(), SERVED)
    long = Order([{"role": "user", "content": "word " * 100}], ORDER.rewards, CONFIG)

    async def talk() -> None:
        tokenizer, mask = await copy.about()
        assert pickle.loads(pickle.dumps(tokenizer)).mask_token_id == mask
        events = [event async for event in copy.run(pickle.loads(pickle.dumps(ORDER)))]
        assert isinstance(events[0], Accepted) and isinstance(events[-1], Outcome)
        assert [event.step for event in events[1:-1]] == [0, 1, 2, 3]
        pickle.dumps(events)
        (refusal,) = [event async for event in copy.run(long)]
        assert isinstance(refusal, Refusal) and refusal.status == 400
        left = copy.run(ORDER)
        await anext(left)
        with pytest.raises(asyncio.CancelledError):
            await left.athrow(asyncio.CancelledError())  # as Serve does it
        assert copy._engine.load["waiting"] == 0
        await copy.check_health()
        copy._engine.close(timeout=10)
        with pytest.raises(RuntimeError, match="shutting down"):
            await copy.check_health()

    asyncio.run(talk())


def ask(url: str, seed: int, stream: bool) -> str:
    """A text, by one request."""
    body = {"messages": [{"role": "user", "content": f"Was it good? {seed}"}], "seed": seed, "stream": stream}
    request = urllib.request.Request(
        f"{url}/v1/chat/completions", json.dumps(body).encode(), {"content-type": "application/json"}
    )
    with urllib.request.urlopen(request, timeout=120) as answer:
        said = answer.read().decode()
    if not stream:
        return json.loads(said)["choices"][0]["message"]["content"]
    lines = [line[6:] for line in said.split("\n\n") if line.startswith("data: ")]
    assert lines.pop() == "[DONE]"
    chunks = [json.loads(line) for line in lines]
    steps = [chunk["guidance"]["step"] for chunk in chunks if "step" in chunk.get("guidance", {})]
    assert steps == sorted(set(steps))
    return "".join(choice["delta"].get("content", "") for chunk in chunks for choice in chunk["choices"])


def test_the_application_for_serves_own_proxies_wants_keys(monkeypatch) -> None:
    pytest.importorskip("ray.serve")
    monkeypatch.delenv("ENTRGI_API_KEY", raising=False)
    with pytest.raises(UsageError, match="expected API keys"):
        on_ray.app_builder({"replicas": "2"})
    monkeypatch.setenv("ENTRGI_API_KEY", "secret")
    assert on_ray.app_builder({"replicas": "2", "max-tokens": 64})


@pytest.mark.slow
def test_a_copy_killed_under_load_loses_nothing(start, tiny_weights) -> None:
    pytest.importorskip("ray.serve")
    psutil = pytest.importorskip("psutil")
    server = start("--ray", "--replicas", 2, "-L", 16, "-K", 1, "--batch-size", 2)

    def copies() -> list[int]:
        family = psutil.Process(server.process.pid).children(recursive=True)
        return [one.pid for one in family if "ServeReplica" in " ".join(one.cmdline())]

    before = copies()
    assert len(before) == 2
    answered = threading.Semaphore(0)

    def work(seed: int) -> str:
        text = ask(server.url, seed, stream=seed % 3 == 0)
        answered.release()
        return text

    with ThreadPoolExecutor(24) as pool:
        disturbed = pool.map(work, range(24))
        for _ in range(4):
            answered.acquire()
        os.kill(before[0], signal.SIGKILL)
        texts = list(disturbed)
        assert list(pool.map(work, range(24))) == texts
    while len(set(copies()) - {before[0]}) < 2:
        time.sleep(0.2)
    code, said = server.stop()
    assert code == 0
    assert "try 1 of 3" in said
