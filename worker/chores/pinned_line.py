"""One request to an address that a user named, and its outcome in words for that user."""

from __future__ import annotations

import http.client
import time
from collections.abc import Mapping, Sequence
from typing import Final

from shared.chores.deliveries import SendResult
from shared.errors import Invalid
from shared.tenants.name_look_up import addresses as resolve
from shared.tenants.outward import Network
from shared.tenants.pinned_connection import Resolve, ask, words

ANSWER_BYTES: Final = 64 * 1024


class Unanswered(Exception):  # a fact, named as one
    """There was no answer; says why, for whoever named the address."""


def post(
    url: str,
    body: bytes,
    headers: Mapping[str, str],
    *,
    allowed: Sequence[Network],
    seconds: float,
    resolve: Resolve = resolve,
) -> SendResult:
    """Send `body`, and say what came of it. Only a 2xx is taken: a redirect is a failure, and is not followed."""
    began = time.monotonic()
    try:
        status, _ = exchange("POST", url, body, headers, allowed=allowed, seconds=seconds, resolve=resolve)
    except Unanswered as error:
        return SendResult(None, time.monotonic() - began, str(error))
    wrong = None if 200 <= status < 300 else f"It answered {status}."
    return SendResult(status, time.monotonic() - began, wrong)


def exchange(
    method: str,
    url: str,
    body: bytes | None,
    headers: Mapping[str, str],
    *,
    allowed: Sequence[Network],
    seconds: float,
    resolve: Resolve = resolve,
    answer_bytes: int = ANSWER_BYTES,
) -> tuple[int, bytes]:
    """The status of the answer, and its body up to `answer_bytes`. No redirect is followed. Raises Unanswered."""
    began = time.monotonic()
    try:
        answer = ask(
            method,
            url,
            body=body,
            headers=headers,
            allowed=allowed,
            seconds=seconds,
            most_bytes=answer_bytes,
            resolve=resolve,
        )
    except Invalid as error:
        raise Unanswered(error.message) from error
    except (OSError, http.client.HTTPException, ValueError) as error:
        late = time.monotonic() - began >= seconds
        raise Unanswered(words(TimeoutError() if late else error)) from error
    return answer.status, answer.body
