"""Programs of evaluations that were started ahead: each answers for one evaluation, and none outlives its worker."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
from sqlalchemy import select

from shared.chores import evaluations
from shared.operating import administration
from shared.store.bell import ring
from shared.store.db import session_scope
from shared.store.tables import EvaluationRow, WorkerRow
from tests import living
from tests.factories import make_caller
from tests.lifecycle.stack import Servers, Stack, open_stack, until
from tests.lifecycle.test_evaluating import PROGRAM, answers, ask, make_adapter, row, rows
from tests.lifecycle.test_started_ahead import listed, log_of
from tests.patience import pace, patience
from tests.walls import around

AHEAD = {**PROGRAM, "TUNEPOOL_KEEP_WARM": "imports", "TUNEPOOL_LEASE_SECONDS": "3600"}


@pytest.fixture(scope="module")
def warm(servers: Servers, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stack]:
    with open_stack(tmp_path_factory.mktemp("warm"), servers, **AHEAD) as made:
        made.start_worker()
        made.start_janitor()
        made.wait_for_worker()
        yield made


def spares(stack: Stack) -> list[psutil.Process]:
    return [process for process in stack.trainers() if living.tag(process).startswith("evaluation-spare/")]


def waiting(stack: Stack, *, not_these: set[int] | None = None) -> psutil.Process:
    """A spare that waits for an evaluation."""

    def ready() -> psutil.Process | None:
        told = [line for line in log_of(stack).splitlines() if "spare.ready" in line and "an evaluation" in line]
        return next(
            (
                spare
                for spare in spares(stack)
                if spare.pid not in (not_these or ()) and any(f"pid={spare.pid}" in line for line in told)
            ),
            None,
        )

    spare: psutil.Process = until(ready, what="a spare that waits for an evaluation")
    return spare


def put(stack: Stack, *questions: str, subjects: list[str] | None = None) -> str:
    made = ask(stack, rows(*questions), subjects=subjects or ["tiny"])
    ring("cpu", stack.settings)
    return made


def ended(stack: Stack, evaluation_id: str) -> Any:
    until(lambda: row(stack, evaluation_id).finished_at, seconds=60, what="the end of the evaluation")
    return row(stack, evaluation_id)


def who_answered(stack: Stack, evaluation_id: str) -> set[int]:
    """Numbers of the processes that have answered for the base: the fake says its own."""
    told = [one.answer.split() for one in answers(stack, evaluation_id) if one.answer]
    return {int(words[1]) for words in told if words[0] == "base"}


def test_a_spare_answers_for_one_evaluation_and_another_waits_afterwards(warm: Stack) -> None:
    spare = waiting(warm)
    folder = Path(spare.cwd()).parent

    made = put(warm, "one", "two")

    assert ended(warm, made).status == "succeeded"
    assert who_answered(warm, made) == {spare.pid}
    assert waiting(warm, not_these={spare.pid}).pid != spare.pid
    assert not living.is_alive(spare)
    assert not folder.exists(), "nothing of the evaluation is left on the disk"


def test_a_tuned_model_and_its_base_are_one_program_and_it_is_the_spare(warm: Stack) -> None:
    tuned = make_adapter(warm)
    spare = waiting(warm)

    made = put(warm, "one", subjects=["tiny", tuned])

    assert (ended(warm, made).status, row(warm, made).answered) == ("succeeded", 2)
    assert who_answered(warm, made) == {spare.pid}


def test_a_spare_has_the_walls_of_a_program_that_starts_cold(warm: Stack, servers: Servers, tmp_path: Path) -> None:
    waiting(warm)
    with open_stack(tmp_path, servers, **PROGRAM) as cold:
        cold.start_worker()
        cold.wait_for_worker()
        seen = {stack.home: walls(stack) for stack in (cold, warm)}

    assert seen[warm.home] == seen[cold.home]


def walls(stack: Stack) -> dict[str, Any]:
    """Of the program that answers."""
    made = put(stack, "one", f"slow={pace(600)} two")
    until(lambda: row(stack, made).answered == 1, what="the first answer")
    (pid,) = who_answered(stack, made)
    known = around(psutil.Process(pid), home=stack.home, written="answers.jsonl")
    with session_scope(stack.engine) as session:
        evaluations.cancel(session, made, project_id=stack.caller.project_id)
    until(lambda: not living.is_alive(pid), what="the end of what nobody wants any more")
    return known


def test_a_spare_that_is_killed_before_its_evaluation_costs_no_try(warm: Stack) -> None:
    spare = waiting(warm)
    spare.kill()

    made = put(warm, "one")

    assert (ended(warm, made).status, row(warm, made).failures) == ("succeeded", 0)
    assert spare.pid not in who_answered(warm, made)


def test_a_spare_that_is_killed_after_its_handover_is_a_program_that_has_crashed(warm: Stack) -> None:
    spare = waiting(warm)
    made = put(warm, *(f"slow={pace(0.3)} {n}" for n in range(8)))
    until(lambda: row(warm, made).answered >= 1, what="the first answer")
    assert who_answered(warm, made) == {spare.pid}

    spare.kill()

    until(lambda: row(warm, made).failures == 1, what="a try that is told as failed")
    with session_scope(warm.engine) as session:
        session.get_one(EvaluationRow, made).lease_until = None
    ring("cpu", warm.settings)
    assert ended(warm, made).status == "succeeded"
    kept = answers(warm, made)
    assert sorted(one.item for one in kept) == list(range(1, 9)), "each item is answered once"
    assert who_answered(warm, made) > {spare.pid}


def test_files_are_checked_while_a_child_waits_for_evaluations(warm: Stack) -> None:
    waiting(warm)

    job = warm.wait(warm.submit("steps=2"))

    assert job.status == "succeeded", job.error


def test_a_spare_dies_with_its_supervisor_and_a_sibling_takes_the_seat(warm: Stack) -> None:
    spare = waiting(warm)
    supervisor = living.parent(spare)
    assert supervisor is not None
    supervisor.kill()

    until(lambda: not living.is_alive(spare), what="the end of the spare")
    made = put(warm, "one")

    assert (ended(warm, made).status, row(warm, made).failures) == ("succeeded", 0)
    assert living.parent(waiting(warm, not_these={spare.pid})) != supervisor


def test_a_worker_that_drains_lets_its_spare_go_and_has_another_once_undrained(warm: Stack) -> None:
    spare = waiting(warm)
    with session_scope(warm.engine) as session:
        operator = make_caller(session, scopes=("admin",))
        worker_id = session.scalars(select(WorkerRow.id)).one()
        administration.set_draining(session, operator, worker_id, draining=True)

    until(lambda: not spares(warm), what="no spare")
    folders = warm.home / "home" / "work" / "spare"
    until(lambda: not any(listed(folders / name) for name in listed(folders)), what="no folder of a spare")
    with session_scope(warm.engine) as session:
        administration.set_draining(session, operator, worker_id, draining=False)

    assert waiting(warm, not_these={spare.pid})


@pytest.mark.parametrize("end", [signal.SIGTERM, signal.SIGKILL])
def test_no_spare_outlives_its_worker(servers: Servers, tmp_path: Path, end: signal.Signals) -> None:
    with open_stack(tmp_path, servers, **AHEAD) as stack:
        worker = stack.start_worker()
        waiting(stack)
        worker.send_signal(end)
        worker.wait(patience(30))
        until(lambda: not stack.trainers(), what="the end of the spares")
