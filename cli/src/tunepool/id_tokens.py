"""ID tokens of the CI job that this runs in, and the keys that they are exchanged for.

A key lives no longer than its token: minutes at GitHub. There a job may ask for tokens as long as it runs, so a key is
renewed in time, by whichever command needs one.
"""

from __future__ import annotations

import json
import os
import tempfile
import threading
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final
from urllib.parse import urlsplit

import httpx2

from tunepool import official

STORED: Final = "oidc.json"
RENEWED_SECONDS: Final = 60.0  # before its end
GITLAB: Final = "TUNEPOOL_ID_TOKEN"
_GITHUB: Final = ("ACTIONS_ID_TOKEN_REQUEST_URL", "ACTIONS_ID_TOKEN_REQUEST_TOKEN")


class NoIdToken(Exception):
    """This job has no ID token to exchange; the message says what would give it one."""


def id_token(audience: str) -> str:
    """A token of this job, meant for `audience`. Raises NoIdToken."""
    url, bearer = (os.environ.get(name, "") for name in _GITHUB)
    if url and bearer:
        return _of_github(url, bearer, audience)
    if os.environ.get(GITLAB):
        return os.environ[GITLAB]
    raise NoIdToken(
        "This job has no ID token. In GitHub Actions give the job `permissions: id-token: write`; in GitLab CI give it"
        f" `id_tokens: {GITLAB}: aud: {audience}`."
    )


def _of_github(url: str, bearer: str, audience: str) -> str:
    try:
        answer = httpx2.get(
            httpx2.URL(url).copy_merge_params({"audience": audience}),
            headers={"Authorization": f"bearer {bearer}", "Accept": "application/json"},
            timeout=30.0,
        )
        return str(answer.raise_for_status().json()["value"])
    except (httpx2.HTTPError, ValueError, KeyError, TypeError) as error:
        raise NoIdToken(f"GitHub gave no ID token ({type(error).__name__}).") from None


def audience_of(base_url: str) -> str:
    """What a token for this server names, unless a rule says something else: its scheme and host."""
    split = urlsplit(base_url)
    return f"{split.scheme}://{split.netloc}"


@dataclass
class Login:
    """A server that this job signs in to, and the key at hand. Kept in a file of its user alone."""

    home: Path
    base_url: str
    audience: str
    rule: str | None = None
    expires_at: float = 0.0
    api_key: str = field(default="", repr=False)
    _lock: threading.Lock = field(default_factory=threading.Lock, repr=False, compare=False)

    def key(self) -> str:
        """A key that lives for a while yet. Raises NoIdToken, and what the openai client raises."""
        with self._lock:
            if self.expires_at - time.time() < RENEWED_SECONDS:
                self._renew()
            return self.api_key

    def _renew(self) -> None:
        try:
            token = id_token(self.audience)
        except NoIdToken:
            if time.time() < self.expires_at:  # nothing newer is to be had: the one at hand is good to its end
                return
            raise
        given = self._exchange(token)
        self.api_key, self.expires_at = str(given["access_token"]), time.time() + float(given["expires_in"])
        self._store()

    def _exchange(self, token: str) -> dict[str, Any]:
        wanted = {
            "grant_type": "urn:ietf:params:oauth:grant-type:token-exchange",
            "subject_token_type": "urn:ietf:params:oauth:token-type:id_token",
            "subject_token": token,
            "service_account_id": self.rule,
        }
        with official.OpenAI(base_url=self.base_url, api_key="none-yet", timeout=30.0) as client:
            answer: Any = client.post("/tunepool/oidc/token", cast_to=object, body=wanted)
        return dict(answer)

    def _store(self) -> None:
        names = ("base_url", "audience", "rule", "expires_at", "api_key")
        self.home.mkdir(parents=True, exist_ok=True)
        descriptor, path = tempfile.mkstemp(dir=self.home, prefix=STORED)  # 0600
        with os.fdopen(descriptor, "w", encoding="utf-8") as file:
            json.dump({name: getattr(self, name) for name in names}, file)
        Path(path).replace(self.home / STORED)


def stored(home: Path) -> Login | None:
    """What `tunepool login --oidc` left in a home; None when there is nothing that can be read."""
    try:
        saved = json.loads((home / STORED).read_text(encoding="utf-8"))
        return Login(
            home=home,
            base_url=str(saved["base_url"]),
            audience=str(saved["audience"]),
            rule=saved["rule"],
            expires_at=float(saved["expires_at"]),
            api_key=str(saved["api_key"]),
        )
    except (OSError, ValueError, KeyError, TypeError):
        return None
