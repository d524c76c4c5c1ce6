"""The object store: S3 and compatible servers, Google Cloud, Azure, or a folder. Metadata is in Postgres."""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
from collections.abc import AsyncIterator, Callable, Iterable, Iterator
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any, BinaryIO, Final

import obstore
from obstore.exceptions import BaseError
from obstore.store import AzureStore, GCSStore, LocalStore, S3Store

from shared.errors import Invalid, NotFound, Unavailable
from shared.settings import Settings

CHUNK_BYTES: Final = 8 * 1024 * 1024
CONCURRENT_PARTS: Final = 4  # of one upload, in memory; obstore's own 12 would be 96 MiB for each
STREAM_BYTES: Final = 1024 * 1024
CHECK_SECONDS: Final = 3.0
_SIGNING = (S3Store, GCSStore, AzureStore)
# obstore's own limit is 30 s for a whole transfer, which cuts off whoever downloads a large file on a slow line.
# Silence is what tells a dead store from a slow one.
_CLIENT: Final[Any] = {"connect_timeout": "5s", "read_timeout": "30s", "timeout": "6h"}
_RETRIES: Final[Any] = {"max_retries": 5, "retry_timeout": timedelta(seconds=60)}


@dataclass(frozen=True, slots=True)
class StoredObject:
    """The size of a written object, and the SHA-256 of its bytes in hexadecimal."""

    key: str
    bytes: int
    sha256: str


@dataclass(frozen=True, slots=True)
class ObjectFacts:
    """The size of an object, and a mark that changes with its bytes where the store has one (RFC 9110, 8.8.3)."""

    bytes: int
    etag: str | None


class Store:
    """Named bytes. Every method raises Unavailable when the store does not answer, NotFound for a missing object."""

    def __init__(self, backend: Any) -> None:
        self._backend = backend

    def put_open(self, key: str, source: BinaryIO, *, interrupt: Callable[[], None] = lambda: None) -> StoredObject:
        """Upload an open file from its beginning. Size and hash are those of the very bytes that were sent.

        `interrupt` is called before each part; what it raises ends the upload as Unavailable.
        """
        source.seek(0)
        first = source.read(CHUNK_BYTES)
        if len(first) < CHUNK_BYTES:
            return self.put_bytes(key, first)
        sent = _Sent(source, interrupt)
        source.seek(0)
        with _Translated(key):
            try:
                obstore.put(self._backend, key, sent, chunk_size=CHUNK_BYTES)
            except FileNotFoundError:
                if not self._has_arrived(key, sent.bytes):
                    raise
        return StoredObject(key=key, bytes=sent.bytes, sha256=sent.digest.hexdigest())

    def put_bytes(self, key: str, content: bytes) -> StoredObject:
        with _Translated(key):
            obstore.put(self._backend, key, content)
        return StoredObject(key=key, bytes=len(content), sha256=hashlib.sha256(content).hexdigest())

    async def put_stream(self, key: str, chunks: AsyncIterator[bytes]) -> None:
        """Upload chunks as they come; at most a few parts are in memory. An error in `chunks` leaves no object."""
        sent = 0

        async def counted() -> AsyncIterator[bytes]:
            nonlocal sent
            async for chunk in chunks:
                sent += len(chunk)
                yield chunk

        with _Translated(key):
            try:
                await obstore.put_async(
                    self._backend, key, counted(), chunk_size=CHUNK_BYTES, max_concurrency=CONCURRENT_PARTS
                )
            except FileNotFoundError:
                if not await asyncio.to_thread(self._has_arrived, key, sent):
                    raise

    def _has_arrived(self, key: str, size: int) -> bool:
        """Whether an upload in parts is complete that the store says it does not know.

        S3 joins the parts before it answers, and may take longer than an answer is waited for. The repeated request
        then finds the upload gone. Keys are used once, so what is there is what was sent.
        """
        with contextlib.suppress(FileNotFoundError):
            return int(obstore.head(self._backend, key)["size"]) == size
        return False

    def chunks(self, key: str) -> Iterator[bytes]:
        """The object's bytes, a part at a time."""
        with _Translated(key):
            for chunk in obstore.get(self._backend, key).stream(min_chunk_size=CHUNK_BYTES):
                yield bytes(chunk)

    async def stream(self, key: str) -> AsyncIterator[bytes]:
        """The same for async callers. The object is opened before the first part is asked for."""
        with _Translated(key):
            answer = await obstore.get_async(self._backend, key)
        return _parts(answer)

    async def facts(self, key: str) -> ObjectFacts:
        """The size and version of an object, without its bytes."""
        with _Translated(key):
            head = await obstore.head_async(self._backend, key)
        return ObjectFacts(bytes=int(head["size"]), etag=head["e_tag"])

    async def stream_part(self, key: str, start: int, end: int) -> AsyncIterator[bytes]:
        """Bytes `start` to `end` (half open, not empty, within the object), like `stream`."""
        with _Translated(key):
            answer = await obstore.get_async(self._backend, key, options={"range": (start, end)})
        return _parts(answer)

    def part(self, key: str, start: int, end: int) -> bytes:
        """Bytes `start` to `end` (half open, not empty, within the object)."""
        with _Translated(key):
            return bytes(obstore.get_range(self._backend, key, start=start, end=end))

    def get_file(self, key: str, path: Path) -> str:
        """Download to `path`. Returns the SHA-256 of what came."""
        digest = hashlib.sha256()
        with path.open("wb") as target:
            for chunk in self.chunks(key):
                digest.update(chunk)
                target.write(chunk)
        return digest.hexdigest()

    def delete(self, keys: Iterable[str]) -> None:
        """Remove objects; a key without one is no error."""
        for key in keys:
            try:
                with _Translated(key):
                    obstore.delete(self._backend, key)
            except NotFound:
                continue

    def keys(self, prefix: str) -> list[str]:
        """Keys below `prefix`."""
        with _Translated(prefix):
            return [entry["path"] for page in obstore.list(self._backend, prefix=prefix) for entry in page]

    def size(self, key: str) -> int:
        with _Translated(key):
            return int(obstore.head(self._backend, key)["size"])

    def presign(self, key: str, *, seconds: int) -> str | None:
        """A link that lets its holder GET this one object for a while; None where the store cannot sign."""
        if not isinstance(self._backend, _SIGNING):
            return None
        with _Translated(key):
            return obstore.sign(self._backend, "GET", key, timedelta(seconds=seconds))

    async def check(self) -> None:
        """Raises Unavailable when the store has not answered within three seconds."""
        try:
            with _Translated("health"):
                await asyncio.wait_for(obstore.head_async(self._backend, "health"), CHECK_SECONDS)
        except NotFound:
            return  # an answer


async def _parts(answer: Any) -> AsyncIterator[bytes]:
    async for chunk in answer.stream(min_chunk_size=STREAM_BYTES):
        yield bytes(chunk)


class _Sent:
    """The parts of an open file, counted and hashed as they go."""

    def __init__(self, source: BinaryIO, interrupt: Callable[[], None]) -> None:
        self._source, self._interrupt = source, interrupt
        self.bytes, self.digest = 0, hashlib.sha256()

    def __iter__(self) -> Iterator[bytes]:
        while chunk := self._source.read(CHUNK_BYTES):
            self._interrupt()
            self.bytes += len(chunk)
            self.digest.update(chunk)
            yield chunk


class _Translated:
    """obstore's errors as ours."""

    def __init__(self, key: str) -> None:
        self._key = key

    def __enter__(self) -> None:
        return None

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: object) -> None:
        if isinstance(error, FileNotFoundError):
            raise NotFound(f"No object '{self._key}' in the store.", code="object_not_found") from error
        if isinstance(error, (BaseError, OSError)):
            raise Unavailable(f"The object store did not answer: {str(error)[:300]}", code="object_store") from error


def open_store(settings: Settings) -> Store:
    """The store that STORAGE_URL names: file:///folder, s3://bucket/prefix, gs://bucket/prefix, az://container/prefix."""
    url = settings.storage
    scheme, _, rest = url.partition("://")
    if scheme == "file":
        with contextlib.suppress(OSError):  # said by the store, in the line below
            Path(rest).mkdir(mode=0o700, parents=True, exist_ok=True)  # a new one is its owner's alone
        return Store(LocalStore(prefix=rest, mkdir=True))
    bucket, _, prefix = rest.partition("/")
    if scheme == "s3":
        return Store(_s3(bucket, prefix, settings))
    if scheme == "gs":
        return Store(GCSStore(bucket, prefix=prefix or None, client_options=_CLIENT, retry_config=_RETRIES))
    if scheme == "az":
        return Store(AzureStore(bucket, prefix=prefix or None, client_options=_CLIENT, retry_config=_RETRIES))
    raise Invalid(f"STORAGE_URL '{url}' must begin with file://, s3://, gs:// or az://.", param="STORAGE_URL")


def _s3(bucket: str, prefix: str, settings: Settings) -> S3Store:
    options: dict[str, Any] = {"region": settings.storage_region}
    if settings.storage_access_key and settings.storage_secret_key:
        options |= {
            "access_key_id": settings.storage_access_key.get_secret_value(),
            "secret_access_key": settings.storage_secret_key.get_secret_value(),
        }
    if settings.storage_endpoint:
        # Self-hosted servers know no bucket host names.
        options |= {"endpoint": settings.storage_endpoint, "virtual_hosted_style_request": False}
    client: Any = {**_CLIENT, "allow_http": settings.storage_endpoint.startswith("http://")}
    return S3Store(bucket, prefix=prefix or None, client_options=client, retry_config=_RETRIES, **options)
