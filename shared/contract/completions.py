"""Bodies of `POST /v1/chat/completions` and `/v1/completions`: OpenAI's fields, and ours under `tunepool`.

A field that no playground can honour is refused by name, never passed over: an answer that ignored it would look like
one that heeded it.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Annotated, Any, Final, Literal

from pydantic import Field, StringConstraints

from shared.contract.generation import Sampling
from shared.contract.part import Part
from shared.errors import Invalid

ModelName = Annotated[str, StringConstraints(min_length=1, max_length=300)]
StopText = Annotated[str, StringConstraints(min_length=1, max_length=1000)]
ToolName = Annotated[str, StringConstraints(pattern=r"^[a-zA-Z0-9_-]{1,64}$")]
Hint = Annotated[Any, Field(description="A hint to OpenAI's own servers; it asks nothing here.")]
Refused = Annotated[Any, Field(description="Refused by name unless it asks for nothing.")]


class TextPart(Part):
    """A part of a message; others than text are for models that see or hear."""

    type: Literal["text"]
    text: str


class CalledFunction(Part):
    name: ToolName
    arguments: Annotated[str, StringConstraints(max_length=1_000_000)] = Field(description="JSON text.")


class EarlierCall(Part):
    """A call of a tool in an earlier answer."""

    id: Annotated[str, StringConstraints(min_length=1, max_length=200)]
    type: Literal["function"]
    function: CalledFunction


class OfferedFunction(Part):
    name: ToolName
    description: Annotated[str, StringConstraints(max_length=100_000)] | None = None
    parameters: dict[str, Any] | None = None
    strict: Refused = None


class OfferedTool(Part):
    """A function that the model may ask to be called."""

    type: Literal["function"]
    function: OfferedFunction

    def plain(self) -> dict[str, Any]:
        """As a chat template reads it."""
        function = self.function.model_dump(exclude={"strict"}, exclude_none=True)
        return {"type": "function", "function": {"parameters": {"type": "object", "properties": {}}, **function}}


class ChatTurn(Part):
    """A message of the conversation so far."""

    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: str | list[TextPart] | None = Field(default=None, description="null only of an answer with calls.")
    name: str | None = None
    refusal: None = None
    annotations: Refused = None
    audio: Refused = None
    function_call: Refused = None
    tool_calls: Annotated[list[EarlierCall], Field(max_length=128)] | None = None
    tool_call_id: Annotated[str, StringConstraints(min_length=1, max_length=200)] | None = Field(
        default=None, description="Of a message of role tool: the call whose result it holds."
    )

    @property
    def fault(self) -> tuple[str, str] | None:
        """The field at fault and what is wrong with it; None: nothing is."""
        if self.content is None and not self.tool_calls:
            return "content", "A message needs content; only an answer with tool_calls may have none."
        if self.tool_calls and self.role != "assistant":
            return "tool_calls", "Only messages of role assistant have tool_calls."
        if (self.tool_call_id is not None) != (self.role == "tool"):
            return "tool_call_id", "It belongs to a message of role tool, which needs it, and to no other."
        return None

    @property
    def of_tools(self) -> bool:
        """Whether it calls tools or holds a result of one."""
        return bool(self.tool_calls) or self.role == "tool"

    def plain(self) -> dict[str, Any]:
        """As a chat template reads it; `developer` is what OpenAI calls `system` since 2024."""
        content = self.content or ""
        text = content if isinstance(content, str) else "".join(part.text for part in content)
        message: dict[str, Any] = {"role": "system" if self.role == "developer" else self.role, "content": text}
        if self.name is not None:
            message["name"] = self.name
        if self.tool_calls:
            message["tool_calls"] = [call.model_dump() for call in self.tool_calls]
        if self.tool_call_id is not None:
            message["tool_call_id"] = self.tool_call_id
        return message


class AnswerSchema(Part):
    name: Annotated[str, StringConstraints(pattern=r"^[a-zA-Z0-9_-]{1,64}$")]
    description: str | None = None
    schema_: dict[str, Any] | None = Field(default=None, alias="schema", description="JSON Schema; null: any object.")
    strict: bool | None = Field(default=None, description="Without effect: answers keep to the schema in any case.")


class ResponseFormat(Part):
    """The form of the answer. One of `json_object` or `json_schema` is kept to, token by token."""

    type: Literal["text", "json_object", "json_schema"]
    json_schema: AnswerSchema | None = None

    @property
    def answer_schema(self) -> dict[str, Any] | None:
        """What the answer keeps to; None: it is text."""
        if self.type == "text":
            return None
        return (self.json_schema.schema_ if self.json_schema else None) or {"type": "object"}


class StreamOptions(Part):
    include_usage: bool = False
    include_obfuscation: bool = False


class PlaygroundOptions(Part):
    """How the adapter is used for this one answer."""

    scale: float = Field(default=1.0, ge=0.0, le=4.0, description="Multiplies the adapter's update.")
    disabled: bool = Field(default=False, description="Answer with the adapter's base alone, as its job loaded it.")


class AskedCompletion(Part):
    """What both routes take."""

    model: ModelName = Field(description="A base model, an alias, `ft:…`, `ft:…:ckpt-step-N` or a combination's id.")
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    temperature: Annotated[float, Field(ge=0.0, le=2.0)] | None = None
    top_p: Annotated[float, Field(ge=0.0, le=1.0)] | None = None
    presence_penalty: Annotated[float, Field(ge=-2.0, le=2.0)] | None = None
    frequency_penalty: Annotated[float, Field(ge=-2.0, le=2.0)] | None = None
    max_tokens: Annotated[int, Field(ge=1, le=1_048_576)] | None = None
    seed: Annotated[int, Field(ge=-(2**63), lt=2**63)] | None = None
    stop: StopText | Annotated[list[StopText], Field(max_length=4)] | None = None
    user: Annotated[str, StringConstraints(max_length=512)] | None = None
    tunepool: PlaygroundOptions = PlaygroundOptions()
    n: Refused = None
    logit_bias: Refused = None

    def sampling(self) -> Sampling:
        """How to choose tokens; what was left out or null has OpenAI's default."""
        names = ("temperature", "top_p", "presence_penalty", "frequency_penalty", "seed")
        given = {name: value for name in names if (value := getattr(self, name)) is not None}
        stop = [self.stop] if isinstance(self.stop, str) else self.stop or []
        return Sampling(**given, stop=stop, max_tokens=self.longest, top_logprobs=self.likeliest)

    @property
    def longest(self) -> int | None:
        return self.max_tokens

    @property
    def likeliest(self) -> int | None:
        """How many likely tokens are listed beside each chosen one; None: no tokens are listed."""
        return None

    def must_be_possible(self) -> None:
        """Raises Invalid (`unsupported_parameter`) for the first field that asks for what no playground does."""
        for name, harmless in _HARMLESS.items():
            value = getattr(self, name, None)
            if value is not None and not harmless(value):
                raise _unsupported(name)
        if self.stream_options is not None and self.stream_options.include_obfuscation:
            raise _unsupported("stream_options.include_obfuscation")
        if self.stream_options is not None and not self.stream:
            raise Invalid("'stream_options' is for streams; set stream to true.", param="stream_options")


class CreateChatCompletion(AskedCompletion):
    """Body of `POST /v1/chat/completions`."""

    messages: Annotated[list[ChatTurn], Field(min_length=1, max_length=10_000)]
    max_completion_tokens: Annotated[int, Field(ge=1, le=1_048_576)] | None = Field(
        default=None, description="Wins over max_tokens, its older name."
    )
    audio: Refused = None
    function_call: Refused = None
    functions: Refused = None
    metadata: Refused = None
    modalities: Refused = None
    moderation: Refused = None
    parallel_tool_calls: bool | None = Field(default=None, description="false: the first call of an answer alone.")
    prediction: Refused = None
    prompt_cache_key: Hint = None
    prompt_cache_options: Hint = None
    prompt_cache_retention: Hint = None
    reasoning_effort: Refused = None
    response_format: ResponseFormat | None = None
    safety_identifier: Hint = None
    service_tier: Refused = None
    store: Refused = None
    tool_choice: Refused = None
    tools: Annotated[list[OfferedTool], Field(max_length=128)] | None = Field(
        default=None, description="Where the model's chat template writes tools, and calls in a form that is read."
    )
    logprobs: bool | None = None
    top_logprobs: Annotated[int, Field(ge=0, le=20)] | None = Field(default=None, description="With logprobs: true.")
    verbosity: Refused = None
    web_search_options: Refused = None

    @property
    def longest(self) -> int | None:
        return self.max_completion_tokens or self.max_tokens

    @property
    def likeliest(self) -> int | None:
        return self.top_logprobs or 0 if self.logprobs else None

    def must_be_possible(self) -> None:
        super().must_be_possible()
        if self.top_logprobs and not self.logprobs:
            raise Invalid("'top_logprobs' is for answers with logprobs; set logprobs to true.", param="top_logprobs")
        for place, message in enumerate(self.messages):
            for name in ("annotations", "audio", "function_call"):
                if getattr(message, name):
                    raise _unsupported(f"messages.{place}.{name}")
            if (fault := message.fault) is not None:
                raise Invalid(fault[1], param=f"messages.{place}.{fault[0]}")
        form = self.response_format
        if form is not None and (form.json_schema is not None) != (form.type == "json_schema"):
            raise Invalid(
                "A response_format of type json_schema needs 'json_schema', and no other type has it.",
                param="response_format.json_schema",
            )
        for place, tool in enumerate(self.tools or ()):
            if tool.function.strict:  # nothing here makes a model keep to a tool's schema
                raise _unsupported(f"tools.{place}.function.strict")

        if self.offered and self.answer_schema is not None:
            raise Invalid(
                "An answer that may call tools cannot be kept to a form here; leave 'tools' or 'response_format' out.",
                param="response_format",
                code="unsupported_combination",
            )

    @property
    def answer_schema(self) -> dict[str, Any] | None:
        return None if self.response_format is None else self.response_format.answer_schema

    @property
    def offered(self) -> list[dict[str, Any]] | None:
        """The tools that the template presents to the model."""
        return [tool.plain() for tool in self.tools] if self.tools and self.tool_choice != "none" else None

    @property
    def is_about_tools(self) -> bool:
        return self.offered is not None or any(message.of_tools for message in self.messages)


class CreateCompletion(AskedCompletion):
    """Body of `POST /v1/completions`: a text to go on from, without a chat template."""

    prompt: str | Annotated[list[str], Field(min_length=1, max_length=1)]
    best_of: Refused = None
    echo: Refused = None
    logprobs: Annotated[int, Field(ge=0, le=5)] | None = Field(
        default=None, description="How likely each token was, beside so many of the likeliest."
    )
    suffix: Refused = None

    @property
    def likeliest(self) -> int | None:
        return self.logprobs

    @property
    def text(self) -> str:
        return self.prompt if isinstance(self.prompt, str) else self.prompt[0]


def _nothing(value: Any) -> bool:
    return not value


def _among(*values: Any) -> Callable[[Any], bool]:
    return lambda value: any(value == harmless and type(value) is type(harmless) for harmless in values)


# Field -> whether a value of it asks for nothing. All others are refused.
_HARMLESS: Final[dict[str, Callable[[Any], bool]]] = {
    "n": _among(1),
    "best_of": _among(1),
    "echo": _nothing,
    "suffix": _nothing,
    "logit_bias": _nothing,
    "audio": _nothing,
    "function_call": _among("none", "auto"),
    "functions": _nothing,
    "metadata": _nothing,
    "modalities": _among(["text"]),
    "moderation": _nothing,
    "prediction": _nothing,
    "reasoning_effort": _among("none"),
    "service_tier": _among("auto", "default"),
    "store": _nothing,
    "tool_choice": _among("none", "auto"),
    "verbosity": _among("medium"),
    "web_search_options": _nothing,
}


def _unsupported(name: str) -> Invalid:
    return Invalid(
        f"'{name}' is not supported by the playground. Leave it out, or serve the downloaded adapter with a server "
        "that does it.",
        param=name,
        code="unsupported_parameter",
    )
