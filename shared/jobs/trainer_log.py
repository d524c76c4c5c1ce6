"""The trainer's log of an attempt: its newest lines in Postgres while it runs, the whole of it in the store afterwards.

Lines told live stay where nobody hands over the whole log: then they are all that is known of it. They are bounded.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final, Literal

from sqlalchemy import delete, select, text, update
from sqlalchemy.orm import Session

from shared.contract.documents import StoredLog
from shared.errors import NotFound
from shared.store.json_text import held_text
from shared.store.tables import AttemptRow, JobRow, LogPieceRow

# Of an attempt so much stays in Postgres: its beginning, and its newest lines.
LIVE_HEAD_BYTES: Final = 32 * 1024
LIVE_TAIL_BYTES: Final = 128 * 1024

# live: it runs, and the newest lines are here. stored: the store has it. partial: it has ended, and only the lines are
# known that were told while it ran; its worker hands the rest over when it starts again, if ever.
LogState = Literal["live", "stored", "partial"]


@dataclass(frozen=True, slots=True)
class AttemptLog:
    """Where the log of an attempt is. `job_ended`: no further attempt follows."""

    number: int
    attempts: int
    fence: int
    ended: bool
    job_ended: bool
    stored: StoredLog | None

    @property
    def state(self) -> LogState:
        if self.stored is not None:
            return "stored"
        return "partial" if self.ended else "live"


@dataclass(frozen=True, slots=True)
class LogText:
    """A part of a log: `start` and `next` are offsets in bytes; `left_out` bytes before `start` nobody has."""

    text: str
    start: int
    next: int
    size: int
    left_out: int


# Of an attempt that there is, whoever has its lease: the fence is its own, and nobody else writes under it.
_TELL: Final = text("""
    insert into log_pieces (job_id, fence, start, text)
    select :job_id, :fence, :start, :text
    where exists (select from attempts where job_id = :job_id and fence = :fence and log is null)
    on conflict do nothing
""")


def tell(session: Session, job_id: str, fence: int, *, start: int, lines: str, size: int) -> None:
    """Keep new lines, from offset `start` of a log of `size` bytes by now; older ones between head and tail go."""
    values = {"job_id": job_id, "fence": fence, "start": start, "text": held_text(lines)}
    session.execute(_TELL, values)
    session.execute(
        delete(LogPieceRow).where(
            LogPieceRow.job_id == job_id,
            LogPieceRow.fence == fence,
            LogPieceRow.start >= LIVE_HEAD_BYTES,
            LogPieceRow.start < size - LIVE_TAIL_BYTES,
        )
    )


def owner(session: Session, job_id: str, fence: int) -> str | None:
    """The project of an attempt whose log is not in the store yet; None: there is none, or its log is there."""
    return session.scalars(
        select(JobRow.project_id)
        .join(AttemptRow, AttemptRow.job_id == JobRow.id)
        .where(JobRow.id == job_id, AttemptRow.fence == fence, AttemptRow.log.is_(None))
    ).one_or_none()


def store(session: Session, job_id: str, fence: int, log: StoredLog) -> bool:
    """Note that the store has the whole log; the live lines are deleted. False: it was there already."""
    noted = session.scalars(
        update(AttemptRow)
        .where(AttemptRow.job_id == job_id, AttemptRow.fence == fence, AttemptRow.log.is_(None))
        .values(log=log.document())
        .returning(AttemptRow.number)
    ).one_or_none()
    if noted is not None:
        session.execute(delete(LogPieceRow).where(LogPieceRow.job_id == job_id, LogPieceRow.fence == fence))
    return noted is not None


def of_attempt(session: Session, job: JobRow, *, number: int | None = None) -> AttemptLog:
    """The log of an attempt, by default of the newest. Raises NotFound."""
    query = select(AttemptRow).where(AttemptRow.job_id == job.id).order_by(AttemptRow.number.desc()).limit(1)
    if number is not None:
        query = query.where(AttemptRow.number == number)
    row = session.scalars(query).one_or_none()
    if row is None:
        have = f"it has had {job.attempts}" if job.attempts else "none has begun yet"
        asked = "" if number is None else f" {number}"
        raise NotFound(f"Job {job.id} has no attempt{asked}: {have}.", param="attempt", code="attempt_not_found")
    return AttemptLog(
        number=row.number,
        attempts=job.attempts,
        fence=row.fence,
        ended=row.ended_at is not None,
        job_ended=job.finished_at is not None,
        stored=None if row.log is None else StoredLog.read(row.log),
    )


def pieces(session: Session, job_id: str, fence: int) -> list[tuple[int, bytes]]:
    """(offset, UTF-8) of the live lines, in order."""
    rows = session.execute(
        select(LogPieceRow.start, LogPieceRow.text)
        .where(LogPieceRow.job_id == job_id, LogPieceRow.fence == fence)
        .order_by(LogPieceRow.start)
    )
    return [(row.start, row.text.encode()) for row in rows]


def parts_of(stored: StoredLog, content: bytes) -> list[tuple[int, bytes]]:
    """(offset, UTF-8) of the parts of a stored log. Pure."""
    parts = [(0, content[: stored.head_bytes])]
    if stored.tail_from < stored.size:
        parts.append((stored.tail_from, content[stored.tail_at :]))
    return parts


def cut(parts: Sequence[tuple[int, bytes]], *, after: int, limit: int) -> LogText:
    """What follows offset `after`: at most `limit` bytes, whole lines where they fit, never across a gap. Pure.

    `parts`: (offset, UTF-8), in order, apart or touching.
    """
    size = max((start + len(data) for start, data in parts), default=0)
    start: int | None = None
    taken = b""
    for at, data in parts:
        if at + len(data) <= after or not data:
            continue
        begin = max(at, after)
        if start is None:
            start = begin
        elif begin != start + len(taken):
            break
        taken += data[begin - at :][: limit - len(taken)]
        if len(taken) >= limit:
            break
    if start is None:
        return LogText("", min(after, size), min(after, size), size, 0)
    whole = _whole_lines(taken) if len(taken) >= limit else taken
    return LogText(whole.decode("utf-8", "replace"), start, start + len(whole), size, start - after)


def last(parts: Sequence[tuple[int, bytes]], *, limit: int) -> LogText:
    """The last `limit` bytes, from the beginning of a line on. Pure."""
    size = max((start + len(data) for start, data in parts), default=0)
    after = max(0, size - limit)
    text = cut(parts, after=after, limit=limit)
    if after == 0 or text.left_out:
        return text
    rest = text.text.partition("\n")[2]
    return LogText(rest, text.next - len(rest.encode()), text.next, size, 0)


def joined(parts: Sequence[tuple[int, bytes]]) -> str:
    """Everything that is known of a log, with a line for each gap. Pure."""
    texts: list[str] = []
    at = 0
    for start, data in parts:
        if start > at:
            texts.append(f"… [{start - at:,} bytes of this log are left out here] …\n")
        texts.append(data.decode("utf-8", "replace"))
        at = start + len(data)
    return "".join(texts)


def _whole_lines(data: bytes) -> bytes:
    end = data.rfind(b"\n") + 1
    return data[:end] if end else data[: _character_end(data)]


def _character_end(data: bytes) -> int:
    """Where the last whole character of cut UTF-8 ends."""
    for back in range(1, min(4, len(data)) + 1):
        byte = data[-back]
        if byte >= 0xC0:
            needs = 2 if byte < 0xE0 else 3 if byte < 0xF0 else 4
            return len(data) if needs <= back else len(data) - back
        if byte < 0x80:
            break
    return len(data)
