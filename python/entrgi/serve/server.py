"""One process that serves: the engine, the application, and uvicorn around it."""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import logging
import signal
import socket
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import uvicorn

from .app import create_app
from .engine import Engine
from .guards import Patient
from .settings import Served

if TYPE_CHECKING:
    from entrgi_kernels import GuidedSampler

_CONNECTIONS = 2048  # beyond that, 503


def serve(
    samplers: dict[str, GuidedSampler], served: Served, args: argparse.Namespace, listening: socket.socket
) -> int:
    """Serve on a bound socket until SIGINT or SIGTERM; what runs then is finished, what waits is sent away.

    Returns:
        0.
    """
    engine = make_engine(samplers, served)
    first = next(iter(samplers.values()))
    app = create_app(engine, with_mask(served, samplers), first.tokenizer)
    config = uvicorn.Config(
        app,
        http=Patient,
        ws="none",
        log_level="info" if args.access_log else "warning",
        access_log=args.access_log,
        server_header=False,
        limit_concurrency=_CONNECTIONS,
        timeout_graceful_shutdown=int(served.limits.timeout) + 1,
    )
    host, port = listening.getsockname()[:2]
    place = f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
    said = f"serving {served.model} on http://{place} (a page there; OpenAI's API below /v1)"
    try:
        _Server(config, engine, said).run([listening])
    finally:
        engine.close(timeout=5)
    return 0


def make_engine(samplers: dict[str, GuidedSampler], served: Served) -> Engine:
    """The engine of what is served; from here on the library's warnings name no prompt."""
    logging.getLogger("entrgi_kernels").addFilter(_names_no_prompt)
    return Engine(samplers, served.limits, served.defaults.batch_size, served.defaults.memory_budget)


def _names_no_prompt(record: logging.LogRecord) -> bool:
    return record.funcName != "warn_of_missing"  # the metrics count those samples


def with_mask(served: Served, samplers: dict[str, Any]) -> Served:
    """What is served, with what only the loaded model knows."""
    return dataclasses.replace(served, mask_token_id=next(iter(samplers.values())).model.mask_token_id)


class _Server(uvicorn.Server):
    """uvicorn, which says where it listens once it does, and whose end sends away what waits."""

    def __init__(self, config: uvicorn.Config, engine: Engine, said: str) -> None:
        super().__init__(config)
        self._engine, self._said = engine, said

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        print(self._said, flush=True)

    def handle_exit(self, sig: int, frame: Any) -> None:
        self._engine.drain()
        super().handle_exit(sig, frame)

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        # uvicorn's own raises the signal again when all is finished; to be told to stop is no failure.
        before = {sig: signal.signal(sig, self.handle_exit) for sig in (signal.SIGINT, signal.SIGTERM)}
        try:
            yield
        finally:
            for sig, handler in before.items():
                signal.signal(sig, handler)
