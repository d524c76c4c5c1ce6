"""Sign-in by a proxy: it names the visitor, and must first prove that it is the proxy. For the page only."""

from __future__ import annotations

import hmac
from typing import Final

from fastapi import Request

from shared.settings import Settings

PROOF: Final = "x-tunepool-proxy-secret"
_LONGEST: Final = 200


def person(request: Request, settings: Settings) -> str | None:
    """Who has signed in at the proxy; None without one, and for a request that did not come through it.

    A header that comes twice is nobody's: one of the two may be what the browser sent and the proxy let through.
    """
    secret = settings.page_proxy_secret.get_secret_value()
    if not settings.page_proxy_header or not secret:
        return None
    shown = request.headers.getlist(PROOF)
    if len(shown) != 1 or not hmac.compare_digest(shown[0].encode(), secret.encode()):
        return None
    named = request.headers.getlist(settings.page_proxy_header)
    if len(named) != 1:
        return None
    name = named[0].strip()
    return name if name and len(name) <= _LONGEST and name.isprintable() else None
