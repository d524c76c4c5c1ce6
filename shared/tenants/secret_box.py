"""Encrypts what must be read again, such as secrets that sign webhooks, by Fernet (AES-128-CBC and HMAC-SHA256).

The key is a setting of its own. It is not derived from the secret that signs links: that one may be changed at any
moment, at the cost of links that live for minutes, and every stored secret would be lost with it.
"""

from __future__ import annotations

from cryptography.fernet import Fernet, InvalidToken, MultiFernet

from shared.errors import Invalid
from shared.settings import Settings

_REMEDY = "make one by `openssl rand -base64 32 | tr '+/' '-_'`, and give it to every API and worker"


class SecretBox:
    """Raises Invalid from every method when no usable key is set."""

    def __init__(self, settings: Settings) -> None:
        self._keys = settings.secrets_key.get_secret_value()

    def close(self, text: str) -> str:
        """Encrypt with the first key."""
        return self._box().encrypt(text.encode()).decode()

    def open(self, sealed: str) -> str:
        """Decrypt with whichever key fits."""
        try:
            return self._box().decrypt(sealed.encode()).decode()
        except InvalidToken:
            raise Invalid(
                "A stored secret was encrypted with another TUNEPOOL_SECRETS_KEY; add that key behind a comma.",
                code="secrets_key_wrong",
            ) from None

    def _box(self) -> MultiFernet:
        keys = [key for key in self._keys.replace(" ", "").split(",") if key]
        if not keys:
            raise Invalid(
                f"This service stores no secrets: TUNEPOOL_SECRETS_KEY is not set; {_REMEDY}.",
                code="secrets_key_missing",
            )
        try:
            return MultiFernet([Fernet(key) for key in keys])
        except ValueError:
            raise Invalid(
                f"TUNEPOOL_SECRETS_KEY holds a key that is none; {_REMEDY}.", code="secrets_key_wrong"
            ) from None
