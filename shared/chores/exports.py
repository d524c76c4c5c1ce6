"""Verbs of exports: tuned models as files for other servers, made on the CPU lane, under a lease (shared/lease)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final, Unpack

from pydantic import ValidationError
from sqlalchemy import func, select, update
from sqlalchemy.orm import Session

from shared.chores.merges import MergeClaim
from shared.chores.product_records import ProductRecords, kind_of
from shared.contract.gguf_formats import ARCHITECTURES, LORA_QUANTIZATIONS
from shared.contract.merge_request import CreateExport, CreatePush
from shared.contract.methods import METHODS
from shared.contract.spec import JobSpec
from shared.errors import Invalid, LimitReached, NotFound
from shared.ids import new_id
from shared.lease import turns
from shared.lease.turns import Claiming, Work
from shared.lease.values import Lease, WrittenByNewerVersion
from shared.products import adapters, lineage
from shared.products.adapters import Source, StoredFile
from shared.products.servability import untaken
from shared.store import layout, paging
from shared.store.locks import one_at_a_time
from shared.store.tables import ExportRow

# A project's unfinished exports: each may be as large as its base model.
MAX_UNFINISHED: Final = 20


@dataclass(frozen=True, slots=True)
class PushClaim:
    """The right to bring files to a hub (`pushes.py`)."""

    lease: Lease
    project_id: str
    request: CreatePush


EXPORT: Final = kind_of("export", ExportRow)
RECORDS: Final = ProductRecords(EXPORT, layout.export_attempt_prefix)
WORK: Final = Work(EXPORT, long=True)


def submit(session: Session, request: CreateExport, *, project_id: str) -> ExportRow:
    """Accept an export. Raises Invalid, NotFound, LimitReached."""
    one_at_a_time(session, f"exports:{project_id}")
    source = adapters.find_source(session, request.adapter, project_id=project_id)
    check(request, source)
    waiting = session.scalar(select(func.count()).where(ExportRow.project_id == project_id, EXPORT.open))
    if (waiting or 0) >= MAX_UNFINISHED:
        raise LimitReached(
            f"This project already has {waiting} unfinished exports, as many as it may. Wait for some to finish, or "
            "delete some.",
            code="too_many_exports",
        )
    # By the name of what an alias names now, and with what is settled: it is made later.
    settled = request.model_copy(update={"adapter": source.adapter.name, "quantization": request.settled})
    row = ExportRow(
        id=new_id("export_"),
        project_id=project_id,
        kind=request.format,
        status="queued",
        request=settled.model_dump(mode="json"),
        base_model=source.spec.base_model.name,
        spec=source.spec.model_dump(mode="json"),
    )
    session.add(row)
    session.flush()
    session.refresh(row)
    return row


def check(request: CreateExport, source: Source) -> None:
    """Refuse what would end in a wrong file or in none. Pure. Raises Invalid naming what, and the remedy."""
    architecture = source.spec.base_model.facts.architecture
    if architecture not in ARCHITECTURES:
        raise Invalid(
            f"Models of {architecture} are not exported as GGUF; {', '.join(ARCHITECTURES)} are. Merge it (POST "
            "/v1/tunepool/merges) and convert it with llama.cpp's convert_hf_to_gguf.py, which knows more.",
            param="adapter",
            code="architecture_not_exported",
        )
    if request.format == "gguf":
        _check_whole(request, source)
    else:
        _check_alone(request, source)


def _check_whole(request: CreateExport, source: Source) -> None:
    name, method = source.adapter.name, METHODS[source.spec.adapter.method]
    if request.onto is not None and not method.adapter:
        raise Invalid(f"'{name}' is a whole model already, it is merged into nothing; leave onto out.", param="onto")
    if request.onto == "dequantized" and not method.quantized:
        raise Invalid(
            f"'{name}' was trained by {source.spec.adapter.method} on the unquantised base; merge it onto 'base'.",
            param="onto",
            code="unsupported_combination",
        )
    if request.onto is None and method.quantized:
        raise Invalid(
            f"'{name}' was trained on 4-bit weights: say whether it is merged onto the 'base' as published, or onto "
            "'dequantized', the weights that it was trained on. The two models differ.",
            param="onto",
            code="missing_required_parameter",
        )


def _check_alone(request: CreateExport, source: Source) -> None:
    name, adapter = source.adapter.name, source.spec.adapter
    if not METHODS[adapter.method].adapter:
        raise Invalid(
            f"'{name}' is a full fine-tune, there is no adapter: ask for format gguf.",
            param="format",
            code="not_an_adapter",
        )
    if traits := untaken(adapter, "llama_cpp"):
        raise Invalid(
            f"llama.cpp does not take {', '.join(traits)} in an adapter. Ask for format gguf, the merged model.",
            param="format",
            code="adapter_not_exported",
        )
    if request.settled not in LORA_QUANTIZATIONS:
        kinds = ", ".join(sorted(LORA_QUANTIZATIONS))
        raise Invalid(f"An adapter is kept as one of {kinds}: its matrices are too narrow.", param="quantization")
    if request.onto is not None:
        raise Invalid("An adapter alone is merged into nothing; leave onto out.", param="onto")


# --- what users see --------------------------------------------------------------------------------------------------


def find(session: Session, export_id: str, *, project_id: str) -> ExportRow:
    """Raises NotFound."""
    row = session.scalars(
        select(ExportRow).where(
            ExportRow.id == export_id, ExportRow.project_id == project_id, ExportRow.deleted_at.is_(None)
        )
    ).one_or_none()
    if row is None:
        raise NotFound(f"No export '{export_id[:100]}' in this project.", param="export_id")
    return row


def page(session: Session, *, project_id: str, after: str | None, limit: int) -> tuple[Sequence[ExportRow], bool]:
    """Exports of a project, newest first, and whether more follow."""
    query = select(ExportRow).where(ExportRow.deleted_at.is_(None))
    mine = ExportRow.project_id == project_id
    return paging.page(session, query, ExportRow.id, mine, after=after, limit=limit, what="export")


def of_model(session: Session, name: str, *, project_id: str, limit: int) -> Sequence[ExportRow]:
    """Exports and pushes of a tuned model and of its checkpoints, newest first."""
    made_of = func.coalesce(ExportRow.request["adapter"].astext, ExportRow.request["model"].astext)
    query = select(ExportRow).where(
        ExportRow.project_id == project_id,
        ExportRow.deleted_at.is_(None),
        (made_of == name) | made_of.startswith(f"{name}:ckpt-step-", autoescape=True),
    )
    return session.scalars(query.order_by(ExportRow.id.desc()).limit(limit)).all()


def product(row: ExportRow) -> tuple[StoredFile, ...]:
    """The files of a finished export; none before, and none of a push: they are on the hub."""
    return () if row.kind == "hub" else adapters.stored_files(row.manifest or {})


def delete(session: Session, export_id: str, *, project_id: str) -> ExportRow:
    """Withdraw an export's files, or end its making. Raises NotFound, Conflict while a push takes them."""
    row = find(session, export_id, project_id=project_id)
    lineage.refuse_needed_by_products(session, row.id, project_id=project_id)
    session.execute(update(ExportRow).where(ExportRow.id == row.id).values(deleted_at=func.now()))
    return row


# --- what the holder of a lease writes -------------------------------------------------------------------------------


def claim(session: Session, **claiming: Unpack[Claiming]) -> MergeClaim | PushClaim | None:
    """Lease the next export or push that nobody makes, or None: a worker makes one at a time.

    Raises WrittenByNewerVersion.
    """
    row = turns.take_alone(session, WORK, **claiming)
    return None if row is None else _claim(row)


def _claim(row: ExportRow) -> MergeClaim | PushClaim:
    try:
        if row.kind == "hub":
            wanted = CreatePush.model_validate(row.request)
            return PushClaim(lease=EXPORT.lease(row), project_id=row.project_id, request=wanted)
        request = CreateExport.model_validate(row.request)
        spec = JobSpec.model_validate(row.spec)
    except ValidationError as error:
        raise WrittenByNewerVersion(row.id) from error
    return MergeClaim(lease=EXPORT.lease(row), project_id=row.project_id, request=request, spec=spec)
