"""Turns the words of a command line into the parts of a request."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, Literal

from tunepool import official
from tunepool.transfers import CountedFile, Transfer

if TYPE_CHECKING:
    from openai import APIStatusError, OpenAI
    from openai.types import FileObject
    from openai.types.fine_tuning.job_create_params import Method


MethodName = Literal["supervised", "dpo", "kto", "orpo", "simpo"]  # as the server's `ObjectiveName`
LARGE_BYTES: Final = 64 * 1024 * 1024  # as much as a part may hold


class BadSetting(Exception):
    """A word of the command line cannot be understood; the message says how it should look."""


def nested(settings: Iterable[str]) -> dict[str, Any]:
    """`adapter.r=8` becomes `{"adapter": {"r": 8}}`. Values are JSON where they can be, else text."""
    body: dict[str, Any] = {}
    for path, text in _split(settings):
        *parents, last = path.split(".")
        place = body
        for name in parents:
            place = place.setdefault(name, {})
            if not isinstance(place, dict):
                raise BadSetting(f"'{path}' goes below '{name}', which has a value already.")
        place[last] = _value(text)
    return body


def with_columns(extension: dict[str, Any], columns: Iterable[str]) -> dict[str, Any]:
    """The extension with `prompt=question` and the like as `training.columns`."""
    named = pairs(columns)
    training = extension.setdefault("training", {}) if named else {}
    if not isinstance(training, dict):
        raise BadSetting("'training' has a value already; --column goes below it.")
    if named:
        training["columns"] = {**training.get("columns", {}), **named}
    return extension


def pairs(settings: Iterable[str]) -> dict[str, str]:
    return dict(_split(settings))


def method(name: str, **hyperparameters: int | None) -> Method:
    """OpenAI's `method` with the hyperparameters that were given; the server settles the others."""
    return {"type": name, name: {"hyperparameters": given(**hyperparameters)}}  # type: ignore[misc]  # more names than OpenAI's


def given(**options: Any) -> dict[str, Any]:
    """The entries that have a value. The client would send an explicit null for None, which means something else."""
    return {name: value for name, value in options.items() if value is not None}


def check_model(client: OpenAI, name: str) -> None:
    """Raises openai.NotFoundError for a model that is not there; a key that may not look is let pass."""
    with suppress(official.PermissionDeniedError):
        client.models.retrieve(name)


def file_id(client: OpenAI, source: str) -> str:
    """The id of an uploaded file. A path is uploaded first, unless the project has a file of the same bytes."""
    if source.startswith("file-") and not Path(source).exists():
        return source
    if not Path(source).is_file():
        what = "a folder: name a file in it" if Path(source).is_dir() else "neither a file nor the id of one"
        raise BadSetting(f"'{source}' is {what}.")
    return _uploaded(client, Path(source)) or upload(client, Path(source)).id


def upload(client: OpenAI, path: Path) -> FileObject:
    """The file, uploaded: in parts when it is large, so that a lost line costs one part. Never whole in memory."""
    size = path.stat().st_size
    with Transfer(path.name, size) as transfer:
        if size > LARGE_BYTES:
            return _in_parts(client, path, size, transfer)
        with CountedFile(path, transfer.at) as stream:
            return client.files.create(file=(path.name, stream), purpose="fine-tune")


def _in_parts(client: OpenAI, path: Path, size: int, transfer: Transfer) -> FileObject:
    """What the client's `upload_file_chunked` does, and how far it is."""
    with path.open("rb") as stream:
        digest = hashlib.file_digest(stream, partial(hashlib.md5, usedforsecurity=False)).hexdigest()
        begun = client.uploads.create(
            bytes=size, filename=path.name, mime_type="application/octet-stream", purpose="fine-tune"
        )
        stream.seek(0)
        parts = list[str]()
        while data := stream.read(LARGE_BYTES):
            parts.append(client.uploads.parts.create(upload_id=begun.id, data=data).id)
            transfer.at(stream.tell())
    made = client.uploads.complete(upload_id=begun.id, part_ids=parts, md5=digest)
    if made.file is None:
        raise BadSetting(f"'{path}' was uploaded, and its file was deleted since.")
    return made.file


def _uploaded(client: OpenAI, path: Path) -> str | None:
    same = with_content(client, sha256_of(path))
    return next((file.id for file in same if file.filename == path.name and file.status != "error"), None)


def sha256_of(path: Path) -> str:
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def with_content(client: OpenAI, digest: str) -> list[FileObject]:
    """The project's files of these bytes, newest first; none for a key that may only write."""
    try:
        page = client.files.list(purpose="fine-tune", limit=20, order="desc", extra_query={"sha256": digest})
    except official.PermissionDeniedError:
        return []
    # Another service would not know the filter, and answer any file.
    return [file for file in page.data if ((file.model_extra or {}).get("tunepool") or {}).get("sha256") == digest]


def reason(error: APIStatusError) -> str:
    """The server's sentence, and the code and parameter that it names."""
    body = error.body if isinstance(error.body, dict) else {}
    named = ", ".join(f"{key}: {body[key]}" for key in ("code", "param") if body.get(key))
    return f"{body.get('message') or error.message} ({named or error.status_code})"


def _split(settings: Iterable[str]) -> list[tuple[str, str]]:
    split = [setting.partition("=") for setting in settings]
    for name, equals, value in split:
        if not name or not equals:
            raise BadSetting(f"'{name}{equals}{value}' should look like NAME=VALUE.")
    return [(name, value) for name, _, value in split]


def _value(text: str) -> Any:
    try:
        return json.loads(text)
    except ValueError:
        return text
