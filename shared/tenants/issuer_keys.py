"""The keys that issuers of ID tokens sign with: found as OpenID Connect Discovery 1.0 says, kept for an hour.

Anybody may send a token that names any key, so an unknown key is no reason to ask its issuer again and again.
"""

from __future__ import annotations

import base64
import http.client
import json
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Final

import structlog
from joserfc.errors import JoseError
from joserfc.jwk import ECKey, RSAKey

from shared.errors import Invalid, NotYet, Unauthenticated
from shared.tenants import pinned_connection
from shared.tenants.outward import Network

log = structlog.get_logger()

FRESH_SECONDS: Final = 3600.0
STALE_SECONDS: Final = 6 * 3600.0  # while an issuer is away, its keys are believed so long
LOOK_SECONDS: Final = 60.0  # between two looks
RETRY_SECONDS: Final = 10.0  # after one that failed
FETCH_SECONDS: Final = 5.0
MOST_BYTES: Final = 256 * 1024
MOST_KEYS: Final = 100
RSA_BITS: Final = range(2048, 8193)
_DISCOVERY: Final = "/.well-known/openid-configuration"


@dataclass(frozen=True, slots=True)
class IssuerKey:
    """A public key, and the one algorithm that it is taken for, whatever a token says."""

    key: RSAKey | ECKey
    algorithm: str


KeysById = Mapping[str, IssuerKey]


class NoKeys(Exception):
    """An issuer's keys cannot be had; the message is for the operator."""


@dataclass
class _Known:
    """What is known of one issuer, on the monotonic clock."""

    keys: KeysById = field(default_factory=dict)
    fetched_at: float | None = None
    next_look: float = 0.0
    looking: threading.Lock = field(default_factory=threading.Lock)


class IssuerKeys:
    """The keys of a closed list of issuers. One thread at a time asks an issuer; nobody waits for it."""

    def __init__(
        self,
        issuers: Sequence[str],
        fetch: Callable[[str], KeysById],
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._fetch, self._clock = fetch, clock
        self._known = {issuer: _Known(next_look=clock()) for issuer in issuers}

    def __contains__(self, issuer: object) -> bool:
        return issuer in self._known

    def find(self, issuer: str, key_id: str) -> IssuerKey:
        """The key of that id. Raises Unauthenticated when the issuer has none, NotYet when it cannot be asked."""
        known = self._known[issuer]
        if key_id not in known.keys or self._age(known) > FRESH_SECONDS:
            self._look(issuer, known)
        if self._age(known) > STALE_SECONDS:
            raise NotYet(
                f"The signing keys of {issuer} cannot be had at the moment. Try again shortly.",
                code="oidc_issuer_unavailable",
            )
        if key_id not in known.keys:
            raise Unauthenticated(
                "This ID token is signed with a key that its issuer does not publish.", code="invalid_id_token"
            )
        return known.keys[key_id]

    def _age(self, known: _Known) -> float:
        return float("inf") if known.fetched_at is None else self._clock() - known.fetched_at

    def _look(self, issuer: str, known: _Known) -> None:
        if self._clock() < known.next_look or not known.looking.acquire(blocking=False):
            return
        try:
            known.keys = self._fetch(issuer)
            known.fetched_at = self._clock()
            known.next_look = self._clock() + LOOK_SECONDS
        except NoKeys as error:
            known.next_look = self._clock() + RETRY_SECONDS
            log.warning("oidc.issuer_away", issuer=issuer, error=str(error)[:300])
        finally:
            known.looking.release()


def fetch_keys(issuer: str, *, allowed: Sequence[Network], seconds: float = FETCH_SECONDS) -> KeysById:
    """Ask an issuer for its keys. Raises NoKeys."""
    document = _document(issuer.rstrip("/") + _DISCOVERY, allowed=allowed, seconds=seconds)
    if document.get("issuer") != issuer:  # OpenID Connect Discovery 1.0, section 4.3
        raise NoKeys(f"its configuration is that of {str(document.get('issuer'))[:200]!r}")
    address = document.get("jwks_uri")
    if not isinstance(address, str):
        raise NoKeys("its configuration names no jwks_uri")
    listed = _document(address, allowed=allowed, seconds=seconds).get("keys")
    if not isinstance(listed, list) or len(listed) > MOST_KEYS:
        raise NoKeys(f"its key set holds no list of at most {MOST_KEYS} keys")
    usable = {entry["kid"]: key for entry in listed if (key := _signing_key(entry)) is not None}
    if not usable:
        raise NoKeys("its key set holds no RSA or P-256 key with an id")
    return usable


def _document(url: str, *, allowed: Sequence[Network], seconds: float) -> dict[str, Any]:
    headers = {"Accept": "application/json", "User-Agent": "tunepool"}
    try:
        reply = pinned_connection.ask(
            "GET", url, headers=headers, allowed=allowed, seconds=seconds, most_bytes=MOST_BYTES + 1
        )
    except Invalid as error:
        raise NoKeys(error.message) from None
    except (OSError, http.client.HTTPException, ValueError) as error:
        raise NoKeys(f"{url[:200]}: {pinned_connection.words(error)}") from None
    if reply.status != 200:
        raise NoKeys(f"{url[:200]} answered {reply.status}")
    if len(reply.body) > MOST_BYTES:
        raise NoKeys(f"{url[:200]} is longer than {MOST_BYTES} bytes")
    try:
        document = json.loads(reply.body)
    except (ValueError, RecursionError):
        document = None
    if not isinstance(document, dict):
        raise NoKeys(f"{url[:200]} is no JSON object")
    return document


def _signing_key(entry: Any) -> IssuerKey | None:
    """A key of a key set (RFC 7517), by its public members alone; None for one that signs no token of ours."""
    if not isinstance(entry, dict) or not isinstance(entry.get("kid"), str) or entry.get("use", "sig") != "sig":
        return None
    members = {"RSA": ("n", "e"), "EC": ("crv", "x", "y")}.get(str(entry.get("kty")), ())
    public: dict[str, str | list[str]] = {
        "kty": str(entry.get("kty")),
        **{name: str(entry.get(name)) for name in members},
    }
    try:
        taken = _rsa(public) if "n" in members else _p256(public) if members else None
    except (JoseError, ValueError, TypeError):
        return None
    return taken if taken is not None and entry.get("alg", taken.algorithm) == taken.algorithm else None


def _rsa(public: dict[str, str | list[str]]) -> IssuerKey | None:
    modulus = str(public["n"])
    if len(modulus) > RSA_BITS.stop:  # of base64: longer than any key that is taken
        return None
    bits = int.from_bytes(base64.urlsafe_b64decode(modulus + "===")).bit_length()
    return IssuerKey(RSAKey.import_key(public), "RS256") if bits in RSA_BITS else None


def _p256(public: dict[str, str | list[str]]) -> IssuerKey | None:
    return IssuerKey(ECKey.import_key(public), "ES256") if public["crv"] == "P-256" else None
