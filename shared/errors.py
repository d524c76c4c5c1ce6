"""Every error the service can name, each with a stable code. No HTTP numbers here: api/errors.py knows those.

TunepoolError
├── Invalid           the caller's fault: a field, its value, the remedy
├── Unauthenticated   no key, or not a live one
├── Forbidden         a live key that may not do this
├── NotFound          no such thing in the caller's project
├── Conflict          the thing exists and its state forbids this
├── TooLarge          more bytes than allowed
├── LimitReached      a quota, budget or rate is used up
└── Unavailable       a part we need is away; trying again is right
    └── NotYet        what was named is being prepared; its words are for the user
"""

from __future__ import annotations


class TunepoolError(Exception):
    """Base of all named errors.

    Args:
        message: one sentence for the user naming field, value and remedy.
        param: the request field at fault, in dotted form, or None.
        code: stable machine-readable code; defaults to the class's own.
    """

    code = "server_error"

    def __init__(self, message: str, *, param: str | None = None, code: str | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.param = param
        self.code = code or type(self).code


class Invalid(TunepoolError):
    code = "invalid_value"


class Unauthenticated(TunepoolError):
    code = "invalid_api_key"


class Forbidden(TunepoolError):
    code = "insufficient_permissions"


class NotFound(TunepoolError):
    code = "not_found"


class Conflict(TunepoolError):
    code = "conflict"


class TooLarge(TunepoolError):
    code = "file_too_large"


class LimitReached(TunepoolError):
    """`retry_after_seconds`: when asking again may help; None: as usual."""

    code = "rate_limit_exceeded"

    def __init__(
        self,
        message: str,
        *,
        param: str | None = None,
        code: str | None = None,
        retry_after_seconds: float | None = None,
    ) -> None:
        super().__init__(message, param=param, code=code)
        self.retry_after_seconds = retry_after_seconds


class Unavailable(TunepoolError):
    code = "service_unavailable"


class NotYet(Unavailable):
    """Its words are for users; those of other unavailable parts name addresses, and are for the operator."""
