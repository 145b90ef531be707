"""Clients that are slow on purpose, at the door of the application."""

from __future__ import annotations

import asyncio
import dataclasses
import socket
import threading
import time
from collections.abc import Iterator

import pytest
import uvicorn

from entrgi.serve import guards
from entrgi.serve.settings import Limits, Served
from entrgi_kernels.guidance.config import GuidanceConfig

SERVED = Served("tiny", ("tiny",), 1, GuidanceConfig(), False, Limits(), True)


@pytest.fixture
def address() -> Iterator[tuple[str, int]]:
    """A server that answers everything with "ok", and waits 0.4 s for a request's head."""

    class Quick(guards.Patient):
        head_seconds = 0.4

    async def ok(scope, receive, send) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": [(b"content-length", b"2")]})
        await send({"type": "http.response.body", "body": b"ok"})

    config = uvicorn.Config(guards.Guards(ok, SERVED, lambda *_: None), http=Quick, log_level="error", lifespan="off")
    server, listening = uvicorn.Server(config), socket.create_server(("127.0.0.1", 0))
    thread = threading.Thread(target=server.run, args=([listening],))
    thread.start()
    yield listening.getsockname()
    server.should_exit = True
    thread.join()


def is_cut_off(wire: socket.socket) -> bool:
    """Whether the other side hangs up, within some seconds."""
    try:
        return wire.recv(1000) == b""
    except ConnectionResetError:
        return True


@pytest.mark.parametrize("first", [b"", b"GET / HT", b"GET / HTTP/1.1\r\nHost: a\r\nX-A"])
@pytest.mark.parametrize("after_another", [False, True])
def test_a_head_that_does_not_come_is_not_waited_for(address, first, after_another):
    with socket.create_connection(address, timeout=20) as wire:
        if after_another:
            wire.sendall(b"GET / HTTP/1.1\r\nHost: a\r\n\r\n")
            while not wire.recv(1000).endswith(b"ok"):
                pass
        wire.sendall(first)
        assert is_cut_off(wire)


def test_a_head_that_comes_drop_by_drop_is_not_waited_for(address):
    with socket.create_connection(address, timeout=20) as wire, pytest.raises(OSError):
        for letter in b"GET / HTTP/1.1\r\nHost: " + b"a" * 400:
            wire.sendall(bytes([letter]))
            time.sleep(0.02)
    with socket.create_connection(address, timeout=20) as wire:
        wire.sendall(b"GET / HTTP/1.1\r\nHost: a\r\n\r\n")
        assert wire.recv(1000).startswith(b"HTTP/1.1 200")


def exchange(app, receive, served=SERVED, send_delay=0.0, headers=()):
    """The messages that the guarded application sends for one request."""
    sent = []

    async def send(message):
        await asyncio.sleep(send_delay)
        sent.append(message)

    scope = {"type": "http", "path": "/v1/chat/completions", "headers": [(b"host", b"localhost"), *headers]}
    counted = []
    asyncio.run(guards.Guards(app, served, lambda *seen: counted.append(seen))(scope, receive, send))
    assert [status for _, status in counted] == [m["status"] for m in sent if m["type"] == "http.response.start"]
    return sent


async def nothing(scope, receive, send):
    raise AssertionError("the application was asked")


def test_a_body_that_does_not_come_is_not_waited_for(monkeypatch):
    monkeypatch.setattr(guards, "_BODY_SECONDS", 0.2)

    async def receive():
        await asyncio.sleep(0.05)
        return {"type": "http.request", "body": b"a", "more_body": True}

    start, body = exchange(nothing, receive)
    assert start["status"] == 408 and b"the body was not there" in body["body"]


def test_who_goes_away_before_the_body_is_whole_is_not_answered():
    async def receive():
        return {"type": "http.disconnect"}

    assert exchange(nothing, receive) == []


def test_a_client_that_does_not_read_is_given_up(monkeypatch):
    monkeypatch.setattr(guards, "_SEND_SECONDS", 0.2)
    closed = []

    async def app(scope, receive, send):
        try:
            await send({"type": "http.response.start", "status": 200, "headers": []})
            while True:
                await send({"type": "http.response.body", "body": b"a", "more_body": True})
        finally:
            closed.append(True)

    async def receive():
        return {"type": "http.request", "body": b"", "more_body": False}

    count = 0

    async def send(message):
        nonlocal count
        count += 1
        if count > 3:
            await asyncio.sleep(60)

    scope = {"type": "http", "path": "/", "headers": [(b"host", b"localhost")]}
    asyncio.run(guards.Guards(app, SERVED, lambda *_: None)(scope, receive, send))
    assert closed and count == 4


@pytest.mark.parametrize(("given", "status"), [(b"", 401), (b"Bearer", 401), (b"Bearer b", 401), (b"bearer a", 200)])
def test_keys(given, status):
    async def app(scope, receive, send):
        await send({"type": "http.response.start", "status": 200, "headers": []})

    async def receive():
        return {"type": "http.request", "body": b"", "more_body": False}

    sent = exchange(app, receive, dataclasses.replace(SERVED, keys=("a",)), headers=[(b"authorization", given)])
    assert sent[0]["status"] == status
