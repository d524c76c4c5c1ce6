"""Holds a model against a gate: whose figures they are, and what the gate calls them."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from sqlalchemy import select
from sqlalchemy.orm import Session

from shared.contract.gate import BadGate, judge, read_report
from shared.contract.gate_file import read_gate
from shared.errors import Conflict, Invalid, NotFound
from shared.products.adapters import PublishedAdapter
from shared.store.tables import EvaluationRow, JobRow


@dataclass(frozen=True, slots=True)
class GateWish:
    """A gate's text, and the figures to hold against it: an evaluation of ours by id, or a report as it stands.

    Args:
        roles: what the gate calls subjects. `candidate`, `base` and the stages of aliases are known without.
    """

    text: str
    evaluation: str | None = None
    report: dict[str, Any] | None = None
    roles: dict[str, str] = field(default_factory=dict)


def weigh(session: Session, wish: GateWish, model: PublishedAdapter, *, asked: str, project_id: str) -> dict[str, Any]:
    """The result as a document, with its evidence: `{"status", "assertions", …, "evaluation"}`.

    Args:
        asked: the name by which the caller calls `model`.

    Raises:
        Invalid: the gate cannot be read, or the figures are none of this model's.
        NotFound, Conflict: the evaluation is not there, or has not succeeded.
    """
    report = wish.report if wish.evaluation is None else _report_of(session, wish.evaluation, project_id=project_id)
    if not isinstance(report, dict) or not isinstance(report.get("subjects"), dict):
        raise Invalid("A gate needs 'evaluation', or 'report' with the subjects of one.", param="gate.evaluation")
    roles = _roles(wish, model, asked, set(report["subjects"]))
    try:
        gate = read_gate(wish.text.encode())
        result = judge(gate, read_report(report, roles=roles, facts={"candidate": _facts(session, model)}))
    except BadGate as error:
        place = "" if error.line is None else f"Line {error.line}, column {error.column}: "
        raise Invalid(f"{place}{error.message}", param="gate.text", code="invalid_gate") from None
    return {**result.document(), "evaluation": wish.evaluation, "roles": roles}


def _report_of(session: Session, evaluation_id: str, *, project_id: str) -> dict[str, Any]:
    row = session.scalars(
        select(EvaluationRow).where(
            EvaluationRow.id == evaluation_id,
            EvaluationRow.project_id == project_id,
            EvaluationRow.deleted_at.is_(None),
        )
    ).one_or_none()
    if row is None:
        raise NotFound(f"No evaluation '{evaluation_id[:100]}' in this project.", param="gate.evaluation")
    if row.report is None:
        raise Conflict(
            f"Evaluation {row.id} is '{row.status}'; a gate needs one that has succeeded.", param="gate.evaluation"
        )
    return row.report


def _roles(wish: GateWish, model: PublishedAdapter, asked: str, subjects: set[str]) -> dict[str, str]:
    names = {asked, model.name, model.id}
    candidate = wish.roles.get("candidate") or next((name for name in sorted(names) if name in subjects), None)
    if candidate not in names:
        raise Invalid(
            f"The figures have no subject '{model.name}', so they say nothing of it; they are of: "
            f"{', '.join(sorted(subjects))[:1000]}.",
            param="gate",
            code="gate_of_another_model",
        )
    known = {model.base_model: "base"} | {name: name.partition("@")[2] for name in sorted(subjects) if "@" in name}
    roles = {role: name for name, role in known.items() if name in subjects and role not in subjects}
    return {**roles, **wish.roles, "candidate": candidate}


def _facts(session: Session, model: PublishedAdapter) -> dict[str, float]:
    facts = {"size_bytes": float(sum(file.bytes for file in model.files))}
    if model.job_id is not None:
        facts["device_seconds"] = session.scalars(select(JobRow.device_seconds).where(JobRow.id == model.job_id)).one()
    return facts
