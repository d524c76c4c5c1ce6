"""The audit is complete: whatever ends, withdraws or stops something is there, with who did it."""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import select

from shared.store.db import session_scope
from shared.store.tables import AdapterRow, ApiKeyRow, AuditRow, MergeRow, PreflightRow
from tests.factories import make_file, make_queued_job, make_spec
from tests.forked import run_forked
from tests.integration.conftest import Api
from tests.integration.test_access import SCOPE
from tests.patience import patience


def acts(api: Api, target: str) -> list[tuple[str, str]]:
    """(action, key) of each entry about a target, the first one first."""
    with session_scope(api.engine) as session:
        rows = session.scalars(select(AuditRow).where(AuditRow.target == target).order_by(AuditRow.id)).all()
        return [(row.action, row.key_id) for row in rows]


def of_caller(api: Api, *actions: str) -> list[tuple[str, str]]:
    return [(action, api.caller.key_id) for action in actions]


def test_a_deleted_file_is_in_the_audit_and_a_delete_that_was_refused_is_not(api: Api) -> None:
    with session_scope(api.engine) as session:
        free, used = make_file(session, api.caller).id, make_file(session, api.caller)
        make_queued_job(session, api.caller, file=used)
    with api.http() as http:
        assert http.delete(f"/v1/files/{free}").status_code == 200
        assert http.delete(f"/v1/files/{used.id}").status_code == 409

    assert acts(api, free) == of_caller(api, "file.delete")
    assert acts(api, used.id) == []


def test_a_deleted_model_is_in_the_audit(api: Api) -> None:
    with session_scope(api.engine) as session:
        job = make_queued_job(session, api.caller)
        session.add(
            AdapterRow(
                id="adapter-audited",
                job_id=job.id,
                project_id=job.project_id,
                name="ft:audited",
                base_model="b",
                manifest={"prefix": "p", "files": []},
            )
        )
    with api.http() as http:
        assert http.delete("/v1/models/ft:audited").status_code == 200

    assert acts(api, "adapter-audited") == of_caller(api, "model.delete")


def test_a_job_that_is_paused_resumed_and_cancelled_by_its_owner_is_in_the_audit(api: Api) -> None:
    with session_scope(api.engine) as session:
        job_id = make_queued_job(session, api.caller).id
    with api.http() as http:
        for wish in ("pause", "resume", "cancel"):
            assert http.post(f"/v1/fine_tuning/jobs/{job_id}/{wish}").status_code == 200

    assert acts(api, job_id) == of_caller(api, "job.pause", "job.resume", "job.cancel")


def test_a_withdrawn_merge_and_a_cancelled_preflight_are_in_the_audit(api: Api) -> None:
    with session_scope(api.engine) as session:
        file = make_file(session, api.caller)
        shared: dict[str, Any] = {"project_id": api.caller.project_id, "status": "queued", "base_model": "b"}
        session.add(MergeRow(id="merge-audited", kind="merge", request={}, spec=make_spec().model_dump(), **shared))
        session.add(
            PreflightRow(id="preflight-audited", training_file=file.id, seed=1, request={"model": "b"}, **shared)
        )
    with api.http() as http:
        assert http.delete("/v1/tunepool/merges/merge-audited").status_code == 200
        assert http.delete("/v1/tunepool/preflights/preflight-audited").status_code == 200

    assert acts(api, "merge-audited") == of_caller(api, "merge.delete")
    assert acts(api, "preflight-audited") == of_caller(api, "preflight.cancel")


@pytest.mark.slow
def test_a_key_that_is_made_rotated_and_ended_on_the_host_is_in_the_audit(api: Api, tmp_path: Path) -> None:
    def server(*words: str) -> str:
        environment = {**os.environ, "DATABASE_URL": api.settings.database_url}
        argv = ["-m", "standalone.main", "keys", *words, "--home", str(tmp_path)]
        done = run_forked(argv, environment=environment, seconds=patience(60))
        assert done.returncode == 0, done.stderr
        return done.stdout.strip()

    def opens(secret: str) -> bool:
        with api.http(secret) as http:
            return http.get("/v1/models").status_code == 200

    first = server("create", "--project", api.caller.project_id, "--name", "of-the-host")
    with session_scope(api.engine) as session:
        key_id = session.scalars(select(ApiKeyRow.id).where(ApiKeyRow.name == "of-the-host")).one()
    second = server("rotate", key_id)
    assert (opens(first), opens(second)) == (True, True), "whoever uses the old secret has a day"
    third = server("rotate", key_id, "--overlap-hours", "0")
    assert (opens(first), opens(second), opens(third)) == (False, False, True)
    server("revoke", key_id)

    assert not opens(third)
    assert acts(api, key_id) == [
        ("key.create", key_id), ("key.rotate", key_id), ("key.rotate", key_id), ("key.revoke", key_id),
    ]  # fmt: skip


@pytest.mark.parametrize("route", [route for route in SCOPE if route.startswith("DELETE")])
def test_every_route_that_deletes_leaves_an_entry(route: str) -> None:
    """The routes by their source: a new one without an entry is seen here."""
    folder = Path(__file__).parents[2] / "api" / "routes"
    handlers = [part for file in folder.glob("*.py") for part in file.read_text(encoding="utf-8").split("\n@router.")]
    path = re.sub(r"\{(model|checkpoint)\}", r"{\1:path}", route.removeprefix("DELETE /v1"))
    fitting = [part for part in handlers if part.startswith("delete(") and path.endswith(part.split('"')[1])]
    own = max(fitting, key=lambda part: len(part.split('"')[1]))

    # These modules leave the entry themselves, with the act.
    keeping = ("audit.record(", "administration.", "added_models.", "oidc_rules.", "promotion.", "schedules.")
    assert any(words in own for words in keeping)
