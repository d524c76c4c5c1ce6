"""Aliases, evaluations, webhooks, merges, exports, schedules and sweeps by the page's forms alone."""

from __future__ import annotations

import base64
import dataclasses
import os
import re
from collections.abc import Iterator

import httpx2
import pytest
from openai import OpenAI
from sqlalchemy import select, update

from api.ui import evaluation_pages, webhook_pages
from shared.jobs import moves
from shared.store.db import session_scope
from shared.store.tables import (
    AdapterRow,
    AliasRow,
    AliasVersionRow,
    DeliveryRow,
    EvaluationRow,
    ExportRow,
    MergeRow,
    WebhookRow,
)
from shared.tenants import keys
from tests import page_products
from tests.browsing import browser, proof_of
from tests.factories import claim_on, make_file, make_queued_job, make_worker
from tests.integration.conftest import Api
from tests.live import live_api
from tests.openai_types import held

GATE = "assertions:\n  - candidate.right >= 0.9\n"


@pytest.fixture(scope="module")
def site(api: Api) -> Iterator[Api]:
    """The API with a key for secrets, and with the loopback allowed."""
    secret = base64.urlsafe_b64encode(os.urandom(32)).decode()
    settings = api.settings.model_copy(
        update={"secrets_key": type(api.settings.secrets_key)(secret), "webhook_networks": "127.0.0.0/8"}
    )
    with live_api(settings) as url, OpenAI(base_url=f"{url}/v1", api_key=api.key, http_client=held()) as client:
        yield dataclasses.replace(api, url=url, settings=settings, client=client)


@pytest.fixture(scope="module")
def visitor(site: Api) -> Iterator[httpx2.Client]:
    with browser(site.url, site.key) as client:
        yield client


@pytest.fixture(scope="module")
def job(site: Api) -> str:
    """A job that has succeeded."""
    with session_scope(site.engine) as session:
        worker = make_worker(session)
        made = make_queued_job(session, site.caller)
        claim = claim_on(session, worker)
        assert claim is not None
        files = [{"name": "adapter_model.safetensors", "bytes": 3, "sha256": "0" * 64}]
        assert moves.succeed(session, claim.lease, manifest={"prefix": "p", "files": files})
        return made.id


@pytest.fixture(scope="module")
def model(site: Api, job: str) -> str:
    with session_scope(site.engine) as session:
        return str(session.scalars(select(AdapterRow.name).where(AdapterRow.job_id == job)).one())


def sent(visitor: httpx2.Client, path: str, **fields: str) -> httpx2.Response:
    return visitor.post(path, data={"proof": proof_of(visitor), **fields})


def test_an_alias_is_made_judged_promoted_rolled_back_and_deleted(
    site: Api, visitor: httpx2.Client, model: str
) -> None:
    ungated = sent(visitor, "/ui/aliases", alias="shop@prod", model=model)
    made = sent(visitor, "/ui/aliases", alias="shop@prod", model=model, force="yes", reason="the first")
    assert (ungated.status_code, made.status_code) == (400, 303), made.text
    assert 'name="alias" type="text" value="shop@prod"' in ungated.text, "what was filled in is not lost"
    assert "Without, &#39;force&#39; and a reason" in ungated.text
    assert made.headers["location"] == "/ui/aliases/shop%40prod"
    with session_scope(site.engine) as session:
        evaluation = page_products.make_evaluation(session, site.caller, model.removeprefix("ft:"))
    asked = {"model": model, "gate": GATE, "evaluation": evaluation, "expected_version": "1"}

    judged = sent(visitor, "/ui/aliases/shop@prod/promote", act="judge", **asked)
    refused = sent(visitor, "/ui/aliases/shop@prod/promote", act="move", **asked)
    assert judged.status_code == 200, judged.text
    assert "Gate: failed" in judged.text
    assert "nothing has moved" in judged.text
    assert "candidate.right &gt;= 0.9" in judged.text
    assert refused.status_code == 409
    forced = {**asked, "gate": "", "evaluation": ""}
    moved = sent(visitor, "/ui/aliases/shop@prod/promote", act="move", force="yes", reason="again", **forced)
    stale = sent(visitor, "/ui/aliases/shop@prod/rollback", to_version="1", expected_version="7")
    assert (moved.status_code, stale.status_code) == (303, 409)

    page = visitor.get(made.headers["location"]).text
    assert "the first" in page
    assert "forced" in page
    assert sent(visitor, "/ui/aliases/shop@prod/delete").status_code == 303


def test_a_promotion_that_needs_approvals_says_so_and_who_can_give_them(
    site: Api, visitor: httpx2.Client, model: str
) -> None:
    made = sent(visitor, "/ui/aliases", alias="slow@prod", model=model, force="yes", reason="the first")
    assert made.status_code == 303, made.text
    with session_scope(site.engine) as session:
        alias = session.scalars(select(AliasRow).where(AliasRow.name == "slow@prod")).one()
        alias.approvals = 2
        other = session.scalars(select(AdapterRow).where(AdapterRow.name == model)).one()
        session.execute(update(AliasRow).where(AliasRow.id == alias.id).values(model_id=f"{other.id}-before"))

    asked = sent(visitor, "/ui/aliases/slow@prod/promote", act="move", model=model, force="yes", reason="again")

    assert asked.status_code == 200, asked.text
    assert "Waits for approvals; nothing has moved" in asked.text
    assert f"{model} has 0 of 2 approvals" in asked.text
    assert "shop@prod" not in visitor.get("/ui/aliases").text
    here = "/ui/aliases/slow%40prod"
    waiting = re.findall(rf"{here}/promotions/(promo_\w+)/approve", visitor.get(here).text)[0]
    own = sent(visitor, f"{here}/promotions/{waiting}/approve")
    assert own.status_code == 403, "who asked cannot approve"
    with session_scope(site.engine) as session:
        _, other_key = keys.create(
            session, project_id=site.caller.project_id, name="other", scopes=["models:write", "*"]
        )
    with browser(site.url, other_key) as second:
        assert sent(second, f"{here}/promotions/{waiting}/approve").status_code == 303
        assert "1 of 2" in visitor.get(here).text
        assert sent(second, f"{here}/promotions/{waiting}/withdraw").status_code == 303
    assert waiting not in visitor.get(here).text


def test_an_alias_goes_back_to_a_version_and_two_versions_are_compared(
    site: Api, visitor: httpx2.Client, job: str
) -> None:
    with session_scope(site.engine) as session:
        page_products.make_alias(session, site.caller, "words", job_id=job)
        session.execute(AliasRow.__table__.update().where(AliasRow.name == page_products.ALIAS).values(movers=None))
    here = "/ui/aliases/support-bot%40prod"

    back = sent(visitor, f"{here}/rollback", to_version="1", expected_version="2", reason="it was better")
    compared = visitor.get(f"{here}?first=1&second=2")

    assert back.status_code == 303, back.text
    assert "Versions 1 and 2" in compared.text
    assert "do not differ" in compared.text
    with session_scope(site.engine) as session:
        rows = session.scalars(
            select(AliasVersionRow)
            .join(AliasRow, AliasRow.id == AliasVersionRow.alias_id)
            .where(AliasRow.name == page_products.ALIAS, AliasRow.project_id == site.caller.project_id)
        ).all()
    assert {row.number: row.reason for row in rows}.get(3, "it was better") == "it was better"


def test_answers_stand_side_by_side_page_by_page(
    site: Api, visitor: httpx2.Client, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(evaluation_pages, "ANSWERS", 5)
    with session_scope(site.engine) as session:
        evaluation = page_products.make_evaluation(session, site.caller, "words", items=5)

    pages, path = [], f"/ui/evaluations/{evaluation}"
    while path:
        html = visitor.get(path).text
        pages.append(re.findall(r"answer (\d) of (\d)", html))
        more = re.findall(r'href="([^"]*\?after=[^"#]*)#items">More', html)
        path = more[0] if more else ""

    assert [len(page) for page in pages] == [4, 4, 2]
    assert [pair for page in pages for pair in page] == [(str(i), s) for i in range(1, 6) for s in "01"]


def test_an_evaluation_shows_figures_with_intervals_and_is_deleted(site: Api, visitor: httpx2.Client) -> None:
    with session_scope(site.engine) as session:
        evaluation = page_products.make_evaluation(session, site.caller, "words")

    html = visitor.get(f"/ui/evaluations/{evaluation}").text
    assert "0.25 to 0.75" in html
    assert "does not hold zero" in html
    assert "more is better" in html
    assert sent(visitor, f"/ui/evaluations/{evaluation}/delete").status_code == 303
    assert visitor.get(f"/ui/evaluations/{evaluation}").status_code == 404


def test_an_evaluation_is_begun_and_one_with_a_fault_comes_back_as_it_was_filled(
    site: Api, visitor: httpx2.Client, model: str
) -> None:
    with session_scope(site.engine) as session:
        items = make_file(session, site.caller).id
    wrong = sent(visitor, "/ui/evaluations", subject=model, second="ft:nobody", items=items, name="A & B")
    right = sent(
        visitor, "/ui/evaluations", subject="smollm2-135m-instruct", second=model, items=items, forgetting="yes"
    )
    suite = sent(visitor, "/ui/evaluations", subject=model)

    assert wrong.status_code == 404
    assert "ft:nobody" in wrong.text
    assert 'value="A &amp; B"' in wrong.text
    assert f'value="{items}" selected' in wrong.text
    assert (right.status_code, suite.status_code) == (303, 303), right.text
    going_on = visitor.get(right.headers["location"]).text
    assert '<meta name="look-again" content="5"><noscript><meta http-equiv="refresh"' in going_on
    with session_scope(site.engine) as session:
        rows = [
            session.get_one(EvaluationRow, answer.headers["location"].rsplit("/", 1)[1]) for answer in (right, suite)
        ]
        requests = [row.request for row in rows]
    assert requests[0]["subjects"] == ["smollm2-135m-instruct", model]
    assert requests[0]["against"] == "smollm2-135m-instruct"
    assert requests[0]["forgetting"] is True
    assert requests[1]["items"]["suite"] == "general"


def test_a_webhooks_secret_is_shown_once_and_its_deliveries_are_sent_again(site: Api, visitor: httpx2.Client) -> None:
    made = sent(visitor, "/ui/webhooks", name="ci", url="http://127.0.0.1:9/hook", rich="yes")
    assert made.status_code == 200, made.text
    secret = re.findall(r"whsec_[A-Za-z0-9+/=]+", made.text)[0]
    with session_scope(site.engine) as session:
        webhook = session.scalars(select(WebhookRow).where(WebhookRow.name == "ci")).one()
    here = f"/ui/webhooks/{webhook.id}"
    assert webhook.event_types == list(webhook_pages.EVENT_TYPES)
    assert secret not in visitor.get(here).text

    rotated = sent(visitor, f"{here}/rotate", keep="yes")
    assert re.findall(r"whsec_[A-Za-z0-9+/=]+", rotated.text)[0] != secret
    assert sent(visitor, f"{here}/test", event_type="fine_tuning.job.failed").status_code == 303
    assert "a test" in visitor.get(here).text
    assert sent(visitor, f"{here}/disable").status_code == 303
    assert "Disabled" in visitor.get(here).text
    assert sent(visitor, f"{here}/enable").status_code == 303
    with session_scope(site.engine) as session:
        delivery = session.scalars(select(DeliveryRow).where(DeliveryRow.webhook_id == webhook.id)).one()
        assert delivery.state == "failed"
    assert sent(visitor, f"{here}/deliveries/{delivery.id}/replay").status_code == 303
    with session_scope(site.engine) as session:
        states = session.scalars(select(DeliveryRow.state).where(DeliveryRow.webhook_id == webhook.id)).all()
    assert "waiting" in states
    assert sent(visitor, f"{here}/delete").status_code == 303
    assert visitor.get(here).status_code == 404


def test_an_adapter_is_merged_from_its_jobs_page(site: Api, visitor: httpx2.Client, job: str, model: str) -> None:
    started = sent(visitor, f"/ui/jobs/{job}/merges", adapter=model, onto="base")
    assert started.status_code == 303, started.text
    page = visitor.get(f"/ui/jobs/{job}").text
    with session_scope(site.engine) as session:
        merge = session.scalars(select(MergeRow).where(MergeRow.project_id == site.caller.project_id)).one()

    assert f"/ui/jobs/{job}/merges/{merge.id}/delete" in page
    assert sent(visitor, f"/ui/jobs/{job}/merges", adapter="ft:nobody", onto="base").status_code in {400, 404}
    assert sent(visitor, f"/ui/jobs/{job}/merges/{merge.id}/delete").status_code == 303
    assert merge.id not in visitor.get(f"/ui/jobs/{job}").text


def test_a_model_is_exported_from_its_jobs_page(site: Api, visitor: httpx2.Client, job: str, model: str) -> None:
    here = f"/ui/jobs/{job}"
    unsaid = sent(visitor, f"{here}/exports", adapter=model, format="gguf")
    started = sent(visitor, f"{here}/exports", adapter=model, format="gguf", onto="base", quantization="f16")
    assert (unsaid.status_code, started.status_code) == (400, 303), started.text
    assert "onto" in unsaid.text
    with session_scope(site.engine) as session:
        export = session.scalars(select(ExportRow).where(ExportRow.project_id == site.caller.project_id)).one()

    assert "gguf, f16" in visitor.get(here).text
    assert sent(visitor, f"{here}/pushes", model=model, repository="no slash").status_code == 400
    assert sent(visitor, f"{here}/exports/{export.id}/delete").status_code == 303
    assert export.id not in visitor.get(here).text


@pytest.mark.usefixtures("job")  # it has ended: no worker takes the job of this schedule in its place
def test_a_schedule_is_made_run_paused_and_deleted(site: Api, visitor: httpx2.Client) -> None:
    with session_scope(site.engine) as session:
        file = make_file(session, site.caller).id
    asked = {"name": "nightly", "cron": "0 3 * * *", "model": "smollm2-135m-instruct", "training_file": file}
    refused = sent(visitor, "/ui/schedules", **{**asked, "cron": "never"})
    made = sent(visitor, "/ui/schedules", **asked)
    assert (refused.status_code, made.status_code) == (400, 303), made.text
    assert "cron" in refused.text
    here = made.headers["location"]
    assert "0 3 * * *" in visitor.get("/ui/schedules").text

    assert sent(visitor, f"{here}/run").status_code == 303
    page = visitor.get(here).text
    assert re.search(r"started.*/ui/jobs/ftjob-\w+", page, re.DOTALL)
    assert sent(visitor, f"{here}/pause").status_code == 303
    assert "paused since" in visitor.get(here).text
    assert sent(visitor, f"{here}/resume").status_code == 303
    assert "paused since" not in visitor.get(here).text
    assert sent(visitor, f"{here}/delete").status_code == 303
    assert visitor.get(here).status_code == 404


def test_a_sweep_shows_its_trials_and_is_paused_and_cancelled(site: Api, visitor: httpx2.Client, job: str) -> None:
    with session_scope(site.engine) as session:
        here = f"/ui/sweeps/{page_products.make_sweep(session, site.caller, 'words', job_id=job)}"

    page = visitor.get(here).text
    assert "learning_rate" in page
    assert f'href="/ui/compare?job={job}"' in page
    assert sent(visitor, f"{here}/pause").status_code == 303
    assert f"{here}/resume" in visitor.get(here).text
    assert sent(visitor, f"{here}/resume").status_code == 303
    assert sent(visitor, f"{here}/cancel").status_code == 303
    assert "cancelled" in visitor.get(here).text
    assert f"{here}/cancel" not in visitor.get(here).text
