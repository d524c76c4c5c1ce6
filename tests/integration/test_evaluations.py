"""Evaluations as their users meet them: accepted, refused by name, polled, listed, cancelled, withdrawn."""

from __future__ import annotations

from typing import Any

import httpx2
import pytest
from sqlalchemy import func, update
from sqlalchemy.orm import Session

from shared.chores import evaluations
from shared.chores.evaluations import EVALUATION, EvaluationClaim
from shared.contract.evaluation import CreateEvaluation
from shared.contract.evaluation_run import StoredAnswer
from shared.errors import LimitReached
from shared.ids import new_id
from shared.lease import lease as leasing
from shared.rows import figures
from shared.store.db import session_scope
from shared.store.tables import EvaluationAnswerRow, EvaluationRow
from shared.tenants.keys import Caller
from tests.factories import make_caller, make_file, make_queued_job, make_spec
from tests.integration.conftest import Api
from tests.integration.test_merges import make_adapter

BASE = "smollm2-135m-instruct"
SUITE = {"type": "suite", "suite": "general"}
PATH = "/v1/tunepool/evaluations"


def body(**values: Any) -> dict[str, Any]:
    return {"subjects": [BASE], "items": SUITE, **values}


def post(api: Api, **values: Any) -> httpx2.Response:
    with api.http() as http:
        return http.post(PATH, json=body(**values))


def get(api: Api, path: str, key: str | None = None) -> httpx2.Response:
    with api.http(key) if key else api.http() as http:
        return http.get(f"{PATH}{path}")


def refusal(answer: httpx2.Response, status: int = 400) -> tuple[str, str]:
    assert answer.status_code == status, answer.text
    error = answer.json()["error"]
    return error["code"], error["param"]


def stored(item: int, subject: int = 0, **values: Any) -> StoredAnswer:
    kept = {"line": item, "prompt": "2+2?", "reference": "4", "answer": "4", "scores": {"exact_match": 1.0}}
    return StoredAnswer.model_validate({"part": "items", "item": item, "subject": subject, **kept, **values})


def claim_of(session: Session, evaluation_id: str) -> EvaluationClaim:
    """A lease on that one, whatever else waits in this database."""
    session.execute(update(EvaluationRow).where(EvaluationRow.id != evaluation_id).values(deleted_at=func.now()))
    claim = evaluations.claim(session, worker_id=new_id("worker_"), lease_seconds=60)
    assert claim is not None
    return claim


def test_an_evaluation_is_accepted_polled_listed_and_withdrawn(api: Api) -> None:
    made = post(api, name="nightly").json()

    assert (made["object"], made["status"], made["name"]) == ("tunepool.evaluation", "queued", "nightly")
    assert (made["report"], made["items"], made["answered"], made["error"]) == (None, None, 0, None)
    assert made["blocked_by"] in {"worker", "earlier_evaluations"}
    assert [one["type"] for one in made["request"]["measures"]] == ["loss", "token_accuracy", "exact_match"]
    assert get(api, f"/{made['id']}").json()["id"] == made["id"]
    assert made["id"] in [one["id"] for one in get(api, "").json()["data"]]
    with api.http() as http:
        assert http.delete(f"{PATH}/{made['id']}").json()["deleted"] is True
    assert refusal(get(api, f"/{made['id']}"), 404) == ("not_found", "evaluation_id")


def test_a_strangers_evaluation_subject_file_and_job_are_not_found(api: Api, stranger: str) -> None:
    made = post(api).json()["id"]
    with session_scope(api.engine) as session:
        name = make_adapter(session, api.caller)
        file, job = make_file(session, api.caller).id, make_queued_job(session, api.caller).id
    with api.http(stranger) as http:
        for path in ("", "/items"):
            assert http.get(f"{PATH}/{made}{path}").status_code == 404
        assert http.post(f"{PATH}/{made}/cancel").status_code == 404
        assert http.delete(f"{PATH}/{made}").status_code == 404
        asked = [
            ({"subjects": [BASE, name]}, ("model_not_found", "subjects[1]")),
            ({"items": {"type": "file", "file_id": file}}, ("not_found", "items.file_id")),
            ({"items": {"type": "split", "job": job}}, ("not_found", "items.job")),
        ]
        for values, expected in asked:
            assert refusal(http.post(PATH, json=body(**values)), 404) == expected


@pytest.mark.parametrize(
    ("values", "param"),
    [
        ({"subjects": []}, "subjects"),
        ({"subjects": [BASE, BASE]}, "subjects"),
        ({"measures": []}, "measures"),
        ({"measures": [{"type": "regex", "name": "r", "pattern": "("}]}, "measures[0].pattern"),
        ({"measures": [{"type": "json_schema", "name": "s", "json_schema": {"type": "x"}}]}, "measures[0].json_schema"),
        ({"against": "other"}, "against"),
        ({"generation": {"max_tokens": 0}}, "generation.max_tokens"),
        ({"generaton": {}}, "generaton"),
    ],
)
def test_what_cannot_be_evaluated_is_refused_by_name(api: Api, values: dict[str, Any], param: str) -> None:
    assert refusal(post(api, **values))[1] == param


def test_a_split_reads_the_file_of_a_job_of_the_project(api: Api) -> None:
    with session_scope(api.engine) as session:
        job = make_queued_job(session, api.caller)
        job_id, file = job.id, job.training_file

    made = post(api, items={"type": "split", "job": job_id, "share": 0.2})

    assert made.status_code == 200, made.text
    with session_scope(api.engine) as session:
        assert evaluations.find(session, made.json()["id"], project_id=api.caller.project_id).file_id == file


def test_answers_are_listed_page_by_page_and_by_subject_while_it_runs(api: Api) -> None:
    with session_scope(api.engine) as session:
        name = make_adapter(session, api.caller)
    made = post(api, subjects=[BASE, name]).json()["id"]
    with session_scope(api.engine) as session:
        claim = claim_of(session, made)
        assert evaluations.begin(session, claim.lease, items=3, device="CPU")
        assert evaluations.keep(session, claim.lease, [stored(n, subject) for n in (1, 2, 3) for subject in (0, 1)])

    first = get(api, f"/{made}/items?limit=4").json()
    rest = get(api, f"/{made}/items?limit=4&after={first['data'][-1]['id']}").json()

    assert [one["id"] for one in first["data"]] == ["items-1-0", "items-1-1", "items-2-0", "items-2-1"]
    assert (first["has_more"], rest["has_more"]) == (True, False)
    assert [one["id"] for one in rest["data"]] == ["items-3-0", "items-3-1"]
    tuned = get(api, f"/{made}/items?subject={name}").json()["data"]
    assert [one["id"] for one in tuned] == ["items-1-1", "items-2-1", "items-3-1"]
    assert (tuned[0]["answer"], tuned[0]["scores"], tuned[0]["subject"]) == ("4", {"exact_match": 1.0}, name)
    assert refusal(get(api, f"/{made}/items?subject=other"))[1] == "subject"
    assert refusal(get(api, f"/{made}/items?after=nothing"))[1] == "after"
    running = get(api, f"/{made}").json()
    assert (running["status"], running["items"], running["answered"]) == ("running", 3, 6)


def test_a_cancelled_one_stays_cancelled_and_a_finished_one_cannot_be(api: Api) -> None:
    first, second = post(api).json()["id"], post(api).json()["id"]
    with api.http() as http:
        assert http.post(f"{PATH}/{first}/cancel").json()["status"] == "cancelled"
        assert http.post(f"{PATH}/{first}/cancel").json()["status"] == "cancelled"
        with session_scope(api.engine) as session:
            claim = claim_of(session, second)
            evaluations.keep(session, claim.lease, [stored(1)])
            report = figures.report(claim.request, [stored(1)], interrupt=lambda: None)
            assert evaluations.finish(session, claim.lease, report)
        answer = http.post(f"{PATH}/{second}/cancel")
    assert refusal(answer, 409) == ("conflict", "evaluation_id")
    done = get(api, f"/{second}").json()
    assert done["report"]["subjects"][BASE]["measures"]["exact_match"] == {
        "n": 1,
        "mean": 1.0,
        "low": None,
        "high": None,
    }
    assert (done["report"]["items"], done["report"]["forgetting"]) == (1, None)


# --- the lease


@pytest.fixture
def alone(session: Session) -> Session:
    """A database where nobody else's evaluations wait (until the roll-back)."""
    session.execute(update(EvaluationRow).values(deleted_at=func.now()))
    return session


def make_row(session: Session, caller: Caller, **values: Any) -> EvaluationRow:
    request = CreateEvaluation.model_validate(body())
    row = EvaluationRow(
        id=new_id("eval_"),
        project_id=caller.project_id,
        status="queued",
        request=request.model_dump(mode="json"),
        targets=[],
        **values,
    )
    session.add(row)
    session.flush()
    return row


def test_an_answer_is_kept_once_and_a_late_holder_keeps_none(alone: Session) -> None:
    row = make_row(alone, make_caller(alone))
    late = claim_of(alone, row.id)
    assert evaluations.keep(alone, late.lease, [stored(1), stored(2)])
    leasing.give_back(alone, EVALUATION, late.lease, counted=False)
    now = claim_of(alone, row.id)

    assert evaluations.keep(alone, now.lease, [stored(2, answer="another"), stored(3)])
    assert not evaluations.keep(alone, late.lease, [stored(4)])

    alone.refresh(row)
    assert row.answered == 3
    assert evaluations.answered(alone, row.id) == {("items", 1, 0), ("items", 2, 0), ("items", 3, 0)}
    assert [one.answer for one in evaluations.answers(alone, row.id)] == ["4", "4", "4"]


def test_one_that_is_cancelled_or_withdrawn_ends_its_worker_and_withdrawn_answers_are_gone(alone: Session) -> None:
    caller = make_caller(alone)
    cancelled, withdrawn = make_row(alone, caller), make_row(alone, caller)
    holders = []
    for _ in range(2):
        claim = evaluations.claim(alone, worker_id=new_id("worker_"), lease_seconds=60)
        assert claim is not None
        evaluations.keep(alone, claim.lease, [stored(1)])
        holders.append(claim.lease)

    evaluations.cancel(alone, cancelled.id, project_id=caller.project_id)
    evaluations.remove(alone, withdrawn.id, project_id=caller.project_id)

    assert not any(leasing.keep(alone, EVALUATION, lease, lease_seconds=60) for lease in holders)
    left = [row.evaluation_id for row in alone.query(EvaluationAnswerRow).all()]
    assert left.count(cancelled.id) == 1
    assert withdrawn.id not in left


def test_it_waits_for_a_file_that_is_still_being_made_into_rows(alone: Session) -> None:
    caller = make_caller(alone)
    file = make_file(alone, caller, status="uploaded", packed=True)
    row = make_row(alone, caller, file_id=file.id)

    assert evaluations.claim(alone, worker_id="one", lease_seconds=60) is None
    assert evaluations.seen(alone, row).checking
    file.status, file.rows_key, file.rows_sha256 = "processed", "rows", "0" * 64
    alone.flush()
    claim = evaluations.claim(alone, worker_id="one", lease_seconds=60)
    assert claim is not None
    assert claim.file is not None
    assert claim.file.key == "rows"


def test_a_project_has_a_bounded_number_of_unfinished_ones(alone: Session, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(evaluations, "MAX_UNFINISHED", 1)
    caller = make_caller(alone)
    make_row(alone, caller)

    with pytest.raises(LimitReached) as refused:
        evaluations.submit(
            alone,
            CreateEvaluation.model_validate(body(subjects=[BASE])),
            project_id=caller.project_id,
            catalogue=_Everything(),  # type: ignore[arg-type]
        )

    assert refused.value.code == "too_many_evaluations"


class _Everything:
    """A catalogue that has any model."""

    def must_be_usable(self, _name: str) -> None:
        pass

    def names(self) -> list[str]:
        return [BASE]

    def find(self, _name: str) -> Any:
        return make_spec().base_model
