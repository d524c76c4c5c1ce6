"""Answers of a vLLM server as ours: the name that was asked for, our fingerprint, our errors. All else passes through.

Only what OpenAI's routes know goes up, and only text: vLLM has fields that act on the server itself, and would fetch
what a picture's URL names.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Iterable
from dataclasses import dataclass
from typing import Any, Final, TypeVar

import httpx2
import structlog
from fastapi import Request, Response
from fastapi.concurrency import run_in_threadpool
from fastapi.responses import JSONResponse, StreamingResponse
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from api import playground_connection, vllm
from api.body import json_object
from api.deps import Door
from api.errors import envelope
from api.views import completion_views
from api.vllm import Unserved, Vllm
from shared.contract.completions import AskedCompletion, CreateChatCompletion, ModelName, PlaygroundOptions
from shared.contract.generation import Target
from shared.contract.published import published_shape
from shared.errors import NotFound, TunepoolError
from shared.fleet import playgrounds
from shared.products import adapters, servability

log = structlog.get_logger()
Made = TypeVar("Made")

HEADERS: Final = {"x-tunepool-backend": "vllm"}
MOST_CHOICES: Final = 16


class Forwarded(BaseModel):
    """The fields that we read of a request that passes through. vLLM judges the rest."""

    model_config = ConfigDict(extra="allow")

    model: ModelName
    stream: bool | None = None
    n: int | None = Field(default=None, ge=1, le=MOST_CHOICES)
    tunepool: PlaygroundOptions = PlaygroundOptions()


@dataclass(frozen=True)
class UpstreamQuestion:
    """A request that vLLM can answer."""

    path: str
    body: dict[str, Any]
    model: str  # as it was asked for
    stream: bool
    target: Target

    def renamed(self, document: dict[str, Any]) -> dict[str, Any]:
        """An answer, or a chunk of one, under the name that was asked for."""
        document["model"] = self.model
        document["system_fingerprint"] = completion_views.fingerprint(self.target, backend="vllm")
        return document


async def answer(
    request: Request, door: Door, upstream: Vllm, body: bytes, shape: type[AskedCompletion], *, project_id: str
) -> Response:
    """The whole answer, or a stream of it. Raises Unserved, before anything was begun; Invalid, NotYet, NotFound."""
    question = await run_in_threadpool(_question, door, body, shape, project_id)
    answering = contextlib.AsyncExitStack()
    opening = asyncio.create_task(
        answering.enter_async_context(upstream.asked(question.path, question.body, question.target))
    )
    gone = asyncio.create_task(playground_connection.left(request))
    try:
        opened = await _unless_gone(opening, gone)
        if opened is None:
            return Response(status_code=400)  # to nobody
        if question.stream:
            stream = _stream(question, opened, answering.pop_all())
            headers = {**HEADERS, "cache-control": "no-store"}
            return StreamingResponse(stream, media_type="text/event-stream", headers=headers)
        document = await _unless_gone(asyncio.create_task(vllm.whole(opened)), gone)
        return (
            Response(status_code=400) if document is None else JSONResponse(question.renamed(document), headers=HEADERS)
        )
    finally:
        gone.cancel()
        await answering.aclose()


async def _unless_gone(work: asyncio.Task[Made], gone: asyncio.Task[None]) -> Made | None:
    """What comes of the work, or None when the client has left first."""
    await asyncio.wait({work, gone}, return_when=asyncio.FIRST_COMPLETED)
    if work.done():
        return work.result()
    work.cancel()
    with contextlib.suppress(asyncio.CancelledError, TunepoolError, Unserved):
        await work
    return None


async def _stream(
    question: UpstreamQuestion, opened: httpx2.Response, answering: contextlib.AsyncExitStack
) -> AsyncIterator[str]:
    try:
        async for chunk in vllm.events(opened):
            yield f"data: {'[DONE]' if chunk is None else completion_views.as_json(question.renamed(chunk))}\n\n"
    except TunepoolError as error:  # the status is sent already
        log.warning("completion.broken", code=error.code)
        broken = envelope(error.message, kind="server_error", param=error.param, code=error.code)
        yield f"data: {completion_views.as_json(broken)}\n\n"
    finally:
        await answering.aclose()


# --- what passes ------------------------------------------------------------------------------------------------------


def _question(door: Door, body: bytes, shape: type[AskedCompletion], project_id: str) -> UpstreamQuestion:
    document = json_object(body)
    try:
        forwarded = Forwarded.model_validate(document)
    except ValidationError:
        raise Unserved("the request is at fault") from None  # the playground's rules say how
    if forwarded.tunepool != PlaygroundOptions():
        raise Unserved("scale and disabled are the playground's")
    if set(document) - set(shape.model_fields):
        raise Unserved("the request has fields that OpenAI's have not")
    if not all(_is_text(message) for message in document.get("messages") or ()):
        raise Unserved("the request holds more than text")
    return UpstreamQuestion(
        path="/v1/chat/completions" if shape is CreateChatCompletion else "/v1/completions",
        body={name: value for name, value in document.items() if name not in {"model", "tunepool"}},
        model=forwarded.model,
        stream=bool(forwarded.stream),
        target=_target(door, forwarded.model, project_id, chat=shape is CreateChatCompletion),
    )


def _is_text(message: Any) -> bool:
    content = message.get("content") if isinstance(message, dict) else None
    parts: Iterable[Any] = content if isinstance(content, list) else ()
    return all(isinstance(part, dict) and part.get("type") in {"text", "refusal"} for part in parts)


def _target(door: Door, model: str, project_id: str, *, chat: bool) -> Target:
    catalogue = door.catalogue
    with door.session() as session:
        target = playgrounds.target(session, model, project_id=project_id, catalogue=catalogue)
        if target.adapter is None:
            return target
        try:
            spec = adapters.find_source(session, target.adapter, project_id=project_id).spec
        except NotFound:
            raise Unserved("it belongs to another project") from None
    if target.whole:
        raise Unserved("it is a whole model, not an adapter")
    if chat and target.chat_template is not None:
        raise Unserved("its job has a chat template of its own")
    verdict = next(it for it in servability.verdicts(published_shape(spec)) if it.server == "vllm")
    if not verdict.servable:
        raise Unserved(verdict.reason or "vLLM does not take it")
    return target
