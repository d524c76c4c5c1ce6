"""Keep-alive HTTP clients, and what they saw. One event loop and no library between: the client shares the machine with
what it measures, so it must cost little, and what it costs is told.
"""

from __future__ import annotations

import asyncio
import http.client
import time
from collections.abc import Callable
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


class Target(NamedTuple):
    """Whom the clients ask, and as whom."""

    address: tuple[str, int]
    key: str


@dataclass
class Seen:
    """Latencies of the answers that came, and how many were not the ones hoped for."""

    seconds: list[float] = field(default_factory=list)
    begun: list[float] = field(default_factory=list)  # when each was due or sent, by CLOCK_MONOTONIC
    failures: int = 0
    elapsed: float = 0.0
    cpu: float = 0.0  # processor seconds of the clients themselves

    def slower_than(self, seconds: float) -> list[tuple[float, float]]:
        """Begin and end of the answers that took longer."""
        return [(begun, begun + took) for begun, took in zip(self.begun, self.seconds, strict=True) if took > seconds]

    @property
    def rate(self) -> float:
        """Answers a second."""
        return len(self.seconds) / self.elapsed

    def quantile(self, share: float) -> float:
        """Nearest rank, in seconds."""
        ordered = sorted(self.seconds)
        return ordered[min(len(ordered) - 1, int(share * len(ordered)))]


class Client:
    """One connection that stays open, for single requests."""

    def __init__(self, target: Target) -> None:
        self._connection = http.client.HTTPConnection(*target.address, timeout=60)
        self._headers = {"Authorization": f"Bearer {target.key}", "Content-Type": "application/json"}

    def send(self, request: Request) -> Answer:
        self._connection.request(request.method, request.path, request.body, self._headers | request.headers)
        answer = self._connection.getresponse()
        return Answer(answer.status, {name.lower(): value for name, value in answer.getheaders()}, answer.read())

    def close(self) -> None:
        self._connection.close()


Make = Callable[[int], Request]  # the n-th request of all
Judge = Callable[[int, Answer], bool]  # whether its answer was the one hoped for


def fine(_: int, answer: Answer) -> bool:
    return answer.status == 200


def as_fast_as_they_can(target: Target, make: Make, *, clients: int, requests: int, judge: Judge = fine) -> Seen:
    """Closed loop: each client asks again as soon as it is answered."""
    return asyncio.run(_run(target, make, judge, clients=clients, requests=requests, rate=None))


def at_rate(target: Target, make: Make, *, clients: int, rate: float, seconds: float, judge: Judge = fine) -> Seen:
    """Open loop: requests are due on a clock, and latency counts from when they were due (no coordinated omission)."""
    return asyncio.run(_run(target, make, judge, clients=clients, requests=int(rate * seconds), rate=rate))


async def _run(target: Target, make: Make, judge: Judge, *, clients: int, requests: int, rate: float | None) -> Seen:
    seen, numbers = Seen(), count()
    lines = [await asyncio.open_connection(*target.address) for _ in range(clients)]
    cpu, begun = time.process_time(), time.monotonic()

    async def work(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while (number := next(numbers)) < requests:
            start = time.monotonic() if rate is None else begun + number / rate
            if (early := start - time.monotonic()) > 0:
                await asyncio.sleep(early)
            writer.write(_written(make(number), target))
            answer = await _read(reader)
            seen.seconds.append(time.monotonic() - start)
            seen.begun.append(start)
            seen.failures += not judge(number, answer)
        writer.close()

    await asyncio.gather(*(work(*line) for line in lines))
    seen.elapsed, seen.cpu = time.monotonic() - begun, time.process_time() - cpu
    return seen


def _written(request: Request, target: Target) -> bytes:
    lines = [f"{request.method} {request.path} HTTP/1.1", "Host: x", f"Authorization: Bearer {target.key}"]
    lines += [f"{name}: {value}" for name, value in request.headers.items()]
    if request.body is not None:
        lines += ["Content-Type: application/json", f"Content-Length: {len(request.body)}"]
    return "\r\n".join([*lines, "", ""]).encode() + (request.body or b"")


async def _read(reader: asyncio.StreamReader) -> Answer:
    first, *lines = (await reader.readuntil(b"\r\n\r\n")).decode().split("\r\n")[:-2]
    headers = {name.lower(): value for name, _, value in (line.partition(": ") for line in lines)}
    body = await reader.readexactly(int(headers.get("content-length", 0)))
    return Answer(int(first.split(" ")[1]), headers, body)
