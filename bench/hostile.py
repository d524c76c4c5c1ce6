"""Six denials, tried against a real `up`: what others feel of them. `python bench/hostile.py [--seconds N]`.

Each attack goes on while a bystander with a key of another project polls at a steady rate (latency counts from when a
request was due), and while a training of that project runs. Shown per attack: median and p99 of the bystander against
those of the quiet times right before and after it, failures, how the attacker was answered, how often the training
was begun, and the API's processor time: latencies say little on a machine that is busy with something else. Attackers
are processes of their own at the lowest priority: they stand for other machines.

The attacks: one endless header; half requests without end; half bodies; new connections as fast as one process opens
them; 64 clients at /readyz; slow preflights that fill the children of the worker, beside templates that compute without
end.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import multiprocessing
import os
import selectors
import socket
import tempfile
import threading
import time
from collections import Counter, deque
from collections.abc import Callable, Iterator
from functools import partial
from http.client import HTTPConnection
from pathlib import Path
from typing import Any, cast

import psutil
from rich.console import Console
from rich.table import Table

from bench.machine import header
from bench.plane.installation import Installation, installation
from bench.plane.load import Client, Request, Seen, Target, at_rate

RATE = 40.0  # polls a second of the bystander: six of 15 seconds are slower than its p99
CLIENTS = 2
LINES = 800  # that an attacker holds: the usual `nofile` is 1,024
HALF_REQUEST = b"GET /livez HTTP/1.1\r\nX-A: "
STAND_SECONDS = 3.0
STEPS = 100_000  # the training outlasts every attack
SLOW = "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}"
ENDLESS = "{{ 10 ** (10 ** 9) }}"
_FORK = multiprocessing.get_context("fork")
Attack = Callable[[Installation, threading.Event, Counter[str]], None]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--home", type=Path, help="Of the installation; a temporary one if left out.")
    parser.add_argument("--seconds", type=float, default=15.0, help="Of each attack.")
    parser.add_argument("--only", action="append", choices=ATTACKS, help="This attack; may be given again.")
    arguments = parser.parse_args()
    print(header(), flush=True)
    with contextlib.ExitStack() as end:
        home = arguments.home or Path(end.enter_context(tempfile.TemporaryDirectory()))
        one = end.enter_context(installation(home, worker=True, TUNEPOOL_MIN_TRAINING_ROWS="1"))
        bystander = Target(one.address, other_project(one))
        training = Training(one, bystander)
        show(run(one, bystander, training, seconds=arguments.seconds, only=arguments.only or list(ATTACKS)))


def other_project(one: Installation) -> str:
    """A key of a project that nobody attacks from."""
    project = one.ask(Request("POST", "/v1/tunepool/projects", json.dumps({"name": "bystander"}).encode()))["id"]
    wanted = {"project_id": project, "name": "bystander", "scopes": ["*"]}
    return str(one.ask(Request("POST", "/v1/tunepool/keys", json.dumps(wanted).encode()))["api_key"])


class Training:
    """A long job of the bystander's."""

    def __init__(self, one: Installation, target: Target) -> None:
        self._one = Installation(one.home, one.process, target.key, one.address)
        file_id = self._one.upload(f"steps={STEPS} step_seconds=0.05 save=100")
        self.id = self._one.submit(file_id)
        self._one.wait(self.id, "running", seconds=120)

    def seen(self) -> tuple[int, int]:
        """(attempts, steps) by now."""
        found = self._one.job(self.id)["tunepool"]
        return len(found["attempts"]), (found["progress"] or {}).get("step", 0)


def run(
    one: Installation, bystander: Target, training: Training, *, seconds: float, only: list[str]
) -> Iterator[tuple[Any, ...]]:
    """(name, what the bystander saw then and in the quiet beside, attempts, steps of the training, CPU s, answers)"""
    look, api = partial(watch, bystander, training, seconds=seconds), one.child("api.serve")
    spent = processor_seconds(api)
    quiet, attempts, steps = look()
    yield "quiet", quiet, quiet, attempts, steps, processor_seconds(api) - spent, Counter[str]()
    for name in only:
        spent = processor_seconds(api)
        with attacking(ATTACKS[name], one) as answers:
            seen, attempts, steps = look()
        spent = processor_seconds(api) - spent
        before, quiet = quiet, look()[0]
        beside = Seen([*before.seconds, *quiet.seconds], before.failures + quiet.failures)
        yield name, seen, beside, attempts, steps, spent, answers


def processor_seconds(process: psutil.Process) -> float:
    used = process.cpu_times()
    return float(used.user + used.system)


def watch(bystander: Target, training: Training, *, seconds: float) -> tuple[Seen, int, int]:
    """(what the bystander saw, attempts of the training, its steps meanwhile)"""
    _, before = training.seen()
    seen = at_rate(bystander, lambda _: Request("GET", "/v1/models"), clients=CLIENTS, rate=RATE, seconds=seconds)
    attempts, after = training.seen()
    return seen, attempts, after - before


@contextlib.contextmanager
def attacking(attack: Attack, one: Installation) -> Iterator[Counter[str]]:
    """While it is open the attack goes on; afterwards the counter holds how it was answered."""
    answers, over, answered = Counter[str](), _FORK.Event(), _FORK.SimpleQueue()

    def go_on() -> None:
        os.nice(19)
        counted, ended = Counter[str](), threading.Event()
        attacker = threading.Thread(target=attack, args=(one, ended, counted))
        attacker.start()
        over.wait()
        ended.set()
        attacker.join()
        answered.put(counted)

    attacker = _FORK.Process(target=go_on)
    attacker.start()
    time.sleep(STAND_SECONDS)
    yield answers
    over.set()
    answers.update(answered.get())
    attacker.join()
    time.sleep(STAND_SECONDS)  # until what the attack left is gone


# --- attacks ----------------------------------------------------------------------------------------------------------


def endless_header(one: Installation, over: threading.Event, answers: Counter[str]) -> None:
    while not over.is_set():
        with contextlib.suppress(OSError), socket.create_connection(one.address, timeout=5) as line:
            try:
                line.sendall(b"GET /livez HTTP/1.1\r\nX-A: ")
                for _ in range(1000):
                    line.sendall(b"a" * 65536)
            except OSError:
                answers["cut off"] += 1


def half_requests(one: Installation, over: threading.Event, answers: Counter[str]) -> None:
    _halves(one, over, answers, HALF_REQUEST)


def half_bodies(one: Installation, over: threading.Event, answers: Counter[str]) -> None:
    head = f"POST /v1/fine_tuning/jobs HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer {one.key}\r\n"
    _halves(one, over, answers, f"{head}Content-Type: application/json\r\nContent-Length: 9\r\n\r\n{{".encode())


def connection_flood(one: Installation, over: threading.Event, answers: Counter[str]) -> None:
    """New lines as fast as one process can open them, none of which asks anything."""
    lines: deque[socket.socket] = deque()
    while not over.is_set():
        with contextlib.suppress(OSError):
            lines.append(_half(one, HALF_REQUEST))
            answers["opened"] += 1
        if len(lines) > LINES:
            lines.popleft().close()
    for line in lines:
        line.close()


def _halves(one: Installation, over: threading.Event, answers: Counter[str], half: bytes) -> None:
    """As many lines as this process may open, each with half a request, and new ones for those that are closed."""
    with selectors.DefaultSelector() as lines:
        while not over.wait(0.001):
            if len(lines.get_map()) < LINES:
                try:
                    lines.register(_half(one, half), selectors.EVENT_READ)
                    answers["opened"] += 1
                except OSError:
                    answers["refused"] += 1
            for key, _ in lines.select(timeout=0):
                line = key.fileobj
                assert isinstance(line, socket.socket)
                with contextlib.suppress(OSError):
                    line.recv(65536)
                lines.unregister(line)
                line.close()
                answers["closed by the API"] += 1
        for key in list(lines.get_map().values()):
            cast("socket.socket", key.fileobj).close()


def _half(one: Installation, half: bytes) -> socket.socket:
    line = socket.create_connection(one.address, timeout=5)
    line.sendall(half)
    return line


def crowd(one: Installation, over: threading.Event, answers: Counter[str]) -> None:
    def ask() -> None:
        line = HTTPConnection(*one.address, timeout=60)  # without a key
        while not over.is_set():
            line.request("GET", "/readyz")
            answer = line.getresponse()
            answer.read()
            answers[str(answer.status)] += 1
        line.close()

    threads = [threading.Thread(target=ask) for _ in range(64)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()


def slow_preflights(one: Installation, over: threading.Event, answers: Counter[str]) -> None:
    client, file_id = Client(one.target), one.upload()
    made = []
    for template in (SLOW, SLOW, SLOW, ENDLESS, ENDLESS, ENDLESS):
        body = {"model": "tiny", "training_file": file_id, "tunepool": {"training": {"chat_template": template}}}
        answer = client.send(Request("POST", "/v1/tunepool/preflights", json.dumps(body).encode()))
        answers[str(answer.status)] += 1
        made.append(json.loads(answer.body).get("id"))
    client.close()
    over.wait()
    for preflight in filter(None, made):
        client = Client(one.target)  # the API has closed the line meanwhile
        client.send(Request("DELETE", f"/v1/tunepool/preflights/{preflight}"))
        client.close()


ATTACKS: dict[str, Attack] = {
    "endless header": endless_header,
    "half requests": half_requests,
    "half bodies": half_bodies,
    "connection flood": connection_flood,
    "64 at /readyz": crowd,
    "slow preflights": slow_preflights,
}


def show(rows: Iterator[tuple[Any, ...]]) -> None:
    table = Table(
        "attack", "median ms", "p99 ms", "p99 / quiet", "failures", "attempts", "steps", "API CPU s", "attacker saw"
    )
    for name, seen, quiet, attempts, steps, spent, answers in rows:
        table.add_row(
            name,
            f"{seen.quantile(0.5) * 1000:.1f}",
            f"{seen.quantile(0.99) * 1000:.1f}",
            f"{seen.quantile(0.99) / quiet.quantile(0.99):.2f}",
            str(seen.failures),
            str(attempts),
            str(steps),
            f"{spent:.1f}",
            ", ".join(f"{count} x {answer}" for answer, count in answers.most_common(4)) or "-",
        )
    Console(width=140).print(table)
    print(f"{os.cpu_count()} CPUs, load average {os.getloadavg()[0]:.1f}; the bystander asks {RATE:g} times a second")


if __name__ == "__main__":
    main()
