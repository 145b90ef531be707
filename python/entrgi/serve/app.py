"""The HTTP application: OpenAI's chat completions, the page, health, metrics. It asks a :class:`Runner` for texts."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import json
import time
from collections.abc import AsyncIterator
from typing import Any, Protocol

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import HTMLResponse, JSONResponse, Response, StreamingResponse
from starlette.exceptions import HTTPException

from entrgi_kernels import __version__
from entrgi_kernels.names import METHODS, SEARCHES

from . import page
from .comparing import CompareRequest, Comparing
from .engine import Event, Frame, Order, Outcome
from .guards import Guards
from .metrics import Metrics
from .schema import Answer, ChatRequest, understand
from .settings import Refusal, Served

_KEEP_ALIVE = 15.0  # seconds of silence after which a stream says that it is still there


class Runner(Protocol):
    """Runs orders: an :class:`.engine.Engine` in this process, or replicas elsewhere."""

    def run(self, order: Order) -> AsyncIterator[Event]:
        """See :meth:`.engine.Engine.run`."""
        ...

    @property
    def trouble(self) -> str | None:
        """Why no request can be served; None where all is well."""
        ...


def create_app(runner: Runner, served: Served, tokenizer: Any) -> Any:
    """The application, for any ASGI server.

    Args:
        runner: answers orders.
        served: what is offered.
        tokenizer: the diffusion model's, for the page's replays.
    """
    app = FastAPI(title="entrgi", version=__version__, docs_url=None, redoc_url=None)
    metrics, started = Metrics(), int(time.time())
    comparing = Comparing(runner, served, tokenizer)
    html = page.build(comparing.about())

    @app.post("/v1/chat/completions")
    async def chat_completions(body: ChatRequest, request: Request) -> Response:
        """OpenAI's chat completions; what is added goes by the name "guidance"."""
        chat = understand(body, served)
        made = _counted(runner.run(chat.order), metrics, chat.order)
        events = _until_gone(made, asyncio.ensure_future(_gone(request)))
        accepted = await _first(events)
        answer = Answer(chat, served, accepted.prompt_tokens)
        if chat.stream:
            return _stream(_chunks(answer, events), "[DONE]")
        try:
            async for event in events:
                if isinstance(event, Outcome):
                    # A trace may be long: others are answered while it is written.
                    text = await asyncio.to_thread(_json, answer, event)
                    return Response(text, media_type="application/json")
        finally:
            await events.aclose()  # type: ignore[attr-defined]
        raise AssertionError("a run ends with an outcome or an error")

    @app.get("/v1/models")
    async def models() -> dict[str, Any]:
        """The one model that is served."""
        return {"object": "list", "data": [_model(served, started)]}

    @app.get("/v1/models/{name:path}")
    async def model(name: str) -> dict[str, Any]:
        """The model by its name."""
        if name != served.model:
            raise Refusal(404, f"the model {name!r:.80} does not exist: expected {served.model!r}", param="model")
        return _model(served, started)

    @app.api_route("/healthz", methods=["GET", "HEAD"])
    async def healthz() -> Response:
        """200 while requests can be served, else 503 and why not."""
        trouble = runner.trouble
        return JSONResponse({"status": trouble or "ok"}, 503 if trouble else 200)

    @app.get("/metrics")
    async def prometheus() -> Response:
        """Figures in Prometheus' text format."""
        return Response(metrics.page(), media_type="text/plain; version=0.0.4; charset=utf-8")

    @app.api_route("/", methods=["GET", "HEAD"])
    async def index() -> Response:
        """The page."""
        return HTMLResponse(html, headers=page.headers())

    @app.get("/report.html")
    async def report() -> Response:
        """A report without data, which the page fills and saves."""
        return HTMLResponse(page.report_template())

    @app.post("/compare")
    async def compare(body: CompareRequest, request: Request) -> Response:
        """Two methods on one prompt, step by step; see :mod:`.comparing`."""
        orders = comparing.understand(body)
        made = comparing.run(body, orders, lambda run: _counted(run, metrics, orders[0]))
        events = _until_gone(made, asyncio.ensure_future(_gone(request)))
        return _stream(_after(await _first(events), events))

    @app.exception_handler(Refusal)
    async def refused(request: Request, refusal: Refusal) -> Response:
        headers = {} if refusal.retry_after is None else {"retry-after": str(refusal.retry_after)}
        return JSONResponse(refusal.to_dict(), refusal.status, headers)

    @app.exception_handler(RequestValidationError)
    async def invalid(request: Request, error: RequestValidationError) -> Response:
        # Of a choice of forms the one that was got furthest with says most.
        first = max(error.errors(), key=lambda one: len(one["loc"]))
        place = ".".join(str(part) for part in first["loc"] if part != "body")
        said = f"{place}: {first['msg']}" if place else first["msg"]
        if first["type"] == "json_invalid":
            said = f"the body is no JSON: {first.get('ctx', {}).get('error', first['msg'])}"
        return await refused(request, Refusal(400, said, param=place or None))

    @app.exception_handler(HTTPException)
    async def failed(request: Request, error: HTTPException) -> Response:
        return await refused(request, Refusal(error.status_code, str(error.detail)))

    @app.exception_handler(_ClientGoneError)
    async def left(request: Request, error: _ClientGoneError) -> Response:
        return Response(status_code=499)  # nobody reads it; metrics count it

    @app.exception_handler(Exception)
    async def broken(request: Request, error: Exception) -> Response:
        return await refused(request, Refusal(500, f"the server failed ({type(error).__name__}); its log says more"))

    return Guards(app, served, lambda path, status: metrics.requests.labels(path, status).inc())


def _stream(objects: AsyncIterator[dict[str, Any] | None], last: str | None = None) -> Response:
    # A proxy in between is to pass each event on.
    headers = {"x-accel-buffering": "no"}
    return StreamingResponse(_lines(objects, last), media_type="text/event-stream", headers=headers)


async def _first(events: AsyncIterator[Any]) -> Any:
    """The first event: what is refused is refused before an answer has begun."""
    try:
        while (event := await anext(events)) is None:
            pass
        return event
    except BaseException:
        await events.aclose()  # type: ignore[attr-defined]
        raise


async def _after(first: Any, events: AsyncIterator[Any]) -> AsyncIterator[Any]:
    yield first
    async for event in events:
        yield event


class _ClientGoneError(Exception):
    """The client went away before its answer."""


async def _gone(request: Request) -> None:
    """Returns when the client has gone away."""
    while (await request.receive())["type"] != "http.disconnect":
        pass


async def _until_gone(events: AsyncIterator[Any], gone: asyncio.Future[None]) -> AsyncIterator[Any]:
    """The events, and None after each long silence.

    Raises:
        _ClientGoneError: the client went away; what makes the events is stopped.
    """
    try:
        while True:
            event = asyncio.ensure_future(anext(events))
            try:
                while not event.done():
                    await asyncio.wait({event, gone}, timeout=_KEEP_ALIVE, return_when=asyncio.FIRST_COMPLETED)
                    if gone.done() and not event.done():
                        raise _ClientGoneError
                    if not event.done():
                        yield None
                yield event.result()
            except StopAsyncIteration:
                return
            finally:
                if not event.done():
                    event.cancel()
                    with contextlib.suppress(asyncio.CancelledError, StopAsyncIteration):
                        await event
    finally:
        gone.cancel()
        await events.aclose()  # type: ignore[attr-defined]


async def _counted(events: AsyncIterator[Event], metrics: Metrics, order: Order) -> AsyncIterator[Event]:
    arrived = time.monotonic()
    metrics.open.inc()
    try:
        async for event in events:
            if isinstance(event, Outcome):
                metrics.add(event, " + ".join(name for name, _ in order.rewards), time.monotonic() - arrived)
            yield event
    finally:
        metrics.open.dec()
        await events.aclose()  # type: ignore[attr-defined]


async def _lines(objects: AsyncIterator[dict[str, Any] | None], last: str | None = None) -> AsyncIterator[bytes]:
    """Objects as server-sent events.

    Args:
        objects: None is a sign of life.
        last: what ends the stream; nothing but its end where it is None.
    """
    try:
        async for one in objects:
            yield b": keep-alive\n\n" if one is None else _line(json.dumps(one, allow_nan=False))
        if last is not None:
            yield _line(last)
    except Refusal as refusal:
        yield _line(json.dumps(refusal.to_dict()))
    except _ClientGoneError:
        return
    finally:
        await objects.aclose()  # type: ignore[attr-defined]


def _json(answer: Answer, outcome: Outcome) -> str:
    return json.dumps(answer.whole(outcome), allow_nan=False)


def _line(text: str) -> bytes:
    return b"data: " + text.encode() + b"\n\n"


async def _chunks(answer: Answer, events: AsyncIterator[Event | None]) -> AsyncIterator[dict[str, Any] | None]:
    yield answer.opening()
    async for event in events:
        if event is None:
            yield None
        elif isinstance(event, Frame):
            yield answer.frame(event)
        elif isinstance(event, Outcome):
            for chunk in answer.closing(event):
                yield chunk


def _model(served: Served, created: int) -> dict[str, Any]:
    limits = dataclasses.asdict(served.limits)
    about = {"rewards": served.rewards, "methods": list(METHODS), "searches": list(SEARCHES), "limits": limits}
    return {"id": served.model, "object": "model", "created": created, "owned_by": "entrgi", "guidance": about}
