"""Reads what OpenAI's API listed: records of jobs and of files, and the JSONL files themselves. No network.

An export comes from elsewhere: every text of it may be hostile, and its names lead nowhere but into the folder.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

from tunepool.requests import BadSetting

MAX_EXPORT_BYTES: Final = 64 * 2**20
FILE_RECORDS: Final = "files.json"
# (least, most, whole numbers only); a least of 0 is itself excluded. The server's bounds: a test compares them.
BOUNDS: Final[dict[str, tuple[int, int, bool]]] = {
    "n_epochs": (1, 50, True),
    "batch_size": (1, 256, True),
    "learning_rate_multiplier": (0, 1000, False),
    "beta": (0, 2, False),
}
HYPERPARAMETERS: Final = {
    "supervised": ("n_epochs", "batch_size", "learning_rate_multiplier"),
    "dpo": ("n_epochs", "batch_size", "learning_rate_multiplier", "beta"),
}
MAX_METADATA: Final = 16
MAX_KEY: Final = 64
MAX_VALUE: Final = 512
MAX_SUFFIX: Final = 64
MAX_SEED: Final = 2**31 - 1
SHOWN: Final = 60  # characters of a value in a sentence

_ID: Final = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,99}")  # it becomes the name of a file
_SPACE: Final = re.compile(r"[ \t\r\n]*")
# What the server refuses in a label, since it would act on the terminal that lists it.
_ACTING: Final = re.compile("[\x00-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069]")
_FIRST_LINE_BYTES: Final = 16 * 2**20


class BadExport(BadSetting):
    """A file of the export cannot be understood; the message says where, and what it should be."""


@dataclass(frozen=True)
class ExportedJob:
    """One job as it was at OpenAI: what of it can be asked for here, and what of it cannot."""

    id: str
    model: str
    status: str
    training_file: str
    validation_file: str | None
    fine_tuned_model: str | None
    method: str
    hyperparameters: dict[str, Any]
    suffix: str | None
    seed: int | None
    metadata: dict[str, str]
    notes: list[str] = field(default_factory=list)
    """What is left out or changed, in sentences."""
    obstacles: list[str] = field(default_factory=list)
    """Why this job cannot be asked for at all."""


def jobs(path: Path) -> tuple[list[ExportedJob], bool]:
    """The jobs of an export in its order, and whether it says itself that more of them follow.

    It may be an array, a list object, several of these, JSON lines, or one record. Raises BadExport.
    """
    listed, more = records(path)
    raw: dict[str, dict[str, Any]] = {}
    for number, record in enumerate(listed, 1):
        job_id = _checked_id(record, f"{path.name}: record {number}")
        if raw.setdefault(job_id, record) != record:
            raise BadExport(f"{path.name}: record {number} has the id {job_id} of an earlier record, and differs.")
    return [_job(record, f"{path.name}: {job_id}") for job_id, record in raw.items()], more


def records(path: Path) -> tuple[list[dict[str, Any]], bool]:
    """Every record of a file of OpenAI's lists, and whether its last page has `has_more`. Raises BadExport."""
    listed: list[Any] = []
    more = False
    for document in _documents(path):
        for page in document if isinstance(document, list) else [document]:
            if isinstance(page, dict) and isinstance(page.get("data"), list):
                listed += page["data"]
                more = page.get("has_more") is True
            else:
                listed.append(page)
    for number, record in enumerate(listed, 1):
        if not isinstance(record, dict):
            raise BadExport(f"{path.name}: record {number} is {_kind(record)}; a JSON object is needed.")
        _refuse_what_is_no_text(record, f"{path.name}: record {number}")
    return listed, more


def _documents(path: Path) -> Iterator[Any]:
    text = _text(path)
    decoder = json.JSONDecoder()
    position = _past_space(text, 0)
    if position == len(text):
        raise BadExport(f"{path.name} is empty.")
    while position < len(text):
        try:
            document, position = decoder.raw_decode(text, position)
        except json.JSONDecodeError as error:
            raise BadExport(f"{path.name}: line {error.lineno}, column {error.colno}: {error.msg}.") from None
        except (RecursionError, ValueError) as error:  # nested without end, or a number of thousands of digits
            raise BadExport(f"{path.name}: no export looks like this: {error}.") from None
        yield document
        position = _past_space(text, position)


def _text(path: Path) -> str:
    try:
        size = path.stat().st_size
        if size > MAX_EXPORT_BYTES:
            raise BadExport(f"{path.name} has {size:,} bytes; records are read up to {MAX_EXPORT_BYTES:,}. Split it.")
        content = path.read_bytes()
        return content.decode(json.detect_encoding(content)).removeprefix("\ufeff")
    except OSError as error:
        raise BadExport(f"{path.name} cannot be read: {error.strerror}.") from None
    except UnicodeDecodeError as error:
        raise BadExport(f"{path.name}: byte {error.start + 1} is not {error.encoding}.") from None


def _past_space(text: str, position: int) -> int:
    match = _SPACE.match(text, position)
    return match.end() if match else position


def _refuse_what_is_no_text(record: dict[str, Any], where: str) -> None:
    try:
        json.dumps(record, ensure_ascii=False).encode()
    except UnicodeEncodeError:
        raise BadExport(f"{where} holds half of a character (a lone surrogate), which is no text.") from None
    except RecursionError:
        raise BadExport(f"{where} is nested too deeply.") from None


def _checked_id(record: dict[str, Any], where: str) -> str:
    if record.get("object", "fine_tuning.job") != "fine_tuning.job":
        raise BadExport(f"{where} is a {_shown(record['object'])}; records of fine-tuning jobs are needed.")
    job_id = _field(record, "id", where)
    if not _ID.fullmatch(job_id):
        raise BadExport(f"{where}: id {_shown(job_id)} is none of OpenAI's: letters, digits, _ . - are needed.")
    return job_id


def _field(record: dict[str, Any], name: str, where: str) -> str:
    value: str = _maybe(record, name, where)
    if not value:
        raise BadExport(f"{where}: '{name}' is missing.")
    return value


def _maybe(record: dict[str, Any], name: str, where: str, kind: type = str) -> Any:
    """The field, or None where it is missing or null. Raises BadExport for another type."""
    value = record.get(name)
    if value is not None and (not isinstance(value, kind) or isinstance(value, bool)):
        raise BadExport(f"{where}: '{name}' is {_kind(value)}; {_KINDS[kind]} is needed.")
    return value


_KINDS: Final[dict[type, str]] = {
    str: "a text", int: "a whole number", dict: "an object", list: "an array", float: "a number", bool: "a truth value",
}  # fmt: skip


def _kind(value: Any) -> str:
    return "null" if value is None else _KINDS[type(value)]


def _shown(value: Any) -> str:
    text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
    return f"'{text[:SHOWN]}…'" if len(text) > SHOWN else f"'{text}'"


def _job(record: dict[str, Any], where: str) -> ExportedJob:
    notes: list[str] = []
    obstacles: list[str] = []
    tuned = _maybe(record, "fine_tuned_model", where)
    method, values = _method(record, where)
    if method not in HYPERPARAMETERS:
        obstacles.append(f"method {_shown(method)} is not offered here; supervised and dpo are.")
    if _maybe(record, "integrations", where, list):
        notes.append("integrations are left out: metrics are in the job's events and its result file.")
    return ExportedJob(
        id=record["id"],
        model=_field(record, "model", where),
        status=_field(record, "status", where),
        training_file=_field(record, "training_file", where),
        validation_file=_maybe(record, "validation_file", where),
        fine_tuned_model=tuned,
        method=method,
        hyperparameters=_hyperparameters(method, values, notes),
        suffix=_suffix(_maybe(record, "user_provided_suffix", where) or _suffix_in(tuned), notes),
        seed=_seed(_maybe(record, "seed", where, int), notes),
        metadata=_metadata(_maybe(record, "metadata", where, dict) or {}, notes),
        notes=notes,
        obstacles=obstacles,
    )


def _method(record: dict[str, Any], where: str) -> tuple[str, dict[str, Any]]:
    """The method's name and its hyperparameters; old records have these beside the job's other fields."""
    old = _maybe(record, "hyperparameters", where, dict) or {}
    method = _maybe(record, "method", where, dict)
    if method is None:
        return "supervised", old
    name = _field(method, "type", f"{where}: method")
    part = _maybe(method, name, f"{where}: method", dict) or {}
    values = _maybe(part, "hyperparameters", f"{where}: method.{name[:SHOWN]}", dict)
    return name, old if values is None else values


def _hyperparameters(method: str, values: dict[str, Any], notes: list[str]) -> dict[str, Any]:
    kept: dict[str, Any] = {}
    if method not in HYPERPARAMETERS:
        return kept
    for name, value in values.items():
        if value is None or value == "auto":
            continue  # which is what a field that is left out means
        if name not in HYPERPARAMETERS[method]:
            notes.append(f"hyperparameter {_shown(name)} has no equivalent and is left out.")
        elif _is_within(value, *BOUNDS[name]):
            kept[name] = value
        else:
            notes.append(f"{name} {_shown(value)} is not {_bounds(*BOUNDS[name])}: it is left to 'auto'.")
    return kept


def _is_within(value: Any, least: int, most: int, whole: bool) -> bool:
    if isinstance(value, bool) or not isinstance(value, int if whole else (int, float)):
        return False
    return value <= most and (value > 0 if least == 0 else value >= least)  # not-a-number is neither


def _bounds(least: int, most: int, whole: bool) -> str:
    start = f"from {least}" if least else "above 0"
    return f"a {'whole ' if whole else ''}number {start} to {most}"


def _suffix_in(tuned: str | None) -> str | None:
    """`ft:BASE:ORGANIZATION:SUFFIX:ID` has the suffix, which the record itself has not."""
    parts = (tuned or "").split(":")
    return parts[3] or None if len(parts) >= 5 and parts[0] == "ft" else None


def _suffix(suffix: str | None, notes: list[str]) -> str | None:
    if suffix and (len(suffix) > MAX_SUFFIX or _ACTING.search(suffix)):
        notes.append(f"suffix {_shown(suffix)} is too long, or holds a control character: it is left out.")
        return None
    return suffix


def _seed(seed: int | None, notes: list[str]) -> int | None:
    if seed is not None and not 0 <= seed <= MAX_SEED:
        notes.append(f"seed {_shown(seed)} is not from 0 to {MAX_SEED}: another one is drawn.")
        return None
    return seed


def _metadata(labels: dict[str, Any], notes: list[str]) -> dict[str, str]:
    """The labels that can be kept, with one place left for `imported_from`."""
    kept: dict[str, str] = {}
    for key, value in labels.items():
        if not isinstance(value, str) or not 0 < len(key) <= MAX_KEY or len(value) > MAX_VALUE:
            notes.append(f"metadata {_shown(key)} is left out: it is no text, or too long.")
        elif _ACTING.search(key + value):
            notes.append(f"metadata {_shown(key)} is left out: it holds a control character.")
        elif key == "imported_from" or len(kept) == MAX_METADATA - 1:
            notes.append(f"metadata {_shown(key)} is left out: 'imported_from' takes its place.")
        else:
            kept[key] = value
    return kept


class Unusable(Exception):
    """A data file is missing or is no JSONL; the message says which, and what would help."""


class DataFolder:
    """The JSONL files of an export, found by id, or by the filename that `files.json` has for the id."""

    def __init__(self, folder: Path) -> None:
        """Raises BadExport for a `files.json` that cannot be understood."""
        self._folder = folder
        self._known: dict[str, dict[str, Any]] = {}
        listing = folder / FILE_RECORDS
        for number, record in enumerate(records(listing)[0] if listing.exists() else [], 1):
            file_id = _field(record, "id", f"{FILE_RECORDS}: record {number}")
            name = _field(record, "filename", f"{FILE_RECORDS}: record {number}")
            _maybe(record, "bytes", f"{FILE_RECORDS}: record {number}", int)
            if self._known.setdefault(file_id, record)["filename"] != name:
                raise BadExport(f"{FILE_RECORDS}: record {number} has the id {_shown(file_id)} of an earlier record.")

    def filename(self, file_id: str) -> str | None:
        """The name under which it was uploaded to OpenAI, where `files.json` has one that is a name."""
        name = self._known.get(file_id, {}).get("filename", "")
        is_name = bool(name) and name == Path(name).name and not _ACTING.search(name) and name not in {".", ".."}
        return name if is_name else None

    def path(self, file_id: str) -> Path:
        """Where the file lies. Raises Unusable when it is missing, is another one, or has no JSON object to begin."""
        file = next(filter(self._is_ours, self._candidates(file_id)), None)
        if file is None:
            raise Unusable(f"file {_shown(file_id)} is missing: put it into the folder as {file_id[:SHOWN]}.jsonl.")
        size, recorded = file.stat().st_size, self._known.get(file_id, {}).get("bytes")
        if recorded is not None and size != recorded:
            raise Unusable(f"{_shown(file.name)} has {size:,} bytes; OpenAI's record of {file_id} has {recorded:,}.")
        _refuse_what_is_no_jsonl(file)
        return file

    def _candidates(self, file_id: str) -> Iterator[Path]:
        if not _ID.fullmatch(file_id):
            return
        yield self._folder / f"{file_id}.jsonl"
        yield self._folder / file_id
        name = self.filename(file_id)
        if name is None or name == FILE_RECORDS or not self._is_ours(self._folder / name):
            return
        if sum(record["filename"] == name for record in self._known.values()) > 1:
            raise Unusable(f"several files are called {_shown(name)}: name this one {file_id}.jsonl.")
        yield self._folder / name

    def _is_ours(self, file: Path) -> bool:
        return file.is_file() and file.resolve().is_relative_to(self._folder.resolve())


def _refuse_what_is_no_jsonl(file: Path) -> None:
    """A look at the first line; the server looks at all of them. Raises Unusable."""
    try:
        with file.open("rb") as stream:
            line = stream.readline(_FIRST_LINE_BYTES)
        row = json.loads(line.decode("utf-8-sig"))
    except OSError as error:
        raise Unusable(f"{_shown(file.name)} cannot be read: {error.strerror}.") from None
    except json.JSONDecodeError as error:
        raise Unusable(f"{_shown(file.name)} is no JSONL: line 1, column {error.colno}: {error.msg}.") from None
    except (UnicodeDecodeError, RecursionError, ValueError) as error:
        raise Unusable(f"{_shown(file.name)} is no JSONL: line 1: {error}.") from None
    if not isinstance(row, dict):
        raise Unusable(f"{_shown(file.name)} is no JSONL: line 1 is {_kind(row)}, an object is needed.")
