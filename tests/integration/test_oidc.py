"""ID tokens exchanged for keys that live for minutes, against an issuer of our own."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx2
import pytest
from openai import AuthenticationError, OpenAI
from openai.auth._workload import WorkloadIdentityAuth
from sqlalchemy import Engine, func, select, update
from tunepool import id_tokens
from tunepool.main import cli
from typer.testing import CliRunner

from shared.settings import Settings
from shared.store.db import session_scope
from shared.store.tables import KeySecretRow
from shared.tenants import keys
from tests.factories import make_key
from tests.fake_issuer import STRANGE, Issuer, issuing
from tests.integration.conftest import Api
from tests.integration.test_bad_requests import refused
from tests.live import live_api

AUDIENCE = "https://tunepool.example.com"
EXCHANGE = {
    "grant_type": "urn:ietf:params:oauth:grant-type:token-exchange",
    "subject_token_type": "urn:ietf:params:oauth:token-type:id_token",
}


@pytest.fixture(scope="module")
def issuer() -> Iterator[Issuer]:
    with issuing() as one:
        yield one


@pytest.fixture(scope="module")
def api(engine: Engine, database_url: str, issuer: Issuer, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Api]:
    settings = Settings(
        home=tmp_path_factory.mktemp("home"),
        database_url=database_url,
        redis_url="",
        oidc_issuers=issuer.url,
        oidc_networks="127.0.0.0/8",
    )
    with session_scope(engine) as session:
        caller, key = make_key(session)
    with live_api(settings) as url, OpenAI(base_url=f"{url}/v1", api_key=key) as client:
        yield Api(url, caller, key, settings, engine, client)


@pytest.fixture
def operator(api: Api) -> Iterator[httpx2.Client]:
    with session_scope(api.engine) as session:
        secret = make_key(session, scopes=("*", "admin"))[1]
    with api.http(secret) as client:
        yield client


@pytest.fixture
def nobody(api: Api) -> Iterator[httpx2.Client]:
    with api.http() as client:
        del client.headers["Authorization"]
        yield client


def wanted(by: Issuer, **changes: Any) -> dict[str, Any]:
    claims = {"repository": "octo/app", "ref": "refs/heads/*"}
    usual = {"name": "ci", "issuer": by.url, "audience": AUDIENCE, "claims": claims, "scopes": ["jobs:read"]}
    return usual | changes


@pytest.fixture
def rule(api: Api, operator: httpx2.Client, issuer: Issuer) -> Iterator[dict[str, Any]]:
    made = operator.post("/v1/tunepool/oidc/rules", json=wanted(issuer, project_id=api.caller.project_id)).json()
    yield made
    operator.delete(f"/v1/tunepool/oidc/rules/{made['id']}")


def exchange(http: httpx2.Client, token: str, **more: Any) -> httpx2.Response:
    return http.post("/v1/tunepool/oidc/token", json={**EXCHANGE, "subject_token": token, **more})


def test_a_token_becomes_a_key_of_its_rule_that_ends_with_it(
    api: Api, operator: httpx2.Client, nobody: httpx2.Client, issuer: Issuer, rule: dict[str, Any]
) -> None:
    token = issuer.token()
    answer = exchange(nobody, token)
    given = answer.json()

    assert answer.status_code == 200, answer.text
    assert answer.headers["cache-control"] == "no-store"
    assert given | {"access_token": ""} == {
        "access_token": "",
        "issued_token_type": "urn:ietf:params:oauth:token-type:access_token",
        "token_type": "Bearer",
        "expires_in": given["expires_in"],
        "scope": "jobs:read",
        "project_id": api.caller.project_id,
        "rule_id": rule["id"],
    }
    assert 300 < given["expires_in"] <= 360  # the token's five minutes, and the leeway for clocks
    with session_scope(api.engine) as session:
        assert keys.authenticate(session, given["access_token"]).project_id == api.caller.project_id
    with api.http(given["access_token"]) as http:
        assert http.get("/v1/fine_tuning/jobs").status_code == 200
        refused(api, http.get("/v1/models"), status=403)
        refused(api, http.get("/v1/tunepool/audit"), status=403)

    audit = operator.get("/v1/tunepool/audit", params={"target": rule["id"]})
    (entry,) = [act for act in audit.json()["data"] if act["action"] == "oidc.exchange"]
    assert entry["key_id"] == rule["key_id"]
    assert entry["after"]["repository"] == "octo/app"
    for secret in (token, token.rsplit(".", 1)[1], given["access_token"]):
        assert secret not in audit.text
    listed = operator.get("/v1/tunepool/oidc/rules", params={"project_id": api.caller.project_id}).json()["data"]
    assert [one["id"] for one in listed] == [rule["id"]]
    assert listed[0]["last_used_at"] is not None


def test_the_key_ends_by_itself_and_with_its_rule(
    api: Api, operator: httpx2.Client, nobody: httpx2.Client, issuer: Issuer, rule: dict[str, Any]
) -> None:
    first, second = (exchange(nobody, issuer.token()).json()["access_token"] for _ in range(2))
    with session_scope(api.engine) as session:
        ended = update(KeySecretRow).where(KeySecretRow.sha256 == keys.digest(first))
        session.execute(ended.values(expires_at=func.now()))
    with api.http(first) as over, api.http(second) as http:
        refused(api, over.get("/v1/fine_tuning/jobs"), status=401)
        assert http.get("/v1/fine_tuning/jobs").status_code == 200

        assert operator.delete(f"/v1/tunepool/oidc/rules/{rule['id']}").json()["deleted"]
        refused(api, http.get("/v1/fine_tuning/jobs"), status=401)
    refused(api, exchange(nobody, issuer.token()), status=403)
    refused(api, operator.delete(f"/v1/tunepool/oidc/rules/{rule['id']}"), status=404)


def test_a_token_is_exchanged_once(api: Api, nobody: httpx2.Client, issuer: Issuer, rule: dict[str, Any]) -> None:
    token = issuer.token()
    assert exchange(nobody, token).status_code == 200

    error = refused(api, exchange(nobody, token), status=401)
    assert error["code"] == "invalid_id_token"
    assert "already" in error["message"]
    # The same id, signed again, is the same token.
    again = issuer.token(jti="once")
    assert exchange(nobody, again).status_code == 200
    refused(api, exchange(nobody, issuer.token(jti="once")), status=401)
    # Without an id nothing tells it from another.
    bare = issuer.token(jti=None)
    assert [exchange(nobody, bare).status_code for _ in range(2)] == [200, 200]


@pytest.mark.parametrize(
    "changes",
    [
        {"repository": "octo/other"},
        {"repository": "evil/app"},
        {"ref": "refs/pull/7/merge"},
        {"aud": "https://github.com/octo"},
    ],
)
def test_a_genuine_token_that_no_rule_is_for_is_told_so(
    api: Api, nobody: httpx2.Client, issuer: Issuer, rule: dict[str, Any], changes: dict[str, Any]
) -> None:
    error = refused(api, exchange(nobody, issuer.token(**changes)), status=403)

    assert error["code"] == "no_rule_accepts"
    assert rule["id"] not in error["message"]


@pytest.mark.parametrize(
    "forged", [{"key": STRANGE}, {"exp": 1_700_000_000}, {"iss": "https://token.actions.githubusercontent.com"}]
)
def test_a_token_that_proves_nothing_is_a_401(
    api: Api, nobody: httpx2.Client, issuer: Issuer, rule: dict[str, Any], forged: dict[str, Any]
) -> None:
    error = refused(api, exchange(nobody, issuer.token(**forged)), status=401)

    assert error["code"] == "invalid_id_token"


def test_two_rules_for_one_token_want_to_be_told_apart(
    api: Api, operator: httpx2.Client, nobody: httpx2.Client, issuer: Issuer, rule: dict[str, Any]
) -> None:
    with session_scope(api.engine) as session:
        other = make_key(session)[0]
    body = wanted(issuer, project_id=other.project_id, scopes=["models:read"], life_minutes=1)
    second = operator.post("/v1/tunepool/oidc/rules", json=body).json()
    try:
        error = refused(api, exchange(nobody, issuer.token()))
        assert (error["code"], error["param"]) == ("several_rules", "service_account_id")

        given = exchange(nobody, issuer.token(), service_account_id=second["id"]).json()
        assert given["project_id"] == other.project_id
        assert given["expires_in"] == 60
        # A rule of another project opens nothing of ours.
        with api.http(given["access_token"]) as http:
            refused(api, http.get("/v1/fine_tuning/jobs"), status=403)
        refused(api, exchange(nobody, issuer.token(), service_account_id="oidcrule_x"), status=403)
    finally:
        operator.delete(f"/v1/tunepool/oidc/rules/{second['id']}")


def test_the_openai_clients_own_exchange_works(api: Api, issuer: Issuer, rule: dict[str, Any]) -> None:
    identity = WorkloadIdentityAuth(
        workload_identity={
            "identity_provider_id": issuer.url,
            "service_account_id": rule["id"],
            "provider": {"token_type": "id", "get_token": issuer.token},
        },
        token_exchange_url=f"{api.url}/v1/tunepool/oidc/token",
    )
    with OpenAI(base_url=f"{api.url}/v1", api_key=identity.get_token) as client:
        assert client.fine_tuning.jobs.list().data == []


@pytest.mark.parametrize(
    ("changes", "param"),
    [
        ({"issuer": "https://evil.example"}, "issuer"),
        ({"claims": {}}, "claims"),
        ({"claims": {"ref": "refs/heads/main"}}, "claims"),
        ({"claims": {"repository": "*/app"}}, "claims"),
        ({"claims": {"repository": "octo*/app"}}, "claims"),
        ({"claims": {"sub": "**"}}, "claims"),
        ({"claims": {"repository": "o/*a*b*c*d*e"}}, "claims.repository"),
        ({"claims": {"repository": ""}}, "claims.repository"),
        ({"claims": {"repository": 7}}, "claims.repository"),
        ({"scopes": ["admin"]}, "scopes"),
        ({"scopes": ["root"]}, "scopes"),
        ({"scopes": []}, "scopes"),
        ({"life_minutes": 0}, "life_minutes"),
        ({"life_minutes": 721}, "life_minutes"),
        ({"audience": ""}, "audience"),
        ({"name": "a\x00b"}, "name"),
        ({"more": 1}, "more"),
    ],
)
def test_a_rule_that_says_too_little_or_too_much_is_refused(
    api: Api, operator: httpx2.Client, issuer: Issuer, changes: dict[str, Any], param: str
) -> None:
    answer = operator.post("/v1/tunepool/oidc/rules", json=wanted(issuer, **changes))

    assert refused(api, answer)["param"] == param


@pytest.mark.parametrize(
    ("changes", "param"),
    [
        ({"grant_type": "password"}, "grant_type"),
        ({"subject_token_type": "urn:ietf:params:oauth:token-type:saml2"}, "subject_token_type"),
        ({"subject_token": ""}, "subject_token"),
        ({"subject_token": "a" * 20_000}, "subject_token"),
        ({"subject_token": 7}, "subject_token"),
        ({"scope": "admin"}, "scope"),
        ({"identity_provider_id": "https://gitlab.com"}, "identity_provider_id"),
    ],
)
def test_an_exchange_is_read_strictly(
    api: Api, nobody: httpx2.Client, issuer: Issuer, changes: dict[str, Any], param: str
) -> None:
    body = {**EXCHANGE, "subject_token": issuer.token(), **changes}

    assert refused(api, nobody.post("/v1/tunepool/oidc/token", json=body))["param"] == param


def test_the_key_of_a_rule_is_no_other_key(api: Api, operator: httpx2.Client, rule: dict[str, Any]) -> None:
    url = f"/v1/tunepool/keys/{rule['key_id']}"

    assert refused(api, operator.post(f"{url}/rotate", json={}), status=409)["code"] == "key_of_a_rule"
    refused(api, operator.patch(url, json={"scopes": ["admin"]}), status=403)
    assert operator.patch(url, json={"scopes": ["models:read"]}).json()["prefix"] == keys.EXCHANGED
    operator.delete(url)
    with session_scope(api.engine) as session:
        assert session.scalars(select(KeySecretRow).where(KeySecretRow.key_id == rule["key_id"])).all() == []


# --- the command line -------------------------------------------------------------------------------------------------


@pytest.fixture
def job(api: Api, issuer: Issuer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., str]:
    """A job of GitHub Actions: a command line that works in its own home. Answers what it printed."""
    for name in ("OPENAI_API_KEY", id_tokens.GITLAB):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("OPENAI_BASE_URL", f"{api.url}/v1")
    monkeypatch.setenv("TUNEPOOL_HOME", str(tmp_path))
    monkeypatch.setenv("ACTIONS_ID_TOKEN_REQUEST_URL", f"{issuer.url}/request?api-version=2.0")
    monkeypatch.setenv("ACTIONS_ID_TOKEN_REQUEST_TOKEN", "of-the-runner")

    def run(*words: str) -> str:
        done = CliRunner().invoke(cli, words)
        if done.exception is not None and not isinstance(done.exception, SystemExit):
            raise done.exception
        assert done.exit_code == 0, done.output
        return done.output

    return run


def test_a_job_signs_in_without_a_stored_key_and_renews_it_in_time(
    api: Api, issuer: Issuer, rule: dict[str, Any], job: Callable[..., str], tmp_path: Path
) -> None:
    shown = job("login", "--oidc", "--audience", AUDIENCE)
    file = tmp_path / id_tokens.STORED
    first = json.loads(file.read_text())

    assert issuer.bearer == "bearer of-the-runner"
    assert first["api_key"] not in shown
    assert file.stat().st_mode & 0o777 == 0o600
    assert job("--json", "jobs", "list") == ""
    assert json.loads(file.read_text()) == first

    file.write_text(json.dumps(first | {"expires_at": time.time() + 30}))
    job("jobs", "list")
    assert json.loads(file.read_text())["api_key"] != first["api_key"]


def test_a_job_without_a_token_is_told_what_it_lacks(
    job: Callable[..., str], monkeypatch: pytest.MonkeyPatch, rule: dict[str, Any]
) -> None:
    monkeypatch.delenv("ACTIONS_ID_TOKEN_REQUEST_TOKEN")

    with pytest.raises(id_tokens.NoIdToken, match="id-token: write"):
        job("login", "--oidc")


def test_a_job_of_gitlab_brings_its_token_in_a_variable(
    job: Callable[..., str], issuer: Issuer, rule: dict[str, Any], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.delenv("ACTIONS_ID_TOKEN_REQUEST_URL")
    monkeypatch.setenv(id_tokens.GITLAB, issuer.token())
    job("login", "--oidc")
    saved = json.loads((tmp_path / id_tokens.STORED).read_text())

    # Its one token is spent: the key is good to its end, and then the job is told so.
    (tmp_path / id_tokens.STORED).write_text(json.dumps(saved | {"expires_at": 0}))
    with pytest.raises(AuthenticationError, match="already"):
        job("jobs", "list")


def test_an_administrator_makes_lists_and_deletes_rules(
    api: Api, issuer: Issuer, job: Callable[..., str], monkeypatch: pytest.MonkeyPatch
) -> None:
    with session_scope(api.engine) as session:
        monkeypatch.setenv("OPENAI_API_KEY", make_key(session, scopes=("*", "admin"))[1])
    wanted_words = ("--repository", "octo/app", "--ref", "refs/heads/main", "--scope", "jobs:write")
    rule_id = job("oidc", "create", "ci", "--issuer", issuer.url, *wanted_words, "--claim", "actor=octo*").strip()

    (made,) = [one for one in map(json.loads, job("--json", "oidc", "list").splitlines()) if one["id"] == rule_id]
    assert made["claims"] == {"repository": "octo/app", "ref": "refs/heads/main", "actor": "octo*"}
    assert made["audience"] == api.url
    assert made["key_id"] in job("keys", "list")
    assert job("oidc", "delete", rule_id).strip() == f"{rule_id} deleted"
