"""Download links for stores that cannot sign their own: one object, one method, a short life."""

from __future__ import annotations

import base64
import binascii
import hashlib
import hmac
import json
import os
import secrets
import time
from pathlib import Path

from shared.errors import Forbidden
from shared.settings import Settings


class Links:
    """Makes and checks tokens: `base64url({key, name, until}).base64url(HMAC-SHA256)`."""

    def __init__(self, secret: bytes, *, seconds: int) -> None:
        self._secret = secret
        self._seconds = seconds

    def make(self, key: str, *, name: str) -> str:
        """A token for one object, downloaded as `name`."""
        until = int(time.time()) + self._seconds
        payload = _encode(json.dumps({"key": key, "name": name, "until": until}).encode())
        return f"{payload}.{self._sign(payload)}"

    def open(self, token: str) -> tuple[str, str]:
        """(key, name) of a token. Raises Forbidden when it was altered or its time is over."""
        payload, _, signature = token.partition(".")
        # As bytes: compare_digest refuses text beyond ASCII.
        if not hmac.compare_digest(signature.encode(), self._sign(payload).encode()):
            raise Forbidden(
                "This download link is not valid. Ask for the adapter again to get a new one.", code="invalid_link"
            )
        try:
            content = json.loads(base64.urlsafe_b64decode(payload + "=" * (-len(payload) % 4)))
        except (binascii.Error, ValueError) as error:
            raise Forbidden("This download link is not valid.", code="invalid_link") from error
        if content["until"] < time.time():
            raise Forbidden(
                "This download link has expired. Ask for the adapter again to get a new one.", code="expired_link"
            )
        return content["key"], content["name"]

    def _sign(self, payload: str) -> str:
        return _encode(hmac.new(self._secret, payload.encode(), hashlib.sha256).digest())


def _encode(raw: bytes) -> str:
    return base64.urlsafe_b64encode(raw).rstrip(b"=").decode()


def make_links(settings: Settings) -> Links:
    """With the configured secret, else with one kept in the home, made at the first start."""
    secret = settings.signing_secret.get_secret_value()
    return Links((secret or _kept_secret(settings.home / "signing-secret")).encode(), seconds=settings.link_seconds)


def _kept_secret(file: Path) -> str:
    file.parent.mkdir(parents=True, exist_ok=True)
    try:
        with open(file, "x", opener=_private, encoding="utf-8") as made:
            made.write(secrets.token_urlsafe(32))
    except FileExistsError:
        pass
    return file.read_text(encoding="utf-8")


def _private(path: str, flags: int) -> int:
    return os.open(path, flags, 0o600)
