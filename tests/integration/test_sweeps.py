"""Sweeps on a real database: accepted whole or refused by name, and moved on by rounds while the test is the worker."""

from __future__ import annotations

from collections.abc import Mapping
from datetime import timedelta
from typing import Any

import httpx2
import pytest
from sqlalchemy import func, select, update
from sqlalchemy.orm import Session

from shared.chores import sweep_rounds, sweeps
from shared.chores.sweeps import SeenSweep
from shared.contract.documents import JobProgress
from shared.jobs import moves
from shared.lease.journal import NewEvent
from shared.lease.values import Claim
from shared.store.db import session_scope
from shared.store.tables import ApiKeyRow, AttemptRow, EventRow, JobRow, SweepRow, TrialRow, WorkerRow
from tests.factories import GIB, claim_on, make_file, make_spec, make_worker
from tests.integration.conftest import Api

PATH = "/v1/tunepool/sweeps"
MODEL = "smollm2-135m-instruct"
RATES = "tunepool.training.learning_rate"


def body(api: Api, *, job: Mapping[str, Any] | None = None, **values: Any) -> dict[str, Any]:
    with session_scope(api.engine) as session:
        training, validation = make_file(session, api.caller).id, make_file(session, api.caller).id
    files = {"model": MODEL, "training_file": training, "validation_file": validation}
    return {
        "job": {**files, **(job or {})},
        "parameters": {RATES: [1e-4, 2e-4, 5e-4]},
        "strategy": {"type": "grid"},
        "max_parallel": 8,
        **values,
    }


def post(api: Api, document: dict[str, Any], **headers: str) -> httpx2.Response:
    with api.http(**headers) as http:
        return http.post(PATH, json=document)


def made(api: Api, **values: Any) -> dict[str, Any]:
    answer = post(api, body(api, **values))
    assert answer.status_code == 200, answer.text
    document: dict[str, Any] = answer.json()
    return document


def shown(api: Api, sweep_id: str) -> dict[str, Any]:
    with api.http() as http:
        document: dict[str, Any] = http.get(f"{PATH}/{sweep_id}").json()
    return document


def refusal(answer: httpx2.Response, status: int = 400) -> tuple[str, str]:
    assert answer.status_code == status, answer.text
    error = answer.json()["error"]
    return error["param"], error["message"]


class Player:
    """The worker of a sweep's jobs: it checks, leases, trains as told and ends them."""

    def __init__(self, api: Api, sweep_id: str) -> None:
        self.api, self.sweep_id = api, sweep_id
        self.claims: dict[str, Claim] = {}
        with session_scope(api.engine) as session:
            # The plan gives jobs to any worker that lives: those of other tests do not.
            session.execute(update(WorkerRow).values(last_seen=func.now() - timedelta(days=1)))
            self.worker_id = make_worker(session, devices=16).id

    def round(self) -> dict[str, Any]:
        """One round of the janitor, and the sweep after it."""
        with session_scope(self.api.engine) as session:
            sweep_rounds.advance(session, self.sweep_id, settings=self.api.settings)
        return shown(self.api, self.sweep_id)

    def seen(self, session: Session) -> SeenSweep:
        return sweeps.seen(session, session.get_one(SweepRow, self.sweep_id))

    def start_all(self) -> None:
        """Every waiting job of the sweep runs afterwards."""
        with session_scope(self.api.engine) as session:
            jobs = [job.id for job in self.seen(session).jobs.values() if job.status in {"validating_files", "queued"}]
            session.execute(update(JobRow).where(JobRow.id.not_in(jobs)).values(held=True))
            session.execute(update(JobRow).where(JobRow.id.in_(jobs)).values(held=False))
            for job in self.seen(session).jobs.values():
                if job.status == "validating_files":
                    self.validate(session, job)
            worker = session.get_one(WorkerRow, self.worker_id)
            while claim := claim_on(session, worker):
                self.claims[claim.lease.id] = claim

    def validate(self, session: Session, job: JobRow) -> None:
        """The files are found good, however many other jobs of this database wait for the same."""
        session.execute(
            update(JobRow)
            .where(JobRow.id == job.id)
            .values(status="queued", spec=make_spec().model_dump(mode="json"), bytes_per_device=GIB)
        )

    def look(self, losses: Mapping[int, float | None], *, step: int, full: bool = False) -> None:
        """Each trial comes to `step`, and looks at its validation file unless the loss is None."""
        with session_scope(self.api.engine) as session:
            for trial in self.seen(session).trials:
                if trial.number in losses:
                    self._look(session, trial, losses[trial.number], step=step, full=full)

    def _look(self, session: Session, trial: TrialRow, loss: float | None, *, step: int, full: bool) -> None:
        events = [] if loss is None else [metrics({"step": step, "valid_loss": loss, "full": full})]
        progress = JobProgress(
            step=step + 1, total_steps=100, epoch=0.5, train_loss=1.0, valid_loss=loss, trained_tokens=1,
            seconds_per_step=1.0, seconds_left=1.0,
        )  # fmt: skip
        assert moves.record(session, self.claims[trial.job_id or ""].lease, events, progress=progress)

    def obey(self) -> None:
        """Do what was asked of running jobs: pause and cancel."""
        with session_scope(self.api.engine) as session:
            for job in self.seen(session).jobs.values():
                if job.status == "running" and job.cancel_requested_at is not None:
                    moves.confirm_cancelled(session, self.claims[job.id].lease)
                elif job.status == "running" and job.pause_requested_at is not None:
                    moves.confirm_paused(session, self.claims[job.id].lease)

    def end(self, *numbers: int, failed: bool = False) -> None:
        with session_scope(self.api.engine) as session:
            for trial in self.seen(session).trials:
                if trial.number in numbers:
                    lease = self.claims[trial.job_id or ""].lease
                    manifest = {"prefix": "p", "files": []}
                    ended = (
                        moves.fail(session, lease, code="training_diverged", message="The loss is NaN.")
                        if failed
                        else moves.succeed(session, lease, manifest=manifest)
                    )
                    assert ended

    def events(self, number: int) -> list[str]:
        with session_scope(self.api.engine) as session:
            job_id = self.seen(session).trials[number].job_id
            return list(
                session.scalars(select(EventRow.message).where(EventRow.job_id == job_id).order_by(EventRow.seq))
            )


def metrics(data: dict[str, Any]) -> NewEvent:
    return NewEvent(f"Step {data['step']}", type="metrics", data=data)


@pytest.fixture
def halved(api: Api) -> tuple[Player, dict[str, Any]]:
    """Nine trials that run; they are compared at steps 10 and 30."""
    strategy = {"type": "halving", "trials": 9, "factor": 3, "first_step": 10}
    parameters = {RATES: {"min": 1e-5, "max": 1e-3, "scale": "log"}}
    sweep = made(api, strategy=strategy, parameters=parameters, max_parallel=9)
    player = Player(api, sweep["id"])
    player.start_all()
    return player, sweep


def states(sweep: dict[str, Any]) -> list[str]:
    return [trial["state"] for trial in sweep["trials"]]


def test_a_grid_starts_so_many_at_once_as_ordinary_jobs_of_a_group(api: Api) -> None:
    sweep = made(api, max_parallel=2)

    assert (sweep["object"], sweep["status"], sweep["strategy"], sweep["better"]) == (
        "tunepool.sweep", "running", "grid", "lower",
    )  # fmt: skip
    assert states(sweep) == ["started", "started", "planned"]
    assert [trial["parameters"] for trial in sweep["trials"]] == [{RATES: rate} for rate in (1e-4, 2e-4, 5e-4)]
    with session_scope(api.engine) as session:
        job = session.get_one(JobRow, sweep["trials"][1]["job"])
        assert (job.group_name, job.seed) == (sweep["id"], 0)
        assert job.job_metadata == {"tunepool_sweep": sweep["id"], "tunepool_trial": "1"}
        assert job.request["tunepool"]["training"]["learning_rate"] == 2e-4


def test_rounds_keep_the_number_at_work_and_the_best_of_a_grid_is_named(api: Api) -> None:
    sweep = made(api, max_parallel=2)
    player = Player(api, sweep["id"])
    player.start_all()
    player.look({0: 2.0, 1: 1.5}, step=10)
    assert states(player.round()) == ["started", "started", "planned"]
    player.end(0)
    assert states(player.round()) == ["succeeded", "started", "started"]
    player.start_all()
    player.look({2: 1.7}, step=10)
    player.look({2: 1.6}, step=20, full=True)
    player.end(1, 2)

    ended = player.round()

    assert (ended["status"], ended["best"], states(ended)) == ("succeeded", 1, ["succeeded"] * 3)
    assert [trial["value"] for trial in ended["trials"]] == [2.0, 1.5, 1.6]
    assert ended["trials"][2]["looks"] == [[10, 1.7], [20, 1.6]]
    assert ended["trials"][1]["model"].startswith("ft:")
    assert ended["finished_at"] is not None


def test_halving_keeps_the_best_third_at_equal_steps_and_says_why_the_others_stopped(
    halved: tuple[Player, dict[str, Any]],
) -> None:
    player, sweep = halved
    assert sweep["rungs"] == [10, 30]
    player.look({number: 1.0 + number / 10 for number in range(8)}, step=10)
    player.round()
    player.obey()
    waiting = player.round()
    assert [trial["job_status"] for trial in waiting["trials"]] == ["paused"] * 8 + ["running"]
    assert "waits there for the other trials" in player.events(0)[-2]

    player.look({8: 1.05}, step=10)
    compared = player.round()

    assert [trial["rung"] for trial in compared["trials"]] == [1, 1, 0, 0, 0, 0, 0, 0, 1]
    assert states(compared) == ["started", "started", *["stopped"] * 6, "started"]
    assert compared["trials"][2]["reason"] == "rank 4 of 9 at step 10 (valid_loss 1.2)"
    assert player.events(2)[-1] == f"Stopped by sweep {sweep['id']}: rank 4 of 9 at step 10 (valid_loss 1.2)"
    assert [compared["trials"][number]["job_status"] for number in (0, 1, 8)] == ["queued", "queued", "running"]

    player.start_all()
    player.look({0: 0.9, 1: 0.8, 8: 0.7}, step=30)
    compared = player.round()
    assert [trial["rung"] for trial in compared["trials"]][8] == 2
    player.obey()
    player.look({8: 0.6}, step=60, full=True)
    player.end(8)
    ended = player.round()
    assert (ended["status"], ended["best"]) == ("succeeded", 8)
    assert states(ended) == [*["stopped"] * 8, "succeeded"]
    assert ended["trials"][0]["reason"] == "rank 3 of 3 at step 30 (valid_loss 0.9)"


def test_a_trial_without_a_value_or_with_a_failed_job_is_behind_all_others(
    halved: tuple[Player, dict[str, Any]],
) -> None:
    player, _ = halved
    player.look({0: None}, step=10)  # it has passed the step and told nothing
    player.end(1, failed=True)
    player.look(dict.fromkeys(range(2, 9), 2.0), step=10)

    compared = player.round()

    assert compared["trials"][1]["state"] == "failed"
    assert compared["trials"][0]["reason"] == "rank 8 of 8 at step 10 (no value)"
    assert [trial["number"] for trial in compared["trials"] if trial["rung"] == 1] == [2, 3, 4]  # equal: the first


def test_nothing_is_started_beyond_the_budget_and_what_runs_runs_to_its_end(api: Api) -> None:
    sweep = made(api, max_parallel=2, budget_device_seconds=50)
    player = Player(api, sweep["id"])
    player.start_all()
    with session_scope(api.engine) as session:
        job_id = sweep["trials"][0]["job"]
        session.execute(
            update(AttemptRow).where(AttemptRow.job_id == job_id).values(started_at=func.now() - timedelta(seconds=60))
        )

    spent = player.round()

    assert states(spent) == ["started", "started", "stopped"]
    assert spent["closed"].startswith("The budget of 50 device-seconds is used up: 6")
    assert spent["device_seconds"] >= 60
    assert spent["trials"][2]["job"] is None
    player.look({0: 1.0, 1: 2.0}, step=10)
    player.end(0, 1)
    assert (player.round()["status"], player.round()["best"]) == ("succeeded", 0)


def test_a_sweep_of_which_nothing_succeeds_has_failed(api: Api) -> None:
    sweep = made(api)
    player = Player(api, sweep["id"])
    player.start_all()
    player.end(0, 1, 2, failed=True)

    ended = player.round()

    assert (ended["status"], ended["best"], ended["error"]["code"]) == ("failed", None, "sweep_without_result")


def test_cancel_ends_what_waits_at_once_and_asks_what_runs(api: Api) -> None:
    sweep = made(api, max_parallel=2)
    player = Player(api, sweep["id"])
    player.start_all()
    with api.http() as http:
        ended = http.post(f"{PATH}/{sweep['id']}/cancel").json()
        again = http.post(f"{PATH}/{sweep['id']}/cancel")
        late = http.post(f"{PATH}/{sweep['id']}/pause")

    assert (ended["status"], states(ended), again.status_code) == ("cancelled", ["cancelled"] * 3, 200)
    assert late.json()["error"]["code"] == "sweep_over"
    assert f"Cancelled with sweep {sweep['id']}; stopping the trainer" in player.events(0)
    assert states(player.round()) == ["cancelled"] * 3


def test_a_paused_sweep_starts_nothing_until_it_is_resumed(api: Api) -> None:
    sweep = made(api, max_parallel=1)
    player = Player(api, sweep["id"])
    player.start_all()
    with api.http() as http:
        assert http.post(f"{PATH}/{sweep['id']}/pause").json()["status"] == "paused"
    player.end(0)
    assert states(player.round()) == ["started", "planned", "planned"]
    with api.http() as http:
        assert http.post(f"{PATH}/{sweep['id']}/resume").json()["status"] == "running"
    assert states(player.round()) == ["succeeded", "started", "planned"]


def test_a_trial_that_somebody_pauses_leaves_its_place_to_the_next_and_the_sweep_says_what_it_waits_for(
    api: Api,
) -> None:
    sweep = made(api, max_parallel=1)
    player = Player(api, sweep["id"])
    player.start_all()
    job = sweep["trials"][0]["job"]
    with api.http() as http:
        http.post(f"/v1/fine_tuning/jobs/{job}/pause").raise_for_status()
    player.obey()

    held_up = player.round()

    assert states(held_up) == ["started", "started", "planned"]
    assert held_up["detail"].startswith("Trial 0 paused, not by the sweep.")
    assert held_up["detail"].endswith(job)
    with api.http() as http:
        http.post(f"/v1/fine_tuning/jobs/{job}/resume").raise_for_status()
    assert player.round()["detail"] is None


def test_a_full_queue_postpones_trials_and_says_so(api: Api) -> None:
    with session_scope(api.engine) as session:
        waiting = session.scalar(
            select(func.count()).where(
                JobRow.key_id == api.caller.key_id, JobRow.status.in_(["queued", "validating_files"])
            )
        )
        session.execute(update(ApiKeyRow).where(ApiKeyRow.id == api.caller.key_id).values(max_queued=waiting + 1))
    try:
        sweep = made(api)
    finally:
        with session_scope(api.engine) as session:
            session.execute(update(ApiKeyRow).where(ApiKeyRow.id == api.caller.key_id).values(max_queued=None))

    assert states(sweep) == ["started", "planned", "planned"]
    assert "its limit is" in sweep["detail"]
    later = Player(api, sweep["id"]).round()
    assert (states(later), later["detail"]) == (["started"] * 3, None)


def test_rounds_that_meet_make_no_second_job(api: Api) -> None:
    sweep = made(api, max_parallel=1)
    player = Player(api, sweep["id"])
    player.start_all()
    player.end(0)
    with session_scope(api.engine) as first:
        sweep_rounds.advance(first, sweep["id"], settings=api.settings)
        assert states(player.round()) == ["started", "planned", "planned"]  # it passed by, and saw nothing

    with session_scope(api.engine) as session:
        jobs = session.scalars(select(JobRow.id).where(JobRow.group_name == sweep["id"])).all()
    assert len(jobs) == 2
    assert {trial["job"] for trial in shown(api, sweep["id"])["trials"]} == {*jobs, None}


def test_the_same_idempotency_key_makes_one_sweep_and_never_another(api: Api) -> None:
    document = body(api)
    header = {"Idempotency-Key": "sweep-once"}

    first, second = (post(api, document, **header).json()["id"] for _ in range(2))

    assert first == second
    other = post(api, {**document, "seed": 7}, **header)
    assert (other.status_code, other.json()["error"]["code"]) == (422, "idempotency_key_reused")


def test_a_sweep_is_listed_without_trials_and_a_strangers_is_not_found(api: Api, stranger: str) -> None:
    sweep = made(api, name="rates", metadata={"team": "a"})
    with api.http() as http:
        listed = http.get(PATH).json()["data"][0]
    assert (listed["id"], listed["name"], listed["metadata"]) == (sweep["id"], "rates", {"team": "a"})
    assert listed["trial_counts"] == {"started": 3}
    assert "trials" not in listed
    with api.http(stranger) as http:
        assert http.get(f"{PATH}/{sweep['id']}").status_code == 404
        assert http.post(f"{PATH}/{sweep['id']}/cancel").status_code == 404
        assert http.get(PATH).json()["data"] == []


@pytest.mark.parametrize(
    ("values", "param", "words"),
    [
        ({"parameters": {"tunepool.training.learning_rat": [1]}}, "tunepool.training.learning_rat", "Trial 0"),
        ({"parameters": {RATES: [1e-4, 7.0]}}, RATES, f"Trial 1 ({RATES} = 7)"),
        (
            {"parameters": {"hyperparameters.n_epochs": [1, 99]}},
            "method.supervised.hyperparameters.n_epochs",
            "Trial 1",
        ),
        (
            {"parameters": {"tunepool.adapter.method": ["qlora", "full"], "tunepool.adapter.r": [8]}},
            "tunepool.adapter.r",
            "Trial 1",
        ),
        ({"parameters": {"model": ["a"]}}, "parameters.model", ""),
        ({"parameters": {"tunepool.queue.priority": [1]}}, "parameters.tunepool.queue.priority", "cannot be swept"),
        ({"parameters": {RATES: {"min": 1e-4, "max": 1e-3}}}, f"parameters.{RATES}", "points"),
        ({"parameters": {"seed": list(range(17)), RATES: [n / 100 for n in range(1, 18)]}}, "parameters", "289 trials"),
        ({"job": {"validation_file": None}}, "job.validation_file", "missing"),
        ({"job": {"tunepool": {"queue": {"group": "g"}}}}, "job.tunepool.queue.group", "group of their own"),
        ({"measure": "exact_match"}, "measure", "generate.measures"),
        (
            {
                "job": {"tunepool": {"training": {"eval": {"steps": 7}}}},
                "strategy": {"type": "halving", "first_step": 10},
            },
            "job.tunepool.training.eval.steps",
            "divisor",
        ),
    ],
)
def test_a_sweep_is_refused_whole_before_anything_starts(
    api: Api, values: dict[str, Any], param: str, words: str
) -> None:
    with session_scope(api.engine) as session:
        before = session.scalar(select(func.count()).select_from(JobRow))

    named, message = refusal(post(api, body(api, **values)))

    assert named == param, message
    assert words in message
    with session_scope(api.engine) as session:
        assert session.scalar(select(func.count()).select_from(JobRow)) == before


def test_a_revoked_key_starts_nothing_more(api: Api) -> None:
    sweep = made(api, max_parallel=1)
    player = Player(api, sweep["id"])
    player.start_all()
    player.look({0: 1.0}, step=10)
    player.end(0)
    with session_scope(api.engine) as session:
        session.execute(update(ApiKeyRow).where(ApiKeyRow.id == api.caller.key_id).values(revoked_at=func.now()))
        sweep_rounds.advance(session, sweep["id"], settings=api.settings)
        session.execute(update(ApiKeyRow).where(ApiKeyRow.id == api.caller.key_id).values(revoked_at=None))
    ended = player.round()
    assert (ended["status"], states(ended)) == ("succeeded", ["succeeded", "stopped", "stopped"])
    assert "revoked" in ended["trials"][1]["reason"]
