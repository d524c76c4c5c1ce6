"""Every form of the page: a bad value in any field comes back on the same page, beside its field, with nothing lost."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from html.parser import HTMLParser
from urllib.parse import unquote

import httpx2
import pytest
from cryptography.fernet import Fernet

from api.ui import wing
from shared.jobs import moves
from shared.settings import Settings
from shared.store.db import session_scope
from shared.tenants import keys, project_secrets
from shared.tenants.secret_box import SecretBox
from tests import page_products
from tests.browsing import browser
from tests.factories import claim_on, make_file, make_key, make_queued_job, make_worker
from tests.integration.conftest import Api
from tests.live import live_api

LONG = "x" * 5000


@dataclass
class Field:
    """A control that a visitor fills in."""

    name: str
    kind: str  # text, textarea, select, checkbox, file
    value: str
    marked: bool
    options: list[str] = field(default_factory=list)


@dataclass
class Form:
    action: str
    hidden: dict[str, str]
    fields: dict[str, Field]
    faults: list[str]  # what stands in it beside a field


class Forms(HTMLParser):
    """The forms of a page: those that are sent, or those that filter it."""

    def __init__(self, html: str, *, method: str = "post") -> None:
        super().__init__()
        self._method = method
        self.made: list[Form] = []
        self._form: Form | None = None
        self._text: list[str] | None = None
        self._field: Field | None = None
        self._boxes_marked = False
        self.feed(html)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        given = {name: value or "" for name, value in attrs}
        if tag == "form" and given.get("method") == self._method:
            self._form = Form(given["action"], {}, {}, [])
            self.made.append(self._form)
        if self._form is None:
            return
        marked = given.get("id") == "fault-field" and given.get("aria-describedby") == "fault" and "autofocus" in given
        if tag == "fieldset":
            self._boxes_marked = marked
        elif tag == "option" and self._field is not None:
            self._field.options.append(given.get("value", ""))
            if "selected" in given:
                self._field.value = given.get("value", "")
        elif tag == "p" and given.get("id") == "fault":
            self._text = []
        elif tag in ("input", "textarea", "select"):
            self._control(tag, given, marked)

    def _control(self, tag: str, given: dict[str, str], marked: bool) -> None:
        assert self._form is not None
        kind = given.get("type", "text") if tag == "input" else tag
        if kind == "hidden":
            self._form.hidden[given["name"]] = given.get("value", "")
            return
        marked = (marked and (kind == "select" or given.get("aria-invalid") == "true")) or (
            kind == "checkbox" and self._boxes_marked
        )
        shape = {"number": "text", "url": "text"}.get(kind, kind)
        value = "" if shape == "checkbox" and "checked" not in given else given.get("value", "")
        self._field = Field(given["name"], shape, value, marked)
        earlier = self._form.fields.get(given["name"])
        if earlier is not None:  # boxes of one name
            earlier.options.append(given.get("value", ""))
            earlier.marked = earlier.marked or marked
        else:
            if shape == "checkbox":
                self._field.options.append(given.get("value", ""))
            self._form.fields[given["name"]] = self._field
        if tag == "textarea":
            self._text = []

    def handle_data(self, data: str) -> None:
        if self._text is not None:
            self._text.append(data)

    def handle_endtag(self, tag: str) -> None:
        if tag == "form":
            self._form = None
        elif tag == "fieldset":
            self._boxes_marked = False
        elif tag == "textarea" and self._field is not None and self._text is not None:
            self._field.value = "".join(self._text)
            self._text = None
        elif tag == "p" and self._form is not None and self._text is not None:
            self._form.faults.append("".join(self._text))
            self._text = None


@dataclass(frozen=True)
class Place:
    """A page with forms, and the names in its address."""

    names: dict[str, str]
    client: httpx2.Client

    def at(self, path: str) -> str:
        return re.sub(r"{(\w+)}", lambda name: self.names[name[1]], path)


@pytest.fixture(scope="module")
def place(api: Api) -> Iterator[Place]:
    """An API that pushes to a hub, too."""
    secret = {"push_url": "http://127.0.0.1:9", "secrets_key": Fernet.generate_key().decode()}
    hub = Settings.model_validate({**api.settings.model_dump(), **secret})
    with session_scope(api.engine) as session:
        _, key = make_key(session, name="forms", scopes=("*", "admin"))
        caller = keys.authenticate(session, key)
        worker = make_worker(session, devices=1)
        ended = make_queued_job(session, caller)
        claim = claim_on(session, worker)
        assert claim is not None
        files = [{"name": "adapter_model.safetensors", "bytes": 3, "sha256": "0" * 64}]
        assert moves.succeed(session, claim.lease, manifest={"prefix": "p", "files": files})
        waiting = make_queued_job(session, caller)
        names = {
            "ended": ended.id,
            "waiting": waiting.id,
            "file": make_file(session, caller).id,
            "model": claim.model_name,
            "project": caller.project_id,
            "alias": page_products.make_alias(session, caller, "words", job_id=ended.id),
            "webhook": page_products.make_webhook(session, caller, "words"),
            "evaluation": page_products.make_evaluation(session, caller, "words"),
            "schedule": page_products.make_schedule(session, caller, "words", job_id=ended.id),
        }
        project_secrets.store(
            session, SecretBox(hub), project_secrets.HF_TOKEN, "hf_token", project_id=caller.project_id
        )
    with live_api(hub) as url, browser(url, key) as client:
        yield Place(names, client)


# Page -> action of a form there -> field -> a value that cannot be right. None: a box whose one value is always right,
# or words that may be anything.
BAD: dict[str, dict[str, dict[str, str | None]]] = {
    "/ui/new?file={file}": {
        "/ui/new": {
            "model": "nobodys", "training_file": "file-nobodys", "validation_file": "file-nobodys", "suffix": LONG,
            "objective": "guesswork", "method": "magic", "init_from": "thin-air", "n_epochs": "many", "max_steps": "-1",
            "batch_size": "0", "learning_rate": "fast", "max_length": "-7", "r": "no", "lora_alpha": "no", "seed": "no",
            "tier": "golden", "group": "g g", "metadata": "nothing", "more": "{",
        },
    },
    "/ui/evaluations": {
        "/ui/evaluations": {
            "subject": "ft:nobody", "second": "ft:nobody", "items": "file-nobodys", "name": LONG, "forgetting": None
        },
    },
    "/ui/aliases": {
        "/ui/aliases": {
            "alias": "ft:not this", "model": "ft:nobody", "evaluation": "eval_nobody", "reason": LONG,
            "gate": "assert: [", "force": None,
        },
    },
    "/ui/aliases/{alias}": {
        "/ui/aliases/{alias}/promote": {
            "model": "ft:nobody", "evaluation": "eval_nobody", "reason": LONG, "gate": "assert: [", "force": None
        },
    },
    "/ui/schedules": {
        "/ui/schedules": {
            "name": "no/name", "cron": "every day", "time_zone": "Mars/Base", "data_prefix": LONG, "overlap": "perhaps",
            "model": "nobodys", "training_file": "file-nobodys",
        },
    },
    "/ui/webhooks": {
        "/ui/webhooks": {"name": LONG, "url": "ftp://nowhere", "event_types": "fine_tuning.job.bored", "rich": None},
    },
    "/ui/webhooks/{webhook}": {
        "/ui/webhooks/{webhook}/test": {"event_type": "fine_tuning.job.bored"},
        "/ui/webhooks/{webhook}/rotate": {"keep": None},
    },
    "/ui/keys": {"/ui/keys": {"project_id": "proj_nobody", "name": LONG, "scopes": "everything"}},
    "/ui/rules": {
        "/ui/rules": {
            "name": LONG, "project_id": "proj_nobody", "issuer": "https://nobody.example", "audience": LONG,
            "life_minutes": "100000", "claims": "nothing", "scopes": "everything",
        },
    },
    "/ui/models": {"/ui/models": {"source": "no such source", "revision": "a b", "name": "ft:no"}},
    "/ui/projects": {
        "/ui/projects": {
            "name": LONG, "weight": "heavy", "guarantee": "-1", "max_running": "0.5", "max_queued": "-1",
            "max_files": "-1", "max_bytes": "big", "budget_gpu_hours": "-1", "budget_soft_gpu_hours": "-1",
        },
    },
    "/ui/projects/{project}": {
        "/ui/projects/{project}": {
            "name": LONG, "weight": "heavy", "guarantee": "-1", "max_running": "0.5", "max_queued": "-1",
            "max_files": "-1", "max_bytes": "big", "budget_gpu_hours": "-1", "budget_soft_gpu_hours": "-1",
        },
    },
    "/ui/jobs/{ended}": {
        "/ui/jobs/{ended}/merges": {"adapter": "ft:nobody", "onto": "sand"},
        "/ui/jobs/{ended}/exports": {
            "adapter": "ft:nobody", "format": "mp3", "quantization": "q0", "onto": "sand"
        },
        "/ui/jobs/{ended}/pushes": {"model": "ft:nobody", "repository": "nowhere at all", "public": None},
    },
    "/ui/jobs/{waiting}": {"/ui/jobs/{waiting}/priority": {"priority": "high", "tier": "golden"}},
}  # fmt: skip
# What the other fields hold meanwhile, where a form's own values would not do.
GOOD = {
    "model": "smollm2-135m-instruct", "subject": "smollm2-135m-instruct", "suffix": "kept", "name": "kept",
    "alias": "kept@prod", "reason": "kept", "force": "yes", "url": "https://ci.example.org/hooks", "cron": "0 3 * * *",
    "time_zone": "Europe/Berlin", "audience": "kept", "claims": "repository = acme/kept", "data_prefix": "kept-",
    "source": "acme/kept", "repository": "acme/kept",
}  # fmt: skip
UNFIT = {("/ui/aliases", "model"), ("/ui/aliases/{alias}/promote", "model")}


def form_at(html: str, action: str) -> Form:
    (form,) = [form for form in Forms(html).made if unquote(form.action) == action]
    return form


def filled(place: Place, form: Form, action: str, page: str) -> dict[str, str]:
    """The form as somebody fills it in who makes no mistake."""
    values = {}
    for name, each in form.fields.items():
        value = each.value or GOOD.get(name, "")
        if (page, name) in UNFIT or (action, name) in UNFIT:
            value = place.names["model"]
        if each.kind == "select":
            value = each.value or (each.options[0] if each.options else "")
        values[name] = value
    if "training_file" in values and "data_prefix" in values:
        values["training_file"] = ""
    if "evaluation" in values:
        values |= {"evaluation": "", "gate": ""}
    return values


CASES = [
    (page, action, name, bad)
    for page, forms in BAD.items()
    for action, fields in forms.items()
    for name, bad in fields.items()
    if bad is not None
]


@pytest.mark.parametrize(("page", "action", "name", "bad"), CASES, ids=lambda part: str(part)[:30])
def test_a_bad_value_comes_back_on_its_page_beside_its_field_and_nothing_is_lost(
    place: Place, page: str, action: str, name: str, bad: str
) -> None:
    client, sent_to = place.client, place.at(action)
    before = form_at(client.get(place.at(page)).text, sent_to)
    values = {**filled(place, before, action, page), name: bad}
    if name == "evaluation":
        values |= {"gate": "assert: candidate.right >= 0.9", "force": ""}
    if page == "/ui/rules" and name != "scopes":
        values["scopes"] = "jobs:write"
    if name == "gate":
        values |= {"evaluation": place.names["evaluation"], "force": ""}

    answer = client.post(sent_to, data={**before.hidden, **{key: value for key, value in values.items() if value}})

    assert 400 <= answer.status_code < 500, answer.text[:3000]
    title = re.findall(r"<h1>(.*?)<", client.get(place.at(page)).text)
    assert re.findall(r"<h1>(.*?)<", answer.text) == title, "another page"
    form = form_at(answer.text, sent_to)
    assert [each.name for each in form.fields.values() if each.marked] == [name], form.faults or re.findall(
        r'role="alert">(.*?)</p>', answer.text
    )
    assert len(form.faults) == 1
    assert answer.text.count('id="fault"') == 1
    assert '<p class="note bad" role="alert"><strong>Not done.</strong>' in answer.text
    shown = {key: each.value for key, each in form.fields.items() if each.kind != "checkbox"}
    assert shown == {key: values[key] for key in shown}


def test_the_table_has_every_field_of_every_form(place: Place) -> None:
    known = {(action, name) for forms in BAD.values() for action, fields in forms.items() for name in fields}
    paths = [route.path for part in wing.PARTS for route in part.router.routes if "GET" in route.methods]
    pages = [*BAD, *(path for path in paths if "{" not in path and "/live" not in path)]
    pages += ["/ui/files/{file}", "/ui/schedules/{schedule}", "/ui/evaluations/{evaluation}"]
    seen = set()
    for page in pages:
        answer = place.client.get(place.at(page))
        if not answer.headers.get("content-type", "").startswith("text/html"):
            continue
        for form in Forms(answer.text).made:
            action = unquote(form.action.partition("?")[0])
            for name, value in place.names.items():
                action = action.replace(value, f"{{{name}}}") if name != "model" else action
            kinds = {each.kind for each in form.fields.values()}
            if kinds - {"file", "password"}:
                seen |= {(action, name) for name in form.fields if name != "user"}
    assert {pair for pair in seen if pair[0] != "/ui/sign-in"} == known


# Page that a form filters -> field -> a value that cannot be right. None: whatever is asked for may be asked for.
BAD_FILTERS: dict[str, dict[str, str | None]] = {
    "/ui/jobs": {"status": "bored", "model": None, "group": None, "metadata": "nothing", "project": None},
    "/ui/usage": {"label": LONG, "group_by": None},
    "/ui/audit": {"target": None},
}


@pytest.mark.parametrize(
    ("page", "name", "bad"),
    [(page, name, bad) for page, fields in BAD_FILTERS.items() for name, bad in fields.items() if bad is not None],
    ids=lambda part: str(part)[:30],
)
def test_a_bad_filter_comes_back_on_its_page_beside_its_field_and_the_others_are_kept(
    place: Place, page: str, name: str, bad: str
) -> None:
    (before,) = Forms(place.client.get(page).text, method="get").made[:1]
    others = {key: "kept" for key, each in before.fields.items() if each.kind == "text" and key != name}

    answer = place.client.get(page, params={**others, name: bad})

    assert answer.status_code == 400
    assert '<p class="note bad" role="alert"><strong>Not done.</strong>' in answer.text
    (form,) = Forms(answer.text, method="get").made[:1]
    assert [each.name for each in form.fields.values() if each.marked] == [name]
    assert (len(form.faults), answer.text.count('id="fault"')) == (1, 1)
    assert {key: form.fields[key].value for key in (*others, name)} == {**others, name: bad}


def test_an_address_of_a_page_that_cannot_be_right_shows_the_page_and_what_is_wrong(place: Place) -> None:
    """Of what no field of it holds, and of a page that is not there, the error is told all the same."""
    for address in ("/ui/usage?group_by=stars", "/ui/aliases/{alias}?first=x&second=2"):
        answer = place.client.get(place.at(address))

        assert 400 <= answer.status_code < 500, address
        assert answer.text.count('role="alert"') == 1, address
    assert place.client.get("/ui/jobs/ftjob-nobody?x=tokens").status_code == 404


def test_the_table_has_every_field_of_every_filter(place: Place) -> None:
    paths = [route.path for part in wing.PARTS for route in part.router.routes if "GET" in route.methods]
    seen = set()
    for page in (path for path in paths if "{" not in path and "/live" not in path):
        answer = place.client.get(page)
        if answer.headers.get("content-type", "").startswith("text/html"):
            forms = Forms(answer.text, method="get").made
            seen |= {(page, name) for form in forms if form.action == page for name in form.fields}

    known = {(page, name) for page, fields in BAD_FILTERS.items() for name in fields}
    assert seen - {("/ui/compare", "job")} == known
