"""The way from data to adapter, merge and alias: a walk over rows, against the arrows and along them.

Each thing knows what it was made of: a job its files and its base, an adapter or a checkpoint its job, a merge or a
combination its adapters, an export or a push its model or merge, an alias what it names. Nothing is stored for this.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Collection, Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any, Final, Literal

from sqlalchemy import ColumnElement, or_, select
from sqlalchemy.orm import Session

from shared.errors import Conflict, NotFound
from shared.products import aliases
from shared.store.lifecycle import UNFINISHED
from shared.store.tables import (
    AdapterRow,
    AliasRow,
    AliasVersionRow,
    CheckpointRow,
    ExportRow,
    FileRow,
    JobRow,
    MergeRow,
)

Kind = Literal["file", "base_model", "job", "adapter", "checkpoint", "merge", "combination", "export", "push", "alias"]
Made = Literal["training_file", "validation_file", "base_model", "continued", "made"]
Relation = Literal[Made, "merged", "combined", "exported", "pushed", "named"]

MOST_NODES: Final = 1000


@dataclass(frozen=True, slots=True)
class LineageNode:
    """A thing of the project. `gone`: it has been deleted; its row remains."""

    id: str
    kind: Kind
    name: str
    gone: bool = False
    facts: dict[str, Any] = field(default_factory=dict, compare=False, hash=False)


@dataclass(frozen=True, slots=True)
class LineageEdge:
    """`source` went into `target`. `current`: of an alias, it names it now; anything else stays what it was made of."""

    source: str
    target: str
    relation: Relation
    current: bool = True


@dataclass(slots=True)
class Lineage:
    """The named node, its ancestors and its descendants."""

    start: LineageNode
    nodes: dict[str, LineageNode] = field(default_factory=dict)
    edges: list[LineageEdge] = field(default_factory=list)
    truncated: bool = False


Neighbour = tuple[LineageNode, LineageEdge]
Step = Callable[[Session, LineageNode, str], Iterator[Neighbour]]


def trace(session: Session, name: str, *, project_id: str) -> Lineage:
    """Everything before and after a file, job, model, merge, combination, export, push or alias. Raises NotFound."""
    start = _start(session, name, project_id)
    lineage = Lineage(start, {start.id: start})
    for step in (_made_of, _made_into):
        _walk(session, lineage, step, project_id=project_id)
    return lineage


def ancestors(session: Session, start: LineageNode, *, project_id: str) -> Iterable[LineageNode]:
    """All that a thing was made of."""
    lineage = Lineage(start, {start.id: start})
    _walk(session, lineage, _made_of, project_id=project_id)
    return lineage.nodes.values()


def _walk(session: Session, lineage: Lineage, step: Step, *, project_id: str) -> None:
    waiting, looked = deque([lineage.start]), {lineage.start.id}
    while waiting:
        for node, edge in step(session, waiting.popleft(), project_id):
            if node.id not in lineage.nodes and len(lineage.nodes) >= MOST_NODES:
                lineage.truncated = True
                return
            lineage.nodes.setdefault(node.id, node)
            lineage.edges.append(edge)
            if node.id not in looked:
                looked.add(node.id)
                waiting.append(node)


# --- what a row is ---------------------------------------------------------------------------------------------------


def _file(row: FileRow) -> LineageNode:
    facts = {"sha256": row.sha256, "bytes": row.bytes, "rows": (row.report or {}).get("rows")}
    return LineageNode(row.id, "file", row.filename, row.deleted_at is not None, facts)


def _job(row: JobRow) -> LineageNode:
    return LineageNode(row.id, "job", row.id, facts={"status": row.status, "metadata": row.job_metadata})


def _adapter(row: AdapterRow) -> LineageNode:
    return LineageNode(row.id, "adapter", row.name, row.deleted_at is not None)


def _checkpoint(row: CheckpointRow) -> LineageNode:
    return LineageNode(row.id, "checkpoint", row.name, facts={"step": row.step})


def _merge(row: MergeRow) -> LineageNode:
    kind: Kind = "merge" if row.kind == "merge" else "combination"
    return LineageNode(row.id, kind, row.id, row.deleted_at is not None, {"status": row.status})


def _export(row: ExportRow) -> LineageNode:
    """An export, or a push by the repository that it goes to."""
    if row.kind == "hub":
        repository = str(row.request["repository"])
        return LineageNode(row.id, "push", repository, row.deleted_at is not None, {"status": row.status})
    made = {"status": row.status, "format": row.kind, "quantization": row.request.get("quantization")}
    return LineageNode(row.id, "export", row.id, row.deleted_at is not None, made)


def _alias(row: AliasRow) -> LineageNode:
    return LineageNode(row.id, "alias", row.name, row.deleted_at is not None, {"version": row.version})


def _start(session: Session, name: str, project_id: str) -> LineageNode:
    node = _alias_named(session, name, project_id) if aliases.SIGN in name else _found(session, name, project_id)
    if node is None:
        raise NotFound(
            f"This project has no file, job, model, merge, export or alias '{name[:200]}', and had none.", param="name"
        )
    return node


def _alias_named(session: Session, name: str, project_id: str) -> LineageNode | None:
    row = aliases.standing(session, name, project_id=project_id)
    return None if row is None else _alias(row)


def _found(session: Session, name: str, project_id: str) -> LineageNode | None:
    """By id or `ft:` name, deleted or not."""
    if (file := session.get(FileRow, name)) is not None and file.project_id == project_id:
        return _file(file)
    if (job := session.get(JobRow, name)) is not None and job.project_id == project_id:
        return _job(job)
    if (merge := session.get(MergeRow, name)) is not None and merge.project_id == project_id:
        return _merge(merge)
    if (export := session.get(ExportRow, name)) is not None and export.project_id == project_id:
        return _export(export)
    return _tuned(session, name, project_id)


def _tuned(session: Session, name: str, project_id: str) -> LineageNode | None:
    """The adapter, checkpoint or combination with this id or name."""
    adapter = session.scalars(
        select(AdapterRow).where(
            or_(AdapterRow.name == name, AdapterRow.id == name), AdapterRow.project_id == project_id
        )
    ).one_or_none()
    if adapter is not None:
        return _adapter(adapter)
    checkpoint = session.scalars(
        select(CheckpointRow)
        .join(JobRow, JobRow.id == CheckpointRow.job_id)
        .where(or_(CheckpointRow.name == name, CheckpointRow.id == name), JobRow.project_id == project_id)
    ).one_or_none()
    if checkpoint is not None:
        return _checkpoint(checkpoint)
    merge = session.get(MergeRow, name)
    return _merge(merge) if merge is not None and merge.project_id == project_id else None


# --- against the arrows ----------------------------------------------------------------------------------------------


def _made_of(session: Session, node: LineageNode, project_id: str) -> Iterator[Neighbour]:
    match node.kind:
        case "job":
            yield from _inputs(session, session.get_one(JobRow, node.id))
        case "adapter":
            yield _of_job(session, session.get_one(AdapterRow, node.id).job_id, node)
        case "checkpoint":
            yield _of_job(session, session.get_one(CheckpointRow, node.id).job_id, node)
        case "merge" | "combination":
            relation: Relation = "merged" if node.kind == "merge" else "combined"
            for name in _sources(session.get_one(MergeRow, node.id).request):
                if (source := _tuned(session, name, project_id)) is not None:
                    yield source, LineageEdge(source.id, node.id, relation)
        case "export" | "push":
            request = session.get_one(ExportRow, node.id).request
            if (source := _found(session, str(request.get("adapter") or request["model"]), project_id)) is not None:
                yield source, LineageEdge(source.id, node.id, "pushed" if node.kind == "push" else "exported")
        case "alias":
            yield from _versions(session, node, project_id)
        case "file" | "base_model":
            return


def _inputs(session: Session, job: JobRow) -> Iterator[Neighbour]:
    named: tuple[tuple[Relation, str | None], ...] = (
        ("training_file", job.training_file),
        ("validation_file", job.validation_file),
    )
    for relation, file_id in named:
        if file_id is not None:
            yield _file(session.get_one(FileRow, file_id)), LineageEdge(file_id, job.id, relation)
    base = LineageNode(f"base_model:{job.base_model}", "base_model", job.base_model)
    yield base, LineageEdge(base.id, job.id, "base_model")
    if job.parent_id is not None and (parent := _tuned(session, job.parent_id, job.project_id)) is not None:
        yield parent, LineageEdge(parent.id, job.id, "continued")


def _of_job(session: Session, job_id: str, node: LineageNode) -> Neighbour:
    return _job(session.get_one(JobRow, job_id)), LineageEdge(job_id, node.id, "made")


def _sources(request: dict[str, Any]) -> list[str]:
    """The names of the adapters in the request of a merge or combination."""
    if "adapter" in request:
        return [str(request["adapter"])]
    return [str(part["adapter"]) for part in request.get("adapters", ())]


def _versions(session: Session, node: LineageNode, project_id: str) -> Iterator[Neighbour]:
    """Every model that an alias has named; each once, and `current` for the one that it names now."""
    row = session.get_one(AliasRow, node.id)
    named = dict.fromkeys(version.model_id for version in aliases.history(session, row))
    for model_id in named:
        if (model := _tuned(session, model_id, project_id)) is not None:
            yield model, LineageEdge(model.id, node.id, "named", current=model_id == row.model_id)


# --- along the arrows ------------------------------------------------------------------------------------------------


def _made_into(session: Session, node: LineageNode, project_id: str) -> Iterator[Neighbour]:
    match node.kind:
        case "file":
            yield from _jobs_on(session, node)
        case "job":
            for adapter in session.scalars(select(AdapterRow).where(AdapterRow.job_id == node.id)):
                yield _adapter(adapter), LineageEdge(node.id, adapter.id, "made")
            for step in session.scalars(select(CheckpointRow).where(CheckpointRow.job_id == node.id)):
                yield _checkpoint(step), LineageEdge(node.id, step.id, "made")
        case "adapter" | "checkpoint" | "combination":
            yield from _merges_of(session, node, project_id)
            yield from _exports_of(session, node, project_id)
            yield from _jobs_from(session, node, project_id)
            yield from _aliases_of(session, node, project_id)
        case "merge" | "export":
            yield from _exports_of(session, node, project_id)
        case "push" | "alias" | "base_model":
            return


def _jobs_on(session: Session, node: LineageNode) -> Iterator[Neighbour]:
    rows = session.scalars(
        select(JobRow)
        .where(or_(JobRow.training_file == node.id, JobRow.validation_file == node.id))
        .order_by(JobRow.id)
        .limit(MOST_NODES)
    )
    for job in rows:
        relation: Relation = "training_file" if job.training_file == node.id else "validation_file"
        yield _job(job), LineageEdge(node.id, job.id, relation)


def _merges_of(session: Session, node: LineageNode, project_id: str) -> Iterator[Neighbour]:
    named = _merges_naming({node.id, node.name})
    rows = session.scalars(select(MergeRow).where(MergeRow.project_id == project_id, named).limit(MOST_NODES))
    for row in rows:
        merge = _merge(row)
        yield merge, LineageEdge(node.id, merge.id, "merged" if row.kind == "merge" else "combined")


def _merges_naming(names: Collection[str]) -> ColumnElement[bool]:
    request = MergeRow.request
    return or_(
        *(request.contains({"adapter": name}) for name in names),
        *(request.contains({"adapters": [{"adapter": name}]}) for name in names),
    )


def _exports_of(session: Session, node: LineageNode, project_id: str) -> Iterator[Neighbour]:
    """What was exported of it, and pushed to a hub."""
    named = _exports_naming({node.id, node.name})
    rows = session.scalars(select(ExportRow).where(ExportRow.project_id == project_id, named).limit(MOST_NODES))
    for row in rows:
        export = _export(row)
        yield export, LineageEdge(node.id, export.id, "pushed" if export.kind == "push" else "exported")


def _exports_naming(names: Collection[str]) -> ColumnElement[bool]:
    return or_(
        *(ExportRow.request.contains({"adapter": name}) for name in names),
        *(ExportRow.request.contains({"model": name}) for name in names),
    )


def _jobs_from(session: Session, node: LineageNode, project_id: str) -> Iterator[Neighbour]:
    """Jobs that went on from this model."""
    rows = session.scalars(
        select(JobRow).where(JobRow.project_id == project_id, JobRow.parent_id == node.id).limit(MOST_NODES)
    )
    for job in rows:
        yield _job(job), LineageEdge(node.id, job.id, "continued")


def _aliases_of(session: Session, node: LineageNode, project_id: str) -> Iterator[Neighbour]:
    rows = session.scalars(
        select(AliasRow)
        .join(AliasVersionRow, AliasVersionRow.alias_id == AliasRow.id)
        .where(AliasRow.project_id == project_id, AliasVersionRow.model_id == node.id)
        .order_by(AliasRow.id)
        .distinct()
    )
    for row in rows:
        current = row.model_id == node.id and row.deleted_at is None
        yield _alias(row), LineageEdge(node.id, row.id, "named", current=current)


# --- what must stay --------------------------------------------------------------------------------------------------


def needing_aliases(session: Session, file_id: str, *, project_id: str) -> list[str]:
    """Names of the aliases whose model, now or after a rollback, was made of this file."""
    rows = session.scalars(
        select(AliasRow)
        .where(AliasRow.project_id == project_id, AliasRow.deleted_at.is_(None), AliasRow.model_id.is_not(None))
        .order_by(AliasRow.name)
    )
    return [row.name for row in rows if file_id in _stands_on(session, row, project_id)]


def refuse_needed_by_jobs(session: Session, model_id: str, *, name: str, project_id: str) -> None:
    """Raises Conflict if a job of the project that has not ended goes on from this model."""
    mine = (JobRow.parent_id == model_id, JobRow.project_id == project_id)
    job_id = session.scalars(
        select(JobRow.id).where(*mine, JobRow.status.in_(sorted(UNFINISHED))).order_by(JobRow.id).limit(1)
    ).one_or_none()
    if job_id is not None:
        raise Conflict(
            f"'{name}' is needed by the job {job_id}, which goes on from it. Cancel the job or wait for its end.",
            param="model",
            code="model_in_use_by_job",
        )


def refuse_needed_by_products(session: Session, *names: str, project_id: str) -> None:
    """Raises Conflict if a merge, combination, export or push that has not ended is made of the thing of these names.

    The first name is the one that is shown.
    """
    for kind, named in ((MergeRow, _merges_naming(names)), (ExportRow, _exports_naming(names))):
        needed = session.scalars(
            select(kind.id)
            .where(kind.project_id == project_id, kind.finished_at.is_(None), kind.deleted_at.is_(None), named)
            .order_by(kind.id)
            .limit(1)
        ).one_or_none()
        if needed is not None:
            raise Conflict(
                f"'{names[0]}' is needed by {needed}, which is made of it. Delete that or wait for its end.",
                param="model",
                code="model_in_use_by_product",
            )


def _stands_on(session: Session, row: AliasRow, project_id: str) -> set[str]:
    """Ids of all that an alias's model and the one behind it were made of."""
    models = [_tuned(session, model_id, project_id) for model_id in (row.model_id, row.fallback_id) if model_id]
    return {
        node.id for model in models if model is not None for node in ancestors(session, model, project_id=project_id)
    }
