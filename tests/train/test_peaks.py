"""What a job has held of a GPU is what its allocator reserved and what the device holds of it beside that."""

from __future__ import annotations

import subprocess
import sys
from types import SimpleNamespace
from typing import Any

import pytest

from worker.train.memory import CONTEXT_BYTES, Peaks, device_bytes_in_use, held_memory_bytes, peak_memory

GIB = 2**30
GPU: Any = SimpleNamespace(device="cuda")


class Cuda:
    """A device as `torch.cuda` of 2.13 tells of it: `device_memory_used` is everybody's, the rest is this process's."""

    def __init__(self, *used: int | Exception) -> None:
        self._used = list(used)

    def device_memory_used(self, _index: int) -> int:
        answer = self._used.pop(0)
        if isinstance(answer, Exception):
            raise answer
        return answer

    def max_memory_allocated(self) -> int:
        return 6 * GIB

    def max_memory_reserved(self) -> int:
        return 8 * GIB

    def memory_reserved(self) -> int:
        return 7 * GIB

    def is_initialized(self) -> bool:
        return True


def peaks(cuda: Cuda) -> Peaks:
    return peak_memory(GPU, before=device_bytes_in_use(GPU, cuda=cuda), cuda=cuda)


def test_a_desktop_is_not_counted_and_context_and_communicators_are() -> None:
    assert peaks(Cuda(1 * GIB, 10 * GIB)) == Peaks(allocated=6 * GIB, reserved=8 * GIB, whole=10 * GIB)


@pytest.mark.parametrize(
    "cuda",
    [
        Cuda(RuntimeError("a slice of a GPU has no index"), 10 * GIB),
        Cuda(1 * GIB, RuntimeError("the device has failed")),
        Cuda(1 * GIB, 30 * GIB),
        Cuda(20 * GIB, 10 * GIB),
    ],
    ids=["no answer before", "none afterwards", "a stranger came", "a stranger left"],
)
def test_where_the_device_does_not_tell_a_usual_context_stands_for_it(cuda: Cuda) -> None:
    assert peaks(cuda).whole == 8 * GIB + CONTEXT_BYTES


def test_a_cpu_tells_what_was_resident() -> None:
    cpu: Any = SimpleNamespace(device="cpu")

    told = peak_memory(cpu, before=device_bytes_in_use(cpu))

    assert told.allocated == told.reserved == told.whole > 0


def test_what_is_held_now_is_the_allocators_on_a_gpu_and_what_is_resident_elsewhere() -> None:
    hoard = bytearray(b"x") * (64 * 2**20)
    held = held_memory_bytes()
    del hoard

    assert held_memory_bytes(cuda=Cuda()) == 7 * GIB
    assert held_memory_bytes() <= held - 32 * 2**20


def test_a_process_without_memory_has_room_for_its_last_words() -> None:
    code = """if True:
        from worker.train.memory import MemoryReserve, limit_host_memory
        reserve, hoard = MemoryReserve(), []
        limit_host_memory(0)
        try:
            while True:
                hoard.append(bytes(2**20))
        except MemoryError:
            reserve.let_go()
        print(len(bytes(2**20)), end='')
    """

    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)

    assert done.stdout == str(2**20)
