"""Verbs of merges and combinations: products made of adapters on the CPU lane, under a lease (shared/lease)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final, Unpack

from pydantic import ValidationError
from sqlalchemy import func, select, update
from sqlalchemy.orm import Session

from shared.chores.product_records import ProductRecords, kind_of
from shared.contract.merge_request import CreateCombination, CreateExport, CreateMerge
from shared.contract.methods import METHODS
from shared.contract.spec import JobSpec
from shared.errors import Invalid, LimitReached, NotFound
from shared.ids import new_id
from shared.lease import turns
from shared.lease.turns import Claiming, Work
from shared.lease.values import Lease, WrittenByNewerVersion
from shared.products import adapters, aliases, lineage
from shared.products.adapters import Source, StoredFile
from shared.store import layout, paging
from shared.store.locks import one_at_a_time
from shared.store.tables import MergeRow

# A project's unfinished merges: each may be as large as its base model.
MAX_UNFINISHED: Final = 20

Request = CreateMerge | CreateCombination
KINDS: Final[dict[type[Request], str]] = {CreateMerge: "merge", CreateCombination: "combination"}
_BODIES: Final[dict[str, type[Request]]] = {kind: body for body, kind in KINDS.items()}
MERGE: Final = kind_of("merge", MergeRow)
RECORDS: Final = ProductRecords(MERGE, layout.merge_attempt_prefix)
WORK: Final = Work(MERGE, long=True)


@dataclass(frozen=True, slots=True)
class MergeClaim:
    """The right to make a product; `lease.id` is the id of the merge, or of the export (shared/chores/exports.py)."""

    lease: Lease
    project_id: str
    request: Request | CreateExport
    spec: JobSpec


def named(request: Request | CreateExport) -> list[str]:
    """The adapters a request is about, in its order."""
    if not isinstance(request, CreateCombination):
        return [request.adapter]
    return [source.adapter for source in request.adapters]


def submit(session: Session, request: Request, *, project_id: str) -> MergeRow:
    """Accept a merge or combination. Raises Invalid, NotFound, LimitReached."""
    one_at_a_time(session, f"merges:{project_id}")
    sources = [adapters.find_source(session, name, project_id=project_id) for name in named(request)]
    check(request, sources)
    request = _as_resolved(request, sources)
    waiting = session.scalar(select(func.count()).where(MergeRow.project_id == project_id, MERGE.open))
    if (waiting or 0) >= MAX_UNFINISHED:
        raise LimitReached(
            f"This project already has {waiting} unfinished merges and combinations, as many as it may. "
            "Wait for some to finish, or delete some.",
            code="too_many_merges",
        )
    row = MergeRow(
        id=new_id("merge_"),
        project_id=project_id,
        kind=KINDS[type(request)],
        status="queued",
        request=request.model_dump(mode="json"),
        base_model=sources[0].spec.base_model.name,
        spec=sources[0].spec.model_dump(mode="json"),
    )
    session.add(row)
    session.flush()
    session.refresh(row)
    return row


def _as_resolved(request: Request, sources: Sequence[Source]) -> Request:
    """The request by the names of what its aliases name now: it is made later, and they may have moved by then."""
    if isinstance(request, CreateMerge):
        return request.model_copy(update={"adapter": _own_name(request.adapter, sources[0])})
    parts = [
        part.model_copy(update={"adapter": _own_name(part.adapter, source)})
        for part, source in zip(request.adapters, sources, strict=True)
    ]
    return request.model_copy(update={"adapters": parts})


def _own_name(asked: str, source: Source) -> str:
    return source.adapter.name if aliases.SIGN in asked else asked


def check(request: Request, sources: Sequence[Source]) -> None:
    """Refuse what upstream cannot do. Pure. Raises Invalid naming the adapter at fault and the remedy."""
    for source in sources:
        if not METHODS[source.spec.adapter.method].adapter:
            raise Invalid(
                f"'{source.adapter.name}' is a full fine-tune: its files are a plain model already, there is nothing "
                "to merge or combine. Download it as it is.",
                param=_param(request),
                code="not_an_adapter",
            )
    if isinstance(request, CreateMerge):
        _check_merge(request, sources[0])
    else:
        _check_combination(request, sources)


def _param(request: Request) -> str:
    return "adapter" if isinstance(request, CreateMerge) else "adapters"


def _check_merge(request: CreateMerge, source: Source) -> None:
    method = source.spec.adapter.method
    if request.onto == "dequantized" and not METHODS[method].quantized:
        raise Invalid(
            f"'{source.adapter.name}' was trained by {method} on the unquantised base; merge it onto 'base'.",
            param="onto",
            code="unsupported_combination",
        )


def _check_combination(request: CreateCombination, sources: Sequence[Source]) -> None:
    first = sources[0].spec.base_model
    for source in sources:
        base, adapter, name = source.spec.base_model, source.spec.adapter, source.adapter.name
        if (base.name, base.revision) != (first.name, first.revision):
            raise _impossible(
                f"'{name}' was trained on {base.name} ({base.revision[:12]}), the first one on {first.name} "
                f"({first.revision[:12]}); only adapters of one base model can be combined."
            )
        if METHODS[adapter.method].magnitude:
            raise _impossible(f"'{name}' is a DoRA adapter, whose magnitudes do not add up; combine LoRA adapters.")
        if adapter.modules_to_save or adapter.bias != "none":
            raise _impossible(
                f"'{name}' also trained whole modules or biases (modules_to_save, bias), which cannot be weighted."
            )
    sparse = request.combination_type.startswith(("ties", "dare", "magnitude_prune"))
    if sparse and request.density is None:
        raise Invalid(
            f"'{request.combination_type}' needs density, the share of values to keep, for instance 0.5.",
            param="density",
            code="missing_required_parameter",
        )
    if not sparse and request.density is not None:
        raise Invalid(f"'{request.combination_type}' knows no density; leave it out.", param="density")
    if request.svd_rank is not None and not request.combination_type.endswith("svd"):
        raise Invalid(f"'{request.combination_type}' knows no svd_rank; leave it out.", param="svd_rank")


def _impossible(why: str) -> Invalid:
    return Invalid(why, param="adapters", code="combination_impossible")


# --- what users see --------------------------------------------------------------------------------------------------


def find(session: Session, merge_id: str, *, project_id: str) -> MergeRow:
    """Raises NotFound."""
    row = session.scalars(
        select(MergeRow).where(
            MergeRow.id == merge_id, MergeRow.project_id == project_id, MergeRow.deleted_at.is_(None)
        )
    ).one_or_none()
    if row is None:
        raise NotFound(f"No merge or combination '{merge_id[:100]}' in this project.", param="merge_id")
    return row


def page(session: Session, *, project_id: str, after: str | None, limit: int) -> tuple[Sequence[MergeRow], bool]:
    """Merges and combinations of a project, newest first, and whether more follow. Raises NotFound: `after`."""
    query = select(MergeRow).where(MergeRow.deleted_at.is_(None))
    mine = MergeRow.project_id == project_id
    return paging.page(session, query, MergeRow.id, mine, after=after, limit=limit, what="merge or combination")


def of_model(session: Session, name: str, *, project_id: str, limit: int) -> Sequence[MergeRow]:
    """Merges of a tuned model and of its checkpoints, newest first."""
    adapter = func.jsonb_extract_path_text(MergeRow.request, "adapter")
    return session.scalars(
        select(MergeRow)
        .where(
            MergeRow.project_id == project_id,
            MergeRow.deleted_at.is_(None),
            MergeRow.kind == "merge",
            (adapter == name) | adapter.startswith(f"{name}:ckpt-step-", autoescape=True),
        )
        .order_by(MergeRow.id.desc())
        .limit(limit)
    ).all()


def product(row: MergeRow) -> tuple[StoredFile, ...]:
    """The files of a finished merge; none before."""
    return adapters.stored_files(row.manifest or {})


def delete(session: Session, merge_id: str, *, project_id: str) -> MergeRow:
    """Withdraw a product, or end its making. Raises NotFound, Conflict if anything needs it."""
    row = find(session, merge_id, project_id=project_id)
    session.refresh(row, with_for_update=True)  # a promotion that is under way ends first
    aliases.refuse_needed(session, row.id, name=row.id)
    lineage.refuse_needed_by_jobs(session, row.id, name=row.id, project_id=project_id)
    lineage.refuse_needed_by_products(session, row.id, project_id=project_id)
    session.execute(update(MergeRow).where(MergeRow.id == row.id).values(deleted_at=func.now()))
    return row


# --- what the holder of a lease writes -------------------------------------------------------------------------------


def claim(session: Session, **claiming: Unpack[Claiming]) -> MergeClaim | None:
    """Lease the next merge that nobody makes, or None. A worker makes one at a time. Raises WrittenByNewerVersion."""
    row = turns.take_alone(session, WORK, **claiming)
    return None if row is None else _claim(row)


def _claim(row: MergeRow) -> MergeClaim:
    try:
        request = _BODIES[row.kind].model_validate(row.request)
        spec = JobSpec.model_validate(row.spec)
    except (KeyError, ValidationError) as error:
        raise WrittenByNewerVersion(row.id) from error
    return MergeClaim(lease=MERGE.lease(row), project_id=row.project_id, request=request, spec=spec)


def sources(session: Session, claim: MergeClaim) -> list[Source]:
    """The adapters of a claim, looked up again: one may be gone meanwhile. Raises NotFound."""
    return [adapters.find_source(session, name, project_id=claim.project_id) for name in named(claim.request)]
