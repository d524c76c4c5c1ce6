"""A download by its signed link goes on where it broke, and the link leads where the operator says."""

from __future__ import annotations

from collections.abc import Iterator

import httpx2
import pytest
from fastapi.testclient import TestClient

from api.app import create_app
from shared.store.db import session_scope
from shared.store.storage import open_store
from shared.store.tables import AdapterRow
from tests.factories import make_queued_job
from tests.integration.conftest import Api
from tests.integration.test_bad_requests import refused
from tests.patience import patience

BYTES = bytes(range(256)) * 4
KEY = "adapters/downloads/adapter.bin"


@pytest.fixture(scope="module")
def app_client(api: Api) -> Iterator[tuple[TestClient, str]]:
    """A client of an API with a signed link to BYTES, which is the path."""
    open_store(api.settings).put_bytes(KEY, BYTES)
    app = create_app(api.settings)
    with TestClient(app) as client:
        yield client, f"/v1/tunepool/objects/{app.state.door.links.make(KEY, name='adapter.bin')}"


@pytest.mark.parametrize(
    ("asked", "start", "end"),
    [
        ("bytes=0-0", 0, 1),
        ("bytes=10-19", 10, 20),
        ("bytes=1000-", 1000, 1024),
        ("bytes=1000-999999", 1000, 1024),
        ("bytes=-24", 1000, 1024),
        ("bytes=-99999", 0, 1024),
        ("Bytes=1023-1023", 1023, 1024),
    ],
)
def test_a_range_is_answered_with_just_its_bytes(
    app_client: tuple[TestClient, str], asked: str, start: int, end: int
) -> None:
    client, link = app_client

    answer = client.get(link, headers={"Range": asked})

    assert answer.status_code == 206
    assert answer.content == BYTES[start:end]
    assert answer.headers["content-range"] == f"bytes {start}-{end - 1}/1024"
    assert answer.headers["content-length"] == str(end - start)


def test_the_content_of_a_file_is_sent_in_ranges_too(api: Api) -> None:
    rows = b'{"text": "a row"}\n' * 40
    file = api.client.files.create(file=("rows.jsonl", rows), purpose="fine-tune")
    with api.http() as http:
        path = f"/v1/files/{file.id}/content"
        whole, part = http.get(path), http.get(path, headers={"Range": "bytes=10-19"})
        rest = http.get(path, headers={"Range": "bytes=700-", "If-Range": whole.headers["etag"]})
        behind = http.get(path, headers={"Range": "bytes=720-"})

    assert (whole.content, whole.headers["accept-ranges"]) == (rows, "bytes")
    assert (part.status_code, part.content, part.headers["content-range"]) == (206, rows[10:20], "bytes 10-19/720")
    assert (rest.status_code, rest.content) == (206, rows[700:])
    assert refused(api, behind, status=416)["code"] == "range_not_satisfiable"


@pytest.mark.parametrize("asked", ["bytes=1024-", "bytes=5000-6000", "bytes=-0"])
def test_a_range_behind_the_end_is_a_416_that_tells_the_size(
    api: Api, app_client: tuple[TestClient, str], asked: str
) -> None:
    client, link = app_client

    answer = client.get(link, headers={"Range": asked})

    assert refused(api, answer, status=416)["code"] == "range_not_satisfiable"  # type: ignore[arg-type]
    assert answer.headers["content-range"] == "bytes */1024"


@pytest.mark.parametrize("asked", ["bytes=5-2", "bytes=0-1,5-6", "rows=1-2", "bytes=-", "bytes=a-b", "junk", ""])
def test_what_is_no_single_range_is_answered_whole(app_client: tuple[TestClient, str], asked: str) -> None:
    client, link = app_client

    answer = client.get(link, headers={"Range": asked})

    assert (answer.status_code, answer.content) == (200, BYTES)
    assert "content-range" not in answer.headers


def test_a_head_tells_what_a_get_would_without_the_bytes(app_client: tuple[TestClient, str]) -> None:
    client, link = app_client

    head, whole = client.head(link), client.get(link)

    assert (head.status_code, head.content, whole.content) == (200, b"", BYTES)
    for name in ("content-length", "content-type", "content-disposition", "accept-ranges", "etag"):
        assert head.headers[name] == whole.headers[name]
    assert head.headers["content-length"] == "1024"
    assert client.head(link[:-2]).status_code == 403


def test_a_download_goes_on_only_while_the_file_is_the_same(app_client: tuple[TestClient, str]) -> None:
    client, link = app_client
    etag = client.head(link).headers["etag"]

    same = client.get(link, headers={"Range": "bytes=1000-", "If-Range": etag})
    other = client.get(link, headers={"Range": "bytes=1000-", "If-Range": '"another"'})

    assert (same.status_code, same.content) == (206, BYTES[1000:])
    assert (other.status_code, other.content) == (200, BYTES)


def test_links_lead_to_the_configured_address_whatever_host_the_caller_names(api: Api) -> None:
    with session_scope(api.engine) as session:
        job = make_queued_job(session, api.caller)
        file = {"name": "adapter.bin", "bytes": len(BYTES), "sha256": "0" * 64}
        manifest = {"prefix": "adapters/downloads", "files": [file]}
        row = AdapterRow(
            id="adapter-links",
            job_id=job.id,
            project_id=job.project_id,
            name="ft:links",
            base_model="b",
            manifest=manifest,
        )
        session.add(row)
    app = create_app(api.settings.model_copy(update={"public_url": "https://tunepool.example/"}))
    key = {"Authorization": f"Bearer {api.key}", "Host": "evil.example:99"}

    with TestClient(app, headers=key) as client:
        (found,) = client.get("/v1/tunepool/adapters/ft:links").json()["files"]

    assert found["url"].startswith("https://tunepool.example/v1/tunepool/objects/")
    with httpx2.Client(base_url=api.url, timeout=patience(20)) as http:
        assert http.get(f"/v1{found['url'].partition('/v1')[2]}").content == BYTES


def test_an_adapter_without_files_is_shown_and_is_no_fault_of_ours(api: Api) -> None:
    with session_scope(api.engine) as session:
        job = make_queued_job(session, api.caller)
        manifest = {"prefix": "adapters/nothing", "files": []}
        row = AdapterRow(
            id="adapter-empty",
            job_id=job.id,
            project_id=job.project_id,
            name="ft:empty",
            base_model="b",
            manifest=manifest,
        )
        session.add(row)

    with api.http() as client:
        answer = client.get("/v1/tunepool/adapters/ft:empty")

    assert answer.status_code == 200
    assert answer.json()["files"] == []
