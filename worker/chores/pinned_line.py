"""One POST to a webhook, and what came of it."""

from __future__ import annotations

import http.client
import time
from collections.abc import Mapping, Sequence
from typing import Final

from shared.chores.deliveries import SendResult
from shared.errors import Invalid
from shared.tenants.outward import Network
from shared.tenants.pinned_connection import Resolve, ask, resolve, words

ANSWER_BYTES: Final = 64 * 1024


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
        status = ask(
            "POST",
            url,
            body=body,
            headers=headers,
            allowed=allowed,
            seconds=seconds,
            most_bytes=ANSWER_BYTES,
            resolve=resolve,
        ).status
    except Invalid as error:
        return SendResult(None, time.monotonic() - began, error.message)
    except (OSError, http.client.HTTPException, ValueError) as error:
        took = time.monotonic() - began
        return SendResult(None, took, words(TimeoutError() if took >= seconds else error))
    wrong = None if 200 <= status < 300 else f"It answered {status}."
    return SendResult(status, time.monotonic() - began, wrong)
