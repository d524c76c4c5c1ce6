"""When a schedule is due: what is refused, where clocks change, and what was missed."""

from __future__ import annotations

from datetime import UTC, datetime
from itertools import pairwise
from zoneinfo import ZoneInfo

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from shared.errors import Invalid
from shared.settle import moments

BERLIN = "Europe/Berlin"
NOW = datetime(2026, 1, 1, tzinfo=UTC)


def at(text: str) -> datetime:
    return datetime.fromisoformat(text).astimezone(UTC)


def coming(cron: str, after: str, count: int, zone: str = BERLIN) -> list[datetime]:
    due, last = [], at(after)
    for _ in range(count):
        moment = moments.next_moment(cron, zone, after=last)
        assert moment is not None
        due.append(moment)
        last = moment
    return due


def test_a_moment_that_does_not_exist_comes_when_the_clock_has_passed_the_gap() -> None:
    # On 29 March 2026 Berlin's clock goes from 02:00+01:00 to 03:00+02:00.
    assert coming("30 2 * * *", "2026-03-28T12:00:00+01:00", 2) == [
        at("2026-03-29T03:00:00+02:00"),
        at("2026-03-30T02:30:00+02:00"),
    ]


def test_two_moments_of_the_gap_are_one() -> None:
    assert coming("0,30 2 * * *", "2026-03-28T12:00:00+01:00", 2) == [
        at("2026-03-29T03:00:00+02:00"),
        at("2026-03-30T02:00:00+02:00"),
    ]


def test_a_moment_that_comes_twice_counts_the_first_time() -> None:
    # On 25 October 2026 Berlin's clock goes from 03:00+02:00 to 02:00+01:00.
    assert coming("30 2 * * *", "2026-10-24T12:00:00+02:00", 2) == [
        at("2026-10-25T02:30:00+02:00"),
        at("2026-10-26T02:30:00+01:00"),
    ]


def test_in_the_second_pass_of_an_hour_nothing_is_due_again() -> None:
    between = datetime(2026, 10, 25, 2, 10, tzinfo=ZoneInfo(BERLIN), fold=1)

    assert moments.next_moment("30 2 * * *", BERLIN, after=between) == at("2026-10-26T02:30:00+01:00")


def test_what_goes_by_the_hour_goes_by_the_time_that_passes() -> None:
    due = coming("15 * * * *", "2026-10-25T01:20:00+02:00", 3)

    assert [later - earlier for earlier, later in pairwise(due)] == [due[1] - due[0]] * 2
    assert (due[2] - due[0]).total_seconds() == 7200


def test_of_many_missed_moments_the_newest_is_due_and_the_others_are_counted() -> None:
    latest, missed, following = moments.due(
        "30 2 * * *", "UTC", since=at("2026-01-02T02:30:00+00:00"), now=at("2026-01-05T12:00:00+00:00")
    )

    assert (latest, missed, following) == (at("2026-01-05T02:30:00+00:00"), 3, at("2026-01-06T02:30:00+00:00"))


def test_a_moment_that_has_just_come_is_due_by_itself() -> None:
    since = at("2026-01-02T02:30:00+00:00")

    assert moments.due("30 2 * * *", "UTC", since=since, now=since) == (since, 0, at("2026-01-03T02:30:00+00:00"))


def test_an_outage_of_years_is_counted_to_a_bound() -> None:
    now = at("2026-01-01T00:00:00+00:00")

    latest, missed, following = moments.due("*/5 * * * *", "UTC", since=at("2020-01-01T00:00:00+00:00"), now=now)

    assert (missed, latest < now, following) == (moments.MOST_MISSED, True, at("2026-01-01T00:05:00+00:00"))


@pytest.mark.parametrize(
    ("cron", "words"),
    [
        ("* * * * * *", "five fields"),
        ("* * * * *", "every 1 min"),
        ("59,0 * * * *", "every 1 min"),
        ("0,4 3 1 1 *", "every 4 min"),
        ("61 * * * *", "Bad minute"),
        ("0 0 30 2 *", "Bad day-of-month"),
        ("0 0 */20 * 1L", "no moment"),
        ("@daily", "five fields"),
        ("0 25 * * *", "Bad hour"),
        ("0 0 * * ²L", "Bad day-of-week"),
        ("0 0 * * $(id)", "Bad day-of-week"),
        ("", "five fields"),
    ],
)
def test_what_is_no_schedule_is_refused_with_its_reason(cron: str, words: str) -> None:
    with pytest.raises(Invalid, match=words) as refusal:
        moments.must_be_cron(cron, "UTC", now=NOW)

    assert (refusal.value.param, refusal.value.code) == ("cron", "invalid_cron")


@pytest.mark.parametrize(
    "zone", ["Europe/Nowhere", "../../etc/passwd", "/etc/localtime", "localtime", "Factory", "CEST", "+02:00", ""]
)
def test_what_is_no_place_of_the_tz_database_is_refused(zone: str) -> None:
    with pytest.raises(Invalid, match="no time zone") as refusal:
        moments.must_be_zone(zone)

    assert (refusal.value.param, refusal.value.code) == ("time_zone", "invalid_time_zone")


@settings(max_examples=200)
@given(st.lists(st.text("0123456789*/-,#LWMONsun@²", min_size=1, max_size=4), min_size=5, max_size=5))
def test_whatever_is_written_is_due_in_the_future_or_refused(fields: list[str]) -> None:
    try:
        first = moments.must_be_cron(" ".join(fields), BERLIN, now=NOW)
    except Invalid:
        return
    assert first > NOW
