"""The addresses of a name, in bounded time.

The system's resolver takes as long as the server of a name likes (half a minute and more), and a thread inside it
cannot be ended. So a process of its own asks, and is killed when its time is over: nothing of it stays, and nobody
else's look-up waits for it.
"""

from __future__ import annotations

import socket
import subprocess
import sys
from collections.abc import Sequence
from ipaddress import ip_address
from typing import Final

from shared.settings import trainer_environment

MOST_ADDRESSES: Final = 32  # of one name; further ones are not tried
_ASK: Final = """
import os, socket, sys
try:
    entries = socket.getaddrinfo(os.fsencode(sys.argv[1]), int(sys.argv[2]), type=socket.SOCK_STREAM)
except OSError:
    sys.exit(2)
print(*dict.fromkeys(entry[4][0] for entry in entries), sep="\\n")
"""
_PROGRAM: Final = (sys.executable, "-I", "-S", "-c", _ASK)


def addresses(host: str, port: int, seconds: float, *, program: Sequence[str] = _PROGRAM) -> list[str]:
    """Every address of a name (ASCII), in the system's order, at most 32. `program`: who asks, before its arguments.

    Raises TimeoutError when they are not known after `seconds`, socket.gaierror when there are none, OSError.
    """
    if _is_address(host):
        return [host]
    try:
        asked = subprocess.run(
            [*program, host, str(port)],
            cwd="/",
            env=trainer_environment(),  # another process of this user could read the whole one
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            timeout=max(seconds, 0.0),
            check=False,
        )
    except subprocess.TimeoutExpired:
        raise TimeoutError from None
    lines = asked.stdout.decode("ascii", "replace").split()
    if asked.returncode != 0 or not lines:
        raise socket.gaierror(socket.EAI_NONAME, "no address")
    return lines[:MOST_ADDRESSES]


def _is_address(host: str) -> bool:
    try:
        ip_address(host)
    except ValueError:
        return False
    return True
