"""Where the models of a pool can be asked: playgrounds report themselves here, and the API finds them here.

A playground is no worker: it has no lease and holds no device in the plan. A training takes the device back.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Final, Literal

from sqlalchemy import case, delete, func, or_, select
from sqlalchemy.dialects.postgresql import insert
from sqlalchemy.orm import Session

from shared.contract.generation import Target, WireFile
from shared.contract.methods import METHODS
from shared.errors import Invalid, NotFound
from shared.products import adapters
from shared.settle.catalogue import Catalogue
from shared.store.tables import DeviceRow, JobRow, PlaygroundRow

# A playground reports itself every second or two; one that is silent for so long is asked no more.
SILENCE: Final = timedelta(seconds=20)

State = Literal["cold", "warming", "warm", "yielding"]


@dataclass(frozen=True, slots=True)
class PlaygroundAddress:
    """Where a playground listens, and what it wants to hear first."""

    address: str
    port: int
    token: str = field(repr=False)


@dataclass(frozen=True, slots=True)
class PlaygroundReport:
    """What a playground has in memory, and how many questions have no end yet."""

    state: State = "cold"
    base_model: str | None = None
    adapters: tuple[str, ...] = ()
    asked: int = 0


@dataclass(frozen=True, slots=True)
class WarmModels:
    """What answers without loading anything first."""

    base_models: frozenset[str]
    adapters: frozenset[str]


@dataclass(frozen=True, slots=True)
class Pressure:
    """The need of trainings for a host: its devices are leased, or a job waits that would fit on one of them.

    `waiting_bytes`: the most that such a job needs on a device; 0 when none waits.
    """

    leased: bool
    waiting_bytes: int


def report(
    session: Session, playground_id: str, *, host: str, pool: str, at: PlaygroundAddress, standing: PlaygroundReport
) -> None:
    """Say "still here", and what it holds. A restarted playground takes its former row over."""
    columns = {
        "host": host,
        "pool": pool,
        "address": at.address,
        "port": at.port,
        "token": at.token,
        "state": standing.state,
        "base_model": standing.base_model,
        "adapters": list(standing.adapters),
        "asked": standing.asked,
    }
    session.execute(
        insert(PlaygroundRow)
        .values(id=playground_id, **columns)
        .on_conflict_do_update(index_elements=[PlaygroundRow.id], set_={**columns, "last_seen": func.now()})
    )


def retire(session: Session, playground_id: str, *, token: str) -> None:
    """Remove one that ends, unless its successor has taken the row over."""
    session.execute(delete(PlaygroundRow).where(PlaygroundRow.id == playground_id, PlaygroundRow.token == token))


def forget(session: Session) -> None:
    """Remove those that fell silent a day ago."""
    session.execute(delete(PlaygroundRow).where(PlaygroundRow.last_seen < func.now() - timedelta(days=1)))


def places(session: Session, *, pool_name: str, base_model: str) -> list[PlaygroundAddress]:
    """Playgrounds to ask about a base model, the likeliest to answer soon first."""
    better = case((PlaygroundRow.base_model == base_model, 0), (PlaygroundRow.state == "cold", 1), else_=2) + case(
        (PlaygroundRow.state == "yielding", 10), else_=0
    )
    rows = session.scalars(
        select(PlaygroundRow)
        .where(PlaygroundRow.pool == pool_name, PlaygroundRow.last_seen > func.now() - SILENCE)
        .order_by(better, PlaygroundRow.asked, PlaygroundRow.id)
        .limit(8)
    )
    return [PlaygroundAddress(row.address, row.port, row.token) for row in rows]


def warm(session: Session, *, pool_name: str) -> WarmModels:
    """What the living playgrounds of a pool hold now, by a base model's name and an adapter's id."""
    rows = session.scalars(
        select(PlaygroundRow).where(
            PlaygroundRow.pool == pool_name,
            PlaygroundRow.state == "warm",
            PlaygroundRow.last_seen > func.now() - SILENCE,
        )
    ).all()
    return WarmModels(
        base_models=frozenset(row.base_model for row in rows if row.base_model),
        adapters=frozenset(adapter for row in rows for adapter in row.adapters),
    )


def pressure(session: Session, *, device_ids: Sequence[str]) -> Pressure:
    """What trainings want of these devices now."""
    usable = (DeviceRow.id.in_(device_ids), DeviceRow.healthy, DeviceRow.quarantined.is_(False))
    roomiest = select(func.max(DeviceRow.total_bytes)).where(*usable).scalar_subquery()
    waiting = session.scalar(
        select(func.max(JobRow.bytes_per_device)).where(
            JobRow.status == "queued",
            JobRow.held.is_(False),
            or_(JobRow.not_before.is_(None), JobRow.not_before <= func.now()),
            JobRow.bytes_per_device <= roomiest,
        )
    )
    held = select(func.count()).where(DeviceRow.id.in_(device_ids), DeviceRow.leased_by.is_not(None))
    leased = session.scalar(held)
    return Pressure(leased=bool(leased), waiting_bytes=waiting or 0)


def target(session: Session, model: str, *, project_id: str, catalogue: Catalogue) -> Target:
    """What `model` stands for: a base model or an alias, else an adapter, checkpoint or combination of the project.

    Raises:
        NotFound: neither; another project's is none.
        Invalid, NotYet: a base model that cannot be used, or not yet; the model of a job that has not succeeded.
    """
    catalogue.must_be_usable(model)
    if not adapters.is_tuned(model) or catalogue.taken(model):
        return Target(base=catalogue.find(model))
    try:
        source = adapters.find_source(session, model, project_id=project_id)
    except NotFound:
        _must_be_made(session, model, project_id=project_id)
        raise
    spec, method = source.spec, METHODS[source.spec.adapter.method]
    return Target(
        base=spec.base_model,
        quantization=spec.quantization if method.quantized else None,
        dtype=spec.training.dtype,
        chat_template=spec.training.chat_template,
        adapter=source.adapter.id,
        files=[
            WireFile(name=file.name, bytes=file.bytes, sha256=file.sha256, key=file.key)
            for file in source.adapter.files
        ],
        alone=not method.adapter or spec.adapter.bias != "none",
        whole=not method.adapter,
    )


def _must_be_made(session: Session, model: str, *, project_id: str) -> None:
    """Raises Invalid where `model` is the name that a job of the project gives its model once it has succeeded."""
    number = model.rpartition(":")[2]
    job = session.get(JobRow, f"ftjob-{number}")
    if job is None or job.project_id != project_id or job.status == "succeeded":
        return
    if not (model.startswith(f"ft:{job.base_model}:") and model.endswith(f":{job.suffix or ''}:{number}")):
        return
    raise Invalid(
        f"The model '{model[:200]}' is not there: its job {job.id} is {job.status}. A model can be asked once its job "
        "has succeeded; its checkpoints can be before.",
        param="model",
        code="model_not_ready",
    )
