"""Signs download links for stores that cannot. A link is for one object, one method, and a short time."""

from __future__ import annotations

import base64
import binascii
import hashlib
import hmac
import json
import os
import secrets
import tempfile
import time
from contextlib import suppress
from pathlib import Path
from typing import Final

from shared.errors import Forbidden, Invalid
from shared.settings import Settings

MIN_SECRET_CHARACTERS: Final = 32


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
    if not file.exists():
        # Two processes may start at once. A reader of a file that is made but not yet written would sign with an
        # empty secret, so it is written elsewhere and appears whole.
        with tempfile.NamedTemporaryFile("w", dir=file.parent, prefix=".signing-secret-", encoding="utf-8") as draft:
            draft.write(secrets.token_urlsafe(32))
            draft.flush()
            with suppress(FileExistsError):
                os.link(draft.name, file)
    secret = file.read_text(encoding="utf-8")
    if len(secret) < MIN_SECRET_CHARACTERS:
        raise Invalid(
            f"{file} holds no usable secret; delete it, and a new one is made at the next start.",
            param="signing_secret",
        )
    return secret
