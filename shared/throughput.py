"""How long a job will take, from what jobs on the same base model have measured."""

from __future__ import annotations

import math
from statistics import median
from typing import Final

from sqlalchemy import select
from sqlalchemy.orm import Session

from shared.spec import JobSpec
from shared.tables import JobRow

# Enough to see past one odd job; the nearest in size count, because a short job is mostly loading of the base model.
REMEMBERED: Final = 50
NEAREST: Final = 5


def expected_seconds(session: Session, spec: JobSpec) -> float | None:
    """Seconds that a job will hold its devices; None while nothing comparable has ended.

    The median rate (device-seconds per character trained) of the jobs nearest in size, of the same method
    where there are any, else of the same base model.
    """
    ended = session.execute(
        select(JobRow.spec, JobRow.device_seconds)
        .where(JobRow.base_model == spec.base_model.name, JobRow.status == "succeeded", JobRow.device_seconds > 0)
        .order_by(JobRow.finished_at.desc())
        .limit(REMEMBERED)
    ).all()
    known = [
        (JobSpec.model_validate(document, extra="ignore"), seconds)  # a newer version's, maybe
        for document, seconds in ended
        if document is not None
    ]
    alike = [one for one in known if one[0].adapter.method == spec.adapter.method] or known
    if not alike:
        return None
    wanted = characters(spec)
    nearest = sorted(alike, key=lambda one: abs(math.log(characters(one[0]) / wanted)))[:NEAREST]
    rate = median(device_seconds / characters(one) for one, device_seconds in nearest)
    return float(rate * wanted) / (spec.placement.gpus * spec.placement.nodes)


def characters(spec: JobSpec) -> float:
    """Characters that a job trains on, over all its passes; at least one."""
    training, data = spec.training, spec.data
    rows = data.train_rows * training.num_train_epochs
    if training.max_steps is not None:
        rows = min(rows, training.max_steps * training.batch_size)
    return max(1.0, rows * max(1.0, data.mean_characters))
