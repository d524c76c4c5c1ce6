"""When a schedule is due: cron expressions in a time zone. Pure: the caller tells the time.

Five fields as Debian's cron reads them (man 5 crontab), by the library cronsim. Where clocks change: a moment that does
not exist comes as soon as the clock is past the gap, and one that comes twice counts the first time, unless the hour or
the minute begins with a star: such expressions go by the time that passes.
"""

from __future__ import annotations

import zoneinfo
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from functools import lru_cache
from itertools import pairwise
from typing import Final

from cronsim import CronSim, CronSimError

from shared.errors import Invalid

FIELDS: Final = 5
LEAST_GAP: Final = timedelta(minutes=5)
MOST_MISSED: Final = 1000  # that are counted
# Moments nearer than an hour are in the minutes' field, so an hour of them shows the least gap.
_LOOKED_AT: Final = 64
# Names of the host's own zone, and of none.
_NO_PLACES: Final = frozenset({"localtime", "Factory", "posixrules"})


@lru_cache(maxsize=1)
def _zones() -> frozenset[str]:
    return frozenset(zoneinfo.available_timezones()) - _NO_PLACES


def must_be_zone(name: str) -> None:
    """Raises Invalid unless `name` is a zone of the tz database."""
    if name not in _zones():
        raise Invalid(
            f"'{name[:100]}' is no time zone. Use a name of the tz database, such as Europe/Berlin or UTC.",
            param="time_zone",
            code="invalid_time_zone",
        )


def must_be_cron(cron: str, time_zone: str, *, now: datetime) -> datetime:
    """The first due moment after `now`. Raises Invalid for what cannot be read, is never due, or is due too often."""
    must_be_zone(time_zone)
    if len(cron.split()) != FIELDS:
        raise _bad(cron, "it has five fields: minute, hour, day of month, month, day of week")
    try:
        moments = list(_first(_after(cron, time_zone, now), _LOOKED_AT))
    except CronSimError as error:
        raise _bad(cron, str(error)) from None
    if not moments:
        raise _bad(cron, "no moment of the next 50 years is meant")
    gaps = [later - earlier for earlier, later in pairwise(moments)]
    if gaps and min(gaps) < LEAST_GAP:
        raise _bad(cron, f"it is due every {min(gaps).seconds // 60} min; at least 5 min must lie between two moments")
    return moments[0]


def due(cron: str, time_zone: str, *, since: datetime, now: datetime) -> tuple[datetime, int, datetime | None]:
    """(the newest due moment up to `now`, how many came before it from `since` on, the first moment after `now`).

    Args: since: a due moment that has come. After `MOST_MISSED` the rest is not counted: the last counted one is
        reported.
    """
    latest, missed = since, 0
    for moment in _after(cron, time_zone, since):
        if moment > now:
            return latest, missed, moment
        latest, missed = moment, missed + 1
        if missed == MOST_MISSED:
            return latest, missed, next_moment(cron, time_zone, after=now)
    return latest, missed, None


def next_moment(cron: str, time_zone: str, *, after: datetime) -> datetime | None:
    """The first due moment after `after`; None: there is none in 50 years."""
    return next(_after(cron, time_zone, after), None)


def _after(cron: str, time_zone: str, after: datetime) -> Iterator[datetime]:
    """Due moments in UTC, strictly rising: of two that fall on one the second is left out."""
    latest = after
    for local in CronSim(cron, after.astimezone(zoneinfo.ZoneInfo(time_zone))):
        moment = local.astimezone(UTC)
        if moment > latest:
            latest = moment
            yield moment


def _first(moments: Iterator[datetime], count: int) -> Iterator[datetime]:
    for _, moment in zip(range(count), moments, strict=False):
        yield moment


def _bad(cron: str, why: str) -> Invalid:
    return Invalid(
        f"cron '{cron[:100]}' is not accepted: {why}. For instance '30 2 * * 1-5', half past two on working days.",
        param="cron",
        code="invalid_cron",
    )
