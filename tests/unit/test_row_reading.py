"""What a program of the CPU lane may take of its host: time and memory by the size of its work."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import pytest

from shared.lease.values import FileRef
from shared.rows.check import DatasetReport, Limits
from shared.rows.check import check as check_rows
from shared.settings import Settings
from tests.factories import make_request
from worker.chores import checks
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


def test_rows_that_are_read_under_other_names_have_the_time_of_their_check(monkeypatch: pytest.MonkeyPatch) -> None:
    """`training.columns` has a file checked once more, in the same lane and by the same rule."""
    limits: list[Limits] = []

    def check(*_: Any, **options: Any) -> DatasetReport:
        limits.append(options["limits"])
        return REPORT

    monkeypatch.setattr(checks, "check", check)
    request = make_request("file-1", tunepool={"training": {"columns": {"prompt": "question"}}})
    file = FileRef(id="file-1", key="k", bytes=100 * MIB, sha256="0" * 64, report=REPORT.document())
    host: Any = SimpleNamespace(settings=Settings(), store=SimpleNamespace(chunks=lambda _: iter(())))
    claim: Any = Claimed(request, training_file=file)

    checks.read_as_asked(host, claim, watch=None)  # type: ignore[arg-type]  # nothing flows

    assert [limit.seconds for limit in limits] == [checking_seconds(100 * MIB)]


@dataclass(frozen=True)
class Claimed:
    """So much of a claim as the reading of its files needs."""

    request: Any
    training_file: FileRef
    validation_file: FileRef | None = None


REPORT = check_rows([b'{"prompt": "a", "completion": "b"}\n'])
