"""Answers of /v1/chat/completions and /v1/completions, whole and in chunks; shapes and names are OpenAI's."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from typing import Any, Literal

from pydantic import Field

from api.views.view import View
from shared.contract.talk import FinishReason, Target


class CompletionUsage(View):
    """Tokens: of the prompt with its template, and all that were chosen, an end token too."""

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int


class AssistantMessage(View):
    role: Literal["assistant"] = "assistant"
    content: str
    refusal: None = None


class ChatChoice(View):
    index: Literal[0] = 0
    message: AssistantMessage
    logprobs: None = None
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


class ChunkChoice(View):
    index: Literal[0] = 0
    delta: Delta
    logprobs: None = None
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
    logprobs: None = None
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
    """Stands for all that decides an answer beside the request: base, its storage, adapter, backend."""
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
class ChatForm:
    """How the chat route writes an answer."""

    id: str
    created: int
    model: str
    system_fingerprint: str

    def whole(self, text: str, reason: FinishReason, used: CompletionUsage) -> View:
        choice = ChatChoice(message=AssistantMessage(content=text), finish_reason=reason)
        return ChatCompletion(**self._head, choices=[choice], usage=used)

    def first(self) -> str | None:
        return self._chunk([ChunkChoice(delta=Delta(role="assistant", content=""))])

    def piece(self, text: str) -> str:
        return self._chunk([ChunkChoice(delta=Delta(content=text))])

    def last(self, reason: FinishReason) -> str:
        return self._chunk([ChunkChoice(delta=Delta(), finish_reason=reason)])

    def used(self, used: CompletionUsage) -> str:
        return self._chunk([], usage=used)

    @property
    def _head(self) -> dict[str, Any]:
        return vars(self)

    def _chunk(self, choices: list[ChunkChoice], **more: Any) -> str:
        chunk = ChatCompletionChunk(**self._head, choices=choices, **more)
        document = chunk.model_dump(mode="json", exclude={"usage"} if chunk.usage is None else None)
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

    def whole(self, text: str, reason: FinishReason, used: CompletionUsage) -> View:
        return self._made([TextChoice(text=text, finish_reason=reason)], used)

    def first(self) -> str | None:
        return None

    def piece(self, text: str) -> str:
        return self._chunk([TextChoice(text=text, finish_reason=None)])

    def last(self, reason: FinishReason) -> str:
        return self._chunk([TextChoice(text="", finish_reason=reason)])

    def used(self, used: CompletionUsage) -> str:
        return self._chunk([], used)

    def _made(self, choices: list[TextChoice], used: CompletionUsage | None) -> TextCompletion:
        return TextCompletion(**vars(self), choices=choices, usage=used)

    def _chunk(self, choices: list[TextChoice], used: CompletionUsage | None = None) -> str:
        made = self._made(choices, used)
        return as_json(made.model_dump(mode="json", exclude={"usage"} if used is None else None))


def as_json(document: dict[str, Any]) -> str:
    """A document as it stands behind `data:`, on one line."""
    return json.dumps(document, ensure_ascii=False, separators=(",", ":"))
