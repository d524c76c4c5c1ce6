"""Stacks that train in earnest: the real trainer, and a tiny random model with weights in place of one without."""

from __future__ import annotations

import contextlib
import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from shared.store.tables import JobRow
from tests.lifecycle.stack import Servers, Stack, open_stack
from tests.train.tiny import chat_rows, make_model_directory


@contextlib.contextmanager
def open_real_stack(home: Path, servers: Servers, *, config: Any = None, **environment: str) -> Iterator[Stack]:
    """`open_stack` with the real trainer. Its model `tiny` is a random one of `config`, a small Llama by default."""
    with open_stack(home, servers, TUNEPOOL_TRAINER="worker.train", **environment) as made:
        shutil.rmtree(made.home / "tiny")
        make_model_directory(made.home / "tiny", config)
        yield made


def chat_file(rows: int) -> bytes:
    """The content of a training file with so many conversations."""
    return "".join(json.dumps(row) + "\n" for row in chat_rows(rows)).encode()


def weights_of(job: JobRow) -> str:
    """The hash of the weights that were published."""
    assert job.manifest is not None
    return next(str(file["sha256"]) for file in job.manifest["files"] if file["name"] == "adapter_model.safetensors")


def curve_of(stack: Stack, job_id: str) -> list[tuple[int, float]]:
    """Each step and its loss, as the attempts told of them: a step that was made twice is there twice."""
    return [(event.data["step"], event.data["train_loss"]) for event in stack.events(job_id) if event.type == "metrics"]
