"""The same API on an S3 server: streams in parts, links that the server itself honours, nothing left by what failed."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from urllib.parse import urlsplit

import boto3
import httpx2
import pytest
from moto.server import ThreadedMotoServer
from openai import OpenAI
from pydantic import SecretStr

from shared.errors import NotFound
from shared.jobs import moves
from shared.settings import Settings
from shared.store.db import session_scope
from shared.store.storage import CHUNK_BYTES, Store, open_store
from tests.factories import claim_on, make_queued_job, make_worker
from tests.integration.conftest import Api
from tests.integration.test_bad_uploads import FILE, PURPOSE, TYPE, form, part
from tests.live import live_api
from tests.patience import patience

BUCKET = "artifacts"


@pytest.fixture(scope="module")
def endpoint() -> Iterator[str]:
    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    yield f"http://{host}:{port}"
    server.stop()


@pytest.fixture(scope="module")
def s3_settings(api: Api, endpoint: str) -> Settings:
    client(endpoint).create_bucket(Bucket=BUCKET)
    return api.settings.model_copy(
        update={
            "storage_url": f"s3://{BUCKET}/tunepool",
            "storage_endpoint": endpoint,
            "storage_access_key": SecretStr("test"),
            "storage_secret_key": SecretStr("test"),
        }
    )


@pytest.fixture(scope="module")
def s3_store(s3_settings: Settings) -> Store:
    return open_store(s3_settings)


@pytest.fixture(scope="module")
def url(s3_settings: Settings) -> Iterator[str]:
    with live_api(s3_settings) as served:
        yield served


def client(endpoint: str):
    return boto3.client(
        "s3", endpoint_url=endpoint, region_name="us-east-1", aws_access_key_id="test", aws_secret_access_key="test"
    )


def test_a_large_file_goes_up_in_parts_and_comes_back_through_the_openai_client(api: Api, url: str) -> None:
    content = (json.dumps({"text": "x" * 1000}) + "\n").encode() * (3 * CHUNK_BYTES // 1000)

    with OpenAI(base_url=f"{url}/v1", api_key=api.key) as openai:
        file = openai.files.create(file=("large.jsonl", content), purpose="fine-tune")
        back = openai.files.content(file.id).read()

    assert file.bytes == len(content)
    assert hashlib.sha256(back).hexdigest() == hashlib.sha256(content).hexdigest()


def test_a_link_is_presigned_and_opens_one_object_for_one_method(
    api: Api, url: str, s3_store: Store, endpoint: str
) -> None:
    stored = s3_store.put_bytes("p/jobs/j/a000001/adapter/adapter_model.safetensors", b"weights")
    manifest = {
        "prefix": "p/jobs/j/a000001/adapter",
        "files": [{"name": "adapter_model.safetensors", "bytes": stored.bytes, "sha256": stored.sha256}],
    }
    with session_scope(api.engine) as session:
        worker = make_worker(session)
        make_queued_job(session, api.caller)
        claim = claim_on(session, worker)
        assert claim is not None
        assert moves.succeed(session, claim.lease, manifest=manifest)

    with httpx2.Client(base_url=url, headers={"Authorization": f"Bearer {api.key}"}, timeout=patience(20)) as http:
        (file,) = http.get(f"/v1/tunepool/adapters/{claim.model_name}").json()["files"]
    fetched = httpx2.get(file["url"], timeout=patience(20))

    assert urlsplit(file["url"]).netloc == urlsplit(endpoint).netloc
    assert "X-Amz-Signature=" in file["url"]
    assert "X-Amz-Expires=900" in file["url"]
    assert hashlib.sha256(fetched.content).hexdigest() == file["sha256"]


def test_a_broken_upload_leaves_neither_object_nor_open_parts(api: Api, url: str, endpoint: str) -> None:
    s3 = client(endpoint)
    before = s3.list_objects_v2(Bucket=BUCKET)["KeyCount"]
    large = part("file", b"x" * (2 * CHUNK_BYTES + 5), "cut.jsonl")

    with httpx2.Client(base_url=url, headers={"Authorization": f"Bearer {api.key}"}, timeout=patience(30)) as http:
        for body in (form(PURPOSE, large)[:-20], form(PURPOSE, large, large), form(FILE)):
            assert http.post("/v1/files", content=body, headers=TYPE).status_code == 400

    assert s3.list_objects_v2(Bucket=BUCKET)["KeyCount"] == before
    assert s3.list_multipart_uploads(Bucket=BUCKET).get("Uploads", []) == []


def test_a_missing_object_is_not_found_and_not_an_outage(s3_store: Store) -> None:
    with pytest.raises(NotFound):
        list(s3_store.chunks("no/such"))


def test_ready_says_so_on_s3_too(url: str) -> None:
    assert httpx2.get(f"{url}/readyz", timeout=patience(20)).json()["status"] == "ok"
