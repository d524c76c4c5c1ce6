"""The page as a browser without script uses it."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager

import httpx2

from tests.patience import patience


@contextmanager
def browser(url: str, key: str) -> Iterator[httpx2.Client]:
    """A client with the cookie of a sign-in, as a browser that follows no redirect."""
    with httpx2.Client(base_url=url, timeout=patience(20)) as client:
        answer = client.post("/ui/sign-in", data={"key": key, "to": "/ui/jobs"})
        assert answer.status_code == 303, answer.text
        yield client


def proof_of(client: httpx2.Client) -> str:
    """What the forms of this sign-in's pages carry."""
    return re.findall(r'name="proof" value="([0-9a-f]{64})"', client.get("/ui/account").text)[0]
