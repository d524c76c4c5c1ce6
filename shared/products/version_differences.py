"""What two versions of an alias have differently: model, data, settled spec, and the figures of their gates."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from sqlalchemy import select
from sqlalchemy.orm import Session, aliased

from shared.store.tables import AliasVersionRow, FileRow, JobRow


def differences(session: Session, first: AliasVersionRow, second: AliasVersionRow) -> list[dict[str, Any]]:
    """`{"field", "first", "second"}` for each field that differs; null: not there."""
    sides = [dict(_flat(_facts(session, version))) for version in (first, second)]
    fields = sorted(sides[0].keys() | sides[1].keys())
    pairs = ((name, sides[0].get(name), sides[1].get(name)) for name in fields)
    return [{"field": name, "first": first, "second": other} for name, first, other in pairs if first != other]


def _facts(session: Session, version: AliasVersionRow) -> dict[str, Any]:
    figures = {
        name: figure["mean"]
        for stated in (version.gate or {}).get("assertions", [])
        for name, figure in stated["figures"].items()
    }
    facts: dict[str, Any] = {"model": version.model, "base_model": version.base_model, "measures": figures}
    return facts if version.job_id is None else {**facts, **_facts_of_job(session, version.job_id)}


def _facts_of_job(session: Session, job_id: str) -> dict[str, Any]:
    training, validation = aliased(FileRow), aliased(FileRow)
    job, trained_on, validated_on = session.execute(
        select(JobRow, training.sha256, validation.sha256)
        .join(training, training.id == JobRow.training_file)
        .outerjoin(validation, validation.id == JobRow.validation_file)
        .where(JobRow.id == job_id)
    ).one()
    return {
        "data": {"training_sha256": trained_on, "validation_sha256": validated_on},
        "spec": job.spec,
        "device_seconds": job.device_seconds,
        "trained_tokens": job.trained_tokens,
    }


def _flat(value: Any, path: str = "") -> Iterator[tuple[str, Any]]:
    if isinstance(value, dict):
        for name, inner in value.items():
            yield from _flat(inner, f"{path}.{name}" if path else name)
    else:
        yield path, value
