"""One request to an address that a user named: resolved once, no redirect, in bounded time, its look-up included.

Not by an HTTP library that resolves names itself: between a look at an address and a connection by name, the name may
change (DNS rebinding). No proxy of the environment is asked either.
"""

from __future__ import annotations

import http.client
import socket
import ssl
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from ipaddress import ip_address

from shared.tenants import outward
from shared.tenants.name_look_up import addresses as resolve
from shared.tenants.outward import Destination, Network

Resolve = Callable[[str, int, float], Sequence[str]]  # of a name and a port, within so many seconds


@dataclass(frozen=True, slots=True)
class Reply:
    """What came back: the status, and the body as far as it was wanted."""

    status: int
    body: bytes


def ask(
    method: str,
    url: str,
    *,
    headers: Mapping[str, str],
    allowed: Sequence[Network],
    seconds: float,
    most_bytes: int,
    body: bytes | None = None,
    resolve: Resolve = resolve,
) -> Reply:
    """Send one request. At most `most_bytes` of the answer are read; a redirect is an answer, and is not followed.

    `seconds` bound the whole of it: the look-up of the name, the connection, and the answer.

    Raises Invalid for an address that may not be asked, OSError, http.client.HTTPException, ValueError.
    """
    began = time.monotonic()
    target = outward.target(url, allowed=allowed)
    addresses = _addresses(target, allowed, partial(resolve, target.host, target.port, seconds))
    left = max(began + seconds - time.monotonic(), 0.001)
    line = _PinnedLine(target, addresses, seconds=left)
    # Each byte may come just in time for the socket; the whole may not take longer all the same.
    alarm = threading.Timer(left, line.cut)
    alarm.daemon = True
    alarm.start()
    try:
        line.request(method, target.path, body=body, headers=dict(headers))
        answer = line.getresponse()
        content = answer.read(most_bytes)
        if line.was_cut:  # what came until then may look like a whole answer
            raise TimeoutError
        return Reply(answer.status, content)
    finally:
        alarm.cancel()
        line.close()


def _addresses(target: Destination, allowed: Sequence[Network], resolve: Callable[[], Sequence[str]]) -> Sequence[str]:
    """Where the name leads, after every address has been looked at. Raises NotAllowed, OSError."""
    addresses = resolve()
    for address in addresses:
        outward.refuse(ip_address(address.partition("%")[0]), allowed=allowed, plain=target.scheme == "http")
    if not addresses:
        raise socket.gaierror
    return addresses


class _PinnedLine(http.client.HTTPConnection):
    """A connection to the first address that takes it. The name is for the Host header and the certificate only."""

    def __init__(self, target: Destination, addresses: Sequence[str], *, seconds: float) -> None:
        super().__init__(target.host, target.port, timeout=seconds)
        self.default_port = {"https": 443, "http": 80}[target.scheme]  # as in Host, which names no usual port
        self._target, self._addresses, self._seconds = target, addresses, seconds
        self.was_cut = False
        self._wire: socket.socket | None = None  # `sock` goes to the answer, and is None here, when that ends the line

    def connect(self) -> None:
        until = time.monotonic() + self._seconds  # for all of them: a name may have many that nobody answers at
        for left, address in enumerate(self._addresses, 1 - len(self._addresses)):
            try:
                seconds = max(until - time.monotonic(), 0.001)
                self.sock = socket.create_connection((address, self._target.port), timeout=seconds)
                break
            except OSError:
                if left == 0:
                    raise
        if self.was_cut:  # before there was anything to cut
            raise TimeoutError
        if self._target.scheme == "https":
            self.sock = ssl.create_default_context().wrap_socket(self.sock, server_hostname=self._target.host)
        self._wire = self.sock

    def cut(self) -> None:
        """End whatever waits for the other side."""
        self.was_cut = True
        wire = self._wire or self.sock
        if wire is not None:
            with suppress(OSError):
                wire.shutdown(socket.SHUT_RDWR)


def words(error: Exception) -> str:
    """What happened, without our network's details."""
    match error:
        case TimeoutError():
            return "It did not answer in time."
        case socket.gaierror():
            return "Its name has no address."
        case ssl.SSLError():
            return f"Its certificate or TLS is not accepted: {error.reason or 'unknown'}"[:200]
        case ConnectionRefusedError():
            return "It refused the connection."
        case _:
            return f"The connection failed ({type(error).__name__})."
