"""A `traceparent` comes from strangers: what is not exactly one counts as none."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from shared.contract import traceparent
from shared.contract.traceparent import TraceParent

TRACE, SPAN = "4bf92f3577b34da6a3ce929d0e0e4736", "00f067aa0ba902b7"
GOOD = f"00-{TRACE}-{SPAN}-01"


@pytest.mark.parametrize(
    ("text", "sampled"),
    [
        (GOOD, True),
        (f"00-{TRACE}-{SPAN}-00", False),
        (f"00-{TRACE}-{SPAN}-03", True),  # of a flag that a later version knows
        (f"00-{TRACE}-{SPAN}-02", False),
        (f"cc-{TRACE}-{SPAN}-01-what-the-future-will-be-like", True),
        (f"01-{TRACE}-{SPAN}-01", True),
    ],
)
def test_a_span_is_read_with_what_is_known_of_it(text: str, sampled: bool) -> None:
    assert traceparent.read(text) == TraceParent(TRACE, SPAN, sampled)


@pytest.mark.parametrize(
    "text",
    [
        None,
        "",
        GOOD.upper(),
        f" {GOOD}",
        f"{GOOD}\n",
        f"{GOOD}-more",  # version 00 has four parts
        f"{GOOD},{GOOD}",
        f"ff-{TRACE}-{SPAN}-01",
        f"00-{'0' * 32}-{SPAN}-01",
        f"00-{TRACE}-{'0' * 16}-01",
        f"00-{TRACE[:-1]}-{SPAN}-01",
        f"00-{TRACE}-{SPAN}-1",
        f"00-{TRACE}-{SPAN}",
        f"0-{TRACE}-{SPAN}-01",
        f"00-{TRACE[:-1]}g-{SPAN}-01",
        f"00-{TRACE[:-1]}\u0661-{SPAN}-01",  # an Arabic digit: int() would take it
        f"01-{TRACE}-{SPAN}-01-{'x' * 1000}",
        f"01-{TRACE}-{SPAN}-01-\x1b[2J",
        "\0" * 55,
        "'; drop table jobs; --",
    ],
)
def test_what_is_malformed_is_no_span_and_no_error(text: str | None) -> None:
    assert traceparent.read(text) is None


@given(st.text() | st.binary().map(lambda raw: raw.decode("latin-1")) | st.from_regex(r"[0-9a-f]{2}-.{32}-.{16}-.."))
def test_nothing_that_is_read_says_more_than_hexadecimal_digits(text: str) -> None:
    span = traceparent.read(text)

    assert span is None or traceparent.read(str(span)) == span
    assert span is None or set(str(span)) <= set("0123456789abcdef-")


def test_a_request_that_names_two_spans_names_none() -> None:
    header = (b"traceparent", GOOD.encode())

    assert traceparent.of_headers([(b"accept", b"*/*"), header]) == TraceParent(TRACE, SPAN, sampled=True)
    assert traceparent.of_headers([header, header]) is None
    assert traceparent.of_headers([(b"traceparent", b"\xff\xfe")]) is None
    assert traceparent.of_headers([]) is None
