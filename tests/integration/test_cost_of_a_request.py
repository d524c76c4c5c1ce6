"""What a submission and a poll cost, counted instead of timed: statements of the database, and calls of Python.

Both are most of what is asked. On a clock a tenth more is noise, and so a tenth came with each release unseen; counted
it is the same on every machine. Whoever needs more raises a bound here, and says in the commit what for.
"""

from __future__ import annotations

import asyncio
import gc
import gzip
import itertools
import json
import sys
from collections import Counter
from collections.abc import Awaitable, Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType
from typing import Any

import pytest
from fastapi import FastAPI
from sqlalchemy import Engine, event, update

from api.app import create_app
from api.direct_route import Threads
from shared.settings import Settings
from shared.store.db import session_scope
from shared.store.tables import JobRow
from tests.factories import make_file, make_key

JOBS = "/v1/fine_tuning/jobs"
ROOT = Path(__file__).parents[2]
PRODUCT = tuple(f"{ROOT / folder}/" for folder in ("api", "shared"))
WARM = 12  # requests before the one that is counted: statements are compiled and prepared, series and routes known


@dataclass
class Cost:
    """Of one request: statements between BEGIN and COMMIT, calls of Python, and the product's files among them."""

    statements: list[str] = field(default_factory=list)
    calls: Counter[str] = field(default_factory=Counter)

    @property
    def files(self) -> set[str]:
        return {name for name in self.calls if name.startswith(PRODUCT)}


@dataclass(frozen=True)
class Asking:
    """The application, called as its server calls it, in one thread."""

    app: FastAPI
    key: str
    numbers: Iterator[int] = field(default_factory=itertools.count)

    async def ask(self, method: str, path: str, document: Any = None) -> dict[str, Any]:
        body = b"" if document is None else json.dumps(document).encode()
        said = {"host": "x", "accept-encoding": "gzip, deflate", "authorization": f"Bearer {self.key}"}
        if document is not None:
            said |= {"content-type": "application/json", "content-length": str(len(body))}
        scope = {
            "type": "http",
            "asgi": {"version": "3.0"},
            "http_version": "1.1",
            "method": method,
            "scheme": "http",
            "path": path,
            "raw_path": path.encode(),
            "root_path": "",
            "query_string": b"",
            "headers": [(name.encode(), value.encode()) for name, value in said.items()],
            "client": ("127.0.0.1", 1),
            "server": ("127.0.0.1", 8000),
            "state": {},
        }
        messages: list[Any] = []

        async def receive() -> dict[str, Any]:
            return {"type": "http.request", "body": body, "more_body": False}

        async def send(message: Any) -> None:
            messages.append(message)

        await self.app(scope, receive, send)  # type: ignore[arg-type]  # messages are dictionaries
        start, content = messages
        packed = (b"content-encoding", b"gzip") in start["headers"]
        answer: dict[str, Any] = json.loads(gzip.decompress(content["body"]) if packed else content["body"])
        assert start["status"] == 200, answer
        return answer

    async def submit(self, file_id: str) -> str:
        """A job like a pipeline's: every body is another."""
        document = {
            "model": "smollm2-135m-instruct",
            "training_file": file_id,
            "suffix": "nightly",
            "metadata": {"git_sha": f"{next(self.numbers):040x}", "branch": "main"},
            "method": {"type": "supervised", "supervised": {"hyperparameters": {"n_epochs": 1}}},
            "tunepool": {"adapter": {"method": "lora", "r": 8}},
        }
        answer = await self.ask("POST", JOBS, document)
        return str(answer["id"])


async def cost_of(act: Callable[[], Awaitable[object]]) -> Cost:
    """The least of three: a connection that has rested, or a collection of garbage, belongs to no request."""
    for _ in range(WARM):
        await act()
    costs = [await _counted(act) for _ in range(3)]
    return min(costs, key=lambda cost: cost.calls.total())


async def _counted(act: Callable[[], Awaitable[object]]) -> Cost:
    """Two requests: who hears the statements of one adds calls to it."""
    cost = Cost()

    def call(frame: FrameType, what: str, _: object) -> None:
        if what == "call":
            cost.calls[frame.f_code.co_filename] += 1

    def say(_connection: object, _cursor: object, statement: str, *_: object) -> None:
        cost.statements.append(statement)

    gc.disable()
    sys.setprofile(call)
    try:
        await act()
    finally:
        sys.setprofile(None)
        gc.enable()
    event.listen(Engine, "before_cursor_execute", say)
    try:
        await act()
    finally:
        event.remove(Engine, "before_cursor_execute", say)
    return cost


@pytest.fixture(scope="module")
def costs(engine: Engine, database_url: str, tmp_path_factory: pytest.TempPathFactory) -> tuple[Cost, Cost]:
    """Of a submission, and of a poll of a settled job."""
    settings = Settings(home=tmp_path_factory.mktemp("home"), database_url=database_url, redis_url="")
    with session_scope(engine) as session:
        caller, key = make_key(session)
        file_id = make_file(session, caller).id
    app = create_app(settings)
    asking = Asking(app, key)

    async def here(_: Threads, work: Callable[..., Any], *args: Any, **named: Any) -> Any:
        return work(*args, **named)

    async def act() -> tuple[Cost, Cost]:
        async with app.router.lifespan_context(app):
            submission = await cost_of(lambda: asking.submit(file_id))
            job_id = await asking.submit(file_id)
            with session_scope(engine) as session:
                session.execute(update(JobRow).where(JobRow.id == job_id).values(status="cancelled"))
            return submission, await cost_of(lambda: asking.ask("GET", f"{JOBS}/{job_id}"))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Threads, "run", here)  # a profile is of one thread
        return asyncio.run(act())


def test_a_submission_takes_three_statements_and_a_poll_two(costs: tuple[Cost, Cost]) -> None:
    submission, poll = costs

    # Who asks; the file with the limits and the turn; the job with its events. And who asks; the job.
    assert [statement.split()[0].lower() for statement in submission.statements] == ["select", "select", "with"]
    assert [statement.split()[0].lower() for statement in poll.statements] == ["select", "select"]


def test_a_submission_and_a_poll_make_no_more_calls_than_they_did(costs: tuple[Cost, Cost]) -> None:
    submission, poll = costs

    assert submission.calls.total() <= 1235
    assert poll.calls.total() <= 1005


def test_a_submission_and_a_poll_pass_through_no_more_files_than_they_did(costs: tuple[Cost, Cost]) -> None:
    submission, poll = costs

    assert len(submission.files) <= 41, sorted(submission.files)
    assert len(poll.files) <= 21, sorted(poll.files)
