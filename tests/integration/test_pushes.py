"""Pushes to a hub: a hub on the loopback that takes files as the real one does, and what is refused before."""

from __future__ import annotations

import base64
import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import pytest
from openai import OpenAI
from pydantic import SecretStr
from sqlalchemy import Engine, update
from sqlalchemy.sql import func

from shared.settings import Settings
from shared.store.db import session_scope
from shared.store.storage import open_store
from shared.store.tables import AdapterRow, ExportRow
from tests.factories import make_key
from tests.integration.conftest import Api
from tests.integration.test_merges import adapter, post, refusal
from tests.integration.test_webhooks import new_key
from tests.live import live_api
from tests.openai_types import held
from worker.chores.exporting import export_next
from worker.host.flags import SharedFlags
from worker.host.host import Host, open_host

TOKEN = "hf_of_the_project"
WEIGHTS, CARD = b"weights" * 1000, b"# a card"


class Hub:
    """What has come to it: repositories, files by path, and the tokens that it was shown."""

    def __init__(self) -> None:
        self.made: list[dict[str, Any]] = []
        self.files: dict[str, bytes] = {}
        self.large: dict[str, bytes] = {}
        self.tokens: set[str] = set()
        self.refusal = 0
        self.url = ""


@pytest.fixture(scope="module")
def served() -> Iterator[Hub]:
    hub = Hub()

    class Answers(BaseHTTPRequestHandler):
        def body(self) -> bytes:
            return self.rfile.read(int(self.headers.get("Content-Length", 0)))

        def say(self, document: Any, status: int = 200) -> None:
            content = json.dumps(document).encode()
            self.send_response(status)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            self.wfile.write(content)

        def do_PUT(self) -> None:
            hub.large[self.path.rsplit("/", 1)[1]] = self.body()
            self.say({})

        def do_GET(self) -> None:
            self.say({}, 404)

        def do_HEAD(self) -> None:
            self.send_response(404)
            self.end_headers()

        def do_POST(self) -> None:
            content = self.body()
            hub.tokens.add(self.headers.get("Authorization", ""))
            if hub.refusal:
                self.say({"error": "no"}, hub.refusal)
            elif self.path == "/api/repos/create":
                hub.made.append(json.loads(content))
                self.say({"url": f"{hub.url}/acme/tickets", "id": "acme/tickets", "name": "acme/tickets"})
            elif self.path == "/api/validate-yaml":  # the head of README.md
                self.say({"errors": [], "warnings": []})
            elif "/preupload/" in self.path:
                asked = [file["path"] for file in json.loads(content)["files"]]
                kinds = {path: "lfs" if path.endswith(".safetensors") else "regular" for path in asked}
                listed = [{"path": path, "uploadMode": kind, "shouldIgnore": False} for path, kind in kinds.items()]
                self.say({"files": listed})
            elif self.path.endswith("/objects/batch"):
                objects = json.loads(content)["objects"]
                actions = [{**o, "actions": {"upload": {"href": f"{hub.url}/lfs/{o['oid']}"}}} for o in objects]
                self.say({"transfer": "basic", "objects": actions})
            else:
                self.commit(content)

        def commit(self, content: bytes) -> None:
            for line in map(json.loads, content.splitlines()):
                value = line["value"]
                if line["key"] == "lfsFile":
                    hub.files[value["path"]] = hub.large[value["oid"]]
                if line["key"] == "file":
                    hub.files[value["path"]] = base64.b64decode(value["content"])
            self.say({"commitUrl": f"{hub.url}/acme/tickets/commit/{'a' * 40}", "commitOid": "a" * 40})

        def log_message(self, *_: object) -> None:
            """Say nothing."""

    server = ThreadingHTTPServer(("127.0.0.1", 0), Answers)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    hub.url = f"http://127.0.0.1:{server.server_port}"
    yield hub
    server.shutdown()
    server.server_close()


@pytest.fixture(scope="module")
def site(engine: Engine, database_url: str, tmp_path_factory: pytest.TempPathFactory, served: Hub) -> Iterator[Api]:
    settings = Settings(
        home=tmp_path_factory.mktemp("home"),
        database_url=database_url,
        redis_url="",
        secrets_key=SecretStr(new_key()),
        push_url=served.url,
    )
    with session_scope(engine) as session:
        caller, key = make_key(session)
        session.execute(update(ExportRow).values(deleted_at=func.now()))
    with live_api(settings) as url, OpenAI(base_url=f"{url}/v1", api_key=key, http_client=held()) as client:
        yield Api(url, caller, key, settings, engine, client)


@pytest.fixture
def hub(served: Hub) -> Hub:
    served.refusal = 0
    return served


@pytest.fixture
def host(site: Api) -> Iterator[Host]:
    opened = open_host(site.settings, flags=SharedFlags())
    yield opened
    opened.engine.dispose()


def stored_adapter(site: Api) -> str:
    """A tuned model whose files are in the store."""
    name = adapter(site, method="lora")
    store, files = open_store(site.settings), []
    for file, content in {"adapter_model.safetensors": WEIGHTS, "README.md": CARD}.items():
        key = f"{site.caller.project_id}/somewhere/{file}"
        files.append({"name": file, "bytes": len(content), "sha256": store.put_bytes(key, content).sha256})
    with session_scope(site.engine) as session:
        session.execute(
            update(AdapterRow)
            .where(AdapterRow.name == name)
            .values(manifest={"prefix": f"{site.caller.project_id}/somewhere", "files": files})
        )
    return name


def store_token(site: Api) -> None:
    with site.http() as http:
        assert http.put("/v1/tunepool/secrets/HF_TOKEN", json={"value": TOKEN}).status_code == 200


def seen(site: Api, export_id: str) -> dict[str, Any]:
    with site.http() as http:
        return dict(http.get(f"/v1/tunepool/exports/{export_id}").json())


def test_a_push_without_a_token_or_to_no_hub_is_refused_and_says_what_to_do(api: Api, site: Api) -> None:
    body = {"model": "ft:x", "repository": "acme/tickets"}
    with site.http() as http:
        http.delete("/v1/tunepool/secrets/HF_TOKEN")

    assert refusal(post(api, "pushes", body))[0] == "push_not_offered"
    assert refusal(post(site, "pushes", body)) == ("secret_missing", "repository")
    assert refusal(post(site, "pushes", {**body, "repository": "../etc"})) == ("invalid_value", "repository")
    store_token(site)
    assert refusal(post(site, "pushes", body), 404) == ("model_not_found", "model")


def test_a_models_files_are_brought_to_the_hub_with_the_projects_token(site: Api, host: Host, hub: Hub) -> None:
    store_token(site)
    name = stored_adapter(site)

    made = post(site, "pushes", {"model": name, "repository": "acme/tickets"}).json()
    assert (made["status"], made["request"]["private"], made["url"]) == ("queued", True, None)
    assert export_next(host)

    record = seen(site, made["id"])
    assert (record["status"], record["error"]) == ("succeeded", None)
    assert (record["url"], record["files"]) == (f"{hub.url}/acme/tickets", [])
    assert hub.files == {"adapter_model.safetensors": WEIGHTS, "README.md": CARD}
    assert (hub.made[-1]["organization"], hub.made[-1]["name"]) == ("acme", "tickets")
    assert hub.made[-1]["visibility"] == "private"
    assert hub.tokens == {f"Bearer {TOKEN}"}
    assert TOKEN not in json.dumps(record)


def test_a_hub_that_refuses_ends_the_push_by_name_and_is_not_asked_again(site: Api, host: Host, hub: Hub) -> None:
    store_token(site)
    made = post(site, "pushes", {"model": stored_adapter(site), "repository": "acme/tickets"}).json()
    hub.refusal = 403

    assert export_next(host)

    record = seen(site, made["id"])
    assert (record["status"], record["error"]["code"], record["error"]["param"]) == (
        "failed",
        "hub_refused",
        "repository",
    )
    assert "acme/tickets" in record["error"]["message"]
    assert TOKEN not in json.dumps(record)
