"""``entrgi serve --ray``: copies of the models as a Ray Serve deployment, behind the same application as ever.

The front is this process, with :mod:`.server`'s uvicorn, guards and shutdown; what it asks is not an engine but a
:class:`Replicas`, which hands each order to a copy. A copy is an actor with a GPU and an :class:`.engine.Engine` of its
own. Requests are batched there, by that engine and not by ``@serve.batch``, which fills a batch by number and time: it
knows neither that only requests of one shape go together nor how many of them the memory holds.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import dataclasses
import logging
import os
import re
import socket
import sys
import threading
import time
from collections.abc import AsyncIterator, Callable
from typing import TYPE_CHECKING, Any, Protocol

from ..errors import UsageError, require
from .engine import Accepted, Event, Frame, Order, Outcome
from .settings import Refusal, Served

if TYPE_CHECKING:
    from ray.serve import Application

logger = logging.getLogger("entrgi.serve")

_TRIES = 3  # of a request whose copies die
_LOOK = 2.0  # seconds between looks at what runs
_MODELS = "models"  # the deployment
_LOGGING = {"log_level": "CRITICAL"}  # Serve's own lines: what matters of them is said here
_VARIABLES = {
    "RAY_USAGE_STATS_ENABLED": "0",
    # Serve is to ask copies how busy they are, every time. From what it remembers of the last ten seconds it gives
    # nine of ten requests of a burst to one of two copies; a question takes milliseconds, and a request seconds.
    "RAY_SERVE_QUEUE_LENGTH_CACHE_TIMEOUT_S": "0",
}


class Models:
    """A copy of the models: what Ray Serve calls a replica.

    Args:
        args: flags of ``entrgi serve``.
        served: what they describe.

    Raises:
        UsageError: models that cannot be loaded.
    """

    def __init__(self, args: argparse.Namespace, served: Served) -> None:
        from .offer import load
        from .server import make_engine

        samplers = load(args, served)
        first = next(iter(samplers.values()))
        self._about = first.tokenizer, first.model.mask_token_id
        self._engine = make_engine(samplers, served)

    async def about(self) -> tuple[Any, int]:
        """The diffusion model's tokenizer and the id of its mask: what the front must know."""
        return self._about

    async def run(self, order: Order) -> AsyncIterator[Event | Refusal]:
        """The engine's events. A refusal is one of them: raised, Serve would log it as a failure of this copy."""
        events = self._engine.run(order)
        try:
            async for event in events:
                yield event
        except Refusal as refusal:
            yield refusal
        finally:
            await events.aclose()  # type: ignore[attr-defined]

    async def check_health(self) -> None:
        """Serve calls this, and replaces a copy that raises."""
        if self._engine.trouble:
            raise RuntimeError(self._engine.trouble)


class Stream(Protocol):
    """What comes of a call: Serve's DeploymentResponseGenerator."""

    async def __anext__(self) -> Event | Refusal:
        """The next event."""
        ...

    def cancel(self) -> None:
        """Stop the work."""
        ...


class _LostError(Exception):
    """A stream ended before its request did."""


class Replicas:
    """A runner that hands orders to copies of the models.

    An order carries its seed: one whose copy dies runs again on another, and comes to the same.

    Args:
        call: begins an order on some copy.
        died: whether an error means that the copy is gone.
        count: how many copies run; may take a moment.
        timeout: seconds from a request's arrival to its answer.
    """

    def __init__(
        self,
        call: Callable[[Order], Stream],
        died: Callable[[Exception], bool],
        count: Callable[[], int],
        timeout: float,
    ) -> None:
        self._call, self._died, self._count, self._timeout = call, died, count, timeout
        self._running = 1
        self._draining = False
        self._closed = threading.Event()
        self._looker = threading.Thread(target=self._look, name="entrgi-replicas", daemon=True)
        self._looker.start()

    async def run(self, order: Order) -> AsyncIterator[Event]:
        """See :meth:`.engine.Engine.run`; every event comes once, however often the order runs."""
        if self._draining:
            raise Refusal(503, "the server is shutting down", retry_after=5)
        deadline = time.monotonic() + self._timeout
        accepted, step = False, -1
        for attempt in range(1, _TRIES + 1):
            stream = self._call(order)
            try:
                while True:
                    event = await self._next(stream, deadline)
                    if isinstance(event, Refusal):
                        raise event
                    if isinstance(event, Accepted):
                        if accepted:
                            continue
                        accepted = True
                    elif isinstance(event, Frame):
                        if event.step <= step:
                            continue
                        step = event.step
                    yield event
                    if isinstance(event, Outcome):
                        return
            except Exception as error:
                if not isinstance(error, _LostError) and not self._died(error):
                    raise
                logger.warning("try %d of %d of a request: its copy of the models died", attempt, _TRIES)
            finally:
                with contextlib.suppress(Exception):  # it is over, or its copy is
                    stream.cancel()
        raise Refusal(503, f"{_TRIES} copies of the models died with this request", retry_after=5)

    async def _next(self, stream: Stream, deadline: float) -> Event | Refusal:
        item = asyncio.ensure_future(stream.__anext__())
        try:
            await asyncio.wait({item}, timeout=max(0.0, deadline - time.monotonic()))
            if not item.done():
                raise Refusal(504, f"not done within {self._timeout:g} s (--timeout)", retry_after=5)
            return item.result()
        except StopAsyncIteration:
            raise _LostError from None
        except asyncio.CancelledError:
            if not item.cancelled():
                raise  # it is we who are cancelled
            raise _LostError from None
        finally:
            item.add_done_callback(lambda over: over.cancelled() or over.exception())  # which nobody waits for any more
            item.cancel()

    @property
    def trouble(self) -> str | None:
        """Why no request can be served; None where all is well."""
        if self._draining:
            return "the server is shutting down"
        return None if self._running else "no copy of the models runs"

    def drain(self) -> None:
        """Take no more requests. Those that wait are finished too: only their copies tell them from those that run."""
        self._draining = True

    def close(self, timeout: float | None = None) -> bool:
        """Drain, and look no more."""
        self.drain()
        self._closed.set()
        self._looker.join(timeout)
        return not self._looker.is_alive()

    def _look(self) -> None:
        known = None
        while not self._closed.wait(_LOOK):
            try:
                self._running = self._count()
            except Exception as error:  # Ray's own end: whatever it raises, nothing can be served
                self._running = 0
                logger.debug("Ray does not say what runs", exc_info=error)
            if known not in (None, self._running):
                logger.warning("copies of the models that run: %d (before: %d)", self._running, known)
            known = self._running


def serve_on_ray(args: argparse.Namespace, served: Served, listening: socket.socket) -> int:
    """Serve on a listening socket until SIGINT or SIGTERM; what was accepted then is finished.

    The cluster that RAY_ADDRESS names is joined; without it one is started on this machine, and stopped at the end.

    Returns:
        0.

    Raises:
        UsageError: no such cluster, models that cannot be loaded, or fewer devices than replicas.
    """
    address = os.environ.get("RAY_ADDRESS") or "local"
    if "://" in address:
        raise UsageError(f"RAY_ADDRESS={address}: expected HOST:PORT or auto; Ray's client cannot stream")
    if address == "local":
        os.environ.setdefault("RAY_AUTH_MODE", "token")  # its ports are open to other machines
    for name, value in _VARIABLES.items():  # Ray reads them when it is imported
        os.environ.setdefault(name, value)
    require("ray.serve", "--ray", "ray")
    import ray
    from ray import serve

    logging.getLogger("ray.serve").setLevel(_LOGGING["log_level"])
    try:
        ray.init(address, include_dashboard=False, logging_level=logging.ERROR)
    except ConnectionError as error:
        raise UsageError(f"RAY_ADDRESS={address}: {error}") from None
    try:
        needed = devices(args, served, ray.cluster_resources(), alone=address == "local")
        serve.start(proxy_location="Disabled", logging_config=_LOGGING)
        return _serve(models(args, served, needed), args, served, listening)
    finally:
        ray.shutdown()  # and all of it, where it was started here


def _serve(application: Application, args: argparse.Namespace, served: Served, listening: socket.socket) -> int:
    from ray import serve

    from .server import listen

    name = f"entrgi-{served.model}"
    print(f"loading {args.replicas or 1} x {args.model or 'the tiny models'} ...", file=sys.stderr, flush=True)
    try:
        try:
            handle = serve.run(application, name=name, route_prefix=None)
        except RuntimeError as error:
            trace = serve.status().applications[name].deployments[_MODELS].message
            said = re.findall(r"\bUsageError: (.*)", trace)
            raise UsageError(said[-1]) if said else RuntimeError(trace) from error
        tokenizer, mask = handle.about.remote().result()
        known = dataclasses.replace(served, mask_token_id=mask)
        return listen(_runner(handle, served, name), known, tokenizer, args, listening)
    finally:
        if os.environ.get("RAY_ADDRESS"):  # a cluster that goes on
            serve.delete(name)


def devices(args: argparse.Namespace, served: Served, there: dict[str, float], *, alone: bool) -> dict[str, int]:
    """What a copy takes, in Ray's words: a GPU where the models run on GPUs, and a processor.

    Args:
        args, served: what was asked for.
        there: the cluster's resources.
        alone: whether the cluster is this machine, which will not grow.

    Raises:
        UsageError: there is not enough of it.
    """
    if args.device not in ("auto", "cpu", "cuda"):
        raise UsageError(f"--device {args.device}: expected auto, cpu or cuda with --ray, which hands out the GPUs")
    needed, copies = {"num_cpus": 1}, args.replicas or 1
    if args.device == "cuda" or (args.device == "auto" and not served.tiny and there.get("GPU")):
        needed["num_gpus"] = 1
    for one in needed:
        kind = one[4:-1].upper()
        if alone and copies > there.get(kind, 0):
            raise UsageError(
                f"--replicas {copies}: expected at most {there.get(kind, 0):g}, the {kind}s of this machine"
            )
    return needed


def models(args: argparse.Namespace, served: Served, needed: dict[str, int]) -> Application:
    """The deployment of the models, of which each copy takes what is needed."""
    from ray import serve

    from .server import CONNECTIONS

    deployment = serve.deployment(
        name=_MODELS,
        num_replicas=args.replicas or 1,
        ray_actor_options=needed,
        # Never reached: the engine's own queue is full before, and says so by 429.
        max_ongoing_requests=2 * CONNECTIONS,
        health_check_period_s=2,
        logging_config=_LOGGING,
    )
    # What only the front needs stays with it: keys are nothing to copy around a cluster.
    return deployment(Models).bind(args, dataclasses.replace(served, keys=(), hosts=()))


def _is_death(error: Exception) -> bool:
    """Whether Ray says it of itself: an actor, a node or an object is gone. What our code raised is a RayTaskError."""
    from ray.exceptions import RayError, RayTaskError

    return isinstance(error, RayError) and not isinstance(error, RayTaskError)


def _running(name: str) -> int:
    from ray import serve

    return serve.status().applications[name].deployments[_MODELS].replica_states.get("RUNNING", 0)


def _runner(handle: Any, served: Served, name: str) -> Replicas:
    """Runs orders on the models of an application, whose deployment's handle is given."""
    call = handle.options(stream=True).run.remote
    return Replicas(call, _is_death, lambda: _running(name), served.limits.timeout)


class Front:
    """The front as a deployment; see :func:`app_builder`."""

    async def __init__(self, handle: Any, served: Served) -> None:
        from ray import serve

        from .app import create_app

        tokenizer, mask = await handle.about.remote()
        runner = _runner(handle, served, serve.get_replica_context().app_name)
        self.front = create_app(runner, dataclasses.replace(served, mask_token_id=mask), tokenizer)


async def _front(scope: Any, receive: Any, send: Any) -> None:
    """The application of the :class:`Front` that runs in this process."""
    from ray import serve

    await serve.get_replica_context().servable_object.front(scope, receive, send)


def app_builder(given: dict[str, Any]) -> Application:
    """Front and models as one application, for ``serve run`` and Serve's configuration files.

    Args:
        given: flags of ``entrgi serve`` without their dashes; a list where a flag comes several times.

    Raises:
        UsageError: no API keys, or flags that do not go together.
    """
    from fastapi import FastAPI
    from ray import serve

    from ..cli import parse
    from .offer import describe
    from .server import CONNECTIONS

    pairs = [(flag, one) for flag, value in given.items() for one in (value if isinstance(value, list) else [value])]
    args = parse(["serve", "--ray", *[f"--{flag}={one}" for flag, one in pairs]])
    served = describe(args)
    if not served.keys:
        raise UsageError("Serve's proxies decide who gets in: expected API keys, by api-key-file or ENTRGI_API_KEY")
    needed = devices(args, served, {"GPU": 1}, alone=False)  # Ray may not run yet
    outer = FastAPI(docs_url=None, redoc_url=None, openapi_url=None)  # it stands before the guards: it answers nothing
    outer.mount("/", _front)
    front = serve.deployment(
        name="front",
        max_ongoing_requests=CONNECTIONS,
        ray_actor_options={"num_cpus": 0, "runtime_env": {"env_vars": _VARIABLES}},
    )
    return front(serve.ingress(outer)(Front)).bind(models(args, served, needed), served)
