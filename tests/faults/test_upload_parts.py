"""Uploads in parts against a real API process: it is killed between parts, and its memory does not follow the file."""

from __future__ import annotations

import hashlib
import os

import psutil
from openai import OpenAI

from tests.faults.conftest import api_process, make_secret
from tests.lifecycle.stack import Stack
from tests.patience import patience

MIB = 1024 * 1024
PART_BYTES = 16 * MIB
# Four pieces of 8 MiB go to the store at once (shared/store/storage.py), and as much is between the threads.
MOST_GROWTH = 96 * MIB


def test_a_killed_api_process_loses_no_part_that_it_accepted(stack: Stack) -> None:
    pieces = [os.urandom(PART_BYTES // 4) for _ in range(3)]
    key = make_secret(stack)
    with api_process(stack) as url, OpenAI(base_url=f"{url}/v1", api_key=key) as client:
        upload = client.uploads.create(
            bytes=sum(map(len, pieces)), filename="a.bin", mime_type="application/octet-stream", purpose="user_data"
        )
        parts = [client.uploads.parts.create(upload.id, data=piece).id for piece in pieces[:2]]
    # `api_process` ends with SIGKILL.
    with api_process(stack) as url, OpenAI(base_url=f"{url}/v1", api_key=key) as client:
        parts.append(client.uploads.parts.create(upload.id, data=pieces[2]).id)
        file = client.uploads.complete(upload.id, part_ids=parts).file

        assert file is not None
        assert file.model_extra["tunepool"]["sha256"] == hashlib.sha256(b"".join(pieces)).hexdigest()


def test_the_memory_of_the_api_does_not_grow_with_the_file(stack: Stack) -> None:
    key, piece = make_secret(stack), os.urandom(PART_BYTES)
    with (
        api_process(stack) as url,
        OpenAI(base_url=f"{url}/v1", api_key=key, timeout=patience(60)) as client,
    ):
        process = psutil.Process(stack.processes[-1].pid)
        sizes = {}
        for count in (1, 8):
            upload = client.uploads.create(
                bytes=count * PART_BYTES, filename="a.bin", mime_type="x", purpose="user_data"
            )
            part = client.uploads.parts.create(upload.id, data=piece).id
            for number in range(1, count):
                client.uploads.parts.create(upload.id, data=number.to_bytes(8) + piece[8:])
            file = client.uploads.complete(upload.id, part_ids=[part] * count).file
            assert file is not None
            assert file.bytes == count * PART_BYTES
            sizes[count] = peak_bytes(process)

    assert sizes[8] - sizes[1] < MOST_GROWTH < 7 * PART_BYTES, sizes


def peak_bytes(process: psutil.Process) -> int:
    """The most memory that it has ever held."""
    with open(f"/proc/{process.pid}/status", encoding="ascii") as status:
        return next(int(line.split()[1]) * 1024 for line in status if line.startswith("VmHWM"))
