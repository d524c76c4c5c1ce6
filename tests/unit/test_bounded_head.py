"""No request's head holds the API: raw sockets against a live server."""

from __future__ import annotations

import contextlib
import hashlib
import json
import socket
import time
from collections.abc import Iterator
from typing import Any

import pytest

from api.bounded_head import HEAD_BYTES, HEAD_FIELDS, LINGER_BYTES, WHOLE_BYTES, BoundedHead
from api.connection_limit import ConnectionLimit
from tests.live import served
from tests.patience import patience

PATIENCE = patience(20)
MOST_AT_ONCE = 256 * 1024  # that asyncio reads of a socket


class Unhurried(BoundedHead):
    """No time runs out, however slow the machine is."""

    head_seconds = body_seconds = 600.0


class Hurried(Unhurried):
    head_seconds = 0.3


async def echo(scope: Any, receive: Any, send: Any) -> None:
    """Answers with the headers of a request, and with length and hash of the body that came."""
    size, more, digest = 0, True, hashlib.sha256()
    while more:
        message = await receive()
        if message["type"] == "http.disconnect":
            return
        size, more = size + len(message["body"]), message["more_body"]
        digest.update(message["body"])
    names = [[name.decode(), value.decode()] for name, value in scope["headers"]]
    body = json.dumps({"headers": names, "size": size, "sha256": digest.hexdigest()}).encode()
    await send({"type": "http.response.start", "status": 200, "headers": [(b"content-length", b"%d" % len(body))]})
    await send({"type": "http.response.body", "body": body})


@contextlib.contextmanager
def at(bound: type[BoundedHead]) -> Iterator[tuple[str, int]]:
    with served(echo, http=bound) as url:
        host, port = url.removeprefix("http://").split(":")
        yield host, int(port)


@pytest.fixture(scope="module")
def address() -> Iterator[tuple[str, int]]:
    with at(Unhurried) as where:
        yield where


@pytest.fixture(scope="module")
def hurried() -> Iterator[tuple[str, int]]:
    """Where a head has 0.3 s. Whoever asks here must expect to be late."""
    with at(Hurried) as where:
        yield where


def answer(line: socket.socket) -> bytes:
    """All that comes until the server closes."""
    got = b""
    with contextlib.suppress(ConnectionResetError):
        while piece := line.recv(65536):
            got += piece
    return got


def asked(address: tuple[str, int], *pieces: bytes) -> tuple[int, dict[str, Any]]:
    """(status, body) of the answer to what is sent piece by piece."""
    with socket.create_connection(address, timeout=PATIENCE) as line:
        line.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        for piece in pieces:
            with contextlib.suppress(BrokenPipeError, ConnectionResetError):
                line.sendall(piece)
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


def test_what_comes_after_a_refusal_is_not_read_without_bound() -> None:
    """Each byte that is thrown away costs the only loop there is as much as one that is wanted."""

    class Counting(Unhurried):
        read = 0

        def data_received(self, data: bytes) -> None:
            type(self).read += len(data)
            super().data_received(data)

    with at(Counting) as where:
        status, _ = asked(where, START + b"X-A: ", *[b"a" * 65536] * 640)

    assert status == 431
    assert HEAD_BYTES < Counting.read < HEAD_BYTES + LINGER_BYTES + 2 * MOST_AT_ONCE


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
    with socket.create_connection(address, timeout=PATIENCE) as line:
        with contextlib.suppress(OSError):
            line.sendall(START + b"X-A: ")
            for _ in range(1000):
                line.sendall(b"a" * 65536)

        assert asked(address, START + CLOSE + b"\r\n")[0] == 200


@pytest.mark.parametrize("begin", [b"G", START, START + b"X-A: a"])
def test_half_a_request_is_closed_after_its_time(hurried: tuple[str, int], begin: bytes) -> None:
    with began(hurried) as line:
        asked_at = time.monotonic()
        line.sendall(begin)
        head, _, body = answer(line).partition(b"\r\n\r\n")

    assert head.startswith(b"HTTP/1.1 408")
    assert json.loads(body)["error"]["code"] == "request_timeout"
    assert time.monotonic() - asked_at > 0.9 * Hurried.head_seconds


def test_a_drip_of_bytes_does_not_win_time(hurried: tuple[str, int]) -> None:
    with began(hurried) as line:
        line.sendall(START + b"X-A: ")
        asked_at, got = time.monotonic(), b""
        line.settimeout(0.1)
        while not got and time.monotonic() - asked_at < PATIENCE:
            with contextlib.suppress(OSError):  # it may be closed between the two
                line.sendall(b"a")
            with contextlib.suppress(TimeoutError):
                got = line.recv(100)

    assert got.startswith(b"HTTP/1.1 408")


@contextlib.contextmanager
def began(address: tuple[str, int]) -> Iterator[socket.socket]:
    """A connection whose first request is answered: the time of its next one begins with that one's first byte."""
    deadline = time.monotonic() + PATIENCE
    while True:
        with socket.create_connection(address, timeout=PATIENCE) as line:
            with contextlib.suppress(OSError):
                line.sendall(START + b"\r\n")
            if (got := first(line)).startswith(b"HTTP/1.1 200"):
                yield line
                return
        # The machine stood still between the connection and the request.
        assert got[:12] in (b"", b"HTTP/1.1 408"), got
        assert time.monotonic() < deadline


def first(line: socket.socket) -> bytes:
    """The answer of a connection that stays open: all of it has come when its body is whole JSON."""
    got = b""
    with contextlib.suppress(ConnectionResetError):
        while piece := line.recv(65536):
            got += piece
            with contextlib.suppress(ValueError):
                json.loads(got.partition(b"\r\n\r\n")[2])
                break
    return got


def test_a_connection_that_asks_nothing_is_closed_without_a_word(hurried: tuple[str, int]) -> None:
    with socket.create_connection(hurried, timeout=PATIENCE) as line:
        assert answer(line) == b""


def test_half_a_request_on_a_new_connection_is_closed_after_its_time_too(hurried: tuple[str, int]) -> None:
    deadline, got = time.monotonic() + PATIENCE, b""
    while not got and time.monotonic() < deadline:  # closed without a word where even the first byte came late
        with socket.create_connection(hurried, timeout=PATIENCE) as line:
            with contextlib.suppress(OSError):
                line.sendall(b"G")
            got = answer(line)

    assert got.startswith(b"HTTP/1.1 408")


def test_a_second_request_of_a_connection_has_the_same_bounds(address: tuple[str, int]) -> None:
    with socket.create_connection(address, timeout=PATIENCE) as line:
        line.sendall(START + b"\r\n")
        assert first(line).startswith(b"HTTP/1.1 200")
        line.sendall(START + b"X-A: " + b"a" * 2 * HEAD_BYTES)
        assert answer(line).startswith(b"HTTP/1.1 431")


def test_pipelined_requests_are_each_answered_whatever_their_bodies(address: tuple[str, int]) -> None:
    post = b"POST / HTTP/1.1\r\nHost: x\r\nContent-Length: 200000\r\n"
    with socket.create_connection(address, timeout=PATIENCE) as line:
        line.sendall((post + b"\r\n" + b"b" * 200000) * 3 + post + CLOSE + b"\r\n" + b"b" * 200000)
        got = answer(line)

    assert got.count(b"HTTP/1.1 200") == 4
    assert got.count(b'"size": 200000') == 4


def test_a_body_may_take_longer_than_a_head(hurried: tuple[str, int]) -> None:
    with began(hurried) as line:
        for piece in (b"POST / HTTP/1.1\r\nHost: x\r\nContent-Length: 3\r\n" + CLOSE + b"\r\na", b"b", b"c"):
            line.sendall(piece)
            time.sleep(1.2 * Hurried.head_seconds)
        head, _, body = answer(line).partition(b"\r\n\r\n")

    assert head.startswith(b"HTTP/1.1 200")
    assert json.loads(body)["size"] == 3


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


UNFINISHED = CHUNKED.removesuffix(b"0\r\n")


@pytest.mark.parametrize(
    ("rest", "status", "code"),
    [
        (b"zz\r\n", 400, "invalid_http"),
        (b"-1\r\n", 400, "invalid_http"),
        (b"2\r\nabc\r\n", 400, "invalid_http"),
        (b"0\r\n" + b"X-A: b\r\n" * (HEAD_FIELDS + 1), 431, "head_too_large"),
        (b"0\r\nX-A: " + b"a" * (HEAD_BYTES + 8192), 431, "head_too_large"),
    ],
    ids=["no number", "below zero", "longer than said", "many trailers", "long trailer"],
)
@pytest.mark.parametrize("at_once", [True, False])
def test_a_body_that_breaks_off_into_nonsense_is_refused_in_the_envelope(
    address: tuple[str, int], rest: bytes, status: int, code: str, *, at_once: bool
) -> None:
    came, body = asked(address, UNFINISHED + rest) if at_once else asked(address, UNFINISHED, rest)

    assert (came, body["error"]["code"]) == (status, code)


def test_nonsense_behind_a_request_leaves_the_answer_before_it_whole(address: tuple[str, int]) -> None:
    with socket.create_connection(address, timeout=PATIENCE) as line:
        line.sendall(START + b"Content-Length: 3\r\n\r\nabc\x16\x03\x01\r\n\r\n")
        heads = answer(line).count(b"HTTP/1.1 ")

    assert heads <= 1


def test_what_is_no_http_is_refused_in_the_envelope(address: tuple[str, int]) -> None:
    status, body = asked(address, b"\x16\x03\x01nonsense\r\n\r\n")

    assert (status, body["error"]["code"]) == (400, "invalid_http")


def test_a_body_of_large_and_small_pieces_comes_through_byte_for_byte(address: tuple[str, int]) -> None:
    pieces = [bytes([number]) * size for number, size in enumerate([3, WHOLE_BYTES, 2, 3 * WHOLE_BYTES, 1, 700] * 4)]
    chunks = b"".join(b"%x\r\n%b\r\n" % (len(piece), piece) for piece in pieces) + b"0\r\n\r\n"
    whole = b"".join(pieces)
    post = b"POST / HTTP/1.1\r\nHost: x\r\n" + CLOSE

    for head, body in (
        (b"Transfer-Encoding: chunked\r\n\r\n", chunks),
        (b"Content-Length: %d\r\n\r\n" % len(whole), whole),
    ):
        status, came = asked(address, post + head, body)
        assert (status, came["size"], came["sha256"]) == (200, len(whole), hashlib.sha256(whole).hexdigest())


@pytest.mark.parametrize("count", [0, 2])
def test_a_request_has_exactly_one_host(address: tuple[str, int], count: int) -> None:
    status, body = asked(address, b"GET / HTTP/1.1\r\n" + b"Host: x\r\n" * count + CLOSE + b"\r\n")

    assert (status, body["error"]["code"]) == (400, "invalid_host")
    assert "Send exactly one" in body["error"]["message"]


@pytest.mark.parametrize(
    "host", ["a b", "a/b", "user@x", "x:99999999", "x:http", "[::1", "::1", "a,b c", "\u00e4", "%zz"]
)
def test_a_host_that_names_none_is_refused(address: tuple[str, int], host: str) -> None:
    status, body = asked(address, b"GET / HTTP/1.1\r\nHost: " + host.encode() + b"\r\n" + CLOSE + b"\r\n")

    assert (status, body["error"]["code"]) == (400, "invalid_host")


@pytest.mark.parametrize(
    "host", ["", "x", "x:8765", "[::1]:8765", "127.0.0.1", "my_service.local", "a-b.example.", "%41"]
)
def test_every_host_that_names_one_is_taken(address: tuple[str, int], host: str) -> None:
    assert asked(address, b"GET / HTTP/1.1\r\nHost: " + host.encode() + b" \r\n" + CLOSE + b"\r\n")[0] == 200


def test_clients_of_http_1_0_need_no_host(address: tuple[str, int]) -> None:
    assert asked(address, b"GET / HTTP/1.0\r\n\r\n")[0] == 200


@pytest.mark.parametrize(
    ("head", "status"),
    [
        (b"POST / HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: gzip, chunked\r\n", 501),
        (b"POST / HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: identity\r\n", 501),
        (b"POST / HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\nTransfer-Encoding: chunked\r\n", 400),
        (b"POST / HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\nContent-Length: 3\r\n", 400),
        (b"POST / HTTP/1.1\r\nHost: x\r\nContent-Length: 3\r\nTransfer-Encoding: chunked\r\n", 400),
        (b"POST / HTTP/1.1\r\nHost: x\r\nContent-Length: 3\r\nContent-Length: 3\r\n", 400),
        (b"POST / HTTP/1.1\r\nHost: x\r\nContent-Length: 3, 3\r\n", 400),
        (b"POST / HTTP/1.1\r\nHost: x\r\nContent-Length: +3\r\n", 400),
        (b"POST / HTTP/1.1\r\nHost: x\r\nContent-Length: -1\r\n", 400),
        (b"POST / HTTP/1.0\r\nHost: x\r\nTransfer-Encoding: chunked\r\n", 400),
        (b"GET / HTTP/1.1\nHost: x\n", 400),
        (b"GET / HTTP/1.1\r\nHost: x\rX-A: b\r\n", 400),
        (b"GET / HTTP/1.1\r\nHost: x\r\nX-A: b\r\n c\r\n", 400),
        (b"GET / HTTP/1.1\r\nHost : x\r\n", 400),
        (b"GET / HTTP/1.1\r\n Host: x\r\n", 400),
        (b"GET / HTTP/1.1\r\nHost: x\r\nX-A: a\x00b\r\n", 400),
        (b"GET / HTTP/1.1\r\nHost: x\r\n: b\r\n", 400),
        (b"GET /a b HTTP/1.1\r\nHost: x\r\n", 400),
        (b"GET x HTTP/1.1\r\nHost: x\r\n", 400),
        (b"GET /\r\n", 505),
        (b"GET / HTTP/0.9\r\nHost: x\r\n", 505),
        (b"GET / HTTP/2.0\r\nHost: x\r\n", 505),
        (b"GET / HTTP/3.0\r\nHost: x\r\n", 400),
        (b"GET / HTTP/1.1.1\r\nHost: x\r\n", 400),
        (b"NONSENSE / HTTP/1.1\r\nHost: x\r\n", 400),
        (b"get / HTTP/1.1\r\nHost: x\r\n", 400),
        (b"CONNECT x:443 HTTP/1.1\r\nHost: x:443\r\n", 400),
        (b"PRI * HTTP/2.0\r\n\r\nSM\r\n", 400),
    ],
)
def test_a_head_that_two_readers_could_take_for_two_things_is_refused(
    address: tuple[str, int], head: bytes, status: int
) -> None:
    got, body = asked(address, head + b"\r\n", b"3\r\nabc\r\n0\r\n\r\n")

    assert got == status
    assert body["error"]["code"] in {"invalid_http", "unsupported_transfer_coding", "http_version_not_supported"}


@pytest.mark.parametrize("target", [b"http://elsewhere.example/a", b"/a?b=c", b"//a", b"/%00"])
def test_targets_of_both_forms_are_taken(address: tuple[str, int], target: bytes) -> None:
    assert asked(address, b"GET " + target + b" HTTP/1.1\r\nHost: x\r\n" + CLOSE + b"\r\n")[0] == 200


POST = b"POST / HTTP/1.1\r\nHost: x\r\n" + CLOSE + b"Transfer-Encoding: chunked\r\n\r\n"


@pytest.mark.parametrize(
    "piece",
    [
        pytest.param(b"a" * 8192, id="one endless extension"),
        pytest.param(b"1\r\na\r\n" * 2048, id="chunks of a byte"),
        pytest.param((b"1;" + b"x" * 200 + b"\r\na\r\n") * 40, id="an extension in each chunk"),
    ],
)
def test_chunks_that_announce_more_than_they_bring_are_refused(address: tuple[str, int], piece: bytes) -> None:
    """Their sizes and extensions are read byte by byte, and count in no limit of a body."""
    begin = POST + (b"3;" if b"\r" not in piece else b"")

    status, body = asked(address, begin, *[piece] * (8 * 1024 * 1024 // len(piece)))

    assert (status, body["error"]["code"]) == (400, "invalid_http")
    assert "chunks" in body["error"]["message"]


def test_a_short_body_may_come_in_the_smallest_of_chunks(address: tuple[str, int]) -> None:
    status, body = asked(address, POST, *[b"1\r\na\r\n"] * 2000, b"0\r\n\r\n")

    assert (status, body["size"]) == (200, 2000)


def test_an_expected_go_ahead_is_given_before_the_body_is_sent(address: tuple[str, int]) -> None:
    head = b"POST / HTTP/1.1\r\nHost: x\r\nExpect: 100-continue\r\nContent-Length: 3\r\n" + CLOSE
    with socket.create_connection(address, timeout=PATIENCE) as line:
        line.sendall(head + b"\r\n")
        assert line.recv(65536).startswith(b"HTTP/1.1 100 ")
        line.sendall(b"abc")
        assert answer(line).startswith(b"HTTP/1.1 200 ")


OFFERS = [b"h2c", b"websocket", b"TLS/1.0"]
CHUNKS = b"1\r\na\r\n2\r\nbc\r\n0\r\nX-A: b\r\n\r\n"


@pytest.mark.parametrize("offer", OFFERS)
@pytest.mark.parametrize(
    ("framing", "body"),
    [(b"Content-Length: 3", b"abc"), (b"Transfer-Encoding: chunked", CHUNKS)],
    ids=["long", "chunked"],
)
@pytest.mark.parametrize("at_once", [True, False])
def test_another_protocol_is_offered_in_vain_and_all_requests_of_the_connection_are_answered(
    address: tuple[str, int], offer: bytes, framing: bytes, body: bytes, at_once: bool
) -> None:
    """Java's own client offers h2c with its first request. Its body is no beginning of that."""
    upgrade = b"Connection: Upgrade, HTTP2-Settings\r\nUpgrade: " + offer + b"\r\nHTTP2-Settings: AAMAAABkAAQAAP__\r\n"
    post = b"POST / HTTP/1.1\r\nHost: x\r\n" + upgrade + framing + b"\r\n\r\n"
    get = b"GET / HTTP/1.1\r\nHost: x\r\n" + upgrade + b"\r\n"
    last = b"POST / HTTP/1.1\r\nHost: x\r\nContent-Length: 2\r\n" + CLOSE + b"\r\nde"
    with socket.create_connection(address, timeout=PATIENCE) as line:
        if at_once:
            line.sendall((post + body + get) * 50 + last)
            got = answer(line)
        else:
            line.sendall(post)
            line.sendall(body)
            got = first(line)
            line.sendall(get)
            got += first(line)
            line.sendall(last)
            got += answer(line)

    times = 50 if at_once else 1
    assert got.count(b"HTTP/1.1 200") == 2 * times + 1
    assert [got.count(b'"size": %d' % size) for size in (3, 0, 2)] == [times, times, 1]
    assert b"x-a" not in got


def test_connections_that_offer_another_protocol_are_counted_out_at_their_end() -> None:
    class Counting(Unhurried):
        limit = ConnectionLimit(100)

    with at(Counting) as where:
        for _ in range(3):
            upgrade = b"Upgrade: websocket\r\nConnection: Upgrade\r\nSec-WebSocket-Key: x\r\n"
            with socket.create_connection(where, timeout=PATIENCE) as line:
                line.sendall(b"GET / HTTP/1.1\r\nHost: x\r\n" + upgrade + b"\r\n")
                assert first(line).startswith(b"HTTP/1.1 200 ")
        deadline = time.monotonic() + PATIENCE
        while Counting.limit.held and time.monotonic() < deadline:
            time.sleep(0.01)

    assert Counting.limit.held == 0
