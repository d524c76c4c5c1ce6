"""The events of programs of `worker.train`, from `OUT/events.jsonl` to the client, and a preflight's findings.

A trainer appends one JSON object per line; the supervisor reads whole lines only, so a torn last line is no event.
"""

from __future__ import annotations

from typing import Annotated, Final, Literal, get_args

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, TypeAdapter

from shared.contract.part import Part
from shared.contract.spec import AnswerMeasure

Level = Literal["info", "warn", "error"]

# Exit codes of a trainer (design: the trainer contract).
EXIT_DONE = 0
EXIT_USER_FAULT = 3
EXIT_OUT_OF_MEMORY = 4
EXIT_STOPPED = 5


# Events come from a program that a stranger's data may have taken over: a name goes into paths and keys, a number into
# columns, a text to a database that takes no NUL.
TEXT_CHARACTERS: Final = 4000


def _clean(text: str) -> str:
    """Text that Postgres takes: no NUL, no half of a surrogate pair; not longer than anybody reads."""
    return text.replace("\0", "").encode("utf-8", "replace").decode("utf-8")[:TEXT_CHARACTERS]


Text = Annotated[str, AfterValidator(_clean)]
Code = Annotated[str, Field(pattern=r"^[a-z0-9_]{1,64}$")]
Step = Annotated[int, Field(ge=0, lt=10**8)]
Count = Annotated[int, Field(ge=0, lt=2**62)]
Share = Annotated[float, Field(ge=0.0, le=1.0)]


class _Event(BaseModel):
    # NaN may not travel: JSON has no word for it. A trainer that sees one reports a Failed event instead.
    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    time: float = Field(description="Unix seconds on the trainer's host; for display, never for decisions.")


class Message(_Event):
    """A sentence for the user."""

    type: Literal["message"] = "message"
    level: Level = "info"
    message: Text


class Started(_Event):
    """The first optimizer step is about to run."""

    type: Literal["started"] = "started"
    total_steps: Step
    first_step: Step = Field(default=0, description="Steps already done by earlier attempts.")
    trainable_parameters: Count
    all_parameters: Count
    train_rows: Count
    sequences: Count = Field(description="Rows after packing.")
    truncated_rows: Count = 0
    train_tokens_per_epoch: Count
    labelled_tokens_per_epoch: Count


class Metrics(_Event):
    """One optimizer step (or the mean over `logging_steps` of them)."""

    type: Literal["metrics"] = "metrics"
    step: Step
    total_steps: Step
    epoch: float
    train_loss: float = Field(description="Mean cross-entropy per labelled token, nats.")
    train_mean_token_accuracy: float | None = None
    learning_rate: float
    grad_norm: float | None = Field(default=None, description="L2 norm before clipping.")
    trained_tokens: Count = Field(description="Input tokens seen so far by all attempts, padding not counted.")
    seconds_per_step: float
    memory_bytes: Count | None = Field(
        default=None,
        description="Held after that step by the first rank: torch's allocator on a GPU, else what is resident.",
    )


class Validation(_Event):
    """A pass over the validation rows."""

    type: Literal["validation"] = "validation"
    step: Step
    valid_loss: float
    valid_mean_token_accuracy: float | None = None
    full: bool = Field(default=False, description="True at the end of an epoch or run: every validation row was read.")
    valid_answers: Count | None = Field(default=None, description="Rows that were answered; null: none were asked.")
    valid_exact_match: Share | None = None
    valid_contains: Share | None = None
    valid_json_valid: Share | None = None
    valid_numeric: Share | None = None

    @property
    def scores(self) -> dict[str, float] | None:
        """Means of the answers by measure; None where none were asked for."""
        means = {name: getattr(self, f"valid_{name}") for name in get_args(AnswerMeasure)}
        return {name: mean for name, mean in means.items() if mean is not None} or None


class CheckpointSaved(_Event):
    """`OUT/checkpoints/{name}` is complete: renamed into place, with a manifest."""

    type: Literal["checkpoint"] = "checkpoint"
    step: Step
    name: str = Field(pattern=r"^step-[0-9]{8}$", description="Of a folder; never a path.")
    train_loss: float | None = None
    train_mean_token_accuracy: float | None = None
    valid_loss: float | None = None
    valid_mean_token_accuracy: float | None = None
    full_valid_loss: float | None = Field(default=None, description="Where every validation row was read.")
    full_valid_mean_token_accuracy: float | None = None
    save_seconds: float | None = Field(default=None, ge=0, le=86_400, description="That it took.")


class Alive(_Event):
    """A sign of life within a phase that has nothing to tell: the supervisor's patience begins anew."""

    type: Literal["alive"] = "alive"
    doing: Literal["loading", "step", "validation", "checkpoint"]


class Finished(_Event):
    """`OUT/adapter` is complete."""

    type: Literal["finished"] = "finished"
    steps: Step
    trained_tokens: Count
    published_step: Step
    published_reason: Text = Field(description="Why this checkpoint: best validation loss, or the last one.")
    peak_memory_bytes: Count = Field(description="Most memory held, with what lies beside torch's own on a GPU.")
    peak_allocated: Count | None = Field(default=None, description="Of that, bytes of tensors.")
    peak_reserved: Count | None = Field(default=None, description="Of that, bytes of torch's allocator with its gaps.")
    train_seconds: float


class Failed(_Event):
    """Why the trainer gives up; written last, before exit 3 or 4."""

    type: Literal["failed"] = "failed"
    code: Code
    message: Text
    param: Text | None = None
    peak_memory_bytes: Count | None = Field(default=None, description="Most memory held, where memory was the reason.")
    peak_allocated: Count | None = Field(default=None, description="Of that, bytes of tensors.")
    peak_reserved: Count | None = Field(default=None, description="Of that, bytes of torch's allocator with its gaps.")


TrainerEvent = Annotated[
    Message | Started | Metrics | Validation | CheckpointSaved | Alive | Finished | Failed, Field(discriminator="type")
]
TRAINER_EVENT: TypeAdapter[TrainerEvent] = TypeAdapter(TrainerEvent)


# --- what a preflight finds -------------------------------------------------------------------------------------------

PREVIEW_TOKENS: Final = 2048  # of a sequence; what follows is counted and not shown
SHOWN: Final = 20  # rows named per finding; all are counted


class RowFault(Part):
    """A row that the trainer would refuse."""

    row: int
    code: str
    message: str


class Rows(Part):
    """How many rows show something, and the first of them by number."""

    count: int
    rows: list[int] = Field(description=f"The first {SHOWN}.")


class UnwrittenRows(Part):
    """Rows that say something outside of trained answers which their chat template leaves out."""

    code: str
    message: str = Field(description="Of the first such row.")
    rows: Rows


class Bin(Part):
    """Rows of more than the last bin's and at most `up_to` tokens."""

    up_to: int
    rows: int


class FileTokens(Part):
    """A file as the trainer reads it. Tokens are counted before rows are cut unless said otherwise."""

    rows: int
    tokens: int
    kept_tokens: int = Field(description="After cutting at max_length, rows left out not counted: one epoch.")
    trained_tokens: int = Field(description="Of kept_tokens, those that carry loss.")
    mean_tokens: float
    median_tokens: float
    p95_tokens: float
    longest_row: int
    longest_tokens: int
    histogram: list[Bin]
    truncated: Rows = Field(description="Cut at max_length.")
    empty: Rows = Field(description="No token to learn from, so left out.")
    duplicates: Rows = Field(description="Equal to an earlier row, token by token.")
    fault_count: int
    faults: list[RowFault]
    unwritten: list[UnwrittenRows] = Field(default=[], description="What the chat template leaves out of prompts.")


class Leakage(Part):
    """Validation rows that training has seen: they make the validation loss look better than it is."""

    rows: Rows = Field(description="Also a training row, token by token.")
    prompts: Rows = Field(description="The prompt of their last answer is also a training row's.")


class Token(Part):
    id: int
    text: str
    trained: bool


class Span(Part):
    """A run of trained tokens, half open."""

    start: int
    end: int
    text: str


class ShownSequence(Part):
    """What the model reads, and what of it carries loss."""

    name: Literal["row", "chosen", "rejected", "completion"]
    text: str
    token_count: int
    trained_token_count: int
    tokens: list[Token] = Field(description=f"The first {PREVIEW_TOKENS}.")
    spans: list[Span]


PART_CHARACTERS: Final = 8000  # of a part of a row that is shown


class WrittenPart(Part):
    """A part of a row as its user wrote it."""

    message: int | None = Field(description="Its place in the row; null for tools, answers of pairs and raw text.")
    what: str = Field(description="The role, and what of the message: its text, reasoning or a call.")
    text: str = Field(description=f"The first {PART_CHARACTERS} characters.")
    left_out: str | None = Field(default=None, description="What the chat template leaves out of the message.")


class TemplateAbilities(Part):
    """What a chat template writes of rows, found by rendering known ones; and what ends a turn."""

    system: bool
    assistant_first: bool
    tools: bool
    calls: bool
    parallel_calls: bool
    text_beside_a_call: bool
    reasoning: bool = Field(description="In a key of its own, of the last answer.")
    earlier_reasoning: bool
    arguments: Literal["object", "text"] = Field(description="The form that the template takes arguments of calls in.")
    end_of_turn: str = Field(description="Empty: the template writes none.")
    stops: list[str] = Field(description="Tokens that end a generation of the base model.")


class RowPreview(Part):
    """One row of the training file as it is trained; no sequences: it is left out, `fault` may say why."""

    row: int
    truncated: bool
    sequences: list[ShownSequence]
    fault: str | None = None
    unwritten: list[str] = Field(default=[], description="What the chat template leaves out of its prompt.")
    written: list[WrittenPart] = Field(default=[], description="The row as its user wrote it.")


class RowsRead(Part):
    """`OUT/progress.json` of a preflight's program, written anew as it goes on."""

    rows: int = Field(ge=0, description="Of both files.")


class TokenReport(Part):
    """`OUT/preflight.json`."""

    training: FileTokens
    validation: FileTokens | None
    leakage: Leakage | None
    preview: list[RowPreview]
    template: TemplateAbilities | None = Field(
        default=None, description="Null for rows that no template renders, and for one that cannot be asked."
    )
