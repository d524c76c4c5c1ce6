"""LiteLLM through a whole flow: python litellm_flow.py ROWS MODEL. Prints what it saw as one JSON object."""

from __future__ import annotations

import asyncio
import json
import os
import sys
import time
from pathlib import Path
from typing import Any

import litellm

WAYS = {
    "custom_llm_provider": "openai",
    "api_base": os.environ["OPENAI_BASE_URL"],
    "api_key": os.environ["OPENAI_API_KEY"],
}


def main(rows: Path, model: str) -> None:
    seen: dict[str, Any] = {}
    file = litellm.create_file(file=(rows.name, rows.read_bytes()), purpose="fine-tune", **WAYS)
    while litellm.file_retrieve(file.id, **WAYS).status != "processed":
        time.sleep(0.2)
    seen["same_bytes"] = litellm.file_content(file.id, **WAYS).content == rows.read_bytes()
    seen["listed"] = file.id in [each.id for each in litellm.file_list(**WAYS)]

    job = litellm.create_fine_tuning_job(
        model=model, training_file=file.id, hyperparameters={"n_epochs": 1}, suffix="litellm", **WAYS
    )
    while job.status not in ("succeeded", "failed", "cancelled"):
        time.sleep(0.2)
        job = litellm.retrieve_fine_tuning_job(job.id, **WAYS)
    seen["status"] = job.status
    seen["jobs"] = job.id in [each.id for each in litellm.list_fine_tuning_jobs(limit=5, **WAYS)]
    cancelled = litellm.create_fine_tuning_job(model=model, training_file=file.id, **WAYS)
    seen["cancelled"] = litellm.cancel_fine_tuning_job(cancelled.id, **WAYS).id == cancelled.id

    tuned = f"openai/{job.fine_tuned_model}"
    asked = {"messages": [{"role": "user", "content": "one two"}], "api_base": WAYS["api_base"]}
    answer = litellm.completion(tuned, **asked)
    seen["answer"] = [
        answer.choices[0].message.content,
        answer.choices[0].finish_reason,
        answer.usage.completion_tokens,
    ]
    pieces = litellm.completion(tuned, stream=True, **asked)
    seen["streamed"] = "".join(piece.choices[0].delta.content or "" for piece in pieces)
    seen["async"] = asyncio.run(litellm.acompletion(tuned, **asked)).choices[0].message.content
    try:
        litellm.completion("openai/nothing-of-that-name", num_retries=0, **asked)
    except litellm.NotFoundError as error:
        seen["refused"] = error.status_code
    seen["deleted"] = litellm.file_delete(file.id, **WAYS).deleted
    sys.stdout.write(json.dumps(seen) + "\n")


main(Path(sys.argv[1]), sys.argv[2])
