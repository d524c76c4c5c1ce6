"""Answers of /v1/chat/completions and /v1/completions, whole and in chunks; shapes and names are OpenAI's."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Any, Literal

from pydantic import Field

from api.views.view import View
from shared.contract.generation import ChosenToken, FinishReason, Target, TokenLogprob, ToolCall
from shared.ids import new_id


class CompletionUsage(View):
    """Tokens: of the prompt with its template, and all that were chosen, an end token too."""

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int


class FunctionCallView(View):
    name: str
    arguments: str = Field(description="JSON text. The model wrote it; it may not keep to the tool's schema.")


class ToolCallView(View):
    id: str
    type: Literal["function"] = "function"
    function: FunctionCallView


class ToolCallDelta(ToolCallView):
    index: int


class AssistantMessage(View):
    role: Literal["assistant"] = "assistant"
    content: str | None = Field(description="null where the answer is calls of tools alone.")
    refusal: None = None
    tool_calls: list[ToolCallView] | None = None


class TokenLogprobView(View):
    """A token, and the natural logarithm of its probability; -9999 for one out of the question."""

    token: str
    logprob: float
    bytes: list[int] | None = Field(description="Its text as UTF-8; null where it is part of a character.")


class ChosenTokenView(TokenLogprobView):
    top_logprobs: list[TokenLogprobView]


class ChatLogprobs(View):
    content: list[ChosenTokenView]
    refusal: None = None


class TextLogprobs(View):
    """The older route's form: one entry a token in each list."""

    tokens: list[str]
    token_logprobs: list[float]
    top_logprobs: list[dict[str, float]] | None
    text_offset: list[int]


class ChatChoice(View):
    index: Literal[0] = 0
    message: AssistantMessage
    logprobs: ChatLogprobs | None = None
    finish_reason: FinishReason


class ChatCompletion(View):
    id: str
    object: Literal["chat.completion"] = "chat.completion"
    created: int
    model: str = Field(description="As it was asked for.")
    choices: list[ChatChoice]
    usage: CompletionUsage
    system_fingerprint: str


class Delta(View):
    role: Literal["assistant"] | None = None
    content: str | None = None
    refusal: None = None
    tool_calls: list[ToolCallDelta] | None = None


class ChunkChoice(View):
    index: Literal[0] = 0
    delta: Delta
    logprobs: ChatLogprobs | None = None
    finish_reason: FinishReason | None = None


class ChatCompletionChunk(View):
    """`data` of a stream's events; after the last one comes `data: [DONE]`."""

    id: str
    object: Literal["chat.completion.chunk"] = "chat.completion.chunk"
    created: int
    model: str
    choices: list[ChunkChoice]
    usage: CompletionUsage | None = None
    system_fingerprint: str


class TextChoice(View):
    index: Literal[0] = 0
    text: str
    logprobs: TextLogprobs | None = None
    finish_reason: FinishReason | None


class TextCompletion(View):
    """An answer of /v1/completions, and each event of its stream."""

    id: str
    object: Literal["text_completion"] = "text_completion"
    created: int
    model: str
    choices: list[TextChoice]
    usage: CompletionUsage | None = None
    system_fingerprint: str


def fingerprint(target: Target, *, backend: Literal["playground", "vllm"] = "playground") -> str:
    """Stands for everything but the request that decides an answer: base, its storage, adapter, backend."""
    parts = (
        *(backend, target.base.source, target.base.name, target.base.revision),
        *("" if target.quantization is None else target.quantization.model_dump_json(), str(target.dtype)),
        *(target.adapter or "", *(file.sha256 for file in target.files)),
    )
    return f"fp_{hashlib.sha256(chr(0).join(parts).encode()).hexdigest()[:12]}"


def usage(prompt_tokens: int, completion_tokens: int) -> CompletionUsage:
    return CompletionUsage(
        prompt_tokens=prompt_tokens,
        completion_tokens=completion_tokens,
        total_tokens=prompt_tokens + completion_tokens,
    )


@dataclass(frozen=True)
class AnswerContent:
    """What an answer says, a piece or the whole. `logprobs`: of its tokens, where asked for; `offset`: its place."""

    text: str
    logprobs: Sequence[ChosenToken] | None = None
    offset: int = 0
    calls: Sequence[ToolCall] = ()


@dataclass(frozen=True)
class ChatForm:
    """How the chat route writes an answer."""

    id: str
    created: int
    model: str
    system_fingerprint: str
    tells_usage: bool = False  # each chunk of a stream has the field, null before the last one

    def whole(self, words: AnswerContent, reason: FinishReason, used: CompletionUsage) -> str:
        calls = [ToolCallView(**_called(call)) for call in words.calls]
        message = AssistantMessage(content=words.text or (None if calls else ""), tool_calls=calls or None)
        choice = ChatChoice(message=message, logprobs=_of_chat(words.logprobs), finish_reason=reason)
        made = ChatCompletion(**_head(self), choices=[choice], usage=used)
        without = {"choices": {0: {"message": {"tool_calls"}}}}  # OpenAI's types know no null there
        return made.model_dump_json(exclude=None if calls else without)

    def first(self) -> str | None:
        return self._chunk([ChunkChoice(delta=Delta(role="assistant", content=""))])

    def piece(self, words: AnswerContent) -> str:
        return self._chunk([ChunkChoice(delta=Delta(content=words.text), logprobs=_of_chat(words.logprobs))])

    def called(self, calls: Sequence[ToolCall]) -> str:
        deltas = [ToolCallDelta(index=index, **_called(call)) for index, call in enumerate(calls)]
        return self._chunk([ChunkChoice(delta=Delta(tool_calls=deltas))])

    def last(self, reason: FinishReason) -> str:
        return self._chunk([ChunkChoice(delta=Delta(), finish_reason=reason)])

    def used(self, used: CompletionUsage) -> str:
        return self._chunk([], usage=used)

    def _chunk(self, choices: list[ChunkChoice], **more: Any) -> str:
        chunk = ChatCompletionChunk(**_head(self), choices=choices, **more)
        document = chunk.model_dump(mode="json", exclude=None if self.tells_usage else {"usage"})
        for choice in document["choices"]:
            choice["delta"] = {name: value for name, value in choice["delta"].items() if value is not None}
        return as_json(document)


@dataclass(frozen=True)
class TextForm:
    """How the older route writes an answer."""

    id: str
    created: int
    model: str
    system_fingerprint: str
    tells_usage: bool = False  # each chunk of a stream has the field, null before the last one

    def whole(self, words: AnswerContent, reason: FinishReason, used: CompletionUsage) -> str:
        choice = TextChoice(text=words.text, logprobs=_of_text(words.logprobs, words.offset), finish_reason=reason)
        return self._made([choice], used).model_dump_json()

    def first(self) -> str | None:
        return None

    def piece(self, words: AnswerContent) -> str:
        choice = TextChoice(text=words.text, logprobs=_of_text(words.logprobs, words.offset), finish_reason=None)
        return self._chunk([choice])

    def called(self, calls: Sequence[ToolCall]) -> str:
        raise AssertionError("the older route offers no tools")

    def last(self, reason: FinishReason) -> str:
        return self._chunk([TextChoice(text="", finish_reason=reason)])

    def used(self, used: CompletionUsage) -> str:
        return self._chunk([], used)

    def _made(self, choices: list[TextChoice], used: CompletionUsage | None) -> TextCompletion:
        return TextCompletion(**_head(self), choices=choices, usage=used)

    def _chunk(self, choices: list[TextChoice], used: CompletionUsage | None = None) -> str:
        made = self._made(choices, used)
        return as_json(made.model_dump(mode="json", exclude=None if self.tells_usage else {"usage"}))


def _head(form: ChatForm | TextForm) -> dict[str, Any]:
    return {name: value for name, value in vars(form).items() if name != "tells_usage"}


def _called(call: ToolCall) -> dict[str, Any]:
    return {"id": new_id("call_"), "function": FunctionCallView(name=call.name, arguments=call.arguments)}


def _of_chat(tokens: Sequence[ChosenToken] | None) -> ChatLogprobs | None:
    if tokens is None:
        return None
    return ChatLogprobs(
        content=[
            ChosenTokenView(**_viewed(token), top_logprobs=[TokenLogprobView(**_viewed(other)) for other in token.top])
            for token in tokens
        ]
    )


def _viewed(token: TokenLogprob) -> dict[str, Any]:
    part_of_a_character = "\ufffd" in token.token
    return {
        "token": token.token,
        "logprob": token.logprob,
        "bytes": None if part_of_a_character else list(token.token.encode("utf-8", "replace")),
    }


def _of_text(tokens: Sequence[ChosenToken] | None, offset: int) -> TextLogprobs | None:
    if tokens is None:
        return None
    starts = list(accumulate((len(token.token) for token in tokens), initial=offset))
    return TextLogprobs(
        tokens=[token.token for token in tokens],
        token_logprobs=[token.logprob for token in tokens],
        top_logprobs=[{other.token: other.logprob for other in token.top} for token in tokens]
        if any(token.top for token in tokens)
        else None,
        text_offset=starts[:-1],
    )


def as_json(document: dict[str, Any]) -> str:
    """A document as it stands behind `data:`, on one line."""
    return json.dumps(document, ensure_ascii=False, separators=(",", ":"))
