"""/v1/chat/completions and /v1/completions: a question to a model, answered by a playground of the pool."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import structlog
from fastapi import APIRouter, Request, Response
from fastapi.concurrency import run_in_threadpool
from fastapi.responses import StreamingResponse

from api import playground_connection, vllm_answers
from api.body import body_of, parse, raw_body
from api.deps import Door, door_of
from api.errors import envelope
from api.playground_connection import PlaygroundConnection
from api.views import completion_views as views
from api.views.completion_views import AnswerContent, ChatForm, TextForm
from api.vllm import Unserved
from shared.contract.completions import AskedCompletion, CreateChatCompletion, CreateCompletion, PlaygroundOptions
from shared.contract.generation import Called, Piece, Question, Target, ToolCall
from shared.errors import Invalid, TunepoolError
from shared.fleet import playgrounds
from shared.fleet.playgrounds import PlaygroundAddress
from shared.ids import new_id

log = structlog.get_logger()
router = APIRouter(prefix="/v1", tags=["playground"])

SCOPE = "models:read"
Form = ChatForm | TextForm
Asked = TypeVar("Asked", bound=AskedCompletion)


def _described(body: type[AskedCompletion], chunk: str, example: dict[str, Any]) -> dict[str, Any]:
    return {**body_of(body, example=example), "x-stream-of": {"$ref": f"#/components/schemas/{chunk}"}}


CHAT = _described(
    CreateChatCompletion,
    "ChatCompletionChunk",
    {
        "model": "ft:smollm2-135m-instruct:acme:tickets:0193a1b2",
        "messages": [{"role": "user", "content": "My parcel is late."}],
        "temperature": 0,
    },
)
TEXT = _described(CreateCompletion, "TextCompletion", {"model": "smollm2-135m-instruct", "prompt": "Once upon a time"})


@dataclass(frozen=True)
class ResolvedRequest:
    """A request that is understood: what answers it, where, and how its answer is written."""

    target: Target
    places: Sequence[PlaygroundAddress]
    question: Question
    form: Form
    stream: bool
    one_call: bool  # of an answer's calls only the first is told


Reading = Callable[[Door, bytes, str], ResolvedRequest]


@router.post("/chat/completions", response_model=views.ChatCompletion, openapi_extra=CHAT)
async def create_chat_completion(request: Request) -> Response:
    """Answer a conversation: a base model, a tuned model (`ft:…`), a checkpoint of one, or a combination.

    With `stream: true` the answer is a stream of server-sent events, each with a chunk, and `data: [DONE]` at the end.
    A playground has one base model in memory; the first question to another waits until it is loaded, or is refused
    with a 503 and `Retry-After`.
    """
    return await _answer(request, _chat, CreateChatCompletion)


@router.post("/completions", response_model=views.TextCompletion, openapi_extra=TEXT)
async def create_completion(request: Request) -> Response:
    """Go on from a text, without a chat template: the way of models that were trained on plain text.

    Streams and waits as `/v1/chat/completions` does.
    """
    return await _answer(request, _text, CreateCompletion)


def _chat(door: Door, body: bytes, project_id: str) -> ResolvedRequest:
    asked = _parsed(body, CreateChatCompletion)
    question = _question(
        asked,
        messages=[message.plain() for message in asked.messages],
        tools=asked.offered,
        answer_schema=asked.answer_schema,
        read_calls=asked.is_about_tools,
    )
    one_call = asked.parallel_tool_calls is False
    return _settled(door, asked, question, form=ChatForm, prefix="chatcmpl-", project_id=project_id, one_call=one_call)


def _text(door: Door, body: bytes, project_id: str) -> ResolvedRequest:
    asked = _parsed(body, CreateCompletion)
    question = _question(asked, text=asked.text)
    return _settled(door, asked, question, form=TextForm, prefix="cmpl-", project_id=project_id)


def _parsed(body: bytes, model: type[Asked]) -> Asked:
    asked = parse(body, model, data=model.model_fields)
    asked.must_be_possible()
    return asked


def _question(asked: AskedCompletion, **prompt: Any) -> Question:
    options = asked.tunepool
    # Which adapter is the target's matter; here it only says whether any speaks.
    adapter = None if options.disabled else "asked"
    return Question(number=0, adapter=adapter, scale=options.scale, sampling=asked.sampling(), **prompt)


def _settled(
    door: Door,
    asked: AskedCompletion,
    question: Question,
    *,
    form: type[ChatForm | TextForm],
    prefix: str,
    project_id: str,
    one_call: bool = False,
) -> ResolvedRequest:
    catalogue = door.catalogue
    with door.session() as session:
        target = playgrounds.target(session, asked.model, project_id=project_id, catalogue=catalogue)
        places = playgrounds.places(session, pool_name=door.settings.pool, base_model=target.base.name)
    if target.whole and asked.tunepool != PlaygroundOptions():
        raise Invalid(
            f"'{asked.model}' is a whole model, not an adapter: nothing of it can be weighed or switched off.",
            param="tunepool",
            code="unsupported_combination",
        )
    tells_usage = asked.stream_options is not None and asked.stream_options.include_usage
    return ResolvedRequest(
        target=target,
        places=places,
        question=question,
        form=form(new_id(prefix), int(time.time()), asked.model, views.fingerprint(target), tells_usage),
        stream=bool(asked.stream),
        one_call=one_call,
    )


# --- the answer -------------------------------------------------------------------------------------------------------


async def _answer(request: Request, read: Reading, shape: type[AskedCompletion]) -> Response:
    caller = await run_in_threadpool(door_of(request).caller, request, scope=SCOPE)  # before the body, however long
    return await _answered(request, caller.project_id, await raw_body(request), read, shape)


async def answered_chat(request: Request, project_id: str, body: bytes) -> Response:
    """The answer to a conversation whose asker is known already. Raises Invalid, NotFound, NotYet."""
    return await _answered(request, project_id, body, _chat, CreateChatCompletion)


async def _answered(
    request: Request, project_id: str, body: bytes, read: Reading, shape: type[AskedCompletion]
) -> Response:
    """By vLLM where there is one that can, else by a playground. Headers say which, and why it was not vLLM."""
    door = door_of(request)
    headers = {"x-tunepool-backend": "playground"}
    if door.vllm is not None:
        try:
            return await vllm_answers.answer(request, door, door.vllm, body, shape, project_id=project_id)
        except Unserved as why:
            log.info("vllm.unserved", why=str(why))
            headers["x-tunepool-fallback"] = ascii(str(why)).strip("'\"")[:500]
    settled = await run_in_threadpool(read, door, body, project_id)
    answer = await _by_playground(request, settled)
    answer.headers.update(headers)
    return answer


async def _by_playground(request: Request, settled: ResolvedRequest) -> Response:
    """Nothing is sent before the answer has begun, so that a refusal is an ordinary error."""
    seconds = door_of(request).settings.playground_wait_seconds
    gone = asyncio.create_task(playground_connection.left(request))
    working = asyncio.create_task(_begun(settled, seconds=seconds))
    try:
        await asyncio.wait({working, gone}, return_when=asyncio.FIRST_COMPLETED)
        if not working.done():
            return Response(status_code=400)  # to nobody
        line, prompt_tokens = working.result()
        if settled.stream:
            stream = _stream(settled, line, prompt_tokens)
            return StreamingResponse(stream, media_type="text/event-stream", headers={"cache-control": "no-store"})
        collecting = asyncio.create_task(_whole(settled, line, prompt_tokens))
        await asyncio.wait({collecting, gone}, return_when=asyncio.FIRST_COMPLETED)
        if not collecting.done():
            collecting.cancel()
            line.close()
            return Response(status_code=400)
        return collecting.result()
    finally:
        working.cancel()
        gone.cancel()


async def _begun(settled: ResolvedRequest, *, seconds: float) -> tuple[PlaygroundConnection, int]:
    line = await playground_connection.ask(settled.places, settled.target, settled.question)
    try:
        begun = await line.begin(seconds=seconds)
    except BaseException:
        line.close()
        raise
    return line, begun.prompt_tokens


async def _whole(settled: ResolvedRequest, line: PlaygroundConnection, prompt_tokens: int) -> Response:
    parts: list[Piece] = []
    calls: Sequence[ToolCall] = ()
    try:
        async for reply in line.rest():
            if isinstance(reply, Piece):
                parts.append(reply)
            elif isinstance(reply, Called):
                calls = _told(reply, settled)
            else:
                used = views.usage(prompt_tokens, reply.completion_tokens)
                answer = _all_of(parts, settled.question, calls)
                whole = settled.form.whole(answer, reply.finish_reason, used)
                return Response(whole, media_type="application/json")
    finally:
        line.close()
    raise AssertionError("an answer ends in its end or in an error")


def _told(called: Called, settled: ResolvedRequest) -> Sequence[ToolCall]:
    return called.calls[:1] if settled.one_call else called.calls


def _all_of(parts: Sequence[Piece], question: Question, calls: Sequence[ToolCall]) -> AnswerContent:
    tokens = [token for part in parts for token in part.logprobs or ()]
    asked = question.sampling.top_logprobs is not None
    return AnswerContent("".join(part.text for part in parts), tokens if asked else None, calls=calls)


async def _stream(settled: ResolvedRequest, line: PlaygroundConnection, prompt_tokens: int) -> AsyncIterator[str]:
    form, shown = settled.form, 0
    try:
        first = form.first()
        if first is not None:
            yield _event(first)
        async for reply in line.rest():
            if isinstance(reply, Piece):
                yield _event(form.piece(AnswerContent(reply.text, reply.logprobs, offset=shown)))
                shown += len(reply.text)
                continue
            if isinstance(reply, Called):
                yield _event(form.called(_told(reply, settled)))
                continue
            yield _event(form.last(reply.finish_reason))
            if form.tells_usage:
                yield _event(form.used(views.usage(prompt_tokens, reply.completion_tokens)))
        yield "data: [DONE]\n\n"
    except TunepoolError as error:  # the status is sent already
        log.warning("completion.broken", code=error.code)
        body = envelope(error.message, kind="server_error", param=error.param, code=error.code)
        yield _event(views.as_json(body))
    finally:
        line.close()


def _event(data: str) -> str:
    return f"data: {data}\n\n"
