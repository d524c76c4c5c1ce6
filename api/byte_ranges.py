"""Which bytes of an object a request wants (RFC 9110, 14): one range, or all of them."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Final

_ONE_RANGE: Final = re.compile(r"bytes=[ \t]*([0-9]{0,18})-([0-9]{0,18})[ \t]*", re.IGNORECASE)


class OutOfRange(Exception):
    """The range begins behind the object's end, or is empty."""


@dataclass(frozen=True, slots=True)
class ByteRange:
    """Half open: `start` to `end` of an object of `size` bytes."""

    start: int
    end: int
    size: int

    @property
    def content_range(self) -> str:
        return f"bytes {self.start}-{self.end - 1}/{self.size}"


def wanted(header: str | None, *, size: int) -> ByteRange | None:
    """The range that a Range header asks for; None: the whole object. Raises OutOfRange.

    A header that is none, of another unit, or of several ranges is ignored, as the RFC allows.
    """
    match = _ONE_RANGE.fullmatch(header or "")
    if match is None or not (match[1] or match[2]):
        return None
    if not match[1]:  # the last so many bytes
        start, end = max(0, size - int(match[2])), size
    else:
        start, end = int(match[1]), min(size, int(match[2]) + 1) if match[2] else size
        if match[2] and int(match[2]) < start:
            return None  # no range at all
    if start >= end:
        raise OutOfRange
    return ByteRange(start, end, size)
