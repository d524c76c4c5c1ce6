"""A merge among real processes: made, published under its fence, and not lost when its makers die."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
from sqlalchemy.orm import Session

from api.views import product_views
from shared.chores import exports, merges
from shared.chores.product_records import RETRY_AFTER
from shared.contract.merge_request import CreateExport, CreateMerge
from shared.lease.lease import MAX_FAILURES
from shared.store.bell import ring
from shared.store.db import session_scope
from shared.store.tables import ExportRow, MergeRow
from tests.lifecycle.stack import Servers, Stack, chain_of, open_stack, until
from worker.chores import merging
from worker.chores.merging import make_next
from worker.host import devices
from worker.host.flags import SharedFlags
from worker.host.host import open_host

PROGRAM = {"TUNEPOOL_MERGER": "tests.fake_merger", "TUNEPOOL_EXPORTER": "tests.fake_merger"}


@pytest.fixture
def at_work(servers: Servers, tmp_path: Path) -> Iterator[Stack]:
    with open_stack(tmp_path, servers, **PROGRAM) as made:
        made.start_worker()
        made.start_janitor()
        made.wait_for_worker()
        yield made
    assert made.survivors() == [], "a program outlived its worker"


def merge(stack: Stack, *, failures: int = 0) -> str:
    """Ask for the merge of a job that has just succeeded."""
    job = stack.wait(stack.submit("steps=5", adapter={"method": "lora"}))
    assert job.status == "succeeded", job.error
    return ask(stack, CreateMerge(adapter=job.fine_tuned_model, onto="base"), failures=failures)


def ask(stack: Stack, request: CreateMerge, *, failures: int = 0) -> str:
    with session_scope(stack.engine) as session:
        row = merges.submit(session, request, project_id=stack.caller.project_id)
        row.failures, merge_id = failures, row.id
    ring("cpu", stack.settings)
    return merge_id


def row(stack: Stack, merge_id: str) -> MergeRow:
    with Session(stack.engine) as session:
        return session.get_one(MergeRow, merge_id)


def ended(stack: Stack, merge_id: str) -> MergeRow:
    return until(lambda: (found := row(stack, merge_id)).finished_at and found, what="the end of the merge")


def test_a_merge_is_published_under_its_fence_with_a_hash_for_each_file(at_work: Stack) -> None:
    made = ended(at_work, merge(at_work))

    assert made.status == "succeeded", made.error
    assert made.manifest["prefix"].endswith(f"merges/{made.id}/a000001")
    product = json.loads(at_work.read(f"{made.manifest['prefix']}/model.json"))
    assert product == {"chains": [chain_of(5)], "name": made.id}
    assert at_work._intact(made.manifest, made.manifest["files"][0])


def test_an_export_is_made_and_published_as_a_merge_is(at_work: Stack) -> None:
    job = at_work.wait(at_work.submit("steps=5", adapter={"method": "lora"}))
    with session_scope(at_work.engine) as session:
        request = CreateExport(adapter=job.fine_tuned_model, format="gguf")
        export_id = exports.submit(session, request, project_id=at_work.caller.project_id).id
    ring("cpu", at_work.settings)

    def seen() -> ExportRow | None:
        with Session(at_work.engine) as session:
            made = session.get_one(ExportRow, export_id)
        return made if made.finished_at else None

    made = until(seen, what="the end of the export")
    assert made.status == "succeeded", made.error
    assert made.manifest["prefix"].endswith(f"exports/{export_id}/a000001")
    assert json.loads(at_work.read(f"{made.manifest['prefix']}/model.json"))["chains"] == [chain_of(5)]


def test_a_merge_that_the_host_has_no_memory_for_is_never_begun_and_says_how_much_it_needs(
    servers: Servers, tmp_path: Path
) -> None:
    with open_stack(tmp_path, servers, **PROGRAM, TUNEPOOL_MERGE_MEMORY_BYTES=str(2**29)) as stack:
        stack.start_worker()
        made = ended(stack, merge(stack, failures=MAX_FAILURES - 1))

    assert (made.status, made.manifest) == ("failed", None)
    assert made.error["code"] == "host_oom"
    assert "about 0.7 GiB are needed, the host offers 0.5 GiB" in made.error["message"]


def test_a_merge_waits_by_name_while_others_hold_the_memory_and_is_made_when_they_have_let_go(
    at_work: Stack, monkeypatch: pytest.MonkeyPatch
) -> None:
    job = at_work.wait(at_work.submit("steps=5", adapter={"method": "lora"}))
    at_work.processes[0].kill()
    merge_id = ask(at_work, CreateMerge(adapter=job.fine_tuned_model, onto="base"))
    host = open_host(at_work.settings, flags=SharedFlags())

    with monkeypatch.context() as crowded:
        crowded.setattr(devices, "host_memory", lambda: (64 * 2**30, 2**28))
        assert make_next(host)
        assert not make_next(host), "it was tried again at once"
    waits = product_views.merge(row(at_work, merge_id), files=[])
    with session_scope(at_work.engine) as session:
        session.get_one(MergeRow, merge_id).lease_until -= RETRY_AFTER
    host.engine.dispose()
    at_work.start_worker()

    made = ended(at_work, merge_id)
    assert (waits.status, waits.error, waits.blocked_by) == ("queued", None, "host_memory_taken")
    assert "About 0.7 GiB are needed, of this host's memory 0.2 GiB are free now" in waits.detail
    assert (made.status, made.error, made.failures) == ("succeeded", None, 0)


def test_a_merge_that_goes_on_without_end_is_ended_after_its_time(
    at_work: Stack, monkeypatch: pytest.MonkeyPatch
) -> None:
    job = at_work.wait(at_work.submit("steps=5", adapter={"method": "lora"}))
    at_work.processes[0].kill()
    (at_work.home / "slow").touch()
    merge_id = ask(at_work, CreateMerge(adapter=job.fine_tuned_model, onto="base"))
    host, sizes = open_host(at_work.settings, flags=SharedFlags()), []

    def soon(size: int) -> float:
        sizes.append(size)
        return 0.5

    monkeypatch.setattr(merging, "making_seconds", soon)
    assert make_next(host)
    host.engine.dispose()

    made = row(at_work, merge_id)
    assert (made.status, made.error["code"], made.lease_owner) == ("failed", "program_timeout", None)
    assert sizes[0] > 0, "its time follows the weights"
    assert at_work.trainers() == []


def test_a_killed_worker_in_the_middle_of_a_merge_loses_nothing(at_work: Stack) -> None:
    (at_work.home / "slow").touch()
    merge_id = merge(at_work)
    until(at_work.trainers, what="the program")

    at_work.processes[0].kill()
    until(lambda: not at_work.trainers(), what="the program's end with its worker")
    (at_work.home / "slow").unlink()
    at_work.start_worker()

    made = ended(at_work, merge_id)
    assert (made.status, made.fence, made.failures) == ("succeeded", 2, 1)
    assert made.manifest["prefix"].endswith("a000002")


def test_a_killed_program_is_started_again_and_a_deleted_merge_is_stopped(at_work: Stack) -> None:
    (at_work.home / "slow").touch()
    merge_id = merge(at_work)
    until(at_work.trainers, what="the program")[0].kill()

    waits = lambda: (found := row(at_work, merge_id)).status == "queued" and found  # noqa: E731
    waiting = until(waits, what="another attempt", brief=True)
    assert waiting.lease_until is not None, "it waits a while"
    assert product_views.merge(waiting, files=[]).blocked_by == "trainer_crashed"

    second = merge(at_work)
    until(at_work.trainers, what="the second program")
    with session_scope(at_work.engine) as session:
        merges.delete(session, second, project_id=at_work.caller.project_id)
    until(lambda: not at_work.trainers(), what="the end of what nobody wants any more")
