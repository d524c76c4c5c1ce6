"""ID tokens of OpenID Connect, such as GitHub and GitLab give to their CI jobs: whether one is what it says it is.

The signature is checked by joserfc, with the algorithm that the issuer's key is for: never with the one that a token
chooses (RFC 8725, section 3.1). Whose tokens open what is in oidc_rules.py.
"""

from __future__ import annotations

import base64
import binascii
import json
import re
import time
from collections.abc import Callable
from functools import partial
from typing import Any, Final

from joserfc import jwt
from joserfc.errors import ExpiredTokenError, JoseError
from joserfc.jws import JWSRegistry
from joserfc.jwt import ClaimsOption

from shared.errors import Unauthenticated
from shared.settings import Settings
from shared.tenants import outward
from shared.tenants.issuer_keys import IssuerKeys, fetch_keys

LEEWAY_SECONDS: Final = 60
MOST_CHARACTERS: Final = 16 * 1024
ALGORITHMS: Final = frozenset({"RS256", "ES256"})
Claims = dict[str, Any]
_COMPACT: Final = re.compile(r"([A-Za-z0-9_-]+)\.([A-Za-z0-9_-]+)\.[A-Za-z0-9_-]+")


class BadToken(Unauthenticated):
    """An ID token that proves nothing."""

    code = "invalid_id_token"


class IdTokens:
    """Checks the tokens of the issuers that an operator allows."""

    def __init__(
        self, settings: Settings, *, keys: IssuerKeys | None = None, now: Callable[[], float] = time.time
    ) -> None:
        self.issuers = tuple(filter(None, (part.strip() for part in settings.oidc_issuers.split(","))))
        fetch = partial(fetch_keys, allowed=outward.networks(settings.oidc_networks))
        self._keys = IssuerKeys(self.issuers, fetch) if keys is None else keys
        self._now = now

    def verify(self, token: str) -> Claims:
        """The claims of a token whose issuer says so now. It may ask the issuer for its keys. Raises BadToken, NotYet.

        Whom the token is meant for (`aud`) is for the rules to say.
        """
        header, claims = _unverified(token)
        issuer, key_id = claims.get("iss"), header.get("kid")
        if header.get("alg") not in ALGORITHMS:
            raise BadToken(f"ID tokens must be signed by {' or '.join(sorted(ALGORITHMS))}.")
        if not isinstance(key_id, str) or not key_id:
            raise BadToken("The ID token does not name its key ('kid').")
        if not isinstance(issuer, str) or issuer not in self._keys:
            raise BadToken("The issuer of this ID token is not allowed here; an operator sets TUNEPOOL_OIDC_ISSUERS.")
        signing = self._keys.find(issuer, key_id)
        registry = JWSRegistry(algorithms=[signing.algorithm], strict_check_header=False)
        try:
            proven = jwt.decode(token, signing.key, registry=registry).claims
        except (JoseError, ValueError, RecursionError):
            raise BadToken("The signature of this ID token does not fit.") from None
        self._check(proven, issuer)
        return proven

    def _check(self, claims: Claims, issuer: str) -> None:
        essential: dict[str, ClaimsOption] = {name: {"essential": True} for name in ("sub", "aud", "exp", "iat")}
        registry = jwt.JWTClaimsRegistry(
            now=int(self._now()), leeway=LEEWAY_SECONDS, iss={"essential": True, "value": issuer}, **essential
        )
        try:
            registry.validate(claims)
        except ExpiredTokenError:
            raise BadToken("This ID token has expired; ask its issuer for a new one.") from None
        except JoseError as error:
            raise BadToken(f"The ID token is not accepted: {error.description or error.error}."[:300]) from None


def _unverified(token: str) -> tuple[Claims, Claims]:
    """What a token says of itself, which nothing proves yet. Raises BadToken."""
    compact = _COMPACT.fullmatch(token) if len(token) <= MOST_CHARACTERS else None
    if compact is None:
        raise BadToken(f"This is no signed ID token of at most {MOST_CHARACTERS} characters.")
    try:
        header, claims = (json.loads(base64.urlsafe_b64decode(part + "===")) for part in compact.groups())
    except (ValueError, RecursionError, binascii.Error):
        header = claims = None
    if not isinstance(header, dict) or not isinstance(claims, dict):
        raise BadToken("This ID token cannot be read.")
    return header, claims
