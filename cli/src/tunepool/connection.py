"""Finds the server and the key to use."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from tunepool import official
from tunepool.id_tokens import stored

if TYPE_CHECKING:
    from openai import OpenAI


class NoServerKnown(Exception):
    """Nothing says where the server is; the message says what would."""


@dataclass(frozen=True)
class Credentials:
    """What `tunepool-server up` leaves in `credentials.json`; of a signed-in job, what gives a live key."""

    base_url: str
    api_key: str | Callable[[], str] = field(repr=False)

    def client(self, *, timeout_seconds: float = 60.0) -> OpenAI:
        return official.OpenAI(base_url=self.base_url, api_key=self.api_key, timeout=timeout_seconds)


def read_credentials(home: Path) -> Credentials:
    """The credentials in a server's home. Raises NoServerKnown when there are none, or none that can be read."""
    file = home / "credentials.json"
    try:
        saved = json.loads(file.read_text(encoding="utf-8"))
        return Credentials(base_url=str(saved["base_url"]), api_key=str(saved["api_key"]))
    except OSError as error:
        remedy = (
            f"Set OPENAI_BASE_URL and OPENAI_API_KEY, or TUNEPOOL_HOME to a server's home ({file}: {error.strerror})."
        )
        raise NoServerKnown(remedy) from error
    except (ValueError, KeyError, TypeError) as error:
        raise NoServerKnown(f"{file} is not a credentials file.") from error


def find_credentials(home: Path, *, base_url: str | None, api_key: str | None) -> Credentials:
    """The server named outright, else the one that this job is signed in to, else the one of `home`.

    A key alone is not enough: with no base URL it belongs to some other service, and must not be sent here.
    """
    if base_url is not None and api_key is not None:
        return Credentials(base_url=base_url, api_key=api_key)
    login = stored(home)
    if login is not None and base_url in {None, login.base_url}:
        return Credentials(base_url=login.base_url, api_key=login.key)
    if base_url is None:
        return read_credentials(home)
    raise NoServerKnown(
        "OPENAI_BASE_URL is set and OPENAI_API_KEY is not; in a CI job `tunepool login --oidc` will do."
    )
