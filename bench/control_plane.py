"""The control plane's figures on this machine, through the real API, with fsync: `python bench/control_plane.py`.

    --only submit,poll      some parts; all of them: submit poll list streams bulk start cancel idle lost peers
    --jobs 100000           rows for `list` (default 1,000,000)
    --api-processes 2       uvicorn processes of the API
    --procrastinate PYTHON  an interpreter that has procrastinate, for `peers`; without it that peer is left out:
                            python3 -m venv P && P/bin/pip install procrastinate "psycopg[binary,pool]" fastapi uvicorn

`peers` takes the same submissions, from the same clients in the same run, through a door of the same make before bare
Celery + Redis and before a Postgres-native queue: no keys, no checks, no idempotency, no events, no explained place.
Short (under three minutes): --jobs 50000 --seconds 3 --only submit,poll,list,streams,bulk,start,cancel,peers

The clients run on the same cores. Beside each rate stand the processor milliseconds that a request cost the API,
Postgres and the clients: on a machine that others use too they say more than the rate. Every part warms up first.
"""

from __future__ import annotations

import argparse
import hashlib
import itertools
import json
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
from collections.abc import Callable, Iterator, Mapping
from contextlib import closing, contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import psutil
import psycopg

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from bench.machine import header
from bench.plane.disk import Disk, beside, watched
from bench.plane.installation import JOBS, Installation, installation, job_body, worker_process
from bench.plane.load import Answer, Make, Request, Seen, Target, as_fast_as_they_can, at_rate

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


def blame_the_disk(disk: Disk, seen: Seen) -> None:
    """What a small commit beside the answers took, and how many slow answers waited during a slow one."""
    slow = seen.slower_than(0.05)
    tell("  a commit of 8 KiB beside it: p99", disk.quantile(0.99) * 1000, "ms")
    if slow:
        tell(
            f"  of {len(slow)} above 50 ms, beside a commit above 20 ms",
            beside(slow, disk.commits, slow=0.02) * 100,
            "%",
        )
        tell(
            "  of them, while the processor was not to be had for 20 ms", beside(slow, disk.late, slow=0.02) * 100, "%"
        )
        tell("  from the first of them to the last", slow[-1][1] - slow[0][0], "s")


@contextmanager
def costs(run: Run, what: str) -> Iterator[list[Seen]]:
    """Processor time of each side for one of the requests that the block puts into the list."""
    servers = {"API": run.one.child("api.serve"), "Postgres": run.one.child("postgres")}
    before, seen = {name: _cpu(server) for name, server in servers.items()}, list[Seen]()
    yield seen
    number = sum(len(one.seconds) for one in seen)
    spent = {name: _cpu(server) - before[name] for name, server in servers.items()}
    spent["clients"] = sum(one.cpu for one in seen)
    told = ", ".join(f"{name} {seconds / number * 1000:.2f}" for name, seconds in spent.items())
    print(f"  {f'CPU of one {what}, ms':<58} {told}", flush=True)


# --- submissions and polls -------------------------------------------------------------------------------------------


def submit(run: Run) -> None:
    """Submissions, each a commit with its events; the ring goes to a real Valkey."""
    make = submissions(run.file_id)
    as_fast_as_they_can(run.one.target, make, clients=CLIENTS, requests=200)
    with costs(run, "submission") as seen:
        fast = as_fast_as_they_can(run.one.target, make, clients=CLIENTS, requests=int(run.options.seconds * 200))
        seen.append(fast)
    run.submissions = fast
    tell(f"submissions, {CLIENTS} clients as fast as they can", fast.rate, "/s", aim=200, at_least=True)
    for rate in (100, 200):
        with watched(run.one.home) as disk:
            seen_at = at_rate(run.one.target, make, clients=CLIENTS, rate=rate, seconds=run.options.seconds)
        quantiles(f"submission at {rate}/s", seen_at, p99_ms=50)
        blame_the_disk(disk, seen_at)


def submissions(file_id: str) -> Make:
    """Every body is another, as those of pipelines are: equal ones take turns, so that a retry finds its first."""
    shas = itertools.count()
    return lambda _: Request(
        "POST", JOBS, job_body(file_id, metadata={"git_sha": f"{next(shas):040x}", "branch": "main"})
    )


def poll(run: Run) -> None:
    """One queued and one settled job each, with ten thousand others in the queue."""
    queued = make_jobs(run, 10_000, status="queued", prefix="1")
    settled = make_jobs(run, 100, status="cancelled", prefix="2")
    for name, ids in (("settled", settled), ("queued among 10,000", queued)):
        watched, tags = run.rng.sample(ids, 50), dict[str, str]()
        make, judge = polls(watched, tags, sends=False)
        at_rate(run.one.target, make, clients=CLIENTS, rate=100, seconds=1, judge=judge)
        for sort, known in (("polled with its ETag", True), ("read whole", False)):
            make, judge = polls(watched, tags, sends=known)
            with costs(run, f"poll of a {name} job, {sort}") as seen:
                rate, seconds = 200, run.options.seconds
                seen.append(at_rate(run.one.target, make, clients=CLIENTS, rate=rate, seconds=seconds, judge=judge))
            quantiles(f"{name} jobs at {rate}/s, {sort}", seen[0], p99_ms=10)


def polls(watched: list[str], tags: dict[str, str], *, sends: bool) -> tuple[Make, Callable[[int, Answer], bool]]:
    """Turn by turn, keeping each answer's tag; with the last one sent back, or without."""

    def make(number: int) -> Request:
        job_id = watched[number % len(watched)]
        return Request("GET", f"{JOBS}/{job_id}", headers={"If-None-Match": tags[job_id]} if sends else {})

    def judge(number: int, answer: Answer) -> bool:
        tags[watched[number % len(watched)]] = answer.headers["etag"]
        return answer.status in (200, 304)

    return make, judge


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
        database.execute("vacuum analyze jobs, job_labels")
        return [
            job_id
            for (job_id,) in database.execute(
                "select id from jobs where id like %s and status = %s order by id", [f"ftjob-00{prefix}%", status]
            )
        ]


def lists(run: Run) -> None:
    """Pages of 20, among a thousand jobs and among many: at random depths, by rare, middling and common metadata."""
    few = _list_medians(run, make_jobs(run, 1000, status="cancelled", prefix="6"))
    begun = time.perf_counter()
    ids = make_jobs(run, run.options.jobs, status="cancelled", prefix="3")
    print(f"  {len(ids):,} jobs made in {time.perf_counter() - begun:.0f} s")
    for name, median in _list_medians(run, ids, tells=True).items():
        tell(f"… among {len(ids):,} jobs / among 1,000, p50: {name}", median / few[name], "x")


def _list_medians(run: Run, ids: list[str], *, tells: bool = False) -> Mapping[str, float]:
    number, medians = len(ids), dict[str, float]()
    filters: dict[str, Callable[[], str]] = {
        "first page": lambda: "",
        "page at any depth": lambda: f"&after={run.rng.choice(ids)}",
        "metadata[git_sha]=…, one job": lambda: f"&metadata[git_sha]={_md5(run.rng.randrange(1, number))}",
        "metadata[pipeline]=…, one in 1,000": lambda: f"&metadata[pipeline]=p{run.rng.randrange(1000)}",
        "metadata[branch]=release, at any depth": lambda: f"&metadata[branch]=release&after={run.rng.choice(ids)}",
        "metadata[git_sha]=nothing": lambda: "&metadata[git_sha]=none",
    }
    for name, query in filters.items():

        def make(_: int, query: Callable[[], str] = query) -> Request:
            return Request("GET", f"{JOBS}?limit=20{query()}")

        as_fast_as_they_can(run.one.target, make, clients=1, requests=20)
        seen = as_fast_as_they_can(run.one.target, make, clients=1, requests=int(run.options.seconds * 40))
        medians[name] = seen.quantile(0.5)
        if tells:
            quantiles(f"list, {name}", seen, p99_ms=20)
    return medians


def _md5(number: int) -> str:
    return hashlib.md5(str(number).encode(), usedforsecurity=False).hexdigest()


# --- streams ---------------------------------------------------------------------------------------------------------


def streams(run: Run) -> None:
    """Five hundred clients of five hundred jobs; then one new event in each."""
    ids = make_jobs(run, 500, status="paused", prefix="4")[:500]
    api = run.one.child("api.serve")
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
    """A thousand queued jobs, cancelled by one order."""
    taken = []
    for turn in range(5):
        ids = make_jobs(run, 1000, status="queued", prefix=f"5{turn}")[:1000]
        order = Request("POST", "/v1/tunepool/jobs/cancel", json.dumps({"job_ids": ids}).encode())
        begun = time.perf_counter()
        assert len(run.one.ask(order)["cancelled"]) == len(ids)
        taken.append(time.perf_counter() - begun)
    tell("1,000 queued jobs cancelled by one order, median of 5", statistics.median(taken), "s")
    tell("1,000 queued jobs cancelled by one order, worst of 5", max(taken), "s", aim=1)


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
        parts = {"worker": worker, "API": run.one.child("api.serve"), "janitor": run.one.child("worker.janitor")}
        cpu, asked = {name: _cpu(part) for name, part in parts.items()}, _transactions(database)
        time.sleep(20)
        for name, part in parts.items():
            tell(f"idle {name}: CPU", (_cpu(part) - cpu[name]) / 20 * 100, "%")
            tell(f"idle {name}: memory", _memory(part) / 1e6, "MB")
        tell("idle installation: transactions", (_transactions(database) - asked) / 20, "/s")


def _cpu(process: psutil.Process) -> float:
    """Processor seconds of a process and its children, also of those that have ended by now."""
    return float(sum(sum(one.cpu_times()[:4]) for one in [process, *process.children(recursive=True)]))


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
            body, target = job_body(run.file_id), Target(address, "none")

            def make(_: int, body: bytes = body) -> Request:
                return Request("POST", "/jobs", body)

            as_fast_as_they_can(target, make, clients=CLIENTS, requests=100, judge=_created)
            requests = len(run.submissions.seconds)
            seen = as_fast_as_they_can(target, make, clients=CLIENTS, requests=requests, judge=_created)
        tell(f"{name}, {CLIENTS} clients as fast as they can", seen.rate, "/s")
        tell(f"{name}, p99 under that load", seen.quantile(0.99) * 1000, "ms")
        tell(f"Tunepool / {name}, submissions", run.submissions.rate / seen.rate, "x")


def _created(_: int, answer: Answer) -> bool:
    return answer.status == 201


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


def settle(run: Run) -> None:
    """Nothing waits that the next part has not made."""
    with run.one.database() as database:
        database.execute(
            "update jobs set status = 'cancelled', finished_at = now()"
            " where status in ('validating_files', 'queued', 'paused') and lease_until is null"
        )


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
    print(header(), flush=True)
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
                settle(run)


if __name__ == "__main__":
    main()
