"""The authorities that this machine trusts are read once in a process, however many clients its tests make.

To read them is 15 to 25 ms of a core, for each client anew, and most clients of the tests speak no TLS at all. Where a
test names other authorities in the environment, those are read.
"""

from __future__ import annotations

import os
import ssl
from functools import cache
from typing import Final

import httpcore2

_read: Final = httpcore2.default_ssl_context
_NAMED: Final = ("SSL_CERT_FILE", "SSL_CERT_DIR")


@cache
def _known(*_named: str | None) -> ssl.SSLContext:
    return _read(_trust_env=any(_named))


def _default_ssl_context(*, _trust_env: bool = True) -> ssl.SSLContext:
    return _known(*(os.environ.get(name) if _trust_env else None for name in _NAMED))


httpcore2.default_ssl_context = _default_ssl_context
