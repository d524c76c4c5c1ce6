"""Every page of the project: hostile text stays text, another project stays unnamed, and scopes decide."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from html import unescape
from pathlib import Path

import httpx2
import pytest
from sqlalchemy import Engine, event, update

from api.ui import page_files, rendering, wing
from api.ui.page_headers import POLICY
from shared.jobs import moves, trainer_log
from shared.lease.journal import NewEvent
from shared.products import adapters
from shared.store.db import session_scope
from shared.store.tables import JobRow, ProjectRow, WorkerRow
from shared.tenants import audit, keys
from shared.tenants.keys import Caller
from tests import page_products
from tests.browsing import browser, proof_of
from tests.factories import claim_on, make_file, make_key, make_queued_job, make_worker
from tests.integration.conftest import Api

EVIL = "<img src=x onerror=alert(1)>\"'&\u202e"
ESCAPED = "&lt;img src=x onerror=alert(1)&gt;"
SECRET = "another-projects-own-words"


@dataclass(frozen=True)
class Site:
    """What stands in every field that a tenant writes."""

    api: Api
    key: str
    caller: Caller
    running: str
    ended: str
    queued: str
    adapter: str
    file: str
    preflight: str
    evaluation: str
    alias: str
    webhook: str
    schedule: str
    sweep: str
    theirs: str

    @property
    def project(self) -> str:
        return self.caller.project_id


def seed(api: Api, *, words: str, name: str) -> Site:
    with session_scope(api.engine) as session:
        _, key = make_key(session, name=name, scopes=("*", "admin"))
        caller = keys.authenticate(session, key)
        session.get_one(ProjectRow, caller.project_id).name = words
        keys.create(session, project_id=caller.project_id, name=words, scopes=("jobs:read",))
        worker = make_worker(session, devices=1, name=words)
        session.get_one(WorkerRow, worker.id).host = words
        file = make_file(session, caller, filename=words, status_details=words)
        file.report = {
            "format": "chat",
            "rows": 20,
            "dropped_columns": [words],
            "warnings": [{"code": "dropped_columns", "message": words, "line": 1, "rows": 1}],
        }
        metadata = {words[:60]: words}
        ended = _trained(session, caller, worker, words, file=file, metadata=metadata)
        adapter = session.get_one(JobRow, ended).fine_tuned_model
        job = make_queued_job(session, caller, file=file, metadata=metadata)
        claim = claim_on(session, worker)
        assert claim is not None
        moves.record(session, claim.lease, [NewEvent(words, level="error"), *_steps(30)])
        waiting = make_queued_job(session, caller, file=file, metadata=metadata)
        audit.record(session, caller, "job.cancel", words, before={"words": words}, after={"words": words})
        trainer_log.tell(session, job.id, claim.lease.fence, start=0, lines=f"{words}\n", size=len(words.encode()) + 1)
        preflight = page_products.make_preflight(session, caller, words, file_id=file.id)
        evaluation = page_products.make_evaluation(session, caller, words)
        alias = page_products.make_alias(session, caller, words, job_id=ended)
        webhook = page_products.make_webhook(session, caller, words)
        page_products.make_merge(session, caller, words, adapter=str(adapter))
        page_products.make_export(session, caller, words, adapter=str(adapter))
        page_products.make_promotion(session, caller, words, alias=alias)
        schedule = page_products.make_schedule(session, caller, words, job_id=ended)
        sweep = page_products.make_sweep(session, caller, words, job_id=ended)
        page_products.make_oidc_rule(session, caller, words)
    made = (job.id, ended, waiting.id, str(adapter), file.id, preflight, evaluation, alias, webhook, schedule, sweep)
    return Site(api, key, caller, *made, "")


def _steps(count: int) -> list[NewEvent]:
    return [
        NewEvent(
            f"Step {step}",
            type="metrics",
            data={
                "step": step,
                "total_steps": count,
                "train_loss": 1 / step,
                "learning_rate": 0.1,
                "trained_tokens": 10 * step,
                "seconds_per_step": 0.5,
                "memory_bytes": 2**29 * step,
            },
        )
        for step in range(1, count + 1)
    ]


def _trained(session, caller, worker, words: str, **job) -> str:
    made = make_queued_job(session, caller, **job)
    claim = claim_on(session, worker)
    assert claim is not None
    moves.record(session, claim.lease, [NewEvent(words, level="warn"), *_steps(5)])
    moves.record_checkpoint(
        session,
        claim.lease,
        step=1,
        name=f"{claim.model_name}:ckpt-step-1",
        metrics={"step": 1, "train_loss": 1.0},
        manifest={"prefix": "c", "files": []},
    )
    manifest = {"prefix": "p", "files": [{"name": words.replace("/", ""), "bytes": 3, "sha256": "0" * 64}]}
    assert moves.succeed(session, claim.lease, manifest=manifest)
    session.execute(
        update(JobRow)
        .where(JobRow.id == made.id)
        .values(
            error={"code": "data_error", "message": words, "param": words},
            auto=[{"field": "training.learning_rate", "value": words, "reason": words}],
        )
    )
    return made.id


@pytest.fixture(scope="module")
def site(api: Api) -> Site:
    other = seed(api, words=SECRET, name=SECRET)
    mine = seed(api, words=EVIL, name=EVIL)
    return Site(**{**mine.__dict__, "theirs": other.running})


@pytest.fixture(scope="module")
def visitor(site: Site) -> Iterator[httpx2.Client]:
    with browser(site.api.url, site.key) as client:
        yield client


Without = Callable[[str | None], httpx2.Client]


@pytest.fixture(scope="module")
def without(site: Site) -> Iterator[Without]:
    """A browser that is signed in with every scope but one."""
    opened: dict[str | None, httpx2.Client] = {}
    with ExitStack() as stack:

        def sign_in(scope: str | None) -> httpx2.Client:
            if scope not in opened:
                scopes = keys.SCOPES - {scope} - (set() if scope == "admin" else {"*"})
                with session_scope(site.api.engine) as session:
                    _, key = keys.create(
                        session, project_id=site.caller.project_id, name="narrow", scopes=sorted(scopes)
                    )
                opened[scope] = stack.enter_context(browser(site.api.url, key))
            return opened[scope]

        yield sign_in


PAGES = {
    "/ui/jobs": ("jobs:read", 6),
    "/ui/jobs?metadata=a%3Db&status=queued&model=x&group=%3Cb%3E": ("jobs:read", 0),
    "/ui/jobs/{running}": ("jobs:read", 3),
    "/ui/jobs/{ended}": ("jobs:read", 5),
    "/ui/jobs/{queued}?x=time": ("jobs:read", 2),
    "/ui/jobs/{running}/events": ("jobs:read", 1),
    "/ui/pool": ("jobs:read", 2),
    "/ui/compare": ("jobs:read", 0),
    "/ui/compare?job={running}&job={ended}&x=tokens": ("jobs:read", 3),
    "/ui/usage?group_by=key&group_by=label:a": ("jobs:read", 0),
    "/ui/new": ("jobs:write", 1),
    "/ui/new?like={ended}": ("jobs:write", 2),
    "/ui/preflights": ("jobs:read", 0),
    "/ui/preflights/{preflight}": ("jobs:read", 10),
    "/ui/preflights/{preflight}/change": ("jobs:write", 1),
    "/ui/files": ("files:read", 1),
    "/ui/files/{file}": ("files:read", 4),
    "/ui/models": ("models:read", 0),
    "/ui/models/{adapter}": ("models:read", 1),
    "/ui/models/base/smollm2-135m-instruct": ("models:read", 0),
    "/ui/playground?model={adapter}": ("models:read", 0),
    "/ui/evaluations": ("jobs:read", 2),
    "/ui/evaluations/{evaluation}": ("jobs:read", 20),
    "/ui/aliases": ("models:read", 1),
    "/ui/aliases/{alias}": ("models:read", 6),
    "/ui/aliases/{alias}?first=1&second=2": ("models:read", 6),
    "/ui/webhooks": ("jobs:read", 3),
    "/ui/webhooks/{webhook}": ("jobs:read", 4),
    "/ui/schedules": ("jobs:read", 2),
    "/ui/schedules/{schedule}": ("jobs:read", 4),
    "/ui/sweeps": ("jobs:read", 2),
    "/ui/sweeps/{sweep}": ("jobs:read", 4),
    "/ui/projects": ("admin", 1),
    "/ui/projects/{project}": ("admin", 3),
    "/ui/keys": ("admin", 1),
    "/ui/rules": ("admin", 3),
    "/ui/audit": ("admin", 2),
    "/ui/account": (None, 1),
}


def filled(path: str, site: Site) -> str:
    return re.sub(r"{(\w+)}", lambda name: getattr(site, name[1]), path)


@pytest.mark.parametrize("path", PAGES)
def test_hostile_words_stay_words_on_every_page(site: Site, visitor: httpx2.Client, path: str) -> None:
    answer = visitor.get(filled(path, site))
    html = answer.text

    assert answer.status_code == 200, html
    assert answer.headers["content-security-policy"] == POLICY
    assert html.count(ESCAPED) >= PAGES[path][1]
    assert "<img src=x" not in html
    assert "\u202e" not in re.sub(r"<[a-zA-Z][^<>]*>", "", html)
    tags = re.findall(r"<[a-zA-Z][^<>]*>", html)
    assert [tag for tag in tags if re.search(r"\s(style|on\w+)=", re.sub(r'"[^"]*"', '""', tag))] == []
    assert re.findall(r"<script(?! defer src=\"/ui/files-of-the-page/)", html) == []
    assert "<style" not in html
    assert len(html.encode()) < 100_000


LIVE = ("/ui/jobs", "/ui/jobs/{running}", "/ui/jobs/{queued}?x=time", "/ui/pool")


@pytest.mark.parametrize("path", PAGES)
def test_a_page_has_one_stream_at_most_and_what_lives_loads_again_without_script(
    site: Site, visitor: httpx2.Client, path: str
) -> None:
    html = visitor.get(filled(path, site)).text
    streams = html.count("hx-sse:connect")

    assert streams == (path in LIVE or path.startswith("/ui/jobs?"))
    by_itself = html.count('<meta name="look-again"')  # a page that page.js loads again
    loads_again = re.findall('<noscript><meta http-equiv="refresh" content="[0-9]+"></noscript>', html)
    assert streams + by_itself == len(loads_again) == html.count("http-equiv")
    polite = re.findall('class="([^"]*)" aria-live="polite"', html)
    assert html.count("aria-live") == len(polite)
    assert [kind.split()[:2] for kind in polite] in ([], [["card", "situation"]])


@pytest.mark.parametrize("path", [path for path, (scope, _) in PAGES.items() if scope != "admin"])
def test_another_projects_names_never_appear(site: Site, without: Without, path: str) -> None:
    html = without("admin").get(filled(path, site)).text

    # A device is the pool's, and its worker's host has a name for everybody.
    if not path.startswith("/ui/pool"):
        assert SECRET not in html
    assert site.theirs not in html


@pytest.mark.parametrize(
    "path",
    [
        "/ui/jobs/{theirs}",
        "/ui/jobs/{theirs}/curves",
        "/ui/jobs/{theirs}/metrics.csv",
        "/ui/jobs/{theirs}/events",
        "/ui/jobs/{theirs}/log.txt",
        "/ui/live/jobs/{theirs}",
        "/ui/new?like={theirs}",
    ],
)
def test_another_projects_job_is_not_there(site: Site, visitor: httpx2.Client, path: str) -> None:
    assert visitor.get(filled(path, site)).status_code == 404


def test_an_operator_lists_another_projects_jobs_and_nobody_else_does(
    site: Site, visitor: httpx2.Client, without: Without
) -> None:
    with session_scope(site.api.engine) as session:
        theirs = session.get_one(JobRow, site.theirs).project_id
    address = f"/ui/jobs?project={theirs}"

    listed = visitor.get(address).text
    refused = without("admin").get(address)

    assert site.theirs in listed
    assert site.running not in listed
    assert f"/ui/jobs/{site.theirs}" not in listed
    assert "hx-sse:connect" not in listed
    assert refused.status_code == 403
    assert site.theirs not in refused.text
    assert 'name="project"' not in without("admin").get("/ui/jobs").text


def test_a_comparison_says_nothing_of_another_projects_job(site: Site, visitor: httpx2.Client) -> None:
    told = visitor.get(f"/ui/compare/curves?job={site.theirs}&job={site.ended}").json()

    assert {series["run"] for chart in told["charts"] for series in chart["series"]} == {0}


@pytest.mark.parametrize("path", PAGES)
def test_a_page_needs_the_scope_of_its_route(site: Site, without: Without, path: str) -> None:
    scope = PAGES[path][0]
    answer = without(scope).get(filled(path, site))

    assert answer.status_code == (200 if scope is None else 403)


FORMS = {
    "/ui/jobs/{queued}/cancel": "jobs:write",
    "/ui/jobs/{queued}/pause": "jobs:write",
    "/ui/jobs/{queued}/resume": "jobs:write",
    "/ui/jobs/{queued}/hold": "jobs:write",
    "/ui/jobs/{queued}/priority": "jobs:write",
    "/ui/new": "jobs:write",
    "/ui/demo": "jobs:write",
    "/ui/preflights/{preflight}/submit": "jobs:write",
    "/ui/files/{file}/delete": "files:write",
    "/ui/files": "files:write",
    "/ui/models": "admin",
    "/ui/models/base/x/check": "admin",
    "/ui/models/base/x/prefetch": "admin",
    "/ui/pool/hold": "admin",
    "/ui/pool/release": "admin",
    "/ui/pool/workers/x/drain": "admin",
    "/ui/pool/devices/quarantine": "admin",
    "/ui/pool/devices/release": "admin",
    "/ui/pool/projects/x/hold": "admin",
    "/ui/projects": "admin",
    "/ui/projects/{project}": "admin",
    "/ui/projects/{project}/hold": "admin",
    "/ui/projects/{project}/release": "admin",
    "/ui/keys": "admin",
    "/ui/keys/x/revoke": "admin",
    "/ui/keys/x/rotate": "admin",
    "/ui/rules": "admin",
    "/ui/rules/x/delete": "admin",
    "/ui/jobs/{ended}/merges": "models:write",
    "/ui/jobs/{ended}/merges/x/delete": "models:write",
    "/ui/jobs/{ended}/exports": "models:write",
    "/ui/jobs/{ended}/pushes": "models:write",
    "/ui/jobs/{ended}/exports/x/delete": "models:write",
    "/ui/aliases/{alias}/promotions/x/approve": "models:write",
    "/ui/aliases/{alias}/promotions/x/withdraw": "models:write",
    "/ui/schedules": "jobs:write",
    "/ui/schedules/{schedule}/run": "jobs:write",
    "/ui/schedules/{schedule}/pause": "jobs:write",
    "/ui/schedules/{schedule}/resume": "jobs:write",
    "/ui/schedules/{schedule}/delete": "jobs:write",
    "/ui/sweeps/{sweep}/pause": "jobs:write",
    "/ui/sweeps/{sweep}/resume": "jobs:write",
    "/ui/sweeps/{sweep}/cancel": "jobs:write",
    "/ui/evaluations": "jobs:write",
    "/ui/evaluations/{evaluation}/cancel": "jobs:write",
    "/ui/evaluations/{evaluation}/delete": "jobs:write",
    "/ui/aliases": "models:write",
    "/ui/aliases/{alias}/promote": "models:write",
    "/ui/aliases/{alias}/rollback": "models:write",
    "/ui/aliases/{alias}/delete": "models:write",
    "/ui/webhooks": "jobs:write",
    "/ui/webhooks/{webhook}/test": "jobs:write",
    "/ui/webhooks/{webhook}/rotate": "jobs:write",
    "/ui/webhooks/{webhook}/enable": "jobs:write",
    "/ui/webhooks/{webhook}/disable": "jobs:write",
    "/ui/webhooks/{webhook}/delete": "jobs:write",
    "/ui/webhooks/{webhook}/deliveries/x/replay": "jobs:write",
}


@pytest.mark.parametrize("path", FORMS)
def test_a_form_needs_its_proof_and_the_scope_of_its_route(
    site: Site, visitor: httpx2.Client, without: Without, path: str
) -> None:
    narrow = without(FORMS[path])

    unproven = visitor.post(filled(path, site), data={"proof": "0" * 64})
    unscoped = narrow.post(filled(path, site), data={"proof": proof_of(narrow)})

    assert (unproven.status_code, unscoped.status_code) == (403, 403)
    assert FORMS[path] in unscoped.text


def test_every_form_of_the_page_is_in_the_table() -> None:
    forms = [route.path for part in wing.PARTS for route in part.router.routes if "POST" in route.methods]
    patterns = {path: re.sub(r"{\w+}", "[^/]+", path) for path in forms if not path.startswith("/ui/sign-")}
    missing = {path for path, pattern in patterns.items() if not any(re.fullmatch(pattern, form) for form in FORMS)}

    assert missing == {"/ui/playground/answers"}  # its proof is in a header; it has a test of its own


def test_a_list_of_a_hundred_jobs_asks_as_often_as_one_of_ten(site: Site) -> None:
    with session_scope(site.api.engine) as session:
        _, key = make_key(session)
        caller = keys.authenticate(session, key)
        file = make_file(session, caller)
        for _ in range(10):
            make_queued_job(session, caller, file=file)
    with browser(site.api.url, key) as client:
        few = _statements(site, client)
        with session_scope(site.api.engine) as session:
            for _ in range(90):
                make_queued_job(session, caller, file=file)
        many = _statements(site, client)

        assert many == few
        assert len(client.get("/ui/jobs").content) < 100_000


def _statements(site: Site, client: httpx2.Client) -> int:
    counted: list[str] = []

    def count(*told: object) -> None:
        counted.append(str(told[2]))

    event.listen(Engine, "before_cursor_execute", count)
    try:
        assert client.get("/ui/jobs").status_code == 200
    finally:
        event.remove(Engine, "before_cursor_execute", count)
    return len(counted)


def test_files_of_the_page_are_within_their_budget() -> None:
    sizes = {name: len(file.content) for name, file in page_files.FILES.items()}

    assert sum(size for name, size in sizes.items() if name.endswith(".js")) <= 150_000
    assert sum(size for name, size in sizes.items() if name.endswith(".css")) <= 40_000


def test_a_tuned_model_is_chosen_to_go_on_from_in_the_form(site: Site, visitor: httpx2.Client) -> None:
    with session_scope(site.api.engine) as session:
        tuned = adapters.of_job(session, site.ended)
        assert tuned is not None
        adapter_id = tuned.id  # no body may hold the control character of its name
    form = {"proof": proof_of(visitor), "model": adapter_id, "training_file": site.file, "init_from": "merged"}
    choices = unescape(visitor.get("/ui/new").text)
    assert f'<option value="{site.adapter}">' in choices

    submitted = visitor.post("/ui/new", data=form)
    assert submitted.status_code == 303, submitted.text
    job = submitted.headers["location"]
    with session_scope(site.api.engine) as session:
        row = session.get_one(JobRow, job.rsplit("/", 1)[1])
        assert (row.parent_name, row.request["tunepool"]["adapter"]) == (site.adapter, {"init_from": "merged"})
        job_id = row.id
    assert "<dt>Goes on from</dt>" in visitor.get(job).text
    again = unescape(visitor.get(f"/ui/new?like={job_id}").text)
    assert '<option value="merged" selected>' in again
    assert f'<option value="{adapter_id}" selected>' in again
    visitor.post(f"{job}/cancel", data={"proof": form["proof"]})


def test_a_job_is_submitted_checked_and_cancelled_by_forms_alone(site: Site, visitor: httpx2.Client) -> None:
    form = {
        "proof": proof_of(visitor),
        "model": "smollm2-135m-instruct",
        "training_file": site.file,
        "n_epochs": "2",
        "suffix": "by-hand",
        "metadata": "team=shop",
        "learning_rate": "0.001",
        "more": '{"training": {"packing": false}}',
    }
    submitted = visitor.post("/ui/new", data=form)
    assert submitted.status_code == 303, submitted.text
    job_id = submitted.headers["location"].rsplit("/", 1)[1]
    with session_scope(site.api.engine) as session:
        request = session.get_one(JobRow, job_id).request
    assert request["method"]["supervised"]["hyperparameters"] == {"n_epochs": 2}
    assert request["tunepool"]["training"] == {"packing": False, "learning_rate": 0.001}
    assert request["metadata"] == {"team": "shop"}
    again = visitor.get(f"/ui/new?like={job_id}").text
    assert 'value="by-hand"' in again

    checked = visitor.post("/ui/new", data={**form, "act": "check"})
    assert checked.headers["location"].startswith("/ui/preflights/preflight_")
    assert visitor.get(checked.headers["location"]).status_code == 200

    cancelled = visitor.post(f"/ui/jobs/{job_id}/cancel", data={"proof": form["proof"]})
    assert cancelled.headers["location"] == f"/ui/jobs/{job_id}"
    assert "Cancelled" in visitor.get(f"/ui/jobs/{job_id}").text


@pytest.mark.parametrize(
    ("field", "value", "said"),
    [
        ("n_epochs", "many", "must be a number"),
        ("n_epochs", "99", "n_epochs"),
        ("more", "{", "no JSON"),
        ("metadata", "nothing", "name=value"),
        ("model", "<b>", "&lt;b&gt;"),
    ],
)
def test_a_form_with_a_fault_comes_back_as_it_was_filled(
    site: Site, visitor: httpx2.Client, field: str, value: str, said: str
) -> None:
    form = {"proof": proof_of(visitor), "model": "smollm2-135m-instruct", "training_file": site.file, "suffix": "kept"}
    answer = visitor.post("/ui/new", data={**form, field: value})

    assert answer.status_code == (404 if field == "model" else 400), "as the API answers"
    assert said in answer.text
    assert 'value="kept"' in answer.text


@pytest.mark.parametrize(
    ("fields", "field", "said"),
    [
        ({"n_epochs": "many"}, "n_epochs", "This must be a number"),
        ({"n_epochs": "99"}, "n_epochs", "50"),
        ({"n_epochs": "2", "max_steps": "9"}, "max_steps", "drop one of them"),
        ({"n_epochs": "2", "more": '{"training": {"max_steps": 9}}'}, "more", "drop one of them"),
        ({"r": "8", "more": '{"adapter": {"r": 16}}'}, "r", "give it in one place"),
        ({"more": '{"training": {"paking": true}}'}, "more", "paking"),
        ({"metadata": "nothing"}, "metadata", "name=value"),
        ({"group": "g" * 500}, "group", "A-Za-z0-9"),
        ({"model": "nobodys"}, "model", "nobodys"),
        ({"training_file": "file-nobodys"}, "training_file", "file-nobodys"),
    ],
)
def test_an_error_stands_beside_its_field_which_has_the_focus(
    site: Site, visitor: httpx2.Client, fields: dict[str, str], field: str, said: str
) -> None:
    form = {"proof": proof_of(visitor), "model": "smollm2-135m-instruct", "training_file": site.file, "act": "check"}
    answer = visitor.post("/ui/new", data={**form, **fields})

    assert answer.status_code in (400, 404), answer.text
    marked = re.findall(
        r'name="(\w+)" id="fault-field" aria-invalid="true" aria-describedby="fault" autofocus', answer.text
    )
    assert marked == [field]
    (words,) = re.findall(r'<p class="fault" id="fault">(.*?)</p>', answer.text)
    assert said in unescape(words)
    assert 'href="#fault-field">To the field</a>' in answer.text


def test_a_file_is_brought_by_the_form(site: Site, visitor: httpx2.Client) -> None:
    action = re.findall(r'action="(/ui/files\?proof=\w+)"', visitor.get("/ui/files").text)[0]
    rows = "\n".join(json.dumps({"text": f"row {number}"}) for number in range(12)).encode()

    wrong = visitor.post("/ui/files?proof=0", data={"purpose": "fine-tune"}, files={"file": ("rows.jsonl", rows)})
    right = visitor.post(action, data={"purpose": "fine-tune"}, files={"file": ("rows.jsonl", rows)})

    assert wrong.status_code == 403
    assert right.status_code == 303, right.text
    assert "rows.jsonl" in visitor.get(right.headers["location"]).text


def test_a_file_that_is_dropped_on_the_form_of_a_new_job_is_chosen_there(site: Site, visitor: httpx2.Client) -> None:
    form = visitor.get("/ui/new").text
    action = unescape(re.findall(r'action="(/ui/files\?[^"]+)"', form)[0])
    lines = "\n".join(json.dumps({"text": f"row {number}"}) for number in range(12)).encode()

    answer = visitor.post(action, data={"purpose": "fine-tune"}, files={"file": ("dropped.jsonl", lines)})

    assert answer.status_code == 303, answer.text
    filled_in = visitor.get(answer.headers["location"]).text
    (chosen,) = re.findall(r'name="training_file"[^>]*>.*?<option value="([^"]+)" selected>dropped.jsonl', filled_in)
    assert answer.headers["location"] == f"/ui/new?file={chosen}"


def test_the_demo_job_is_one_click(site: Site, visitor: httpx2.Client) -> None:
    answer = visitor.post("/ui/demo", data={"proof": proof_of(visitor)})

    assert answer.status_code == 303, answer.text
    assert visitor.get(answer.headers["location"]).status_code == 200


def test_a_secret_is_shown_once(site: Site, visitor: httpx2.Client) -> None:
    form = {"proof": proof_of(visitor), "project_id": site.caller.project_id, "name": "ci", "scopes": ["jobs:read"]}
    made = visitor.post("/ui/keys", data=form).text
    secret = re.findall(r"tp_\w{32}_\w{6}", made)[0]

    assert secret not in visitor.get("/ui/keys").text
    with session_scope(site.api.engine) as session:
        caller = keys.authenticate(session, secret)
        assert caller.scopes == {"jobs:read"}

    rotated = visitor.post(f"/ui/keys/{caller.key_id}/rotate", data={"proof": proof_of(visitor)}).text
    assert "has a new secret" in rotated
    assert f"former {secret[:7]}… valid until" in rotated
    assert re.findall(r"tp_\w{32}_\w{6}", rotated) != [secret]


def test_a_rule_for_id_tokens_is_made_seen_and_deleted(site: Site, visitor: httpx2.Client) -> None:
    form = {
        "proof": proof_of(visitor),
        "project_id": site.caller.project_id,
        "name": "nightly build",
        "issuer": "https://token.actions.githubusercontent.com",
        "audience": "https://tunepool.example.org",
        "claims": "repository = acme/tickets\r\nref=refs/heads/main\r\n",
        "scopes": ["jobs:write", "files:write"],
        "life_minutes": "30",
    }
    wrong = visitor.post("/ui/rules", data={**form, "claims": "repository"})
    everybody = visitor.post("/ui/rules", data={**form, "claims": "repository = **"})
    made = visitor.post("/ui/rules", data=form)

    assert (wrong.status_code, everybody.status_code) == (400, 400)
    assert "one claim a line" in wrong.text
    assert made.status_code == 303, made.text
    seen = visitor.get("/ui/rules").text
    for told in ("nightly build", "repository = acme/tickets", "ref = refs/heads/main", "30 min", "never"):
        assert told in seen
    rule = re.findall(r"/ui/rules/(oidcrule_\w+)/delete", seen[seen.index("nightly build") :])[0]

    assert visitor.post(f"/ui/rules/{rule}/delete", data={"proof": proof_of(visitor)}).status_code == 303
    assert "nightly build" not in visitor.get("/ui/rules").text


def test_a_project_is_made_changed_held_and_released(site: Site, visitor: httpx2.Client) -> None:
    proof = {"proof": proof_of(visitor)}
    made = visitor.post("/ui/projects", data={**proof, "name": "search", "max_running": "4", "budget_gpu_hours": "2.5"})
    assert made.status_code == 303, made.text
    where = made.headers["location"]
    taken = visitor.post("/ui/projects", data={**proof, "name": "search"})
    crossed = visitor.post(where, data={**proof, "name": "search", "guarantee": "9", "max_running": "4"})
    worded = visitor.post(where, data={**proof, "name": "search", "weight": "heavy"})
    assert (taken.status_code, crossed.status_code, worded.status_code) == (409, 400, 400)
    assert "must be a number" in worded.text
    changed = visitor.post(where, data={**proof, "name": "search 2", "weight": "3", "max_running": ""})
    held = visitor.post(f"{where}/hold", data=proof)
    unknown = visitor.post(f"{where}/burn", data=proof)

    assert (changed.status_code, held.status_code, unknown.status_code) == (303, 303, 404)
    page = visitor.get(where).text
    assert "None of its jobs is started" in page
    with session_scope(site.api.engine) as session:
        row = session.get_one(ProjectRow, where.rsplit("/", 1)[1])
        assert (row.name, row.weight, row.max_running, row.budget_device_seconds) == ("search 2", 3.0, None, None)
        assert row.held
    assert visitor.post(f"{where}/release", data=proof).status_code == 303
    assert "None of its jobs is started" not in visitor.get(where).text


def test_curves_have_every_series_and_the_csv_every_step(site: Site, visitor: httpx2.Client) -> None:
    told = visitor.get(f"/ui/jobs/{site.running}/curves?x=tokens").json()
    series = {entry["name"]: entry["points"] for chart in told["charts"] for entry in chart["series"]}

    assert len(series["train_loss"]) == 30
    assert series["train_loss"][1] == [20, 0.5]
    assert series["throughput"][0][1] == 20.0
    assert series["memory"][2] == [30, 1.5]
    assert len(visitor.get(f"/ui/jobs/{site.running}/metrics.csv").text.splitlines()) == 31


def test_a_job_that_has_trained_no_step_says_when_its_curves_begin_and_shows_no_empty_ones(
    site: Site, visitor: httpx2.Client
) -> None:
    html = visitor.get(f"/ui/jobs/{site.queued}").text

    assert "They begin with the first step." in html
    assert re.findall(r'<figure class="card chart" data-chart="\w+">', html) == []


def test_settings_show_first_what_was_chosen_and_why_and_then_all_values(site: Site, visitor: httpx2.Client) -> None:
    html = visitor.get(f"/ui/jobs/{site.ended}").text
    chosen, _, every = html.partition("All values of the job")
    row = '<th scope="row"><code>{}</code></th>'

    assert row.format("training.learning_rate") in chosen
    assert row.format("data.format") not in chosen
    assert row.format("data.format") in every


def test_usage_is_told_by_names_to_who_may_see_them_and_by_any_name_of_the_metadata(
    site: Site, visitor: httpx2.Client, without: Without
) -> None:
    assert f"<td>{ESCAPED}" in visitor.get("/ui/usage").text
    assert ESCAPED not in without("admin").get("/ui/usage").text.partition("<table")[2]

    labelled = visitor.get("/ui/usage?label=branch").text

    assert re.search(r'<input name="label" type="text" value="branch"', labelled)
    assert '<th scope="col">Branch</th>' in labelled
    assert "group_by=label%3Abranch" in labelled  # of the CSV file


def test_a_playground_that_is_not_there_says_so(visitor: httpx2.Client) -> None:
    proof = {"X-Page-Proof": proof_of(visitor)}
    body = {"model": "smollm2-135m-instruct", "messages": [{"role": "user", "content": "Hello"}]}

    assert visitor.post("/ui/playground/answers", json=body).status_code == 403
    answer = visitor.post("/ui/playground/answers", json=body, headers=proof)
    assert answer.status_code == 503
    assert "playground" in answer.json()["error"]["message"]


def test_without_the_parts_the_page_says_what_is_missing(site: Site, visitor: httpx2.Client) -> None:
    kept = rendering.ENVIRONMENT.globals["missing"]
    rendering.ENVIRONMENT.globals["missing"] = ("htmx.js",)
    try:
        html = visitor.get(f"/ui/jobs/{site.running}").text
    finally:
        rendering.ENVIRONMENT.globals["missing"] = kept

    assert "standalone.page_parts" in html
    assert "hx-sse" not in html
    assert "Starting" in html


def test_every_column_and_every_button_has_words_for_those_who_hear_the_page() -> None:
    templates = Path(rendering.__file__).parent / "templates"
    silent = re.compile(r"<(th|button|label|h[1-6])\b[^>]*>\s*</\1>")

    assert [path.name for path in sorted(templates.glob("*.html")) if silent.search(path.read_text("utf-8"))] == []
