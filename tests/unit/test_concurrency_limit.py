"""A flood of one caller leaves room for the others, and keeps nobody out for good."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest
from starlette.types import Message, Receive, Scope, Send

from api.concurrency_limit import (
    FIRST_BYTES,
    IN_WORK,
    KEYLESS_BURST,
    KEYLESS_PER_SECOND,
    LONGEST_WAIT_SECONDS,
    ConcurrencyLimit,
)


class Handler:
    """An application that answers when it is let."""

    def __init__(self) -> None:
        self.begun: list[bytes] = []
        self.may_answer = asyncio.Event()
        self.may_end = asyncio.Event()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        self.begun.append(dict(scope["headers"]).get(b"authorization", b""))
        await self.may_answer.wait()
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await self.may_end.wait()


async def nothing(*_: Any) -> Any: ...


def request(key: bytes | None, path: str = "/v1/models") -> Scope:
    headers = [] if key is None else [(b"authorization", key)]
    return {"type": "http", "path": path, "headers": headers, "client": ("198.51.100.7", 1)}


async def settle() -> None:
    for _ in range(5 * IN_WORK):
        await asyncio.sleep(0)


def test_a_key_has_a_share_of_the_process_and_another_key_waits_for_nothing() -> None:
    async def act() -> None:
        handler = Handler()
        limit = ConcurrencyLimit(handler)
        flood = [asyncio.create_task(limit(request(b"a"), nothing, nothing)) for _ in range(3 * IN_WORK)]
        await settle()
        other = asyncio.create_task(limit(request(b"b"), nothing, nothing))
        await settle()
        assert (handler.begun.count(b"a"), handler.begun.count(b"b")) == (IN_WORK, 1)

        handler.may_answer.set()  # an answer that has begun is a stream at most: it holds no place
        await settle()
        assert handler.begun.count(b"a") == 3 * IN_WORK

        handler.may_end.set()
        await asyncio.gather(*flood, other)
        assert limit._gates == {}

    asyncio.run(act())


def test_a_client_that_leaves_while_it_waits_takes_no_place_with_it() -> None:
    async def act() -> None:
        handler = Handler()
        limit = ConcurrencyLimit(handler)
        tasks = [asyncio.create_task(limit(request(b"a"), nothing, nothing)) for _ in range(2 * IN_WORK)]
        await settle()
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        assert limit._gates == {}

    asyncio.run(act())


def test_who_has_left_while_it_waited_costs_nothing_more() -> None:
    async def act() -> None:
        handler = Handler()
        limit = ConcurrencyLimit(handler)
        flood = [asyncio.create_task(limit(request(b"a"), nothing, nothing)) for _ in range(IN_WORK)]
        left = asyncio.create_task(limit({**request(b"a"), "gone": lambda: True}, nothing, nothing))
        handler.may_end.set()
        await settle()
        handler.may_answer.set()
        await asyncio.gather(*flood, left)
        assert len(handler.begun) == IN_WORK

    asyncio.run(act())


def test_answers_that_wait_for_others_are_not_counted() -> None:
    async def act() -> None:
        handler = Handler()
        limit = ConcurrencyLimit(handler)
        for _ in range(2 * IN_WORK):
            asyncio.create_task(limit(request(b"a", "/v1/chat/completions"), nothing, nothing))  # noqa: RUF006
        await settle()
        assert len(handler.begun) == 2 * IN_WORK

    asyncio.run(act())


def test_answers_without_a_key_come_a_little_later_when_an_address_asks_often() -> None:
    now = 100.0
    limit = ConcurrencyLimit(nothing, clock=lambda: now)

    waits = [limit.wait_seconds("a") for _ in range(1000)]

    assert waits[:KEYLESS_BURST] == [0.0] * KEYLESS_BURST
    assert 0 < waits[KEYLESS_BURST] <= 1 / KEYLESS_PER_SECOND + 1e-9
    assert max(waits) == LONGEST_WAIT_SECONDS  # a probe between them comes in time
    assert limit.wait_seconds("b") == 0.0
    now += KEYLESS_BURST / KEYLESS_PER_SECOND + LONGEST_WAIT_SECONDS
    assert limit.wait_seconds("a") == 0.0


def pieces(*bodies: bytes, whole: bool = True) -> Receive:
    """A client that sends these, and then nothing."""
    coming = [
        {"type": "http.request", "body": body, "more_body": not whole or number < len(bodies)}
        for number, body in enumerate(bodies, 1)
    ]

    async def receive() -> Any:
        return coming.pop(0) if coming else await asyncio.Event().wait()

    return receive


def post(path: str = "/v1/fine_tuning/jobs") -> Scope:
    scope = request(b"a", path)
    return {**scope, "headers": [*scope["headers"], (b"content-length", b"9")]}


def test_half_bodies_are_not_worked_at_and_take_no_place() -> None:
    async def act() -> None:
        handler = Handler()
        limit = ConcurrencyLimit(handler)
        paths = ("/v1/fine_tuning/jobs", "/v1/files")
        halves = [
            asyncio.create_task(limit(post(path), pieces(b"{", whole=False), nothing)) for path in paths * (2 * IN_WORK)
        ]
        await settle()
        assert handler.begun == []

        others = [asyncio.create_task(limit(post(), pieces(b"{", b"}"), nothing)) for _ in range(IN_WORK)]
        await settle()
        assert len(handler.begun) == IN_WORK
        for task in (*halves, *others):
            task.cancel()

    asyncio.run(act())


def test_what_came_of_a_body_is_given_on_in_its_order() -> None:
    read: list[bytes] = []

    async def reader(_scope: Scope, receive: Receive, _send: Send) -> None:
        more = True
        while more:
            piece = await receive()
            read.append(piece["body"])
            more = piece["more_body"]

    async def gone() -> Any:
        return {"type": "http.disconnect"}

    async def act() -> None:
        limit = ConcurrencyLimit(reader)
        long = [b"a" * (FIRST_BYTES - 1), b"b", b"c" * FIRST_BYTES, b""]
        await limit(post(), pieces(*long), nothing)
        assert read == long
        await limit(post(), gone, nothing)
        assert read == long, "who has left is not worked for"

    asyncio.run(act())


def test_a_long_body_of_which_nothing_comes_is_looked_at_all_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("api.concurrency_limit.LOOK_SECONDS", 0.0)

    async def act() -> None:
        seen, pieces = [], asyncio.Queue[Message]()

        async def read(scope: Scope, receive: Receive, send: Send) -> None:
            seen.append("begun")
            seen.append((await receive())["body"])

        scope = request(b"a")
        scope["headers"].append((b"content-length", b"%d" % (FIRST_BYTES + 1)))
        reading = asyncio.create_task(ConcurrencyLimit(read)(scope, pieces.get, nothing))
        await settle()
        assert seen == ["begun"]

        pieces.put_nowait({"type": "http.request", "body": b"late", "more_body": False})
        await reading
        assert seen == ["begun", b"late"]

    asyncio.run(act())
