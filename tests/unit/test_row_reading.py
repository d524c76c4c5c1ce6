"""What a program that reads rows may take of its host: time by the size of the rows, processes by what is free."""

from __future__ import annotations

import pytest

from worker.chores.row_reading import LEAST_SECONDS, MOST_PROCESSES, reading_processes, reading_seconds

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
