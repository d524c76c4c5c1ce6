"""Routes whose handlers take the raw request, without FastAPI's dependencies and validation."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Coroutine
from typing import Any

from fastapi import Request, Response
from fastapi.routing import APIRoute


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
