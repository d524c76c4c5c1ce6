"""Clients that others wrote, unmodified, through a whole flow against a real server: upload, train, ask what came out.

They are no part of our environment. `make clients` installs them into .clients, at fixed versions; without that these
tests are skipped.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from openai import OpenAI
from tunepool.connection import read_credentials

from tests.e2e.test_cli import MODEL, ROOT, free_port, wait_until_it_answers
from tests.lifecycle.stack import QUICK, make_model
from tests.patience import patience

TOOLS = Path(sys.executable).parent
CLIENTS = ROOT / ".clients"
FLOWS = ROOT / "tests" / "other_clients"
NODE = CLIENTS / "node" / "node_modules"
PYTHON = CLIENTS / "python" / "bin" / "python"


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, str]]:
    """A server that trains and answers with programs that load no weights: the environment of its clients."""
    home = tmp_path_factory.mktemp("clients")
    make_model(home / "model")
    (home / "models.toml").write_text(f'[models.{MODEL}]\nsource = "path"\npath = "{home / "model"}"\n')
    settings = {"TUNEPOOL_MODELS_FILE": str(home / "models.toml"), "TUNEPOOL_PLAYGROUND": "tests.fake_playground"}
    with (home / "server.log").open("wb") as log:
        process = subprocess.Popen(
            [TOOLS / "tunepool-server", "up", "--home", home, "--port", str(free_port())],
            cwd=ROOT,
            env={**os.environ, **QUICK, **settings},
            stdout=log,
            stderr=log,
            start_new_session=True,
        )
    try:
        wait_until_it_answers(home, process)
        known = read_credentials(home)
        yield {
            "OPENAI_BASE_URL": known.base_url,
            "OPENAI_API_KEY": known.api_key,
            "PATH": os.environ["PATH"],
            "HOME": str(home),
        }
    finally:
        process.send_signal(signal.SIGINT)
        process.wait(patience(60))


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory) -> Path:
    messages = [{"role": "user", "content": "one"}, {"role": "assistant", "content": "two"}]
    file = tmp_path_factory.mktemp("rows") / "train.jsonl"
    file.write_text("".join(json.dumps({"messages": messages}) + "\n" for _ in range(12)))
    return file


def in_python(module: str) -> list[str]:
    if not any((CLIENTS / "python").glob(f"lib/*/site-packages/{module}")):
        pytest.skip(f"{module} is not installed beside us; `make clients` brings it")
    return [str(PYTHON)]


def flow(server: dict[str, str], *argv: str | Path) -> Any:
    """What a client says that it saw."""
    done = subprocess.run(
        argv, env=server, cwd=server["HOME"], capture_output=True, text=True, timeout=patience(240), check=False
    )
    assert done.returncode == 0, done.stderr[-4000:] + done.stdout[-2000:]
    return json.loads(done.stdout.splitlines()[-1])


def test_the_official_client_for_node_goes_the_whole_way(server: dict[str, str], rows: Path) -> None:
    node = shutil.which("node")
    if node is None or not (NODE / "openai").is_dir():
        pytest.skip("Node or OpenAI's client for it is not there; `make clients` brings the client")

    seen = flow({**server, "NODE_PATH": str(NODE)}, node, FLOWS / "flow.cjs", rows, MODEL)

    assert (seen["status"], seen["error"]) == ("succeeded", None)
    assert seen["created"] == ["fine_tuning.job", "validating_files", "abc"]
    assert (seen["unnamed"], seen["sameBytes"]) == ("processed", True), "what is in memory has no name"
    assert seen["files"] == 2
    assert ":from-node:" in seen["tuned"]
    assert (seen["withNullMetadata"], seen["withMetadata"]) == ([], [seen["job"]])
    assert seen["events"] == ["message", "metrics"]
    assert seen["checkpoints"][0].startswith(f"{seen['tuned']}:ckpt-step-")
    assert seen["results"].startswith("step,train_loss")
    assert {MODEL, seen["tuned"]} <= set(seen["models"])
    content, reason, tokens = seen["answer"]
    assert [word.rpartition(":")[2] for word in content.split()] == ["one", "two", "three"]
    assert (reason, tokens, seen["streamed"]) == ("stop", 3, content)
    assert seen["refusals"] == [
        [True, 400, "file_not_found", True],
        [True, 404, "not_found", True],
        [True, 401, "invalid_api_key", True],
    ]
    assert (seen["deleted"], seen["fileDeleted"]) == (True, [True, True])


def test_litellm_goes_the_whole_way(server: dict[str, str], rows: Path) -> None:
    seen = flow(server, *in_python("litellm"), FLOWS / "litellm_flow.py", rows, MODEL)

    assert (seen["status"], seen["same_bytes"], seen["listed"], seen["jobs"]) == ("succeeded", True, True, True)
    assert (seen["cancelled"], seen["refused"], seen["deleted"]) == (True, 404, True)
    content, reason, tokens = seen["answer"]
    assert [word.rpartition(":")[2] for word in content.split()] == ["one", "two"]
    assert (reason, tokens, seen["streamed"], seen["async"]) == ("stop", 2, content, content)


def test_dspy_trains_and_asks_what_it_trained(server: dict[str, str], rows: Path) -> None:
    seen = flow(server, *in_python("dspy"), FLOWS / "dspy_flow.py", rows, MODEL)

    assert f"ft:{MODEL}:" in seen["model"]
    assert [word.rpartition(":")[2] for word in seen["tuned"][0].split()] == ["one", "two"]
    assert seen["base"] != seen["tuned"], "the adapter answers, and not its base"


def test_instructor_uploads_and_creates_a_job_from_its_command_line(server: dict[str, str], rows: Path) -> None:
    (python,) = in_python("instructor")
    words = ("jobs", "create-from-file", rows, "--model", MODEL, "--n-epochs", "1", "--poll", "1")
    with OpenAI(base_url=server["OPENAI_BASE_URL"], api_key=server["OPENAI_API_KEY"]) as client:
        before = {job.id for job in client.fine_tuning.jobs.list()}

        # It shows the table of jobs until it is told to end.
        process = subprocess.Popen([Path(python).parent / "instructor", *words], env=server, cwd=server["HOME"])
        try:
            deadline = time.monotonic() + patience(120)
            while not (made := [job for job in client.fine_tuning.jobs.list() if job.id not in before]) or (
                made[0].status not in ("succeeded", "failed")
            ):
                assert process.poll() is None
                assert time.monotonic() < deadline
                time.sleep(0.2)
        finally:
            process.kill()
            process.wait()

    assert [job.status for job in made] == ["succeeded"]
