"""The official client's asynchronous half against a live API, on a real port."""

from __future__ import annotations

import asyncio
from typing import Any

import openai
import pytest

from tests.integration.conftest import Api
from tests.integration.test_openai_client import TRAINING, run_to_success


def test_the_async_client_goes_the_whole_way(api: Api) -> None:
    """Each call of it once, twenty of them at the same time; what only a worker does, this process does meanwhile."""

    async def whole_way() -> dict[str, Any]:
        async with openai.AsyncOpenAI(base_url=f"{api.url}/v1", api_key=api.key, max_retries=0) as client:
            jobs = client.fine_tuning.jobs
            file = await client.files.create(file=TRAINING, purpose="fine-tune")
            upload = await client.uploads.upload_file_chunked(
                file=b"x" * 100, filename="a.txt", bytes=100, mime_type="text/plain", purpose="user_data", part_size=64
            )
            job = await jobs.create(model="smollm2-135m-instruct", training_file=file.id, metadata={"by": "async"})
            waiting = [(await jobs.create(model=job.model, training_file=file.id, seed=seed)).id for seed in range(3)]
            listed = [one.id async for one in jobs.list(limit=2) if one.id in {job.id, *waiting}]
            await asyncio.to_thread(run_to_success, api, job.id)
            cancelled = [one.status for one in await asyncio.gather(*(jobs.cancel(one) for one in waiting))]
            many = await asyncio.gather(*(jobs.retrieve(job.id) for _ in range(20)))
            done = many[0]
            assert done.fine_tuned_model is not None
            with pytest.raises(openai.NotFoundError):
                await jobs.retrieve("ftjob-nothing")
            raw = await client.models.with_raw_response.list(extra_headers={"X-Client-Request-Id": "mine"})
            messages = [event.message async for event in jobs.list_events(job.id, limit=3)]
            return {
                "upload": (upload.status, upload.file.bytes if upload.file else None),
                "listed": listed == [*reversed(waiting), job.id],
                "cancelled": cancelled,
                "statuses": {one.status for one in many},
                "events": messages[0],
                "checkpoints": [point.step_number async for point in jobs.checkpoints.list(job.id)],
                "content": await (await client.files.content(file.id)).aread() == TRAINING[1],
                "models": done.fine_tuned_model in [model.id async for model in client.models.list()],
                "raw": (raw.headers["x-client-request-id"], raw.request_id is not None),
                "deleted": (await client.models.delete(done.fine_tuned_model)).deleted,
            }

    assert asyncio.run(whole_way()) == {
        "upload": ("completed", 100),
        "listed": True,
        "cancelled": ["cancelled"] * 3,
        "statuses": {"succeeded"},
        "events": "The job has successfully completed",
        "checkpoints": [1],
        "content": True,
        "models": True,
        "raw": ("mine", True),
        "deleted": True,
    }
