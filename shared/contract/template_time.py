"""The moment that a chat template may write. A job's rows are written with one moment, whenever they are read.

Without a zone, in UTC, as ISO 8601 writes it: a day, or a day and a time.
"""

from __future__ import annotations

from datetime import UTC, datetime
from typing import Annotated, Final

from pydantic import AfterValidator, StringConstraints

_FORM: Final = "%Y-%m-%dT%H:%M:%S"


def _that_there_is(written: str) -> str:
    datetime.fromisoformat(written)  # ValueError: no such day, hour or minute
    return written


TemplateTime = Annotated[
    str,
    StringConstraints(pattern=r"^[0-9]{4}-[0-9]{2}-[0-9]{2}(T[0-9]{2}:[0-9]{2}(:[0-9]{2})?)?$"),
    AfterValidator(_that_there_is),
]


def written_time(moment: datetime) -> str:
    """`moment`, which has a zone, to the second."""
    return moment.astimezone(UTC).strftime(_FORM)
