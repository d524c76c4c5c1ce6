"""The control plane's figures on this machine, through the real API, with fsync: `python bench/control_plane.py`.

    --only submit,poll      some parts; all of them: submit poll list streams bulk start cancel idle lost peers
    --jobs 100000           rows for `list` (default 1,000,000, which take a few minutes to make)
    --api-processes 2       uvicorn processes of the API
    --procrastinate PYTHON  an interpreter that has procrastinate, for `peers`; without it that peer is left out:
                            python3 -m venv P && P/bin/pip install procrastinate "psycopg[binary,pool]" fastapi uvicorn

`peers` takes the same submissions, from the same clients in the same run, through a door of the same make before bare
Celery + Redis and before a Postgres-native queue: no keys, no checks, no idempotency, no events, no explained place.
Short (under three minutes): --jobs 50000 --seconds 3 --only submit,poll,list,streams,bulk,start,cancel,peers
"""

from __future__ import annotations

import argparse
import hashlib
import itertools
import os
import platform
import random
import selectors
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import psutil
import psycopg

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from bench.plane.installation import JOBS, Installation, installation, job_body, worker_process
from bench.plane.load import Client, Request, Seen, as_fast_as_they_can, at_rate

CLIENTS = 16
DOOR = Path(__file__).parent / "plane" / "door.py"


@dataclass
class Run:
    """What the parts share."""

    one: Installation
    options: argparse.Namespace
    file_id: str
    rng: random.Random = field(default_factory=lambda: random.Random(1))
    submissions: Seen | None = None

    def clients(self) -> list[Client]:
        return self.one.clients(CLIENTS)


def tell(what: str, value: float, unit: str, *, aim: float | None = None, at_least: bool = False) -> None:
    """One figure, beside its aim."""
    verdict = ""
    if aim is not None:
        met = value >= aim if at_least else value <= aim
        verdict = f"   aim {'>=' if at_least else '<='} {aim:g}   {'met' if met else 'MISSED'}"
    print(f"  {what:<58} {value:>9.4g} {unit:<6}{verdict}", flush=True)


def quantiles(what: str, seen: Seen, *, p99_ms: float) -> None:
    tell(f"{what}, p50", seen.quantile(0.50) * 1000, "ms")
    tell(f"{what}, p99", seen.quantile(0.99) * 1000, "ms", aim=p99_ms)
    if seen.failures:
        tell(f"{what}, failures", seen.failures, "", aim=0)


# --- submissions and polls -------------------------------------------------------------------------------------------


def submit(run: Run) -> None:
    """Submissions, each a commit with its events; the ring goes to a real Valkey."""
    # Every body is another, as those of pipelines are: equal ones of one key take turns, for a retry to find its first.
    shas = itertools.count()

    def act(client: Client, _: int) -> bool:
        body = job_body(run.file_id, metadata={"git_sha": f"{next(shas):040x}", "branch": "main"})
        return client.send(Request("POST", JOBS, body)).status == 200

    as_fast_as_they_can(run.clients(), act, requests=100)
    servers = {"API": run.one.child("uvicorn"), "Postgres": run.one.child("postgres")}
    before = {name: _cpu(server) for name, server in servers.items()}
    fast = as_fast_as_they_can(run.clients(), act, requests=int(run.options.seconds * 200))
    run.submissions = fast
    tell(f"submissions, {CLIENTS} clients as fast as they can", fast.rate, "/s", aim=200, at_least=True)
    for name, server in servers.items():  # on a machine that others use too, this says more than the rate
        tell(f"CPU of {name} per submission", (_cpu(server) - before[name]) / len(fast.seconds) * 1000, "ms")
    for rate in (100, 200):
        seen = at_rate(run.clients(), act, rate=rate, seconds=run.options.seconds)
        quantiles(f"submission at {rate}/s", seen, p99_ms=50)


def poll(run: Run) -> None:
    """One queued and one settled job each, with ten thousand others in the queue."""
    queued = make_jobs(run, 10_000, status="queued", prefix="1")
    settled = make_jobs(run, 100, status="cancelled", prefix="2")
    for name, ids in (("settled", settled), ("queued among 10,000", queued)):
        watched, tags = run.rng.sample(ids, 50), dict[str, str]()
        hits = itertools.count()

        def act(client: Client, number: int, watched: list[str] = watched, tags: dict[str, str] = tags) -> bool:
            job_id = watched[number % len(watched)]
            answer = client.send(Request("GET", f"{JOBS}/{job_id}", headers={"If-None-Match": tags.get(job_id, '"-"')}))
            tags[job_id] = answer.headers["etag"]
            if answer.status == 304:
                next(hits)  # noqa: B023  # used within this pass
            return answer.status in (200, 304)

        at_rate(run.clients(), act, rate=100, seconds=1)
        begun, before = next(hits), _cpu(run.one.child("uvicorn"))
        seen = at_rate(run.clients(), act, rate=200, seconds=run.options.seconds)
        quantiles(f"poll of {name} jobs at 200/s", seen, p99_ms=10)
        tell("CPU of API per poll", (_cpu(run.one.child("uvicorn")) - before) / len(seen.seconds) * 1000, "ms")
        tell("… answered 304", (next(hits) - begun - 1) / len(seen.seconds) * 100, "%")
    with run.one.database() as database:
        database.execute("update jobs set status = 'cancelled', finished_at = now() where status = 'queued'")


def make_jobs(run: Run, count: int, *, status: str, prefix: str) -> list[str]:
    """Copies of one submitted job, by SQL. Their ids sort before every real one."""
    template = run.one.submit(run.file_id)
    with run.one.database() as database:
        names = [
            name
            for (name,) in database.execute(
                "select column_name from information_schema.columns where table_name = 'jobs'"
                " and column_name not in ('id', 'status', 'metadata', 'finished_at')"
            )
        ]
        columns = ", ".join(f'"{name}"' for name in names)
        ended = "now()" if status == "cancelled" else "null"
        database.execute("set synchronous_commit = off")
        database.execute(
            f"""insert into jobs (id, status, metadata, finished_at, {columns})
            select 'ftjob-00{prefix}' || lpad(to_hex(g), 13, '0') || substr(md5(g::text), 1, 16), '{status}',
                jsonb_build_object('git_sha', md5(g::text), 'pipeline', 'p' || g %% 1000,
                                   'branch', case when g %% 10 = 0 then 'release' else 'main' end),
                {ended}, {columns}
            from jobs, generate_series(1, {count}) g where id = %s""",  # noqa: S608  # our own column names
            [template],
        )
        database.execute("vacuum analyze jobs")
        return [
            job_id
            for (job_id,) in database.execute(
                "select id from jobs where id like %s and status = %s order by id", [f"ftjob-00{prefix}%", status]
            )
        ]


def lists(run: Run) -> None:
    """Pages of 20 at random depths, and the metadata filter on values that are rare, middling and common."""
    begun = time.perf_counter()
    ids = make_jobs(run, run.options.jobs, status="cancelled", prefix="3")
    print(f"  {len(ids):,} jobs made in {time.perf_counter() - begun:.0f} s")
    number = len(ids)
    filters: dict[str, Callable[[], str]] = {
        "first page": lambda: "",
        "page at any depth": lambda: f"&after={run.rng.choice(ids)}",
        "metadata[git_sha]=…, one job": lambda: f"&metadata[git_sha]={_md5(run.rng.randrange(1, number))}",
        "metadata[pipeline]=…, one in 1,000": lambda: f"&metadata[pipeline]=p{run.rng.randrange(1000)}",
        "metadata[branch]=release, at any depth": lambda: f"&metadata[branch]=release&after={run.rng.choice(ids)}",
        "metadata[git_sha]=nothing": lambda: "&metadata[git_sha]=none",
    }
    for name, query in filters.items():

        def act(client: Client, _: int, query: Callable[[], str] = query) -> bool:
            return client.send(Request("GET", f"{JOBS}?limit=20{query()}")).status == 200

        as_fast_as_they_can(run.one.clients(1), act, requests=20)
        seen = as_fast_as_they_can(run.one.clients(1), act, requests=int(run.options.seconds * 40))
        quantiles(f"list, {name}", seen, p99_ms=20)


def _md5(number: int) -> str:
    return hashlib.md5(str(number).encode(), usedforsecurity=False).hexdigest()


# --- streams ---------------------------------------------------------------------------------------------------------


def streams(run: Run) -> None:
    """Five hundred clients of five hundred jobs; then one new event in each."""
    ids = make_jobs(run, 500, status="paused", prefix="4")[:500]
    api = run.one.child("uvicorn")
    before = _memory(api)
    sockets = [_open_stream(run.one, job_id) for job_id in ids]
    _read_all(sockets, b"retry: ")
    time.sleep(1)
    with run.one.database() as database:
        tell("500 streams: more memory of the API", (_memory(api) - before) / 1e6, "MB", aim=100)
        asked, cpu = _transactions(database), sum(api.cpu_times()[:2])
        time.sleep(run.options.seconds)
        tell("500 quiet streams: transactions", (_transactions(database) - asked) / run.options.seconds, "/s")
        used = (sum(api.cpu_times()[:2]) - cpu) / run.options.seconds
        tell("500 quiet streams: CPU of the API", used * 100, "%")
        told = time.perf_counter()
        database.execute(
            "insert into events (job_id, seq, id, level, type, message)"
            " select id, 1, 'ftevent-' || id, 'info', 'message', 'news' from jobs where id = any(%s)",
            [ids],
        )
        waits = _read_all(sockets, b'"news"')
        tell("an event in each of 500: last client has it after", (max(waits) - told) * 1000, "ms")
    for stream in sockets:
        stream.close()


def _open_stream(one: Installation, job_id: str) -> socket.socket:
    opened = socket.create_connection(one.address)
    path = f"/v1/tunepool/jobs/{job_id}/events/stream"
    opened.sendall(f"GET {path} HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer {one.key}\r\n\r\n".encode())
    return opened


def _read_all(sockets: list[socket.socket], wanted: bytes) -> list[float]:
    """When each of them had `wanted`."""
    heard: dict[int, bytes] = {}
    when: list[float] = []
    with selectors.DefaultSelector() as selector:
        for stream in sockets:
            selector.register(stream, selectors.EVENT_READ)
        while selector.get_map():
            ready = selector.select(timeout=30)
            assert ready, f"{len(selector.get_map())} streams stayed silent"
            for key, _ in ready:
                stream = key.fileobj
                assert isinstance(stream, socket.socket)
                heard[key.fd] = heard.get(key.fd, b"") + stream.recv(65536)
                if wanted in heard[key.fd]:
                    when.append(time.perf_counter())
                    selector.unregister(stream)
    return when


def _memory(process: psutil.Process) -> int:
    return int(sum(one.memory_info().rss for one in [process, *process.children(recursive=True)]))


def _transactions(database: psycopg.Connection[tuple[int]]) -> int:
    database.execute("select pg_stat_clear_snapshot()")
    found = database.execute("select sum(xact_commit) from pg_stat_database").fetchone()
    assert found is not None
    return int(found[0])


# --- orders and workers ----------------------------------------------------------------------------------------------


def bulk(run: Run) -> None:
    """A thousand queued jobs, cancelled one request each."""
    ids = make_jobs(run, 1000, status="queued", prefix="5")[:1000]

    def act(client: Client, number: int) -> bool:
        return client.send(Request("POST", f"{JOBS}/{ids[number]}/cancel", b"")).status == 200

    seen = as_fast_as_they_can(run.clients(), act, requests=len(ids))
    tell("1,000 queued jobs cancelled, one request each", seen.elapsed, "s")


def start(run: Run) -> None:
    """From sending the submission until the kernel has started the trainer, on an idle device."""
    with worker_process(run.one) as worker:
        run.one.wait(run.one.submit(run.one.upload("steps=2")), "succeeded")
        file_id, waits = run.one.upload("steps=4 step_seconds=0.1"), []
        for _ in range(run.options.starts):
            # Start times come from the kernel, in hundredths: both on its clock, the first by a process of our own.
            with subprocess.Popen(["sleep", "60"]) as mark:
                begun = psutil.Process(mark.pid).create_time()
                job_id = run.one.submit(file_id)
                waits.append(_trainer_started(worker) - begun)
                mark.kill()
            run.one.wait(job_id, "succeeded")
    tell("submit to trainer exec, p50", statistics.median(waits) * 1000, "ms")
    tell(f"submit to trainer exec, p95 of {len(waits)}", sorted(waits)[int(0.95 * len(waits))] * 1000, "ms", aim=500)


def _trainer_started(worker: psutil.Process) -> float:
    deadline = time.monotonic() + 30
    while time.monotonic() < deadline:
        for child in worker.children(recursive=True):
            try:
                if "tests.fake_trainer" in child.cmdline():
                    return float(child.create_time())
            except psutil.NoSuchProcess:
                continue
        time.sleep(0.02)
    raise TimeoutError("no trainer within 30 s")


def cancel(run: Run) -> None:
    """From the cancel of a running job until its device is free again."""
    with worker_process(run.one):
        file_id, waits = run.one.upload("steps=2000 step_seconds=0.1"), []
        for _ in range(5):
            job_id = run.one.submit(file_id)
            run.one.wait(job_id, "running")
            time.sleep(1)
            begun = time.perf_counter()
            run.one.ask(Request("POST", f"{JOBS}/{job_id}/cancel", b""))
            while any(device["leased"] for device in run.one.ask(Request("GET", "/v1/tunepool/pool"))["devices"]):
                time.sleep(0.02)
            waits.append(time.perf_counter() - begun)
    tell("cancel of a running job to free device, worst of 5", max(waits), "s", aim=5)


def lost(run: Run) -> None:
    """A worker killed with its trainer, as when a host dies; default lease."""
    with worker_process(run.one) as worker:
        job_id = run.one.submit(run.one.upload("steps=20000 step_seconds=0.1"))
        run.one.wait(job_id, "running")
        time.sleep(2)
        for process in [worker, *worker.children(recursive=True)]:
            process.send_signal(signal.SIGKILL)
        tell("dead worker to job queued again", run.one.wait(job_id, "queued", seconds=120), "s", aim=80)
    run.one.ask(Request("POST", f"{JOBS}/{job_id}/cancel", b""))


def idle(run: Run) -> None:
    """What an installation costs that has nothing to do."""
    with worker_process(run.one) as worker, run.one.database() as database:
        time.sleep(5)
        parts = {"worker": worker, "API": run.one.child("uvicorn"), "janitor": run.one.child("worker.janitor")}
        cpu, asked = {name: _cpu(part) for name, part in parts.items()}, _transactions(database)
        time.sleep(20)
        for name, part in parts.items():
            tell(f"idle {name}: CPU", (_cpu(part) - cpu[name]) / 20 * 100, "%")
            tell(f"idle {name}: memory", _memory(part) / 1e6, "MB")
        tell("idle installation: transactions", (_transactions(database) - asked) / 20, "/s")


def _cpu(process: psutil.Process) -> float:
    return sum(sum(one.cpu_times()[:2]) for one in [process, *process.children(recursive=True)])


# --- peers -----------------------------------------------------------------------------------------------------------


def peers(run: Run) -> None:
    """The same submissions through bare queues behind the same door."""
    if run.submissions is None:
        submit(run)
    assert run.submissions is not None
    known = {"bare Celery + Redis": (sys.executable, "celery", run.one.redis_url)}
    if run.options.procrastinate:
        with run.one.database() as database:
            database.execute("create database peer")
            conninfo = database.info.dsn.replace("dbname=tunepool", "dbname=peer")
        known["procrastinate"] = (run.options.procrastinate, "procrastinate", conninfo)
    else:
        print("  procrastinate: left out; --procrastinate PYTHON names an interpreter that has it")
    for name, (python, kind, url) in known.items():
        with door(python, kind, url) as address:
            body = job_body(run.file_id)

            def act(client: Client, _: int, body: bytes = body) -> bool:
                return client.send(Request("POST", "/jobs", body)).status == 201

            clients = [Client(address, "none") for _ in range(CLIENTS)]
            as_fast_as_they_can(clients, act, requests=100)
            seen = as_fast_as_they_can(clients, act, requests=len(run.submissions.seconds))
        tell(f"{name}, {CLIENTS} clients as fast as they can", seen.rate, "/s")
        tell(f"{name}, p99 under that load", seen.quantile(0.99) * 1000, "ms")
        tell(f"Tunepool / {name}, submissions", run.submissions.rate / seen.rate, "x")


@contextmanager
def door(python: str, kind: str, url: str) -> Iterator[tuple[str, int]]:
    with closing(socket.socket()) as probe:
        probe.bind(("127.0.0.1", 0))
        address = ("127.0.0.1", int(probe.getsockname()[1]))
    process = subprocess.Popen([python, DOOR, kind, url, str(address[1])])
    try:
        deadline = time.monotonic() + 30
        while True:
            try:
                socket.create_connection(address, timeout=1).close()
                break
            except OSError:
                assert process.poll() is None, f"the door before {kind} did not open"
                assert time.monotonic() < deadline
                time.sleep(0.05)
        yield address
    finally:
        process.terminate()
        process.wait(20)


PARTS: dict[str, Callable[[Run], None]] = {
    "submit": submit,
    "poll": poll,
    "list": lists,
    "streams": streams,
    "bulk": bulk,
    "start": start,
    "cancel": cancel,
    "idle": idle,
    "lost": lost,
    "peers": peers,
}


def environment(run: Run) -> None:
    with run.one.database() as database:
        shown = {
            name: next(iter(database.execute(f"show {name}")))[0]
            for name in ("server_version", "fsync", "synchronous_commit")
        }
    load = " ".join(f"{value:.1f}" for value in os.getloadavg())
    print(f"{platform.platform()}, {os.cpu_count()} CPUs, load {load}, Python {platform.python_version()}")
    print(f"Postgres {shown}, API processes: {run.options.api_processes}, everything on this machine, clients too")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default=",".join(PARTS), help="parts, separated by commas")
    parser.add_argument("--jobs", type=int, default=1_000_000)
    parser.add_argument("--seconds", type=float, default=10.0, help="length of each measurement under load")
    parser.add_argument("--starts", type=int, default=20)
    parser.add_argument("--api-processes", type=int, default=1)
    parser.add_argument("--procrastinate", metavar="PYTHON", default="")
    options = parser.parse_args()
    wanted = options.only.split(",")
    if unknown := set(wanted) - PARTS.keys():
        parser.error(f"no part {min(unknown)}; there are {' '.join(PARTS)}")
    with tempfile.TemporaryDirectory(prefix="tp-bench-", dir="/tmp") as folder:
        Path(folder).chmod(0o711)
        with installation(
            Path(folder) / "home", worker=False, TUNEPOOL_API_PROCESSES=str(options.api_processes)
        ) as one:
            run = Run(one, options, one.upload())
            one.checked()
            environment(run)
            for name in wanted:
                print(f"{name}: {PARTS[name].__doc__}")
                PARTS[name](run)


if __name__ == "__main__":
    main()
