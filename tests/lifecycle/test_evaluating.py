"""An evaluation among real processes: answered, scored, reported, and gone on with where it was."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import select
from sqlalchemy.orm import Session

from api.views import evaluation_views
from shared.chores import base_models, evaluations
from shared.contract.evaluation import CreateEvaluation
from shared.contract.evaluation_run import StoredAnswer
from shared.contract.spec import JobSpec
from shared.ids import new_id
from shared.lease.lease import MAX_FAILURES
from shared.products import adapters
from shared.store.bell import ring
from shared.store.db import session_scope
from shared.store.tables import AdapterRow, EvaluationAnswerRow, EvaluationRow
from tests.factories import make_queued_job
from tests.forked import PARENT
from tests.lifecycle.stack import Servers, Stack, open_stack, until
from tests.patience import pace, patience
from worker.chores import evaluating
from worker.chores.evaluating import evaluate_next
from worker.host import devices
from worker.host.flags import SharedFlags
from worker.host.host import open_host

PROGRAM = {"TUNEPOOL_EVALUATOR": "tests.fake_evaluator"}


@pytest.fixture(scope="module")
def quiet(servers: Servers, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stack]:
    """No worker runs: each test has the work done when it wants it."""
    with open_stack(tmp_path_factory.mktemp("stack"), servers, **PROGRAM) as made:
        yield made


def work(stack: Stack, **environment: str) -> None:
    """What a bell makes a worker do: chores until none may begin."""
    pull = stack.start(["-m", "worker.pull", "cpu", PARENT], name="pull", **environment)
    assert pull.wait(patience(60)) == 0, (stack.home / "pull.log").read_text()[-3000:]


def make_adapter(stack: Stack) -> str:
    """A tuned model of this stack's base, with a file in the store; returns its name."""
    content = b"weights"
    stack.store.put_bytes("adapters/adapter_model.safetensors", content)
    file = {
        "name": "adapter_model.safetensors",
        "bytes": len(content),
        "sha256": hashlib.sha256(content).hexdigest(),
    }
    with session_scope(stack.engine) as session:
        job = make_queued_job(session, stack.caller)
        job.status, job.held = "queued", True
        base = base_models.offered(session, stack.settings).find("tiny")
        spec = JobSpec.model_validate(job.spec)
        job.spec = spec.model_copy(update={"base_model": base}).model_dump(mode="json")
        name = f"ft:tiny:acme::{job.id.removeprefix('ftjob-')}"
        session.add(
            AdapterRow(
                id=new_id("adapter_"),
                job_id=job.id,
                project_id=job.project_id,
                name=name,
                base_model="tiny",
                manifest={"prefix": "adapters", "files": [file]},
            )
        )
    return name


def rows(*questions: str, **more: Any) -> bytes:
    return b"\n".join(
        json.dumps(
            {
                "messages": [{"role": "user", "content": text}, {"role": "assistant", "content": text}],
                "place": place,
                **more,
            }
        ).encode()
        for place, text in enumerate(questions)
    )


def ask(stack: Stack, content: bytes | None, *, subjects: list[str], **values: Any) -> str:
    items = {"type": "suite", "suite": "general"}
    if content is not None:
        items = {"type": "file", "file_id": stack.upload(content)}
    measures = [{"type": "exact_match", "name": "right"}, {"type": "loss", "name": "loss"}]
    request = CreateEvaluation.model_validate({"subjects": subjects, "items": items, "measures": measures, **values})
    with session_scope(stack.engine) as session:
        catalogue = base_models.offered(session, stack.settings)
        return evaluations.submit(session, request, project_id=stack.caller.project_id, catalogue=catalogue).id


def row(stack: Stack, evaluation_id: str) -> EvaluationRow:
    with Session(stack.engine) as session:
        return session.get_one(EvaluationRow, evaluation_id)


def answers(stack: Stack, evaluation_id: str) -> list[StoredAnswer]:
    with Session(stack.engine) as session:
        return evaluations.answers(session, evaluation_id)


def again(stack: Stack, evaluation_id: str) -> None:
    """It need not wait for its next try any more."""
    with session_scope(stack.engine) as session:
        session.get_one(EvaluationRow, evaluation_id).lease_until = None


def test_base_and_tuned_answer_the_same_items_and_the_report_has_figures_for_both(quiet: Stack) -> None:
    tuned = make_adapter(quiet)
    content = rows("one", "two", "three", "endless", language="de") + b"\nno JSON\n"
    made = ask(quiet, content, subjects=["tiny", tuned], against="tiny", slices=["language"], forgetting=True)

    work(quiet)

    ended = row(quiet, made)
    assert ended.status == "succeeded", ended.error
    report = evaluation_views.evaluation(evaluations.SeenEvaluation(ended)).report
    assert report is not None
    assert report.subjects[tuned].measures["right"].mean == 1.0
    assert report.subjects["tiny"].measures["right"].mean == 0.0
    assert (report.subjects[tuned].measures["right"].n, report.subjects[tuned].failures) == (3, 2)
    apart = {one.measure: one for one in report.differences}
    assert (apart["right"].mean, apart["right"].low, apart["right"].high) == (1.0, 1.0, 1.0)
    assert apart["loss"].mean == -0.5
    assert {(one.value, one.items) for one in report.slices} == {("de", 4), (None, 1)}
    assert report.forgetting is not None
    assert report.forgetting.subjects["tiny"].measures["loss"].n == report.forgetting.items > 30
    assert (report.items, ended.answered) == (5, 2 * (5 + report.forgetting.items))
    kept = answers(quiet, made)
    assert len({(one.part, one.item, one.subject) for one in kept}) == len(kept) == ended.answered
    faults = {(one.item, one.error.code) for one in kept if one.error is not None}
    assert faults == {(4, "context_length_exceeded"), (5, "invalid_json")}
    assert quiet.trainers() == []


def test_a_crash_in_the_middle_costs_a_try_and_nothing_that_was_answered_is_asked_again(quiet: Stack) -> None:
    made = ask(quiet, rows("one", "two", "crash", "three"), subjects=["tiny"])

    for tries in range(1, MAX_FAILURES + 1):
        work(quiet)
        waits = row(quiet, made)
        assert waits.failures == tries
        if tries < MAX_FAILURES:
            assert evaluation_views.evaluation(evaluations.SeenEvaluation(waits)).blocked_by == "trainer_crashed"
            again(quiet, made)

    ended = row(quiet, made)
    assert (ended.status, ended.error["code"], ended.answered) == ("failed", "trainer_crashed", 2)
    assert {one.answer.split()[1] for one in answers(quiet, made) if one.answer} != set()
    assert len({one.answer.split()[1] for one in answers(quiet, made) if one.answer}) == 1, "answered by one program"


def test_a_program_that_brings_no_answer_is_ended_and_the_answers_before_stay(
    quiet: Stack, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = ask(quiet, rows("one", "slow=600"), subjects=["tiny"])
    host = open_host(quiet.settings, flags=SharedFlags())
    monkeypatch.setattr(evaluating, "silent_seconds", lambda _tokens: patience(2))

    assert evaluate_next(host)
    host.engine.dispose()

    ended = row(quiet, made)
    assert (ended.status, ended.error["code"], ended.lease_owner) == ("failed", "program_timeout", None)
    assert ended.answered == 1


def test_it_waits_by_name_while_others_hold_the_memory(quiet: Stack, monkeypatch: pytest.MonkeyPatch) -> None:
    made = ask(quiet, rows("one"), subjects=["tiny"])

    host = open_host(quiet.settings, flags=SharedFlags())
    with monkeypatch.context() as crowded:
        crowded.setattr(devices, "host_memory", lambda *_: (64 * 2**30, 2**28))
        assert evaluate_next(host)
        assert not evaluate_next(host), "it was tried again at once"
    host.engine.dispose()
    waits = evaluation_views.evaluation(evaluations.SeenEvaluation(row(quiet, made)))
    again(quiet, made)
    work(quiet)

    assert (waits.status, waits.error, waits.blocked_by) == ("queued", None, "host_memory_taken")
    assert "of this host's memory 0.2 GiB are free now" in (waits.detail or "")
    ended = row(quiet, made)
    assert (ended.status, ended.error, ended.failures) == ("succeeded", None, 0)


def test_other_long_work_has_its_turn_and_the_evaluation_goes_on_behind_it(quiet: Stack) -> None:
    first = ask(quiet, rows(*(f"slow={pace(0.3)} {n}" for n in range(10))), subjects=["tiny"])
    second = ask(quiet, rows("one"), subjects=["tiny"])

    for _ in range(4):  # a worker that finds nothing for a second ends
        if row(quiet, first).status != "succeeded":
            again(quiet, first)
            work(quiet, TUNEPOOL_EVALUATION_TURN_SECONDS="0.01")

    ended = row(quiet, first)
    assert (ended.status, ended.answered, ended.failures) == ("succeeded", 10, 0), ended.error
    assert len({one.answer.split()[1] for one in answers(quiet, first) if one.answer}) > 1, "one program after another"
    assert row(quiet, second).finished_at < ended.finished_at


@pytest.mark.parametrize("gone", ["subject", "items"])
def test_what_is_not_there_any_more_ends_it_by_name(quiet: Stack, gone: str) -> None:
    tuned = make_adapter(quiet)
    made = ask(quiet, rows("one") if gone == "subject" else b"\n", subjects=["tiny", tuned])
    if gone == "subject":
        with session_scope(quiet.engine) as session:
            adapters.delete(session, tuned, project_id=quiet.caller.project_id)

    work(quiet)

    ended = row(quiet, made)
    code, param = ("model_not_found", "subjects[1]") if gone == "subject" else ("no_items", "items")
    assert (ended.status, ended.error["code"], ended.error["param"]) == ("failed", code, param)


def test_a_file_without_a_single_item_ends_it_by_name_and_says_why_of_the_first_row(quiet: Stack) -> None:
    made = ask(quiet, b'{"step": 1, "train_loss": 0.5}\n{"step": 2, "train_loss": 0.4}\n', subjects=["tiny"])

    work(quiet)

    ended = row(quiet, made)
    assert (ended.status, ended.error["code"], ended.error["param"]) == ("failed", "no_items", "items")
    assert "None of the 2 rows is an item. Line 1: " in ended.error["message"]
    assert ended.answered == 0


def test_a_killed_worker_loses_no_answer_and_none_is_asked_twice(servers: Servers, tmp_path: Path) -> None:
    with open_stack(tmp_path, servers, **PROGRAM) as stack:
        stack.start_worker()
        stack.start_janitor()
        stack.wait_for_worker()
        made = ask(stack, rows(*(f"slow={pace(0.2)} {n}" for n in range(30))), subjects=["tiny"])
        ring("cpu", stack.settings)
        until(lambda: row(stack, made).answered >= 3, what="the first answers")

        stack.processes[0].kill()
        until(lambda: not stack.trainers(), what="the program's end with its worker")
        with Session(stack.engine) as session:
            before = {
                one.item: one.document["answer"]
                for one in session.scalars(select(EvaluationAnswerRow).where(EvaluationAnswerRow.evaluation_id == made))
            }
        stack.start_worker()
        until(lambda: row(stack, made).finished_at, seconds=60, what="the end of the evaluation")

        ended = row(stack, made)
        assert ended.status == "succeeded", ended.error
        assert (ended.fence, ended.failures, ended.answered) == (2, 1, 30)
        after = {one.item: one.answer for one in answers(stack, made)}
        assert len(before) >= 3
        assert after.items() >= before.items(), "an answer was asked again"
        assert sorted(after) == list(range(1, 31))
    assert stack.trainers() == []


def test_a_cancelled_one_ends_its_program_and_keeps_its_answers(servers: Servers, tmp_path: Path) -> None:
    with open_stack(tmp_path, servers, **PROGRAM) as stack:
        stack.start_worker()
        stack.wait_for_worker()
        made = ask(stack, rows("one", f"slow={pace(600)} two"), subjects=["tiny"])
        ring("cpu", stack.settings)
        until(lambda: row(stack, made).answered == 1, what="the first answer")

        with session_scope(stack.engine) as session:
            evaluations.cancel(session, made, project_id=stack.caller.project_id)

        until(lambda: not stack.trainers(), what="the end of what nobody wants any more")
        assert (row(stack, made).status, row(stack, made).answered) == ("cancelled", 1)
