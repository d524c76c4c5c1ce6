"""No request's head holds the API: raw sockets against a live server."""

from __future__ import annotations

import contextlib
import json
import socket
import time
from collections.abc import Iterator
from typing import Any

import pytest

from api.bounded_head import HEAD_BYTES, HEAD_FIELDS, BoundedHead
from tests.live import served

PATIENCE = 20.0


class QuickBound(BoundedHead):
    head_seconds = 1.0
    body_seconds = 3.0


async def echo(scope: Any, receive: Any, send: Any) -> None:
    """Answers with the headers and the length of the body that it got."""
    size, more = 0, True
    while more:
        message = await receive()
        size, more = size + len(message["body"]), message["more_body"]
    names = [[name.decode(), value.decode()] for name, value in scope["headers"]]
    body = json.dumps({"headers": names, "size": size}).encode()
    await send({"type": "http.response.start", "status": 200, "headers": [(b"content-length", b"%d" % len(body))]})
    await send({"type": "http.response.body", "body": body})


@pytest.fixture(scope="module")
def address() -> Iterator[tuple[str, int]]:
    with served(echo, http=QuickBound) as url:
        host, port = url.removeprefix("http://").split(":")
        yield host, int(port)


def answer(line: socket.socket) -> bytes:
    """All that comes until the server closes."""
    got = b""
    with contextlib.suppress(ConnectionResetError):
        while piece := line.recv(65536):
            got += piece
    return got


def asked(address: tuple[str, int], *pieces: bytes, pause: float = 0.0) -> tuple[int, dict[str, Any]]:
    """(status, body) of the answer to what is sent piece by piece."""
    with socket.create_connection(address, timeout=PATIENCE) as line:
        line.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        for piece in pieces:
            with contextlib.suppress(BrokenPipeError, ConnectionResetError):
                line.sendall(piece)
            time.sleep(pause)
        head, _, body = answer(line).partition(b"\r\n\r\n")
    return int(head.split()[1]), json.loads(body)


START = b"GET / HTTP/1.1\r\nHost: x\r\n"
CLOSE = b"Connection: close\r\n"


@pytest.mark.parametrize("size", [HEAD_BYTES + 100, 40 * 1024 * 1024])
@pytest.mark.parametrize("begin", [START + b"X-A: ", b"GET /", START], ids=["header", "URL", "name of a header"])
def test_an_endless_header_or_url_is_refused_at_its_bound(address: tuple[str, int], begin: bytes, size: int) -> None:
    status, body = asked(address, begin, *[b"a" * 8192] * (size // 8192 + 1))

    assert status == 431
    assert body["error"]["code"] == "head_too_large"


def test_a_head_that_is_too_large_is_refused_however_it_comes(address: tuple[str, int]) -> None:
    many = b"".join(b"X-%d: %s\r\n" % (number, b"a" * 500) for number in range(80))

    assert asked(address, START + CLOSE + many + b"\r\n")[0] == 431
    assert asked(address, START + CLOSE + b"X: " + b"a" * HEAD_BYTES + b"\r\n\r\n")[0] == 431


def test_as_many_headers_as_may_be_are_taken_and_one_more_is_not(address: tuple[str, int]) -> None:
    def head(count: int) -> bytes:
        return START + CLOSE + b"".join(b"X-%d: 1\r\n" % number for number in range(count - 2)) + b"\r\n"

    assert asked(address, head(HEAD_FIELDS))[0] == 200
    assert asked(address, head(HEAD_FIELDS + 1))[0] == 431


def test_others_are_answered_while_somebody_sends_an_endless_header(address: tuple[str, int]) -> None:
    with socket.create_connection(address, timeout=PATIENCE) as line, contextlib.suppress(OSError):
        line.sendall(START + b"X-A: ")
        for _ in range(1000):
            line.sendall(b"a" * 65536)
    began = time.monotonic()

    assert asked(address, START + CLOSE + b"\r\n")[0] == 200
    assert time.monotonic() - began < 5


@pytest.mark.parametrize("begin", [b"G", START, START + b"X-A: a"])
def test_half_a_request_is_closed_after_its_time(address: tuple[str, int], begin: bytes) -> None:
    began = time.monotonic()

    status, body = asked(address, begin)

    assert (status, body["error"]["code"]) == (408, "request_timeout")
    assert 0.9 < time.monotonic() - began < PATIENCE


def test_a_drip_of_bytes_does_not_win_time(address: tuple[str, int]) -> None:
    with socket.create_connection(address, timeout=PATIENCE) as line:
        line.sendall(START + b"X-A: ")
        began = time.monotonic()
        line.settimeout(0.1)
        got = b""
        while not got and time.monotonic() - began < PATIENCE:
            line.sendall(b"a")
            with contextlib.suppress(TimeoutError):
                got = line.recv(100)

    assert got.startswith(b"HTTP/1.1 408")


def test_a_connection_that_asks_nothing_is_closed_without_a_word(address: tuple[str, int]) -> None:
    with socket.create_connection(address, timeout=PATIENCE) as line:
        assert answer(line) == b""


def test_a_second_request_of_a_connection_has_the_same_bounds(address: tuple[str, int]) -> None:
    with socket.create_connection(address, timeout=PATIENCE) as line:
        line.sendall(START + b"\r\n")
        assert line.recv(65536).startswith(b"HTTP/1.1 200")
        line.sendall(START + b"X-A: " + b"a" * 2 * HEAD_BYTES)
        assert answer(line).startswith(b"HTTP/1.1 431")


def test_pipelined_requests_are_each_answered_whatever_their_bodies(address: tuple[str, int]) -> None:
    post = b"POST / HTTP/1.1\r\nHost: x\r\nContent-Length: 200000\r\n"
    with socket.create_connection(address, timeout=PATIENCE) as line:
        line.sendall((post + b"\r\n" + b"b" * 200000) * 3 + post + CLOSE + b"\r\n" + b"b" * 200000)
        got = answer(line)

    assert got.count(b"HTTP/1.1 200") == 4
    assert got.count(b'"size": 200000') == 4


def test_a_body_may_take_longer_than_a_head(address: tuple[str, int]) -> None:
    head = b"POST / HTTP/1.1\r\nHost: x\r\nContent-Length: 3\r\n" + CLOSE + b"\r\n"

    status, body = asked(address, head + b"a", b"b", b"c", pause=0.7)

    assert (status, body["size"]) == (200, 3)


CHUNKED = b"POST / HTTP/1.1\r\nHost: x\r\n" + CLOSE + b"Transfer-Encoding: chunked\r\n\r\n3\r\nabc\r\n0\r\n"


def test_trailers_are_dropped_and_never_headers(address: tuple[str, int]) -> None:
    status, body = asked(address, CHUNKED + b"Authorization: Bearer x\r\nX-Forwarded-For: 1.1.1.1\r\n\r\n")

    assert (status, body["size"]) == (200, 3)
    assert [name for name, _ in body["headers"]] == ["host", "connection", "transfer-encoding"]


def test_endless_trailers_end_the_connection(address: tuple[str, int]) -> None:
    with socket.create_connection(address, timeout=PATIENCE) as line:
        line.sendall(CHUNKED + b"X-A: ")
        with pytest.raises((BrokenPipeError, ConnectionResetError)):
            line.sendall(b"a" * 64 * 1024 * 1024)


def test_what_is_no_http_is_refused_in_the_envelope(address: tuple[str, int]) -> None:
    status, body = asked(address, b"\x16\x03\x01nonsense\r\n\r\n")

    assert (status, body["error"]["code"]) == (400, "invalid_http")
