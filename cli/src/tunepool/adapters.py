"""Lists, downloads, merges and combines adapters."""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable, Collection
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final
from urllib.parse import quote

import httpx2

from tunepool.requests import BadSetting
from tunepool.transfers import Transfer

if TYPE_CHECKING:
    from openai import OpenAI

UNFINISHED: Final = ("queued", "running")
POLL_SECONDS: Final = 1.0


class ChecksumMismatch(Exception):
    """A downloaded file has other bytes than the server promised."""


def names(client: OpenAI) -> list[str]:
    """Names of the fine-tuned models that this key may use."""
    return [model.id for model in client.models.list() if model.id.startswith("ft:")]


def describe(client: OpenAI, name: str) -> dict[str, Any]:
    """The server's record of an adapter, merge or combination: base model and files (name, bytes, sha256, url)."""
    kind = "merges" if name.startswith("merge_") else "adapters"
    record = client.get(f"/tunepool/{kind}/{quote(name, safe=':')}", cast_to=object)
    return _record(record)


def lines(adapter: dict[str, Any]) -> list[str]:
    """An adapter's record for people: where it is, its files, and which servers take it."""
    size = sum(file["bytes"] for file in adapter["files"])
    return [
        f"{adapter['name']}  (base {adapter['base_model']})",
        f"{adapter['location']}  {len(adapter['files'])} files, {size:,} bytes",
        *(f"{_TOLD[verdict['servable']]:9}{verdict['server']:12}{verdict['reason'] or ''}" for verdict in _of(adapter)),
    ]


_TOLD = {True: "serves", False: "no", None: "unknown"}


def _of(adapter: dict[str, Any]) -> list[dict[str, Any]]:
    return adapter.get("servable") or []  # a server older than this command has none


def merge(client: OpenAI, name: str, *, onto: str) -> dict[str, Any]:
    """Have adapter `name` merged into its base model, `onto` the "base" or the "dequantized" weights."""
    return _record(client.post("/tunepool/merges", cast_to=object, body={"adapter": name, "onto": onto}))


def combine(client: OpenAI, weighted: list[str], *, combination_type: str, **options: Any) -> dict[str, Any]:
    """Have adapters, each given as NAME or NAME=WEIGHT, combined. Raises BadSetting for a weight that is no number."""
    body = {"adapters": [_weighted(item) for item in weighted], "combination_type": combination_type, **options}
    return _record(client.post("/tunepool/combinations", cast_to=object, body=body))


def _weighted(text: str) -> dict[str, Any]:
    name, equals, weight = text.rpartition("=")
    if not equals:
        return {"adapter": text}
    try:
        return {"adapter": name, "weight": float(weight)}
    except ValueError:
        raise BadSetting(f"'{text}': the weight '{weight}' is not a number.") from None


def wait(client: OpenAI, merge_id: str, *, sleep: Callable[[float], None] = time.sleep) -> dict[str, Any]:
    """The record of a merge or combination once it has ended."""
    while (record := describe(client, merge_id))["status"] in UNFINISHED:
        sleep(POLL_SECONDS)
    return record


def _record(answer: object) -> dict[str, Any]:
    assert isinstance(answer, dict)
    return answer


def download(client: OpenAI, name: str, *, out: Path) -> list[Path]:
    """Fetch every file of adapter `name` into `out`. Each is verified before it takes its name.

    Raises:
        Damaged: the bytes do not match the recorded sha256.
        openai.APIStatusError, httpx2.HTTPError: the server or the store refuses.
    """
    return fetch(describe(client, name)["files"], out=out)


def fetch(files: list[dict[str, Any]], *, out: Path, only: Collection[str] | None = None) -> list[Path]:
    """Fetch files (name, sha256, url) into `out`. Each is verified before it takes its name. Raises as `download`.

    `only`: the names that are wanted; None: all.
    """
    written = []
    for file in files:
        if only is not None and file["name"] not in only:
            continue
        target = out / file["name"]
        # Names come from a server: none may lead out of the folder that was asked for.
        if not target.resolve().is_relative_to(out.resolve()):
            raise ChecksumMismatch(f"The file name {file['name']!r} leads out of {out}.")
        _fetch(file["url"], target, sha256=file["sha256"])
        written.append(target)
    return written


def _fetch(url: str, target: Path, *, sha256: str) -> None:
    target.parent.mkdir(parents=True, exist_ok=True)
    unfinished = target.with_name(target.name + ".part")
    digest = hashlib.sha256()
    # No bearer key goes along: the link itself is the permission, and may point to another host.
    with httpx2.stream("GET", url, follow_redirects=True, timeout=60) as response, unfinished.open("wb") as file:
        response.raise_for_status()
        length = response.headers.get("content-length", "")
        with Transfer(target.name, int(length) if length.isdigit() else None) as transfer:
            for chunk in response.iter_bytes(1 << 20):
                digest.update(chunk)
                file.write(chunk)
                transfer.at(file.tell())
    if digest.hexdigest() != sha256:
        unfinished.unlink()
        raise ChecksumMismatch(f"{target.name}: sha256 is {digest.hexdigest()}, the server recorded {sha256}.")
    unfinished.rename(target)
