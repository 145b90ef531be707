"""Clients that are slow on purpose, at the door of the application."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import socket
import threading
import time
from collections.abc import Iterator

import pytest

uvicorn = pytest.importorskip("uvicorn", reason="needs the extra entrgi_kernels[serve]")

from entrgi.serve import guards  # noqa: E402
from entrgi.serve.settings import Limits, Served  # noqa: E402
from entrgi_kernels.guidance.config import GuidanceConfig  # noqa: E402

SERVED = Served("tiny", ("tiny",), 1, GuidanceConfig(), False, Limits(), True)


@contextlib.contextmanager
def serving(app, protocol) -> Iterator[tuple[str, int]]:
    """A guarded application behind a protocol: its address."""
    guarded = guards.Guards(app, SERVED, lambda *_: None)
    server = uvicorn.Server(uvicorn.Config(guarded, http=protocol, log_level="error", lifespan="off"))
    listening = socket.create_server(("127.0.0.1", 0))
    thread = threading.Thread(target=server.run, args=([listening],))
    thread.start()
    try:
        yield listening.getsockname()
    finally:
        server.should_exit = True
        thread.join()


@pytest.fixture
def address() -> Iterator[tuple[str, int]]:
    """A server that answers everything with "ok", and waits 0.8 s for a request's head."""

    class Quick(guards.Patient):
        head_seconds = 0.8

    async def ok(scope, receive, send) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": [(b"content-length", b"2")]})
        await send({"type": "http.response.body", "body": b"ok"})

    with serving(ok, Quick) as found:
        yield found


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
            answer = b""
            while not answer.endswith(b"ok"):
                answer += wire.recv(1000) or pytest.fail(f"cut off after {answer!r}")
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

    scope = {
        "type": "http",
        "method": "GET",
        "path": "/v1/chat/completions",
        "headers": [(b"host", b"localhost"), *headers],
    }
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


@pytest.mark.parametrize("size", [8 << 20, 40_000])
@pytest.mark.parametrize("whole", [True, False])
def test_a_client_that_does_not_read_is_cut_off(size, whole):
    """Whether its answer is over or goes on; and the server can end."""
    over = threading.Event()

    class Quick(guards.Patient):
        read_seconds = 0.4

        def connection_made(self, transport) -> None:
            transport.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4096)
            super().connection_made(transport)

        def connection_lost(self, exc) -> None:
            super().connection_lost(exc)
            over.set()

    async def app(scope, receive, send) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body", "body": b"a" * size, "more_body": not whole})
        while not whole and (await receive())["type"] != "http.disconnect":
            pass

    with serving(app, Quick) as address, socket.socket() as wire:
        wire.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1024)
        wire.connect(address)
        wire.sendall(b"GET / HTTP/1.1\r\nHost: a\r\n\r\n")
        assert over.wait(20)


def test_a_client_that_reads_slowly_is_not():
    class Quick(guards.Patient):
        read_seconds = 0.4

    async def app(scope, receive, send) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": [(b"content-length", b"8000000")]})
        await send({"type": "http.response.body", "body": b"a" * 8_000_000})

    with serving(app, Quick) as address, socket.create_connection(address, timeout=20) as wire:
        wire.sendall(b"GET / HTTP/1.1\r\nHost: a\r\nConnection: close\r\n\r\n")
        got = 0
        while more := wire.recv(400_000):
            got += len(more)
            time.sleep(0.06)
        assert got > 8_000_000


@pytest.mark.parametrize(("given", "status"), [(b"", 401), (b"Bearer", 401), (b"Bearer b", 401), (b"bearer a", 200)])
def test_keys(given, status):
    async def app(scope, receive, send):
        await send({"type": "http.response.start", "status": 200, "headers": []})

    async def receive():
        return {"type": "http.request", "body": b"", "more_body": False}

    sent = exchange(app, receive, dataclasses.replace(SERVED, keys=("a",)), headers=[(b"authorization", given)])
    assert sent[0]["status"] == status


@pytest.mark.parametrize("more", [False, True])
def test_what_is_left_of_a_refused_body_is_read_before_the_answer(more):
    """A connection that is closed with something unread is reset, and the answer may be lost."""
    served = dataclasses.replace(SERVED, limits=Limits(body=5))
    parts = [b"a" * 6, b"b", b"c"] if more else [b"a" * 6]
    left = list(parts)

    async def receive():
        if not left:
            raise AssertionError("there is no more")
        return {"type": "http.request", "body": left.pop(0), "more_body": bool(left)}

    start, _ = exchange(nothing, receive, served)
    assert start["status"] == 413 and not left
