"""What a program of the CPU lane may take of its host: time and memory by the size of its work."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from worker.chores.evaluating import silent_seconds
from worker.chores.merging import making_seconds
from worker.chores.row_reading import LEAST_SECONDS, MOST_PROCESSES, reading_processes, reading_seconds
from worker.chores.unpacking import MOST_BYTES, checking_seconds, unpacking_bytes, unpacking_seconds

MIB = 1024**2
GIB = 1024**3


def test_a_small_file_holds_its_place_for_less_time_than_a_large_one() -> None:
    sizes = [0, 10_000, MIB, 10 * MIB, 50 * MIB]
    times = [reading_seconds(size, most=900) for size in sizes]

    assert times == sorted(set(times))
    assert times[0] == LEAST_SECONDS < times[-1] < 900


@pytest.mark.parametrize("most", [0.3, 60, 900])
def test_no_file_has_more_time_than_the_operator_gives(most: float) -> None:
    assert reading_seconds(512 * MIB, most=most) == most
    assert reading_seconds(0, most=most) <= most


@pytest.mark.parametrize(
    ("cores", "free", "processes"),
    [(8, 64, MOST_PROCESSES), (2, 64, 2), (8, 5, 2), (8, 1, 1), (8, 0, 1), (1, 64, 1)],
)
def test_no_more_rows_are_read_at_once_than_free_memory_holds(cores: int, free: int, processes: int) -> None:
    assert reading_processes(cores=cores, available=free * GIB, each=2 * GIB) == processes


@pytest.mark.parametrize(
    ("seconds", "least", "most"),
    [
        (unpacking_seconds, 90, 700),
        (checking_seconds, 90, 400),
        (making_seconds, 1800, 3000),
        (silent_seconds, 1800, 3000 * MIB),
    ],
)
def test_every_kind_of_long_work_has_time_by_its_size(
    seconds: Callable[[int], float], least: float, most: float
) -> None:
    times = [seconds(size) for size in (0, MIB, 10 * MIB, 512 * MIB)]

    assert times == sorted(set(times))
    assert times[0] == least
    assert times[-1] < most


def test_a_bomb_of_a_few_bytes_may_not_grow_as_far_as_a_file_of_the_largest_size() -> None:
    sizes = [0, MIB, 100 * MIB, 512 * MIB, 8 * GIB]
    room = [unpacking_bytes(size) for size in sizes]

    assert room == sorted(room)
    assert room[0] == MOST_BYTES // 4
    assert room[-2:] == [MOST_BYTES, MOST_BYTES]
