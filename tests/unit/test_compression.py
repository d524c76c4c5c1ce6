"""gzip of JSON answers, on applications of three lines."""

from __future__ import annotations

import asyncio
import gzip
from typing import Any

import pytest

from api.compression import ALONE_BYTES, LEAST_BYTES, GzipJson, takes_gzip

JSON = "application/json"


def sent(
    chunks: list[bytes],
    *,
    accept: str | None = "gzip, deflate",
    path: str = "/v1/x",
    method: str = "GET",
    **headers: str,
) -> tuple[dict[str, str], list[bytes], list[str]]:
    """The headers and chunks that a client gets of such an answer, and in which order the messages came."""
    messages: list[dict[str, Any]] = []

    async def answer(scope: Any, receive: Any, send: Any) -> None:
        named = {"content-type": JSON, "content-length": str(sum(map(len, chunks))), **headers}
        raw = [(name.replace("_", "-").encode(), value.encode()) for name, value in named.items()]
        await send({"type": "http.response.start", "status": 200, "headers": raw})
        for place, chunk in enumerate(chunks, 1):
            await send({"type": "http.response.body", "body": chunk, "more_body": place < len(chunks)})

    async def take(message: dict[str, Any]) -> None:
        messages.append(message)

    scope = {
        "type": "http",
        "method": method,
        "path": path,
        "headers": [] if accept is None else [(b"accept-encoding", accept.encode())],
    }
    asyncio.run(GzipJson(answer)(scope, None, take))  # type: ignore[arg-type]
    start, *bodies = messages
    return (
        {name.decode(): value.decode() for name, value in start["headers"]},
        [body["body"] for body in bodies],
        [message["type"] for message in messages],
    )


@pytest.mark.parametrize("size", [LEAST_BYTES, ALONE_BYTES, 1_000_000])
def test_a_long_json_answer_is_compressed_and_says_so(size: int) -> None:
    headers, (body,), _ = sent([b"a" * size], etag='"1"')

    assert gzip.decompress(body) == b"a" * size
    assert headers["content-encoding"] == "gzip"
    assert headers["content-length"] == str(len(body))
    assert headers["vary"] == "Accept-Encoding"
    assert headers["etag"] == 'W/"1"'


def test_a_small_answer_goes_through_untouched() -> None:
    headers, bodies, _ = sent([b"a" * (LEAST_BYTES - 1)], etag='"1"')

    assert bodies == [b"a" * (LEAST_BYTES - 1)]
    assert set(headers) == {"content-type", "content-length", "etag"}
    assert headers["etag"] == '"1"'


@pytest.mark.parametrize("accept", [None, "", "br", "identity", "gzip;q=0", "gzip;q=0.0, *", "*;q=0", "gzip;q=x"])
def test_a_client_that_takes_no_gzip_gets_none_and_caches_know_it(accept: str | None) -> None:
    headers, bodies, _ = sent([b"a" * 5000], accept=accept)

    assert bodies == [b"a" * 5000]
    assert headers["vary"] == "Accept-Encoding"
    assert "content-encoding" not in headers


@pytest.mark.parametrize("accept", ["gzip", "GZIP", "br;q=1.0, gzip;q=0.5", "*", "x-gzip", "deflate, gzip ; q=1"])
def test_a_client_may_ask_in_many_words(accept: str) -> None:
    assert takes_gzip({"type": "http", "headers": [(b"accept-encoding", accept.encode())]})


@pytest.mark.parametrize(
    "headers",
    [
        {"content-type": "text/event-stream"},
        {"content-type": "application/octet-stream"},
        {"content-type": "application/jsonl"},
        {"content-type": "text/html"},
        {"content-encoding": "br"},
        {"content-range": "bytes 0-4999/9000"},
        {"accept-ranges": "bytes"},
    ],
)
def test_files_ranges_streams_and_pages_are_left_alone(headers: dict[str, str]) -> None:
    given, bodies, _ = sent([b"a" * 5000], **headers)

    assert bodies == [b"a" * 5000]
    assert "vary" not in given
    assert given.get("content-encoding") in {None, "br"}


def test_what_comes_in_parts_is_passed_on_part_by_part() -> None:
    headers, bodies, order = sent([b"a" * 5000, b"b" * 5000])

    assert bodies == [b"a" * 5000, b"b" * 5000]
    assert order[0] == "http.response.start"
    assert "content-encoding" not in headers


@pytest.mark.parametrize("more", [{"path": "/ui/jobs/x/curves"}, {"method": "HEAD"}])
def test_pages_and_answers_without_a_body_are_left_alone(more: dict[str, str]) -> None:
    headers, _, _ = sent([b"a" * 5000], **more)

    assert "content-encoding" not in headers
