"""Keep-alive HTTP clients, and what they saw. Threads of one process: they wait far more than they work."""

from __future__ import annotations

import http.client
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import count
from typing import NamedTuple


class Request(NamedTuple):
    method: str
    path: str
    body: bytes | None = None
    headers: dict[str, str] = {}  # noqa: RUF012  # never changed


class Answer(NamedTuple):
    status: int
    headers: dict[str, str]
    body: bytes


@dataclass
class Seen:
    """Latencies of the answers that came, and how many were not the ones hoped for."""

    seconds: list[float] = field(default_factory=list)
    failures: int = 0
    elapsed: float = 0.0

    @property
    def rate(self) -> float:
        """Answers a second."""
        return len(self.seconds) / self.elapsed

    def quantile(self, share: float) -> float:
        """Nearest rank, in seconds."""
        ordered = sorted(self.seconds)
        return ordered[min(len(ordered) - 1, int(share * len(ordered)))]


class Client:
    """One connection that stays open."""

    def __init__(self, address: tuple[str, int], key: str) -> None:
        self._connection = http.client.HTTPConnection(*address, timeout=60)
        self._headers = {"Authorization": f"Bearer {key}", "Content-Type": "application/json"}

    def send(self, request: Request) -> Answer:
        self._connection.request(request.method, request.path, request.body, self._headers | request.headers)
        answer = self._connection.getresponse()
        return Answer(answer.status, {name.lower(): value for name, value in answer.getheaders()}, answer.read())

    def close(self) -> None:
        self._connection.close()


Act = Callable[[Client, int], bool]  # the n-th request of all; whether the answer was the one hoped for


def as_fast_as_they_can(clients: Sequence[Client], act: Act, *, requests: int) -> Seen:
    """Closed loop: each client asks again as soon as it is answered."""
    return _run(clients, act, requests=requests, due=lambda number, begun: time.perf_counter())


def at_rate(clients: Sequence[Client], act: Act, *, rate: float, seconds: float) -> Seen:
    """Open loop: requests are due on a clock, and latency counts from when they were due (no coordinated omission)."""
    return _run(clients, act, requests=int(rate * seconds), due=lambda number, begun: begun + number / rate)


def _run(clients: Sequence[Client], act: Act, *, requests: int, due: Callable[[int, float], float]) -> Seen:
    seen, numbers, lock = Seen(), count(), threading.Lock()
    begun = time.perf_counter() + 0.05

    def work(client: Client) -> None:
        while (number := next(numbers)) < requests:
            start = due(number, begun)
            time.sleep(max(0.0, start - time.perf_counter()))
            good = act(client, number)
            taken = time.perf_counter() - start
            with lock:
                seen.seconds.append(taken)
                seen.failures += not good

    threads = [threading.Thread(target=work, args=(client,)) for client in clients]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    seen.elapsed = time.perf_counter() - begun
    return seen
