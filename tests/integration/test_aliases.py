"""Aliases: promoted by a gate, rolled back, raced for, protected, resolved, and kept from losing what they name."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx2
import openai
import pytest
from sqlalchemy import func, select, text, update
from sqlalchemy.orm import Session
from tunepool import main
from typer.testing import CliRunner

from shared.chores import merges
from shared.contract.merge_request import CreateMerge
from shared.errors import Conflict
from shared.fleet import playgrounds
from shared.operating import promotion
from shared.operating.promotion import PromotionRequest
from shared.products import aliases
from shared.settle.catalogue import SMOLLM2, Catalogue
from shared.store.db import session_scope
from shared.store.tables import AdapterRow, AliasRow, AuditRow, EvaluationRow
from shared.tenants import keys
from tests.factories import make_caller
from tests.integration.conftest import Api
from tests.integration.test_merges import make_adapter
from tests.lifecycle.stack import until
from tests.patience import patience

BASE = SMOLLM2.ref.name
GATE = """\
assertions:
  - candidate.exact_match >= 0.8
  - {assert: candidate.exact_match >= prod.exact_match, if_present: prod}
"""


def figures(**means: float) -> dict[str, Any]:
    """A report: each subject's mean of one measure."""
    return {
        "subjects": {
            name: {"measures": {"exact_match": {"n": 50, "mean": mean, "low": mean - 0.01, "high": mean + 0.01}}}
            for name, mean in means.items()
        },
        "differences": [],
    }


@pytest.fixture(scope="module")
def http(api: Api) -> Iterator[httpx2.Client]:
    with api.http() as client:
        yield client


def tuned(api: Api, **values: Any) -> str:
    with session_scope(api.engine) as session:
        return make_adapter(session, api.caller, **values)


def promote(http: httpx2.Client, alias: str, model: str, *, mean: float = 0.9, **body: Any) -> httpx2.Response:
    gate = {"text": GATE, "report": figures(**{model: mean})}
    return http.post(f"/v1/tunepool/aliases/{alias}/promote", json={"model": model, "gate": gate, **body})


def forced(http: httpx2.Client, alias: str, model: str) -> httpx2.Response:
    body = {"model": model, "force": True, "reason": "a test of what comes after"}
    return http.post(f"/v1/tunepool/aliases/{alias}/promote", json=body)


def refusal(answer: httpx2.Response, status: int) -> str:
    assert answer.status_code == status, answer.text
    if status == 409:
        assert answer.headers["x-should-retry"] == "false"
    code: str = answer.json()["error"]["code"]
    return code


def names(http: httpx2.Client, alias: str) -> str:
    model: str = http.get(f"/v1/tunepool/aliases/{alias}").json()["model"]
    return model


def test_an_alias_moves_by_a_passed_gate_and_tells_its_history(api: Api, http: httpx2.Client) -> None:
    first, second = tuned(api), tuned(api)

    made = promote(http, "tickets@prod", first, reason="the first").json()
    moved = promote(http, "tickets@prod", second).json()

    assert (made["moved"], made["alias"]["version"], made["alias"]["model"]) == (True, 1, first)
    assert (moved["alias"]["version"], moved["gate"]["status"]) == (2, "passed")
    shown = http.get("/v1/tunepool/aliases/tickets@prod").json()
    newest, oldest = shown["history"]
    assert (newest["model"], oldest["model"], oldest["reason"]) == (second, first, "the first")
    assert (newest["kind"], newest["key_id"], newest["forced"]) == ("promote", api.caller.key_id, False)
    assert newest["job_id"].startswith("ftjob-")
    figure = newest["gate"]["assertions"][0]["figures"]["candidate.exact_match"]
    assert (figure["mean"], figure["n"]) == (0.9, 50)
    assert "tickets@prod" in [row["id"] for row in http.get("/v1/tunepool/aliases").json()["data"]]


def test_a_gate_that_has_not_passed_leaves_the_alias_where_it_is(api: Api, http: httpx2.Client) -> None:
    good, bad = tuned(api), tuned(api)
    promote(http, "stays@prod", good)

    failed = promote(http, "stays@prod", bad, mean=0.5)
    unproven = http.post("/v1/tunepool/aliases/stays@prod/promote", json={"model": bad})
    nothing = {"text": GATE, "report": {"subjects": {bad: {"measures": {"exact_match": {"n": 0, "mean": None}}}}}}

    assert refusal(failed, 409) == "gate_failed"
    assert "candidate.exact_match >= 0.8: 0.5 >= 0.8 does not hold." in failed.json()["error"]["message"]
    assert refusal(unproven, 400) == "gate_required"
    assert refusal(promote(http, "stays@prod", bad, gate=nothing), 409) == "gate_undecided"
    assert refusal(promote(http, "stays@prod", bad, gate={"text": GATE, "report": figures(other=1.0)}), 400) == (
        "gate_of_another_model"
    )
    broken = promote(http, "stays@prod", bad, gate={"text": "assertions:\n - a.b\n", "report": figures(**{bad: 1.0})})
    assert refusal(broken, 400) == "invalid_gate"
    assert "Line 2, column 4" in broken.json()["error"]["message"]
    assert names(http, "stays@prod") == good


def test_force_needs_a_reason_and_is_audited(api: Api, http: httpx2.Client) -> None:
    model = tuned(api)

    assert refusal(promote(http, "forced@prod", model, mean=0.1, force=True), 400) == "invalid_value"
    made = promote(http, "forced@prod", model, mean=0.1, force=True, reason="the outage").json()

    assert (made["version"]["forced"], made["gate"]["status"]) == (True, "failed")
    with session_scope(api.engine) as session:
        entry = session.scalars(select(AuditRow).where(AuditRow.action == "alias.promote").order_by(AuditRow.id)).all()[
            -1
        ]
    assert entry.after is not None
    assert (entry.after["forced"], entry.after["reason"], entry.key_id) == (True, "the outage", api.caller.key_id)


def test_a_dry_run_judges_with_what_the_server_knows_and_moves_nothing(api: Api, http: httpx2.Client) -> None:
    model = tuned(api)
    text = "assertions: [candidate.size_bytes == 3, candidate.device_seconds == 0]"
    gate = {"text": text, "report": figures(**{model: 0.1})}

    told = promote(http, "dry@prod", model, gate=gate, dry_run=True).json()

    assert (told["moved"], told["alias"], told["gate"]["status"]) == (False, None, "passed")
    assert http.get("/v1/tunepool/aliases/dry@prod").status_code == 404


def test_the_stage_of_an_alias_and_the_base_are_roles_that_a_gate_knows(api: Api, http: httpx2.Client) -> None:
    model = tuned(api)
    report = figures(**{model: 0.9, "tickets@prod": 0.95, BASE: 0.1})
    text = "assertions: [candidate.exact_match >= prod.exact_match, candidate.exact_match > base.exact_match]"

    told = promote(http, "roles@prod", model, gate={"text": text, "report": report}, dry_run=True).json()["gate"]

    assert [stated["status"] for stated in told["assertions"]] == ["failed", "passed"]
    assert told["roles"] == {"candidate": model, "prod": "tickets@prod", "base": BASE}


def test_an_evaluation_of_ours_is_evidence_once_it_has_succeeded(api: Api, http: httpx2.Client, stranger: str) -> None:
    model = tuned(api)
    row = {"project_id": api.caller.project_id, "request": {}, "targets": []}
    with session_scope(api.engine) as session:
        session.add(EvaluationRow(id="eval_waits", status="queued", **row))
        done = {"report": figures(**{model: 0.9}), "finished_at": func.now()}
        session.add(EvaluationRow(id="eval_done", status="succeeded", **row, **done))

    def by(evaluation: str, key: str | None = None) -> httpx2.Response:
        with api.http(key) as client:
            return promote(client, "proven@prod", model, gate={"text": GATE, "evaluation": evaluation})

    assert refusal(by("eval_waits"), 409) == "conflict"
    assert refusal(by("eval_none"), 404) == "not_found"
    assert refusal(by("eval_done", stranger), 404) == "model_not_found"
    made = by("eval_done").json()
    assert (made["moved"], made["gate"]["evaluation"]) == (True, "eval_done")


def test_a_rollback_is_one_call_and_another_goes_back_further(api: Api, http: httpx2.Client) -> None:
    models = [tuned(api) for _ in range(4)]
    for model in models[:3]:
        promote(http, "back@prod", model)

    def back(**body: Any) -> dict[str, Any]:
        answer: dict[str, Any] = http.post("/v1/tunepool/aliases/back@prod/rollback", json=body).json()
        return answer

    once = back(reason="complaints")
    assert (once["alias"]["model"], once["alias"]["version"]) == (models[1], 4)
    assert (once["version"]["kind"], once["version"]["restores"], once["version"]["reason"]) == (
        *("rollback", 2),
        "complaints",
    )
    assert back()["alias"]["model"] == models[0]
    assert refusal(http.post("/v1/tunepool/aliases/back@prod/rollback", json={}), 409) == "nothing_before"
    promote(http, "back@prod", models[3])
    assert back()["alias"]["model"] == models[0]  # what held before the promotion
    assert back(to_version=3)["alias"]["model"] == models[2]
    assert refusal(http.post("/v1/tunepool/aliases/back@prod/rollback", json={"to_version": 99}), 404) == "not_found"


def test_a_promotion_that_is_asked_again_is_answered_as_before(api: Api, http: httpx2.Client) -> None:
    model = tuned(api)

    first = promote(http, "again@prod", model, expected_version=0).json()
    again = promote(http, "again@prod", model, expected_version=0).json()

    assert (again["moved"], again["version"]) == (False, first["version"])


def test_a_pipeline_that_judged_against_an_older_version_is_told_who_came_first(api: Api, http: httpx2.Client) -> None:
    first, mine, theirs = tuned(api), tuned(api), tuned(api)
    promote(http, "raced@prod", first)
    promote(http, "raced@prod", theirs, expected_version=1)

    late = promote(http, "raced@prod", mine, expected_version=1)

    assert refusal(late, 409) == "alias_moved"
    message = late.json()["error"]["message"]
    assert all(part in message for part in ("version 2", theirs, api.caller.key_id))
    assert names(http, "raced@prod") == theirs


def test_of_two_promotions_at_once_one_wins(api: Api) -> None:
    """The second reads version 1 as well, waits for the first to commit, and then finds another version."""
    first, mine, theirs = tuned(api), tuned(api), tuned(api)

    def wish(model: str) -> PromotionRequest:
        return PromotionRequest("duel@prod", model, force=True, reason="a race")

    with session_scope(api.engine) as session:
        promotion.promote(session, wish(first), api.caller)
    outcomes: list[object] = []
    with Session(api.engine, expire_on_commit=False) as winner:
        row = aliases.find(winner, "duel@prod", project_id=api.caller.project_id)
        promotion.promote(winner, wish(theirs), api.caller)

        def lose() -> None:
            try:
                with session_scope(api.engine) as loser:
                    promotion.promote(loser, wish(mine), api.caller)
            except Conflict as error:
                outcomes.append(error.code)

        thread = threading.Thread(target=lose)
        thread.start()
        until(lambda: _waits_for_a_row(api), what="the second to wait for the row")
        winner.commit()
        thread.join(timeout=patience(10))

    assert outcomes == ["alias_moved"]
    with session_scope(api.engine) as session:
        row = session.get_one(AliasRow, row.id)
        assert (row.version, aliases.version(session, row, 2).model) == (2, theirs)


def _waits_for_a_row(api: Api) -> bool:
    with session_scope(api.engine) as session:
        waits = "select count(*) from pg_stat_activity where datname = current_database() and wait_event_type = 'Lock'"
        return bool(session.scalar(text(waits)))


def test_an_alias_stands_wherever_a_model_is_asked_for(api: Api, http: httpx2.Client) -> None:
    model = tuned(api)
    promote(http, "everywhere@prod", model)

    retrieved = api.openai().models.retrieve("everywhere@prod")
    listed = [entry.id for entry in api.openai().models.list()]
    record = http.get("/v1/tunepool/adapters/everywhere@prod").json()
    merged = http.post("/v1/tunepool/merges", json={"adapter": "everywhere@prod", "onto": "base"}).json()
    with session_scope(api.engine) as session:
        catalogue = Catalogue(entries={BASE: SMOLLM2})
        target = playgrounds.target(session, "everywhere@prod", project_id=api.caller.project_id, catalogue=catalogue)

    assert retrieved.id == "everywhere@prod"
    assert "everywhere@prod" in listed
    assert record["name"] == model
    assert merged["request"]["adapter"] == model  # a merge that waits does not follow the alias
    assert target.adapter == record["id"]
    with pytest.raises(openai.NotFoundError):
        api.openai().models.retrieve("nowhere@prod")


def test_an_alias_of_an_alias_names_the_model_itself(api: Api, http: httpx2.Client) -> None:
    first, second = tuned(api), tuned(api)
    promote(http, "chain@staging", first)
    assert forced(http, "chain@prod", "chain@staging").json()["alias"]["model"] == first

    promote(http, "chain@staging", second)

    assert names(http, "chain@prod") == first
    assert refusal(forced(http, "loop@prod", "loop@prod"), 404) == "model_not_found"


def test_what_an_alias_names_or_would_go_back_to_is_not_deleted(api: Api, http: httpx2.Client) -> None:
    oldest, before, now = tuned(api), tuned(api), tuned(api)
    for model in (oldest, before, now):
        promote(http, "kept@prod", model)

    for model in (before, now):
        refused = http.delete(f"/v1/models/{model}")
        assert refusal(refused, 409) == "model_in_use_by_alias"
        assert "kept@prod" in refused.json()["error"]["message"]
    assert http.delete(f"/v1/models/{oldest}").status_code == 200
    gone = http.post("/v1/tunepool/aliases/kept@prod/rollback", json={"to_version": 1})
    assert refusal(gone, 409) == "version_gone"
    assert refusal(http.delete("/v1/models/kept@prod"), 400) == "invalid_value"

    assert http.delete("/v1/tunepool/aliases/kept@prod").json()["deleted"] is True
    assert http.get("/v1/tunepool/aliases/kept@prod").status_code == 404
    assert http.delete(f"/v1/models/{now}").status_code == 200


def test_a_combination_that_an_alias_names_is_not_withdrawn(session: Session) -> None:
    caller = make_caller(session)
    row = merges.submit(
        session, CreateMerge(adapter=make_adapter(session, caller), onto="base"), project_id=caller.project_id
    )
    session.execute(
        update(type(row))
        .where(type(row).id == row.id)
        .values(kind="combination", status="succeeded", manifest={"prefix": "p", "files": []}, finished_at=func.now())
    )
    session.expire_all()
    wish = PromotionRequest("mixed@prod", row.id, force=True, reason="no gate yet")

    assert promotion.promote(session, wish, caller).version.model == row.id
    with pytest.raises(Conflict, match="mixed@prod"):
        merges.delete(session, row.id, project_id=caller.project_id)


def test_a_base_model_under_an_alias_is_refused_by_name(session: Session) -> None:
    caller = make_caller(session)
    model = make_adapter(session, caller)
    session.execute(update(AdapterRow).where(AdapterRow.name == model).values(base_model="rooted-base"))
    promotion.promote(session, PromotionRequest("rooted@prod", model, force=True, reason="x"), caller)

    with pytest.raises(Conflict, match="rooted@prod"):
        aliases.refuse_base_needed(session, "rooted-base")
    promotion.remove(session, "rooted@prod", caller)
    aliases.refuse_base_needed(session, "rooted-base")


def test_a_protected_alias_moves_by_its_keys_and_by_administrators_only(api: Api, http: httpx2.Client) -> None:
    first, second = tuned(api), tuned(api)
    promote(http, "guarded@prod", first)
    with session_scope(api.engine) as session:
        other = keys.create(session, project_id=api.caller.project_id, name="ci")
        boss = keys.create(session, project_id=api.caller.project_id, name="boss", scopes=("*", "admin"))[1]
        other_id, other_secret = other[0].id, other[1]

    with api.http(boss) as administrator, api.http(other_secret) as ci:
        body = {"movers": [other_id]}
        assert refusal(http.patch("/v1/tunepool/aliases/guarded@prod", json=body), 403) == "insufficient_permissions"
        assert administrator.patch("/v1/tunepool/aliases/guarded@prod", json=body).json()["movers"] == [other_id]
        wrong = administrator.patch("/v1/tunepool/aliases/guarded@prod", json={"movers": ["key_x"]})
        assert refusal(wrong, 400) == "invalid_value"
        assert refusal(promote(http, "guarded@prod", second), 403) == "alias_protected"
        assert refusal(http.delete("/v1/tunepool/aliases/guarded@prod"), 403) == "alias_protected"
        assert refusal(http.post("/v1/tunepool/aliases/guarded@prod/rollback", json={}), 403) == "alias_protected"
        assert promote(ci, "guarded@prod", second).json()["moved"] is True
        assert administrator.post("/v1/tunepool/aliases/guarded@prod/rollback", json={}).json()["moved"] is True


def test_two_versions_are_compared_field_by_field(api: Api, http: httpx2.Client) -> None:
    first, second = tuned(api, r=8), tuned(api, r=16)
    promote(http, "compared@prod", first, mean=0.85)
    promote(http, "compared@prod", second, mean=0.95)

    told = http.get("/v1/tunepool/aliases/compared@prod/compare", params={"first": 1, "second": 2}).json()

    fields = {entry["field"]: (entry["first"], entry["second"]) for entry in told["differences"]}
    assert fields["spec.adapter.r"] == (8, 16)
    assert fields["measures.candidate.exact_match"] == (0.85, 0.95)
    assert fields["model"] == (first, second)
    assert "base_model" not in fields


@pytest.mark.parametrize("name", ["prod", "a@b@c", "@prod", "bot@", "bot prod@x", "ft:x@y", "a" * 65 + "@b", "..@.."])
def test_what_is_no_alias_is_refused(api: Api, http: httpx2.Client, name: str) -> None:
    assert refusal(forced(http, name, tuned(api)), 400) == "invalid_value"


def test_a_stranger_neither_sees_nor_moves_an_alias(api: Api, http: httpx2.Client, stranger: str) -> None:
    model = tuned(api)
    promote(http, "mine@prod", model)

    with api.http(stranger) as theirs:
        assert theirs.get("/v1/tunepool/aliases").json()["data"] == []
        assert theirs.get("/v1/tunepool/aliases/mine@prod").status_code == 404
        assert theirs.post("/v1/tunepool/aliases/mine@prod/rollback", json={}).status_code == 404
        assert theirs.delete("/v1/tunepool/aliases/mine@prod").status_code == 404
        assert refusal(forced(theirs, "mine@prod", model), 404) == "model_not_found"
        assert theirs.get("/v1/tunepool/adapters/mine@prod").status_code == 404
    assert names(http, "mine@prod") == model


# ---- the command


def run(api: Api, *words: str) -> tuple[int, str]:
    environment = {"OPENAI_BASE_URL": f"{api.url}/v1", "OPENAI_API_KEY": api.key}
    done = CliRunner().invoke(main.cli, list(words), env=environment)
    return done.exit_code, done.output


def test_the_command_line_promotes_rolls_back_and_tells_a_failed_gate_by_its_exit_code(
    api: Api, tmp_path: Path
) -> None:
    first, second = tuned(api), tuned(api)
    gate, report = tmp_path / "gate.yaml", tmp_path / "evaluation.json"
    gate.write_text(GATE)
    report.write_text(json.dumps({"report": figures(**{first: 0.9, second: 0.9})}))
    evidence = ("--gate", str(gate), "--report", str(report))

    assert run(api, "promote", "cli@prod", first, *evidence) == (0, f"cli@prod names {first} (version 1)\n")
    assert run(api, "promote", "cli@prod", second, *evidence, "--dry-run")[1].endswith("gate: passed\n")
    assert run(api, "promote", "cli@prod", second, *evidence)[0] == 0
    report.write_text(json.dumps(figures(**{first: 0.1})))
    failed, words = run(api, "promote", "cli@prod", first, *evidence)
    assert (failed, "The gate has failed, so cli@prod stays" in words) == (1, True)
    assert "model" in run(api, "compare", "cli@prod", "1", "2")[1]
    assert run(api, "rollback", "cli@prod", "--reason", "x") == (0, f"cli@prod names {first} (version 3)\n")
    assert [line.split()[1] for line in run(api, "aliases", "show", "cli@prod")[1].splitlines()[1:]] == [
        *("rollback", "promote", "promote")
    ]
    assert "cli@prod" in run(api, "aliases", "list")[1]
    assert run(api, "aliases", "remove", "cli@prod") == (0, "cli@prod removed\n")
