"""Every route of the document against hostile bodies, ids and queries, and against another project's key.

The routes, their fields and their parameters are read from the document: one that is added tomorrow is attacked without
being named here. Nothing may end in a fault of ours, and every refusal is OpenAI's envelope.
"""

from __future__ import annotations

import copy
import json
import re
import socket
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any
from urllib.parse import quote

import httpx2
import pytest

from shared.settle.catalogue import SMOLLM2
from shared.store.db import session_scope
from shared.tenants import keys
from tests.factories import make_file, make_key, make_queued_job, make_worker
from tests.integration.conftest import Api
from tests.integration.test_evals import ANSWERED, CHECK, CONFIG
from tests.integration.test_merges import make_adapter
from tests.integration.test_webhooks import new_key
from tests.live import live_api
from tests.openai_types import faults_of_error
from tests.patience import patience

DOCUMENT: dict[str, Any] = json.loads((Path(__file__).parents[1] / "unit" / "openapi.json").read_text(encoding="utf-8"))
HOOK = {"name": "ci", "url": "http://127.0.0.1:9/hook", "event_types": ["fine_tuning.job.succeeded"]}
ISSUER = "https://token.actions.githubusercontent.com"


@dataclass(frozen=True)
class Route:
    method: str
    path: str
    operation: dict[str, Any] = field(repr=False)

    @property
    def name(self) -> str:
        return f"{self.method} {self.path}"

    @property
    def fields(self) -> list[str]:
        """Of the path."""
        return re.findall(r"{(\w+)}", self.path)

    @property
    def queries(self) -> list[str]:
        return [one["name"] for one in self.operation.get("parameters", ()) if one["in"] == "query"]

    @property
    def asks_more(self) -> bool:
        """Whether it wants a body or a query besides the path: what lacks there may be told first."""
        needed = any(one["in"] == "query" and one.get("required") for one in self.operation.get("parameters", ()))
        return needed or "requestBody" in self.operation

    @property
    def body(self) -> dict[str, Any] | None:
        """The schema of its JSON body."""
        content = self.operation.get("requestBody", {}).get("content", {})
        schema: dict[str, Any] | None = content.get("application/json", {}).get("schema")
        return schema


ROUTES = [
    Route(method.upper(), path, operation)
    for path, methods in DOCUMENT["paths"].items()
    for method, operation in methods.items()
]
WITH_BODY = [route for route in ROUTES if route.body is not None]
WITH_FIELDS = [route for route in ROUTES if route.fields]
WITH_QUERY = [route for route in ROUTES if route.queries and route.method != "DELETE"]  # deleted, it is not asked twice


# --- an installation in which there is one of everything --------------------------------------------------------------


@dataclass(frozen=True)
class Place:
    """A live API, a key that may everything, and the id of one thing for each field of a path."""

    http: httpx2.Client
    stranger: httpx2.Client
    ids: dict[str, str]

    def path(self, route: Route, **instead: str) -> str:
        """The route with the id of what there is, or what is to stand there instead."""

        def one(found: re.Match[str]) -> str:
            name = found[1]
            own = self.ids.get(f"{route.path.split('/')[3] if name == 'name' else ''}{name}", "nothing")
            return instead.get(name, quote(own, safe=":@"))

        return re.sub(r"{(\w+)}", one, route.path)


@pytest.fixture(scope="module")
def place(api: Api) -> Iterator[Place]:
    secret = type(api.settings.secrets_key)(new_key())
    own = {"secrets_key": secret, "webhook_networks": "127.0.0.0/8", "pool": "attacked", "upload_seconds": 3600.0}
    settings = api.settings.model_copy(update=own)
    with session_scope(api.engine) as session:
        caller, _ = make_key(session)
        _, everything = keys.create(session, project_id=caller.project_id, name="all", scopes=keys.EVERYTHING)
        _, theirs = make_key(session)
        job = make_queued_job(session, caller)
        job.pool = "attacked"
        worker = make_worker(session, pool="attacked")
        ids = {
            "file_id": make_file(session, caller).id,
            "validation_file": make_file(session, caller, sha256="1" * 64).id,
            "job_id": job.id,
            "model": make_adapter(session, caller, method="lora"),
            "worker_id": worker.id,
            "device_id": f"{worker.id}:0",
            "key_id": caller.key_id,
            "project_id": caller.project_id,
        }
    with live_api(settings) as url:
        attacked = Api(url, caller, everything, settings, api.engine, api.client)
        with attacked.http() as http, attacked.http(theirs) as stranger:
            yield Place(http, stranger, furnished(http, ids))


def furnished(http: httpx2.Client, ids: dict[str, str]) -> dict[str, str]:
    """`ids` with one of all that is made by a route."""
    # The database is this file's own: nothing of it is put back.
    tuned, file, eval_path = ids["model"], ids["file_id"], "/v1/evals"
    job = {"model": SMOLLM2.ref.name, "training_file": file}
    claims = {"repository": "octo/app", "ref": "refs/heads/main"}

    def post(path: str, body: dict[str, Any] | None = None, *, method: str = "POST") -> dict[str, Any]:
        answer = http.request(method, path, json=body)
        assert answer.status_code == 200, (path, answer.text)
        made: dict[str, Any] = answer.json()
        return made

    def of(path: str, body: dict[str, Any]) -> str:
        return str(post(f"/v1/tunepool/{path}", body)["id"])

    ids["upload_id"] = post(
        "/v1/uploads", {"bytes": 3, "filename": "a.txt", "mime_type": "text/plain", "purpose": "user_data"}
    )["id"]
    ids["eval_id"] = post(eval_path, {"data_source_config": CONFIG, "testing_criteria": [CHECK]})["id"]
    ids["run_id"] = post(f"{eval_path}/{ids['eval_id']}/runs", {"data_source": ANSWERED})["id"]
    ids["checkpoint"] = ids["adapter"] = tuned
    ids["training_file"] = file
    ids["permission_id"] = "cp_nothing"
    ids["output_item_id"] = "outputitem_0"
    ids["adaptersname"] = ids["lineagename"] = tuned
    post("/v1/tunepool/aliases/attacked@prod/promote", {"model": tuned, "force": True, "reason": "a test"})
    ids["aliasesname"] = "attacked@prod"
    ids["modelsname"] = SMOLLM2.ref.name
    post("/v1/tunepool/secrets/WANDB_API_KEY", {"value": "x" * 40}, method="PUT")
    ids["secretsname"] = "WANDB_API_KEY"
    ids["merge_id"] = of("merges", {"adapter": tuned, "onto": "base"})
    ids["export_id"] = of("exports", {"adapter": tuned, "format": "gguf"})
    ids["preflight_id"], ids["chore_id"] = of("preflights", job), of("preflights", job)
    ids["sweep_id"] = of(
        "sweeps",
        {
            "job": {**job, "validation_file": ids["validation_file"]},
            "parameters": {"tunepool.training.learning_rate": [1e-4, 2e-4]},
            "strategy": {"type": "grid"},
        },
    )
    ids["schedule"] = of("schedules", {"name": "attacked", "cron": "30 2 * * *", "job": job})
    ids["webhook_id"] = of("webhooks", HOOK)
    rule = {"name": "ci", "issuer": ISSUER, "audience": "a", "claims": claims, "scopes": ["jobs:read"]}
    ids["rule_id"] = of("oidc/rules", rule | {"project_id": ids["project_id"]})
    ids["evaluation_id"] = of("evaluations", {"subjects": [tuned], "items": {"type": "suite", "suite": "general"}})
    return ids


# --- bodies -----------------------------------------------------------------------------------------------------------


@cache
def components() -> dict[str, Any]:
    schemas: dict[str, Any] = DOCUMENT["components"]["schemas"]
    return schemas


def resolved(schema: dict[str, Any]) -> dict[str, Any]:
    """The first of its alternatives that is no null."""
    while True:
        if "$ref" in schema:
            schema = components()[schema["$ref"].rpartition("/")[2]]
        elif branches := [one for name in ("anyOf", "oneOf", "allOf") for one in schema.get(name, ())]:
            schema = next((one for one in branches if one.get("type") != "null"), branches[0])
        else:
            return schema


def sample(schema: dict[str, Any], ids: dict[str, str], *, name: str = "", depth: int = 0) -> Any:
    """A value that the schema takes, with all fields down to the third level: handlers see what they expect."""
    node, below = resolved(schema), depth + 1
    if name in ids or "const" in node or "enum" in node:
        return ids[name] if name in ids else node.get("const", (node.get("enum") or [None])[0])
    if node.get("type") == "object":
        known = node.get("properties", {}) if depth < 3 else {}
        return {
            key: sample(known[key], ids, name=key, depth=below) for key in node.get("required", known) if key in known
        }
    if node.get("type") == "array":
        items = [sample(node.get("items", {}), ids, depth=below)] if depth < 4 else []
        return items * max(1, node.get("minItems", 1))
    plain = {"integer": node.get("minimum", 1), "number": node.get("minimum", 1), "boolean": False, "null": None}
    return plain.get(node.get("type", ""), "x" * max(1, node.get("minLength", 1)))


# Raw bodies that are no document, or one that no route asks for.
RAW = {
    "empty": b"",
    "null": b"null",
    "array": b"[]",
    "text": b'"a"',
    "number": b"0",
    "cut": b'{"a":',
    "not UTF-8": b'{"a": "\xff\xfe"}',
    "byte order mark": b"\xef\xbb\xbf{}",
    "NaN": b'{"a": NaN}',
    "overflow": b'{"a": 1e999}',
    "5,000 digits": b'{"a": ' + b"9" * 5000 + b"}",
    "100,000 brackets": b"[" * 100_000,
    "5,000 objects": b'{"a":' * 5000 + b"1" + b"}" * 5000,
    "lone surrogate": rb'{"a": "\ud800"}',
    "lone surrogate as a key": rb'{"\udfff": 1}',
    "NUL": rb'{"a": "\u0000"}',
    "a key twice": b'{"a": 1, "a": 2}',
    "nothing asked": b"{}",
}
# What each field of a body is replaced with; some of it is a good value for some field.
HOSTILE: dict[str, str] = {
    "null": "null",
    "true": "true",
    "-1": "-1",
    "2^63": str(2**63),
    "1e308": "1e308",
    "0.5": "0.5",
    "empty text": '""',
    "long text": json.dumps("x" * 5000),
    "NUL": r'"a\u0000b"',
    "lone surrogate": r'"\ud800"',
    "right to left": r'"\u202eevil"',
    "path": '"../../etc/passwd"',
    "template": '"{{item.__class__}}"',
    "empty list": "[]",
    "list": '[null, 1, "a", {}]',
    "empty object": "{}",
    "object": '{"a": {"b": [1]}, "type": "x"}',
    "deep": "[" * 30 + "]" * 30,
}
MARK = "\ue000"


def mutated(document: Any) -> Iterator[tuple[str, str, str]]:
    """(place, what, body): each value of a document replaced by each hostile one."""
    for place, changed in with_mark(document):
        text = json.dumps(changed, ensure_ascii=False)
        for what, value in HOSTILE.items():
            yield place, what, text.replace(f'"{MARK}"', value, 1)


def with_mark(document: Any, place: str = "") -> Iterator[tuple[str, Any]]:
    """A document with the mark at each of its places, one at a time."""
    names: Any = document if isinstance(document, dict) else range(len(document)) if isinstance(document, list) else ()
    for name in names:
        within = with_mark(document[name], f"{place}.{name}")
        for where, value in [(f"{place}.{name}", MARK), *within]:
            changed = copy.copy(document)
            changed[name] = value
            yield where, changed


def judged(route: Route, answer: httpx2.Response) -> str | None:
    """What is wrong with an answer to a hostile request; None: nothing."""
    retry = answer.headers.get("x-should-retry")
    if answer.status_code == 503 and route.path in ("/v1/chat/completions", "/v1/completions"):
        return None if "retry-after" in answer.headers else "503 without a time"  # nobody runs a playground here
    if answer.status_code >= 500:
        return f"{answer.status_code} {answer.text[:200]}"
    if answer.status_code == 409 and retry != "false":
        return "the client asks again at a 409 that does not say otherwise"
    if answer.status_code >= 400 and not route.path.endswith("/oidc/token"):  # which has RFC 6749's errors
        return next(faults_of_error(answer.text), None)
    return None


# Top fields that hold what is asked, scored or kept, and no name, label or reason: any character may stand there.
CONTENT = {"messages", "prompt", "stop", "item", "model_sample", "grader", "value", "data_source", "testing_criteria"}


def holds_content(where: str) -> bool:
    """Whether the place of a body may hold text that would act on a terminal: content, or a program of a template."""
    names = where.split(".")
    return names[1] in CONTENT or names[-1] == "chat_template"


@pytest.mark.parametrize("route", WITH_BODY, ids=lambda route: route.name)
def test_no_body_brings_a_route_down(place: Place, route: Route) -> None:
    assert route.body is not None
    path, faults = place.path(route), []
    bodies = [("", what, body) for what, body in RAW.items()]
    good = sample(route.body, place.ids)
    bodies += [(where, what, text.encode()) for where, what, text in mutated(good)]
    bodies += [("", "as it should be", json.dumps(good).encode())]
    for where, what, body in bodies:
        answer = place.http.request(route.method, path, content=body, headers={"Content-Type": "application/json"})
        fault = judged(route, answer)
        if what == "right to left" and answer.is_success and not holds_content(where):
            fault = "a name or a label that turns its line around was taken"
        if fault is not None:
            faults.append(f"{where or 'the body'} = {what}: {fault}")

    assert faults == []
    assert len(bodies) > len(RAW)


# --- ids and queries --------------------------------------------------------------------------------------------------

IDS = {
    "nothing": "nothing",
    "long": "x" * 5000,
    "NUL": "a%00b",
    "not UTF-8": "%ff%fe",
    "lone surrogate": "%ED%A0%80",
    "dots": "..%2f..%2fetc%2fpasswd",
    "quotes": "%27%20or%201=1%20--",
    "turned": "%E2%80%AEevil",
    "huge number": "9" * 400,
    "a dot": ".",
    "slashes": "%2F%2F",
    "an ft: name": "ft:a:b:c:d",
    "an alias": "a@b@c",
    "per cent": "%25s%25n",
}


@pytest.mark.parametrize("route", WITH_FIELDS, ids=lambda route: route.name)
def test_no_id_brings_a_route_down(place: Place, route: Route) -> None:
    faults = []
    body = None if route.body is None else sample(route.body, place.ids)
    for name in route.fields:
        for what, value in IDS.items():
            if route.name == "PUT /v1/tunepool/secrets/{name}" and what == "nothing":
                continue
            answer = place.http.request(route.method, place.path(route, **{name: value}), json=body)
            fault = judged(route, answer)
            if fault is None and answer.is_success and route.method != "GET" and what not in ("a dot", "slashes"):
                fault = f"{answer.status_code}: it did something"
            if fault is not None:
                faults.append(f"{name} = {what}: {fault}")

    assert faults == []


QUERIES = {
    "empty": "",
    "long": "x" * 5000,
    "too long": "x" * 9000,
    "NUL": "%00",
    "not UTF-8": "%ff",
    "lone surrogate": "%ED%A0%80",
    "-1": "-1",
    "2^63": str(2**63),
    "2^64 in a cursor": f"x_{2**64}",
    "5,000 digits": "9" * 5000,
    "NaN": "nan",
    "quotes": "%27%20or%201=1%20--",
    "a date": "0001-01-01T00:00:00Z",
    "far away": "9999-12-31T23:59:59Z",
    "an offset": "2026-01-01T00:00:00%2B23:59",
}


@pytest.mark.parametrize("route", WITH_QUERY, ids=lambda route: route.name)
def test_no_query_brings_a_route_down(place: Place, route: Route) -> None:
    faults, path = [], place.path(route)
    for name in (*route.queries, "metadata%5Bk%5D", "nobody_knows"):
        for what, value in QUERIES.items():
            fault = judged(route, place.http.request(route.method, f"{path}?{name}={value}&{name}={value}"))
            if fault is not None:
                faults.append(f"{name} = {what}: {fault}")

    assert faults == []


# --- another project's ------------------------------------------------------------------------------------------------


def is_of_a_project(route: Route) -> bool:
    """Whether what it names is of one project. The same name of a secret or a new alias is another thing elsewhere."""
    everybodys = ("/v1/tunepool/models/", "/v1/tunepool/objects/")  # base models; a signed link has no owner
    named_anew = ("/v1/tunepool/secrets/", "/v1/tunepool/aliases/{name}/promote")
    return not route.path.startswith((*everybodys, *named_anew))


OWNED = [route for route in WITH_FIELDS if is_of_a_project(route)]


@pytest.mark.parametrize("route", OWNED, ids=lambda route: route.name)
def test_what_is_another_projects_does_not_exist(place: Place, route: Route) -> None:
    body = None if route.body is None else sample(route.body, place.ids)

    answer = place.stranger.request(route.method, place.path(route), json=body)

    assert answer.status_code in ({400, 403, 404} if route.asks_more else {403, 404}), answer.text
    assert list(faults_of_error(answer.text)) == []


def test_a_client_that_leaves_in_the_middle_of_a_body_leaves_nothing(place: Place) -> None:
    """On every route that takes one: the server is asked in whole afterwards, and answers."""
    address = httpx2.URL(str(place.http.base_url))
    key = place.http.headers["authorization"]
    for route in WITH_BODY:
        head = f"{route.method} {place.path(route)} HTTP/1.1\r\nHost: x\r\nAuthorization: {key}\r\n"
        head += "Content-Type: application/json\r\nContent-Length: 70000\r\n\r\n"
        with socket.create_connection((address.host, address.port or 80), timeout=patience(10)) as line:
            line.sendall(head.encode() + b'{"name": "' + b"x" * 1000)
    assert place.http.get("/v1/models").status_code == 200
