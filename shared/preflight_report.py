"""What a preflight's program is given and what it finds: files in, files out, like a trainer's. Pure values."""

from __future__ import annotations

from typing import Annotated, Final, Literal

from pydantic import Field

from shared.spec import CreateJob, JobSpec, Part

DEFAULT_PREVIEW_ROWS: Final = (1, 2, 3)
PREVIEW_TOKENS: Final = 2048  # of a sequence; what follows is counted and not shown
SHOWN: Final = 20  # rows named per finding; all are counted

RowNumber = Annotated[int, Field(ge=1, le=100_000_000)]


class CreatePreflight(CreateJob):
    """Body of `POST /v1/tunepool/preflights`: a job's body, and the rows whose tokens are to be shown."""

    preview_rows: Annotated[list[RowNumber], Field(max_length=20)] | None = Field(
        default=None, description="Rows of the training file, counted from 1; the first three if left out."
    )

    def job(self) -> CreateJob:
        """The job that this preflight is about."""
        return CreateJob.model_validate(self.model_dump(exclude={"preview_rows"}, exclude_unset=True))


class PreflightSpec(Part):
    """The file a preflight's program is started with."""

    job: JobSpec
    base_model_path: str
    train_file: str = Field(description="Canonical JSONL (shared/formats.py).")
    validation_file: str | None = None
    preview_rows: list[int]
    processes: int = Field(default=1, ge=1)
    memory_bytes: int = Field(ge=1, description="Each process may gain so much beyond its libraries.")


class RowFault(Part):
    """A row that the trainer would refuse."""

    row: int
    code: str
    message: str


class Rows(Part):
    """How many rows show something, and the first of them by number."""

    count: int
    rows: list[int] = Field(description=f"The first {SHOWN}.")


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


class Sequence(Part):
    """What the model reads, and what of it carries loss."""

    name: Literal["row", "chosen", "rejected", "completion"]
    text: str
    token_count: int
    trained_token_count: int
    tokens: list[Token] = Field(description=f"The first {PREVIEW_TOKENS}.")
    spans: list[Span]


class RowPreview(Part):
    """One row of the training file as it is trained; no sequences: it is left out, `fault` may say why."""

    row: int
    truncated: bool
    sequences: list[Sequence]
    fault: str | None = None


class TokenReport(Part):
    """`OUT/preflight.json`."""

    training: FileTokens
    validation: FileTokens | None
    leakage: Leakage | None
    preview: list[RowPreview]
