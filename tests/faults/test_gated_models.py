"""A gated model by the commands of docs/models.md, with a real API, worker and trainer: from its refusal to an adapter.

The hub is a mirror below a path, as HF_ENDPOINT may name one. It tells everybody what a repository has, gives its files
to a token of somebody who has accepted the terms, and sends those who ask for weights to a store of another address.
"""

from __future__ import annotations

import hashlib
import json
import re
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from sqlalchemy import select

from shared.settle.catalogue import local_folder
from shared.store.db import session_scope
from shared.store.tables import AdapterRow, JobRow
from shared.tenants import keys
from tests.command_line import run_here
from tests.faults.conftest import api_process
from tests.faults.test_hub_facts import offered
from tests.lifecycle.stack import Servers, Stack, open_stack, until
from tests.loopback import answering
from tests.patience import patience
from tests.train.tiny import chat_rows, make_model_directory

TOKEN = "hf_of_somebody_who_may"  # of this test's hub
FIRST, SECOND = "a" * 40, "b" * 40
MIRROR = "/mirrors/hub"


class GatedHub:
    """One repository, house/Gated, whose branch main moves with each commit."""

    def __init__(self) -> None:
        self.commits: dict[str, dict[str, bytes]] = {}
        self.main = ""
        self.accepted = False  # by the token's account
        self.tokens_at_store: set[str | None] = set()
        self.given: list[tuple[str, str]] = []  # (commit, file) that left the store
        self.store = ""

    def commit(self, revision: str, folder: Path) -> None:
        self.commits[revision] = {file.name: file.read_bytes() for file in folder.iterdir()}
        self.main = revision

    def move_on(self, revision: str) -> None:
        """The branch has a new commit, with other weights."""
        files = self.commits[self.main]
        weights = files["model.safetensors"]
        self.commits[revision] = files | {"model.safetensors": weights[:-1] + bytes([weights[-1] ^ 1])}
        self.main = revision

    def answer(self, path: str, token: str | None) -> tuple[int, bytes, dict[str, str]]:
        """(status, content, headers), as the hub itself answers."""
        if not path.startswith(f"{MIRROR}/"):
            return 404, b"{}", {}
        path = path.removeprefix(MIRROR)
        api = re.fullmatch(r"/api/models/house/Gated/(revision|tree)/([\w.]+)", path)
        if api is not None:
            revision = self.main if api[2] == "main" else api[2]
            files = self.commits[revision]
            listed = [{"type": "file", "path": name, "size": len(files[name]), "oid": "0" * 40} for name in files]
            info = {
                "id": "house/Gated",
                "sha": revision,
                "gated": "manual",
                "siblings": [{"rfilename": n} for n in files],
            }
            return 200, json.dumps(listed if api[1] == "tree" else info).encode(), {}
        file = re.fullmatch(r"/house/Gated/resolve/(\w+)/([\w.-]+)", path)
        if file is None or file[2] not in self.commits.get(file[1], {}):
            return 404, b"{}", {"X-Error-Code": "EntryNotFound"}
        if token != f"Bearer {TOKEN}" or not self.accepted:
            return (401 if token is None else 403), b"{}", {"X-Error-Code": "GatedRepo"}
        content = self.commits[file[1]][file[2]]
        headers = {"X-Repo-Commit": file[1], "ETag": f'"{hashlib.sha256(content).hexdigest()}"'}
        if not file[2].endswith(".safetensors"):
            return 200, content, headers
        linked = {"X-Linked-Size": str(len(content)), "X-Linked-Etag": headers["ETag"]}
        return 302, b"", headers | linked | {"Location": f"{self.store}/{file[1]}/{file[2]}"}

    def from_store(self, path: str, token: str | None) -> tuple[int, bytes, dict[str, str]]:
        _, revision, name = path.split("/")
        self.tokens_at_store.add(token)
        self.given.append((revision, name))
        content = self.commits[revision][name]
        return 200, content, {"ETag": f'"{hashlib.sha256(content).hexdigest()}"'}


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[GatedHub]:
    made = GatedHub()
    made.commit(FIRST, make_model_directory(tmp_path / "first"))
    with answering(made.answer) as url, answering(made.from_store) as made.store:
        monkeypatch.setenv("HF_ENDPOINT", url + MIRROR)
        monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
        yield made


@pytest.fixture
def real(servers: Servers, tmp_path: Path) -> Iterator[Stack]:
    """A stack whose jobs are real trainings, and whose models are described by the trainer."""
    programs = {"TUNEPOOL_TRAINER": "worker.train", "TUNEPOOL_DESCRIBER": "worker.train.description"}
    with open_stack(tmp_path / "stack", servers, **programs) as made:
        yield made
    assert made.survivors() == [], "a trainer outlived its worker"


def start_worker(stack: Stack, token: str) -> Callable[[], None]:
    """Started with a token or, as Compose without one, with an empty one; what is returned stops it in order."""
    process = stack.start_worker(HF_TOKEN=token)
    stack.wait_for_worker()

    def stop() -> None:
        process.terminate()
        assert process.wait(patience(30)) == 0

    return stop


def test_a_gated_model_is_opened_by_a_token_and_trained_from_the_commit_that_was_looked_up(
    real: Stack, hub: GatedHub, tmp_path: Path
) -> None:
    with session_scope(real.engine) as session:
        key = keys.create(session, project_id=real.caller.project_id, name="admin", scopes=keys.EVERYTHING)[1]
    rows = tmp_path / "train.jsonl"
    rows.write_text("".join(json.dumps(row) + "\n" for row in chat_rows(12)))
    real.start_janitor()

    with api_process(real) as url:

        def tunepool(*words: str) -> subprocess.CompletedProcess[str]:
            return run_here(tmp_path, *words, OPENAI_BASE_URL=f"{url}/v1", OPENAI_API_KEY=key)

        stop = start_worker(real, "")
        closed = tunepool("models", "add", "house/Gated", "--wait")
        early = tunepool("submit", str(rows), "--model", "gated")
        stop()
        start_worker(real, TOKEN)
        not_accepted = tunepool("models", "check", "gated", "--wait")
        hub.accepted = True
        ready = tunepool("models", "check", "gated", "--wait")
        shown = json.loads(tunepool("--json", "models", "show", "gated").stdout)
        hub.move_on(SECOND)
        again = json.loads(tunepool("--json", "models", "check", "gated", "--wait").stdout)
        fetched = tunepool("models", "prefetch", "gated", "--wait")
        trained = tunepool("submit", str(rows), "--model", "gated", "--set", "training.max_steps=2", "--wait")
        adapters = tunepool("adapters", "list")
        copy = local_folder(offered(real).entry("gated"), cache=real.settings.cache)
        removed = tunepool("models", "remove", "gated")
        anew = json.loads(tunepool("--json", "models", "add", "house/Gated", "--wait").stdout)

    for refusal in (closed, not_accepted):
        assert refusal.returncode == 1, refusal
        assert "only to those who have accepted its terms" in refusal.stdout
        assert "HF_TOKEN" in refusal.stdout
        assert "tunepool models check gated" in refusal.stdout
    assert early.returncode != 0
    assert "HF_TOKEN" in early.stderr
    assert (ready.returncode, ready.stdout.split()[:2]) == (0, ["gated", "ready"]), ready
    assert (shown["commit"], shown["description"]["build"]["model_class"]) == (FIRST, "LlamaForCausalLM")
    assert again["commit"] == FIRST, "a branch that moves changes nothing"
    assert fetched.returncode == 0, fetched.stderr
    assert "done" in fetched.stdout
    assert trained.returncode == 0, trained.stderr
    with session_scope(real.engine) as session:
        (job,) = session.scalars(select(JobRow)).all()
        assert job.spec["base_model"]["revision"] == FIRST
        assert len(session.scalars(select(AdapterRow)).all()) == 1
    assert "gated" in adapters.stdout
    assert (copy / "model.safetensors").read_bytes() == hub.commits[FIRST]["model.safetensors"]
    assert removed.returncode == 0, removed.stderr
    assert (anew["state"], anew["commit"]) == ("ready", SECOND), "removed and added, it is the branch as it is now"
    assert hub.tokens_at_store == {None}, "the token is for the hub alone"
    assert places_of_the_token(real) == []


def places_of_the_token(stack: Stack) -> list[str]:
    """Files of the installation (logs, work, products, store) with the token in them, and events."""
    files = [path for path in stack.home.rglob("*") if path.is_file() and TOKEN.encode() in path.read_bytes()]
    with session_scope(stack.engine) as session:
        jobs = session.scalars(select(JobRow.id)).all()
    events = [event.message for job in jobs for event in stack.events(job) if TOKEN in event.message]
    return [*map(str, files), *events]


def test_without_a_token_a_fetch_of_what_was_open_once_ends_its_job_with_what_to_do(
    real: Stack, hub: GatedHub, tmp_path: Path
) -> None:
    """The token was taken from the worker, or its account has lost the model, between the look-up and the fetch."""
    hub.accepted = True
    lines = ["", "[models.gated]", 'source = "hub"', 'repository = "house/Gated"', ""]
    with (real.home / "models.toml").open("a") as file:
        file.write("\n".join(lines))
    offered(real)
    real.start_janitor()
    start_worker(real, TOKEN)
    until(lambda: offered(real).entries.get("gated"), seconds=120, what="an entry that is ready")
    hub.accepted = False

    rows = "".join(json.dumps(row) + "\n" for row in chat_rows(12)).encode()
    job = real.wait(real.submit_file(real.upload(rows), model="gated"), seconds=90)

    assert (job.status, job.attempts) == ("failed", 0)
    assert job.error is not None
    assert job.error["code"] == "base_model_forbidden"
    assert "accept them, to give the workers a token of that account as HF_TOKEN" in job.error["message"]
    assert [name for _, name in hub.given if name.endswith(".safetensors")], "its headers were read with the token"
