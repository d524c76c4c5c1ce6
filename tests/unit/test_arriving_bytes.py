"""What an upload costs the API besides its bytes: the hash beside the event loop, and memory used again."""

from __future__ import annotations

import asyncio
import hashlib
import subprocess
import sys
import threading
from typing import Any

import pytest

from api import hashing
from api.hashing import APART_BYTES, Sha256

ROUNDS = 500
PIECE = 250_000  # about what a read of a socket brings


def hashed(*pieces: bytes) -> str:
    async def work() -> str:
        state = Sha256()
        for piece in pieces:
            await state.add(piece)
        return await state.hexdigest()

    return asyncio.run(work())


def test_pieces_of_every_size_are_hashed_in_their_order() -> None:
    pieces = [bytes([number]) * (APART_BYTES + (number % 3 - 1) * 1000) for number in range(30)]

    assert hashed(*pieces) == hashlib.sha256(b"".join(pieces)).hexdigest()
    assert hashed() == hashlib.sha256().hexdigest()


def test_large_pieces_are_hashed_by_another_thread_than_the_loops(monkeypatch: pytest.MonkeyPatch) -> None:
    threads: list[str] = []

    class Noting:
        def update(self, piece: bytes) -> None:
            threads.append(threading.current_thread().name.partition("_")[0])

        def hexdigest(self) -> str:
            return ""

    monkeypatch.setattr(hashing, "hashlib", type("Stand", (), {"sha256": staticmethod(Noting)}))
    hashed(b"x" * APART_BYTES, b"y")

    assert threads == ["hashing", "MainThread"]


def faults(*, kept: bool) -> int:
    """Pages that a process has the system hand out while it makes and drops what a socket brings."""
    program = f"""
import resource
from api.freed_memory import keep_a_little
if {kept}:
    assert keep_a_little()
source = memoryview(bytes({PIECE}))
def counted():
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt
def rounds(count):
    for _ in range(count):
        first, second = bytes(source), bytearray(source)
        del first, second
rounds(10)
before = counted()
rounds({ROUNDS})
print(counted() - before)
"""
    done: Any = subprocess.run([sys.executable, "-c", program], check=True, capture_output=True, text=True)
    return int(done.stdout)


def test_memory_of_arriving_pieces_is_used_again() -> None:
    assert faults(kept=True) < ROUNDS < faults(kept=False)
