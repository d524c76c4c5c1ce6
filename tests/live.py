"""A live API in this process, on a real port, for clients that need one."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import uvicorn

from api.app import create_app
from api.bounded_head import BoundedHead
from shared import log
from shared.settings import Settings
from tests import shared_routes
from tests.patience import patience

assert shared_routes  # all tests with an API import this module


@contextmanager
def live_api(settings: Settings) -> Iterator[str]:
    """Serve until the block ends; yields the base URL without /v1."""
    log.configure(settings)
    with served(create_app(settings)) as url:
        yield url


@contextmanager
def served(app: Any, *, http: type[BoundedHead] = BoundedHead) -> Iterator[str]:
    """The same for an application that the test has made, to look into it."""
    config = uvicorn.Config(app, host="127.0.0.1", port=0, log_level="warning", lifespan="auto", http=http)
    server = uvicorn.Server(config)
    thread = threading.Thread(target=server.run, name="live-api")
    thread.start()
    try:
        deadline = time.monotonic() + patience(10)
        while not server.started and thread.is_alive() and time.monotonic() < deadline:
            time.sleep(0.01)
        port = server.servers[0].sockets[0].getsockname()[1]
        yield f"http://127.0.0.1:{port}"
    finally:
        server.should_exit = True
        thread.join(timeout=patience(10))
