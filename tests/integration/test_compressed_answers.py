"""gzip on a real port: what comes compressed, what does not, and what is not taken compressed."""

from __future__ import annotations

import gzip

import httpx2
import pytest

from shared.store.db import session_scope
from tests.factories import make_job
from tests.integration.conftest import Api
from tests.integration.test_bad_requests import refused
from tests.patience import patience


def test_a_list_of_jobs_comes_compressed_and_a_poll_with_its_etag_still_fits(api: Api) -> None:
    with session_scope(api.engine) as session:
        job_id, *_ = [make_job(session, api.caller).id for _ in range(20)]
    with api.http() as http:
        plain = http.get("/v1/fine_tuning/jobs", headers={"Accept-Encoding": "identity"})
        packed = http.get("/v1/fine_tuning/jobs", headers={"Accept-Encoding": "gzip"})
        poll = http.get(f"/v1/fine_tuning/jobs/{job_id}")
        known = http.get(f"/v1/fine_tuning/jobs/{job_id}", headers={"If-None-Match": poll.headers["etag"]})

    assert packed.json()["data"] == plain.json()["data"]
    assert packed.headers["content-encoding"] == "gzip"
    assert int(packed.headers["content-length"]) < int(plain.headers["content-length"]) / 4
    assert "Accept-Encoding" in plain.headers["vary"]
    assert known.status_code == 304
    assert len(api.openai().fine_tuning.jobs.list().data) == 20


def test_small_answers_streams_and_files_do_not_come_compressed(api: Api) -> None:
    with session_scope(api.engine) as session:
        job_id = make_job(session, api.caller).id
    with api.http() as http:
        small = http.get("/v1/models")
        file = api.openai().files.create(file=("t.txt", b"x" * 5000), purpose="user_data")
        content = http.get(f"/v1/files/{file.id}/content")
        part = http.get(f"/v1/files/{file.id}/content", headers={"Range": "bytes=0-3999"})
        with http.stream("GET", f"/v1/tunepool/jobs/{job_id}/events/stream") as stream:
            streamed = stream.headers
    for headers in (content.headers, part.headers, streamed):
        assert "content-encoding" not in headers
    assert len(small.content) >= 1024 or "content-encoding" not in small.headers


@pytest.mark.parametrize("coding", ["gzip", "deflate", "br", "x-gzip"])
def test_a_compressed_body_is_refused_by_name_before_it_is_unpacked(api: Api, coding: str) -> None:
    bomb = gzip.compress(b" " * 50_000_000)
    upload = api.openai().uploads.create(bytes=10, filename="t.jsonl", mime_type="text/jsonl", purpose="fine-tune")
    with api.http(**{"Content-Encoding": coding}) as http:
        answers = [
            http.post("/v1/fine_tuning/jobs", content=bomb, headers={"Content-Type": "application/json"}),
            http.post("/v1/tunepool/oidc/token", content=bomb, headers={"Content-Type": "application/json"}),
            http.post("/v1/files", content=bomb, headers={"Content-Type": "multipart/form-data; boundary=x"}),
            http.post(
                f"/v1/uploads/{upload.id}/parts",
                content=bomb,
                headers={"Content-Type": "multipart/form-data; boundary=x"},
            ),
        ]

    for answer in answers:
        error = refused(api, answer, status=415)
        assert (error["param"], error["code"]) == ("Content-Encoding", "unsupported_media_type")


def test_the_openapi_document_comes_compressed_too(api: Api) -> None:
    answer = httpx2.get(f"{api.url}/openapi.json", headers={"Accept-Encoding": "gzip"}, timeout=patience(20))

    assert answer.headers["content-encoding"] == "gzip"
    assert answer.json()["openapi"].startswith("3.1")
