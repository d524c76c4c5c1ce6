"""The one lease, asked of every kind of work: what holds for one holds for all, and for a kind that is added later."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import pytest
from sqlalchemy import Engine, Text, func, select, text, update
from sqlalchemy.exc import OperationalError
from sqlalchemy.orm import DeclarativeBase, Mapped, Session, mapped_column

from shared.chores import (
    base_models,
    cancelling,
    deliveries,
    evaluations,
    exports,
    fetches,
    file_checks,
    merges,
    preflights,
    trackings,
    waiting,
)
from shared.chores import table as chores
from shared.errors import Forbidden, NotFound
from shared.fleet import workers
from shared.fleet.workers import NewWorker
from shared.ids import new_id
from shared.jobs import moves
from shared.jobs.claims import SETTLING
from shared.lease import lease as leasing
from shared.lease.lease import MAX_FAILURES, Kind
from shared.lease.turns import Work
from shared.lease.values import Lease, WrittenByNewerVersion
from shared.settings import Settings
from shared.settle.wanted_models import PendingEntry
from shared.store.db import session_scope
from shared.store.tables import (
    AuditRow,
    BaseModelRow,
    DeliveryRow,
    EvaluationRow,
    ExportRow,
    FetchRow,
    FileRow,
    JobRow,
    Leased,
    MergeRow,
    PreflightRow,
    TrackingRow,
    WebhookRow,
)
from shared.tenants.keys import Caller
from tests.factories import make_caller, make_file, make_job, make_spec, make_worker
from worker.chores import table as handlers
from worker.chores.run_program import LeaseWatch, Stopped, under_lease
from worker.host.flags import SharedFlags
from worker.host.host import Host, open_host


class _ElsewhereBase(DeclarativeBase):
    """Tables that no migration makes."""


class EchoRow(Leased, _ElsewhereBase):
    """A chore of a later version."""

    __tablename__ = "echoes"

    project_id: Mapped[str] = mapped_column(Text)
    heard: Mapped[bool]


ECHO = Kind(name="echo", row=EchoRow, open=EchoRow.heard.is_(False), lost={"heard": True}, cancelled={"heard": True})
DDL = """create table echoes (id text primary key, project_id text not null, heard boolean not null default false,
    fence bigint not null default 0, failures integer not null default 0, lease_owner text, lease_until timestamptz)"""


def make_checked(session: Session, caller: Caller, *, name: str = "rows.jsonl") -> str:
    return make_file(session, caller, status="uploaded", filename=name).id


def make_preflight(session: Session, caller: Caller) -> str:
    file = make_file(session, caller)
    row = PreflightRow(
        id=new_id("preflight_"),
        project_id=caller.project_id,
        status="queued",
        base_model="tiny",
        seed=1,
        training_file=file.id,
        request={"model": "tiny", "training_file": file.id},
    )
    session.add(row)
    session.flush()
    return row.id


def make_merge(session: Session, caller: Caller) -> str:
    row = MergeRow(
        id=new_id("merge_"),
        project_id=caller.project_id,
        kind="merge",
        status="queued",
        request={"adapter": "ft:tiny:acme::1", "onto": "base"},
        base_model="tiny",
        spec=make_spec().model_dump(mode="json"),
    )
    session.add(row)
    session.flush()
    return row.id


def make_export(session: Session, caller: Caller) -> str:
    row = ExportRow(
        id=new_id("export_"),
        project_id=caller.project_id,
        kind="gguf",
        status="queued",
        request={"adapter": "ft:tiny:acme::1", "format": "gguf", "quantization": "q8_0"},
        base_model="tiny",
        spec=make_spec().model_dump(mode="json"),
    )
    session.add(row)
    session.flush()
    return row.id


def make_evaluation(session: Session, caller: Caller) -> str:
    row = EvaluationRow(
        id=new_id("eval_"),
        project_id=caller.project_id,
        status="queued",
        request={"subjects": ["tiny"], "items": {"type": "suite", "suite": "general"}},
        targets=[],
    )
    session.add(row)
    session.flush()
    return row.id


def make_look_up(session: Session, _caller: Caller) -> str:
    name = new_id("example/")
    entry = PendingEntry(name, name, "main", owned_by="organization", public_name=name)
    base_models.ask(session, [entry])
    return entry.key


def make_fetch(session: Session, _caller: Caller) -> str:
    worker, row_id = make_worker(session), new_id("fetch_")
    session.add(FetchRow(id=row_id, worker_id=worker.id, model="tiny", revision="1", state="waiting"))
    session.flush()
    return row_id


def make_delivery(session: Session, caller: Caller) -> str:
    values = {"url": "https://example.com/", "event_types": ["fine_tuning.job.failed"], "secret": "", "secret_hint": ""}
    webhook = WebhookRow(id=new_id("webhook_"), project_id=caller.project_id, name="ci", **values)
    session.add(webhook)
    session.flush()
    row = DeliveryRow(
        id=new_id("delivery_"),
        project_id=caller.project_id,
        webhook_id=webhook.id,
        event_id=new_id("evt_"),
        event_type="fine_tuning.job.failed",
    )
    session.add(row)
    session.flush()
    return row.id


def make_tracking(session: Session, caller: Caller) -> str:
    job = make_job(session, caller)
    moves.request_cancel(session, job.id, project_id=caller.project_id)
    row = TrackingRow(
        id=new_id("tracking_"), project_id=caller.project_id, job_id=job.id, place=0, tracker="mlflow", options={}
    )
    session.add(row)
    session.flush()
    return row.id


def make_echo(session: Session, caller: Caller) -> str:
    echo = new_id("echo_")
    values = {"id": echo, "project_id": caller.project_id}
    session.execute(text("insert into echoes (id, project_id) values (:id, :project_id)"), values)
    return echo


@dataclass(frozen=True)
class Case:
    kind: Kind
    make: Callable[[Session, Caller], str]


CASES = {
    "job": Case(SETTLING.kind, lambda session, caller: make_job(session, caller).id),
    "file_check": Case(file_checks.FILE_CHECK, make_checked),
    "preflight": Case(preflights.PREFLIGHT, make_preflight),
    "merge": Case(merges.MERGE, make_merge),
    "export": Case(exports.EXPORT, make_export),
    "evaluation": Case(evaluations.EVALUATION, make_evaluation),
    "base_model": Case(base_models.LOOK_UP, make_look_up),
    "fetch": Case(fetches.FETCH, make_fetch),
    "delivery": Case(deliveries.DELIVERY, make_delivery),
    "tracking": Case(trackings.TRACKING, make_tracking),
    "echo": Case(ECHO, make_echo),
}


@pytest.fixture
def quiet(session: Session, monkeypatch: pytest.MonkeyPatch) -> Session:
    """A database where nothing waits (until the roll-back), and a version that has one more chore."""
    session.execute(text(DDL))
    session.execute(update(FileRow).values(deleted_at=func.now()))
    session.execute(update(PreflightRow).values(status="failed", finished_at=func.now()))
    session.execute(update(MergeRow).values(deleted_at=func.now()))
    session.execute(update(ExportRow).values(deleted_at=func.now()))
    session.execute(update(BaseModelRow).values(state="error"))
    session.execute(update(FetchRow).values(state="error"))
    session.execute(update(DeliveryRow).values(state="failed"))
    session.execute(update(TrackingRow).values(state="failed"))
    session.execute(update(JobRow).where(JobRow.status == "validating_files").values(status="queued", lease_until=None))
    monkeypatch.setitem(chores.CHORES, "echo", Work(ECHO))
    return session


@pytest.fixture(params=CASES)
def case(request: pytest.FixtureRequest) -> Case:
    return CASES[request.param]


def take(session: Session, case: Case, worker: str = "one", *, seconds: float = 60, **rest: Any) -> Lease | None:
    row = leasing.take(session, case.kind, worker_id=worker, lease_seconds=seconds, **rest)
    return None if row is None else case.kind.lease(row)


def must_take(session: Session, case: Case, worker: str = "one", *, seconds: float = 60) -> Lease:
    lease = take(session, case, worker, seconds=seconds)
    assert lease is not None
    return lease


def state(session: Session, case: Case, row_id: str) -> Any:
    return session.get_one(case.kind.row, row_id, populate_existing=True)


def reap(session: Session) -> list[str]:
    settings = Settings(grace_seconds=5, max_attempts=MAX_FAILURES)
    return moves.reap(session, settings=settings) + chores.reap(session, grace_seconds=5)


def test_work_that_waits_is_rung_for_until_somebody_has_it(quiet: Session, case: Case) -> None:
    assert "cpu" not in waiting.waiting(quiet)

    row_id = case.make(quiet, make_caller(quiet))

    assert "cpu" in waiting.waiting(quiet)
    assert must_take(quiet, case).id == row_id
    assert "cpu" not in waiting.waiting(quiet)
    assert take(quiet, case, "two") is None


def test_the_fence_only_grows_and_what_is_given_back_costs_no_try(quiet: Session, case: Case) -> None:
    row_id = case.make(quiet, make_caller(quiet))
    fences = []
    for _ in range(2 * MAX_FAILURES):
        lease = must_take(quiet, case)
        fences.append(lease.fence)
        assert leasing.give_back(quiet, case.kind, lease, counted=False)

    assert fences == list(range(1, 2 * MAX_FAILURES + 1))
    row = state(quiet, case, row_id)
    assert (row.fence, row.failures, row.lease_owner, row.lease_until) == (fences[-1], 0, None, None)


# A job that is settled is cancelled as a job, by routes of its own: tests/integration/test_operations.py.
@pytest.mark.parametrize("case", [name for name in CASES if name != "job"], indirect=True)
@pytest.mark.parametrize("held", [False, True], ids=["waiting", "at work"])
@pytest.mark.parametrize("scopes", [("*",), ("*", "admin")], ids=["owner", "administrator"])
def test_work_of_every_kind_is_listed_and_ended_by_its_owner_and_an_administrator_and_by_nobody_else(
    quiet: Session, case: Case, scopes: tuple[str, ...], held: bool
) -> None:
    owner, stranger = make_caller(quiet), make_caller(quiet)
    operator = replace(make_caller(quiet), scopes=frozenset(("*", "admin")))
    row_id = case.make(quiet, owner)
    own = state(quiet, case, row_id).project_id == owner.project_id
    ending = operator if "admin" in scopes or not own else owner
    holder = must_take(quiet, case, "two") if held else None

    def listed(caller: Caller) -> list[tuple[str, str, str | None]]:
        seen, _ = cancelling.page(quiet, caller=caller, limit=100)
        return [(chore.id, chore.kind, chore.worker_id) for chore in seen]

    assert listed(stranger) == []
    with pytest.raises(NotFound):
        cancelling.cancel(quiet, row_id, caller=stranger)
    assert (row_id, case.kind.name, "two" if held else None) in listed(ending)
    if own:
        with pytest.raises(Forbidden):
            cancelling.cancel(quiet, row_id, caller=replace(owner, scopes=frozenset({"jobs:read"})))

    assert cancelling.cancel(quiet, row_id, caller=ending).kind == case.kind.name

    assert take(quiet, case) is None
    assert holder is None or not leasing.keep(quiet, case.kind, holder, lease_seconds=60), "the holder hears of it"
    assert row_id not in [row for row, *_ in listed(ending)]
    with pytest.raises(NotFound):
        cancelling.cancel(quiet, row_id, caller=ending)
    act = quiet.scalars(select(AuditRow).where(AuditRow.target == row_id)).one()
    assert act.action == f"{case.kind.name}.cancel"


def test_every_kind_of_chore_is_among_the_cases_and_says_how_it_is_cancelled() -> None:
    kinds = {kind.name: kind for kind in chores.kinds()}

    assert kinds.keys() <= CASES.keys()
    assert [name for name, kind in kinds.items() if not kind.cancelled] == []


def test_a_late_holder_writes_nothing_whoever_has_the_row_now(quiet: Session, case: Case) -> None:
    case.make(quiet, make_caller(quiet))
    late = must_take(quiet, case)
    leasing.give_back(quiet, case.kind, late, counted=False)

    for now in (None, must_take(quiet, case)):
        assert not leasing.keep(quiet, case.kind, late, lease_seconds=60)
        assert not leasing.give_back(quiet, case.kind, late, counted=True)
        assert not leasing.end(quiet, case.kind, late)
        assert now is None or leasing.keep(quiet, case.kind, now, lease_seconds=60)


def test_a_lost_workers_row_is_taken_back_after_the_grace_and_the_third_loss_ends_it(
    quiet: Session, case: Case
) -> None:
    row_id = case.make(quiet, make_caller(quiet))
    must_take(quiet, case, seconds=-2)
    assert reap(quiet) == [], "it may only be late"
    assert take(quiet, case, "two") is None
    quiet.execute(update(case.kind.row).where(case.kind.row.id == row_id).values(lease_until=func.to_timestamp(0)))

    for lost in range(1, MAX_FAILURES + 1):
        assert reap(quiet) == [row_id]
        if lost < MAX_FAILURES:
            assert state(quiet, case, row_id).failures == lost
            must_take(quiet, case, seconds=-60)

    assert take(quiet, case) is None
    assert "cpu" not in waiting.waiting(quiet)


def test_a_restarted_worker_gives_up_what_it_had(quiet: Session, case: Case) -> None:
    row_id = case.make(quiet, make_caller(quiet))
    must_take(quiet, case, "worker_restarted", seconds=3600)
    again = NewWorker(id="worker_restarted", host="h", pool="default", boot_id="b", version="1")

    workers.register(quiet, again, [], leased=chores.leased_rows())

    assert reap(quiet) == [row_id]
    assert must_take(quiet, case, "two").fence > 1


# A job that is settled waits by a column of its own.
@pytest.mark.parametrize("case", [name for name in CASES if name != "job"], indirect=True)
def test_a_postponed_row_waits_its_time_and_no_restart_brings_it_back_sooner(quiet: Session, case: Case) -> None:
    row_id = case.make(quiet, make_caller(quiet))
    assert leasing.postpone(quiet, case.kind, must_take(quiet, case), seconds=600)
    workers.register(
        quiet, NewWorker(id="one", host="h", pool="default", boot_id="b", version="1"), [], leased=chores.leased_rows()
    )

    assert reap(quiet) == []
    assert take(quiet, case) is None
    assert state(quiet, case, row_id).failures == 0


CLAIMS: dict[str, Callable[..., Any]] = {
    "job": moves.claim_validation,
    "preflight": preflights.claim,
    "merge": merges.claim,
    "export": exports.claim,
    "evaluation": evaluations.claim,
}


@pytest.mark.parametrize("name", CLAIMS)
def test_a_row_of_a_newer_version_is_passed_over_and_holds_up_nobody(quiet: Session, name: str) -> None:
    case, caller = CASES[name], make_caller(quiet)
    newer, known = case.make(quiet, caller), case.make(quiet, caller)
    row = state(quiet, case, newer)
    row.request = {**row.request, "invented_later": 1}
    quiet.flush()

    with pytest.raises(WrittenByNewerVersion) as refused, quiet.begin_nested():
        CLAIMS[name](quiet, worker_id="older", lease_seconds=60)
    claim = CLAIMS[name](quiet, worker_id="older", lease_seconds=60, passed_over={refused.value.row_id})

    assert refused.value.row_id == newer
    assert claim.lease.id == known
    row = state(quiet, case, newer)
    assert (row.fence, row.failures, row.lease_until) == (0, 0, None)


# --- long work -------------------------------------------------------------------------------------------------------


def test_long_work_goes_round_the_projects_and_leaves_children_free(quiet: Session) -> None:
    loud, modest = sorted((make_caller(quiet), make_caller(quiet)), key=lambda caller: caller.project_id)
    long = [make_preflight(quiet, loud) for _ in range(3)]
    make_checked(quiet, loud, name="ROWS.CSV")
    make_merge(quiet, loud)
    other = make_preflight(quiet, modest)

    def claim(verb: Callable[..., Any], worker: str = "one", **rest: Any) -> Any:
        return verb(quiet, worker_id=worker, lease_seconds=60, turn=chores.turn(at_most=2, after=""), **rest)

    first = claim(preflights.claim)
    assert first.lease.id == long[0]
    assert claim(file_checks.claim_check, work=file_checks.TABLES) is None, "one of a project at a time"
    assert claim(merges.claim) is None
    second = claim(preflights.claim)
    assert second.lease.id == other
    assert preflights.finish(quiet, first, {"ok": True})
    assert claim(preflights.claim).lease.id == long[1]
    make_preflight(quiet, make_caller(quiet))
    assert claim(preflights.claim) is None, "no third, whosever it is"
    assert claim(preflights.claim, worker="two") is not None, "another worker has children of its own"
    make_checked(quiet, loud)
    assert file_checks.claim_check(quiet, worker_id="one", lease_seconds=60) is not None, "short work goes on"


def test_the_next_project_is_the_one_after_the_last(quiet: Session) -> None:
    callers = sorted((make_caller(quiet) for _ in range(3)), key=lambda caller: caller.project_id)
    for caller in callers:
        for _ in range(2):
            make_preflight(quiet, caller)
    served, last = [], ""
    for _ in range(6):
        turn = chores.turn(at_most=2, after=last)
        claim = preflights.claim(quiet, worker_id="one", lease_seconds=60, turn=turn)
        assert claim is not None
        preflights.finish(quiet, claim, {"ok": True})
        last = claim.project_id
        served.append(last)

    assert served == [caller.project_id for caller in callers] * 2


# --- the worker's side -----------------------------------------------------------------------------------------------


@pytest.fixture
def host(engine: Engine, database_url: str, settings: Settings) -> Iterator[Host]:
    with engine.begin() as connection:
        connection.execute(text(DDL))
    asked = settings.model_copy(update={"database_url": database_url, "redis_url": "", "lease_seconds": 1.0})
    opened = open_host(asked, flags=SharedFlags())
    yield opened
    opened.engine.dispose()
    with engine.begin() as connection:
        connection.execute(text("drop table echoes"))


def hold_echo(host: Host) -> Lease:
    with session_scope(host.engine) as session:
        make_echo(session, make_caller(session))
        return must_take(session, CASES["echo"])


def read_echo(host: Host, lease: Lease) -> EchoRow:
    with Session(host.engine) as session:
        return session.get_one(EchoRow, lease.id)


def test_a_chore_is_a_row_in_a_table_and_a_handler(host: Host, monkeypatch: pytest.MonkeyPatch) -> None:
    heard = []

    def listen(host: Host) -> bool:
        row = host.claim(lambda s, passed_over: leasing.take(s, ECHO, worker_id="w", lease_seconds=60))
        if row is None:
            return False
        heard.append(row.id)
        return under_lease(host, ECHO, ECHO.lease(row), partial(note, ECHO.lease(row)))

    def note(lease: Lease, _watch: LeaseWatch) -> None:
        host.write_in_the_end(lambda s: leasing.end(s, ECHO, lease, heard=True))

    with session_scope(host.engine) as session:
        echo = make_echo(session, make_caller(session))
    for table, value in ((chores.CHORES, Work(ECHO)), (handlers.HANDLERS, listen)):
        for name in list(table):
            monkeypatch.delitem(table, name)
        monkeypatch.setitem(table, "echo", value)

    with Session(host.engine) as session:
        assert "cpu" in waiting.waiting(session)
    assert handlers.do_next(host)
    assert not handlers.do_next(host)
    assert heard == [echo]


def test_every_chore_has_a_handler() -> None:
    assert list(handlers.HANDLERS) == list(chores.CHORES)


def away(*_: object, **__: object) -> Any:
    raise OperationalError("select 1", {}, Exception("the server closed the connection"))


def test_a_database_that_is_away_at_a_heartbeat_ends_nothing(host: Host, monkeypatch: pytest.MonkeyPatch) -> None:
    moments = iter(range(0, 10_000, 1000))
    lease = hold_echo(host)
    watch = LeaseWatch(host, ECHO, lease, clock=lambda: float(next(moments)))
    with monkeypatch.context() as outage:
        outage.setattr(leasing, "keep", away)
        watch.check()

    watch.check()

    with session_scope(host.engine) as session:
        session.execute(update(EchoRow).values(lease_owner="somebody else"))
    with pytest.raises(Stopped):
        watch.check()


def test_a_database_that_is_away_costs_no_try(host: Host) -> None:
    lease = hold_echo(host)

    assert not under_lease(host, ECHO, lease, away)

    row = read_echo(host, lease)
    assert (row.fence, row.failures, row.lease_owner, row.lease_until) == (1, 0, None, None)


def test_a_holder_removes_its_own_folder_and_no_later_ones(host: Host) -> None:
    lease = hold_echo(host)
    own, later = (host.work / lease.id / fence for fence in ("1", "2"))
    for folder in (own, later):
        folder.mkdir(parents=True)

    assert under_lease(host, ECHO, lease, lambda _watch: None)

    assert (own.exists(), later.exists()) == (False, True)
