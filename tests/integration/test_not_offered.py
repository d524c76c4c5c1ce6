"""OpenAI's routes that are not offered, unknown ones, and methods that a path does not have."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

import httpx2
import openai
import pytest
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import compile_path

from api.app import create_app
from api.not_offered import NOT_OFFERED, instead_of
from tests.integration.conftest import Api
from tests.integration.test_bad_requests import refused


@pytest.fixture(scope="module")
def http(api: Api) -> Iterator[httpx2.Client]:
    with api.http() as client:
        yield client


def test_a_route_of_openai_that_is_not_offered_says_so_and_what_to_use(api: Api, http: httpx2.Client) -> None:
    offered = create_app(api.settings).openapi()["paths"]
    for path in NOT_OFFERED.keys() - offered.keys():
        answer = http.post(f"{path}/x", json={})

        error = refused(api, answer, status=501)
        assert error["code"] == "unsupported"
        assert error["message"] == f"POST {path}/x is not offered here. {NOT_OFFERED[path]}"
        assert answer.headers["x-should-retry"] == "false"


def requests_of_the_client() -> set[tuple[str, str]]:
    """(method, path) of each request that the installed `openai` package can make, with an `x` for each id."""
    made = re.compile(r'self\._(get|post|delete|get_api_list)\(\s*(?:path_template\()?f?"(/[^"?]+)')
    methods = {"get_api_list": "GET"}
    return {
        (methods.get(match[1], match[1].upper()), f"/v1{re.sub(r'{[^}]*}', 'x', match[2])}")
        for file in (Path(openai.__file__).parent / "resources").rglob("*.py")
        for match in made.finditer(file.read_text(encoding="utf-8"))
    }


def test_whatever_the_openai_client_can_ask_is_offered_or_told_as_not_offered(api: Api, http: httpx2.Client) -> None:
    offered = {
        (method.upper(), compile_path(path)[0])
        for path, methods in create_app(api.settings).openapi()["paths"].items()
        for method in methods
    }
    asked = requests_of_the_client()
    lacking = [
        (method, path)
        for method, path in sorted(asked)
        if not any(method == known and pattern.fullmatch(path) for known, pattern in offered)
    ]
    told = {(method, path): http.request(method, path).status_code for method, path in lacking}

    assert {("POST", "/v1/files"), ("GET", "/v1/fine_tuning/jobs/x"), ("POST", "/v1/agents")} <= asked
    assert len(asked) - len(lacking) > 30, "what is offered is looked up too"
    assert {what: status for what, status in told.items() if status != 501} == {}


def test_the_openai_client_is_told_at_once(api: Api) -> None:
    with pytest.raises(openai.InternalServerError) as told:
        api.openai().embeddings.create(model="text-embedding-3-small", input="hello")

    assert told.value.status_code == 501
    assert "embedding server" in told.value.message


@pytest.mark.parametrize("path", ["/v1/chat", "/v1/embeddingsx", "/v1/fine_tuning/jobs/x/y", "/chat/completions"])
def test_a_route_that_nobody_has_is_a_404(api: Api, http: httpx2.Client, path: str) -> None:
    error = refused(api, http.post(path, json={}), status=404)

    assert instead_of(path) is None
    assert error["code"] == "not_found"
    assert ("openapi.json" in error["message"]) == path.startswith("/v1/")


@pytest.mark.parametrize(
    ("method", "path", "allowed"),
    [
        ("PUT", "/v1/files", "GET, POST"),
        ("PATCH", "/v1/files/file-a", "DELETE, GET"),
        ("DELETE", "/v1/fine_tuning/jobs", "GET, POST"),
        ("GET", "/v1/fine_tuning/jobs/ftjob-a/cancel", "POST"),
        ("POST", "/v1/tunepool/objects/a", "GET, HEAD"),
        ("DELETE", "/ui/sign-in", "GET, POST"),
    ],
)
def test_a_method_that_a_path_does_not_have_names_all_that_it_has(
    api: Api, http: httpx2.Client, method: str, path: str, allowed: str
) -> None:
    answer = http.request(method, path)

    error = refused(api, answer, status=405)
    assert answer.headers["allow"] == allowed
    assert allowed in error["message"]


def test_a_method_that_a_path_does_not_have_costs_no_document(api: Api) -> None:
    app = create_app(api.settings)
    scope = {"type": "http", "method": "PUT", "path": "/v1/files", "headers": [], "app": app, "server": ("a", 80)}
    refuse = app.exception_handlers[HTTPException]

    answer = refuse(Request(scope), HTTPException(405))

    assert isinstance(answer, Response)
    assert answer.headers["allow"] == "GET, POST"
    assert app.openapi_schema is None


def test_a_page_is_only_read_and_says_so(api: Api, http: httpx2.Client) -> None:
    error = refused(api, http.post("/", json={}), status=405)

    assert error["code"] == "method_not_allowed"
    assert error["message"].endswith("allowed: GET.")
