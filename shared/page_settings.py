"""Settings for browsers: our page's sign-ins, a proxy that vouches for who is there, and pages of others."""

from __future__ import annotations

import re
from typing import Final

from pydantic import Field, SecretStr, field_validator
from pydantic_settings import BaseSettings

# As long as what `openssl rand -hex 16` prints.
PROXY_SECRET_CHARACTERS: Final = 32
# As browsers write it (RFC 6454, 6.2): in lower case, an IPv6 address in brackets.
_ORIGIN: Final = re.compile(r"[a-z][a-z0-9+.-]*://([a-z0-9._-]+|\[[0-9a-f:]+\])(:[0-9]{1,5})?")


class PageSettings(BaseSettings):
    page_idle_seconds: int = Field(
        default=8 * 3600, ge=60, description="A browser that asks nothing for so long is signed out of the page."
    )
    page_sign_in_seconds: int = Field(
        default=7 * 86400, ge=60, description="A browser signs in to the page again after this, whatever it does."
    )
    page_proxy_header: str = Field(
        default="",
        pattern=r"^([A-Za-z][A-Za-z0-9-]{0,99})?$",
        description="Header in which a proxy names who has signed in there; empty: nobody signs in by a proxy.",
    )
    page_proxy_secret: SecretStr = Field(
        default=SecretStr(""),
        description="What the proxy sends as X-Tunepool-Proxy-Secret, 32 characters or more; belongs to the header.",
    )

    cors_origins: str = Field(
        default="",
        description="Origins whose pages may ask the API from a browser, https://app.example.com, with commas; "
        "*: any; empty: none.",
    )

    @field_validator("cors_origins")
    @classmethod
    def _origins_are_origins(cls, text: str) -> str:
        for origin in _parts(text):
            if origin != "*" and not _ORIGIN.fullmatch(origin):
                raise ValueError(
                    f"TUNEPOOL_CORS_ORIGINS names '{origin}'; an origin is https://host[:port] in lower case, without a"
                    " path"
                )
        return text

    @property
    def allowed_origins(self) -> frozenset[str]:
        return frozenset(_parts(self.cors_origins))

    def refuse_half_a_proxy(self) -> None:
        """Raises ValueError. The API asks at its start; other processes may know the header alone, and need neither.

        A header alone would let anybody who reaches the API's port sign in as anybody.
        """
        secret = self.page_proxy_secret.get_secret_value()
        if bool(self.page_proxy_header) != bool(secret):
            raise ValueError("TUNEPOOL_PAGE_PROXY_HEADER and TUNEPOOL_PAGE_PROXY_SECRET go together: set both or none")
        if secret and len(secret) < PROXY_SECRET_CHARACTERS:
            raise ValueError(f"TUNEPOOL_PAGE_PROXY_SECRET needs {PROXY_SECRET_CHARACTERS} characters at least")


def _parts(text: str) -> list[str]:
    return [part.strip() for part in text.split(",") if part.strip()]
