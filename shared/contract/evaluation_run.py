"""What an evaluation's program is given and what it writes, and an answer as it is kept. Pure.

`worker.train.evaluate` reads `EvaluationSpec`, and writes a line of `ItemAnswer` for each subject and item. Its words
are a stranger's: whoever reads them checks them with `ITEM_ANSWER`.
"""

from __future__ import annotations

from typing import Annotated, Any, Final, Literal

from pydantic import AfterValidator, Field, TypeAdapter

from shared.contract.evaluation import GenerationSettings
from shared.contract.events import Code, Count, Text
from shared.contract.generation import ResidentBase
from shared.contract.part import Part
from shared.contract.spec import Format

ANSWER_CHARACTERS: Final = 200_000
SHOWN_CHARACTERS: Final = 4_000
# JSON may write a character as twelve bytes.
ANSWER_LINE_BYTES: Final = 12 * ANSWER_CHARACTERS + 64 * 1024

PartName = Literal["items", "forgetting"]


def storable(text: str) -> str:
    """As Postgres takes it: without NUL and halves of characters, shown as U+FFFD or ?."""
    return text.replace("\0", "\ufffd").encode("utf-8", "replace").decode("utf-8")


AnswerText = Annotated[str, Field(max_length=ANSWER_CHARACTERS), AfterValidator(storable)]


class ItemAsked(Part):
    """One item as the program reads it."""

    part: PartName
    item: Count
    messages: list[dict[str, Any]] | None = Field(default=None, description="What is to be answered.")
    tools: list[dict[str, Any]] | None = None
    text: str | None = Field(default=None, description="What is to be gone on from, without a chat template.")
    format: Format | None = Field(default=None, description="Of `record`; null: no reference is predicted.")
    record: dict[str, Any] | None = Field(default=None, description="Canonical row with the reference in it.")
    subjects: list[Count] = Field(description="Places of those that have not answered yet.")


class SubjectAsked(Part):
    """One subject as the program loads it."""

    place: Count
    adapter: str | None = Field(default=None, description="Its key; null: the base alone.")
    adapter_path: str | None = None
    chat_template: str | None = None


class EvaluationSpec(ResidentBase):
    """The file that `worker.train.evaluate` is started with. All its subjects share one base in memory."""

    context_tokens: int = Field(ge=1)
    subjects: list[SubjectAsked]
    items_path: str = Field(description="Lines of `ItemAsked`.")
    generation: GenerationSettings
    likelihood: bool = Field(description="Measure how well the references are predicted.")
    answers: bool = Field(description="Generate answers.")


class ItemFault(Part):
    """Why there is no answer, or no likelihood."""

    code: Code
    message: Text


class ItemAnswer(Part):
    """What one subject made of one item."""

    part: PartName
    item: Count
    subject: Count
    answer: AnswerText | None = None
    finish_reason: Literal["stop", "length"] | None = None
    prompt_tokens: Count | None = None
    tokens: Count | None = None
    seconds: float | None = Field(default=None, ge=0.0)
    loss: float | None = Field(default=None, description="Mean negative logarithm per token of the reference.")
    loss_tokens: Count | None = None
    correct_tokens: Count | None = None
    error: ItemFault | None = None


ITEM_ANSWER: Final[TypeAdapter[ItemAnswer]] = TypeAdapter(ItemAnswer)


class StoredAnswer(ItemAnswer):
    """An answer with its scores, as it is kept and listed."""

    line: Count | None = Field(description="Of the file; null: of a suite.")
    prompt: str = Field(description="The beginning of what was asked.")
    reference: str | None
    slices: dict[str, str | None] = Field(default_factory=dict)
    scores: dict[str, float] = Field(default_factory=dict)
    problems: dict[str, str] = Field(default_factory=dict, description="Measure -> why it has no value here.")
    row: dict[str, Any] | None = Field(default=None, description="The item of a run of OpenAI's evals.")
    asked: list[dict[str, str]] | None = Field(default=None, description="Its messages: role and content.")
