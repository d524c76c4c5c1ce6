"""A trainer that was taken over costs its own job and nothing else: nothing of the host is published, nothing waits."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from sqlalchemy import select

from shared.jobs import moves
from shared.store.db import session_scope
from shared.store.tables import CheckpointRow
from tests.lifecycle.stack import Servers, Stack, open_stack, until

SECRET = "not for a program on strangers' data"


@pytest.fixture(scope="module")
def taken(servers: Servers, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stack]:
    """A stack whose every trainer is hostile, and a folder `victim` beside it that nothing may be taken from.

    Walls that would keep a trainer from laying these things are off: what a supervisor follows is judged alone.
    """
    home = tmp_path_factory.mktemp("taken")
    hostile = {"TUNEPOOL_TRAINER": "tests.hostile_trainer", "TUNEPOOL_ISOLATION": "off"}
    with open_stack(home, servers, **hostile, TUNEPOOL_CPU_MEMORY_BYTES=str(2**31)) as made:
        victim = made.home / "victim"
        victim.mkdir()
        (victim / "secret.json").write_text(SECRET)
        (victim / "events.jsonl").write_text("")
        made.start_worker()
        made.start_janitor()
        made.wait_for_worker()
        yield made
        alive, published = made.trainers(), [path for path in (made.home / "store").rglob("*") if path.is_file()]
    assert alive == []
    assert [path for path in published if SECRET.encode() in path.read_bytes()] == []


def lay(stack: Stack, what: str, *, stay: bool = False) -> str:
    return stack.submit(f"lay={what} victim={stack.home / 'victim'}{' stay' if stay else ''}")


@pytest.mark.parametrize(
    "what",
    [
        *("link_folder", "link_file", "dangling_link", "hard_link", "fifo", "open_socket", "file_for_folder"),
        *("many_files", "sparse_file", "events_fifo", "events_link"),
    ],
)
def test_what_is_no_plain_file_of_the_trainers_own_ends_its_job_by_name_and_is_never_published(
    taken: Stack, what: str
) -> None:
    job = taken.wait(lay(taken, what))

    assert job.status == "failed"
    assert job.error["code"] == "program_output_refused"
    assert job.manifest is None
    assert len(taken.attempts(job.id)) == 1


def test_a_path_in_the_place_of_a_checkpoints_name_is_no_event(taken: Stack) -> None:
    job = taken.wait(lay(taken, "name_in_event"))

    assert job.status == "succeeded", job.error
    with session_scope(taken.engine) as session:
        assert session.scalars(select(CheckpointRow).where(CheckpointRow.job_id == job.id)).all() == []


def test_a_pause_makes_no_file_where_a_link_of_the_trainer_points(taken: Stack) -> None:
    job_id = lay(taken, "stop_link", stay=True)
    taken.wait(job_id, "running")
    until(lambda: _laid(taken, job_id))
    with session_scope(taken.engine) as session:
        moves.request_pause(session, job_id, project_id=taken.caller.project_id)

    assert taken.wait(job_id, "paused").status == "paused"
    assert not (taken.home / "victim" / "made-by-the-supervisor").exists()


def test_a_cancel_works_whatever_lies_in_the_place_of_the_stop_file(taken: Stack) -> None:
    job_id = lay(taken, "stop_fifo", stay=True)
    until(lambda: _laid(taken, job_id))
    taken.cancel(job_id)

    assert taken.wait(job_id).status == "cancelled"


@pytest.mark.parametrize("what", ["deep_folders", "daemon"])
def test_nothing_of_an_attempt_stays_behind_however_it_was_laid(taken: Stack, what: str) -> None:
    job = taken.wait(lay(taken, what))

    assert job.status == "succeeded", job.error
    until(lambda: not (taken.home / "home" / "work" / job.id).exists())
    until(lambda: taken.trainers() == [])


def test_a_trainer_that_takes_the_hosts_memory_is_out_of_memory_as_any_other(taken: Stack) -> None:
    job = taken.wait(lay(taken, "memory"))

    assert job.status == "failed"
    assert job.error["code"] == "host_oom"
    assert "Out of memory" in job.error["message"]
    attempts = taken.attempts(job.id)
    assert {row.exit_code for row in attempts} == {4}
    assert [row.outcome for row in attempts[:-1]] == ["out_of_memory"] * (len(attempts) - 1)


def _laid(stack: Stack, job_id: str) -> list[Path]:
    """The stop file of a job's trainer, once it lies there; a link is one too."""
    outs = (stack.home / "home" / "work" / job_id).glob("*/out")
    return [out / "stop" for out in outs if (out / "stop").is_symlink() or (out / "stop").exists()]
