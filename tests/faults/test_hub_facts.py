"""A hub's entry without a table of its config: a worker looks up commit and config.json, and says what it cannot."""

from __future__ import annotations

import hashlib
import json
import sys
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
from sqlalchemy import func, select

from shared.chores import base_models
from shared.errors import Invalid, NotYet
from shared.settle.catalogue import Catalogue
from shared.store.db import session_scope
from shared.store.tables import BaseModelRow
from tests.lifecycle.stack import Stack, until
from worker.base_models import main as fetch_by_hand
from worker.chores.looking_up import look_up_next
from worker.host.flags import SharedFlags
from worker.host.host import Host, open_host

COMMIT = "0123456789abcdef" * 2 + "01234567"


class Hub:
    """Repositories by name. A repository is its files, or the status that the hub answers instead."""

    def __init__(self) -> None:
        self.repositories: dict[str, dict[str, bytes] | int] = {}
        self.asked: list[str] = []

    def answer(self, path: str) -> tuple[int, bytes]:
        self.asked.append(path)
        name = "/".join(path.removeprefix("/api/models").split("/")[1:3])
        found = self.repositories.get(name, 404)
        if isinstance(found, int):
            return found, b"{}"
        if path.startswith(f"/api/models/{name}/tree"):
            listed = [{"type": "file", "path": file, "size": len(found[file]), "oid": "0" * 40} for file in found]
            return 200, json.dumps(listed).encode()
        if path.startswith("/api/"):
            return 200, json.dumps(
                {"id": name, "sha": COMMIT, "siblings": [{"rfilename": one} for one in found]}
            ).encode()
        content = found.get(path.rsplit("/", 1)[1])
        return (404, b"{}") if content is None else (200, content)


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    made = Hub()

    class Answers(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            status, content = made.answer(self.path.partition("?")[0])
            self.send_response(status)
            self.send_header("Content-Type", "application/json")
            self.send_header("X-Repo-Commit", COMMIT)
            self.send_header("ETag", f'"{hashlib.sha256(content).hexdigest()}"')
            self.send_header("Retry-After", "0")
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            if self.command == "GET":
                self.wfile.write(content)

        def do_HEAD(self) -> None:
            self.do_GET()

        def log_message(self, *_: object) -> None:
            """Say nothing."""

    server = ThreadingHTTPServer(("127.0.0.1", 0), Answers)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    monkeypatch.setenv("HF_ENDPOINT", f"http://127.0.0.1:{server.server_port}")
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    yield made
    server.shutdown()
    server.server_close()


@pytest.fixture
def host(stack: Stack) -> Iterator[Host]:
    """The worker's side in this process: the chore is called, not waited for."""
    opened = open_host(stack.settings, flags=SharedFlags())
    yield opened
    opened.engine.dispose()


def add(stack: Stack, name: str, revision: str = "main") -> None:
    lines = ["", f"[models.{name}]", 'source = "hub"', f'repository = "example/{name}"', f'revision = "{revision}"', ""]
    with (stack.home / "models.toml").open("a") as file:
        file.write("\n".join(lines))


def offered(stack: Stack) -> Catalogue:
    with session_scope(stack.engine) as session:
        return base_models.offered(session, stack.settings)


def tiny(stack: Stack) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in (stack.home / "tiny").iterdir()}


def test_an_entry_without_config_becomes_ready_and_its_job_trains_on_the_commit(stack: Stack, hub: Hub) -> None:
    hub.repositories["example/far"] = tiny(stack)
    add(stack, "far")
    with pytest.raises(NotYet):
        offered(stack).find("far")
    stack.start_worker()
    stack.start_janitor()

    base = until(lambda: offered(stack).entries.get("far"), seconds=90, what="an entry that is ready").ref
    job = stack.wait(stack.submit("steps=2", model="far"), seconds=60)

    assert (base.revision, base.public_name) == (COMMIT, "example/far")
    assert base.facts == offered(stack).find("tiny").facts
    assert job.status == "succeeded"
    assert job.spec["base_model"]["revision"] == COMMIT
    assert stack.broken_invariants() == []


def test_only_the_config_is_fetched_to_know_a_model(stack: Stack, hub: Hub, host: Host) -> None:
    hub.repositories["example/far"] = tiny(stack)
    add(stack, "far", revision="v1.0")
    offered(stack)

    assert look_up_next(host)
    assert not look_up_next(host), "what is ready is not looked up again"

    assert offered(stack).find("far").revision == COMMIT
    assert "/api/models/example/far/revision/v1.0" in hub.asked
    assert {path.rsplit("/", 1)[1] for path in hub.asked if "/resolve/" in path} == {"config.json"}


def test_the_fetcher_by_hand_knows_what_a_worker_has_looked_up(
    stack: Stack, hub: Hub, host: Host, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    hub.repositories["example/far"] = tiny(stack)
    add(stack, "far")
    offered(stack)
    assert look_up_next(host)
    monkeypatch.setattr(sys, "argv", ["base_models", "far"])
    monkeypatch.setenv("TUNEPOOL_HOME", str(stack.settings.home))
    monkeypatch.setenv("TUNEPOOL_MODELS_FILE", str(stack.home / "models.toml"))
    monkeypatch.setenv("DATABASE_URL", "")
    with pytest.raises(SystemExit, match="not ready yet"):  # a host without a database
        fetch_by_hand()

    monkeypatch.setenv("DATABASE_URL", stack.settings.database_url)
    fetch_by_hand()

    printed = capsys.readouterr().out.splitlines()[-1]  # above it is what the look-up has logged
    assert (Path(printed) / "model.safetensors").is_file()


def without_config(files: dict[str, bytes]) -> dict[str, bytes]:
    return {name: content for name, content in files.items() if name != "config.json"}


def with_config(**changes: object) -> Callable[[dict[str, bytes]], dict[str, bytes]]:
    def changed(files: dict[str, bytes]) -> dict[str, bytes]:
        return files | {"config.json": json.dumps(json.loads(files["config.json"]) | changes).encode()}

    return changed


@pytest.mark.parametrize(
    ("published", "says"),
    [
        (lambda _: 401, "HF_TOKEN"),
        (lambda _: 403, "accept its terms"),
        (lambda _: 404, "The hub has no config.json of example/far at revision main"),
        (without_config, "The hub has no config.json of example/far at revision main"),
        (with_config(auto_map={"AutoModel": "m.M"}), "auto_map"),
        (with_config(hidden_size=None), "hidden_size"),
        (with_config(model_type="invented_later"), "'invented_later') is not known"),
        (lambda files: files | {"config.json": b"[" * 100_000}, "not valid JSON"),
        (lambda files: files | {"config.json": b" " * (2**20 + 1)}, "larger than"),
    ],
)
def test_what_cannot_be_used_says_what_to_do_and_the_others_stay(
    stack: Stack, hub: Hub, host: Host, published: Callable[[dict[str, bytes]], dict[str, bytes] | int], says: str
) -> None:
    hub.repositories["example/far"] = published(tiny(stack))
    add(stack, "far")
    offered(stack)

    assert look_up_next(host)

    found = offered(stack)
    with pytest.raises(Invalid) as refused:
        found.find("far")
    assert refused.value.code == "base_model_misconfigured"
    assert says in refused.value.message
    assert says in found.complaints()["far"]
    assert "tiny" in found.names()


def test_a_hub_that_is_away_is_asked_again_after_longer_pauses(stack: Stack, hub: Hub, host: Host) -> None:
    hub.repositories["example/far"] = 501
    add(stack, "far")
    pauses = []
    for _ in range(2):
        offered(stack)
        assert look_up_next(host)
        assert not look_up_next(host), "not before its time"
        with session_scope(stack.engine) as session:
            row = session.scalars(select(BaseModelRow)).one()
            pauses.append(session.scalar(select(func.extract("epoch", row.lease_until - row.updated_at))))
            row.lease_until = None

    with pytest.raises(NotYet, match="source = 'path'"):
        offered(stack).find("far")
    assert [round(float(pause)) for pause in pauses] == [5, 10]

    hub.repositories["example/far"] = tiny(stack)
    assert look_up_next(host)
    assert offered(stack).find("far").revision == COMMIT


def test_a_model_that_was_refused_is_looked_up_again_after_a_while(stack: Stack, hub: Hub, host: Host) -> None:
    hub.repositories["example/far"] = 403
    add(stack, "far")
    offered(stack)
    assert look_up_next(host)
    hub.repositories["example/far"] = tiny(stack)  # somebody accepted its terms
    offered(stack)
    assert not look_up_next(host)

    with session_scope(stack.engine) as session:
        session.scalars(select(BaseModelRow)).one().updated_at = func.to_timestamp(0)
    offered(stack)

    assert look_up_next(host)
    assert offered(stack).find("far").revision == COMMIT
