"""Hosts whose clocks are hours wrong (fault 41): the processes' own, nothing in the product is told."""

from __future__ import annotations

import re
import time
from datetime import UTC, datetime, timedelta

import httpx2
import pytest
from sqlalchemy import func, select
from sqlalchemy.orm import Session

from shared.store.tables import JobRow
from tests.faults.conftest import api_process, make_secret
from tests.lifecycle.stack import ROOT, Stack, chain_of, until
from tests.patience import paced, patience
from worker.ring import JUST_NOW_SECONDS

FIRST_RINGS = 3  # a worker that has registered rings both lanes, and itself

ROWS = b'{"text": "fake: %s"}\n' % paced("steps=60 step_seconds=0.05 save=10 hold=30").encode() * 12


def clock(*, hours: float) -> dict[str, str]:
    """The environment of a process whose clock is ahead by so many hours."""
    return {"PYTHONPATH": str(ROOT / "tests/faults/wrong_clock"), "CLOCK_AHEAD_SECONDS": str(hours * 3600)}


def hours_ahead(stack: Stack, name: str) -> int:
    """By how much the clock of the process with this log is ahead of the database's, as its first line tells."""
    log = stack.home / f"{name}.log"
    moment = until(lambda: re.search(r"\d{4}-\d\d-\d\dT[0-9:.]+", log.read_text()), what="a line of the log")
    ahead = datetime.fromisoformat(moment[0]).replace(tzinfo=UTC) - database_time(stack)
    return round(ahead / timedelta(hours=1))


@pytest.mark.parametrize("hours", [5, -5])
def test_a_job_goes_through_hosts_whose_clocks_are_hours_apart_as_if_they_were_right(stack: Stack, hours: int) -> None:
    # Nobody sweeps: what the rings do not bring never comes.
    stack.start_worker(TUNEPOOL_SWEEP_SECONDS="3600", **clock(hours=hours))
    stack.start_janitor(TUNEPOOL_SWEEP_SECONDS="3600", **clock(hours=-hours))
    stack.wait_for_worker()
    assert [hours_ahead(stack, name) for name in ("worker-home", "janitor")] == [hours, -hours]
    began = database_time(stack)
    with api_process(stack, TUNEPOOL_RING_SECONDS="5", **clock(hours=-hours)) as url:
        job_id, file = submit(stack, url)
        stack.wait_for_step(job_id, 12)
    with Session(stack.engine) as session:
        left = session.scalars(select(JobRow.lease_until - func.clock_timestamp())).one()
    stack.let_go_on(job_id)

    job = stack.wait(job_id, seconds=60)

    assert timedelta(0) < left <= timedelta(seconds=stack.settings.lease_seconds)
    assert job.status == "succeeded", job.error
    assert stack.chain(job.manifest) == chain_of(60)
    assert [row.outcome for row in stack.attempts(job_id)] == ["succeeded"]
    told = [event.created_at for event in stack.events(job_id)]
    moments = [began, job.created_at, job.started_at, job.finished_at, database_time(stack)]
    assert moments == sorted(moments)
    assert [began, *told, moments[-1]] == sorted([began, *told, moments[-1]])
    assert file["expires_at"] == file["created_at"] + 3600
    assert abs(file["created_at"] - began.timestamp()) < 1800  # the clocks are hours apart
    assert stack.broken_invariants() == []


def submit(stack: Stack, url: str) -> tuple[str, dict[str, int]]:
    """A job, and its training file as the API shows it."""
    with httpx2.Client(
        base_url=url, headers={"Authorization": f"Bearer {make_secret(stack)}"}, timeout=patience(30)
    ) as http:
        await_first_pulls(stack)
        expiry = {"expires_after[anchor]": "created_at", "expires_after[seconds]": "3600"}
        upload = http.post("/v1/files", data={"purpose": "fine-tune", **expiry}, files={"file": ("x.jsonl", ROWS)})
        assert upload.status_code == 200, upload.text
        file = upload.json()
        job = http.post("/v1/fine_tuning/jobs", json={"model": "tiny", "training_file": file["id"]})
        assert job.status_code == 200, job.text
        return job.json()["id"], file


def await_first_pulls(stack: Stack) -> None:
    """Until the rings of the worker's start were answered, and are no more just now.

    By the clock of a worker that is ahead each ring comes too late. It is dropped where its lane has just pulled. On a
    busy machine the first pulls come long after the worker has registered, and nobody sweeps after them here.
    """
    log = stack.home / "worker-home.log"
    until(lambda: len(re.findall(r"Task \S+\.pull\[\S+ succeeded", log.read_text())) >= FIRST_RINGS, what="first pulls")
    time.sleep(1.1 * JUST_NOW_SECONDS)


def database_time(stack: Stack) -> datetime:
    with Session(stack.engine) as session:
        return session.scalars(select(func.clock_timestamp())).one()


def test_a_dead_worker_is_noticed_in_time_whatever_the_janitors_clock_says(stack: Stack) -> None:
    worker = stack.start_worker(**clock(hours=5))
    stack.start_janitor(**clock(hours=-5))
    job_id = stack.submit("steps=60 step_seconds=0.05 save=10 hold=30")
    stack.wait_for_step(job_id, 12)

    worker.kill()
    worker.wait()
    promised = stack.job(job_id).lease_until

    stack.wait(job_id, "queued", seconds=15)
    assert stack.attempts(job_id)[0].ended_at >= promised + timedelta(seconds=stack.settings.grace_seconds)
    assert stack.broken_invariants() == []
