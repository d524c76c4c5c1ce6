"""Admits a request: checks its key and the key's rate limit, and fills the headers that report both."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

from sqlalchemy import Connection
from starlette.requests import HTTPConnection

from shared.errors import LimitReached, Unauthenticated
from shared.tenants import keys
from shared.tenants.keys import Caller
from shared.tenants.rates import RateReading, Rates


@dataclass(frozen=True)
class Admission:
    """The limits of one process; the counts are everybody's (shared/tenants/rates.py)."""

    rates: Rates

    def caller(self, connect: Callable[[], Connection], request: HTTPConnection, bearer: str) -> Caller:
        """The owner of the key, who is whom the request names. Raises Unauthenticated, LimitReached.

        `connect`: to the database, for a single read.
        """
        try:
            caller = keys.authenticate_request(connect, bearer)
        except Unauthenticated:
            self.refused(request)
            raise
        _must_match(request, caller)
        return caller

    def refused(self, request: HTTPConnection) -> None:
        """Count a key or an ID token that is none. Raises LimitReached for an address that shows too many."""
        standing = self.rates.refuse(request.client.host if request.client else "unknown")
        if standing is not None and standing.wait_seconds:
            raise _too_often(
                f"Too many requests with keys that are none came from this address. Check the key, and try again in"
                f" {math.ceil(standing.wait_seconds)} s.",
                standing,
                code="too_many_failed_keys",
            ) from None

    def count(self, request: HTTPConnection, caller: Caller) -> None:
        """Count the request, once. Raises LimitReached."""
        headers: dict[str, str] = request.scope.setdefault("answer_headers", {})
        if "openai-organization" in headers:
            return
        headers["openai-organization"] = caller.organization_name.encode("ascii", "replace").decode()
        standing = self.rates.admit(key_id=caller.key_id, project_id=caller.project_id)
        if standing is None:
            return
        headers["x-ratelimit-limit-requests"] = str(standing.limit)
        headers["x-ratelimit-remaining-requests"] = str(max(0, standing.left))
        headers["x-ratelimit-reset-requests"] = _spelled(standing.reset_seconds)
        if standing.wait_seconds:
            raise _too_often(
                f"Rate limit reached for requests of this key or its project: {standing.limit} a minute. Try again in"
                f" {standing.wait_seconds:.3g} s, or ask for a higher limit.",
                standing,
                code="rate_limit_exceeded",
            )


def _must_match(request: HTTPConnection, caller: Caller) -> None:
    """The openai client names organization and project if its user set them. Raises Unauthenticated when not ours."""
    for part, own in (
        ("Organization", {caller.organization_id, caller.organization_name}),
        ("Project", {caller.project_id}),
    ):
        named = request.headers.get(f"openai-{part}".lower())
        if named and named not in own:
            raise Unauthenticated(
                f"The OpenAI-{part} header names '{named[:100]}', and this API key belongs to another one. Leave the"
                " header out, or use a key of that one.",
                code=f"mismatched_{part}".lower(),
            )


def _too_often(message: str, standing: RateReading, *, code: str) -> LimitReached:
    return LimitReached(message, code=code, retry_after_seconds=standing.wait_seconds)


def _spelled(seconds: float) -> str:
    """As OpenAI spells it: 120ms, 1.5s, 6m0s."""
    if seconds < 1:
        return f"{round(seconds * 1000)}ms"
    minutes, rest = divmod(seconds, 60)
    return f"{int(minutes)}m{round(rest)}s" if minutes else f"{round(rest, 2):g}s"
