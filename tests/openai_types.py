"""Answers of OpenAI's routes, held to the types of the installed openai package.

The client itself builds its objects without validating them: a missing field is found by whoever reads it. Here every
answer is validated strictly: each field that the types require, of their very type, and nothing beside them but
`tunepool`. Clients that tests make with `HOOKS` have all their answers looked at; `FAULTS` is what was found.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Final

import httpx2
from httpx2 import SyncByteStream
from openai import DefaultHttpxClient
from openai.types import (
    Completion,
    EvalCreateResponse,
    EvalDeleteResponse,
    EvalListResponse,
    EvalRetrieveResponse,
    EvalUpdateResponse,
    FileDeleted,
    FileObject,
    Model,
    ModelDeleted,
    Upload,
)
from openai.types.chat import ChatCompletion, ChatCompletionChunk
from openai.types.evals import (
    RunCancelResponse,
    RunCreateResponse,
    RunDeleteResponse,
    RunListResponse,
    RunRetrieveResponse,
)
from openai.types.evals.runs import OutputItemListResponse, OutputItemRetrieveResponse
from openai.types.fine_tuning import FineTuningJob, FineTuningJobEvent
from openai.types.fine_tuning.alpha import GraderRunResponse, GraderValidateResponse
from openai.types.fine_tuning.checkpoints import (
    PermissionCreateResponse,
    PermissionDeleteResponse,
    PermissionListResponse,
)
from openai.types.fine_tuning.jobs import FineTuningJobCheckpoint
from openai.types.uploads import UploadPart
from pydantic import BaseModel, ValidationError


@dataclass(frozen=True)
class Listed:
    """A page of such objects. `ids`: the page names its first and last one; `more`: it says whether there are more."""

    kind: type[BaseModel]
    ids: bool = False
    more: bool = True


JOB = "/v1/fine_tuning/jobs"
PERMISSIONS = "/v1/fine_tuning/checkpoints/{checkpoint}/permissions"
RUNS = "/v1/evals/{eval_id}/runs"
BYTES: Final = None  # an answer that is no JSON

# Every route of OpenAI's that is here -> what its package says of the answer.
TYPES: Final[dict[str, type[BaseModel] | Listed | None]] = {
    "POST /v1/files": FileObject,
    "GET /v1/files": Listed(FileObject, ids=True),
    "GET /v1/files/{file_id}": FileObject,
    "DELETE /v1/files/{file_id}": FileDeleted,
    "GET /v1/files/{file_id}/content": BYTES,
    "POST /v1/uploads": Upload,
    "POST /v1/uploads/{upload_id}/parts": UploadPart,
    "POST /v1/uploads/{upload_id}/complete": Upload,
    "POST /v1/uploads/{upload_id}/cancel": Upload,
    f"POST {JOB}": FineTuningJob,
    f"GET {JOB}": Listed(FineTuningJob),
    f"GET {JOB}/{{job_id}}": FineTuningJob,
    f"POST {JOB}/{{job_id}}/cancel": FineTuningJob,
    f"POST {JOB}/{{job_id}}/pause": FineTuningJob,
    f"POST {JOB}/{{job_id}}/resume": FineTuningJob,
    f"GET {JOB}/{{job_id}}/events": Listed(FineTuningJobEvent),
    f"GET {JOB}/{{job_id}}/checkpoints": Listed(FineTuningJobCheckpoint, ids=True),
    f"POST {PERMISSIONS}": Listed(PermissionCreateResponse, ids=True),
    f"GET {PERMISSIONS}": Listed(PermissionListResponse, ids=True),
    f"DELETE {PERMISSIONS}/{{permission_id}}": PermissionDeleteResponse,
    "POST /v1/fine_tuning/alpha/graders/validate": GraderValidateResponse,
    "POST /v1/fine_tuning/alpha/graders/run": GraderRunResponse,
    "GET /v1/models": Listed(Model, more=False),
    "GET /v1/models/{model}": Model,
    "DELETE /v1/models/{model}": ModelDeleted,
    "POST /v1/chat/completions": ChatCompletion,
    "POST /v1/completions": Completion,
    "POST /v1/evals": EvalCreateResponse,
    "GET /v1/evals": Listed(EvalListResponse, ids=True),
    "GET /v1/evals/{eval_id}": EvalRetrieveResponse,
    "POST /v1/evals/{eval_id}": EvalUpdateResponse,
    "DELETE /v1/evals/{eval_id}": EvalDeleteResponse,
    f"POST {RUNS}": RunCreateResponse,
    f"GET {RUNS}": Listed(RunListResponse, ids=True),
    f"GET {RUNS}/{{run_id}}": RunRetrieveResponse,
    f"DELETE {RUNS}/{{run_id}}": RunDeleteResponse,
    f"POST {RUNS}/{{run_id}}": RunCancelResponse,
    f"POST {RUNS}/{{run_id}}/cancel": RunCancelResponse,
    f"GET {RUNS}/{{run_id}}/output_items": Listed(OutputItemListResponse, ids=True),
    f"GET {RUNS}/{{run_id}}/output_items/{{output_item_id}}": OutputItemRetrieveResponse,
}
# And of each event, where it is asked for as a stream.
EVENTS: Final[dict[str, type[BaseModel]]] = {
    "/v1/chat/completions": ChatCompletionChunk,
    "/v1/completions": Completion,
}
OURS: Final = "tunepool"
# docs/api.md names these. OpenAI's own examples have `paused` and the nulls, and its upload route the purpose `evals`.
_METHODS: Final = frozenset({"supervised", "dpo", "reinforcement"})
_NULL_ERRORS: Final = frozenset({"eval.run", "eval.run.output_item"})

FAULTS: Final[list[str]] = []


def hold(response: httpx2.Response) -> None:
    """Look at one answer. For a client's event hook: what is raised there, the openai client takes for a lost line."""
    request = response.request
    if not request.url.path.startswith("/v1/"):
        return
    route = f"{request.method} {request.url.path}"
    kind = response.headers.get("content-type", "").partition(";")[0]
    if kind == "text/event-stream" and request.url.path in EVENTS and isinstance(response.stream, SyncByteStream):
        response.stream = _Watched(response.stream, route, EVENTS[request.url.path])
    if kind != "application/json":
        return
    response.read()
    if response.status_code >= 400:
        faults = list(faults_of_error(response.text))
    else:
        typed = type_of(request.method, request.url.path)
        faults = [] if typed is None else list(faults_of(typed, response.text))
    FAULTS.extend(f"{route} {response.status_code}: {fault}" for fault in faults)


class _Watched(SyncByteStream):
    """A stream on its way to its reader. Its events are looked at when it ends, or is left."""

    def __init__(self, stream: SyncByteStream, route: str, kind: type[BaseModel]) -> None:
        self._stream, self._route, self._kind, self._seen = stream, route, kind, bytearray()

    def __iter__(self) -> Iterator[bytes]:
        for piece in self._stream:
            self._seen += piece
            yield piece

    def close(self) -> None:
        self._stream.close()
        whole, _, _ = bytes(self._seen).rpartition(b"\n\n")
        self._seen.clear()
        for event in filter(None, whole.decode().split("\n\n")):
            FAULTS.extend(f"{self._route} event: {fault}" for fault in faults_of_event(self._kind, event))


HOOKS: Final[dict[str, list[Any]]] = {"response": [hold]}


def held() -> DefaultHttpxClient:
    """For an OpenAI client whose answers are all to be looked at."""
    return DefaultHttpxClient(event_hooks=HOOKS)


def type_of(method: str, path: str) -> type[BaseModel] | Listed | None:
    """What a route answers; None for one that is not OpenAI's, or whose answer is no JSON."""
    path = path.removesuffix("/")
    return next((kind for rule, kind in _RULES if rule.fullmatch(f"{method} {path}")), None)


def _rule(route: str) -> re.Pattern[str]:
    """Names of models may hold slashes, ids do not."""
    return re.compile(re.sub(r"{(\w+)}", lambda found: ".+" if found[1] in ("model", "checkpoint") else "[^/]+", route))


_RULES: Final = [(_rule(route), kind) for route, kind in TYPES.items()]


def faults_of_error(text: str) -> Iterator[str]:
    """What is wrong with a refusal's body."""
    error = json.loads(text).get("error")
    if not isinstance(error, dict) or error.keys() != {"message", "type", "param", "code"}:
        yield f"no error of OpenAI's: {text[:200]}"
        return
    for name, value in error.items():
        if not isinstance(value, str) and (name in ("message", "type") or value is not None):
            yield f"error.{name} is {value!r}"


def faults_of_event(kind: type[BaseModel], event: str) -> Iterator[str]:
    """What is wrong with an event of a stream."""
    data = event.removeprefix("data: ")
    if data == event or "\n" in data:
        yield f"no line of data: {event[:200]!r}"
    elif data != "[DONE]":
        yield from faults_of_error(data) if data.startswith('{"error"') else _of_one(kind, data)


def faults_of(kind: type[BaseModel] | Listed, text: str) -> Iterator[str]:
    """What is wrong with an answer."""
    if not isinstance(kind, Listed):
        yield from _of_one(kind, text)
        return
    page = json.loads(text)
    named = {"first_id", "last_id"} if kind.ids else set()
    expected = {"object", "data"} | named | ({"has_more"} if kind.more else set())
    if page.keys() - {OURS} != expected:
        yield f"a page has {sorted(expected)}, not {sorted(page)}"
        return
    if page["object"] != "list" or (kind.more and not isinstance(page["has_more"], bool)):
        yield f"a page is no list: {page['object']!r}"
    ends = [page["data"][0]["id"], page["data"][-1]["id"]] if page["data"] else [None, None]
    if kind.ids and [page["first_id"], page["last_id"]] != ends:
        yield f"first_id and last_id are {page['first_id']}, {page['last_id']}, not {ends}"
    for place, one in enumerate(page["data"]):
        yield from (f"data.{place}.{fault}" for fault in _of_one(kind.kind, json.dumps(one)))


def _of_one(kind: type[BaseModel], text: str) -> Iterator[str]:
    document = _without_known_differences(json.loads(text))
    try:
        read = kind.model_validate_json(json.dumps(document), strict=True)
    except ValidationError as error:
        for fault in error.errors(include_url=False):
            place = ".".join(str(part) for part in fault["loc"])
            yield f"{place}: {fault['msg']} ({str(fault['input'])[:60]})"
    else:
        yield from (f"{place} is no field of {kind.__name__}" for place in _beside(read))


def _without_known_differences(document: dict[str, Any]) -> dict[str, Any]:
    known = dict(document)
    if known.get("object") == "fine_tuning.job":
        known["status"] = "queued" if known["status"] == "paused" else known["status"]
        if (known.get("method") or {}).get("type") not in _METHODS:
            known.pop("method", None)
    if known.get("object") in ("file", "upload") and known.get("purpose") == "evals":
        known["purpose"] = "user_data"
    if known.get("object") in _NULL_ERRORS:
        no_error = {"code": "", "message": ""}
        if "error" in known:
            known["error"] = known["error"] or no_error
        if "sample" in known:
            known["sample"] = {**known["sample"], "error": known["sample"]["error"] or no_error}
    if known.get("object") == "text_completion":  # of a stream: OpenAI's type of the whole knows no null there
        known["choices"] = [{**one, "finish_reason": one["finish_reason"] or "stop"} for one in known["choices"]]
    grader = known.get("grader")
    if isinstance(grader, dict) and grader.get("type") == "multi":  # the type knows one grader, OpenAI's guide a map
        known["grader"] = {**grader, "graders": next(iter(grader["graders"].values()))}
    if isinstance(known.get("file"), dict):
        known["file"] = _without_known_differences(known["file"])
    return known


def _beside(read: Any, place: str = "") -> Iterator[str]:
    """Fields that the types do not know. Those under `tunepool` are ours, and looked at by no type."""
    if isinstance(read, BaseModel):
        free = "__pydantic_extra__" in vars(type(read)).get("__annotations__", {})  # the type says: any others too
        if not free:
            yield from (f"{place}{name}" for name in (read.model_extra or {}) if name != OURS)
        for name in type(read).model_fields:
            yield from _beside(getattr(read, name), f"{place}{name}.")
    elif isinstance(read, list):
        for number, one in enumerate(read):
            yield from _beside(one, f"{place}{number}.")
