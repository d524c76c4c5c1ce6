"""Large files in parts, as the official client sends them: whole, in order, within the quota, nothing left over."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx2
import openai
import pytest
from openai import OpenAI
from sqlalchemy import func, select, update
from tunepool import requests

from shared.products import garbage, parted_uploads
from shared.store.db import session_scope
from shared.store.storage import open_store
from shared.store.tables import FileRow, UploadRow
from tests.factories import make_key
from tests.integration.conftest import Api
from tests.integration.test_bad_requests import refused
from tests.openai_types import held

ROWS = b"".join(b'{"messages": [{"role": "user", "content": "%06d"}]}\n' % number for number in range(2000))


@pytest.fixture
def http(api: Api) -> Iterator[httpx2.Client]:
    with api.http() as client:
        yield client


def objects(api: Api, project_id: str | None = None) -> list[str]:
    return open_store(api.settings).keys(f"{project_id or api.caller.project_id}/uploads")


def opened(http: httpx2.Client, size: int, **values: object) -> str:
    body = {"bytes": size, "filename": "rows.jsonl", "mime_type": "text/jsonl", "purpose": "fine-tune", **values}
    answer = http.post("/v1/uploads", json=body)
    assert answer.status_code == 200, answer.text
    return str(answer.json()["id"])


def sent(http: httpx2.Client, upload_id: str, content: bytes) -> httpx2.Response:
    return http.post(f"/v1/uploads/{upload_id}/parts", files={"data": ("part", content)})


def test_the_official_client_uploads_a_file_in_parts_and_it_is_a_file_as_any_other(api: Api, tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_bytes(ROWS)

    upload = api.client.uploads.upload_file_chunked(
        file=path,
        mime_type="text/jsonl",
        purpose="fine-tune",
        part_size=30_000,
        md5=hashlib.md5(ROWS).hexdigest(),  # noqa: S324  # OpenAI's field
    )

    assert (upload.status, upload.bytes, upload.filename) == ("completed", len(ROWS), "rows.jsonl")
    assert upload.expires_at - upload.created_at == 3600
    assert upload.file is not None
    assert upload.file.status == "uploaded"  # it waits for its check, like every training file
    assert upload.file.model_extra["tunepool"]["sha256"] == hashlib.sha256(ROWS).hexdigest()
    assert api.client.files.retrieve(upload.file.id) == upload.file
    assert api.client.files.content(upload.file.id).read() == ROWS
    assert objects(api) == [key for key in objects(api) if upload.file.id in key]  # its parts are gone


def test_the_command_line_sends_a_large_file_in_parts_and_a_small_one_whole(
    api: Api, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_bytes(ROWS)
    before = {key for key in objects(api) if "file-" in key}

    whole = requests.upload(api.client, path)
    assert {key for key in objects(api) if "file-" in key} == before
    monkeypatch.setattr(requests, "LARGE_BYTES", 1000)
    parted = requests.upload(api.client, path)

    assert any(parted.id in key for key in objects(api))
    assert parted.model_extra["tunepool"]["sha256"] == whole.model_extra["tunepool"]["sha256"]


def test_the_parts_are_joined_in_the_order_that_is_asked_for_and_may_come_at_once(api: Api) -> None:
    pieces = [b'{"text": "%d"}\n' % number for number in range(8)]
    size = sum(len(piece) for piece in pieces)
    upload = api.client.uploads.create(bytes=size, filename="a.jsonl", mime_type="text/jsonl", purpose="fine-tune")

    with ThreadPoolExecutor(8) as crowd:
        parts = list(crowd.map(lambda piece: api.client.uploads.parts.create(upload.id, data=piece), pieces))
    assert {part.object for part in parts} == {"upload.part"}
    done = api.client.uploads.complete(upload.id, part_ids=[part.id for part in reversed(parts)])

    assert done.file is not None
    assert api.client.files.content(done.file.id).read() == b"".join(reversed(pieces))


def test_a_part_whose_answer_was_lost_is_the_same_part_when_it_comes_again(http: httpx2.Client) -> None:
    upload_id = opened(http, 24)

    first, again = (sent(http, upload_id, b'{"text": 1}\n').json() for _ in range(2))
    done = http.post(f"/v1/uploads/{upload_id}/complete", json={"part_ids": [first["id"], again["id"]]})

    assert first == again
    assert http.get(f"/v1/files/{done.json()['file']['id']}/content").content == b'{"text": 1}\n' * 2


def test_completing_again_answers_the_same_file(api: Api, http: httpx2.Client) -> None:
    upload_id = opened(http, 4)
    body = {"part_ids": [sent(http, upload_id, b"{}\n\n").json()["id"]]}

    with ThreadPoolExecutor(4) as crowd:
        answers = list(crowd.map(lambda _: http.post(f"/v1/uploads/{upload_id}/complete", json=body), range(4)))

    assert {answer.status_code for answer in answers} == {200}
    assert len({answer.json()["file"]["id"] for answer in answers}) == 1
    assert len([key for key in objects(api) if upload_id in key]) == 1
    other = http.post(f"/v1/uploads/{upload_id}/complete", json={"part_ids": ["part_x"]})
    assert other.json()["error"]["code"] == "upload_not_pending"


def test_an_upload_that_another_request_completes_between_two_looks_is_answered_as_completed(
    api: Api, http: httpx2.Client
) -> None:
    upload_id = opened(http, 4)
    part_ids = [sent(http, upload_id, b"{}\n\n").json()["id"]]

    find, looks = parted_uploads._find, iter([True])

    def found(*asked: Any, **how: Any) -> UploadRow:
        row = find(*asked, **how)
        if next(looks, False):  # the first look of all, which the other request follows
            assert http.post(f"/v1/uploads/{upload_id}/complete", json={"part_ids": part_ids}).status_code == 200
        return row

    with session_scope(api.engine) as session, pytest.MonkeyPatch.context() as patch:
        patch.setattr(parted_uploads, "_find", found)
        left = parted_uploads.assembly(session, upload_id, part_ids, project_id=api.caller.project_id)

    assert isinstance(left, parted_uploads.Assembly), (
        "of the row as it was read; publishing finds out, and answers the other's file"
    )


def test_a_wrong_checksum_length_or_part_completes_nothing_and_may_be_corrected(api: Api, http: httpx2.Client) -> None:
    upload_id = opened(http, 6)
    part = sent(http, upload_id, b"{}\n").json()["id"]
    other = sent(http, upload_id, b"[]\n").json()["id"]
    where = f"/v1/uploads/{upload_id}/complete"

    md5 = refused(api, http.post(where, json={"part_ids": [part, other], "md5": "0" * 32}), status=400)
    short = refused(api, http.post(where, json={"part_ids": [part]}), status=400)
    unknown = refused(api, http.post(where, json={"part_ids": [part, "part_x"]}), status=400)

    assert (md5["code"], md5["param"]) == ("checksum_mismatch", "md5")
    assert (short["code"], short["param"]) == ("upload_incomplete", "part_ids")
    assert unknown["param"] == "part_ids.1"
    right = hashlib.md5(b"[]\n{}\n").hexdigest().upper()  # noqa: S324
    assert http.post(where, json={"part_ids": [other, part], "md5": right}).json()["status"] == "completed"


@pytest.mark.parametrize(
    ("body", "param", "status"),
    [
        ({"bytes": 0}, "bytes", 400),
        ({"bytes": "9"}, "bytes", 400),
        ({"bytes": 8 * 1024**3 + 1}, "bytes", 413),
        ({"filename": ""}, "filename", 400),
        ({"filename": "picture.png"}, "filename", 400),
        ({"purpose": "mine"}, "purpose", 400),
        ({"mime_type": None}, "mime_type", 400),
        ({"expires_after": {"anchor": "created_at", "seconds": 1}}, "expires_after.seconds", 400),
        ({"expires_after": {"anchor": "now", "seconds": 4000}}, "expires_after.anchor", 400),
        ({"colour": "red"}, "colour", 400),
    ],
)
def test_a_bad_announcement_is_refused_by_field(
    api: Api, http: httpx2.Client, body: dict[str, Any], param: str, status: int
) -> None:
    whole = {"bytes": 9, "filename": "a.jsonl", "mime_type": "text/jsonl", "purpose": "fine-tune", **body}

    assert refused(api, http.post("/v1/uploads", json=whole), status=status)["param"] == param


def test_a_bad_part_is_refused_and_leaves_nothing(api: Api, http: httpx2.Client, monkeypatch: Any) -> None:
    monkeypatch.setattr("api.routes.parted_uploads.MAX_PART_BYTES", 100)
    upload_id = opened(http, 150)
    where = f"/v1/uploads/{upload_id}/parts"
    sent(http, upload_id, b"x" * 90)
    before = objects(api)

    answers = {
        "empty": (sent(http, upload_id, b""), 400, "empty_file"),
        "too large": (sent(http, upload_id, b"x" * 101), 413, "file_too_large"),
        "more than announced": (sent(http, upload_id, b"y" * 90), 413, "upload_too_long"),
        "another name": (http.post(where, files={"file": ("part", b"x")}), 400, "missing_required_parameter"),
        "a field too many": (
            http.post(where, files={"data": ("part", b"x")}, data={"index": "1"}),
            400,
            "unknown_parameter",
        ),
        "no form": (http.post(where, json={}), 415, "unsupported_media_type"),
    }

    for name, (answer, status, code) in answers.items():
        assert (answer.status_code, answer.json()["error"]["code"]) == (status, code), name
    assert objects(api) == before


def test_a_cancelled_upload_takes_no_more_parts_and_gives_its_room_back(api: Api) -> None:
    with session_scope(api.engine) as session:
        caller, key = make_key(session, max_bytes=100)
    with OpenAI(base_url=f"{api.url}/v1", api_key=key, max_retries=0, http_client=held()) as client:
        arguments: dict[str, Any] = {"bytes": 60, "filename": "a", "mime_type": "x", "purpose": "user_data"}
        upload = client.uploads.create(**arguments)
        client.uploads.parts.create(upload.id, data=b"x" * 60)
        with pytest.raises(openai.RateLimitError) as full:
            client.uploads.create(**arguments)
        assert full.value.code == "quota_exceeded"

        assert client.uploads.cancel(upload.id).status == "cancelled"
        assert client.uploads.cancel(upload.id).status == "cancelled"
        with pytest.raises(openai.BadRequestError) as ended:
            client.uploads.parts.create(upload.id, data=b"x")
        assert ended.value.code == "upload_not_pending"
        assert client.uploads.create(**arguments).status == "pending"
    assert objects(api, caller.project_id) == []


def test_open_uploads_count_as_files(api: Api) -> None:
    with session_scope(api.engine) as session:
        _, key = make_key(session, max_files=1)
    with api.http(key) as http:
        opened(http, 9)
        whole = http.post("/v1/files", files={"file": ("a.txt", b"x")}, data={"purpose": "user_data"})

    assert whole.json()["error"]["code"] == "quota_exceeded"


def test_an_upload_whose_hour_is_over_is_expired_and_what_it_left_is_garbage(api: Api, http: httpx2.Client) -> None:
    upload_id = opened(http, 9)
    part = sent(http, upload_id, b'{"a": 1}\n').json()["id"]

    with session_scope(api.engine) as session:
        late = func.now() - parted_uploads.COMPLETION * 1.01
        session.execute(update(UploadRow).where(UploadRow.id == upload_id).values(expires_at=late))
    for answer in (
        sent(http, upload_id, b"x"),
        http.post(f"/v1/uploads/{upload_id}/complete", json={"part_ids": [part]}),
        http.post(f"/v1/uploads/{upload_id}/cancel"),
    ):
        error = refused(api, answer, status=400)
        assert error["code"] == "upload_not_pending"
        assert "expired" in error["message"]

    with session_scope(api.engine) as session:
        assert upload_id in parted_uploads.expire(session)
        ended = func.now() - garbage.SETTLED * 1.1
        session.execute(update(UploadRow).where(UploadRow.id == upload_id).values(ended_at=ended))
    with session_scope(api.engine) as session:
        prefixes = dict(garbage.dead_upload_prefixes(session))
    (prefix,) = (prefix for prefix in prefixes if upload_id in prefix)
    assert prefixes[prefix] == frozenset()
    assert [key for key in objects(api) if key.startswith(prefix)] != []


def test_the_file_of_a_completed_upload_is_no_garbage(api: Api, http: httpx2.Client) -> None:
    upload_id = opened(http, 3)
    part = sent(http, upload_id, b"{}\n").json()["id"]
    file_id = http.post(f"/v1/uploads/{upload_id}/complete", json={"part_ids": [part]}).json()["file"]["id"]

    with session_scope(api.engine) as session:
        ended = func.now() - garbage.SETTLED * 1.1
        session.execute(update(UploadRow).where(UploadRow.id == upload_id).values(ended_at=ended))
    with session_scope(api.engine) as session:
        kept = [kept for prefix, kept in garbage.dead_upload_prefixes(session) if upload_id in prefix]
        key = session.scalar(select(FileRow.key).where(FileRow.id == file_id))
    assert kept == [frozenset({key})]


def test_a_stranger_finds_no_upload_of_ours(api: Api, stranger: str, http: httpx2.Client) -> None:
    upload_id = opened(http, 3)
    part = sent(http, upload_id, b"{}\n").json()["id"]

    with api.http(stranger) as theirs:
        for answer in (
            sent(theirs, upload_id, b"x"),
            theirs.post(f"/v1/uploads/{upload_id}/complete", json={"part_ids": [part]}),
            theirs.post(f"/v1/uploads/{upload_id}/cancel"),
        ):
            assert refused(api, answer, status=404)["param"] == "upload_id"
    assert http.post(f"/v1/uploads/{upload_id}/complete", json={"part_ids": [part]}).status_code == 200
