"""Work of requests in threads: what it returns and raises, in which context, and what becomes of who leaves."""

from __future__ import annotations

import asyncio
import contextvars
import threading

import pytest

from api.direct_route import Threads
from tests.patience import patience

REQUEST = contextvars.ContextVar("REQUEST", default="none")


def test_an_answer_comes_from_another_thread_and_knows_the_request() -> None:
    threads = Threads(2)

    def work(number: int, *, more: int) -> tuple[int, str, bool]:
        return number + more, REQUEST.get(), threading.current_thread() is threading.main_thread()

    async def ask(name: str) -> tuple[int, str, bool]:
        REQUEST.set(name)
        return await threads.run(work, 1, more=2)

    async def act() -> list[tuple[int, str, bool]]:
        return await asyncio.gather(*[asyncio.create_task(ask(name)) for name in ("a", "b", "c")])

    answers = asyncio.run(act())
    threads.close()

    assert answers == [(3, "a", False), (3, "b", False), (3, "c", False)]


def test_an_error_is_the_requests_own_and_the_thread_goes_on() -> None:
    threads = Threads(1)

    async def act() -> int:
        with pytest.raises(ZeroDivisionError):
            await threads.run(lambda: 1 // 0)
        return await threads.run(lambda: 7)

    assert asyncio.run(act()) == 7
    threads.close()


def test_who_leaves_is_not_waited_for_and_the_work_is_done_all_the_same() -> None:
    threads, may_end, ended = Threads(1), threading.Event(), threading.Event()

    def work() -> None:
        may_end.wait(patience(20))
        ended.set()

    async def act() -> int:
        gone = asyncio.create_task(threads.run(work))
        await asyncio.sleep(0)
        gone.cancel()
        with pytest.raises(asyncio.CancelledError):
            await gone
        may_end.set()
        return await threads.run(lambda: 7)

    assert asyncio.run(act()) == 7
    assert ended.is_set()
    threads.close()


def test_closed_threads_do_what_is_left_and_end() -> None:
    threads, done = Threads(1), threading.Event()

    async def act() -> threading.Thread:
        return await threads.run(threading.current_thread)

    async def leave_work() -> None:
        asyncio.create_task(threads.run(done.set))  # noqa: RUF006  # nobody waits for it
        await asyncio.sleep(0)

    thread = asyncio.run(act())
    asyncio.run(leave_work())
    threads.close()
    thread.join(patience(20))

    assert done.is_set()
    assert not thread.is_alive()
