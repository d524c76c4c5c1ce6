"""How a pipeline talks to the server: plain HTTP for simple requests, the official client for everything else.

A push that changed nothing needs five answers, and importing the official client takes longer than all of them.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any, Final

import httpx2

from tunepool.connection import Credentials

if TYPE_CHECKING:
    from openai import APIStatusError, OpenAI

PATIENCE_SECONDS: Final = 20.0  # then the official client asks, which waits for longer and asks again


def error_code(error: APIStatusError) -> str:
    return str(error.body.get("code")) if isinstance(error.body, dict) else ""


@dataclass
class Service:
    """A server and the key to it."""

    credentials: Credentials

    @cached_property
    def client(self) -> OpenAI:
        return self.credentials.client()

    def get(self, path: str) -> dict[str, Any]:
        """The answer at a path below the base URL. Raises what the official client raises."""
        plainly = self._plainly(path)
        if plainly is None:
            plainly = self.client.get(f"/{path}" if not path.startswith("..") else self._url(path), cast_to=object)
        assert isinstance(plainly, dict)
        return plainly

    def post(self, path: str, body: dict[str, Any] | None = None) -> dict[str, Any]:
        answer = self.client.post(f"/{path}", cast_to=object, body=body)
        assert isinstance(answer, dict)
        return answer

    def page_of(self, job_id: str) -> str:
        """Where people see the job."""
        return f"{self.credentials.base_url.rstrip('/').removesuffix('/v1')}/ui/jobs/{job_id}"

    def _plainly(self, path: str) -> Any:
        """The answer, or None for whatever is not 200 and JSON: the official client knows what to do then."""
        try:
            answer = self._connection.get(self._url(path), headers={"Authorization": f"Bearer {self._key()}"})
            return answer.json() if answer.status_code == httpx2.codes.OK else None
        except (httpx2.HTTPError, httpx2.InvalidURL, json.JSONDecodeError, UnicodeError):
            return None

    def _url(self, path: str) -> str:
        return str(httpx2.URL(self.credentials.base_url.rstrip("/") + "/").join(path))

    def _key(self) -> str:
        key = self.credentials.api_key
        return key if isinstance(key, str) else key()

    @cached_property
    def _connection(self) -> httpx2.Client:
        return httpx2.Client(timeout=PATIENCE_SECONDS)
