"""W3C's `traceparent`: the trace and the span that something belongs to. It comes from strangers: read strictly.

Source: W3C Trace Context, sections 3.2 and 3.2.4: `version-trace_id-parent_id-flags` in lower-case hexadecimal digits.
What is malformed counts as absent and is no error. `tracestate` and baggage are strangers' text, and are not read.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

_FORM: Final = re.compile(r"([0-9a-f]{2})-([0-9a-f]{32})-([0-9a-f]{16})-([0-9a-f]{2})(-[\x21-\x7e]*)?", re.ASCII)
_MOST_CHARACTERS: Final = 512
_SAMPLED: Final = 1


@dataclass(frozen=True, slots=True)
class TraceParent:
    """A span by its trace's id (32 hexadecimal digits) and its own (16); and whether its trace is recorded."""

    trace_id: str
    span_id: str
    sampled: bool

    def __str__(self) -> str:
        return f"00-{self.trace_id}-{self.span_id}-{int(self.sampled):02x}"


def read(text: str | None) -> TraceParent | None:
    """The span that `text` names; None where it names none, or is malformed. A later version may have more parts."""
    if text is None or len(text) > _MOST_CHARACTERS:
        return None
    form = _FORM.fullmatch(text)
    if form is None:
        return None
    version, trace_id, span_id, flags, more = form.groups()
    if version == "ff" or (version == "00" and more is not None):
        return None
    if not trace_id.strip("0") or not span_id.strip("0"):
        return None
    return TraceParent(trace_id, span_id, bool(int(flags, 16) & _SAMPLED))


def of_headers(headers: Sequence[tuple[bytes, bytes]]) -> TraceParent | None:
    """The span that a request's raw headers name, their names in lower case; two such headers name none."""
    values = [value for name, value in headers if name == b"traceparent"]
    return read(values[0].decode("latin-1")) if len(values) == 1 else None
