"""A dispatcher between a real Postgres and a Slurm that lies, delays, forgets and fails."""

from __future__ import annotations

import json
import random
from collections.abc import Iterator
from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import Engine, func, select, text, update
from sqlalchemy.orm import Session

from api.views import queue_views
from shared.contract.spec import Placement
from shared.jobs import moves
from shared.jobs.cluster_attempts import attempt_name, read_name
from shared.lease.values import Claim
from shared.settings import Settings
from shared.store.db import session_scope
from shared.store.tables import AttemptRow, DeviceRow, EventRow, JobRow
from shared.tenants.keys import Caller
from tests.factories import GIB, make_caller, make_queued_job, verdict_of
from tests.fake_kubernetes import TOKEN, api_server
from tests.fake_slurm import FakeJob, FakeSlurm
from tests.invariants import broken
from worker.attempt.cluster_places import ClusterPresence
from worker.attempt.dispatcher import MISSES, Dispatcher
from worker.attempt.kubernetes import Kubernetes
from worker.attempt.slurm import Slurm


@dataclass
class Site:
    """A pool whose only devices are in a Slurm cluster."""

    engine: Engine
    settings: Settings
    caller: Caller
    slurm: FakeSlurm = field(default_factory=FakeSlurm)
    now: float = 1000.0

    def __post_init__(self) -> None:
        self.begin()

    def restart(self) -> None:
        """The dispatcher dies without a word, and another one starts in its place."""
        self.close()
        self.begin()

    def close(self) -> None:
        self.dispatcher.close()
        self.standing.close()

    def begin(self) -> None:
        self.standing = ClusterPresence(self.settings)
        self.standing.report()
        cluster = Slurm(self.settings, run=self.slurm)
        self.dispatcher = Dispatcher(self.settings, cluster, self.standing, clock=lambda: self.now)

    def look(self, times: int = 1) -> None:
        for _ in range(times):
            self.dispatcher.look()

    def queue(self, **values: Any) -> str:
        with session_scope(self.engine) as session:
            return make_queued_job(session, self.caller, **values).id

    def job(self, job_id: str) -> JobRow:
        with Session(self.engine) as session:
            return session.get_one(JobRow, job_id)

    def attempts(self, job_id: str) -> list[AttemptRow]:
        with Session(self.engine) as session:
            rows = select(AttemptRow).where(AttemptRow.job_id == job_id).order_by(AttemptRow.number)
            return list(session.scalars(rows))

    def state(self, job_id: str) -> queue_views.QueueState | None:
        return queue_views.cluster_state(self.job(job_id), self.attempts(job_id))

    def detail(self, job_id: str) -> str:
        state = self.state(job_id)
        assert state is not None
        assert state.blocked_by == "CLUSTER"
        return state.detail

    def slurm_job(self, job_id: str, number: int = 1) -> FakeJob:
        (job,) = self.slurm.of(attempt_name(job_id, number))
        return job

    def start(self, job_id: str, number: int = 1) -> Claim | None:
        """What the process that Slurm starts does first."""
        self.slurm.begin(self.slurm.of(attempt_name(job_id, number))[0])
        return self.take_over(attempt_name(job_id, number))

    def take_over(self, name: str, worker_id: str = "worker_node") -> Claim | None:
        with session_scope(self.engine) as session:
            return moves.take_over(session, name, worker_id=worker_id, host="gpu-node-7", lease_seconds=60)

    def age(self, job_id: str, **by: float) -> None:
        with session_scope(self.engine) as session:
            session.execute(
                update(AttemptRow)
                .where(AttemptRow.job_id == job_id)
                .values(started_at=AttemptRow.started_at - timedelta(**by))
            )

    def submissions(self) -> int:
        return sum(call[0] == "sbatch" for call in self.slurm.asked)


@pytest.fixture
def site(engine: Engine, database_url: str, tmp_path: Path) -> Iterator[Site]:
    settings = Settings(
        home=tmp_path / "home",
        database_url=database_url,
        redis_url="",
        launcher="slurm",
        cluster_nodes=2,
        cluster_node_devices=2,
        cluster_device_bytes=80 * GIB,
        cluster_device_capability=90,
        backoff_base_seconds=0.0,
    )
    with session_scope(engine) as session:
        caller = make_caller(session)
    made = Site(engine, settings, caller)
    yield made
    made.close()
    with session_scope(engine) as session:
        # What these tests publish are no files.
        still_broken = [line for line in broken(session) if not line.startswith("I5")]
        session.execute(text("truncate jobs, devices, workers cascade"))
    assert still_broken == []


# ---- submission


def test_an_admitted_attempt_becomes_one_job_of_slurm_and_its_wait_is_told_in_slurms_words(site: Site) -> None:
    job_id = site.queue()

    site.look()
    site.slurm.wait("Resources")
    site.look(3)

    assert site.job(job_id).status == "running"
    assert site.slurm_job(job_id).options["--gres"] == "gpu:1"
    assert site.submissions() == 1
    assert site.detail(job_id) == "Slurm: job 1001 is PENDING (Resources)"


def test_no_more_is_admitted_than_the_places_of_the_cluster_and_a_job_stays_on_one_node(site: Site) -> None:
    jobs = [site.queue(placement=Placement(strategy="ddp", gpus=2)) for _ in range(3)]

    site.look(2)

    assert [site.job(job_id).status for job_id in jobs] == ["running", "running", "queued"]
    assert site.slurm_job(jobs[0]).options["--gres"] == "gpu:2"
    hosts = [{device.partition(":")[0] for device in site.attempts(job_id)[0].device_ids} for job_id in jobs[:2]]
    assert [len(names) for names in hosts] == [1, 1]


def test_a_job_over_several_hosts_is_not_given_to_a_cluster_and_is_told_what_it_needs(site: Site) -> None:
    job_id = site.queue(placement=Placement(strategy="ddp", gpus=2, nodes=2))

    site.look()

    assert site.submissions() == 0
    with Session(site.engine) as session:
        verdict = verdict_of(session, job_id)
    assert verdict is not None
    assert verdict.blocked_by == "NO_FIT_DEVICE"
    assert "a worker of its own on each host" in verdict.detail


def test_a_dispatcher_that_starts_again_finds_its_submissions_instead_of_doubling_them(site: Site) -> None:
    job_id = site.queue()
    site.look()

    site.restart()
    site.look(2)

    assert site.submissions() == 1
    assert site.detail(job_id) == "Slurm: job 1001 is PENDING (Priority)"
    assert site.start(job_id) is not None


def test_a_submission_whose_answer_is_lost_is_found_by_its_name(site: Site) -> None:
    site.slurm.weather["sbatch"] = "lost"
    job_id = site.queue()
    site.look()
    assert "sbatch gave no answer" in site.detail(job_id)
    site.slurm.weather.clear()

    site.look(2)

    assert site.submissions() == 1
    assert site.detail(job_id) == "Slurm: job 1001 is PENDING (Priority)"


def test_a_submission_that_never_arrived_is_made_again(site: Site) -> None:
    site.slurm.weather["sbatch"] = "down"
    job_id = site.queue()
    site.look()
    assert "does not answer and is asked again" in site.detail(job_id)
    assert site.slurm.jobs == {}
    site.slurm.weather.clear()

    site.look()

    assert site.slurm_job(job_id).state == "PENDING"


def test_of_two_jobs_by_one_name_the_second_is_withdrawn(site: Site) -> None:
    job_id = site.queue()
    site.look()
    twin = site.slurm_job(job_id)
    site.slurm.jobs[1002] = FakeJob(1002, twin.name, twin.script, twin.options)

    site.look()

    assert [job.state for job in site.slurm.of(twin.name)] == ["PENDING", "CANCELLED by 1000"]


def test_a_refusal_is_told_and_asked_again_and_costs_a_try_only_when_it_lasts(site: Site) -> None:
    site.slurm.weather["sbatch"] = "refuse Batch job submission failed: Invalid qos specification"
    job_id = site.queue()
    site.look(2)
    assert site.detail(job_id).startswith("Slurm refuses it and is asked again: sbatch: error: Batch job")
    assert site.submissions() == 2

    site.now += site.settings.cluster_start_seconds + 1
    site.look()

    job, attempt = site.job(job_id), site.attempts(job_id)[0]
    assert (attempt.outcome, attempt.error["code"]) == ("crashed", "cluster_refused")
    assert "Invalid qos" in attempt.error["message"]
    assert job.failures == 1


# ---- the handover


def test_the_process_that_slurm_starts_takes_exactly_that_attempt_and_the_fence_grows(site: Site) -> None:
    job_id = site.queue()
    site.look()
    before = site.job(job_id).fence

    claim = site.start(job_id)

    assert claim is not None
    job, (attempt,) = site.job(job_id), site.attempts(job_id)
    assert (job.fence, job.lease_owner) == (before + 1, "worker_node")
    assert (claim.lease.fence, claim.lease.attempt) == (before + 1, 1)
    assert (attempt.fence, attempt.phase, attempt.worker_id) == (before + 1, "leased", "worker_node")
    with Session(site.engine) as session:
        assert session.scalars(select(DeviceRow.fence).where(DeviceRow.leased_by == job_id)).all() == [before + 1]
        assert broken(session) == []
    assert site.state(job_id) is None


def test_a_second_process_of_the_same_attempt_finds_it_taken(site: Site) -> None:
    job_id = site.queue()
    site.look()
    assert site.start(job_id) is not None

    assert site.take_over(attempt_name(job_id, 1), worker_id="worker_twin") is None
    assert site.job(job_id).lease_owner == "worker_node"


@pytest.mark.parametrize("name", ["tunepool-ftjob-0-1", "nonsense", "tunepool-ftjob-0-0"])
def test_an_attempt_that_nobody_knows_is_not_taken(site: Site, name: str) -> None:
    assert site.take_over(name) is None


def test_after_the_handover_nothing_that_the_dispatcher_does_reaches_the_attempt(site: Site) -> None:
    job_id = site.queue()
    site.look()
    (stale,) = site.dispatcher._submitted()
    assert site.start(job_id) is not None
    row = site.job(job_id)

    assert not site.dispatcher._end(stale, "It is said to have ended.", "crashed")
    site.dispatcher._tell(stale, "It waits.")
    site.standing.report()
    site.look(2)

    after = site.job(job_id)
    assert (after.status, after.fence, after.version, after.lease_until) == (
        row.status,
        row.fence,
        row.version,
        row.lease_until,
    )
    assert site.slurm_job(job_id).state == "RUNNING"


def test_nobody_pays_for_a_clusters_queue(site: Site) -> None:
    job_id = site.queue()
    site.look()
    site.age(job_id, hours=5)
    claim = site.start(job_id)
    assert claim is not None

    with session_scope(site.engine) as session:
        moves.give_back(
            session, claim.lease, outcome="preempted", code="preempted", message="…", settings=site.settings
        )

    assert site.job(job_id).device_seconds == pytest.approx(0, abs=5)


# ---- the cluster is away


def test_while_slurmctld_is_away_the_lease_is_kept_and_everybody_hears_why_nothing_moves(site: Site) -> None:
    job_id = site.queue()
    site.look()
    site.slurm.weather = dict.fromkeys(("sbatch", "squeue", "sacct", "scancel"), "down")
    waiting = site.queue()
    with session_scope(site.engine) as session:
        session.execute(update(JobRow).where(JobRow.id == job_id).values(lease_until=func.now()))

    site.look(5)
    site.standing.report()

    assert site.detail(job_id).startswith("Slurm does not answer and is asked again: slurm_load_jobs error")
    assert site.job(waiting).status == "queued"  # its place in our order is kept
    with session_scope(site.engine) as session:
        assert moves.reap(session, settings=site.settings) == []
    site.slurm.weather.clear()
    site.look()
    assert site.detail(job_id) == "Slurm: job 1001 is PENDING (Priority)"
    assert site.slurm_job(waiting).state == "PENDING"


def test_a_list_that_is_empty_by_mistake_ends_nothing_while_the_books_know_better(site: Site) -> None:
    job_id = site.queue()
    site.look()
    site.slurm.weather["squeue"] = "empty"

    site.look(10)

    assert "job 1001 is PENDING, says sacct" in site.detail(job_id)
    assert site.submissions() == 1
    assert site.start(job_id) is not None


@pytest.mark.parametrize("books", ["", "refuse Slurm accounting storage is disabled"])
def test_what_slurm_has_forgotten_is_given_back_after_several_looks_and_tried_again(site: Site, books: str) -> None:
    job_id = site.queue()
    site.look()
    site.slurm.jobs.clear()
    site.slurm.weather["sacct"] = books

    site.look(MISSES - 1)
    assert site.job(job_id).status == "running"
    assert "does not list job 1001" in site.detail(job_id)
    site.look()

    first, second = site.attempts(job_id)
    assert (first.outcome, first.error["code"]) == ("crashed", "cluster_forgot")
    assert second.ended_at is None
    assert site.take_over(attempt_name(job_id, 1)) is None  # it was there all the same: nothing runs twice
    assert site.slurm_job(job_id, 2).state == "PENDING"


# ---- how it ends before it began


@pytest.mark.parametrize("weather", ["", "down"])
def test_a_cancel_of_what_waits_there_is_done_at_once_and_reaches_slurm_when_it_answers(
    site: Site, weather: str
) -> None:
    job_id = site.queue()
    site.look()
    site.age(job_id, hours=2)
    with session_scope(site.engine) as session:
        moves.request_cancel(session, job_id, project_id=site.caller.project_id)
    assert site.start(job_id) is None  # not even if it starts this moment
    site.slurm.jobs[1001].state = "PENDING"
    site.slurm.weather = dict.fromkeys(("sbatch", "squeue", "scancel"), weather)

    site.look()

    job = site.job(job_id)
    assert (job.status, job.device_seconds) == ("cancelled", 0)
    site.slurm.weather.clear()
    site.look()
    assert site.slurm_job(job_id).state == "CANCELLED by 1000"


def test_a_pause_and_a_preemption_of_what_waits_there_take_it_back(site: Site) -> None:
    paused, preempted = site.queue(), site.queue()
    site.look()
    with session_scope(site.engine) as session:
        moves.request_pause(session, paused, project_id=site.caller.project_id)
        session.execute(update(JobRow).where(JobRow.id == preempted).values(preempt_requested_at=func.now()))

    site.look()

    assert site.job(paused).status == "paused"
    assert [site.slurm.of(attempt_name(job_id, 1))[0].state for job_id in (paused, preempted)] == [
        "CANCELLED by 1000"
    ] * 2
    first, second = site.attempts(preempted)
    assert (first.outcome, site.job(preempted).failures) == ("preempted", 0)
    assert second.phase == "submitted"


@pytest.mark.parametrize(
    ("state", "outcome", "failures"),
    [("PREEMPTED", "preempted", 0), ("NODE_FAIL", "crashed", 1), ("FAILED", "crashed", 1), ("TIMEOUT", "crashed", 1)],
)
def test_what_slurm_ends_before_its_worker_reports_is_tried_again(
    site: Site, state: str, outcome: str, failures: int
) -> None:
    job_id = site.queue()
    site.look()
    job = site.slurm_job(job_id)
    site.slurm.begin(job)
    site.slurm.end(job, state, code="127:0")

    site.look()

    attempt = site.attempts(job_id)[0]
    assert (attempt.outcome, site.job(job_id).failures) == (outcome, failures)
    assert f"job 1001 was {state} on gpu-node-7" in attempt.error["message"]
    assert site.slurm_job(job_id, 2).state == "PENDING"


def test_a_job_that_slurm_runs_and_whose_worker_never_reports_is_ended_there_and_tried_again(site: Site) -> None:
    job_id = site.queue()
    site.look()
    site.slurm.begin(site.slurm_job(job_id))
    site.look()
    assert site.detail(job_id) == "Slurm: job 1001 is RUNNING on gpu-node-7; its worker starts"

    site.now += site.settings.cluster_start_seconds + 1
    site.look()

    assert site.attempts(job_id)[0].error["code"] == "cluster_start_failed"
    assert site.slurm_job(job_id).state == "CANCELLED by 1000"


def test_a_dispatcher_that_stays_away_costs_no_try_and_what_it_left_is_swept_up_by_the_next(site: Site) -> None:
    job_id = site.queue()
    site.look()
    site.age(job_id, hours=3)
    with session_scope(site.engine) as session:
        session.execute(update(JobRow).where(JobRow.id == job_id).values(lease_until=func.to_timestamp(0)))
        assert moves.reap(session, settings=site.settings) == [job_id]

    job, attempt = site.job(job_id), site.attempts(job_id)[0]
    assert (job.status, job.failures, job.device_seconds) == ("queued", 0, 0)
    assert (attempt.outcome, attempt.error["code"]) == ("drained", "dispatcher_lost")
    assert site.start(job_id) is None
    site.slurm.jobs[1001].state = "PENDING"
    site.restart()
    site.look()
    assert site.slurm_job(job_id).state == "CANCELLED by 1000"
    assert site.slurm_job(job_id, 2).state == "PENDING"


def test_the_jobs_of_another_installation_of_the_same_user_are_left_alone(site: Site) -> None:
    name = attempt_name("ftjob-ffff", 1)
    site.slurm.jobs[7] = FakeJob(7, name, "#!/bin/sh", {})

    site.look(3)

    assert site.slurm.jobs[7].state == "PENDING"


# ---- Kubernetes in Slurm's place


def test_a_job_of_kubernetes_waits_in_kueues_words_and_is_handed_over_or_deleted_by_a_cancel(
    site: Site, tmp_path: Path
) -> None:
    (tmp_path / "token").write_text(TOKEN)
    (tmp_path / "job.json").write_text(
        json.dumps({"kind": "Job", "spec": {"template": {"spec": {"containers": [{"image": "tunepool-worker"}]}}}})
    )
    with api_server() as fake:
        values = {"kubernetes_url": fake.url, "kubernetes_namespace": "ml", "kubernetes_queue": "training"}
        settings = site.settings.model_copy(update={**values, "kubernetes_job": tmp_path / "job.json"})
        site.dispatcher.close()
        cluster = Kubernetes(settings, account=tmp_path)
        site.dispatcher = Dispatcher(settings, cluster, site.standing, clock=lambda: site.now)
        trained, cancelled = site.queue(), site.queue()
        fake.lost = True
        site.look()  # nothing is admitted while nobody answers
        assert fake.jobs == {}
        fake.lost = False

        site.look(2)
        assert site.detail(trained) == "Kubernetes: Kueue has not admitted it: no workload of it says why"
        version = site.job(trained).version
        site.look(2)
        assert site.job(trained).version == version  # what is no news is not written

        name = attempt_name(trained, 1)
        fake.jobs[name]["spec"]["suspend"] = False
        fake.pod(name, "Running")
        site.look()
        assert site.detail(trained) == "Kubernetes: its pod is Running on gpu-node-7; its worker starts"
        assert site.take_over(name) is not None
        with session_scope(site.engine) as session:
            moves.request_cancel(session, cancelled, project_id=site.caller.project_id)
        site.look()

    assert site.job(cancelled).status == "cancelled"
    assert site.job(trained).lease_owner == "worker_node"
    assert list(fake.jobs) == [name]


# ---- everything at once


@pytest.mark.parametrize("seed", range(2))
def test_whatever_slurm_does_no_attempt_is_taken_twice_and_every_job_comes_to_its_end(site: Site, seed: int) -> None:
    chance = random.Random(seed)
    jobs = [site.queue() for _ in range(5)]
    taken: list[tuple[str, int]] = []
    running: list[Claim] = []

    def weather() -> dict[str, str]:
        kinds = {"sbatch": ("down", "hang", "lost", "garbage"), "squeue": ("down", "empty", "garbage")}
        kinds |= {"sacct": ("down", "empty"), "scancel": ("down", "hang")}
        return {program: chance.choice(ways) for program, ways in kinds.items() if chance.random() < 0.4}

    def cluster_moves() -> None:
        for job in list(site.slurm.jobs.values()):
            which = read_name(job.name)
            if job.state == "PENDING" and which is not None and chance.random() < 0.3:
                site.slurm.begin(job)
                claim = site.take_over(job.name, worker_id=f"worker_{job.number}") if chance.random() < 0.8 else None
                if claim is not None:
                    taken.append(which)
                    running.append(claim)
                else:
                    site.slurm.end(job, chance.choice(["FAILED", "PREEMPTED", "NODE_FAIL", "COMPLETED"]))

    for turn in range(30):
        site.slurm.weather = weather() if turn < 18 else {}
        if chance.random() < 0.1:
            site.restart()
        site.look()
        cluster_moves()
        if running and chance.random() < 0.5:
            with session_scope(site.engine) as session:
                moves.succeed(session, running.pop().lease, manifest={"prefix": "p", "files": []})

    assert len(taken) == len(set(taken)), "an attempt was taken twice"
    with session_scope(site.engine) as session:
        for claim in running:
            moves.fail(session, claim.lease, code="c", message="The test is over.")
    assert {site.job(job_id).status for job_id in jobs} <= {"succeeded", "failed"}


def test_the_events_of_a_job_say_where_the_cluster_started_it(site: Site) -> None:
    job_id = site.queue()
    site.look()
    site.start(job_id)

    with Session(site.engine) as session:
        noted = session.scalars(select(EventRow.message).where(EventRow.job_id == job_id).order_by(EventRow.seq)).all()
    assert noted[-1] == "The cluster started it on gpu-node-7"
