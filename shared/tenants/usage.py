"""Usage in device-seconds, from leases. Each attempt records who held how many devices, from when to when."""

from __future__ import annotations

import csv
import io
import unicodedata
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, fields
from datetime import datetime
from typing import Any, Final

from sqlalchemy import ColumnElement, Select, func, select
from sqlalchemy.orm import Session

from shared.errors import Invalid
from shared.store.tables import AttemptRow, JobRow, ProjectRow

DIMENSIONS: Final = ("project", "key", "model")
LABEL: Final = "label:"
_FORMULA: Final = ("=", "+", "-", "@")
MAX_DIMENSIONS: Final = 4
# The month of a budget is a calendar month in UTC.
MONTH_START: Final = func.date_trunc("month", func.now(), "UTC")
# What an attempt is charged for at each moment of it: its devices, or its share of one that it has with others.
_HELD_DEVICES: Final = func.jsonb_array_length(AttemptRow.device_ids) * func.coalesce(AttemptRow.device_share, 1.0)
_HELD_THIS_MONTH: Final = _HELD_DEVICES * func.extract(
    "epoch", func.coalesce(AttemptRow.ended_at, func.now()) - func.greatest(AttemptRow.started_at, MONTH_START)
)


@dataclass(frozen=True, slots=True)
class UsageSum:
    """The usage of one group of leases. None: a dimension outside `group_by`, or a label that a job lacks."""

    project: str | None
    key: str | None
    model: str | None
    labels: dict[str, str | None]
    device_seconds: float
    attempts: int
    jobs: int


def report(
    session: Session, *, since: datetime, until: datetime, group_by: Sequence[str], project_id: str | None
) -> list[UsageSum]:
    """Device-seconds held between two moments, largest first. A lease counts only with its part inside.

    Args:
        group_by: of `project`, `key`, `model` and `label:NAME` (the job's metadata); none: one sum.
        project_id: None: all projects.

    Raises:
        Invalid: an unknown dimension, or an empty span of time.
    """
    columns = {name: _dimension(name) for name in _checked(group_by)}
    if since >= until:
        raise Invalid("'from' must be before 'to'.", param="from")
    query = _leases(since, until).add_columns(*(column.label(name) for name, column in columns.items()))
    query = query.group_by(*columns.values()) if columns else query
    if project_id is not None:
        query = query.where(JobRow.project_id == project_id)
    used = [_used(row._mapping, columns) for row in session.execute(query)]
    return sorted((group for group in used if group.attempts), key=lambda group: (-group.device_seconds, repr(group)))


def _checked(group_by: Sequence[str]) -> list[str]:
    wanted = list(dict.fromkeys(group_by))
    for name in wanted:
        if name not in DIMENSIONS and not (name.startswith(LABEL) and 0 < len(name.removeprefix(LABEL)) <= 64):
            known = ", ".join(DIMENSIONS)
            raise Invalid(
                f"Unknown group '{name[:100]}'. Use {known}, or label:NAME of a metadata key.", param="group_by"
            )
    if len(wanted) > MAX_DIMENSIONS:
        raise Invalid(f"At most {MAX_DIMENSIONS} groups, not {len(wanted)}.", param="group_by")
    return wanted


def _dimension(name: str) -> ColumnElement[Any]:
    columns: dict[str, ColumnElement[Any]] = {
        "project": JobRow.project_id.expression,
        "key": JobRow.key_id.expression,
        "model": JobRow.base_model.expression,
    }
    label: ColumnElement[Any] = JobRow.job_metadata[name.removeprefix(LABEL)].as_string()
    return columns.get(name, label)


def _leases(since: datetime, until: datetime) -> Select[*tuple[Any, ...]]:
    ended = func.coalesce(AttemptRow.ended_at, func.now())
    held = func.extract("epoch", func.least(ended, until) - func.greatest(AttemptRow.started_at, since))
    return (
        select(
            func.coalesce(func.sum(held * _HELD_DEVICES), 0.0).label("device_seconds"),
            func.count().label("attempts"),
            func.count(JobRow.id.distinct()).label("jobs"),
        )
        .join(JobRow, JobRow.id == AttemptRow.job_id)
        .where(AttemptRow.started_at < until, (AttemptRow.ended_at > since) | AttemptRow.ended_at.is_(None))
    )


def _used(row: Any, columns: Iterable[str]) -> UsageSum:
    return UsageSum(
        project=row.get("project"),
        key=row.get("key"),
        model=row.get("model"),
        labels={name.removeprefix(LABEL): row[name] for name in columns if name.startswith(LABEL)},
        device_seconds=round(float(row["device_seconds"]), 3),
        attempts=row["attempts"],
        jobs=row["jobs"],
    )


def as_csv(used: Sequence[UsageSum], group_by: Sequence[str]) -> str:
    """One line per group, with a heading; the groups asked for come first."""
    text = io.StringIO()
    figures = [field.name for field in fields(UsageSum) if field.name not in (*DIMENSIONS, "labels")]
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow([*group_by, *figures])
    for group in used:
        named = [group.labels[n.removeprefix(LABEL)] if n.startswith(LABEL) else getattr(group, n) for n in group_by]
        writer.writerow([*(_inert(name) for name in named), *(getattr(group, figure) for figure in figures)])
    return text.getvalue()


def _inert(cell: str | None) -> str:
    """A label is a user's text: none may be a formula where the file is opened as a table (OWASP, CSV injection).

    Tables drop blanks in front, and read full-width signs as the plain ones.
    """
    text = cell or ""
    first = unicodedata.normalize("NFKC", text.lstrip()[:1])
    return f"'{text}" if first in _FORMULA or text.startswith(("\t", "\r", "\n")) else text


def this_month(session: Session, project_ids: Iterable[str]) -> dict[str, float]:
    """Device-seconds of each project in this calendar month (UTC); a running lease counts at least its charge."""
    owed = func.greatest(_HELD_THIS_MONTH, JobRow.charged_seconds)  # charged is 0 once the lease has ended
    sums = session.execute(
        select(JobRow.project_id, func.sum(owed))
        .join(AttemptRow, AttemptRow.job_id == JobRow.id)
        .where(
            JobRow.project_id.in_(list(project_ids)),
            (AttemptRow.ended_at > MONTH_START) | AttemptRow.ended_at.is_(None),
        )
        .group_by(JobRow.project_id)
    )
    return {project_id: float(seconds) for project_id, seconds in sums}


def reserved(session: Session, project_ids: Iterable[str]) -> dict[str, float]:
    """The part of `this_month` that running leases are charged for and have not held yet."""
    sums = session.execute(
        select(JobRow.project_id, func.sum(func.greatest(JobRow.charged_seconds - _HELD_THIS_MONTH, 0.0)))
        .join(AttemptRow, AttemptRow.job_id == JobRow.id)
        .where(JobRow.project_id.in_(list(project_ids)), AttemptRow.ended_at.is_(None))
        .group_by(JobRow.project_id)
    )
    return {project_id: float(seconds) for project_id, seconds in sums}


def soft_limit_warning(session: Session, project_id: str) -> str | None:
    """A sentence for a project that has passed its soft limit of this month; None below it."""
    project = session.get_one(ProjectRow, project_id)
    soft, hard = project.budget_soft_device_seconds, project.budget_device_seconds
    if soft is None:
        return None
    used = this_month(session, [project_id]).get(project_id, 0.0)
    if used < soft:
        return None
    end = "there is no hard limit" if hard is None else f"at {hard / 3600:,.1f} jobs wait for the next month"
    return (
        f"Project '{project.name}' has used {used / 3600:,.1f} device-hours of its soft limit of {soft / 3600:,.1f} "
        f"this month; {end}."
    )
