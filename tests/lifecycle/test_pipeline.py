"""A pipeline as a runner plays it: `tunepool run` as a process of its own against a whole stack, pushed to again.

Trainer, examiner and evaluator are fakes that obey the contracts: the first training row says how many of the held-out
items the product will answer wrongly.
"""

from __future__ import annotations

import hashlib
import json
import os
import socket
import subprocess
import sys
import zlib
from collections.abc import Iterator
from dataclasses import dataclass, field
from datetime import UTC
from pathlib import Path
from typing import Any

import httpx2
import pytest
from cryptography.fernet import Fernet
from sqlalchemy import func, select
from sqlalchemy.orm import Session

from api.app import create_app
from shared.products import aliases
from shared.store.db import session_scope
from shared.store.tables import EvaluationRow, JobRow
from shared.tenants import keys, signing_keys
from standalone.up import api_command
from tests.command_line import run_here
from tests.lifecycle.stack import Servers, Stack, open_stack, until
from tests.live import served
from tests.patience import patience

TOOL = Path(sys.executable).parent / "tunepool"
SETTINGS = {
    "TUNEPOOL_EVALUATOR": "tests.fake_evaluator",
    "TUNEPOOL_PREFLIGHT": "tests.fake_examiner",
    "TUNEPOOL_SECRETS_KEY": Fernet.generate_key().decode(),
}
UNAVAILABLE, MOST_RUNS = 6, 6
COMMIT = "c0ffee" * 6 + "c0de"
ITEMS = 8
ALL = ("preflight", "submit", "train", "evaluate", "gate", "promote")
PIPELINE = """\
name: {name}
training: train.jsonl
model: tiny
evaluate:
  items: {{file: heldout.jsonl}}
  measures: [{{type: exact_match, name: exact_match}}]
gate: gate.yaml
promote: {name}@prod
"""
GATE = """\
assertions:
  - candidate.exact_match > base.exact_match
  - {assert: candidate.exact_match >= prod.exact_match, if_present: prod}
"""


@dataclass
class Counted:
    """The API, and every request that came to it."""

    app: Any
    requests: list[str] = field(default_factory=list)

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] == "http":
            self.requests.append(f"{scope['method']} {scope['path']}")
        await self.app(scope, receive, send)


@dataclass(frozen=True)
class Site:
    """A stack with its API, and a key for runners."""

    stack: Stack
    api: Counted
    url: str
    key: str

    def environment(self, **more: str) -> dict[str, str]:
        known = {"PATH": os.environ["PATH"], "OPENAI_BASE_URL": f"{self.url}/v1", "OPENAI_API_KEY": self.key}
        return known | {"GITHUB_REF_NAME": "main", "GITHUB_SHA": COMMIT} | more

    def count(self, rows: type[JobRow | EvaluationRow]) -> int:
        with Session(self.stack.engine) as session:
            return session.scalar(select(func.count()).select_from(rows)) or 0


@pytest.fixture(scope="module")
def site(servers: Servers, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Site]:
    with open_stack(tmp_path_factory.mktemp("stack"), servers, **SETTINGS) as stack:
        with session_scope(stack.engine) as session:
            signing_keys.ensure(session, stack.settings)
            _, key = keys.create(session, project_id=stack.caller.project_id, name="runner")
        api = Counted(create_app(stack.settings))
        stack.start_worker()
        stack.start_janitor()
        stack.wait_for_worker()
        with served(api) as url:
            yield Site(stack, api, url, key)


@dataclass(frozen=True)
class Repository:
    """What a push brings: the folder of a pipeline, run against a site."""

    site: Site
    folder: Path
    name: str

    def push(self, *, wrong: int | None, **training: int) -> None:
        """Rows of a product that answers `wrong` items wrongly; None: the third row is no row."""
        told = " ".join(f"{name}={value}" for name, value in {"steps": 3, "wrong": wrong or 0, **training}.items())
        lines = [json.dumps({"text": f"fake: {told}"}), *(json.dumps({"text": f"row {n}"}) for n in range(11))]
        lines[2] = '{"text": 3}' if wrong is None else lines[2]
        (self.folder / "train.jsonl").write_text("\n".join(lines) + "\n")

    def without_preflight(self) -> None:
        """It is no part of the content, and a program less."""
        file = self.folder / "pipeline.yaml"
        file.write_text(file.read_text() + "preflight: false\n")

    def run(self, **environment: str) -> tuple[int, dict[str, Any], str]:
        """(exit code, the document, all of stdout and stderr)."""
        done = subprocess.run(
            [TOOL, "--json", "run", "pipeline.yaml"],
            cwd=self.folder,
            env=self.site.environment(**environment),
            capture_output=True,
            text=True,
            timeout=patience(120),
            check=False,
        )
        assert done.stdout, done.stderr
        return done.returncode, json.loads(done.stdout.splitlines()[-1]), done.stdout + done.stderr

    def killed_at(self, words: str) -> None:
        """A run that is killed once it has said `words`."""
        with subprocess.Popen(
            [TOOL, "run", "pipeline.yaml"],
            cwd=self.folder,
            env=self.site.environment(),
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
        ) as runner:
            assert runner.stderr is not None
            lines = iter(runner.stderr.readline, "")
            assert any(words in line for line in lines), "it ended before"
            runner.kill()

    def tool(self, *words: str) -> subprocess.CompletedProcess[str]:
        """A command that is no part of the run."""
        return run_here(self.folder, *words, **self.site.environment())

    def prod(self) -> str:
        """What the alias names now."""
        with Session(self.site.stack.engine) as session:
            row = aliases.find(session, f"{self.name}@prod", project_id=self.site.stack.caller.project_id)
            return aliases.version(session, row, row.version).model


@pytest.fixture
def repository(site: Site, tmp_path: Path, request: pytest.FixtureRequest) -> Repository:
    name = f"r{zlib.crc32(request.node.name.encode())}"
    (tmp_path / "pipeline.yaml").write_text(PIPELINE.format(name=name))
    (tmp_path / "gate.yaml").write_text(GATE)
    rows = [
        {"messages": [{"role": role, "content": f"{name} {n}"} for role in ("user", "assistant")]} for n in range(ITEMS)
    ]
    (tmp_path / "heldout.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return Repository(site, tmp_path, name)


def steps(told: dict[str, Any]) -> list[str]:
    return [f"{step['name']} {step['status']}" for step in told["steps"]]


def test_bad_data_is_red_at_its_line_and_nothing_trains(repository: Repository) -> None:
    jobs = repository.site.count(JobRow)
    repository.push(wrong=None)

    code, told, words = repository.run(GITHUB_ACTIONS="true")

    assert (code, told["status"], steps(told)) == (2, "bad_input", ["preflight failed"])
    assert told["data_faults"][0]["line"] == 3
    assert "::error file=train.jsonl,line=3" in words
    assert repository.site.count(JobRow) == jobs


def test_good_data_goes_to_production_worse_data_does_not_and_what_is_unchanged_trains_no_more(
    repository: Repository,
) -> None:
    repository.push(wrong=4)
    code, first, words = repository.run()
    assert (code, first["status"]) == (0, "passed"), words
    assert steps(first) == [
        f"{name} passed" for name in ("preflight", "submit", "train", "evaluate", "gate", "promote")
    ]
    assert repository.prod() == first["model"]

    repository.without_preflight()
    repository.push(wrong=1)
    code, better, words = repository.run(GITHUB_SHA="better")
    assert (code, repository.prod()) == (0, better["model"]), words

    repository.push(wrong=5)
    code, worse, _ = repository.run(GITHUB_SHA="worse")
    assert (code, worse["status"]) == (1, "gate_failed")
    assert "candidate.exact_match >= prod.exact_match: 0.375 >= 0.875 does not hold" in worse["message"]
    assert repository.prod() == better["model"]

    moved = repository.tool("rollback", f"{repository.name}@prod", "--reason", "complaints since noon")
    assert moved.returncode == 0, moved.stderr
    assert repository.prod() == first["model"]

    repository.push(wrong=4)
    jobs, evaluations, asked = repository.site.count(JobRow), repository.site.count(EvaluationRow), repository.site.api
    asked.requests.clear()
    code, again, _ = repository.run(GITHUB_SHA="unchanged")
    assert (code, steps(again), again["model"]) == (0, ["train skipped", "promote skipped"], first["model"])
    assert (repository.site.count(JobRow), repository.site.count(EvaluationRow)) == (jobs, evaluations)
    assert len(asked.requests) <= 5, asked.requests
    assert "GET /openapi.json" not in asked.requests, "a megabyte for the sake of a version"


def test_a_runner_killed_between_steps_goes_on_with_the_same_job_and_the_same_evaluation(
    repository: Repository,
) -> None:
    jobs, evaluations = repository.site.count(JobRow), repository.site.count(EvaluationRow)
    repository.without_preflight()
    repository.push(wrong=2, steps=30)

    repository.killed_at("submit: ftjob-")
    repository.killed_at("Evaluation eval_")
    code, told, words = repository.run()

    assert (code, repository.prod()) == (0, told["model"]), words
    assert "evaluate passed" in steps(told)
    assert repository.site.count(JobRow) == jobs + 1
    assert repository.site.count(EvaluationRow) == evaluations + 1
    assert repository.site.stack.job(told["job"]).attempts == 1


def test_a_server_that_is_killed_and_started_anew_at_each_step_costs_no_second_job_and_no_second_evaluation(
    site: Site, repository: Repository
) -> None:
    repository.without_preflight()
    repository.push(wrong=2, steps=20)
    jobs, evaluations = site.count(JobRow), site.count(EvaluationRow)
    left = ["submit: ftjob-", "train: ftjob-", "Evaluation eval_", "evaluate: eval_", "gate: "]
    port = free_port()
    codes: list[int] = []
    server = started_api(site.stack, port)
    apart = {**site.environment(), "OPENAI_BASE_URL": f"http://127.0.0.1:{port}/v1"}

    while not codes or (codes[-1] == UNAVAILABLE and len(codes) < MOST_RUNS):
        with subprocess.Popen(
            [TOOL, "run", "pipeline.yaml"],
            cwd=repository.folder,
            env=apart,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
        ) as runner:
            assert runner.stderr is not None
            for line in iter(runner.stderr.readline, ""):
                if left and left[0] in line:
                    left.pop(0)
                    server.kill()
                    server.wait(patience(20))
                    server = started_api(site.stack, port)
            codes.append(runner.wait(patience(120)))

    assert codes[-1] == 0, codes
    assert not left, "it was not killed at each step"
    assert (site.count(JobRow), site.count(EvaluationRow)) == (jobs + 1, evaluations + 1)
    with Session(site.stack.engine) as session:
        newest = session.scalars(select(JobRow).order_by(JobRow.created_at.desc()).limit(1)).one()
    assert (newest.attempts, repository.prod()) == (1, newest.fine_tuned_model)


def free_port() -> int:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        return int(taken.getsockname()[1])


def started_api(stack: Stack, port: int) -> subprocess.Popen[bytes]:
    """A process of its own that answers by now."""
    _, *argv = api_command("127.0.0.1", port, processes=1)
    process = stack.start(argv, name="api")
    until(lambda: answers(port), what="an API that answers")
    return process


def answers(port: int) -> bool:
    try:
        return httpx2.get(f"http://127.0.0.1:{port}/livez", timeout=patience(5)).status_code == httpx2.codes.OK
    except httpx2.HTTPError:
        return False


def test_what_a_run_published_says_in_a_signed_statement_of_what_it_was_made(repository: Repository) -> None:
    repository.without_preflight()
    file = repository.folder / "pipeline.yaml"
    file.write_text(file.read_text().partition("evaluate:")[0])
    repository.push(wrong=0)
    told = repository.run()[1]

    proven = repository.tool("--json", "verify", told["model"])

    assert proven.returncode == 0, proven.stdout + proven.stderr
    statement = json.loads(proven.stdout)["statement"]
    build, run = (statement["predicate"][part] for part in ("buildDefinition", "runDetails"))
    sources = {source["name"]: source for source in build["resolvedDependencies"]}
    rows = (repository.folder / "train.jsonl").read_bytes()
    assert sources["training_file"]["digest"] == {"sha256": hashlib.sha256(rows).hexdigest()}
    assert sources["training_file"]["annotations"]["rows"] == 12
    assert sources["source"]["digest"] == {"gitCommit": COMMIT}
    assert "sha256" in sources["base_model/config.json"]["digest"]
    assert build["internalParameters"]["spec"]["seed"] == 0
    assert run["builder"]["version"].keys() >= {"tunepool-server", "torch", "peft"}
    assert run["metadata"]["invocationId"].startswith(told["job"])
    assert run["byproducts"][0]["annotations"]["steps"] == 3
    assert run["byproducts"][1]["name"].endswith(":ckpt-step-3")

    folder = repository.folder / "adapter"
    assert repository.tool("adapters", "download", told["model"], str(folder)).returncode == 0
    keys_file = repository.folder / "keys.json"
    keys_file.write_text(httpx2.get(f"{repository.site.url}/v1/tunepool/signing-keys", timeout=patience(20)).text)
    (folder / "chain.json").write_text("{}")
    tampered = repository.tool("verify", str(folder), "--key", str(keys_file))
    assert (tampered.returncode, "chain.json was altered" in tampered.stdout) == (1, True), tampered


def test_a_job_is_trained_again_from_its_signed_statement_and_makes_the_same_bytes(repository: Repository) -> None:
    repository.without_preflight()
    file = repository.folder / "pipeline.yaml"
    file.write_text(file.read_text().partition("evaluate:")[0])
    repository.push(wrong=1)
    told = repository.run()[1]

    done = repository.tool("--json", "reproduce", told["job"])

    verdict = json.loads(done.stdout)
    assert (done.returncode, verdict["verdict"], verdict["otherwise"]) == (0, "same", []), done.stderr
    assert verdict["beforehand"] == [], "the libraries that workers report are those of the statement"
    again = repository.site.stack.job(verdict["reproduction"])
    assert again.job_metadata == {"reproduces": told["job"]}
    first = repository.site.stack.job(told["job"])
    created = first.created_at.astimezone(UTC).strftime("%Y-%m-%dT%H:%M:%S")
    assert again.spec["training"] == {**first.spec["training"], "template_time": created}

    # What the fake trainer makes of a job with other settings is the same, but the data are gone.
    rows = repository.site.stack.job(told["job"]).training_file
    assert repository.tool("files", "delete", rows, "--force").returncode == 0
    gone = repository.tool("reproduce", told["job"])
    assert (gone.returncode, "Give it with --file" in gone.stderr) == (2, True), gone.stderr
    (repository.folder / "other.jsonl").write_text("{}\n")
    other = repository.tool("reproduce", told["job"], "--file", "other.jsonl")
    assert (other.returncode, "the training_file of then" in other.stderr) == (2, True), other.stderr
    given = repository.tool("reproduce", told["job"], "--file", "train.jsonl")
    assert (given.returncode, given.stdout.splitlines()[-1][:5]) == (0, "SAME:"), given.stdout + given.stderr
