"""What stands before every request: its host, its key, the size and pace of its body; and headers on every answer."""

from __future__ import annotations

import asyncio
import contextlib
import hmac
import json
import math
from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any

import h11
from uvicorn.protocols.http.h11_impl import H11Protocol

from .settings import Refusal, Served

Scope = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[MutableMapping[str, Any]]]
Send = Callable[[MutableMapping[str, Any]], Awaitable[None]]

_BODY_SECONDS = 30.0  # a client that sends more slowly is sent away
_DISCARD_SECONDS = 1.0  # for the rest of a body that was refused
_OPEN = ("/", "/healthz")  # paths that hold nothing of anybody's
_HEADERS = {
    "x-content-type-options": "nosniff",
    "x-frame-options": "DENY",
    "content-security-policy": "default-src 'none'; frame-ancestors 'none'",
    "referrer-policy": "no-referrer",
    "cross-origin-resource-policy": "same-origin",
    "cross-origin-opener-policy": "same-origin",
    "cache-control": "no-store",
}


class Guards:
    """An ASGI application around another.

    Args:
        app: what is guarded.
        served: whose keys, hosts and limits.
        count: told of every answer: its path, "other" for one that is nowhere, and its status.
    """

    def __init__(self, app: Any, served: Served, count: Callable[[str, int], None]) -> None:
        self._app, self._served, self._count = app, served, count
        self._keys = [key.encode() for key in served.keys]

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        headers = {name.lower(): value for name, value in scope["headers"]}

        async def guarded(message: MutableMapping[str, Any]) -> None:
            if message["type"] == "http.response.start":
                self._count(getattr(scope.get("route"), "path", "other"), message["status"])
                own = {name for name, _ in message.get("headers", ())}
                extra = [(k.encode(), v.encode()) for k, v in _HEADERS.items() if k.encode() not in own]
                message = {**message, "headers": [*message.get("headers", ()), *extra]}
            await send(message)

        whole = False

        async def read() -> MutableMapping[str, Any]:
            nonlocal whole
            message = await receive()
            whole = message["type"] != "http.request" or not message.get("more_body")
            return message

        async def discard() -> None:
            while not whole:
                await read()

        try:
            self._check_host(headers)
            self._check_key(scope["path"], headers)
            _check_type(scope["method"], headers)
            body = await asyncio.wait_for(self._body(headers, read), _BODY_SECONDS)
        except asyncio.TimeoutError:
            await _refuse(guarded, Refusal(408, f"the body was not there within {_BODY_SECONDS:g} s"))
        except Refusal as refusal:
            # Closed with something unread, the connection is reset, and the client may never see the answer.
            with contextlib.suppress(asyncio.TimeoutError):
                await asyncio.wait_for(discard(), _DISCARD_SECONDS)
            await _refuse(guarded, refusal)
        except _GoneError:
            return
        else:
            await self._app(scope, _replay(body, receive), guarded)

    def _check_host(self, headers: dict[bytes, bytes]) -> None:
        """A page of another site may have its own name point to this machine: then the name is a foreign one."""
        host = headers.get(b"host", b"").decode("latin-1").lower()
        name = host.partition("]")[0] + "]" if host.startswith("[") else host.partition(":")[0]
        if self._served.hosts and name not in self._served.hosts:
            expected = ", ".join(self._served.hosts)
            raise Refusal(421, f"this server is not called {name!r:.80}: expected {expected}")

    def _check_key(self, path: str, headers: dict[bytes, bytes]) -> None:
        if not self._keys or path in _OPEN:
            return
        scheme, _, key = headers.get(b"authorization", b"").partition(b" ")
        # Every key is compared, so that the time taken tells nothing.
        if scheme.lower() != b"bearer" or not sum(hmac.compare_digest(key.strip(), known) for known in self._keys):
            raise Refusal(401, "expected Authorization: Bearer KEY with a key of this server", code="invalid_api_key")

    async def _body(self, headers: dict[bytes, bytes], receive: Receive) -> bytes:
        limit = self._served.limits.body
        too_large = Refusal(413, f"the body is larger than {limit} bytes (--max-body)")
        declared = headers.get(b"content-length", b"0")
        if declared.isdigit() and int(declared) > limit:
            raise too_large
        parts, size = [], 0
        while True:
            message = await receive()
            if message["type"] == "http.disconnect":
                raise _GoneError
            parts.append(message.get("body", b""))
            size += len(parts[-1])
            if size > limit:
                raise too_large
            if not message.get("more_body"):
                return b"".join(parts)


def _check_type(method: str, headers: dict[bytes, bytes]) -> None:
    """A page of another site may send what a form sends without asking; JSON it may not."""
    kind = headers.get(b"content-type", b"").partition(b";")[0].strip().lower()
    if method == "POST" and kind != b"application/json":
        said = kind.decode("latin-1")
        raise Refusal(415, f"Content-Type: {said[:80]!r}: expected application/json")


class _GoneError(Exception):
    """The client left before its request was whole."""


def _replay(body: bytes, receive: Receive) -> Receive:
    """The body in one piece, then what comes after it."""
    given = False

    async def replayed() -> MutableMapping[str, Any]:
        nonlocal given
        if given:
            return await receive()
        given = True
        return {"type": "http.request", "body": body, "more_body": False}

    return replayed


async def _refuse(send: Send, refusal: Refusal) -> None:
    body = json.dumps(refusal.to_dict()).encode()
    headers = [(b"content-type", b"application/json"), (b"content-length", str(len(body)).encode())]
    headers.append((b"connection", b"close"))  # a rest of the body may still be on its way
    if refusal.status == 401:
        headers.append((b"www-authenticate", b"Bearer"))
    await send({"type": "http.response.start", "status": refusal.status, "headers": headers})
    await send({"type": "http.response.body", "body": body})


class Patient(H11Protocol):
    """uvicorn's HTTP/1.1, which waits for a request's head, and for a client that does not read, so long and no longer.

    A connection is not closed but aborted: to close it is to wait for the client to read what is left.
    """

    _head: asyncio.TimerHandle | None = None
    _reader: asyncio.TimerHandle | None = None
    head_seconds, read_seconds = 20.0, 60.0

    def connection_made(self, transport: Any) -> None:
        super().connection_made(transport)
        # Writing pauses wherever something is left that the client did not read.
        transport.set_write_buffer_limits(high=0)
        self._expect_head()

    def pause_writing(self) -> None:
        super().pause_writing()
        self._expect_reader(math.inf)

    def resume_writing(self) -> None:
        super().resume_writing()
        self._forget_reader()

    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        if self.conn.their_state is not h11.IDLE:
            self._forget_head()
        elif self._head is None:
            self._expect_head()  # the first bytes of another request on the same connection

    def connection_lost(self, exc: Exception | None) -> None:
        self._forget_head()
        self._forget_reader()
        super().connection_lost(exc)

    def _expect_head(self) -> None:
        self._head = self.loop.call_later(self.head_seconds, self.transport.abort)

    def _forget_head(self) -> None:
        if self._head is not None:
            self._head.cancel()
            self._head = None

    def _expect_reader(self, before: float) -> None:
        left = self.transport.get_write_buffer_size()
        if left >= before:
            self.transport.abort()
        else:
            self._reader = self.loop.call_later(self.read_seconds, self._expect_reader, left)

    def _forget_reader(self) -> None:
        if self._reader is not None:
            self._reader.cancel()
            self._reader = None
