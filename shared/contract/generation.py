"""The talk between API and playground: one JSON object per line, each way.

Two walls are crossed with these words. The API asks a host's playground over TCP (`Call`, answered by `Said`); the
playground asks the program that holds the weights over a socket that it was born with (`Question`, answered by `Said`
with the number of the question). A program's words are a stranger's: whoever reads them checks them with `SAID`.
"""

from __future__ import annotations

from typing import Annotated, Any, Final, Literal

from pydantic import Field, TypeAdapter

from shared.contract.events import Code, Count, Text
from shared.contract.part import Part
from shared.contract.spec import BaseModelRef, DeviceKind, Dtype, Quantization

# The longest line of either wire: a request's body has a megabyte, and JSON may write a character as six.
LINE_BYTES: Final = 8 * 1024 * 1024
CHUNK_CHARACTERS: Final = 1024 * 1024

FinishReason = Literal["stop", "length", "tool_calls"]


class Sampling(Part):
    """How tokens are chosen; names and meanings are OpenAI's."""

    temperature: float = Field(default=1.0, ge=0.0, le=2.0, description="0: always the likeliest token.")
    top_p: float = Field(default=1.0, ge=0.0, le=1.0)
    presence_penalty: float = Field(default=0.0, ge=-2.0, le=2.0)
    frequency_penalty: float = Field(default=0.0, ge=-2.0, le=2.0)
    seed: int | None = Field(default=None, ge=-(2**63), lt=2**63)
    stop: list[str] = Field(default_factory=list, max_length=4)
    max_tokens: int | None = Field(default=None, ge=1, description="null: as many as the playground gives.")
    top_logprobs: int | None = Field(
        default=None,
        ge=0,
        le=20,
        description="How likely each token was, and so many of the likeliest; null: not told.",
    )


class Question(Part):
    """One answer asked of the program. Either `messages` or `text` is given."""

    type: Literal["question"] = "question"
    number: Count
    adapter: str | None = Field(default=None, description="Key of the adapter; null: the base alone.")
    adapter_path: str | None = Field(default=None, description="Its PEFT directory on this host.")
    scale: float = Field(default=1.0, description="Multiplies the adapter's update.")
    messages: list[dict[str, Any]] | None = None
    tools: list[dict[str, Any]] | None = None
    read_calls: bool = Field(default=False, description="Tell calls of `tools` apart from the text of the answer.")
    answer_schema: dict[str, Any] | None = Field(default=None, description="JSON schema that the answer keeps to.")
    text: str | None = None
    chat_template: str | None = Field(default=None, description="Of the adapter's job; null: the base model's own.")
    sampling: Sampling = Sampling()


class Withdrawn(Part):
    """Nobody waits for that answer any more."""

    type: Literal["withdrawn"] = "withdrawn"
    number: Count


class Warmed(Part):
    """The program has loaded its weights and takes questions."""

    type: Literal["warmed"] = "warmed"


class Begun(Part):
    """The prompt was understood; its answer follows."""

    type: Literal["begun"] = "begun"
    number: Count = 0
    prompt_tokens: Count


class TokenLogprob(Part):
    """A token's text, and the natural logarithm of its probability."""

    token: Annotated[str, Field(max_length=1000)]
    logprob: float = Field(allow_inf_nan=False)


class ChosenToken(TokenLogprob):
    """One that was chosen, beside the likeliest of its place."""

    top: Annotated[list[TokenLogprob], Field(max_length=20)]


class Piece(Part):
    """The next characters of an answer: whole ones, and none that could still become a stop string."""

    type: Literal["piece"] = "piece"
    number: Count = 0
    text: Annotated[str, Field(max_length=CHUNK_CHARACTERS)]
    logprobs: Annotated[list[ChosenToken], Field(max_length=10_000)] | None = None


class ToolCall(Part):
    """A call of a tool. `arguments` is JSON text, as at OpenAI."""

    name: Annotated[str, Field(max_length=200)]
    arguments: Annotated[str, Field(max_length=CHUNK_CHARACTERS)]


class Called(Part):
    """The calls of an answer, behind its text."""

    type: Literal["called"] = "called"
    number: Count = 0
    calls: Annotated[list[ToolCall], Field(min_length=1, max_length=1000)]


class Ended(Part):
    """An answer is complete. `completion_tokens` counts every token that was chosen, an end token too."""

    type: Literal["ended"] = "ended"
    number: Count = 0
    finish_reason: FinishReason
    completion_tokens: Count


class Declined(Part):
    """There will be no answer, or no more of it."""

    type: Literal["declined"] = "declined"
    number: Count = 0
    code: Code
    message: Text
    param: Text | None = None
    passing: bool = Field(default=False, description="Asking again later may help.")


class Held(Part):
    """Which adapters the program has in memory now, the one used last at the end."""

    type: Literal["held"] = "held"
    adapters: Annotated[list[Text], Field(max_length=1000)]


Answered = Begun | Piece | Called | Ended | Declined
Said = Annotated[Warmed | Held | Answered, Field(discriminator="type")]
SAID: Final[TypeAdapter[Warmed | Held | Answered]] = TypeAdapter(Said)
ASKED: Final[TypeAdapter[Question | Withdrawn]] = TypeAdapter(
    Annotated[Question | Withdrawn, Field(discriminator="type")]
)


class ResidentBase(Part):
    """The base model that a program keeps in memory, and where."""

    base_model_path: str
    quantization: Quantization | None = Field(description="As the adapters' jobs stored the base; null: not quantised.")
    dtype: Dtype
    device: DeviceKind = "cpu"
    cpu_threads: int = Field(default=1, ge=1)


class PlaygroundSpec(ResidentBase):
    """The file that `worker.train.playground` is started with."""

    channel: int = Field(ge=0, description="File descriptor of the socket to whoever started the program.")
    adapters_kept: int = Field(default=8, ge=1, description="Beyond it the adapter used least recently is let go.")
    answers_at_once: int = Field(default=8, ge=1, description="They go through together; more wait.")
    answer_tokens: int = Field(default=1024, ge=1, description="Longest answer where a question names no length.")
    context_tokens: int = Field(default=8192, ge=1, description="Prompt and answer together, however long the base's.")


class WireFile(Part):
    """A file of a model or an adapter, and the object that holds it."""

    name: str
    bytes: int
    sha256: str
    key: str


class Target(Part):
    """What answers: a base model, and the adapter on it. Settled by the API from rows of the caller's project."""

    base: BaseModelRef
    quantization: Quantization | None = None
    dtype: Dtype | None = Field(default=None, description="null: what the device computes best.")
    chat_template: str | None = None
    adapter: str | None = Field(default=None, description="Id of an adapter, checkpoint or combination.")
    files: list[WireFile] = Field(default_factory=list)
    alone: bool = Field(
        default=False, description="It changes the base itself (every weight, or biases): no other adapter beside it."
    )
    whole: bool = Field(default=False, description="The files are a whole model, not an adapter.")


class Call(Part):
    """The question that the API sends to a playground, as one line. Closing the connection withdraws it."""

    token: str
    target: Target
    question: Question
