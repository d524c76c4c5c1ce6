"""Uploads in every bad form, straight to the socket: the official client would not send most of them."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import httpx2
import pytest
from sqlalchemy import func, select

from shared.store.db import session_scope
from shared.store.storage import open_store
from shared.store.tables import FileRow
from tests.integration.conftest import Api

BOUNDARY = "frontier"
TYPE = {"Content-Type": f"multipart/form-data; boundary={BOUNDARY}"}


def part(name: str, value: bytes, filename: str | None = None) -> bytes:
    disposition = f'form-data; name="{name}"' + ("" if filename is None else f'; filename="{filename}"')
    return f"--{BOUNDARY}\r\nContent-Disposition: {disposition}\r\n\r\n".encode() + value + b"\r\n"


def form(*parts: bytes) -> bytes:
    return b"".join(parts) + f"--{BOUNDARY}--\r\n".encode()


FILE = part("file", b'{"text":"x"}\n', "train.jsonl")
PURPOSE = part("purpose", b"fine-tune")


@pytest.fixture
def http(api: Api) -> Iterator[httpx2.Client]:
    with api.http() as client:
        yield client


def traces(api: Api) -> tuple[int, int]:
    """Rows and objects that uploads have left."""
    with session_scope(api.engine) as session:
        rows = session.scalar(select(func.count()).select_from(FileRow)) or 0
    return rows, len(open_store(api.settings).keys(f"{api.caller.project_id}/files"))


BAD_FORMS: dict[str, tuple[bytes, str | None]] = {
    "no file": (form(PURPOSE), "file"),
    "no purpose": (form(FILE), "purpose"),
    "unknown purpose": (form(FILE, part("purpose", b"mine")), "purpose"),
    "empty file": (form(PURPOSE, part("file", b"", "a.jsonl")), "file"),
    "two files": (form(PURPOSE, FILE, FILE), "file"),
    "two purposes": (form(PURPOSE, PURPOSE, FILE), "purpose"),
    "file as text": (form(PURPOSE, part("file", b"x")), "file"),
    "not jsonl": (form(PURPOSE, part("file", b"x", "data.pdf")), "file"),
    "unknown field": (form(PURPOSE, FILE, part("colour", b"red")), "colour"),
    "expiry too short": (
        form(PURPOSE, FILE, part("expires_after[anchor]", b"created_at"), part("expires_after[seconds]", b"1")),
        "expires_after.seconds",
    ),
    "expiry no number": (
        form(PURPOSE, FILE, part("expires_after[anchor]", b"created_at"), part("expires_after[seconds]", b"1e4")),
        "expires_after.seconds",
    ),
    "expiry anchor": (
        form(PURPOSE, FILE, part("expires_after[anchor]", b"now"), part("expires_after[seconds]", b"4000")),
        "expires_after.anchor",
    ),
    "long field": (form(PURPOSE, part("purpose2", b"x" * 5000), FILE), "purpose2"),
    "many fields": (form(*[part(f"f{n}", b"x") for n in range(30)], FILE), None),
    "cut off": (form(PURPOSE, FILE)[:60], "file"),
    "an epilogue without end": (form(PURPOSE, FILE) + b"x" * 400_000, None),
    "not multipart": (b"hello", None),
    "no bytes": (b"", "file"),
    # Cut off on the way: whatever is missing, half a data set must never pass for a whole one.
    "without the end of the last boundary": (form(PURPOSE, FILE)[:-4], "file"),
    "without the last boundary": (form(PURPOSE, FILE)[: -len(form())], "file"),
    "cut off inside the file": (form(PURPOSE, FILE)[: -len(form()) - 5], "file"),
    "cut off inside a later part": (form(FILE, PURPOSE)[: -len(form()) - 5], "file"),
    "cut off inside a part's headers": (form(PURPOSE, FILE)[: len(PURPOSE) + 30], "file"),
    "a part with too many headers": (
        f"--{BOUNDARY}\r\n".encode() + b"X: y\r\n" * 100_000 + b"\r\nx\r\n" + form(PURPOSE, FILE),
        None,
    ),
    "a part with a huge header": (
        f"--{BOUNDARY}\r\nX: ".encode() + b"y" * 5_000_000 + b"\r\n\r\nx\r\n" + form(PURPOSE, FILE),
        None,
    ),
}


@pytest.mark.parametrize(("body", "param"), BAD_FORMS.values(), ids=BAD_FORMS.keys())
def test_a_bad_form_is_refused_by_field_and_leaves_neither_row_nor_object(
    api: Api, http: httpx2.Client, body: bytes, param: str | None
) -> None:
    before = traces(api)

    answer = http.post("/v1/files", content=body, headers=TYPE)

    assert answer.status_code == 400, answer.text
    assert answer.json()["error"]["param"] == param
    assert traces(api) == before


@pytest.mark.parametrize("boundary", ["b" * 257, "b" * 5000])
def test_a_boundary_that_is_too_long_is_refused_by_name(http: httpx2.Client, boundary: str) -> None:
    answer = http.post("/v1/files", content=b"x", headers={"Content-Type": f"multipart/form-data; boundary={boundary}"})

    assert (answer.status_code, answer.json()["error"]["code"]) == (400, "invalid_multipart")


def test_the_order_of_the_parts_does_not_matter(api: Api, http: httpx2.Client) -> None:
    for body in (form(FILE, PURPOSE), form(PURPOSE, FILE)):
        assert http.post("/v1/files", content=body, headers=TYPE).json()["status"] == "uploaded"


def test_a_file_over_the_limit_is_refused_while_it_streams(api: Api, http: httpx2.Client, monkeypatch: Any) -> None:
    monkeypatch.setattr(api.settings, "max_file_bytes", 100_000)
    before = traces(api)
    sent = 0

    def endless() -> Iterator[bytes]:
        nonlocal sent
        yield form(PURPOSE)[: -len(f"--{BOUNDARY}--\r\n")]
        yield part("file", b"", "big.jsonl")[:-2]
        for _ in range(2000):
            sent += 65536
            yield b"x" * 65536

    try:
        answer = http.post("/v1/files", content=endless(), headers=TYPE)
    except httpx2.WriteError:
        assert sent < 2000 * 65536  # the server hung up in the middle of the upload
    else:
        assert (answer.status_code, answer.json()["error"]["param"]) == (413, "file")
    assert traces(api) == before


@pytest.mark.parametrize(
    "name",
    ["../../etc/passwd.jsonl", "a/b\\c.jsonl", "ä€.jsonl", "x" * 300 + ".jsonl", "a\x00b.jsonl", "a\u202eb.jsonl"],
)
def test_a_hostile_file_name_is_only_ever_shown(api: Api, http: httpx2.Client, name: str) -> None:
    made = http.post("/v1/files", content=form(PURPOSE, part("file", b'{"text":"x"}\n', name)), headers=TYPE).json()

    assert "/" not in made["filename"]
    assert len(made["filename"]) <= 255
    assert made["filename"].isprintable()
    content = http.get(f"/v1/files/{made['id']}/content")
    assert content.content == b'{"text":"x"}\n'
    assert content.headers["content-disposition"].isascii()


def test_the_line_break_after_the_last_boundary_may_be_missing(api: Api, http: httpx2.Client) -> None:
    answer = http.post("/v1/files", content=form(PURPOSE, FILE)[:-2], headers=TYPE)

    assert answer.json()["bytes"] == len(b'{"text":"x"}\n')


def test_a_compressed_upload_is_refused_and_not_kept_as_it_came(api: Api, http: httpx2.Client) -> None:
    answer = http.post("/v1/files", content=form(PURPOSE, FILE), headers={**TYPE, "Content-Encoding": "gzip"})

    assert (answer.status_code, answer.json()["error"]["param"]) == (415, "Content-Encoding")


def test_every_purpose_of_openai_is_taken_and_only_fine_tune_is_checked(api: Api, http: httpx2.Client) -> None:
    for purpose in ("assistants", "batch", "fine-tune", "vision", "user_data", "evals"):
        made = http.post("/v1/files", content=form(part("purpose", purpose.encode()), FILE), headers=TYPE).json()

        assert (made["purpose"], made["status"]) == (purpose, "uploaded" if purpose == "fine-tune" else "processed")


def test_an_expiry_within_bounds_is_kept(api: Api, http: httpx2.Client) -> None:
    expiry = [part("expires_after[anchor]", b"created_at"), part("expires_after[seconds]", b"3600")]

    made = http.post("/v1/files", content=form(*expiry, PURPOSE, FILE), headers=TYPE).json()

    assert abs(made["expires_at"] - made["created_at"] - 3600) <= 2


@pytest.mark.parametrize("text", ["3599", "2592001", "-1", "3600.0", "", "9" * 4000, "٣٦٠٠", "nan"])
def test_an_expiry_out_of_bounds_is_refused(api: Api, http: httpx2.Client, text: str) -> None:
    expiry = [part("expires_after[anchor]", b"created_at"), part("expires_after[seconds]", text.encode())]

    answer = http.post("/v1/files", content=form(*expiry, PURPOSE, FILE), headers=TYPE)

    assert (answer.status_code, answer.json()["error"]["param"]) == (400, "expires_after.seconds")


def test_another_content_type_is_a_415(api: Api, http: httpx2.Client) -> None:
    answer = http.post("/v1/files", content=b"{}", headers={"Content-Type": "application/json"})

    assert (answer.status_code, answer.json()["error"]["param"]) == (415, "Content-Type")
