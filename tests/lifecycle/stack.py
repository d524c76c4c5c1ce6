"""A whole stack for lifecycle tests: real Postgres, Valkey, store, worker and janitor; only the trainer is a fake."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import signal
import subprocess
import sys
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil
import psycopg
import redis
from sqlalchemy import Engine, select
from sqlalchemy.orm import Session

from shared.chores import base_models
from shared.contract.job_request import CreateJob
from shared.ids import new_id
from shared.jobs import moves, parents, submission
from shared.products import adapters
from shared.settings import Settings, child_environment
from shared.store import layout
from shared.store.bell import ring
from shared.store.db import make_engine, session_scope
from shared.store.storage import Store, open_store
from shared.store.tables import AttemptRow, DeviceRow, EventRow, FileRow, JobRow
from shared.tenants.keys import Caller
from standalone.postgres import EmbeddedPostgres
from standalone.valkey import EmbeddedValkey
from tests import invariants, living
from tests.factories import make_caller
from tests.forked import line_for
from tests.patience import lease, paced, patience

ROOT = Path(__file__).parents[2]

# Every wait of the product, hours made seconds, so that no test sleeps for a real lease.
QUICK = {
    "TUNEPOOL_HEARTBEAT_SECONDS": "0.5",
    "TUNEPOOL_CONTROL_SECONDS": "0.2",
    "TUNEPOOL_LEASE_SECONDS": lease(3),
    "TUNEPOOL_REAP_SECONDS": lease(0.3),
    "TUNEPOOL_GRACE_SECONDS": lease(0.5),
    # After so long without a bell a process is started instead of it: on a busy machine most bells are only late.
    "TUNEPOOL_SWEEP_SECONDS": lease(1),
    "TUNEPOOL_STOP_SECONDS": lease(3),
    "TUNEPOOL_STALL_FLOOR_SECONDS": lease(60),
    "TUNEPOOL_DEAF_SECONDS": lease(30),
    "TUNEPOOL_BACKOFF_BASE_SECONDS": "0.2",
    "TUNEPOOL_BACKOFF_CAP_SECONDS": "0.5",
    "TUNEPOOL_TRAINER": "tests.fake_trainer",
    "TUNEPOOL_COTRAINER": "tests.fake_cotrainer",
    "TUNEPOOL_DESCRIBER": "",  # it loads PyTorch
    "TUNEPOOL_GANG_LAUNCHER": "tests.fake_trainer",
    "TUNEPOOL_MIN_TRAINING_ROWS": "1",
    "TUNEPOOL_CPU_MEMORY_BYTES": str(8 * 2**30),
    "TUNEPOOL_CPU_THREADS": "1",
    "TUNEPOOL_DEVICES": "cpu",  # also where there are GPUs: the plans of these tests are for processors
}


class TooSlow(AssertionError):
    """Something that was to happen did not in its time."""


def until(holds: Callable[[], Any], *, seconds: float = 30.0, what: str = "", brief: bool = False) -> Any:
    """The first true answer of `holds`, asked again and again; `seconds` are those of a fast machine.

    What is long in coming is asked for less often: most answers cost a transaction or a look at every process.
    `brief`: it will not stay true.
    """
    deadline = time.monotonic() + patience(seconds)
    pause, longest = 0.01, 0.02 if brief else 0.1
    while not (found := holds()):
        if time.monotonic() > deadline:
            raise TooSlow(f"not within {patience(seconds):.0f} s: {what or holds}")
        time.sleep(pause)
        pause = min(1.2 * pause, longest)
    return found


def chain_of(steps: int) -> str:
    """What a run of `steps` that skipped and repeated none ends with."""
    chain = ""
    for step in range(1, steps + 1):
        chain = hashlib.sha256(f"{chain}{step}".encode()).hexdigest()
    return chain


@dataclass
class Servers:
    """Postgres and Valkey that several stacks share; each stack has a database of its own."""

    postgres: EmbeddedPostgres
    valkey: EmbeddedValkey
    template: str  # a migrated database to copy


@dataclass
class Stack:
    """One installation under `home`."""

    home: Path
    servers: Servers
    environment: dict[str, str]
    settings: Settings
    engine: Engine
    store: Store
    caller: Caller
    processes: list[subprocess.Popen[bytes]] = field(default_factory=list)

    # --- processes --------------------------------------------------------------------------------------------------

    def start_worker(self, *, home: str = "home", **environment: str) -> subprocess.Popen[bytes]:
        place = {"TUNEPOOL_HOME": str(self.home / home), "TUNEPOOL_MODELS_FILE": str(self.home / "models.toml")}
        argv = ["-m", "celery", "-A", "worker.app", "worker", "--loglevel=INFO", "--without-gossip", "--without-mingle"]
        return self.start(argv, name=f"worker-{home}", **(place | environment))

    def start_janitor(self, **environment: str) -> subprocess.Popen[bytes]:
        return self.start(["-m", "worker.janitor"], name="janitor", **environment)

    def start(self, arguments: list[str], *, name: str, **environment: str) -> subprocess.Popen[bytes]:
        values = self.environment | environment
        everything = child_environment(**values)
        with (self.home / f"{name}.log").open("ab") as log:
            if line := line_for(arguments, values):
                process: subprocess.Popen[bytes] = line.start(arguments, environment=everything, log=log.fileno())
            else:
                process = subprocess.Popen(
                    [sys.executable, *arguments],
                    cwd=ROOT,
                    env=everything,
                    stdin=subprocess.DEVNULL,
                    stdout=log,
                    stderr=log,
                )
        self.processes.append(process)
        return process

    def wait_for_worker(self, *, devices: int = 1) -> None:
        def ready() -> bool:
            with session_scope(self.engine) as session:
                return len(session.scalars(select(DeviceRow)).all()) >= devices

        until(ready, what="a registered device")

    def stop(self) -> None:
        for process in self.processes:
            with contextlib.suppress(ProcessLookupError):
                process.send_signal(signal.SIGCONT)
                process.kill()
        for process in self.processes:
            process.wait(patience(20))
        self.engine.dispose()

    def trainers(self) -> list[psutil.Process]:
        """Processes that carry our tag for this home."""
        return living.tagged(str(self.home))

    def survivors(self) -> list[psutil.Process]:
        """Trainers that live on after their worker; the kernel ends them one after another, so it is waited for."""
        return living.await_end(self.trainers())

    # --- jobs -------------------------------------------------------------------------------------------------------

    def upload(self, content: bytes) -> str:
        """A file as the API leaves it: bytes in the store, row says uploaded."""
        file_id = new_id("file-")
        key = layout.file_key(self.caller.project_id, file_id)
        self.store.put_bytes(key, content)
        with session_scope(self.engine) as session:
            session.add(
                FileRow(
                    id=file_id,
                    project_id=self.caller.project_id,
                    filename="rows.jsonl",
                    purpose="fine-tune",
                    bytes=len(content),
                    sha256=hashlib.sha256(content).hexdigest(),
                    key=key,
                    status="uploaded",
                )
            )
        return file_id

    def submit(self, behaviour: str = "", *, rows: int = 12, model: str = "tiny", **tunepool: Any) -> str:
        """A job whose fake trainer behaves as told, at the pace of this machine."""
        lines = [
            json.dumps({"text": f"fake: {paced(behaviour)}"}),
            *(json.dumps({"text": f"row {i}"}) for i in range(rows - 1)),
        ]
        return self.submit_file(self.upload("\n".join(lines).encode()), model=model, **tunepool)

    def submit_file(self, file_id: str, *, model: str = "tiny", seed: int | None = None, **tunepool: Any) -> str:
        body = {"model": model, "training_file": file_id, **({"tunepool": tunepool} if tunepool else {})}
        if seed is not None:
            body["seed"] = seed
        request = CreateJob.model_validate(body)
        with session_scope(self.engine) as session:
            tuned = adapters.is_tuned(model)
            parent = parents.find(session, model, project_id=self.caller.project_id) if tuned else None
            base_model = parent.spec.base_model.name if parent else model
            job_id = submission.submit(
                session,
                request,
                caller=self.caller,
                base=base_models.offered(session, self.settings).find(base_model),
                parent=parent,
                request_sha256=hashlib.sha256(json.dumps(body).encode()).hexdigest(),
            ).job.id
        ring("cpu", self.settings)
        return job_id

    def cancel(self, job_id: str) -> JobRow:
        with session_scope(self.engine) as session:
            return moves.request_cancel(session, job_id, project_id=self.caller.project_id)

    def job(self, job_id: str) -> JobRow:
        with Session(self.engine) as session:
            return session.get_one(JobRow, job_id)

    def attempts(self, job_id: str) -> list[AttemptRow]:
        with Session(self.engine) as session:
            return list(
                session.scalars(select(AttemptRow).where(AttemptRow.job_id == job_id).order_by(AttemptRow.number))
            )

    def events(self, job_id: str) -> list[EventRow]:
        with Session(self.engine) as session:
            return list(session.scalars(select(EventRow).where(EventRow.job_id == job_id).order_by(EventRow.seq)))

    def wait(self, job_id: str, *statuses: str, seconds: float = 30.0) -> JobRow:
        """The job once it has one of `statuses` (default: any final one)."""
        wanted = statuses or ("succeeded", "failed", "cancelled")
        try:
            return until(lambda: (job := self.job(job_id)).status in wanted and job, seconds=seconds)
        except TooSlow as slow:
            told = [event.message for event in self.events(job_id)][-5:]
            raise TooSlow(
                f"{job_id} is {self.job(job_id).status}, not {wanted}, after {patience(seconds):.0f} s; events: {told}"
            ) from slow

    def wait_for_step(self, job_id: str, step: int, *, seconds: float = 30.0) -> None:
        until(lambda: (self.job(job_id).progress or {}).get("step", 0) >= step, seconds=seconds, what=f"step {step}")

    def wait_for_checkpoint(self, job_id: str, step: int, *, seconds: float = 30.0) -> None:
        """Until a checkpoint of `step` or later is in the store: from there a further attempt goes on."""
        kept = lambda: (self.job(job_id).last_checkpoint or {}).get("step", 0)  # noqa: E731
        until(lambda: kept() >= step, seconds=seconds, what=f"the checkpoint of step {step}")

    def let_go_on(self, job_id: str) -> None:
        """The fake trainer that holds at a step (`hold=`) goes on."""
        for out in self.home.glob(f"*/work/{job_id}/*/out"):
            (out / "go").touch()

    def chain(self, manifest: dict[str, Any]) -> str:
        """The end of the hash chain that the fake trainer's adapter carries."""
        return str(json.loads(self.read(f"{manifest['prefix']}/chain.json"))["chain"])

    def read(self, key: str) -> bytes:
        return b"".join(self.store.chunks(key))

    # --- the oracle -------------------------------------------------------------------------------------------------

    def broken_invariants(self) -> list[str]:
        """What does not hold now of I1-I10 (tests/invariants.py). Call it when nothing moves."""
        with Session(self.engine) as session:
            broken = invariants.broken(session)
            for job in session.scalars(select(JobRow).where(JobRow.status == "succeeded")):
                broken += [
                    f"I5 {job.id} {file['name']}"
                    for file in job.manifest["files"]
                    if not self._intact(job.manifest, file)
                ]
        return broken

    def _intact(self, manifest: dict[str, Any], file: dict[str, Any]) -> bool:
        content = self.read(f"{manifest['prefix']}/{file['name']}")
        return hashlib.sha256(content).hexdigest() == file["sha256"] and len(content) == file["bytes"]


def make_stack(home: Path, servers: Servers, **environment: str) -> Stack:
    """A fresh database, an empty store, one organization with one project; a base model of two files."""
    name = f"s{uuid.uuid4().hex[:12]}"
    with psycopg.connect(f"host={servers.postgres.socket_dir} user=postgres dbname=postgres", autocommit=True) as admin:
        admin.execute(f"create database {name} template {servers.template}")
    home.mkdir(parents=True, exist_ok=True)
    make_model(home / "tiny")
    (home / "models.toml").write_text(f'[models.tiny]\nsource = "path"\npath = "{home / "tiny"}"\n')
    values = {
        **QUICK,
        "DATABASE_URL": servers.postgres.url(name),
        "REDIS_URL": servers.valkey.url,
        "STORAGE_URL": f"file://{home / 'store'}",
        "TUNEPOOL_HOME": str(home / "home"),
        "TUNEPOOL_MODELS_FILE": str(home / "models.toml"),
        "TUNEPOOL_POOL": name,
        **environment,
    }
    settings = read_settings(values)
    engine = make_engine(settings.database_url)
    with session_scope(engine) as session:
        caller = make_caller(session, name="acme")
    return Stack(home, servers, values, settings, engine, open_store(settings), caller)


@contextlib.contextmanager
def open_stack(home: Path, servers: Servers, **environment: str) -> Iterator[Stack]:
    """A stack whose processes and connections end with the block, however it ends."""
    made = make_stack(home, servers, **environment)
    try:
        yield made
    finally:
        made.stop()


_ENVIRONMENT = threading.Lock()  # the environment is the process's, and some tests make several stacks at once


def read_settings(values: dict[str, str]) -> Settings:
    with _ENVIRONMENT:
        before = dict(os.environ)
        os.environ.update(values)
        try:
            return Settings()
        finally:
            os.environ.clear()
            os.environ.update(before)


def make_model(folder: Path) -> None:
    folder.mkdir(parents=True)
    config = {
        "architectures": ["LlamaForCausalLM"],
        "hidden_size": 64,
        "num_attention_heads": 4,
        "num_hidden_layers": 2,
        "intermediate_size": 128,
        "vocab_size": 512,
        "max_position_embeddings": 512,
        "tie_word_embeddings": False,
    }
    (folder / "config.json").write_text(json.dumps(config))
    size = 147_456  # as many numbers as this config has parameters
    header = json.dumps({"w": {"dtype": "U8", "shape": [size], "data_offsets": [0, size]}}).encode()
    (folder / "model.safetensors").write_bytes(len(header).to_bytes(8, "little") + header + bytes(size))


def forget_everything(stack: Stack) -> None:
    """FLUSHALL: what Redis knew is gone."""
    with redis.Redis.from_url(stack.servers.valkey.client_url) as client:
        client.flushall()
