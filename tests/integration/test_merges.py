"""Merges and combinations as their users meet them: accepted, refused by name, polled, withdrawn."""

from __future__ import annotations

from typing import Any

import httpx2
import pytest
from sqlalchemy import func, update
from sqlalchemy.orm import Session

from shared.chores import merges, waiting
from shared.chores import table as chores
from shared.chores.merges import MERGE
from shared.contract.merge_request import CreateMerge
from shared.contract.spec import Adapter, JobSpec
from shared.errors import LimitReached
from shared.ids import new_id
from shared.lease import lease as leasing
from shared.lease.lease import MAX_FAILURES
from shared.store.db import session_scope
from shared.store.tables import AdapterRow, CheckpointRow, JobRow, MergeRow
from shared.tenants import keys
from shared.tenants.keys import Caller
from tests.factories import make_caller, make_queued_job
from tests.integration.conftest import Api

FILE = {"name": "adapter_model.safetensors", "bytes": 3, "sha256": "0" * 64}
MANIFEST: dict[str, Any] = {"prefix": "somewhere", "files": [FILE]}


def make_adapter(session: Session, caller: Caller, *, base: str | None = None, **adapter: Any) -> str:
    """A finished job whose spec says `adapter`; returns the `ft:` name."""
    job = make_queued_job(session, caller)
    spec = JobSpec.model_validate(job.spec)
    changed = spec.model_copy(
        update={
            "adapter": Adapter(**adapter),
            "base_model": spec.base_model.model_copy(update={"name": base or spec.base_model.name}),
        }
    )
    job.spec = changed.model_dump(mode="json")
    session.flush()
    name = f"ft:{job.base_model}:acme::{job.id.removeprefix('ftjob-')}"
    session.add(
        AdapterRow(
            id=new_id("adapter_"),
            job_id=job.id,
            project_id=job.project_id,
            name=name,
            base_model=job.base_model,
            manifest=MANIFEST,
        )
    )
    session.flush()
    return name


def claim(session: Session) -> merges.MergeClaim | None:
    return merges.claim(session, worker_id=new_id("worker_"), lease_seconds=60)


def post(api: Api, path: str, body: Any) -> httpx2.Response:
    with api.http() as http:
        return http.post(f"/v1/tunepool/{path}", json=body)


def adapter(api: Api, **values: Any) -> str:
    with session_scope(api.engine) as session:
        return make_adapter(session, api.caller, **values)


def refusal(answer: httpx2.Response, status: int = 400) -> tuple[str, str]:
    assert answer.status_code == status, answer.text
    error = answer.json()["error"]
    return error["code"], error["param"]


def test_a_merge_is_accepted_polled_listed_and_withdrawn(api: Api) -> None:
    name = adapter(api)

    made = post(api, "merges", {"adapter": name, "onto": "base"}).json()

    assert (made["object"], made["status"], made["files"]) == ("tunepool.merge", "queued", [])
    assert made["request"] == {"adapter": name, "onto": "base"}
    with api.http() as http:
        assert http.get(f"/v1/tunepool/merges/{made['id']}").json() == made
        assert made in http.get("/v1/tunepool/merges").json()["data"]
        assert http.delete(f"/v1/tunepool/merges/{made['id']}").json()["deleted"] is True
        assert http.get(f"/v1/tunepool/merges/{made['id']}").status_code == 404


def test_where_a_merge_goes_is_never_chosen_silently(api: Api) -> None:
    code = refusal(post(api, "merges", {"adapter": adapter(api)}))

    assert code == ("missing_required_parameter", "onto")


def test_an_adapter_that_is_gone_or_a_strangers_is_not_found(api: Api, stranger: str) -> None:
    name = adapter(api)
    with api.http(stranger) as http:
        answer = http.post("/v1/tunepool/merges", json={"adapter": name, "onto": "base"})
        assert refusal(answer, 404) == ("model_not_found", "model")
    api.client.models.delete(name)
    assert refusal(post(api, "merges", {"adapter": name, "onto": "base"}), 404) == ("model_not_found", "model")


@pytest.mark.parametrize(
    ("trained", "onto", "expected"),
    [
        ({"method": "full"}, "base", ("not_an_adapter", "adapter")),
        ({"method": "lora"}, "dequantized", ("unsupported_combination", "onto")),
        ({"method": "dora"}, "dequantized", ("unsupported_combination", "onto")),
    ],
)
def test_a_merge_that_makes_no_sense_is_refused_at_once(
    api: Api, trained: dict[str, Any], onto: str, expected: tuple[str, str]
) -> None:
    assert refusal(post(api, "merges", {"adapter": adapter(api, **trained), "onto": onto})) == expected


@pytest.mark.parametrize("method", ["lora", "qlora", "dora", "qdora"])
def test_every_kind_of_adapter_merges_into_the_base(api: Api, method: str) -> None:
    assert post(api, "merges", {"adapter": adapter(api, method=method), "onto": "base"}).status_code == 200


@pytest.mark.parametrize(
    ("second", "options", "expected"),
    [
        ({"method": "dora"}, {"combination_type": "cat"}, ("combination_impossible", "adapters")),
        ({"method": "full"}, {"combination_type": "cat"}, ("not_an_adapter", "adapters")),
        ({"base": "another"}, {"combination_type": "cat"}, ("combination_impossible", "adapters")),
        ({"bias": "all"}, {"combination_type": "cat"}, ("combination_impossible", "adapters")),
        ({"modules_to_save": ["lm_head"]}, {"combination_type": "svd"}, ("combination_impossible", "adapters")),
        ({}, {"combination_type": "ties"}, ("missing_required_parameter", "density")),
        ({}, {"combination_type": "cat", "density": 0.5}, ("invalid_value", "density")),
        ({}, {"combination_type": "cat", "svd_rank": 4}, ("invalid_value", "svd_rank")),
        ({}, {"combination_type": "sum"}, ("invalid_value", "combination_type")),
    ],
)
def test_a_combination_that_upstream_cannot_do_is_refused_at_once(
    api: Api, second: dict[str, Any], options: dict[str, Any], expected: tuple[str, str]
) -> None:
    names = [{"adapter": adapter(api)}, {"adapter": adapter(api, **second)}]

    assert refusal(post(api, "combinations", {"adapters": names, **options})) == expected


def test_a_finished_combination_is_an_adapter_among_others(api: Api) -> None:
    names = [{"adapter": adapter(api), "weight": 0.5}, {"adapter": adapter(api)}]
    made = post(api, "combinations", {"adapters": names, "combination_type": "cat"}).json()
    with session_scope(api.engine) as session:
        while (claimed := claim(session)) is not None:
            merges.RECORDS.finish(session, claimed.lease, manifest=MANIFEST)

    with api.http() as http:
        found = http.get(f"/v1/tunepool/adapters/{made['id']}").json()
    assert (found["id"], found["job_id"], [file["name"] for file in found["files"]]) == (
        made["id"],
        None,
        [FILE["name"]],
    )
    assert post(api, "merges", {"adapter": made["id"], "onto": "base"}).status_code == 200


def test_a_key_that_may_only_read_makes_nothing(api: Api) -> None:
    with session_scope(api.engine) as session:
        _, secret = keys.create(session, project_id=api.caller.project_id, name="reader", scopes=("models:read",))
    with api.http(secret) as http:
        answer = http.post("/v1/tunepool/merges", json={"adapter": "ft:x", "onto": "base"})
    assert answer.status_code == 403


# --- the lease


@pytest.fixture
def alone(session: Session) -> Session:
    """A database where nobody else's merges wait (until the roll-back)."""
    session.execute(update(MergeRow).values(deleted_at=func.now()))
    return session


def submit(session: Session, caller: Caller) -> MergeRow:
    request = CreateMerge(adapter=make_adapter(session, caller), onto="base")
    return merges.submit(session, request, project_id=caller.project_id)


def expire(session: Session, row: MergeRow) -> None:
    """The worker is lost, and the reaper has noticed."""
    session.refresh(row)
    row.lease_until = row.created_at.replace(year=2000)
    session.flush()
    assert chores.reap(session, grace_seconds=5) == [row.id]


def test_a_worker_makes_one_at_a_time_and_another_takes_the_next(alone: Session) -> None:
    caller = make_caller(alone)
    first, second = submit(alone, caller), submit(alone, caller)

    mine = merges.claim(alone, worker_id="one", lease_seconds=60)

    assert mine is not None
    assert mine.lease.id == first.id
    assert merges.claim(alone, worker_id="one", lease_seconds=60) is None
    other = merges.claim(alone, worker_id="two", lease_seconds=60)
    assert other is not None
    assert other.lease.id == second.id


def test_a_maker_that_was_thought_dead_publishes_nothing(alone: Session) -> None:
    row = submit(alone, make_caller(alone))
    late = claim(alone)
    expire(alone, row)
    now = claim(alone)
    assert late is not None
    assert now is not None

    assert merges.RECORDS.finish(alone, late.lease, manifest=MANIFEST) is False
    assert leasing.keep(alone, MERGE, late.lease, lease_seconds=60) is False
    assert merges.RECORDS.finish(alone, now.lease, manifest=MANIFEST) is True
    assert merges.RECORDS.fail(alone, now.lease, code="worker_lost", message="") is False


def test_what_ended_three_workers_is_given_up_by_name(alone: Session) -> None:
    row = submit(alone, make_caller(alone))
    for _ in range(MAX_FAILURES):
        assert claim(alone) is not None
        expire(alone, row)

    assert claim(alone) is None

    alone.refresh(row)
    assert row.status == "failed"
    assert row.error["code"] == "worker_lost"


def test_a_drained_worker_costs_no_attempt_and_a_failure_waits_before_the_next(alone: Session) -> None:
    row = submit(alone, make_caller(alone))
    for _ in range(2 * MAX_FAILURES):
        drained = claim(alone)
        assert drained is not None
        assert leasing.give_back(alone, MERGE, drained.lease, counted=False)
    failed = claim(alone)
    assert failed is not None

    assert merges.RECORDS.give_back(alone, failed.lease, code="base_model_unavailable", message="away")

    assert claim(alone) is None, "it waits"
    alone.refresh(row)
    assert (row.status, row.failures) == ("queued", 1)


def test_a_deleted_merge_ends_its_maker(alone: Session) -> None:
    caller = make_caller(alone)
    row = submit(alone, caller)
    claimed = claim(alone)
    assert claimed is not None

    merges.delete(alone, row.id, project_id=caller.project_id)

    assert leasing.keep(alone, MERGE, claimed.lease, lease_seconds=60) is False
    assert "cpu" not in waiting.waiting(alone)


def test_a_checkpoint_merges_too(alone: Session) -> None:
    caller = make_caller(alone)
    job: JobRow = make_queued_job(alone, caller)
    files = [{**FILE, "name": f"adapter/{FILE['name']}"}]
    checkpoint = CheckpointRow(
        id=new_id("ftckpt_"),
        job_id=job.id,
        fence=1,
        step=5,
        name=f"{job.id}:ckpt-step-5",
        metrics={},
        manifest={"prefix": "p", "files": files},
    )
    alone.add(checkpoint)
    alone.flush()

    row = merges.submit(alone, CreateMerge(adapter=checkpoint.name, onto="base"), project_id=caller.project_id)

    made = claim(alone)
    assert made is not None
    assert made.lease.id == row.id
    assert [file.name for file in merges.sources(alone, made)[0].adapter.files] == [FILE["name"]]


def test_a_project_has_a_bounded_number_of_unfinished_merges(alone: Session) -> None:
    caller = make_caller(alone)
    name = make_adapter(alone, caller)
    request = CreateMerge(adapter=name, onto="base")
    for _ in range(merges.MAX_UNFINISHED):
        merges.submit(alone, request, project_id=caller.project_id)

    with pytest.raises(LimitReached) as refused:
        merges.submit(alone, request, project_id=caller.project_id)

    assert refused.value.code == "too_many_merges"
