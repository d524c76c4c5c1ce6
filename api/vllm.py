"""Asks a vLLM server before any playground. Adapters are loaded there at their first use, under names of its own.

vLLM 0.33: adapters come by `POST /v1/load_lora_adapter` while it runs with `VLLM_ALLOW_RUNTIME_LORA_UPDATING=True`; it
reads them from a folder that both see. It knows nothing of our names, keys and projects, and we send it none of them.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import secrets
import shutil
import time
from collections import defaultdict
from collections.abc import AsyncIterator, Sequence
from pathlib import Path, PurePosixPath
from typing import Any, Final

import httpx2
import structlog

from shared.contract.generation import Target, WireFile
from shared.errors import Invalid, NotFound, NotYet
from shared.settings import Settings
from shared.store.storage import Store

log = structlog.get_logger()

MODELS_SECONDS: Final = 30.0  # so long an answer of /v1/models is believed
TIMEOUT: Final = httpx2.Timeout(600.0, connect=3.0, pool=10.0)
CONNECTIONS: Final = httpx2.Limits(max_connections=1000, max_keepalive_connections=100)
LOADED_ALREADY: Final = "already been loaded"
ANSWER_BYTES: Final = 64 * 1024 * 1024


class Unserved(Exception):
    """vLLM cannot answer this one; the playground may. The words are for whoever asked."""


class Vllm:
    """One upstream server. Its client belongs to the event loop of the first request."""

    def __init__(self, settings: Settings, store: Store) -> None:
        self._folder = settings.vllm_folder
        self._store = store
        key = settings.vllm_key.get_secret_value()
        self._client = httpx2.AsyncClient(
            base_url=settings.vllm_url.rstrip("/").removesuffix("/v1"),
            headers={"authorization": f"Bearer {key}"} if key else {},
            timeout=TIMEOUT,
            limits=CONNECTIONS,
            follow_redirects=False,
            trust_env=False,
        )
        self._loaded: set[str] = set()
        self._loading: defaultdict[str, asyncio.Lock] = defaultdict(asyncio.Lock)
        self._bases: tuple[float, dict[str, str]] = (-MODELS_SECONDS, {})

    async def close(self) -> None:
        await self._client.aclose()

    # --- names --------------------------------------------------------------------------------------------------------

    async def name_of(self, target: Target) -> str:
        """The name by which vLLM knows the target; an adapter is loaded there first. Raises Unserved."""
        base = await self._base(target)
        if target.adapter is None:
            return base
        name = f"tp-{target.adapter}"  # SGLang and others split names at colons, so none of ours is used
        async with self._loading[name]:
            if name not in self._loaded:
                await self._load(name, target.files)
                self._loaded.add(name)
        return name

    async def _base(self, target: Target) -> str:
        known_since, bases = self._bases
        if time.monotonic() - known_since > MODELS_SECONDS:
            bases = await self._served()
            self._bases = (time.monotonic(), bases)
        for name in (target.base.public_name, target.base.name):
            if name in bases:
                return bases[name]
        raise Unserved(f"vLLM does not serve the base model '{target.base.name}'")

    async def _served(self) -> dict[str, str]:
        """Names and paths of the base models that vLLM has -> the name to ask for."""
        models = (await self._call("GET", "/v1/models")).get("data")
        listed = models if isinstance(models, list) else []
        bases = [it for it in listed if isinstance(it, dict) and it.get("id") and not it.get("parent")]
        return {str(it[key]): str(it["id"]) for key in ("root", "id") for it in bases if it.get(key)}

    async def _load(self, name: str, files: Sequence[WireFile]) -> None:
        folder = await asyncio.to_thread(self._stage, name, files)
        begun = time.monotonic()
        try:
            await self._call("POST", "/v1/load_lora_adapter", {"lora_name": name, "lora_path": str(folder)})
        except Unserved as refused:
            if LOADED_ALREADY not in str(refused):
                raise
        log.info("vllm.loaded", name=name, seconds=round(time.monotonic() - begun, 2))

    async def _call(self, method: str, path: str, body: dict[str, Any] | None = None) -> dict[str, Any]:
        """An answer of vLLM as an object; empty when it is plain text. Raises Unserved."""
        try:
            answer = await self._client.request(method, path, json=body)
        except httpx2.HTTPError as error:
            raise Unserved(f"vLLM does not answer ({type(error).__name__})") from error
        if answer.status_code != 200:
            raise Unserved(f"vLLM refused with {answer.status_code}: {_words(answer.content)[0]}")
        with contextlib.suppress(ValueError):
            document = answer.json()
            return document if isinstance(document, dict) else {}
        return {}

    # --- files --------------------------------------------------------------------------------------------------------

    def _stage(self, name: str, files: Sequence[WireFile]) -> Path:
        """The adapter's files where vLLM reads them. Blocks. Raises Unserved."""
        folder = self._folder / name
        if folder.is_dir():
            return folder
        unfinished = self._folder / f"{name}.{secrets.token_hex(4)}.part"
        try:
            for file in files:
                self._fetch(file, unfinished)
            try:
                unfinished.rename(folder)
            except OSError:  # another process was first
                if not folder.is_dir():
                    raise
        except OSError as error:
            raise Unserved(f"the folder that vLLM reads adapters from cannot be written ({error.strerror})") from error
        finally:
            shutil.rmtree(unfinished, ignore_errors=True)
        return folder

    def _fetch(self, file: WireFile, folder: Path) -> None:
        inside = PurePosixPath(file.name)
        if inside.is_absolute() or ".." in inside.parts:
            raise Unserved("the adapter names a file outside its folder")
        path = folder / inside
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            came = self._store.get_file(file.key, path)
        except NotFound:
            raise Unserved("a file of the adapter is gone") from None
        if came != file.sha256:
            raise Unserved("a file of the adapter has other bytes than its manifest says")
        os.chmod(path, 0o644)  # vLLM is another user

    # --- questions ----------------------------------------------------------------------------------------------------

    @contextlib.asynccontextmanager
    async def asked(self, path: str, body: dict[str, Any], target: Target) -> AsyncIterator[httpx2.Response]:
        """The answer to `body`, open, with status 200. An adapter that vLLM has forgotten is loaded once more.

        Raises:
            Unserved: it cannot be asked; nothing was begun.
            Invalid: it refuses the request, in its words.
            NotYet: it failed.
        """
        for last in (False, True):
            name = await self.name_of(target)
            request = self._client.build_request("POST", path, json={**body, "model": name})
            try:
                answer = await self._client.send(request, stream=True)
            except httpx2.HTTPError as error:
                raise Unserved(f"vLLM does not answer ({type(error).__name__})") from error
            try:
                if answer.status_code == 404 and not last:
                    self._loaded.discard(name)
                    continue
                if answer.status_code != 200:
                    raise await _refusal(answer)
                yield answer
                return
            finally:
                await answer.aclose()


async def whole(answer: httpx2.Response) -> dict[str, Any]:
    """The body of an answer. Raises NotYet when it breaks off or is none."""
    content = bytearray()
    try:
        async for chunk in answer.aiter_bytes():
            content += chunk
            if len(content) > ANSWER_BYTES:
                raise failed("its answer is too long")
        document = _parsed(content)
    except (httpx2.HTTPError, ValueError, RecursionError) as error:
        raise failed(f"its answer is broken ({type(error).__name__})") from error
    if not isinstance(document, dict):
        raise failed("its answer is no object")
    return document


async def events(answer: httpx2.Response) -> AsyncIterator[dict[str, Any] | None]:
    """The chunks of a stream, None for its `[DONE]`. Raises NotYet when it breaks off before that."""
    try:
        async for line in answer.aiter_lines():
            if not line.startswith("data:"):
                continue
            data = line.removeprefix("data:").strip()
            if data == "[DONE]":
                yield None
                return
            document = _parsed(data)
            if not isinstance(document, dict):
                raise failed("its answer is no object")
            yield document
    except (httpx2.HTTPError, ValueError, RecursionError) as error:
        raise failed(f"its answer broke off ({type(error).__name__})") from error
    raise failed("its answer broke off")


def _parsed(text: str | bytes | bytearray) -> Any:
    """Raises ValueError, RecursionError. A probability of zero may come as -Infinity, which is no JSON."""
    return json.loads(text, parse_constant=lambda _: None)


def failed(why: str) -> NotYet:
    return NotYet(f"The vLLM server behind this model failed: {why}. Try again.", code="vllm_failed")


async def _refusal(answer: httpx2.Response) -> Invalid | NotYet | Unserved:
    try:
        words, param, code = _words(await answer.aread())
    except httpx2.HTTPError as error:
        return failed(type(error).__name__)
    if answer.status_code in {401, 403, 404}:
        log.error("vllm.refuses_us", status=answer.status_code, words=words)
        return Unserved(f"vLLM refused with {answer.status_code}")
    if answer.status_code in {400, 413, 422}:
        return Invalid(words, param=param, code=code or "invalid_value")
    return failed(f"it answered {answer.status_code}")


def _words(content: bytes) -> tuple[str, str | None, str | None]:
    """Message, field and code of an error of vLLM: under `error` since 0.10, flat before."""
    try:
        document = _parsed(content[:100_000])
    except (ValueError, RecursionError):
        return content[:300].decode("utf-8", "replace"), None, None
    inner = document.get("error", document) if isinstance(document, dict) else {}
    inner = inner if isinstance(inner, dict) else {"message": inner}
    texts = (inner.get(key) for key in ("param", "code"))
    param, code = (text if isinstance(text, str) else None for text in texts)
    return str(inner.get("message") or "no reason given")[:2000], param, code
