"""Clients that do not send, do not read, or come in masses: each costs itself its connection, others are served."""

from __future__ import annotations

import contextlib
import json
import socket
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest

from api.bounded_head import BoundedHead
from api.connection_limit import ConnectionLimit
from tests.live import served
from tests.patience import patience

MOST = 40
CLOSE = b"Connection: close\r\n"
HEAD = b"POST / HTTP/1.1\r\nHost: x\r\nContent-Length: 100000\r\n\r\n"
GET = b"GET / HTTP/1.1\r\nHost: x\r\n"


class Small(BoundedHead):
    """Room for few; whoever does not send or take for a second is ended."""

    head_seconds = 600.0
    body_seconds = 1.0
    answer_seconds = 1.0


class Patient(Small):
    body_seconds = 600.0


class App:
    """Counts the bytes of a body; `/much` is answered at length. `ended` counts those that heard their client go."""

    def __init__(self) -> None:
        self.begun = threading.Semaphore(0)
        self.ended = threading.Semaphore(0)

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        self.begun.release()
        size, more = 0, True
        while more:
            message = await receive()
            if message["type"] == "http.disconnect":
                self.ended.release()
                return
            size, more = size + len(message["body"]), message["more_body"]
        await send({"type": "http.response.start", "status": 200, "headers": [(b"x-size", b"%d" % size)]})
        for _ in range(64 if scope["path"] == "/much" else 0):  # more than sockets hold
            await send({"type": "http.response.body", "body": b"a" * 2**20, "more_body": True})
        await send({"type": "http.response.body", "body": b"ok"})


@contextlib.contextmanager
def serving(kind: type[Small]) -> Iterator[tuple[App, str, int]]:
    app = App()
    kind.limit = ConnectionLimit(MOST)
    with served(app, http=kind) as url:
        host, port = url.removeprefix("http://").split(":")
        yield app, host, int(port)


def line(host: str, port: int, *, source: str = "127.0.0.1") -> socket.socket:
    return socket.create_connection((host, port), timeout=patience(20), source_address=(source, 0))


def whole(end: socket.socket) -> bytes:
    """All that comes until the server closes."""
    got = b""
    with contextlib.suppress(ConnectionResetError):
        while piece := end.recv(65536):
            got += piece
    return got


def answered(host: str, port: int, *, source: str = "127.0.0.1") -> bool:
    with line(host, port, source=source) as end, contextlib.suppress(OSError):
        end.sendall(GET + CLOSE + b"\r\n")
        return whole(end).startswith(b"HTTP/1.1 200")
    return False


def code_of(answer: bytes) -> tuple[int, str]:
    head, _, body = answer.partition(b"\r\n\r\n")
    return int(head.split()[1]), json.loads(body)["error"]["code"]


def test_a_body_that_does_not_come_ends_its_request_and_the_handler_hears_it() -> None:
    with serving(Small) as (app, host, port), line(host, port) as slow:
        slow.sendall(HEAD + b"abc")

        assert code_of(whole(slow)) == (408, "request_timeout")
        assert app.ended.acquire(timeout=patience(20))


def test_a_drip_of_a_body_wins_no_time() -> None:
    stop = threading.Event()
    with serving(Small) as (_, host, port), line(host, port) as slow:
        slow.sendall(HEAD)

        def drip() -> None:
            with contextlib.suppress(OSError):
                while not stop.wait(0.05):
                    slow.sendall(b"a")

        thread = threading.Thread(target=drip)
        thread.start()
        try:
            assert whole(slow).startswith(b"HTTP/1.1 408")
        finally:
            stop.set()
            thread.join()


def test_a_client_that_takes_nothing_of_its_answer_is_cut_off() -> None:
    with serving(Small) as (_, host, port), line(host, port) as deaf:
        deaf.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        deaf.sendall(b"GET /much HTTP/1.1\r\nHost: x\r\n\r\n")

        gone = threading.Event()

        def until_reset() -> None:
            # Nothing is read: that the connection is over shows when a write is refused.
            with contextlib.suppress(OSError):
                while not gone.wait(0.05):
                    deaf.sendall(b"x")
            gone.set()

        thread = threading.Thread(target=until_reset)
        thread.start()
        cut_off = gone.wait(patience(20))
        gone.set()
        thread.join()

        assert cut_off


@pytest.mark.parametrize("source", ["127.0.0.1", "127.0.0.2"])
@pytest.mark.parametrize("begin", [b"", b"G", GET + b"X-A: "], ids=["nothing", "a byte", "half a head"])
def test_others_are_served_while_half_requests_fill_the_process(begin: bytes, source: str) -> None:
    with serving(Patient) as (_, host, port), contextlib.ExitStack() as open_lines:
        for _ in range(3 * MOST):
            end = open_lines.enter_context(line(host, port))
            with contextlib.suppress(OSError):
                end.sendall(begin)

        assert all(answered(host, port, source=source) for _ in range(20))


def test_half_bodies_of_one_address_leave_room_for_others() -> None:
    with serving(Patient) as (app, host, port), contextlib.ExitStack() as open_lines:
        ends = [open_lines.enter_context(line(host, port)) for _ in range(MOST // 2)]
        for end in ends:
            end.sendall(HEAD)
        for _ in ends:
            assert app.begun.acquire(timeout=patience(20))

        with line(host, port) as refused:
            assert code_of(whole(refused)) == (503, "too_many_connections")
        assert all(answered(host, port, source="127.0.0.2") for _ in range(20))


def test_a_flood_of_clients_is_answered_and_leaves_nothing_behind() -> None:
    with serving(Patient) as (_, host, port):
        with ThreadPoolExecutor(16) as pool:
            good = sum(pool.map(lambda number: answered(host, port, source=f"127.0.0.{2 + number % 4}"), range(256)))
        assert Patient.limit is not None

        assert good == 256
        with line(host, port) as last:
            last.sendall(GET + b"\r\n")
            assert last.recv(100).startswith(b"HTTP/1.1 200")
            assert Patient.limit.held == 1


def test_a_connection_between_two_requests_makes_room_and_one_at_work_does_not() -> None:
    class One:
        def __init__(self) -> None:
            self.left = False

        def leave(self) -> None:
            self.left = True

    crowd, ends = ConnectionLimit(4), [One() for _ in range(4)]
    crowd.enter(ends[0], "a")
    crowd.work(ends[0], "a")
    crowd.enter(ends[1], "a")

    assert crowd.enter(ends[2], "a")
    assert (ends[0].left, ends[1].left) == (False, True)
    crowd.work(ends[2], "a")
    assert not crowd.enter(ends[3], "a")
    assert crowd.enter(ends[3], "b")
    crowd.exit(ends[0], "a")
    assert crowd.held == 2
