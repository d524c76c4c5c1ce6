"""The view of a trainer's log."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from api.views.view import View
from shared.jobs.trainer_log import AttemptLog, LogState, LogText

_NOTES: dict[LogState, str | None] = {
    "live": None,
    "stored": None,
    "partial": "Only lines that were told while the attempt ran are known. Its worker hands the rest over when it works"
    " again; if its host is gone, the rest is lost.",
}


class JobLog(View):
    """A part of what the trainer of an attempt printed. Offsets count bytes of the whole log, secrets hidden."""

    object: Literal["tunepool.job.log"] = "tunepool.job.log"
    job_id: str
    attempt: int
    attempts: int = Field(description="How many the job has had by now.")
    state: LogState = Field(
        description="`live`: it runs. `stored`: all that is kept. `partial`: it has ended, and the rest is not here."
    )
    text: str
    start: int = Field(description="The offset of `text`.")
    next: int = Field(description="What follows is read with `after` of this value.")
    size: int = Field(description="How long the log is by now.")
    left_out: int = Field(description="So many bytes before `text` nobody has: of a long log beginning and end stay.")
    has_more: bool = Field(description="Whether more can be read now.")
    ended: bool = Field(description="Whether the attempt has ended.")
    job_ended: bool = Field(description="Whether no further attempt follows.")
    note: str | None = None


def job_log(job_id: str, log: AttemptLog, text: LogText) -> JobLog:
    return JobLog(
        job_id=job_id,
        attempt=log.number,
        attempts=log.attempts,
        state=log.state,
        text=text.text,
        start=text.start,
        next=text.next,
        size=text.size,
        left_out=text.left_out,
        has_more=text.next < text.size,
        ended=log.ended,
        job_ended=log.job_ended,
        note=_NOTES[log.state],
    )
