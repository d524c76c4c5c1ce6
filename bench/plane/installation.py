"""A real installation to measure: `tunepool-server up` with default settings, real fsync, and a fake trainer."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import psutil
import psycopg
from tunepool.connection import read_credentials

from bench.plane.load import Answer, Client, Request, Target
from shared.settings import child_environment
from standalone.postgres import running_url
from standalone.sockets import noted_socket_dir
from standalone.up import WORKER, module
from tests.lifecycle.stack import make_model

SERVER = Path(sys.executable).parent / "tunepool-server"
START_SECONDS = 120.0
JOBS = "/v1/fine_tuning/jobs"


@dataclass
class Installation:
    """One `up` that answers."""

    home: Path
    process: subprocess.Popen[bytes]
    key: str
    address: tuple[str, int]

    @property
    def target(self) -> Target:
        return Target(self.address, self.key)

    def ask(self, request: Request) -> Any:
        """The JSON of an answer that must be good."""
        client = Client(self.target)
        answer = client.send(request)
        client.close()
        return good(answer)

    def database(self) -> psycopg.Connection[Any]:
        url = running_url(self.home / "postgres")
        assert url is not None
        return psycopg.connect(url.replace("+psycopg", ""), autocommit=True)

    def checked(self) -> None:
        """Say of every file that its check is done: nobody checks here while no worker runs."""
        with self.database() as database:
            database.execute("update files set status = 'processed'")

    @property
    def redis_url(self) -> str:
        """As Celery spells it."""
        folder = noted_socket_dir(self.home / "valkey" / "socket-location")
        assert folder is not None
        return f"redis+socket://{folder / 's'}"

    def child(self, sign: str) -> psutil.Process:
        """The process of `up` whose command line holds `sign`."""
        return next(child for child in psutil.Process(self.process.pid).children() if sign in " ".join(child.cmdline()))

    def upload(self, behaviour: str = "") -> str:
        """A training file that tells the fake trainer how to behave."""
        rows = [{"text": f"fake: {behaviour}"}, *({"text": f"row {number}"} for number in range(11))]
        content = "\n".join(json.dumps(row) for row in rows)
        mark = "a-mark-that-no-row-holds"
        form = (
            f'--{mark}\r\nContent-Disposition: form-data; name="purpose"\r\n\r\nfine-tune\r\n'
            f'--{mark}\r\nContent-Disposition: form-data; name="file"; filename="rows.jsonl"\r\n\r\n{content}\r\n'
            f"--{mark}--\r\n"
        )
        headers = {"Content-Type": f"multipart/form-data; boundary={mark}"}
        return str(self.ask(Request("POST", "/v1/files", form.encode(), headers))["id"])

    def submit(self, file_id: str, **fields: Any) -> str:
        return str(self.ask(Request("POST", JOBS, job_body(file_id, **fields)))["id"])

    def job(self, job_id: str) -> Any:
        return self.ask(Request("GET", f"{JOBS}/{job_id}"))

    def wait(self, job_id: str, status: str, *, seconds: float = 60.0) -> float:
        """Seconds until the job has this status."""
        begun = time.perf_counter()
        while (found := self.job(job_id)["status"]) != status:
            if time.perf_counter() - begun > seconds:
                raise TimeoutError(f"{job_id} is {found}, not {status}, after {seconds} s")
            time.sleep(0.02)
        return time.perf_counter() - begun


def job_body(file_id: str, **fields: Any) -> bytes:
    """A submission as a CI pipeline sends it."""
    return json.dumps(
        {
            "model": "tiny",
            "training_file": file_id,
            "suffix": "nightly",
            "metadata": {"git_sha": "9f2c1e7", "branch": "main"},
            "method": {"type": "supervised", "supervised": {"hyperparameters": {"n_epochs": 1}}},
            "tunepool": {"adapter": {"method": "lora", "r": 8}},
            **fields,
        }
    ).encode()


def good(answer: Answer) -> Any:
    if answer.status >= 400:
        raise RuntimeError(f"{answer.status}: {answer.body.decode()[:500]}")
    return json.loads(answer.body)


@contextmanager
def installation(home: Path, *, worker: bool, **settings: str) -> Iterator[Installation]:
    """`up` in `home` until the block ends."""
    home.mkdir(parents=True, exist_ok=True)
    home.chmod(0o711)
    make_model(home / "model")
    (home / "models.toml").write_text(f'[models.tiny]\nsource = "path"\npath = "{home / "model"}"\n')
    environment = child_environment(
        TUNEPOOL_TRAINER="tests.fake_trainer",
        TUNEPOOL_MODELS_FILE=str(home / "models.toml"),
        TUNEPOOL_CPU_PROBE="false",  # nothing trains here; it would take seconds of the first measurement
        **settings,
    )
    argv = [SERVER, "up", "--home", home, "--port", "0", *([] if worker else ["--no-worker"])]
    with (home / "up.log").open("wb") as log:
        process = subprocess.Popen(argv, env=environment, stdout=log, stderr=log, start_new_session=True)
    try:
        _wait(process, home)
        known = read_credentials(home)
        url = urlsplit(known.base_url)
        assert url.hostname is not None
        assert url.port is not None
        yield Installation(home, process, known.api_key, (url.hostname, url.port))
    finally:
        process.send_signal(signal.SIGINT)
        process.wait(90)


def _wait(process: subprocess.Popen[bytes], home: Path) -> None:
    deadline = time.monotonic() + START_SECONDS
    while "ready" not in (said := (home / "up.log").read_text()):
        if process.poll() is not None or time.monotonic() > deadline:
            raise RuntimeError(f"`up` did not start: {said[-2000:]}")
        time.sleep(0.05)


@contextmanager
def worker_process(one: Installation) -> Iterator[psutil.Process]:
    """A worker of this installation, as on a host of its own: nobody starts it again when it dies."""
    url = running_url(one.home / "postgres")
    assert url is not None
    environment = child_environment(
        DATABASE_URL=url,
        REDIS_URL=one.redis_url,
        STORAGE_URL=f"file://{one.home / 'storage'}",
        TUNEPOOL_HOME=str(one.home / "worker"),
        TUNEPOOL_TRAINER="tests.fake_trainer",
        TUNEPOOL_MODELS_FILE=str(one.home / "models.toml"),
        TUNEPOOL_MIN_TRAINING_ROWS="1",
    )
    (one.home / "worker").mkdir(exist_ok=True)
    with (one.home / "worker.log").open("ab") as log:
        process = subprocess.Popen(
            module(*WORKER), env=environment, cwd=one.home, stdout=log, stderr=log, start_new_session=True
        )
    try:
        _wait_for_devices(one)
        yield psutil.Process(process.pid)
    finally:
        process.send_signal(signal.SIGTERM)
        process.wait(120)


def _wait_for_devices(one: Installation) -> None:
    deadline = time.monotonic() + START_SECONDS
    while not one.ask(Request("GET", "/v1/tunepool/pool"))["devices"]:
        if time.monotonic() > deadline:
            raise RuntimeError(f"the worker registered no device: {(one.home / 'worker.log').read_text()[-2000:]}")
        time.sleep(0.1)
