"""A key's last use, its new secret, and how long the former ones stay valid."""

from __future__ import annotations

from collections.abc import Iterator
from datetime import timedelta

import httpx2
import pytest
from sqlalchemy import event, func, select, update
from sqlalchemy.engine import Engine
from sqlalchemy.orm import Session

from shared.errors import Conflict, Unauthenticated
from shared.store.db import session_scope
from shared.store.tables import ApiKeyRow, KeySecretRow
from shared.tenants import keys, rotation, sign_ins
from tests.browsing import browser
from tests.factories import make_key
from tests.integration.conftest import Api
from tests.integration.test_bad_requests import refused

DAY = timedelta(hours=24)


def row_of(session: Session, key_id: str) -> ApiKeyRow:
    session.expire_all()
    return session.get_one(ApiKeyRow, key_id)


def writes(session: Session, secret: str) -> int:
    """How many statements of one look at a key write."""
    counted: list[str] = []

    def count(*told: object) -> None:
        counted.append(str(told[2]))

    engine: Engine = session.get_bind().engine
    event.listen(engine, "before_cursor_execute", count)
    try:
        keys.authenticate(session, secret)
    finally:
        event.remove(engine, "before_cursor_execute", count)
    return sum(statement.lower().lstrip().startswith("update") for statement in counted)


def test_the_last_use_is_noted_and_not_by_every_request(session: Session) -> None:
    caller, secret = make_key(session)
    assert row_of(session, caller.key_id).last_used_at is not None
    assert writes(session, secret) == 0

    before = func.now() - timedelta(seconds=keys.USED_SECONDS + 1)
    session.execute(update(ApiKeyRow).where(ApiKeyRow.id == caller.key_id).values(last_used_at=before))

    assert (writes(session, secret), writes(session, secret)) == (1, 0)
    assert row_of(session, caller.key_id).last_used_at == session.scalar(select(func.now()))


def test_a_request_does_not_wait_to_note_its_use(api: Api) -> None:
    with session_scope(api.engine) as session:
        caller, secret = make_key(session)
        session.execute(update(ApiKeyRow).where(ApiKeyRow.id == caller.key_id).values(last_used_at=None))
    with session_scope(api.engine) as holder, api.http(secret) as http:
        keys.find(holder, caller.key_id)

        assert http.get("/v1/models").status_code == 200
    with session_scope(api.engine) as session, api.http(secret) as http:
        assert session.get_one(ApiKeyRow, caller.key_id).last_used_at is None
        assert http.get("/v1/models").status_code == 200
    with session_scope(api.engine) as session:
        assert session.get_one(ApiKeyRow, caller.key_id).last_used_at is not None


def test_both_secrets_open_a_rotated_key_until_the_former_one_ends(session: Session) -> None:
    caller, old = make_key(session)
    row, new = rotation.rotate(session, caller.key_id, overlap=DAY)
    assert row.rotated_at is not None

    assert keys.authenticate(session, old) == keys.authenticate(session, new) == caller
    (former,) = rotation.former(session, [caller.key_id])[caller.key_id]
    session.refresh(former)
    assert old.startswith(former.prefix)
    assert former.last_used_at is not None

    session.execute(update(KeySecretRow).values(expires_at=func.now()))
    with pytest.raises(Unauthenticated):
        keys.authenticate(session, old)
    assert keys.authenticate(session, new) == caller
    assert rotation.former(session, [caller.key_id]) == {}


def test_a_rotation_whose_answer_was_lost_is_made_again_and_the_secret_in_use_stays(session: Session) -> None:
    caller, used = make_key(session)
    rotation.rotate(session, caller.key_id, overlap=DAY)
    _, new = rotation.rotate(session, caller.key_id, overlap=DAY)

    assert keys.authenticate(session, used) == keys.authenticate(session, new) == caller


def test_a_rotation_without_overlap_ends_every_older_secret_and_their_sign_ins(api: Api) -> None:
    with session_scope(api.engine) as session:
        caller, first = make_key(session)
        _, second = rotation.rotate(session, caller.key_id, overlap=DAY)
    with browser(api.url, first) as open_page:
        assert open_page.get("/ui/account").status_code == 200
        with session_scope(api.engine) as session:
            _, third = rotation.rotate(session, caller.key_id, overlap=timedelta())

        assert open_page.get("/ui/account").status_code == 303
    with api.http(third) as http:
        assert http.get("/v1/models").status_code == 200
    for secret in (first, second):
        with api.http(secret) as http:
            refused(api, http.get("/v1/models"), status=401)


def test_a_sign_in_outlives_a_rotation_by_its_overlap(session: Session, api: Api) -> None:
    caller, _ = make_key(session)
    signed_in = sign_ins.begin(session, caller)
    rotation.rotate(session, caller.key_id, overlap=DAY)
    assert sign_ins.stands(session, signed_in.token, api.settings, scope="jobs:read")

    session.execute(update(ApiKeyRow).values(former_until=func.now()))
    assert not sign_ins.stands(session, signed_in.token, api.settings, scope="jobs:read")


def test_what_has_ended_is_not_rotated_and_ends_its_former_secrets_too(session: Session) -> None:
    caller, old = make_key(session)
    rotation.rotate(session, caller.key_id, overlap=DAY)
    keys.revoke(session, caller.key_id)

    with pytest.raises(Conflict) as ended:
        rotation.rotate(session, caller.key_id, overlap=DAY)
    assert ended.value.code == "key_ended"
    with pytest.raises(Unauthenticated):
        keys.authenticate(session, old)


def test_the_janitor_drops_secrets_that_have_ended(session: Session) -> None:
    caller, _ = make_key(session)
    for overlap in (timedelta(hours=1), DAY):
        rotation.rotate(session, caller.key_id, overlap=overlap)
    over = KeySecretRow.expires_at < func.now() + timedelta(hours=2)
    session.execute(update(KeySecretRow).where(over).values(kept_until=func.now() - timedelta(seconds=1)))

    rotation.forget(session)

    assert len(session.scalars(select(KeySecretRow).where(KeySecretRow.key_id == caller.key_id)).all()) == 1


@pytest.fixture
def operator(api: Api) -> Iterator[httpx2.Client]:
    with session_scope(api.engine) as session:
        secret = make_key(session, scopes=("*", "admin"))[1]
    with api.http(secret) as client:
        yield client


def test_a_key_is_rotated_by_its_route_audited_and_listed_with_its_former_secret(
    api: Api, operator: httpx2.Client
) -> None:
    with session_scope(api.engine) as session:
        caller, old = make_key(session)
    url = f"/v1/tunepool/keys/{caller.key_id}"

    made = operator.post(f"{url}/rotate", json={"overlap_hours": 2}).json()
    with api.http(made["api_key"]) as http:
        assert http.get("/v1/models").status_code == 200

    listed = operator.get("/v1/tunepool/keys", params={"project_id": caller.project_id}).json()["data"][0]
    assert listed["id"] == made["id"] == caller.key_id
    assert listed["last_used_at"] is not None
    (former,) = listed["former"]
    assert former["prefix"] == old[:7]
    assert former["expires_at"] - listed["rotated_at"] == 7200

    audit = operator.get("/v1/tunepool/audit", params={"target": caller.key_id})
    assert audit.json()["data"][0]["action"] == "key.rotate"
    assert old not in audit.text
    assert made["api_key"] not in audit.text
    assert refused(api, operator.post(f"{url}/rotate", json={"overlap_hours": -1}))["param"] == "overlap_hours"
    operator.delete(url)
    assert refused(api, operator.post(f"{url}/rotate", json={}), status=409)["code"] == "key_ended"
    assert refused(api, operator.post("/v1/tunepool/keys/key_x/rotate", json={}), status=404)["param"] == "key_id"
