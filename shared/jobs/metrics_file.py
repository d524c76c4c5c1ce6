"""The metrics file of a job: one CSV line per step, over all its attempts."""

from __future__ import annotations

import csv
import io
from collections.abc import Collection, Iterable, Mapping
from datetime import datetime
from typing import Any, Final, NamedTuple, get_args

from sqlalchemy import select
from sqlalchemy.orm import Session

from shared.contract.spec import AnswerMeasure
from shared.store.tables import EventRow

COLUMNS: Final = ("step", "train_loss", "train_accuracy", "valid_loss", "valid_mean_token_accuracy")
ANSWER_COLUMNS: Final = tuple(f"valid_{measure}" for measure in get_args(AnswerMeasure))  # where answers were asked for
_COLUMN_OF: Final = {
    "train_loss": "train_loss",
    "train_mean_token_accuracy": "train_accuracy",
    "valid_loss": "valid_loss",
    "valid_mean_token_accuracy": "valid_mean_token_accuracy",
    **{name: name for name in ANSWER_COLUMNS},
}


def recorded_metrics(session: Session, job_id: str) -> list[dict[str, Any]]:
    """The figures of every metrics event that clients have seen, in order."""
    rows = session.scalars(
        select(EventRow.data).where(EventRow.job_id == job_id, EventRow.type == "metrics").order_by(EventRow.seq)
    )
    return [row for row in rows if row is not None]


class Figures(NamedTuple):
    """A metrics event, and when it was recorded."""

    at: datetime
    data: dict[str, Any]


def metrics_history(session: Session, job_ids: Collection[str]) -> dict[str, list[Figures]]:
    """Every metrics event of each job, oldest first, by one query."""
    history: dict[str, list[Figures]] = {job_id: [] for job_id in job_ids}
    rows = session.execute(
        select(EventRow.job_id, EventRow.created_at, EventRow.data)
        .where(EventRow.job_id.in_(job_ids), EventRow.type == "metrics", EventRow.data.is_not(None))
        .order_by(EventRow.job_id, EventRow.seq)
    )
    for job_id, at, data in rows:
        history[job_id].append(Figures(at, data))
    return history


def metrics_csv(figures: Iterable[Mapping[str, Any]]) -> str:
    """CSV of `COLUMNS`, and of `ANSWER_COLUMNS` that have figures, by step.

    Of two figures for one step the later wins, as a resumed attempt repeats some.
    """
    table: dict[int, dict[str, Any]] = {}
    for figure in figures:
        line = table.setdefault(int(figure["step"]), {})
        line |= {column: figure[name] for name, column in _COLUMN_OF.items() if figure.get(name) is not None}
    text = io.StringIO()
    answered = [name for name in ANSWER_COLUMNS if any(name in line for line in table.values())]
    writer = csv.DictWriter(text, [*COLUMNS, *answered], restval="", lineterminator="\n")
    writer.writeheader()
    for step in sorted(table):
        writer.writerow({"step": step, **table[step]})
    return text.getvalue()
