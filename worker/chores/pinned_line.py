"""One POST to an address that a user named: resolved once, no redirect, in bounded time.

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
from ipaddress import ip_address
from typing import Final

from shared.chores.deliveries import SendResult
from shared.errors import Invalid
from shared.tenants import outward
from shared.tenants.outward import Destination, Network

ANSWER_BYTES: Final = 64 * 1024
Resolve = Callable[[str, int], Sequence[str]]


def resolve(host: str, port: int) -> list[str]:
    """Every address of a name, in the system's order. Raises OSError."""
    return list(dict.fromkeys(str(entry[4][0]) for entry in socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)))


def post(
    url: str,
    body: bytes,
    headers: Mapping[str, str],
    *,
    allowed: Sequence[Network],
    seconds: float,
    resolve: Resolve = resolve,
) -> SendResult:
    """Send `body`, and say what came of it. Only a 2xx is taken: a redirect is a failure, and is not followed."""
    began = time.monotonic()
    try:
        target = outward.target(url, allowed=allowed)
        status = _send(target, _addresses(target, allowed, resolve), body, headers, seconds=seconds)
    except Invalid as error:
        return SendResult(None, time.monotonic() - began, error.message)
    except (OSError, http.client.HTTPException, ValueError) as error:
        took = time.monotonic() - began
        return SendResult(None, took, _words(TimeoutError() if took >= seconds else error))
    wrong = None if 200 <= status < 300 else f"It answered {status}."
    return SendResult(status, time.monotonic() - began, wrong)


def _addresses(target: Destination, allowed: Sequence[Network], resolve: Resolve) -> Sequence[str]:
    """Where the name leads, after every address has been looked at. Raises NotAllowed, OSError."""
    addresses = resolve(target.host, target.port)
    for address in addresses:
        outward.refuse(ip_address(address.partition("%")[0]), allowed=allowed, plain=target.scheme == "http")
    if not addresses:
        raise socket.gaierror
    return addresses


def _send(
    target: Destination, addresses: Sequence[str], body: bytes, headers: Mapping[str, str], *, seconds: float
) -> int:
    line = _PinnedLine(target, addresses, seconds=seconds)
    # Each byte may come just in time for the socket; the whole may not take longer all the same.
    alarm = threading.Timer(seconds, line.cut)
    alarm.daemon = True
    alarm.start()
    try:
        line.request("POST", target.path, body=body, headers=dict(headers))
        answer = line.getresponse()
        answer.read(ANSWER_BYTES)
        if line.was_cut:  # what came until then may look like a whole answer
            raise TimeoutError
        return answer.status
    finally:
        alarm.cancel()
        line.close()


class _PinnedLine(http.client.HTTPConnection):
    """A connection to the first address that takes it. The name is for the Host header and the certificate only."""

    def __init__(self, target: Destination, addresses: Sequence[str], *, seconds: float) -> None:
        super().__init__(target.host, target.port, timeout=seconds)
        self.default_port = {"https": 443, "http": 80}[target.scheme]  # as in Host, which names no usual port
        self._target, self._addresses, self._seconds = target, addresses, seconds
        self.was_cut = False

    def connect(self) -> None:
        for left, address in enumerate(self._addresses, 1 - len(self._addresses)):
            try:
                self.sock = socket.create_connection((address, self._target.port), timeout=self._seconds)
                break
            except OSError:
                if left == 0:
                    raise
        if self._target.scheme == "https":
            self.sock = ssl.create_default_context().wrap_socket(self.sock, server_hostname=self._target.host)

    def cut(self) -> None:
        """End whatever waits for the other side."""
        self.was_cut = True
        if self.sock is not None:
            with suppress(OSError):
                self.sock.shutdown(socket.SHUT_RDWR)


def _words(error: Exception) -> str:
    """For the webhook's owner: what happened, without our network's details."""
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
