"""Bodies of the routes of schedules. Strict, like every body; the larger is in shared/contract."""

from __future__ import annotations

from typing import Final

from pydantic import Field

from shared.contract.part import Part
from shared.contract.schedule import CreateSchedule


class RunSchedule(Part):
    """A run by hand."""

    force: bool = Field(default=False, description="Also where nothing has changed.")


BODIES: Final = (CreateSchedule, RunSchedule)
