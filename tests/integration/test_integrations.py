"""Integrations: figures reach trackers from the job's events, each step once; secrets are shown to nobody."""

from __future__ import annotations

import dataclasses
import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx2
import pytest
from openai import OpenAI
from pydantic import SecretStr
from sqlalchemy import func, select, update
from tensorboard.backend.event_processing.event_file_loader import EventFileLoader
from tunepool.main import cli
from typer.testing import CliRunner

from shared.chores import trackings
from shared.jobs import moves
from shared.lease import journal
from shared.lease.journal import NewEvent
from shared.store.db import session_scope
from shared.store.tables import AuditRow, EventRow, JobRow, ProjectSecretRow, TrackingRow, WorkerRow
from tests.factories import make_file, make_key, make_worker
from tests.fake_wandb import FakeWandb, fake_wandb
from tests.integration.conftest import Api
from tests.integration.test_webhooks import new_key
from tests.live import live_api
from tests.openai_types import held
from tests.patience import patience
from worker.chores.tracking import EVENT_FILE, track_next
from worker.host.flags import SharedFlags
from worker.host.host import Host, open_host

SECRETS = "/v1/tunepool/secrets"
JOBS = "/v1/fine_tuning/jobs"
WANDB_KEY = "a1b2c3d4" * 5
TOKEN = "mlflow-token-of-the-test"
WANDB = {"type": "wandb", "wandb": {"project": "tickets", "entity": "team", "tags": ["nightly"]}}
MLFLOW = {"type": "mlflow", "mlflow": {"experiment": "tickets & more", "name": "night run", "tags": {"by": "ci"}}}
TENSORBOARD = {"type": "tensorboard"}


@pytest.fixture(scope="module")
def secret_api(api: Api) -> Iterator[Api]:
    """The same API with a key for secrets, and with the loopback allowed."""
    values: dict[str, Any] = {
        "secrets_key": SecretStr(new_key()),
        "webhook_networks": "127.0.0.0/8",
        "tracker_seconds": 0.001,
    }
    values["webhook_seconds"] = patience(10)
    settings = api.settings.model_copy(update=values)
    with live_api(settings) as url, OpenAI(base_url=f"{url}/v1", api_key=api.key, http_client=held()) as client:
        yield dataclasses.replace(api, url=url, settings=settings, client=client)


@dataclasses.dataclass
class Project:
    api: Api
    caller: Any
    key: str
    http: httpx2.Client

    def store(self, name: str, value: str) -> None:
        answer = self.http.put(f"{SECRETS}/{name}", json={"value": value})
        assert answer.status_code == 200, answer.text
        assert value not in answer.text

    def submitted(self, **body: Any) -> str:
        """A job that waits for the check of its file, which nobody makes."""
        with session_scope(self.api.engine) as session:
            file = make_file(session, self.caller)
        answer = self.http.post(JOBS, json={"model": "smollm2-135m-instruct", "training_file": file.id, **body})
        assert answer.status_code == 200, answer.text
        return str(answer.json()["id"])

    def tell(self, job_id: str, *steps: int) -> None:
        """What a trainer's supervisor would record of these steps."""
        figures = [{"step": step, "total_steps": 9, "train_loss": 1 / step, "learning_rate": 1e-4} for step in steps]
        with session_scope(self.api.engine) as session:
            session.get_one(JobRow, job_id, with_for_update=True)
            journal.append(session, job_id, [NewEvent("Step", type="metrics", data=data) for data in figures])

    def end(self, job_id: str) -> None:
        with session_scope(self.api.engine) as session:
            moves.request_cancel(session, job_id, project_id=self.caller.project_id)

    def state(self, job_id: str) -> dict[str, Any]:
        (state,) = self.http.get(f"{JOBS}/{job_id}").json()["tunepool"]["integrations"]
        return dict(state)

    def words(self, job_id: str) -> list[str]:
        with session_scope(self.api.engine) as session:
            query = select(EventRow.message).where(EventRow.job_id == job_id, EventRow.type == "message")
            return list(session.scalars(query.order_by(EventRow.seq)))


@pytest.fixture
def project(secret_api: Api) -> Iterator[Project]:
    """A project of its own for each test; nothing of it waits afterwards."""
    with session_scope(secret_api.engine) as session:
        caller, key = make_key(session)
    with secret_api.http(key) as http:
        yield Project(secret_api, caller, key, http)
    with session_scope(secret_api.engine) as session:
        session.execute(update(TrackingRow).values(state="failed"))
        session.execute(update(WorkerRow).values(trackers=["mlflow", "tensorboard", "wandb"]))


@pytest.fixture
def host(secret_api: Api, tmp_path: Path) -> Iterator[Host]:
    """A worker's child process, which is this one."""
    opened = open_host(secret_api.settings.model_copy(update={"home": tmp_path / "home"}), flags=SharedFlags())
    opened = dataclasses.replace(opened, store=open_host(secret_api.settings, flags=SharedFlags()).store)
    yield opened
    opened.engine.dispose()


def turned_away(answer: httpx2.Response, status: int) -> dict[str, Any]:
    assert answer.status_code == status, answer.text
    return dict(answer.json()["error"])


def now(api: Api) -> None:
    """No try waits for its time any more."""
    with session_scope(api.engine) as session:
        session.execute(update(TrackingRow).where(TrackingRow.lease_owner.is_(None)).values(lease_until=None))


def brought(host: Host, project: Project) -> bool:
    now(project.api)
    return track_next(host)


# --- secrets ----------------------------------------------------------------------------------------------------------


def test_a_secret_is_stored_encrypted_and_shown_to_nobody(project: Project) -> None:
    project.store("WANDB_API_KEY", WANDB_KEY)
    project.store("WANDB_API_KEY", WANDB_KEY + "2")

    listed = project.http.get(SECRETS).text
    with session_scope(project.api.engine) as session:
        row = session.get_one(ProjectSecretRow, (project.caller.project_id, "WANDB_API_KEY"))
        audited = [f"{entry.before} {entry.after}" for entry in session.scalars(select(AuditRow))]

    assert json.loads(listed)["data"][0]["id"] == "WANDB_API_KEY"
    assert len(json.loads(listed)["data"]) == 1
    assert WANDB_KEY not in " ".join([listed, row.sealed, *audited])
    assert project.http.delete(f"{SECRETS}/WANDB_API_KEY").json()["deleted"]
    assert project.http.get(SECRETS).json()["data"] == []
    turned_away(project.http.delete(f"{SECRETS}/WANDB_API_KEY"), 404)


@pytest.mark.parametrize(
    "value", ["hidden-word\n", "hidden-word ü", "", "hidden-word" * 300, {"hidden-word": 1}, ["hidden-word"], 4711]
)
def test_a_value_that_is_refused_is_not_repeated(project: Project, value: object) -> None:
    answer = project.http.put(f"{SECRETS}/WANDB_API_KEY", json={"value": value})

    assert turned_away(answer, 400)["param"] == "value"
    assert "hidden-word" not in answer.text
    assert "4711" not in answer.text


def test_a_name_that_nothing_reads_and_a_server_inside_are_turned_away(project: Project) -> None:
    assert "WANDB_API_KEY" in turned_away(project.http.put(f"{SECRETS}/HOME", json={"value": "x"}), 400)["message"]
    inside = project.http.put(f"{SECRETS}/MLFLOW_TRACKING_URI", json={"value": "https://169.254.169.254/"})
    assert turned_away(inside, 400)["code"] == "address_not_allowed"


def test_secrets_are_for_keys_that_may_do_everything_in_their_project(project: Project) -> None:
    with session_scope(project.api.engine) as session:
        _, weak = make_key(session, scopes=("jobs:read", "jobs:write"))
        _, stranger = make_key(session)
    project.store("WANDB_API_KEY", WANDB_KEY)

    with project.api.http(weak) as http:
        turned_away(http.get(SECRETS), 403)
        turned_away(http.put(f"{SECRETS}/WANDB_API_KEY", json={"value": "x"}), 403)
    with project.api.http(stranger) as http:
        assert http.get(SECRETS).json()["data"] == []
        turned_away(http.delete(f"{SECRETS}/WANDB_API_KEY"), 404)


def test_the_command_line_takes_a_value_from_its_input_or_the_environment(
    project: Project, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OPENAI_BASE_URL", f"{project.api.url}/v1")
    monkeypatch.setenv("OPENAI_API_KEY", project.key)
    monkeypatch.setenv("MLFLOW_TRACKING_TOKEN", TOKEN)
    runner = CliRunner()

    stored = runner.invoke(cli, ["secrets", "set", "WANDB_API_KEY"], input=f"{WANDB_KEY}\n")
    taken = runner.invoke(cli, ["secrets", "set", "MLFLOW_TRACKING_TOKEN", "--from-env"])
    listed = runner.invoke(cli, ["secrets", "list"])
    removed = runner.invoke(cli, ["secrets", "remove", "MLFLOW_TRACKING_TOKEN"])

    assert [result.exit_code for result in (stored, taken, listed, removed)] == [0, 0, 0, 0], stored.output
    assert "WANDB_API_KEY" in listed.output
    assert "MLFLOW_TRACKING_TOKEN" in listed.output
    assert not any(secret in listed.output + stored.output for secret in (WANDB_KEY, TOKEN))


# --- what is asked for ------------------------------------------------------------------------------------------------


def test_a_job_whose_integration_lacks_its_secret_is_refused_by_name(project: Project) -> None:
    with session_scope(project.api.engine) as session:
        file = make_file(session, project.caller)
    body = {"model": "smollm2-135m-instruct", "training_file": file.id}

    error = turned_away(project.http.post(JOBS, json={**body, "integrations": [WANDB]}), 400)

    assert (error["param"], error["code"]) == ("integrations[0].type", "secret_missing")
    assert "tunepool secrets set WANDB_API_KEY" in error["message"]
    error = turned_away(
        project.http.post(JOBS, json={**body, "tunepool": {"integrations": [TENSORBOARD, MLFLOW]}}), 400
    )
    assert (error["param"], error["code"]) == ("tunepool.integrations[1].type", "secret_missing")
    assert "MLFLOW_TRACKING_URI" in error["message"]
    preflight = project.http.post("/v1/tunepool/preflights", json={**body, "integrations": [WANDB]})
    assert turned_away(preflight, 400)["code"] == "secret_missing"


def test_a_job_is_refused_while_no_worker_has_the_library(project: Project) -> None:
    project.store("WANDB_API_KEY", WANDB_KEY)
    with session_scope(project.api.engine) as session:
        session.execute(update(WorkerRow).values(trackers=["mlflow"]))
        make_worker(session)
        file = make_file(session, project.caller)
    body = {"model": "smollm2-135m-instruct", "training_file": file.id, "integrations": [WANDB]}

    error = turned_away(project.http.post(JOBS, json=body), 400)

    assert (error["param"], error["code"]) == ("integrations[0].type", "tracker_unavailable")
    assert "tunepool-server[trackers]" in error["message"]


def test_integrations_are_echoed_as_the_official_client_sent_them(project: Project) -> None:
    project.store("WANDB_API_KEY", WANDB_KEY)
    with session_scope(project.api.engine) as session:
        file = make_file(session, project.caller)
    client = project.api.client.with_options(api_key=project.key)

    made = client.fine_tuning.jobs.create(
        model="smollm2-135m-instruct",
        training_file=file.id,
        integrations=[WANDB],  # type: ignore[list-item]
        extra_body={"tunepool": {"integrations": [TENSORBOARD]}},
    )
    job = client.fine_tuning.jobs.retrieve(made.id)

    assert job.integrations is not None
    assert [entry.to_dict() for entry in job.integrations] == [WANDB]
    states = job.to_dict()["tunepool"]["integrations"]
    assert [(state["type"], state["state"]) for state in states] == [("wandb", "waiting"), ("tensorboard", "waiting")]


# --- Weights & Biases -------------------------------------------------------------------------------------------------


@pytest.fixture
def wandb() -> Iterator[FakeWandb]:
    with fake_wandb(WANDB_KEY) as fake:
        yield fake


def with_settings(host: Host, **values: Any) -> Host:
    return dataclasses.replace(host, settings=host.settings.model_copy(update=values))


def test_the_library_of_wandb_brings_each_step_once_over_deaths(project: Project, host: Host, wandb: FakeWandb) -> None:
    host = with_settings(host, wandb_url=wandb.url)
    project.store("WANDB_API_KEY", WANDB_KEY)
    job_id = project.submitted(integrations=[WANDB])
    project.tell(job_id, 1, 2, 3)

    assert brought(host, project)

    run = wandb.runs[job_id]
    assert run.steps == [1, 2]
    assert run.exit_code is None  # the job goes on
    assert run.values["tags"][:2] == ["nightly", "tunepool/finetune"]
    assert (run.values["displayName"], run.values["project"], run.values["entity"]) == (job_id, "tickets", "team")
    assert json.loads(run.values["config"])["model"]["value"] == "smollm2-135m-instruct"
    assert project.state(job_id)["url"] == f"{wandb.url}/team/tickets/runs/{job_id}"
    assert project.words(job_id)[-1] == f"Weights & Biases run: {wandb.url}/team/tickets/runs/{job_id}"

    with session_scope(project.api.engine) as session:  # as if the worker had died before it wrote that down
        session.execute(update(TrackingRow).where(TrackingRow.job_id == job_id).values(cursor=0, last_step=None))
    project.tell(job_id, 4)
    project.end(job_id)
    assert brought(host, project)

    assert run.steps == [1, 2, 3, 4]
    assert [line["train_loss"] for _, line in sorted(run.lines.items())] == [1, 1 / 2, 1 / 3, 1 / 4]
    assert run.summary["status"] == "cancelled"
    assert run.exit_code == 1
    assert (project.state(job_id)["state"], project.state(job_id)["last_step"]) == ("done", 4)
    assert not brought(host, project)
    assert not list((host.work).glob("*"))


def test_a_key_that_wandb_refuses_is_said_and_shown_nowhere(project: Project, host: Host, wandb: FakeWandb) -> None:
    host = with_settings(host, wandb_url=wandb.url)
    project.store("WANDB_API_KEY", "f" * 40)
    job_id = project.submitted(integrations=[WANDB])
    project.end(job_id)

    assert brought(host, project)

    state = project.state(job_id)
    assert state["state"] == "waiting"
    assert state["error"]
    assert wandb.refused
    assert "f" * 40 not in project.http.get(f"{JOBS}/{job_id}").text


# --- MLflow -----------------------------------------------------------------------------------------------------------

SERVE = """
import sys
from werkzeug.serving import make_server
from mlflow.server import app
server = make_server("127.0.0.1", 0, app, threaded=True)
print(server.port, flush=True)
server.serve_forever()
"""


@pytest.fixture(scope="module")
def mlflow_url(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """A real MLflow server, on SQLite."""
    folder = tmp_path_factory.mktemp("mlflow")
    environment = {
        "PATH": "/usr/bin:/bin",
        "HOME": str(folder),
        "_MLFLOW_SERVER_FILE_STORE": f"sqlite:///{folder}/mlflow.db",
        "_MLFLOW_SERVER_ARTIFACT_ROOT": str(folder),
        "MLFLOW_DISABLE_TELEMETRY": "true",
    }
    with (
        (folder / "log").open("wb") as words,
        subprocess.Popen(
            [sys.executable, "-c", SERVE], stdout=subprocess.PIPE, stderr=words, env=environment, text=True
        ) as server,
    ):
        assert server.stdout is not None
        port = server.stdout.readline().strip()
        assert port, (folder / "log").read_text()
        url = f"http://127.0.0.1:{port}"
        # The first request makes the tables, which takes longer than a worker waits for an answer.
        health = httpx2.get(f"{url}/api/2.0/mlflow/experiments/search?max_results=1", timeout=patience(30))
        assert health.status_code == 200, health.text
        yield url
        server.kill()


def mlflow_run(url: str, **asked: Any) -> dict[str, Any]:
    answer = httpx2.post(f"{url}/api/2.0/mlflow/runs/search", json=asked, timeout=patience(20))
    assert answer.status_code == 200, answer.text
    (run,) = answer.json()["runs"]
    return dict(run)


def history(url: str, run_id: str, metric: str) -> list[tuple[int, float]]:
    answer = httpx2.get(
        f"{url}/api/2.0/mlflow/metrics/get-history",
        params={"run_id": run_id, "metric_key": metric},
        timeout=patience(20),
    )
    return [(point["step"], point["value"]) for point in answer.json()["metrics"]]


def test_an_mlflow_server_has_each_step_once_over_deaths(project: Project, host: Host, mlflow_url: str) -> None:
    project.store("MLFLOW_TRACKING_URI", f"{mlflow_url}/")
    project.store("MLFLOW_TRACKING_TOKEN", TOKEN)
    job_id = project.submitted(tunepool={"integrations": [MLFLOW]})
    project.tell(job_id, 1, 2, 3)

    assert brought(host, project)

    assert project.state(job_id)["error"] is None
    experiment = httpx2.get(
        f"{mlflow_url}/api/2.0/mlflow/experiments/get-by-name",
        params={"experiment_name": "tickets & more"},
        timeout=patience(20),
    ).json()["experiment"]["experiment_id"]
    run_id = mlflow_run(mlflow_url, experiment_ids=[experiment])["info"]["run_id"]
    assert project.state(job_id)["url"] == f"{mlflow_url}/#/experiments/{experiment}/runs/{run_id}"
    assert history(mlflow_url, run_id, "train_loss") == [(1, 1.0), (2, 0.5)]

    with session_scope(project.api.engine) as session:  # as if the worker had died before it wrote that down
        forgotten = {"cursor": 0, "last_step": None, "run_id": None, "url": None}
        session.execute(update(TrackingRow).where(TrackingRow.job_id == job_id).values(**forgotten))
    project.tell(job_id, 2, 3, 4)
    project.end(job_id)
    assert brought(host, project)

    run = mlflow_run(mlflow_url, experiment_ids=[experiment])
    assert history(mlflow_url, run_id, "train_loss") == [(1, 1.0), (2, 0.5), (3, 1 / 3), (4, 0.25)]
    assert (run["info"]["run_name"], run["info"]["status"]) == ("night run", "KILLED")
    tags = {tag["key"]: tag["value"] for tag in run["data"]["tags"]}
    assert (tags["by"], tags["tunepool.job_id"], tags["tunepool.status"]) == ("ci", job_id, "cancelled")
    params = {param["key"]: param["value"] for param in run["data"]["params"]}
    assert params["model"] == "smollm2-135m-instruct"
    assert project.state(job_id)["state"] == "done"
    assert not brought(host, project)
    assert TOKEN not in json.dumps(run)


def test_a_tracker_that_is_away_is_tried_again_and_given_up_after_three_days(project: Project, host: Host) -> None:
    project.store("MLFLOW_TRACKING_URI", "http://127.0.0.1:9")
    job_id = project.submitted(tunepool={"integrations": [MLFLOW]})
    project.tell(job_id, 1, 2)
    before = project.words(job_id)

    assert brought(host, project)

    assert project.state(job_id)["error"] == "It refused the connection."
    assert project.words(job_id) == before
    with session_scope(project.api.engine) as session:
        row = session.scalars(select(TrackingRow).where(TrackingRow.job_id == job_id)).one()
        wait = session.scalars(select(row.lease_until - func.now())).one().total_seconds()
        row.failing_since = session.scalars(select(func.now() - trackings.GIVEN_UP_AFTER * 1.01)).one()
        assert (row.tries, row.failures) == (1, 0)
        assert wait > 1
    assert not track_next(host)  # not before its time

    assert brought(host, project)

    assert project.state(job_id)["state"] == "failed"
    assert project.words(job_id)[-1].startswith("MLflow was given up after three days of failures. Last: It refused")
    assert not brought(host, project)


def test_the_address_of_a_server_is_looked_at_again_when_it_is_used(project: Project, host: Host) -> None:
    project.store("MLFLOW_TRACKING_URI", "http://127.0.0.1:9")
    job_id = project.submitted(tunepool={"integrations": [MLFLOW]})
    project.end(job_id)

    assert brought(with_settings(host, webhook_networks=""), project)

    assert "127.0.0.1 is not on the public internet" in project.state(job_id)["error"]


def test_a_secret_that_was_removed_is_missed_by_name(project: Project, host: Host) -> None:
    project.store("MLFLOW_TRACKING_URI", "http://127.0.0.1:9")
    job_id = project.submitted(tunepool={"integrations": [MLFLOW]})
    project.end(job_id)
    project.http.delete(f"{SECRETS}/MLFLOW_TRACKING_URI")

    assert brought(host, project)

    assert project.state(job_id)["error"] == "The project has no secret MLFLOW_TRACKING_URI any more."


# --- TensorBoard ------------------------------------------------------------------------------------------------------


def test_tensorboard_reads_the_event_file_of_an_ended_job(project: Project, host: Host, tmp_path: Path) -> None:
    job_id = project.submitted(tunepool={"integrations": [TENSORBOARD]})
    project.tell(job_id, 1, 2, 3, 2, 3, 4)
    assert not brought(host, project)  # it is written once
    project.end(job_id)

    assert brought(host, project)

    state = project.state(job_id)
    assert state["state"] == "done"
    file = project.http.get(f"/v1/files/{state['file']}").json()
    assert (file["purpose"], file["filename"]) == ("fine-tune-results", EVENT_FILE)
    (tmp_path / EVENT_FILE).write_bytes(project.http.get(f"/v1/files/{state['file']}/content").content)
    read = [
        (event.step, value.tag, pytest.approx(1 / event.step))
        for event in EventFileLoader(str(tmp_path / EVENT_FILE)).Load()
        for value in event.summary.value
        if value.tag == "train_loss" and value.tensor.float_val[0] == pytest.approx(1 / event.step)
    ]
    assert [step for step, *_ in read] == [1, 2, 3, 4]


def test_a_job_that_measured_nothing_has_no_event_file(project: Project, host: Host) -> None:
    job_id = project.submitted(tunepool={"integrations": [TENSORBOARD]})
    project.end(job_id)

    assert brought(host, project)

    assert (project.state(job_id)["state"], project.state(job_id)["file"]) == ("done", None)
