"""The local store: whole objects or none, bytes as they were, errors by name."""

from __future__ import annotations

import asyncio
import hashlib
import io
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import obstore
import pytest
from obstore.store import LocalStore

from shared.errors import Invalid, NotFound, Unavailable
from shared.settings import Settings
from shared.store.storage import CHUNK_BYTES, Store, open_store

CONTENT = bytes(range(256)) * (CHUNK_BYTES // 128)  # two parts


async def in_pieces(content: bytes, *, breaks: bool = False) -> AsyncIterator[bytes]:
    for start in range(0, len(content), 100_000):
        yield content[start : start + 100_000]
    if breaks:
        raise Invalid("cut off")


def files_below(settings: Settings) -> list[Path]:
    return [path for path in Path(settings.storage.removeprefix("file://")).rglob("*") if path.is_file()]


def test_what_goes_in_as_a_stream_comes_out_as_it_was(store: Store, tmp_path: Path) -> None:
    asyncio.run(store.put_stream("proj_1/files/file-1", in_pieces(CONTENT)))

    assert b"".join(store.chunks("proj_1/files/file-1")) == CONTENT
    assert store.get_file("proj_1/files/file-1", tmp_path / "copy") == hashlib.sha256(CONTENT).hexdigest()
    assert store.size("proj_1/files/file-1") == len(CONTENT)


def test_async_readers_get_the_same_bytes(store: Store) -> None:
    async def read() -> bytes:
        return b"".join([chunk async for chunk in await store.stream("k")])

    store.put_bytes("k", CONTENT)

    assert asyncio.run(read()) == CONTENT


def test_a_stream_that_breaks_leaves_no_object_and_no_scraps(store: Store, settings: Settings) -> None:
    with pytest.raises(Invalid):
        asyncio.run(store.put_stream("k", in_pieces(CONTENT, breaks=True)))

    assert store.keys("") == []
    assert files_below(settings) == []


def test_an_uploaded_file_is_described_by_its_size_and_hash(store: Store, tmp_path: Path) -> None:
    (tmp_path / "f").write_bytes(CONTENT)

    with (tmp_path / "f").open("rb") as source:
        stored = store.put_open("k", source)

    assert (stored.bytes, stored.sha256) == (len(CONTENT), hashlib.sha256(CONTENT).hexdigest())


def test_a_missing_object_is_named(store: Store) -> None:
    for read in (lambda: list(store.chunks("no/such")), lambda: store.size("no/such")):
        with pytest.raises(NotFound, match="no/such"):
            read()
    with pytest.raises(NotFound, match="no/such"):
        asyncio.run(store.stream("no/such"))


def test_deleting_what_is_not_there_is_fine_and_the_rest_goes_all_the_same(store: Store) -> None:
    store.put_bytes("b", b"1")

    store.delete(["a", "b", "c"])

    assert store.keys("") == []


def test_keys_are_listed_below_a_prefix_only(store: Store) -> None:
    for key in ("p/1", "p/2/x", "pq/3"):
        store.put_bytes(key, b"1")

    assert sorted(store.keys("p")) == ["p/1", "p/2/x"]


def test_a_folder_cannot_sign_links(store: Store) -> None:
    assert store.presign("k", seconds=60) is None


def test_a_working_store_passes_its_check(store: Store) -> None:
    asyncio.run(store.check())


def test_a_store_that_is_away_is_unavailable_and_not_missing(settings: Settings) -> None:
    gone = open_store(settings.model_copy(update={"storage_url": "s3://b", "storage_endpoint": "http://127.0.0.1:1"}))

    with pytest.raises(Unavailable):
        asyncio.run(gone.check())


@pytest.mark.parametrize("url", ["ftp://host/x", "/just/a/path", "http://bucket"])
def test_a_url_of_another_kind_is_refused_with_the_known_ones(settings: Settings, url: str) -> None:
    with pytest.raises(Invalid, match="file://, s3://"):
        open_store(settings.model_copy(update={"storage_url": url}))


@pytest.mark.parametrize("arrives", [True, False])
def test_an_upload_whose_answer_was_lost_is_done_if_the_object_is_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, arrives: bool
) -> None:
    store = Store(LocalStore(prefix=tmp_path))
    content = b"x" * (CHUNK_BYTES + 5)
    put, put_async = obstore.put, obstore.put_async

    def forgotten(backend: Any, key: str, source: Any, **options: Any) -> None:
        put(backend, key if arrives else "elsewhere", source, **options)
        raise FileNotFoundError("NoSuchUpload")

    async def forgotten_async(backend: Any, key: str, source: Any, **options: Any) -> None:
        await put_async(backend, key if arrives else "elsewhere", source, **options)
        raise FileNotFoundError("NoSuchUpload")

    async def chunks() -> AsyncIterator[bytes]:
        yield content[:7]
        yield content[7:]

    monkeypatch.setattr(obstore, "put", forgotten)
    monkeypatch.setattr(obstore, "put_async", forgotten_async)
    if arrives:
        assert store.put_open("a", io.BytesIO(content)).bytes == len(content)
        asyncio.run(store.put_stream("b", chunks()))
        assert store.size("a") == store.size("b") == len(content)
    else:
        with pytest.raises(NotFound):
            store.put_open("a", io.BytesIO(content))
        with pytest.raises(NotFound):
            asyncio.run(store.put_stream("b", chunks()))
