"""The command line against a live server: what a CI pipeline sees of us. The trainer is the fake one.

Every kind of end is one of a process (`tunepool`); commands that only have to succeed run in this one (`succeeds`).
"""

from __future__ import annotations

import hashlib
import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.command_line import run_here
from tests.lifecycle.stack import QUICK, make_model
from tests.patience import patience

ROOT = Path(__file__).parents[2]
TOOLS = Path(sys.executable).parent
MODEL = "tiny"


def tunepool(home: Path, *words: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [TOOLS / "tunepool", *words],
        env={"PATH": "/usr/bin:/bin", "TUNEPOOL_HOME": str(home), "COLUMNS": "200", **environment},
        cwd=home,
        capture_output=True,
        text=True,
        timeout=patience(120),
        check=False,
    )


def succeeds(home: Path, *words: str) -> str:
    done = run_here(home, *words)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A server that runs, with a base model of two small files."""
    home = tmp_path_factory.mktemp("cli")
    make_model(home / "model")
    (home / "models.toml").write_text(f'[models.{MODEL}]\nsource = "path"\npath = "{home / "model"}"\n')
    with (home / "server.log").open("wb") as log:
        server = subprocess.Popen(
            [TOOLS / "tunepool-server", "up", "--home", home, "--port", str(free_port())],
            cwd=ROOT,
            env={**os.environ, **QUICK, "TUNEPOOL_MODELS_FILE": str(home / "models.toml")},
            stdout=log,
            stderr=log,
            start_new_session=True,
        )
    try:
        wait_until_it_answers(home, server)
        yield home
    finally:
        server.send_signal(signal.SIGINT)
        server.wait(patience(60))


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])


def wait_until_it_answers(home: Path, server: subprocess.Popen[bytes]) -> None:
    deadline = time.monotonic() + patience(90)
    while not (home / "credentials.json").exists() or run_here(home, "jobs", "list").returncode != 0:
        assert server.poll() is None, (home / "server.log").read_text()[-3000:]
        assert time.monotonic() < deadline, (home / "server.log").read_text()[-3000:]
        time.sleep(0.2)


def rows(folder: Path, behaviour: str) -> Path:
    """A training file whose first row tells the fake trainer how to behave."""
    file = folder / f"{behaviour.replace(' ', '_') or 'rows'}.jsonl"
    texts = (f"fake: {behaviour}", *(f"row {number}" for number in range(11)))
    file.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return file


def test_a_pipeline_submits_waits_and_downloads_a_verified_adapter(home: Path, tmp_path: Path) -> None:
    done = tunepool(
        home, "submit", str(rows(tmp_path, "steps=5")), "--model", MODEL, "--suffix", "ci", "--set", "adapter.r=4",
        "--metadata", "commit=abc", "--wait",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    job_id, name = done.stdout.split()

    assert name.startswith(f"ft:{MODEL}:") and ":ci:" in name  # noqa: PT018 -- one name
    assert name in succeeds(home, "adapters", "list").splitlines()
    assert "serves   vllm" in succeeds(home, "adapters", "show", name)
    job = json.loads(succeeds(home, "--json", "jobs", "show", job_id))
    assert job["metadata"] == {"commit": "abc"}
    assert job["tunepool"]["spec"]["adapter"]["r"] == 4
    assert "New fine-tuned model created" in succeeds(home, "jobs", "events", job_id)

    written = [Path(line) for line in succeeds(home, "adapters", "download", name, str(tmp_path / "a")).splitlines()]
    assert {path.name for path in written} >= {"adapter_config.json", "chain.json"}
    assert hashlib.sha256((tmp_path / "a/chain.json").read_bytes()).hexdigest() != hashlib.sha256(b"").hexdigest()


def test_waiting_for_a_job_that_fails_exits_1_with_its_reason(home: Path, tmp_path: Path) -> None:
    done = tunepool(home, "submit", str(rows(tmp_path, "user_fault")), "--model", MODEL, "--wait")

    assert done.returncode == 1
    assert "Row 3 cannot be rendered." in done.stdout + done.stderr


def test_a_running_job_is_paused_resumed_and_cancelled(home: Path, tmp_path: Path) -> None:
    job_id = succeeds(home, "submit", str(rows(tmp_path, "steps=2000 step_seconds=0.05")), "--model", MODEL)
    reaches(home, job_id, "running")

    succeeds(home, "jobs", "pause", job_id)
    reaches(home, job_id, "paused")
    assert succeeds(home, "jobs", "resume", job_id).split()[1] in {"queued", "running"}
    reaches(home, job_id, "running")
    succeeds(home, "jobs", "cancel", job_id)
    reaches(home, job_id, "cancelled")

    assert tunepool(home, "watch", job_id).returncode == 1


def test_the_pool_is_operated_from_the_command_line_and_every_act_is_audited(home: Path, tmp_path: Path) -> None:
    acts_before = len(succeeds(home, "--json", "audit").splitlines())
    assert succeeds(home, "pool", "hold") == "default held"
    job_id = succeeds(home, "submit", str(rows(tmp_path, "steps=3")), "--model", MODEL)
    reaches(home, job_id, "queued")
    shown = succeeds(home, "pool", "show")
    succeeds(home, "jobs", "priority", job_id, "5", "--tier", "interactive")
    succeeds(home, "jobs", "hold", job_id)
    assert succeeds(home, "pool", "release") == "default released"
    succeeds(home, "jobs", "release", job_id)
    reaches(home, job_id, "succeeded")

    assert "pool default (held)" in shown
    assert f"1         {job_id}" in shown
    assert "HELD" in shown
    worker = json.loads(succeeds(home, "--json", "workers", "list"))
    worker_id = worker["id"]
    device_id = json.loads(succeeds(home, "--json", "devices", "list"))["id"]
    known = json.loads(succeeds(home, "--json", "workers", "show", worker_id))
    assert [device["id"] for device in known["devices"]] == [device_id]
    assert device_id in succeeds(home, "workers", "show", worker["host"])
    assert succeeds(home, "workers", "drain", worker_id) == f"{worker_id} draining"
    assert succeeds(home, "workers", "undrain", worker_id) == f"{worker_id} takes work"
    assert succeeds(home, "devices", "quarantine", device_id, "--reason", "fan") == f"{device_id} quarantined"
    assert succeeds(home, "devices", "release", device_id) == f"{device_id} released"
    acts = [json.loads(line)["action"] for line in succeeds(home, "--json", "audit").splitlines()]
    # The other tests of this stack left acts of their own, below these.
    assert acts[: len(acts) - acts_before] == [
        "device.release", "device.quarantine", "worker.undrain", "worker.drain",
        "job.release", "pool.release", "job.hold", "job.priority", "pool.hold",
    ]  # fmt: skip
    used = [json.loads(line) for line in succeeds(home, "--json", "usage", "--group-by", "model").splitlines()]
    assert [row["model"] for row in used] == [MODEL]
    assert succeeds(home, "usage", "--csv").splitlines()[0] == "project,device_seconds,attempts,jobs"


def test_a_pipeline_meets_whole_ids_plain_lines_and_exit_codes_of_their_own(home: Path, tmp_path: Path) -> None:
    data, group = str(rows(tmp_path, "steps=2000 step_seconds=0.05 ")), "queue.group=branch"
    older = succeeds(home, "submit", data, "--model", MODEL, "--set", group)
    reaches(home, older, "running")
    late = tunepool(home, "watch", older, "--timeout", "1", COLUMNS="40")
    newer = tunepool(
        home, "submit", data, "--model", MODEL, "--set", group, "--set", "queue.supersede=running", "--wait",
        "--timeout", "1", COLUMNS="40",
    )  # fmt: skip
    newer_id = newer.stdout.strip()
    reaches(home, older, "cancelled")
    superseded = tunepool(home, "watch", older)
    listed = succeeds(home, "jobs", "list", "--status", "cancelled", "--all").splitlines()
    succeeds(home, "jobs", "cancel", newer_id)

    assert (late.returncode, newer.returncode, superseded.returncode) == (5, 5, 6)
    assert f"it goes on: tunepool watch {older}" in late.stderr
    assert f"superseded by {newer_id}" in superseded.stdout
    assert older in [line.split()[0] for line in listed]
    names = [json.loads(line)["filename"] for line in succeeds(home, "--json", "files", "list").splitlines()]
    assert names.count(Path(data).name) == 1  # the second submit took the file of the first


def test_what_is_wrong_is_told_before_an_upload_and_as_json_where_asked(home: Path, tmp_path: Path) -> None:
    data = tmp_path / "never-uploaded.jsonl"
    data.write_text("".join(json.dumps({"text": f"row {number}"}) + "\n" for number in range(12)))

    refused = tunepool(home, "--json", "submit", str(data), "--model", "gpt-nothing")
    unlike = tunepool(home, "submit", str(data), "--model", MODEL, "--method", "dpo", "--wait")

    assert refused.returncode == 4
    assert json.loads(refused.stdout)["error"]["code"] == "model_not_found"
    assert unlike.returncode == 1  # the rows are no preferences: the server knew the method
    assert "dpo" in unlike.stdout + unlike.stderr
    assert succeeds(home, "--version").startswith("tunepool ")
    uploaded = [json.loads(line)["filename"] for line in succeeds(home, "--json", "files", "list").splitlines()]
    assert uploaded.count(data.name) == 1


def test_projects_and_keys_are_managed_from_the_command_line(home: Path) -> None:
    project_id = succeeds(home, "projects", "create", "vision", "weight=2")
    assert succeeds(home, "projects", "set", project_id, "budget_gpu_hours=5") == "budget_gpu_hours=5.0"
    secret = succeeds(home, "keys", "create", project_id, "ci", "--scope", "jobs:read", "--set", "max_tier=normal")
    key = next(
        one
        for line in succeeds(home, "--json", "keys", "list", "--project", project_id).splitlines()
        if (one := json.loads(line))
    )
    base_url = json.loads((home / "credentials.json").read_text())["base_url"]
    as_ci = {"OPENAI_BASE_URL": base_url, "OPENAI_API_KEY": secret}

    assert "vision" in succeeds(home, "projects", "list")
    assert (key["scopes"], key["max_tier"]) == (["jobs:read"], "normal")
    assert run_here(home, "jobs", "list", **as_ci).returncode == 0
    assert run_here(home, "pool", "hold", **as_ci).returncode == 4
    assert succeeds(home, "keys", "revoke", key["id"]) == f"{key['id']} revoked"
    assert run_here(home, "jobs", "list", **as_ci).returncode == 4


def test_base_models_are_added_and_removed_from_the_command_line(home: Path, tmp_path: Path) -> None:
    make_model(tmp_path / "house-model")
    lost = tunepool(home, "models", "add", str(tmp_path / "nowhere"), "--wait")
    added = succeeds(home, "models", "add", str(tmp_path / "house-model"), "--alias", "gpt-house", "--wait")
    job_id = succeeds(home, "submit", str(rows(tmp_path, "steps=3")), "--model", "gpt-house")
    reaches(home, job_id, "succeeded")

    assert (lost.returncode, lost.stdout.splitlines()[0]) == (1, "nowhere error")
    assert "There is no folder" in lost.stdout
    assert added == "house-model ready"
    shown = succeeds(home, "models", "show", "gpt-house")
    assert "state: ready" in shown
    assert "architecture: LlamaForCausalLM" in shown
    listed = {
        row["id"]: row for line in succeeds(home, "--json", "models", "list").splitlines() if (row := json.loads(line))
    }
    assert (listed["house-model"]["origin"], listed[MODEL]["origin"]) == ("added", "models.toml")
    make_model(tmp_path / "nowhere")
    assert succeeds(home, "models", "check", "nowhere", "--wait") == "nowhere ready"
    assert succeeds(home, "models", "remove", "nowhere") == "nowhere removed"
    assert run_here(home, "models", "remove", MODEL).returncode == 4


def test_many_waiting_jobs_are_cancelled_with_one_command(home: Path, tmp_path: Path) -> None:
    succeeds(home, "pool", "hold")
    for _ in range(3):
        job_id = succeeds(home, "submit", str(rows(tmp_path, "steps=3")), "--model", MODEL)

    assert run_here(home, "jobs", "cancel").returncode == 2
    assert succeeds(home, "jobs", "cancel", "--all") == "3 cancelled, 0 being stopped"
    succeeds(home, "pool", "release")
    reaches(home, job_id, "cancelled")


def test_a_watch_follows_a_job_to_its_end(home: Path, tmp_path: Path) -> None:
    job_id = succeeds(home, "submit", str(rows(tmp_path, "steps=8")), "--model", MODEL)

    assert succeeds(home, "watch", job_id).startswith(f"ft:{MODEL}:")
    assert job_id in succeeds(home, "jobs", "list")


def test_files_are_uploaded_listed_and_deleted(home: Path, tmp_path: Path) -> None:
    file_id = succeeds(home, "files", "upload", str(rows(tmp_path, "")))

    assert file_id in succeeds(home, "files", "list")
    assert succeeds(home, "files", "delete", file_id) == file_id
    assert file_id not in succeeds(home, "files", "list")


def test_what_the_server_refuses_exits_4_and_names_the_field(home: Path, tmp_path: Path) -> None:
    done = tunepool(home, "submit", str(rows(tmp_path, "")), "--model", MODEL, "--set", "adapter.rank=8")

    assert done.returncode == 4
    assert "tunepool.adapter.rank" in done.stderr


def test_a_wrong_command_line_exits_2(home: Path) -> None:
    assert tunepool(home, "submit", "nowhere.jsonl", "--model", MODEL).returncode == 2
    assert tunepool(home, "submit").returncode == 2
    assert tunepool(home, "jobs", "explode").returncode == 2


def test_no_known_server_exits_2_and_says_what_to_set(tmp_path: Path) -> None:
    done = tunepool(tmp_path, "jobs", "list")

    assert done.returncode == 2
    assert "OPENAI_BASE_URL" in done.stderr


def test_a_server_that_is_away_exits_3(tmp_path: Path) -> None:
    base_url = f"http://127.0.0.1:{free_port()}/v1"
    done = tunepool(tmp_path, "jobs", "list", OPENAI_BASE_URL=base_url, OPENAI_API_KEY="k")

    assert done.returncode == 3
    assert "No server answers" in done.stderr


def test_a_wrong_key_exits_4_and_is_not_printed(home: Path) -> None:
    base_url = json.loads((home / "credentials.json").read_text())["base_url"]
    done = tunepool(home, "jobs", "list", OPENAI_BASE_URL=base_url, OPENAI_API_KEY="sk-not-this-one")

    assert done.returncode == 4
    assert "sk-not-this-one" not in done.stdout + done.stderr


def reaches(home: Path, job_id: str, status: str) -> None:
    deadline = time.monotonic() + patience(60)
    while (found := json.loads(succeeds(home, "--json", "jobs", "show", job_id))["status"]) != status:
        assert time.monotonic() < deadline, f"{job_id} is {found}, not {status}"
        time.sleep(0.2)
