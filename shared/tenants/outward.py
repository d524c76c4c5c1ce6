"""To which addresses that users name our requests may go: the public internet, and networks that an operator allows.

A name may stand for an address inside our network, and for another one the next moment (DNS rebinding). So whoever
connects resolves it once, asks here about every address, and connects to one of these and nothing else.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from ipaddress import IPv4Address, IPv4Network, IPv6Address, IPv6Network, ip_address, ip_network
from typing import Final
from urllib.parse import SplitResult, urlsplit

from shared.errors import Invalid

Address = IPv4Address | IPv6Address
Network = IPv4Network | IPv6Network
MAX_URL_CHARACTERS: Final = 2000


def networks(text: str) -> tuple[Network, ...]:
    """The networks of a setting, by commas. Raises ValueError."""
    return tuple(ip_network(part.strip()) for part in text.split(",") if part.strip())


_NAT64: Final = ip_network("64:ff9b::/96")  # RFC 6052: the last four bytes are an IPv4 address
# IANA's registries of special addresses and RFC 4291 have them, and Python's `is_global` calls them global: the former
# private range of IPv6 (RFC 3879), documentation, protocols of the network itself, relays of 6to4.
_SPECIAL: Final = networks("fec0::/10, 3fff::/20, 192.0.0.0/24, 192.88.99.0/24")
_PORTS: Final = {"https": 443, "http": 80}


class NotAllowed(Invalid):
    """An address that requests of ours may not go to."""

    code = "address_not_allowed"


@dataclass(frozen=True, slots=True)
class Destination:
    """A URL, taken apart."""

    scheme: str
    host: str
    port: int
    path: str


def target(url: str, *, allowed: Sequence[Network]) -> Destination:
    """The parts of a URL that may be sent to as far as it says itself. Raises Invalid.

    Plain http is for allowed networks alone, which shows when its host is an address; a name is looked up later.
    """
    split = _split(url)
    host = split.hostname or ""
    if split.scheme not in _PORTS or not host:
        raise Invalid("'url' must be https://host[:port]/path.", param="url")
    if split.username is not None or split.password is not None or split.fragment:
        raise Invalid("'url' must hold no user, no password and no fragment.", param="url")
    literal = _literal(host)
    if literal is not None:
        refuse(literal, allowed=allowed)
    if split.scheme == "http" and not allowed:
        raise Invalid("'url' must begin with https://; http:// is for networks that the operator allows.", param="url")
    path = (split.path or "/") + (f"?{split.query}" if split.query else "")
    return Destination(split.scheme, host, split.port or _PORTS[split.scheme], path)


def _split(url: str) -> SplitResult:
    plain = url.isascii() and url.isprintable() and " " not in url and "\\" not in url
    if not plain or len(url) > MAX_URL_CHARACTERS:
        raise Invalid(
            f"'url' must be printable ASCII without spaces, of at most {MAX_URL_CHARACTERS} characters.", param="url"
        )
    try:
        split = urlsplit(url)
        _ = split.port
    except ValueError as error:
        raise Invalid(f"'url' is no URL: {error}.", param="url") from None
    return split


def _literal(host: str) -> Address | None:
    try:
        return ip_address(host)
    except ValueError:
        return None


def refuse(address: Address, *, allowed: Sequence[Network], plain: bool = False) -> None:
    """Raises NotAllowed unless requests may go to `address`; `plain`: unencrypted, to allowed networks only."""
    inner = _inner(address)
    if _within(inner, allowed):
        return
    if plain or not inner.is_global or inner.is_multicast or inner.is_reserved or _within(inner, _SPECIAL):
        raise NotAllowed(
            f"The address {address} is not on the public internet, or http:// is not allowed there."
            " An operator may allow its network by TUNEPOOL_WEBHOOK_NETWORKS (webhooks) or TUNEPOOL_OIDC_NETWORKS"
            " (issuers of ID tokens).",
            param="url",
        )


def _within(address: Address, held: Sequence[Network]) -> bool:
    return any(address.version == network.version and address in network for network in held)


def _inner(address: Address) -> Address:
    """The address that a packet would reach in the end, where one holds another (mapped, 6to4, Teredo, NAT64)."""
    if isinstance(address, IPv4Address):
        return address
    if address in _NAT64:
        return IPv4Address(int(address) & 0xFFFFFFFF)
    return address.ipv4_mapped or address.sixtofour or (address.teredo[1] if address.teredo else address)
