"""Promotions that need approvals: asked for, approved by other keys, judged again as they move, and ended in words."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from datetime import timedelta
from pathlib import Path
from typing import Any

import httpx2
import pytest
from sqlalchemy import func, select, update
from tunepool import main
from typer.testing import CliRunner

from shared.ids import new_id
from shared.operating import approvals
from shared.products import promotion_requests
from shared.store.db import session_scope
from shared.store.tables import ApiKeyRow, AuditRow, DeliveryRow, EvaluationRow, PromotionRow, WebhookRow
from shared.tenants import keys
from tests.integration.conftest import Api
from tests.integration.test_aliases import GATE, figures, forced, names, promote, refusal, tuned
from tests.patience import patience

PROMOTIONS = "/v1/tunepool/promotions"


@pytest.fixture(scope="module")
def http(api: Api) -> Iterator[httpx2.Client]:
    with api.http() as client:
        yield client


@pytest.fixture(scope="module")
def people(api: Api) -> dict[str, tuple[str, str]]:
    """Name -> id and secret of a key of the project."""
    with session_scope(api.engine) as session:
        scopes = {"ada": ("*",), "ben": ("*",), "cleo": ("*",), "boss": ("*", "admin"), "reader": ("models:read",)}
        made = {
            name: keys.create(session, project_id=api.caller.project_id, name=name, scopes=each)
            for name, each in scopes.items()
        }
    return {name: (row.id, secret) for name, (row, secret) in made.items()}


@pytest.fixture(scope="module")
def team(api: Api, people: dict[str, tuple[str, str]]) -> Iterator[dict[str, httpx2.Client]]:
    with ExitStack() as stack:
        yield {name: stack.enter_context(api.http(secret)) for name, (_, secret) in people.items()}


def guarded(api: Api, http: httpx2.Client, team: dict[str, httpx2.Client], *, needs: int = 2, **more: Any) -> str:
    """A new alias whose promotions need approvals."""
    alias = f"{new_id('a')[:20]}@prod"
    assert promote(http, alias, tuned(api)).json()["moved"]
    shown = team["boss"].patch(f"/v1/tunepool/aliases/{alias}", json={"approvals": needs, **more}).json()
    assert (shown["approvals"], shown["movers"]) == (needs, None)
    return alias


def asked(http: httpx2.Client, alias: str, model: str, **body: Any) -> dict[str, Any]:
    answer = promote(http, alias, model, **body).json()
    assert answer["moved"] is False, answer
    waiting: dict[str, Any] = answer["promotion"]
    return waiting


def approve(client: httpx2.Client, promotion: dict[str, Any]) -> httpx2.Response:
    return client.post(f"{PROMOTIONS}/{promotion['id']}/approve")


def state(http: httpx2.Client, promotion: dict[str, Any]) -> tuple[str, str | None]:
    shown = http.get(f"{PROMOTIONS}/{promotion['id']}").json()
    return shown["state"], shown["code"]


def test_an_alias_moves_with_the_last_of_its_approvals_and_tells_whose_they_were(
    api: Api, http: httpx2.Client, team: dict[str, httpx2.Client], people: dict[str, tuple[str, str]]
) -> None:
    alias, model = guarded(api, http, team), tuned(api)
    before = names(http, alias)
    waiting = asked(http, alias, model, reason="June")
    assert (waiting["state"], waiting["approvals"], waiting["gate"]["status"]) == ("pending", 2, "passed")

    first = approve(team["ada"], waiting).json()
    again = approve(team["ada"], waiting).json()
    assert first["approved_by"] == again["approved_by"] == [people["ada"][0]]
    assert names(http, alias) == before
    last = approve(team["ben"], waiting).json()

    assert (last["state"], last["version"], names(http, alias)) == ("moved", 2, model)
    newest = http.get(f"/v1/tunepool/aliases/{alias}").json()["history"][0]
    assert newest["approved_by"] == [people["ada"][0], people["ben"][0]]
    assert (newest["key_id"], newest["reason"], newest["gate"]["status"]) == (api.caller.key_id, "June", "passed")
    assert refusal(approve(team["cleo"], waiting), 409) == "promotion_ended"
    with session_scope(api.engine) as session:
        acts = session.scalars(select(AuditRow.action).where(AuditRow.target == waiting["id"]).order_by(AuditRow.id))
        assert list(acts) == ["promotion.request", "promotion.approve", "promotion.approve"]


def test_who_asks_does_not_approve_whoever_that_is(
    api: Api, http: httpx2.Client, team: dict[str, httpx2.Client]
) -> None:
    alias = guarded(api, http, team, needs=1)
    ours, theirs = asked(http, alias, tuned(api)), asked(team["boss"], alias, tuned(api))

    assert refusal(approve(http, ours), 403) == "own_promotion"
    assert refusal(approve(team["boss"], theirs), 403) == "own_promotion"
    assert refusal(approve(team["reader"], ours), 403) == "insufficient_permissions"
    assert approve(team["ada"], ours).json()["state"] == "moved"


def test_only_approvers_approve_and_administrators(
    api: Api, http: httpx2.Client, team: dict[str, httpx2.Client], people: dict[str, tuple[str, str]]
) -> None:
    alias = guarded(api, http, team, approvers=[people["ada"][0], people["ben"][0]])
    waiting = asked(http, alias, tuned(api))

    assert refusal(approve(team["cleo"], waiting), 403) == "alias_protected"
    assert approve(team["ada"], waiting).json()["state"] == "pending"
    assert approve(team["boss"], waiting).json()["state"] == "moved"
    too_few = {"approvals": 3, "approvers": [people["ada"][0], people["ben"][0]]}
    assert refusal(team["boss"].patch(f"/v1/tunepool/aliases/{alias}", json=too_few), 400) == "invalid_value"
    assert refusal(team["boss"].patch(f"/v1/tunepool/aliases/{alias}", json={}), 400) == "invalid_value"


def test_neither_force_nor_a_new_alias_of_the_name_goes_round_approvals(
    api: Api, http: httpx2.Client, team: dict[str, httpx2.Client]
) -> None:
    alias, model = guarded(api, http, team), tuned(api)

    waiting = forced(http, alias, model).json()
    removed = http.delete(f"/v1/tunepool/aliases/{alias}")

    assert (waiting["moved"], waiting["promotion"]["forced"]) == (False, True)
    assert refusal(removed, 403) == "alias_protected"
    assert team["boss"].delete(f"/v1/tunepool/aliases/{alias}").status_code == 200
    assert state(http, waiting["promotion"]) == ("overtaken", "alias_moved")


def test_a_gate_that_does_not_pass_any_more_ends_the_promotion(
    api: Api, http: httpx2.Client, team: dict[str, httpx2.Client]
) -> None:
    alias, model = guarded(api, http, team, needs=1), tuned(api)
    before = names(http, alias)
    with session_scope(api.engine) as session:
        evaluation = EvaluationRow(
            id=new_id("eval_"),
            project_id=api.caller.project_id,
            request={},
            targets=[],
            status="succeeded",
            report=figures(**{model: 0.9}),
            finished_at=func.now(),
        )
        session.add(evaluation)
    waiting = asked(http, alias, model, gate={"text": GATE, "evaluation": evaluation.id})
    with session_scope(api.engine) as session:
        worse = figures(**{model: 0.1})
        session.execute(update(EvaluationRow).where(EvaluationRow.id == evaluation.id).values(report=worse))

    answer = approve(team["ada"], waiting)

    assert refusal(answer, 409) == "gate_failed"
    assert "nothing moved" in answer.json()["error"]["message"]
    assert (state(http, waiting), names(http, alias)) == (("refused", "gate_failed"), before)


def test_a_model_that_is_gone_and_an_asker_that_is_revoked_end_the_promotion(
    api: Api, http: httpx2.Client, team: dict[str, httpx2.Client]
) -> None:
    alias, model = guarded(api, http, team, needs=1), tuned(api)
    with session_scope(api.engine) as session:
        row, secret = keys.create(session, project_id=api.caller.project_id, name="leaver")
    gone = asked(http, alias, model)
    with api.http(secret) as leaver:
        left = asked(leaver, alias, tuned(api))
    assert http.delete(f"/v1/models/{model}").status_code == 200
    with session_scope(api.engine) as session:
        session.execute(update(ApiKeyRow).where(ApiKeyRow.id == row.id).values(revoked_at=func.now()))

    assert refusal(approve(team["ada"], gone), 409) == "model_not_found"
    assert refusal(approve(team["ada"], left), 409) == "asker_ended"
    assert (state(http, gone)[0], state(http, left)[0]) == ("refused", "refused")


def test_the_approval_of_a_revoked_key_does_not_count(
    api: Api, http: httpx2.Client, team: dict[str, httpx2.Client]
) -> None:
    alias = guarded(api, http, team)
    waiting = asked(http, alias, tuned(api))
    with session_scope(api.engine) as session:
        row, secret = keys.create(session, project_id=api.caller.project_id, name="stolen")
    with api.http(secret) as stolen:
        assert approve(stolen, waiting).json()["approved_by"] == [row.id]
    with session_scope(api.engine) as session:
        session.execute(update(ApiKeyRow).where(ApiKeyRow.id == row.id).values(revoked_at=func.now()))

    assert approve(team["ada"], waiting).json()["state"] == "pending"
    assert approve(team["ben"], waiting).json()["state"] == "moved"


def test_what_another_move_overtakes_is_told_so(api: Api, http: httpx2.Client, team: dict[str, httpx2.Client]) -> None:
    alias = guarded(api, http, team, needs=1)
    first, second = asked(http, alias, tuned(api)), asked(http, alias, tuned(api))

    assert approve(team["ada"], first).json()["state"] == "moved"

    assert state(http, second) == ("overtaken", "alias_moved")
    refused = approve(team["ada"], second)
    assert refusal(refused, 409) == "promotion_ended"
    assert "Version 2" in refused.json()["error"]["message"]
    third = asked(http, alias, tuned(api))
    assert http.post(f"/v1/tunepool/aliases/{alias}/rollback", json={}).json()["moved"]
    assert state(http, third)[0] == "overtaken"


def test_of_two_promotions_that_get_their_last_approval_at_once_one_moves(
    api: Api, http: httpx2.Client, team: dict[str, httpx2.Client]
) -> None:
    alias = guarded(api, http, team, needs=1)
    rivals = [asked(http, alias, tuned(api)) for _ in range(2)]
    answers: list[int] = []

    def act(name: str, waiting: dict[str, Any]) -> None:
        answers.append(approve(team[name], waiting).status_code)

    threads = [
        threading.Thread(target=act, args=(name, waiting)) for waiting in rivals for name in ("ada", "ben", "cleo")
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(patience(30))

    assert sorted(state(http, waiting)[0] for waiting in rivals) == ["moved", "overtaken"]
    assert set(answers) == {200, 409}
    assert http.get(f"/v1/tunepool/aliases/{alias}").json()["version"] == 2


def test_asked_again_the_promotion_that_waits_is_the_answer(
    api: Api, http: httpx2.Client, team: dict[str, httpx2.Client]
) -> None:
    alias, model = guarded(api, http, team), tuned(api)
    waiting = asked(http, alias, model)
    approve(team["ada"], waiting)

    again = asked(http, alias, model)

    assert (again["id"], len(again["approved_by"])) == (waiting["id"], 1)
    approve(team["ben"], waiting)
    done = promote(http, alias, model).json()
    assert (done["moved"], done["promotion"], done["version"]["number"]) == (False, None, 2)


def test_it_is_withdrawn_by_who_asked_or_may_approve_and_expires_by_itself(
    api: Api, http: httpx2.Client, team: dict[str, httpx2.Client], people: dict[str, tuple[str, str]]
) -> None:
    alias = guarded(api, http, team, needs=1, approvers=[people["ada"][0]])
    waiting = [asked(http, alias, tuned(api)) for _ in range(3)]

    def withdraw(client: httpx2.Client, number: int) -> httpx2.Response:
        return client.post(f"{PROMOTIONS}/{waiting[number]['id']}/withdraw", json={"reason": "no"})

    assert refusal(withdraw(team["ben"], 0), 403) == "alias_protected"
    assert withdraw(http, 0).json()["state"] == "withdrawn"
    assert withdraw(team["ada"], 1).json()["outcome"] == "no"
    with session_scope(api.engine) as session:
        late = update(PromotionRow).where(PromotionRow.id == waiting[2]["id"])
        session.execute(late.values(expires_at=func.now() - timedelta(seconds=1)))
    assert refusal(approve(team["ada"], waiting[2]), 409) == "promotion_ended"
    with session_scope(api.engine) as session:
        approvals.expire(session)
    assert state(http, waiting[2])[0] == "expired"
    pending = http.get(PROMOTIONS, params={"state": "pending"}).json()["data"]
    assert not {each["id"] for each in pending} & {each["id"] for each in waiting}


def test_an_alias_has_a_bounded_number_of_promotions_that_wait(
    api: Api, http: httpx2.Client, team: dict[str, httpx2.Client]
) -> None:
    alias = guarded(api, http, team)
    waiting = asked(http, alias, tuned(api))
    with session_scope(api.engine) as session:
        row = session.get_one(PromotionRow, waiting["id"])
        columns = ("project_id", "alias_id", "key_id", "model", "from_version", "wish", "expires_at")
        values = {name: getattr(row, name) for name in columns}
        session.add_all(
            PromotionRow(id=new_id("promo_"), model_id=new_id("adapter_"), **values)
            for _ in range(promotion_requests.MAX_PENDING - 1)
        )

    assert refusal(promote(http, alias, tuned(api)), 429) == "too_many_promotions"


def test_webhooks_are_told_of_the_request_the_move_and_the_end(
    api: Api, http: httpx2.Client, team: dict[str, httpx2.Client]
) -> None:
    types = ["tunepool.promotion.requested", "tunepool.alias.moved", "tunepool.promotion.ended"]
    alias = guarded(api, http, team, needs=1)
    with session_scope(api.engine) as session:
        webhook = WebhookRow(
            id=new_id("webhook_"),
            project_id=api.caller.project_id,
            name="w",
            url="https://example.com",
            event_types=types,
            secret="",
            secret_hint="",
        )
        session.add(webhook)
    waiting = asked(http, alias, tuned(api))
    approve(team["ada"], waiting)

    with session_scope(api.engine) as session:
        sent = session.scalars(
            select(DeliveryRow).where(DeliveryRow.webhook_id == webhook.id).order_by(DeliveryRow.id)
        ).all()
        webhook_row = session.get_one(WebhookRow, webhook.id)
        webhook_row.enabled = False
    assert [row.event_type for row in sent] == types
    assert [row.subject for row in sent][::2] == [waiting["id"]] * 2
    assert sent[2].details is not None
    assert (sent[2].details["state"], sent[2].details["alias"]) == ("moved", alias)


def test_a_stranger_neither_sees_nor_approves(
    api: Api, http: httpx2.Client, team: dict[str, httpx2.Client], stranger: str
) -> None:
    waiting = asked(http, guarded(api, http, team, needs=1), tuned(api))

    with api.http(stranger) as theirs:
        assert theirs.get(PROMOTIONS).json()["data"] == []
        assert refusal(theirs.get(f"{PROMOTIONS}/{waiting['id']}"), 404) == "not_found"
        assert refusal(approve(theirs, waiting), 404) == "not_found"
        assert refusal(theirs.post(f"{PROMOTIONS}/{waiting['id']}/withdraw", json={}), 404) == "not_found"
    assert state(http, waiting)[0] == "pending"


@contextmanager
def command(api: Api, secret: str) -> Iterator[Any]:
    environment = {"OPENAI_BASE_URL": f"{api.url}/v1", "OPENAI_API_KEY": secret}

    def run(*words: str) -> tuple[int, str]:
        done = CliRunner().invoke(main.cli, list(words), env=environment)
        return done.exit_code, done.output

    yield run


def test_the_command_says_what_waits_by_its_exit_code_and_approves(
    api: Api, tmp_path: Path, people: dict[str, tuple[str, str]]
) -> None:
    first, second = tuned(api), tuned(api)
    gate, report = tmp_path / "gate.yaml", tmp_path / "report.json"
    gate.write_text(GATE)
    report.write_text(json.dumps(figures(**{first: 0.9, second: 0.9})))
    evidence = ("--gate", str(gate), "--report", str(report))
    with command(api, api.key) as ci, command(api, people["ada"][1]) as ada, command(api, people["boss"][1]) as boss:
        assert ci("promote", "four@prod", first, *evidence)[0] == 0
        assert boss("aliases", "protect", "four@prod", "--approvals", "2") == (
            0,
            "four@prod: every key; 2 approvals of every key\n",
        )
        code, words = ci("promote", "four@prod", second, *evidence)
        promotion = words.strip().rpartition(" ")[2]
        assert (code, promotion.startswith("promo_"), "0 of 2 approvals" in words) == (8, True, True)
        assert promotion in ada("aliases", "pending")[1]
        assert ada("aliases", "approve", promotion)[0] == 8
        assert boss("aliases", "approve", promotion) == (0, f"four@prod names {second} (version 2)\n")
        code, words = ci("promote", "four@prod", first, *evidence)
        assert ci("aliases", "withdraw", words.strip().rpartition(" ")[2])[1].endswith("withdrawn\n")
        assert boss("aliases", "protect", "four@prod")[1] == "four@prod: every key\n"
