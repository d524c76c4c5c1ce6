from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from worker.attempt.divided_time import DividedTime


class Clock:
    now = 100.0

    def __call__(self) -> float:
        return self.now


def test_time_is_divided_by_the_steps_that_each_has_measured() -> None:
    clock = Clock()
    time = DividedTime(["a", "b"], clock=clock)
    time.worked("a", 1.0)
    time.worked("b", 3.0)
    clock.now += 10

    assert time.leave("a") == pytest.approx(0.25)
    clock.now += 10  # b has the device for itself

    assert time.leave("b") == pytest.approx((7.5 + 10) / 20)


def test_who_leaves_before_anybody_has_measured_pays_an_equal_part() -> None:
    clock = Clock()
    time = DividedTime(["a", "b", "c", "d"], clock=clock)
    clock.now += 8

    assert time.leave("a") == pytest.approx(0.25)
    assert time.leave("a") == pytest.approx(0.25)  # it has left already


def test_at_the_moment_of_the_beginning_the_parts_are_equal() -> None:
    assert DividedTime(["a", "b"], clock=Clock()).leave("b") == 0.5


@given(st.lists(st.tuples(st.sampled_from("abc"), st.floats(-1, 50), st.floats(0.1, 50)), max_size=20))
def test_the_parts_of_all_are_together_the_whole_time(course: list[tuple[str, float, float]]) -> None:
    clock = Clock()
    time = DividedTime("abc", clock=clock)
    for member, seconds, pause in course:
        time.worked(member, seconds)
        clock.now += pause
    seconds_of = {}
    for member in "bca":
        clock.now += 1.0
        seconds_of[member] = time.leave(member) * (clock.now - 100.0)

    assert sum(seconds_of.values()) == pytest.approx(clock.now - 100.0)
