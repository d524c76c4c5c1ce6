"""The same door before another queue: `python door.py celery|procrastinate URL PORT`.

POST /jobs parses the JSON, puts it into the queue, answers 201. No key, no checks, no files, no events, no answer about
a job's place: what a bare queue gives. Needs nothing of Tunepool, so that an environment of its own can run it.
"""

from __future__ import annotations

import json
import sys
import uuid
from collections.abc import Callable
from typing import Any

import uvicorn
from fastapi import Depends, FastAPI, Request

Put = Callable[[dict[str, Any]], None]


def bare_celery(url: str) -> Put:
    from celery import Celery

    app = Celery("peer", broker=url, set_as_current=False)
    app.conf.update(task_ignore_result=True, task_serializer="json")
    return lambda job: app.send_task("train", kwargs=job, queue="peer-training", ignore_result=True) and None


def procrastinate_queue(url: str) -> Put:
    import procrastinate

    app = procrastinate.App(connector=procrastinate.SyncPsycopgConnector(conninfo=url))
    app.open()
    app.schema_manager.apply_schema()
    task = app.configure_task("train", queue="training")
    return lambda job: task.defer(**job) and None


QUEUES: dict[str, Callable[[str], Put]] = {"celery": bare_celery, "procrastinate": procrastinate_queue}


def make_app(put: Put) -> FastAPI:
    app = FastAPI()

    async def body(request: Request) -> bytes:
        return await request.body()

    @app.post("/jobs", status_code=201)
    def create(content: bytes = Depends(body)) -> dict[str, str]:
        job = json.loads(content)
        put({"id": f"job-{uuid.uuid4().hex}", **job})
        return {"status": "queued"}

    return app


if __name__ == "__main__":
    _, kind, address, port = sys.argv
    uvicorn.run(
        make_app(QUEUES[kind](address)), host="127.0.0.1", port=int(port), log_level="warning", access_log=False
    )
