"""What surrounds every request on OpenAI's wire: ids, versions, slashes, browsers of other origins, faults of ours."""

from __future__ import annotations

from collections.abc import Iterator

import httpx2
import pytest
import structlog
from fastapi.testclient import TestClient
from openai import OpenAI
from pydantic import ValidationError

from api.app import create_app
from shared.settings import Settings
from shared.store.db import session_scope
from tests.factories import make_file
from tests.integration.conftest import Api
from tests.integration.test_bad_requests import refused
from tests.live import live_api
from tests.patience import patience

MODELS = "/v1/models"
APP, OTHER = "https://app.example.com", "https://evil.example.com"


@pytest.fixture(scope="module")
def http(api: Api) -> Iterator[httpx2.Client]:
    with api.http() as client:
        yield client


# --- ids and versions -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("given", ["a", "run 7/step 3: ~", "x" * 512])
def test_the_clients_own_id_comes_back_beside_ours(http: httpx2.Client, given: str) -> None:
    answer = http.get(MODELS, headers={"X-Client-Request-Id": given})

    assert answer.status_code == 200
    assert answer.headers["x-client-request-id"] == given
    assert answer.headers["x-request-id"].startswith("req_")


def test_a_refusal_has_the_clients_id_too(api: Api, http: httpx2.Client) -> None:
    answer = http.get("/v1/files/file-nothing", headers={"X-Client-Request-Id": "mine"})

    refused(api, answer, status=404)
    assert answer.headers["x-client-request-id"] == "mine"


@pytest.mark.parametrize("given", [b"", b"x" * 513, "größe".encode(), b"a\tb"])
def test_an_id_that_openai_would_not_take_is_a_400_and_goes_nowhere(
    api: Api, http: httpx2.Client, given: bytes
) -> None:
    answer = http.get(MODELS, headers=[(b"X-Client-Request-Id", given)])

    assert refused(api, answer)["param"] == "X-Client-Request-Id"
    assert "x-client-request-id" not in answer.headers


def test_every_log_line_of_a_request_says_the_clients_id(api: Api) -> None:
    app = create_app(api.settings)

    @app.get("/broken")
    def broken() -> None:
        raise RuntimeError("broken on purpose")

    merge = structlog.contextvars.merge_contextvars
    client = TestClient(app, raise_server_exceptions=False)
    with structlog.testing.capture_logs(processors=[merge]) as lines, client:
        client.get("/broken", headers={"X-Client-Request-Id": "mine"})

    (line,) = [line for line in lines if line["event"] == "request.failed"]
    assert (line["client_request_id"], line["request_id"][:4]) == ("mine", "req_")


@pytest.mark.parametrize("path", [MODELS, "/v1/nothing", "/livez"])
def test_every_answer_names_the_version_of_openais_api(http: httpx2.Client, path: str) -> None:
    assert http.get(path).headers["openai-version"] == "2020-10-01"


# --- slashes ----------------------------------------------------------------------------------------------------------


def test_a_slash_too_many_at_the_end_changes_nothing(api: Api, http: httpx2.Client) -> None:
    with session_scope(api.engine) as session:
        file_id = make_file(session, api.caller).id

    job = http.post("/v1/fine_tuning/jobs/", json={"model": "smollm2-135m-instruct", "training_file": file_id})
    assert job.status_code == 200, job.text
    job_id = job.json()["id"]
    for path in (MODELS, "/v1/files", f"/v1/files/{file_id}", f"/v1/fine_tuning/jobs/{job_id}/events"):
        plain, slashed = http.get(path), http.get(f"{path}/")
        assert (slashed.status_code, slashed.json()) == (200, plain.json())
    assert http.post(f"/v1/fine_tuning/jobs/{job_id}/cancel/").json()["status"] == "cancelled"


@pytest.mark.parametrize("path", ["/v1/", "/v1//", "/v1/files//", "/v1/fine_tuning/jobs//events", "/v1/nothing/"])
def test_no_slash_leads_to_another_route(api: Api, http: httpx2.Client, path: str) -> None:
    refused(api, http.get(path), status=404)


# --- browsers ---------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def open_api(api: Api) -> Iterator[str]:
    """The same installation with a page of another origin that may ask it."""
    settings = api.settings.model_copy(update={"cors_origins": f"{APP}, http://localhost:5173"})
    with live_api(settings) as url:
        yield url


def preflight(url: str, origin: str, headers: str = "authorization,content-type,x-stainless-os") -> httpx2.Response:
    """What a browser asks before the openai client's request: without a key."""
    asked = {"Origin": origin, "Access-Control-Request-Method": "POST", "Access-Control-Request-Headers": headers}
    return httpx2.options(f"{url}/v1/chat/completions", headers=asked, timeout=patience(20))


def test_a_page_of_a_named_origin_may_ask(api: Api, open_api: str) -> None:
    before = preflight(open_api, APP)
    key = {"Authorization": f"Bearer {api.key}", "Origin": APP}
    answer = httpx2.get(f"{open_api}{MODELS}", headers=key, timeout=patience(20))
    fault = httpx2.get(f"{open_api}{MODELS}", headers={"Origin": APP}, timeout=patience(20))

    assert before.status_code == 204
    assert before.headers["access-control-allow-origin"] == APP
    assert before.headers["access-control-allow-headers"] == "authorization,content-type,x-stainless-os"
    assert {"GET", "POST", "DELETE"} <= set(before.headers["access-control-allow-methods"].split(", "))
    assert before.headers["x-request-id"].startswith("req_")
    for told in (answer, fault):
        assert told.headers["access-control-allow-origin"] == APP
        assert told.headers["access-control-expose-headers"] == "*"
        assert "Origin" in told.headers["vary"]
        assert "access-control-allow-credentials" not in told.headers
    assert (answer.status_code, fault.status_code) == (200, 401)


@pytest.mark.parametrize("origin", [OTHER, f"{APP}.evil.example.com", f"{APP}:8443", "http://app.example.com", "null"])
def test_a_page_of_another_origin_is_told_nothing(api: Api, open_api: str, origin: str) -> None:
    key = {"Authorization": f"Bearer {api.key}", "Origin": origin}
    asked = preflight(open_api, origin)
    answer = httpx2.get(f"{open_api}{MODELS}", headers=key, timeout=patience(20))

    refused(api, asked, status=405)
    for told in (asked, answer):
        assert "access-control-allow-origin" not in told.headers
        assert "Origin" in told.headers["vary"], "no cache gives it this answer of somebody else's"


def test_our_own_pages_are_closed_to_all_other_origins(open_api: str) -> None:
    answer = httpx2.get(f"{open_api}/", headers={"Origin": APP}, timeout=patience(20), follow_redirects=True)

    assert "access-control-allow-origin" not in answer.headers


def test_any_origin_may_ask_where_that_is_wanted(api: Api) -> None:
    with live_api(api.settings.model_copy(update={"cors_origins": "*"})) as url:
        before = preflight(url, OTHER)
        with OpenAI(base_url=f"{url}/v1", api_key=api.key, default_headers={"Origin": OTHER}) as client:
            answer = client.models.with_raw_response.list()

    assert (before.status_code, before.headers["access-control-allow-origin"]) == (204, "*")
    assert answer.headers["access-control-allow-origin"] == "*"


def test_without_the_setting_no_page_of_others_may_ask(api: Api, http: httpx2.Client) -> None:
    refused(api, preflight(api.url, APP), status=405)

    assert "access-control-allow-origin" not in http.get(MODELS, headers={"Origin": APP}).headers


@pytest.mark.parametrize(
    "text", ["app.example.com", "https://app.example.com/", "https://*.example.com", "HTTPS://A.B"]
)
def test_what_is_no_origin_is_refused_at_the_start(text: str) -> None:
    with pytest.raises(ValidationError, match="an origin is"):
        Settings(cors_origins=text)


# --- faults of ours ---------------------------------------------------------------------------------------------------


def test_a_fault_of_ours_is_counted_and_has_the_headers_of_every_answer(api: Api) -> None:
    app = create_app(api.settings.model_copy(update={"cors_origins": APP}))

    @app.get("/v1/broken")
    def broken() -> None:
        raise RuntimeError("broken on purpose")

    with structlog.testing.capture_logs(), TestClient(app, raise_server_exceptions=False) as client:
        answer = client.get("/v1/broken", headers={"Origin": APP})
        page = app.state.door.measures.page().decode()

    assert refused(api, answer, status=500)["code"] == "server_error"  # type: ignore[arg-type]
    assert answer.headers["x-should-retry"] == "true"
    assert answer.headers["openai-processing-ms"].isdigit()
    assert answer.headers["access-control-allow-origin"] == APP
    counted = (
        'tunepool_http_request_duration_seconds_count{method="GET",process="",route="/v1/broken",status="500"} 1.0'
    )
    assert counted in page
