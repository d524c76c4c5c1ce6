"""Where the hosts of one attempt meet: an address of the leader's, a free port, and a name that nobody can guess."""

from __future__ import annotations

import contextlib
import secrets
import socket
from ipaddress import ip_address
from typing import Final

import psutil
import structlog
from sqlalchemy.engine import make_url

from shared.errors import Unavailable
from shared.lease.values import Lease, MeetingPlace
from shared.settings import Settings

log = structlog.get_logger()

LOOPBACK: Final = "127.0.0.1"


def choose(settings: Settings, lease: Lease, *, apart: bool) -> MeetingPlace:
    """A meeting point on this host, for hosts that may be the same one (`apart` is False: tests, two workers of one).

    Raises:
        Unavailable: no port of the range is free, or other hosts do not reach this one.
    """
    address = own_address(settings)
    if apart and _is_loopback(address):
        raise Unavailable(
            f"Other hosts cannot reach this one at {address}; set TUNEPOOL_GANG_ADDRESS to its address on the pool's"
            " network."
        )
    # Job and fence for people; the random part, so that no host of an older attempt that still knocks is let in.
    name = f"{lease.id}-{lease.fence}-{secrets.token_hex(8)}"
    return MeetingPlace(name=name, address=address, port=free_port(settings.gang_ports))


def own_address(settings: Settings) -> str:
    """The setting; else the address from which this host reaches the database, as all hosts of a pool do.

    Raises:
        Unavailable: there is no way to the database's host.
    """
    if settings.gang_address:
        return settings.gang_address
    database = make_url(settings.database_url)
    host = str(database.host or database.query.get("host", ""))
    if not host or host.startswith("/"):  # a socket in the file system: everything is on this machine
        return LOOPBACK
    try:
        addresses = socket.getaddrinfo(host, database.port or 5432, type=socket.SOCK_DGRAM)
        family, kind, _, _, address = addresses[0]
        with socket.socket(family, kind) as probe:
            probe.connect(address)  # UDP: nothing is sent, the kernel only chooses the way
            return str(probe.getsockname()[0])
    except OSError as error:  # a name that does not resolve, no way to it
        raise Unavailable(
            f"This host finds no way to the database's host '{host}' ({error}); set TUNEPOOL_GANG_ADDRESS to its own "
            "address on the pool's network."
        ) from error


def _is_loopback(address: str) -> bool:
    try:
        return ip_address(address).is_loopback
    except ValueError:  # a name
        return address == "localhost"


def free_port(ports: str) -> int:
    """A port of the range (`low-high`; empty: any) on which nobody listens now. Raises Unavailable."""
    low, _, high = ports.partition("-")
    for port in range(int(low), int(high) + 1) if ports else (0,):
        with contextlib.suppress(OSError), socket.create_server(("", port)) as free:
            return int(free.getsockname()[1])
    raise Unavailable(f"No port of TUNEPOOL_GANG_PORTS={ports} is free on this host; widen the range.")


def interface(address: str) -> str | None:
    """The network interface that has the address (or name); None when none has, as behind an address translation."""
    with contextlib.suppress(OSError):
        meant = {str(info[4][0]) for info in socket.getaddrinfo(address, None)}
        for name, addresses in psutil.net_if_addrs().items():
            if any(entry.address in meant for entry in addresses):
                return str(name)
    log.warning("meeting.no_interface", address=address, remedy="set TUNEPOOL_GANG_ADDRESS to an address of this host")
    return None
