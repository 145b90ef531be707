"""The process that serves: the application, and uvicorn around it. Orders run on an engine here, or elsewhere."""

from __future__ import annotations

import argparse
import contextlib
import copy
import dataclasses
import logging
import os
import signal
import socket
import sys
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any, Protocol

import uvicorn

from .app import Runner, create_app
from .engine import Engine
from .guards import Patient
from .settings import Served

if TYPE_CHECKING:
    from entrgi_kernels import GuidedSampler

CONNECTIONS = 2048  # beyond that, 503


class Closing(Runner, Protocol):
    """A runner that can end."""

    def drain(self) -> None:
        """Take no more requests; see :meth:`.engine.Engine.drain`."""
        ...

    def close(self, timeout: float | None = None) -> bool:
        """Drain, and wait for what works behind it; whether that has ended."""
        ...


def serve(
    samplers: dict[str, GuidedSampler], served: Served, args: argparse.Namespace, listening: socket.socket
) -> int:
    """Serve on a listening socket until SIGINT or SIGTERM; what runs then is finished, what waits is sent away.

    Returns:
        0.
    """
    first = next(iter(samplers.values()))
    # The page's texts are decoded by the event loop, with a tokenizer that the engine's thread does not use.
    tokenizer = copy.deepcopy(first.tokenizer)
    return listen(make_engine(samplers, served), with_mask(served, first), tokenizer, args, listening)


def listen(runner: Closing, served: Served, tokenizer: Any, args: argparse.Namespace, listening: socket.socket) -> int:
    """The same around any runner, which is closed at the end.

    Returns:
        0.
    """
    app = create_app(runner, served, tokenizer)
    config = uvicorn.Config(
        app,
        http=Patient,
        ws="none",
        log_level="info" if args.access_log else "warning",
        access_log=args.access_log,
        server_header=False,
        limit_concurrency=CONNECTIONS,
        timeout_graceful_shutdown=int(served.limits.timeout) + 1,
    )
    host, port = listening.getsockname()[:2]
    place = f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
    said = f"serving {served.model} on http://{place} (a page there; OpenAI's API below /v1)"
    try:
        _Server(config, runner, said).run([listening])
    finally:
        stopped = False
        with contextlib.suppress(KeyboardInterrupt):
            stopped = runner.close(timeout=5)
        if not stopped:  # told to stop at once: a thread inside of torch cannot be ended from outside
            print("stopped within a batch", file=sys.stderr, flush=True)
            os._exit(130)
    return 0


def make_engine(samplers: dict[str, GuidedSampler], served: Served) -> Engine:
    """The engine of what is served; from here on the library's warnings name no prompt."""
    logging.getLogger("entrgi_kernels").addFilter(_names_no_prompt)
    return Engine(samplers, served.limits, served.defaults.batch_size, served.defaults.memory_budget)


def _names_no_prompt(record: logging.LogRecord) -> bool:
    return record.funcName != "warn_of_missing"  # the metrics count those samples


def with_mask(served: Served, sampler: GuidedSampler) -> Served:
    """What is served, with what only the loaded model knows."""
    return dataclasses.replace(served, mask_token_id=sampler.model.mask_token_id)


class _Server(uvicorn.Server):
    """uvicorn, which says where it listens once it does, and whose end begins with the runner's."""

    def __init__(self, config: uvicorn.Config, runner: Closing, said: str) -> None:
        super().__init__(config)
        self._runner, self._said = runner, said

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        print(self._said, flush=True)

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        self._runner.drain()
        await super().shutdown(sockets)

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        # uvicorn's own raises the signal again when all is finished; to be told to stop is no failure.
        before = {sig: signal.signal(sig, self.handle_exit) for sig in (signal.SIGINT, signal.SIGTERM)}
        try:
            yield
        finally:
            for sig, handler in before.items():
                signal.signal(sig, handler)
