"""What the trainer printed, by the API: live from Postgres, afterwards from the store, and to nobody else."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import pytest
from sqlalchemy import func, select
from sqlalchemy.orm import Session

from shared.contract.documents import StoredLog
from shared.jobs import moves, trainer_log
from shared.jobs.trainer_log import LIVE_HEAD_BYTES, LIVE_TAIL_BYTES
from shared.lease.values import Claim
from shared.products import garbage
from shared.store import layout
from shared.store.db import session_scope
from shared.store.storage import open_store
from shared.store.tables import AttemptRow, LogPieceRow, WorkerRow
from tests.factories import claim_on, make_queued_job, make_worker
from tests.integration.conftest import Api
from tests.integration.test_bad_requests import refused

EVIL = "<img src=x onerror=alert(1)>"


def claimed(api: Api) -> Claim:
    with session_scope(api.engine) as session:
        make_queued_job(session, api.caller)
        claim = claim_on(session, session.scalars(select(WorkerRow)).first() or make_worker(session))
        assert claim is not None
        return claim


def tell(api: Api, claim: Claim, *lines: str, start: int = 0) -> int:
    with session_scope(api.engine) as session:
        for line in lines:
            end = start + len(line.encode())
            trainer_log.tell(session, claim.lease.id, claim.lease.fence, start=start, lines=line, size=end)
            start = end
    return start


def put(api: Api, claim: Claim, content: bytes, **where: int) -> StoredLog:
    """In the store, as a supervisor leaves it."""
    stored = open_store(api.settings).put_bytes(
        layout.log_key(claim.project_id, claim.lease.id, claim.lease.fence), content
    )
    whole = {"size": len(content), "head_bytes": len(content), "tail_from": len(content), "tail_at": len(content)}
    log = StoredLog(key=stored.key, bytes=stored.bytes, sha256=stored.sha256, **{**whole, **where})
    with session_scope(api.engine) as session:
        assert trainer_log.store(session, claim.lease.id, claim.lease.fence, log)
    return log


def read(api: Api, job_id: str, **query: Any) -> dict[str, Any]:
    with api.http() as http:
        answer = http.get(f"/v1/tunepool/jobs/{job_id}/logs", params=query)
    assert answer.status_code == 200, answer.text
    return json.loads(answer.text)


def end(api: Api, verb: Callable[[Session], object]) -> None:
    with session_scope(api.engine) as session:
        assert verb(session)


def test_the_newest_lines_of_a_running_attempt_are_read_and_followed(api: Api) -> None:
    claim = claimed(api)
    at = tell(api, claim, "one\n", "two\n")

    first = read(api, claim.lease.id)
    tell(api, claim, "three\n", start=at)
    second = read(api, claim.lease.id, after=first["next"])

    assert (first["state"], first["text"], first["next"], first["ended"]) == ("live", "one\ntwo\n", 8, False)
    assert (second["text"], second["start"], second["next"]) == ("three\n", 8, 14)
    end(api, lambda s: moves.fail(s, claim.lease, code="x", message="x"))


def test_a_running_attempt_keeps_little_in_postgres_and_says_what_is_gone(api: Api) -> None:
    claim = claimed(api)
    piece = "x" * 32767 + "\n"
    tell(api, claim, *[piece] * 20)

    with session_scope(api.engine) as session:
        kept = session.scalar(
            select(func.sum(func.length(LogPieceRow.text))).where(LogPieceRow.job_id == claim.lease.id)
        )
    assert kept is not None
    assert kept <= LIVE_HEAD_BYTES + LIVE_TAIL_BYTES
    head = read(api, claim.lease.id, limit=1024 * 1024)
    tail = read(api, claim.lease.id, after=head["next"], limit=1024 * 1024)
    assert head["left_out"] == 0
    assert tail["left_out"] == 20 * 32768 - LIVE_HEAD_BYTES - LIVE_TAIL_BYTES
    assert tail["next"] == 20 * 32768
    assert not tail["has_more"]
    end(api, lambda s: moves.fail(s, claim.lease, code="x", message="x"))


@pytest.mark.parametrize("outcome", ["failed", "lost"])
def test_the_log_of_an_attempt_that_went_wrong_is_read_from_the_store(api: Api, outcome: Any) -> None:
    claim = claimed(api)
    tell(api, claim, "begins\n")
    end(api, lambda s: moves.fail(s, claim.lease, code="x", message="x", outcome=outcome))

    partial = read(api, claim.lease.id)
    put(api, claim, b"begins\nand ends\n")
    whole = read(api, claim.lease.id)

    assert (partial["state"], partial["text"]) == ("partial", "begins\n")
    assert "lost" in partial["note"]
    assert (whole["state"], whole["text"], whole["note"]) == ("stored", "begins\nand ends\n", None)
    assert whole["job_ended"]
    with session_scope(api.engine) as session:
        assert session.scalar(select(func.count()).where(LogPieceRow.job_id == claim.lease.id)) == 0
        assert trainer_log.owner(session, claim.lease.id, claim.lease.fence) is None


def test_a_long_log_is_read_over_its_gap(api: Api) -> None:
    claim = claimed(api)
    end(api, lambda s: moves.fail(s, claim.lease, code="x", message="x"))
    put(api, claim, b"head\n[gap]\ntail\n", head_bytes=5, tail_from=1000, tail_at=11, size=1005)

    head = read(api, claim.lease.id)
    tail = read(api, claim.lease.id, after=head["next"])

    assert (head["text"], head["has_more"], head["size"]) == ("head\n", True, 1005)
    assert (tail["text"], tail["left_out"], tail["has_more"]) == ("tail\n", 995, False)


def test_a_log_that_is_told_late_changes_nothing(api: Api) -> None:
    claim = claimed(api)
    end(api, lambda s: moves.fail(s, claim.lease, code="x", message="x"))
    log = put(api, claim, b"whole\n")
    tell(api, claim, "late\n")

    assert read(api, claim.lease.id)["text"] == "whole\n"
    with session_scope(api.engine) as session:
        assert not trainer_log.store(session, claim.lease.id, claim.lease.fence, log)
        assert session.scalar(select(func.count()).where(LogPieceRow.job_id == claim.lease.id)) == 0


def test_the_garbage_of_an_ended_attempt_leaves_its_log(api: Api) -> None:
    claim = claimed(api)
    end(api, lambda s: moves.fail(s, claim.lease, code="x", message="x"))
    log = put(api, claim, b"whole\n")
    with session_scope(api.engine) as session:
        row = session.get_one(AttemptRow, (claim.lease.id, 1))
        row.ended_at = session.scalar(select(func.now() - garbage.MIN_AGE * 1.5))
        session.flush()
        kept = [kept for prefix, kept in garbage.dead_prefixes(session) if log.key.startswith(prefix)]
        session.rollback()

    assert kept
    assert log.key in kept[0]


def test_a_job_without_an_attempt_or_without_that_attempt_says_so(api: Api) -> None:
    with session_scope(api.engine) as session:
        waiting = make_queued_job(session, api.caller).id
    with api.http() as http:
        none = http.get(f"/v1/tunepool/jobs/{waiting}/logs")
        bad = http.get(f"/v1/tunepool/jobs/{waiting}/logs?after=-1")

    assert none.status_code == 404
    assert none.json()["error"]["code"] == "attempt_not_found"
    assert "none has begun yet" in none.json()["error"]["message"]
    assert bad.status_code == 400
    end(api, lambda s: moves.request_cancel(s, waiting, project_id=api.caller.project_id))


def test_a_log_that_the_store_has_lost_is_said_to_be_gone(api: Api) -> None:
    claim = claimed(api)
    end(api, lambda s: moves.fail(s, claim.lease, code="x", message="x"))
    log = put(api, claim, b"whole\n")
    open_store(api.settings).delete([log.key])

    with api.http() as http:
        answer = http.get(f"/v1/tunepool/jobs/{claim.lease.id}/logs")

    assert answer.json()["error"]["code"] == "log_gone"


def test_a_stranger_reads_no_log(api: Api, stranger: str) -> None:
    claim = claimed(api)
    tell(api, claim, "mine\n")

    with api.http(stranger) as http:
        assert refused(api, http.get(f"/v1/tunepool/jobs/{claim.lease.id}/logs"), status=404)
    end(api, lambda s: moves.fail(s, claim.lease, code="x", message="x"))
