"""The short way of the requests that are asked most, submissions and polls: a raw request, and one change of threads.

FastAPI's dependencies and validation are left out. A thread of anyio's takes a cancel scope, a limiter and two more
turns of the loop: 0.05 to 0.09 ms of processor time.
"""

from __future__ import annotations

import asyncio
import contextlib
import contextvars
import inspect
import threading
from collections.abc import Callable, Coroutine
from queue import SimpleQueue
from typing import Any, Final, ParamSpec, TypeVar

from fastapi import Request, Response
from fastapi.routing import APIRoute

MOST: Final = 20  # as many as connections that the database lends without making more (shared/store/db.py)

P = ParamSpec("P")
T = TypeVar("T")
_Answer = asyncio.Future[Any]
_Work = tuple[contextvars.Context, Callable[[], Any], asyncio.AbstractEventLoop, _Answer]


class DirectRoute(APIRoute):
    """Calls an `async def handler(request) -> Response` itself: FastAPI would look for parameters, and find none.

    It stands in the OpenAPI document like any other, and other handlers of its router are FastAPI's.
    """

    def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
        if inspect.iscoroutinefunction(self.endpoint) and list(inspect.signature(self.endpoint).parameters) == [
            "request"
        ]:
            return self.endpoint
        return super().get_route_handler()


class Threads:
    """They start with the first call, and end when they are closed, after the work that is left."""

    def __init__(self, most: int = MOST) -> None:
        self._most = most
        self._work: SimpleQueue[_Work | None] = SimpleQueue()
        self._threads: list[threading.Thread] = []

    async def run(self, function: Callable[P, T], /, *args: P.args, **kwargs: P.kwargs) -> T:
        """What the function returns, or raises, in a thread and in this context.

        Who is cancelled meanwhile waits no longer; the function goes on to its end.
        """
        if not self._threads:
            self._start()
        loop = asyncio.get_running_loop()
        answer: asyncio.Future[T] = loop.create_future()
        self._work.put((contextvars.copy_context(), lambda: function(*args, **kwargs), loop, answer))
        return await answer

    def _start(self) -> None:
        self._threads = [
            threading.Thread(target=self._serve, name=f"request-{number}", daemon=True) for number in range(self._most)
        ]
        for thread in self._threads:
            thread.start()

    def _serve(self) -> None:
        while (work := self._work.get()) is not None:
            context, function, loop, answer = work
            fault: BaseException | None = None
            value = None
            try:
                value = context.run(function)
            except BaseException as error:  # whoever waits has it  # noqa: BLE001
                fault = error
            with contextlib.suppress(RuntimeError):  # the loop has ended, and nobody waits
                loop.call_soon_threadsafe(_tell, answer, value, fault)
            del work, context, function, answer, value, fault  # a request lives no longer than its answer

    def close(self) -> None:
        """Let them end."""
        for _ in self._threads:
            self._work.put(None)
        self._threads = []


def _tell(answer: _Answer, value: Any, fault: BaseException | None) -> None:
    if answer.done():  # whoever waited has left
        return
    if fault is None:
        answer.set_result(value)
    else:
        answer.set_exception(fault)
