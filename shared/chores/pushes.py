"""Verbs of pushes: the files of a model on their way to a hub. A push is an export (`exports.py`) of the kind `hub`."""

from __future__ import annotations

from dataclasses import dataclass

from sqlalchemy import func, select
from sqlalchemy.orm import Session

from shared.chores import exports, merges
from shared.chores.exports import EXPORT, MAX_UNFINISHED, PushClaim
from shared.contract.merge_request import CreatePush
from shared.errors import Invalid, LimitReached
from shared.ids import new_id
from shared.products import adapters
from shared.products.adapters import StoredFile
from shared.settings import Settings
from shared.store.locks import one_at_a_time
from shared.store.tables import ExportRow, MergeRow
from shared.tenants import project_secrets
from shared.tenants.project_secrets import HF_TOKEN


@dataclass(frozen=True, slots=True)
class Load:
    """What a push brings to the hub, and the project's token, encrypted."""

    files: tuple[StoredFile, ...]
    sealed: str


def submit(session: Session, request: CreatePush, *, project_id: str, settings: Settings) -> ExportRow:
    """Accept a push. Raises Invalid, NotFound, LimitReached."""
    if not settings.push_url:
        raise Invalid(
            "This installation pushes to no hub. An administrator names one: TUNEPOOL_PUSH_URL=https://huggingface.co.",
            code="push_not_offered",
        )
    one_at_a_time(session, f"exports:{project_id}")
    _sealed(session, project_id)
    waiting = session.scalar(select(func.count()).where(ExportRow.project_id == project_id, EXPORT.open))
    if (waiting or 0) >= MAX_UNFINISHED:
        raise LimitReached(
            f"This project already has {waiting} unfinished exports, as many as it may.", code="too_many_exports"
        )
    name, base_model, spec = _named(session, request.model, project_id)
    row = ExportRow(
        id=new_id("export_"),
        project_id=project_id,
        kind="hub",
        status="queued",
        request=request.model_copy(update={"model": name}).model_dump(mode="json"),
        base_model=base_model,
        spec=spec,
    )
    session.add(row)
    session.flush()
    session.refresh(row)
    return row


def load(session: Session, claim: PushClaim) -> Load:
    """What a claim brings, looked up again: it may be gone meanwhile. Raises NotFound, Invalid."""
    name, project_id = claim.request.model, claim.project_id
    row = _product(session, name, project_id)
    files = (
        adapters.find_published(session, name, project_id=project_id).files
        if row is None
        else adapters.stored_files(row.manifest or {})
    )
    return Load(files=files, sealed=_sealed(session, project_id))


def _named(session: Session, name: str, project_id: str) -> tuple[str, str, dict[str, object]]:
    """Its own name (an alias may move), its base, and its spec."""
    row = _product(session, name, project_id)
    if row is not None:
        return row.id, row.base_model, row.spec
    source = adapters.find_source(session, name, project_id=project_id)
    return source.adapter.name, source.spec.base_model.name, source.spec.model_dump(mode="json")


def _product(session: Session, name: str, project_id: str) -> MergeRow | ExportRow | None:
    """The merge or export of that id; None: it is no such id. Raises NotFound; Invalid while it has no files."""
    row: MergeRow | ExportRow
    if name.startswith("merge_"):
        row = merges.find(session, name, project_id=project_id)
    elif name.startswith("export_"):
        row = exports.find(session, name, project_id=project_id)
    else:
        return None
    if row.status != "succeeded" or row.kind == "hub":
        raise Invalid(f"'{name}' has no files: wait until it has succeeded, or name a model.", param="model")
    return row


def _sealed(session: Session, project_id: str) -> str:
    """Raises Invalid: the project has no token."""
    sealed = project_secrets.sealed(session, project_id=project_id).get(HF_TOKEN)
    if sealed is None:
        raise Invalid(
            f"This project has no secret {HF_TOKEN}. Store a token of the hub that may write with"
            f" `tunepool secrets set {HF_TOKEN}` (PUT /v1/tunepool/secrets/{HF_TOKEN}).",
            param="repository",
            code="secret_missing",
        )
    return sealed
