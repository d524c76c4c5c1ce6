"""Moves aliases: promote, roll back, protect, remove; each audited. Of two moves at once one wins: a guarded UPDATE."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from sqlalchemy import func, select, update
from sqlalchemy.dialects.postgresql import insert
from sqlalchemy.orm import Session

from shared.errors import Conflict, Forbidden, Invalid, NotFound
from shared.ids import new_id
from shared.lease import outbox
from shared.products import adapters, aliases, gate_checks, promotion_requests
from shared.products.adapters import PublishedAdapter
from shared.products.gate_checks import GateWish
from shared.store.tables import (
    AdapterRow,
    AliasRow,
    AliasVersionRow,
    ApiKeyRow,
    CheckpointRow,
    MergeRow,
    PromotionRow,
)
from shared.tenants import audit
from shared.tenants.keys import Caller


@dataclass(frozen=True, slots=True)
class PromotionRequest:
    """A promotion as it was asked for. `expected_version`: what the alias must still be at; 0: it must be new."""

    alias: str
    model: str
    gate: GateWish | None = None
    expected_version: int | None = None
    force: bool = False
    reason: str | None = None


@dataclass(frozen=True, slots=True)
class AliasMove:
    """`version` holds now. `moved` is false where the alias named this model already, and while `pending` waits."""

    alias: AliasRow
    version: AliasVersionRow
    moved: bool
    pending: PromotionRow | None = None


def weighed(session: Session, wish: PromotionRequest, caller: Caller) -> dict[str, Any] | None:
    """What the gate would say; nothing moves. None without a gate. Raises Invalid, NotFound, Conflict."""
    model = adapters.find_published(session, wish.model, project_id=caller.project_id)
    return _weighed(session, wish, model, caller)


def promote(session: Session, wish: PromotionRequest, caller: Caller) -> AliasMove:
    """Have an alias name a model whose gate has passed, or with `force` and a reason any model.

    An alias that is not there yet is made. Asked again for what it names already, nothing moves: a pipeline that starts
    again is answered as before.

    Raises:
        Invalid, NotFound: the gate cannot be read, the model is not there.
        Forbidden: the alias is protected from this key.
        Conflict: the gate has not passed, or another move came first.
    """
    aliases.must_be_name(wish.alias)
    model = adapters.find_published(session, wish.model, project_id=caller.project_id)
    gate = _proven(session, wish, model, caller)
    row, seen = _row(session, wish.alias, project_id=caller.project_id)
    _refuse_protected(row, caller)
    if row.model_id == model.id:
        return AliasMove(row, aliases.version(session, row, row.version), moved=False)
    expected = seen if wish.expected_version is None else wish.expected_version
    if expected != row.version:
        raise _overtaken(session, row.id, expected=expected)
    if row.approvals:
        pending = _ask(session, wish, row, caller, model=model, gate=gate)
        return AliasMove(row, aliases.version(session, row, row.version), moved=False, pending=pending)
    entry = _entry(wish, model, gate, caller)
    return AliasMove(row, _move(session, caller, row, entry, fallback_id=row.model_id), moved=True)


def promote_approved(
    session: Session, wish: PromotionRequest, asker: Caller, *, model_id: str, by: Caller, approved_by: list[str]
) -> AliasVersionRow:
    """Carry out a promotion that has its approvals: everything is judged as of now. Raises as `promote` does.

    Args:
        model_id: what `wish.model` named when it was asked for.
        by: who gave the last approval.
    """
    model = adapters.find_published(session, model_id, project_id=asker.project_id)
    gate = _proven(session, wish, model, asker)
    row = aliases.find(session, wish.alias, project_id=asker.project_id)
    _refuse_protected(row, asker)
    if wish.expected_version != row.version:
        raise _overtaken(session, row.id, expected=wish.expected_version or 0)
    entry = _entry(wish, model, gate, asker)
    entry.approved_by = approved_by
    return _move(session, by, row, entry, fallback_id=row.model_id)


def _proven(session: Session, wish: PromotionRequest, model: PublishedAdapter, caller: Caller) -> dict[str, Any] | None:
    """The gate's result, which allows the move; the model is kept until this transaction ends."""
    gate = _weighed(session, wish, model, caller)
    _refuse_unproven(wish, gate)
    _hold(session, model)
    return gate


def _entry(
    wish: PromotionRequest, model: PublishedAdapter, gate: dict[str, Any] | None, caller: Caller
) -> AliasVersionRow:
    return AliasVersionRow(
        kind="promote", gate=gate, forced=_forced(wish, gate), reason=wish.reason, **_about(model), key_id=caller.key_id
    )


def _ask(
    session: Session,
    wish: PromotionRequest,
    row: AliasRow,
    caller: Caller,
    *,
    model: PublishedAdapter,
    gate: dict[str, Any] | None,
) -> PromotionRow:
    stored = {"model": wish.model, "force": wish.force, "gate": None if wish.gate is None else asdict(wish.gate)}
    named = {"model": model.name, "model_id": model.id, "from_version": row.version}
    pending, new = promotion_requests.ask(
        session, row, key_id=caller.key_id, wish=stored, gate=gate, reason=wish.reason, **named
    )
    if new:
        after = {"alias": row.name, "model": model.name, "forced": _forced(wish, gate), "reason": wish.reason}
        audit.record(session, caller, "promotion.request", pending.id, after=after)
        details = {**after, "approvals": row.approvals, "expires_at": int(pending.expires_at.timestamp())}
        outbox.announce(session, "tunepool.promotion.requested", pending.id, project_id=row.project_id, details=details)
    return pending


def tell_end(session: Session, row: PromotionRow, alias: AliasRow) -> None:
    """Have the webhooks told how a promotion has ended."""
    details = {"alias": alias.name, "model": row.model, "state": row.state, "code": row.code, "reason": row.outcome}
    outbox.announce(session, "tunepool.promotion.ended", row.id, project_id=row.project_id, details=details)


def rollback(
    session: Session, name: str, caller: Caller, *, to: int | None, reason: str | None, expected_version: int | None
) -> AliasMove:
    """Have an alias name again what it named before, or what it named at version `to`. It becomes a new version.

    Raises:
        Invalid, NotFound, Forbidden: as for a promotion.
        Conflict: nothing was before, its model is gone, or another move came first.
    """
    row = aliases.find(session, name, project_id=caller.project_id)
    _refuse_protected(row, caller)
    if expected_version is not None and expected_version != row.version:
        raise _overtaken(session, row.id, expected=expected_version)
    target = _origin(session, row, aliases.version(session, row, to)) if to is not None else _before(session, row)
    if target is None:
        raise Conflict(f"{name} has named one model only; there is nothing to go back to.", code="nothing_before")
    try:
        model = adapters.find_published(session, target.model_id, project_id=caller.project_id)
    except NotFound:
        raise Conflict(
            f"Version {target.number} of {name} named '{target.model}', which has been deleted.", code="version_gone"
        ) from None
    if model.id == row.model_id:
        return AliasMove(row, aliases.version(session, row, row.version), moved=False)
    _hold(session, model)
    earlier = _before_version(session, row, target)
    entry = AliasVersionRow(
        kind="rollback", restores=target.number, reason=reason, **_about(model), key_id=caller.key_id
    )
    fallback_id = None if earlier is None else earlier.model_id
    return AliasMove(row, _move(session, caller, row, entry, fallback_id=fallback_id), moved=True)


def protect(
    session: Session, name: str, caller: Caller, *, project_id: str, changes: dict[str, Any]
) -> tuple[AliasRow, AliasVersionRow]:
    """Say which keys may move an alias (`movers`), how many `approvals` a promotion needs, and of whom (`approvers`).

    Returns it with what it names. Raises Invalid, NotFound.
    """
    row = aliases.find(session, name, project_id=project_id)
    promotion_requests.lock_alias(session, row.id)
    for param in ("movers", "approvers"):
        _refuse_unknown_keys(session, changes.get(param) or [], param)
    before = _protection(row)
    after = before | changes
    if after["approvers"] is not None and len(set(after["approvers"])) < after["approvals"]:
        raise Invalid(
            f"{after['approvals']} approvals are needed, and {len(set(after['approvers']))} keys may give one. Name "
            "more keys, or null for every key of the project.",
            param="approvers",
        )
    session.execute(update(AliasRow).where(AliasRow.id == row.id).values(**after))
    session.refresh(row)
    audit.record(session, caller, "alias.protect", row.id, before={"name": row.name, **before}, after=_protection(row))
    return row, aliases.version(session, row, row.version)


def _protection(row: AliasRow) -> dict[str, Any]:
    return {"movers": row.movers, "approvals": row.approvals, "approvers": row.approvers}


def _refuse_unknown_keys(session: Session, key_ids: list[str], param: str) -> None:
    known = set(session.scalars(select(ApiKeyRow.id).where(ApiKeyRow.id.in_(key_ids))))
    for key_id in key_ids:
        if key_id not in known:
            raise Invalid(f"There is no key '{key_id[:100]}'.", param=param)


def remove(session: Session, name: str, caller: Caller) -> None:
    """Take an alias away; its models stay. Raises Invalid, NotFound, Forbidden."""
    row = aliases.find(session, name, project_id=caller.project_id)
    _refuse_protected(row, caller)
    if row.approvals and not caller.operates:
        raise Forbidden(
            f"Promotions of {row.name} need approvals, so an administrator removes it: a new one would need none.",
            param="alias",
            code="alias_protected",
        )
    promotion_requests.lock_alias(session, row.id)
    session.execute(update(AliasRow).where(AliasRow.id == row.id).values(deleted_at=func.now()))
    _end_pending(session, row, caller, f"The alias {row.name} was removed.")
    audit.record(session, caller, "alias.delete", row.id, before=_facts(row))


def _weighed(
    session: Session, wish: PromotionRequest, model: PublishedAdapter, caller: Caller
) -> dict[str, Any] | None:
    if wish.gate is None:
        return None
    return gate_checks.weigh(session, wish.gate, model, asked=wish.model, project_id=caller.project_id)


def _refuse_unproven(wish: PromotionRequest, gate: dict[str, Any] | None) -> None:
    if wish.force and not (wish.reason or "").strip():
        raise Invalid("'force' needs a reason, which is kept and audited.", param="reason")
    if wish.force or (gate is not None and gate["status"] == "passed"):
        return
    if gate is None:
        raise Invalid(
            "A promotion needs a gate that has passed: 'gate' with its text and an evaluation. Without, 'force' and a "
            "reason.",
            param="gate",
            code="gate_required",
        )
    first = next(stated for stated in gate["assertions"] if stated["status"] == gate["status"])
    raise Conflict(
        f"The gate has {'failed' if gate['status'] == 'failed' else 'not been decided'}, so {wish.alias} stays. "
        f"{first['assert']}: {first['reason']}",
        param="gate",
        code=f"gate_{gate['status']}",
    )


def _forced(wish: PromotionRequest, gate: dict[str, Any] | None) -> bool:
    return wish.force and (gate is None or gate["status"] != "passed")


def _refuse_protected(row: AliasRow, caller: Caller) -> None:
    if row.movers is not None and caller.key_id not in row.movers and not caller.operates:
        raise Forbidden(
            f"The alias {row.name} is protected: this API key may not move it. Use one of the keys that "
            "may, or ask your administrator.",
            param="alias",
            code="alias_protected",
        )


def _hold(session: Session, model: PublishedAdapter) -> None:
    """Keep the model from being deleted until this transaction ends. Raises NotFound if it has just been."""
    kind = AdapterRow if model.id.startswith("adapter_") else MergeRow if model.job_id is None else CheckpointRow
    row = session.scalars(select(kind).where(kind.id == model.id).with_for_update(read=True)).one_or_none()
    if row is not None:
        session.refresh(row)
    if row is None or getattr(row, "deleted_at", None) is not None:
        raise NotFound(f"The model '{model.name}' has been deleted.", param="model", code="model_not_found")


def _row(session: Session, name: str, *, project_id: str) -> tuple[AliasRow, int]:
    """The alias's row, made where there is none, and the version that was seen first.

    A row that another transaction makes at this moment is waited for: then 0 was seen, and its version is another.
    """
    mine = select(AliasRow).where(
        AliasRow.project_id == project_id, AliasRow.name == name, AliasRow.deleted_at.is_(None)
    )
    row = session.scalars(mine).one_or_none()
    if row is not None:
        return row, row.version
    session.execute(
        insert(AliasRow)
        .values(id=new_id("alias_"), project_id=project_id, name=name)
        .on_conflict_do_nothing(
            index_elements=[AliasRow.project_id, AliasRow.name], index_where=AliasRow.deleted_at.is_(None)
        )
    )
    return session.scalars(mine).one(), 0


def _about(model: PublishedAdapter) -> dict[str, Any]:
    return {"model": model.name, "model_id": model.id, "base_model": model.base_model, "job_id": model.job_id}


def _move(
    session: Session, caller: Caller, row: AliasRow, entry: AliasVersionRow, *, fallback_id: str | None
) -> AliasVersionRow:
    """The move itself. The UPDATE waits for one that is under way, and then finds another version. Raises Conflict."""
    expected, before = row.version, _facts(row)
    won = session.execute(
        update(AliasRow)
        .where(AliasRow.id == row.id, AliasRow.version == expected, AliasRow.deleted_at.is_(None))
        .values(version=expected + 1, model_id=entry.model_id, fallback_id=fallback_id, moved_at=func.now())
        .returning(AliasRow.id)
        .execution_options(synchronize_session=False)
    ).one_or_none()
    if won is None:
        raise _overtaken(session, row.id, expected=expected)
    entry.id, entry.alias_id, entry.number = new_id("aver_"), row.id, expected + 1
    session.add(entry)
    session.flush()
    session.refresh(row)
    session.refresh(entry)
    after = {**_facts(row), "model": entry.model, "forced": entry.forced, "reason": entry.reason}
    audit.record(session, caller, f"alias.{entry.kind}", row.id, before=before, after=after)
    details = {**after, "kind": entry.kind, "key_id": entry.key_id}
    outbox.announce(session, "tunepool.alias.moved", row.id, project_id=row.project_id, details=details)
    words = (
        f"Version {entry.number} of {row.name} names '{entry.model}' since. Evaluate against that one, and ask again."
    )
    _end_pending(session, row, caller, words, but=entry.model_id if entry.approved_by is not None else None)
    return entry


def _end_pending(session: Session, row: AliasRow, caller: Caller, words: str, *, but: str | None = None) -> None:
    """Tell those that wait that another move came first. `but`: the model of the one that is being carried out."""
    for waiting in promotion_requests.pending_of(session, row.id):
        if waiting.model_id != but:
            promotion_requests.end(session, waiting, "overtaken", by=caller.key_id, outcome=words, code="alias_moved")
            tell_end(session, waiting, row)


def _facts(row: AliasRow) -> dict[str, Any]:
    return {"name": row.name, "version": row.version, "model_id": row.model_id}


def _overtaken(session: Session, alias_id: str, *, expected: int) -> Conflict:
    query = select(AliasVersionRow, ApiKeyRow.name).join(ApiKeyRow, ApiKeyRow.id == AliasVersionRow.key_id)
    newest = session.execute(
        query.where(AliasVersionRow.alias_id == alias_id).order_by(AliasVersionRow.number.desc()).limit(1)
    ).one_or_none()
    if newest is None:
        return Conflict(f"The alias is not at version {expected}: it has named nothing yet.", code="alias_moved")
    version, key_name = newest
    return Conflict(
        f"The alias is no longer at version {expected}: version {version.number} names '{version.model}' since "
        f"{version.created_at:%Y-%m-%d %H:%M:%SZ}, by the key '{key_name}' ({version.key_id}). Evaluate "
        "against that one.",
        param="expected_version",
        code="alias_moved",
    )


def _origin(session: Session, row: AliasRow, version: AliasVersionRow) -> AliasVersionRow:
    """The version that a rollback restored, else itself."""
    return version if version.restores is None else aliases.version(session, row, version.restores)


def _before(session: Session, row: AliasRow) -> AliasVersionRow | None:
    return _before_version(session, row, _origin(session, row, aliases.version(session, row, row.version)))


def _before_version(session: Session, row: AliasRow, version: AliasVersionRow) -> AliasVersionRow | None:
    """What held when `version` was promoted."""
    if version.number == 1:
        return None
    return _origin(session, row, aliases.version(session, row, version.number - 1))
