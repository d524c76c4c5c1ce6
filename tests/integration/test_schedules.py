"""Schedules: made by the rules of a job, run once for each moment, and told in words when they start nothing."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import Any

import httpx2
import pytest
from sqlalchemy import func, select, update
from sqlalchemy.orm import Session
from tunepool import main
from typer.testing import CliRunner

from shared.chores import schedules
from shared.ids import new_id
from shared.settle.catalogue import SMOLLM2
from shared.store.db import session_scope
from shared.store.tables import (
    ApiKeyRow,
    AuditRow,
    DeliveryRow,
    FileRow,
    JobRow,
    ScheduleRow,
    ScheduleRunRow,
    WebhookRow,
)
from tests.factories import make_file, make_key
from tests.integration.conftest import Api
from tests.patience import patience
from tests.servers import ROOT
from worker.janitor import Janitor

MODEL = SMOLLM2.ref.name
PATH = "/v1/tunepool/schedules"


@pytest.fixture(scope="module")
def http(api: Api) -> Iterator[httpx2.Client]:
    with api.http() as client:
        yield client


class OwnJanitor(Janitor):
    def close(self) -> None:
        self._engine.dispose()


@contextmanager
def a_janitor(api: Api) -> Iterator[Janitor]:
    own = OwnJanitor(api.settings)
    try:
        yield own
    finally:
        own.close()


def keep_time(api: Api) -> None:
    with a_janitor(api) as own:
        own.keep_time()


@pytest.fixture
def janitor(api: Api) -> Iterator[Janitor]:
    """Nothing else is due: what other tests have left is deleted."""
    with session_scope(api.engine) as session:
        session.execute(update(ScheduleRow).values(deleted_at=func.now()))
    with a_janitor(api) as own:
        yield own


def file(api: Api, **values: Any) -> str:
    with session_scope(api.engine) as session:
        return make_file(session, api.caller, sha256=new_id(""), **values).id


def body(**values: Any) -> dict[str, Any]:
    return {"name": new_id("s-")[:30], "cron": "30 2 * * *", "time_zone": "Europe/Berlin", **values}


def make(http: httpx2.Client, **values: Any) -> dict[str, Any]:
    answer = http.post(PATH, json=body(**values))
    assert answer.status_code == 200, answer.text
    schedule: dict[str, Any] = answer.json()
    return schedule


def nightly(api: Api, http: httpx2.Client, **values: Any) -> dict[str, Any]:
    return make(http, job={"model": MODEL, "training_file": file(api)}, **values)


def watching(api: Api, http: httpx2.Client, prefix: str, **values: Any) -> dict[str, Any]:
    return make(http, cron=None, data_prefix=prefix, job={"model": MODEL}, **values)


def let_be_due(api: Api, schedule: dict[str, Any], *, ago: timedelta = timedelta(minutes=1)) -> None:
    with session_scope(api.engine) as session:
        due = update(ScheduleRow).where(ScheduleRow.id == schedule["id"])
        session.execute(due.values(next_at=func.date_trunc("second", func.now() - ago)))


def end_jobs(api: Api, status: str = "failed") -> None:
    with session_scope(api.engine) as session:
        session.execute(
            update(JobRow)
            .where(JobRow.project_id == api.caller.project_id, JobRow.finished_at.is_(None))
            .values(status=status, finished_at=func.now())
        )


def seen(http: httpx2.Client, schedule: dict[str, Any]) -> dict[str, Any]:
    shown: dict[str, Any] = http.get(f"{PATH}/{schedule['name']}").json()
    return shown


def verdicts(http: httpx2.Client, schedule: dict[str, Any]) -> list[tuple[str, str | None]]:
    """Oldest first."""
    return [(run["verdict"], run["code"]) for run in reversed(seen(http, schedule)["last_runs"])]


def refusal(answer: httpx2.Response, status: int) -> tuple[str, str | None]:
    assert answer.status_code == status, answer.text
    error = answer.json()["error"]
    return error["code"], error["param"]


def test_a_due_schedule_starts_its_job_with_its_makers_key_and_says_when_it_is_next(
    api: Api, http: httpx2.Client, janitor: Janitor
) -> None:
    schedule = nightly(api, http)
    let_be_due(api, schedule)

    janitor.keep_time()
    janitor.keep_time()

    shown = seen(http, schedule)
    (run,) = shown["last_runs"]
    assert (run["verdict"], run["cause"], run["job_status"]) == ("started", "cron", "validating_files")
    assert shown["next_at"] == schedule["next_at"]  # the same night's
    job = http.get(f"/v1/fine_tuning/jobs/{run['job_id']}").json()
    assert job["metadata"] == {schedules.LABEL: schedule["name"]}
    with session_scope(api.engine) as session:
        assert session.get_one(JobRow, run["job_id"]).key_id == api.caller.key_id


def test_what_was_missed_runs_once_and_is_counted(api: Api, http: httpx2.Client, janitor: Janitor) -> None:
    schedule = nightly(api, http)
    let_be_due(api, schedule, ago=timedelta(days=4))

    janitor.keep_time()
    janitor.keep_time()

    (run,) = seen(http, schedule)["last_runs"]
    assert (run["verdict"], run["missed"]) == ("started", 4)


def test_of_many_janitors_at_once_one_runs_it(api: Api, http: httpx2.Client, janitor: Janitor) -> None:
    schedule = nightly(api, http)
    let_be_due(api, schedule)
    threads = [threading.Thread(target=keep_time, args=[api]) for _ in range(4)]

    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(patience(30))
    janitor.keep_time()

    assert verdicts(http, schedule) == [("started", None)]


def test_a_janitor_that_dies_before_its_commit_leaves_the_moment_to_the_next(
    api: Api, http: httpx2.Client, janitor: Janitor
) -> None:
    schedule = nightly(api, http)
    let_be_due(api, schedule)
    environment = {
        **os.environ,
        "TUNEPOOL_HOME": str(api.settings.home),
        "DATABASE_URL": api.settings.database_url,
        "REDIS_URL": "",
        "TUNEPOOL_FAILPOINT": "schedule_before_commit:exit",
    }

    act = "from shared.settings import Settings; from worker.janitor import Janitor; Janitor(Settings()).keep_time()"
    died = subprocess.run([sys.executable, "-c", act], cwd=ROOT, env=environment, timeout=patience(60), check=False)

    assert died.returncode == -signal.SIGKILL
    assert verdicts(http, schedule) == []
    janitor.keep_time()
    assert verdicts(http, schedule) == [("started", None)]
    with session_scope(api.engine) as session:
        mine = (
            select(func.count())
            .select_from(JobRow)
            .where(JobRow.request["metadata"][schedules.LABEL].as_string() == schedule["name"])
        )
        assert session.scalar(mine) == 1


def test_a_moment_that_has_run_does_not_run_again_when_the_clock_goes_back(
    api: Api, http: httpx2.Client, janitor: Janitor
) -> None:
    schedule = nightly(api, http, skip_unchanged=False, overlap="queue")
    let_be_due(api, schedule)
    janitor.keep_time()
    with session_scope(api.engine) as session:
        due_at = session.scalars(
            select(ScheduleRunRow.due_at).where(ScheduleRunRow.schedule_id == schedule["id"])
        ).one()
        session.execute(update(ScheduleRow).where(ScheduleRow.id == schedule["id"]).values(next_at=due_at))

    janitor.keep_time()

    assert verdicts(http, schedule) == [("started", None)]
    assert seen(http, schedule)["next_at"] == schedule["next_at"]


def test_nothing_changed_starts_nothing_until_the_job_has_failed(
    api: Api, http: httpx2.Client, janitor: Janitor
) -> None:
    schedule = nightly(api, http, overlap="queue")

    def run(**options: bool) -> tuple[str, str | None]:
        answer = http.post(f"{PATH}/{schedule['id']}/run", json=options).json()
        return answer["verdict"], answer["code"]

    assert run() == ("started", None)
    assert run() == ("skipped", "unchanged")
    assert run(force=True) == ("started", None)
    end_jobs(api)
    assert run() == ("started", None)


@pytest.mark.parametrize(
    ("overlap", "verdict", "first_is"),
    [
        ("skip", ("skipped", "overlap"), "validating_files"),
        ("queue", ("started", None), "validating_files"),
        ("supersede", ("started", None), "cancelled"),
    ],
)
def test_while_the_job_of_a_run_goes_on_the_schedule_says_what_becomes_of_the_next(
    api: Api, http: httpx2.Client, overlap: str, verdict: tuple[str, str | None], first_is: str
) -> None:
    schedule = nightly(api, http, overlap=overlap, skip_unchanged=False)

    for _ in range(2):
        http.post(f"{PATH}/{schedule['id']}/run", json={})

    second, first = seen(http, schedule)["last_runs"]
    assert (second["verdict"], second["code"]) == verdict
    assert first["job_status"] == first_is
    if overlap == "supersede":
        job = http.get(f"/v1/fine_tuning/jobs/{first['job_id']}").json()
        assert job["tunepool"]["superseded_by"] == second["job_id"]


def test_new_data_of_the_prefix_starts_a_run_on_the_newest_file(
    api: Api, http: httpx2.Client, janitor: Janitor
) -> None:
    prefix = new_id("p_%-")
    file(api, filename=f"{prefix}1.jsonl")
    schedule = watching(api, http, prefix)
    file(api, filename="p_%-of another name.jsonl")
    file(api, filename=f"{prefix}picture", purpose="user_data")

    janitor.keep_time()
    assert verdicts(http, schedule) == []  # what was there is no change, and the others are none of its data

    file(api, filename=f"{prefix}2.jsonl")
    newest = file(api, filename=f"{prefix}3.jsonl")
    janitor.keep_time()
    janitor.keep_time()

    (run,) = seen(http, schedule)["last_runs"]
    assert (run["verdict"], run["cause"]) == ("started", "change")
    assert http.get(f"/v1/fine_tuning/jobs/{run['job_id']}").json()["training_file"] == newest


def test_a_change_while_the_job_goes_on_waits_for_its_end(api: Api, http: httpx2.Client, janitor: Janitor) -> None:
    prefix = new_id("wait-")
    schedule = watching(api, http, prefix)
    file(api, filename=f"{prefix}1.jsonl")
    janitor.keep_time()
    file(api, filename=f"{prefix}2.jsonl")
    newest = file(api, filename=f"{prefix}3.jsonl")

    janitor.keep_time()
    assert verdicts(http, schedule) == [("started", None)]
    end_jobs(api)
    janitor.keep_time()

    second, _first = seen(http, schedule)["last_runs"]
    assert http.get(f"/v1/fine_tuning/jobs/{second['job_id']}").json()["training_file"] == newest


def test_the_same_bytes_again_are_no_new_data(api: Api, http: httpx2.Client, janitor: Janitor) -> None:
    prefix = new_id("same-")
    schedule = watching(api, http, prefix, overlap="queue")
    with session_scope(api.engine) as session:
        make_file(session, api.caller, filename=f"{prefix}1", sha256="a" * 64)
    janitor.keep_time()
    with session_scope(api.engine) as session:
        make_file(session, api.caller, filename=f"{prefix}2", sha256="a" * 64)
    janitor.keep_time()

    assert verdicts(http, schedule) == [("started", None), ("skipped", "unchanged")]


def test_a_paused_schedule_starts_nothing_and_goes_on_from_the_moment_it_is_resumed(
    api: Api, http: httpx2.Client, janitor: Janitor
) -> None:
    prefix = new_id("pause-")
    by_clock, by_data = nightly(api, http), watching(api, http, prefix)
    for schedule in (by_clock, by_data):
        shown = http.post(f"{PATH}/{schedule['id']}/pause").json()
        assert (shown["next_at"], shown["paused_at"] is None) == (None, False)
    file(api, filename=f"{prefix}1")
    janitor.keep_time()
    for schedule in (by_clock, by_data):
        assert http.post(f"{PATH}/{schedule['id']}/resume").json()["next_at"] == schedule["next_at"]

    janitor.keep_time()

    assert verdicts(http, by_clock) == verdicts(http, by_data) == []
    assert http.post(f"{PATH}/{by_data['id']}/run", json={}).json()["verdict"] == "started"


def test_a_refused_run_says_why_tells_the_webhooks_and_the_schedule_goes_on(
    api: Api, http: httpx2.Client, janitor: Janitor
) -> None:
    with session_scope(api.engine) as session:
        webhook = WebhookRow(
            id=new_id("webhook_"),
            project_id=api.caller.project_id,
            name="w",
            url="https://example.com",
            event_types=["tunepool.schedule.refused"],
            rich=True,
            secret="",
            secret_hint="",
        )
        session.add(webhook)
    schedule = nightly(api, http)
    assert http.delete(f"/v1/files/{schedule['job']['training_file']}").status_code == 200
    let_be_due(api, schedule)

    janitor.keep_time()

    (run,) = seen(http, schedule)["last_runs"]
    assert (run["verdict"], run["code"], run["job_id"]) == ("refused", "file_not_found", None)
    assert "does not exist in this project" in run["reason"]
    assert seen(http, schedule)["next_at"] == schedule["next_at"]
    with session_scope(api.engine) as session:
        delivery = session.scalars(select(DeliveryRow).where(DeliveryRow.webhook_id == webhook.id)).one()
        assert (delivery.event_type, delivery.subject) == ("tunepool.schedule.refused", schedule["id"])
        assert delivery.details is not None
        assert (delivery.details["code"], delivery.details["run"]) == ("file_not_found", run["id"])


def test_a_full_queue_and_an_ended_key_are_verdicts(api: Api, http: httpx2.Client, janitor: Janitor) -> None:
    with session_scope(api.engine) as session:
        caller, secret = make_key(session, max_queued=0)
        training_file = make_file(session, caller).id
    with api.http(secret) as theirs:
        schedule = make(theirs, job={"model": MODEL, "training_file": training_file})
        assert theirs.post(f"{PATH}/{schedule['id']}/run", json={}).json()["code"] == "queue_full"
    with session_scope(api.engine) as session:
        session.execute(update(ApiKeyRow).where(ApiKeyRow.id == caller.key_id).values(revoked_at=func.now()))
    let_be_due(api, schedule)

    janitor.keep_time()

    with session_scope(api.engine) as session:
        row = session.get_one(ScheduleRow, schedule["id"])
        newest = schedules.runs(session, row, limit=1)[0][0][0]
    assert (newest.verdict, newest.code) == ("refused", "schedule_key_ended")


@pytest.mark.parametrize(
    ("values", "status", "error"),
    [
        ({"cron": "* * * * *"}, 400, ("invalid_cron", "cron")),
        ({"cron": "* * * * * *"}, 400, ("invalid_cron", "cron")),
        ({"cron": "0 0 30 2 *"}, 400, ("invalid_cron", "cron")),
        ({"cron": "x" * 101}, 400, ("invalid_value", "cron")),
        ({"time_zone": "Mars/Olympus"}, 400, ("invalid_time_zone", "time_zone")),
        ({"time_zone": "../../etc/passwd"}, 400, ("invalid_time_zone", "time_zone")),
        ({"name": "a/b"}, 400, ("invalid_value", "name")),
        ({"name": "\x1b[31m"}, 400, ("invalid_value", "name")),
        ({"overlap": "both"}, 400, ("invalid_value", "overlap")),
        ({"cron": None}, 400, ("invalid_value", "cron")),
        ({"data_prefix": "both-"}, 400, ("invalid_value", "job.training_file")),
        ({"job": {"model": MODEL}}, 400, ("invalid_value", "job.training_file")),
        ({"job": {"model": "no-such-model", "training_file": "FILE"}}, 404, ("model_not_found", "job.model")),
        ({"job": {"model": MODEL, "training_file": "file-none"}}, 400, ("file_not_found", "job.training_file")),
        ({"job": {"model": MODEL, "training_file": "FILE", "n": 1}}, 400, ("unknown_parameter", "job.n")),
        (
            {"job": {"model": MODEL, "training_file": "FILE", "metadata": {str(n): "" for n in range(16)}}},
            400,
            ("invalid_value", "job.metadata"),
        ),
        (
            {"job": {"model": MODEL, "training_file": "FILE", "tunepool": {"adapter": {"r": 8, "method": "full"}}}},
            400,
            ("invalid_value", "job.tunepool.adapter.r"),
        ),
    ],
)
def test_what_could_not_run_is_refused_when_it_is_made(
    api: Api, http: httpx2.Client, values: dict[str, Any], status: int, error: tuple[str, str]
) -> None:
    training_file = file(api)
    job = {"model": MODEL, "training_file": training_file}
    wanted = body(job=job) | values
    if wanted["job"].get("training_file") == "FILE":
        wanted["job"] = {**wanted["job"], "training_file": training_file}

    assert refusal(http.post(PATH, json=wanted), status) == error


def test_a_job_is_refused_in_a_schedule_with_the_words_of_its_submission(api: Api, http: httpx2.Client) -> None:
    job = {"model": MODEL, "training_file": file(api), "tunepool": {"adapter": {"method": "full", "r": 8}}}

    submitted = http.post("/v1/fine_tuning/jobs", json=job).json()["error"]
    scheduled = http.post(PATH, json=body(job=job)).json()["error"]

    assert (scheduled["message"], scheduled["code"]) == (submitted["message"], submitted["code"])
    assert scheduled["param"] == f"job.{submitted['param']}"


def test_names_are_taken_once_and_a_project_has_a_hundred(api: Api, http: httpx2.Client) -> None:
    with session_scope(api.engine) as session:
        caller, secret = make_key(session)
        training_file = make_file(session, caller).id
        session.add_all(
            ScheduleRow(
                id=new_id("sched_"),
                project_id=caller.project_id,
                key_id=caller.key_id,
                name=f"s{number}",
                cron="0 0 1 1 *",
                time_zone="UTC",
                request={},
                overlap="skip",
                skip_unchanged=True,
            )
            for number in range(schedules.MAX_SCHEDULES)
        )
    job = {"model": MODEL, "training_file": training_file}
    with api.http(secret) as theirs:
        assert refusal(theirs.post(PATH, json=body(name="s1", job=job)), 409) == ("schedule_exists", "name")
        full = theirs.post(PATH, json=body(job=job))
        assert refusal(full, 429)[0] == "too_many_schedules"
        assert full.headers["x-should-retry"] == "false"
        assert theirs.delete(f"{PATH}/s1").json()["deleted"]
        assert theirs.post(PATH, json=body(name="s1", job=job)).status_code == 200


def test_a_stranger_neither_sees_nor_runs_a_schedule(api: Api, http: httpx2.Client, stranger: str) -> None:
    schedule = nightly(api, http)

    with api.http(stranger) as theirs:
        assert theirs.get(PATH).json()["data"] == []
        for method, rest in (
            ("GET", ""), ("GET", "/runs"), ("POST", "/pause"), ("POST", "/resume"), ("DELETE", ""),
        ):  # fmt: skip
            for name in (schedule["id"], schedule["name"]):
                assert refusal(theirs.request(method, f"{PATH}/{name}{rest}"), 404) == ("not_found", "schedule")
        assert refusal(theirs.post(f"{PATH}/{schedule['id']}/run", json={}), 404) == ("not_found", "schedule")
    assert seen(http, schedule)["paused_at"] is None


def test_making_pausing_running_and_deleting_are_audited(api: Api, http: httpx2.Client) -> None:
    schedule = nightly(api, http)
    http.post(f"{PATH}/{schedule['id']}/pause")
    http.post(f"{PATH}/{schedule['id']}/run", json={})
    http.delete(f"{PATH}/{schedule['id']}")

    with session_scope(api.engine) as session:
        acts = session.scalars(select(AuditRow.action).where(AuditRow.target == schedule["id"]).order_by(AuditRow.id))
        assert list(acts) == ["schedule.create", "schedule.pause", "schedule.run", "schedule.delete"]


def test_old_runs_that_started_nothing_are_forgotten(session: Session, api: Api, http: httpx2.Client) -> None:
    schedule = nightly(api, http)
    for _ in range(2):
        http.post(f"{PATH}/{schedule['id']}/run", json={})
    session.execute(update(ScheduleRunRow).values(created_at=func.now() - timedelta(days=schedules.KEPT_DAYS + 1)))

    schedules.forget(session)

    left = session.scalars(select(ScheduleRunRow.verdict).where(ScheduleRunRow.schedule_id == schedule["id"])).all()
    assert left == ["started"]


def test_the_command_makes_shows_runs_pauses_and_deletes(api: Api, tmp_path: Path) -> None:
    environment = {"OPENAI_BASE_URL": f"{api.url}/v1", "OPENAI_API_KEY": api.key}

    def run(*words: str) -> tuple[int, str]:
        done = CliRunner().invoke(main.cli, ["schedule", *words], env=environment)
        return done.exit_code, done.output

    training = file(api)
    when = ("--cron", "30 2 * * *", "--time-zone", "Europe/Berlin")
    code, words = run("create", "cli", "--model", MODEL, "--training", training, *when, "--set", "adapter.r=8")
    assert (code, "cli: next at 20" in words) == (0, True), words
    assert run("run", "cli")[1].startswith("started: Started ftjob-")
    assert run("run", "cli")[1].startswith("skipped: Nothing changed since ftjob-")
    assert "by_hand" in run("show", "cli")[1]
    assert run("runs", "cli")[1].count("srun_") == 2
    assert "Europe/Berlin" in run("list")[1]
    assert run("pause", "cli")[1].endswith("cli: paused\n")
    end_jobs(api)
    with session_scope(api.engine) as session:
        session.execute(update(FileRow).where(FileRow.id == training).values(deleted_at=func.now()))
    assert run("run", "cli")[0] == 1
    assert run("resume", "cli")[0] == 0
    assert run("delete", "cli")[0] == 0
