"""The one event format, from the trainer's `OUT/events.jsonl` to the client.

A trainer appends one JSON object per line; the supervisor reads whole lines only, so a torn last line is no event.
"""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, TypeAdapter

Level = Literal["info", "warn", "error"]

# Exit codes of a trainer (design: the trainer contract).
EXIT_DONE = 0
EXIT_USER_FAULT = 3
EXIT_OUT_OF_MEMORY = 4
EXIT_STOPPED = 5


class _Event(BaseModel):
    # NaN may not travel: JSON has no word for it. A trainer that sees one reports a Failed event instead.
    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    time: float = Field(description="Unix seconds on the trainer's host; for display, never for decisions.")


class Message(_Event):
    """A sentence for the user."""

    type: Literal["message"] = "message"
    level: Level = "info"
    message: str


class Started(_Event):
    """The first optimizer step is about to run."""

    type: Literal["started"] = "started"
    total_steps: int
    first_step: int = Field(default=0, description="Steps already done by earlier attempts.")
    trainable_parameters: int
    all_parameters: int
    train_rows: int
    sequences: int = Field(description="Rows after packing.")
    truncated_rows: int = 0
    train_tokens_per_epoch: int
    labelled_tokens_per_epoch: int


class Metrics(_Event):
    """One optimizer step (or the mean over `logging_steps` of them)."""

    type: Literal["metrics"] = "metrics"
    step: int
    total_steps: int
    epoch: float
    train_loss: float = Field(description="Mean cross-entropy per labelled token, nats.")
    train_mean_token_accuracy: float | None = None
    learning_rate: float
    grad_norm: float | None = Field(default=None, description="L2 norm before clipping.")
    trained_tokens: int = Field(description="Input tokens seen so far by all attempts, padding not counted.")
    seconds_per_step: float


class Validation(_Event):
    """A pass over the validation rows."""

    type: Literal["validation"] = "validation"
    step: int
    valid_loss: float
    valid_mean_token_accuracy: float | None = None
    full: bool = Field(default=False, description="True at the end of an epoch or run: every validation row was read.")


class CheckpointSaved(_Event):
    """`OUT/checkpoints/{name}` is complete: renamed into place, with a manifest."""

    type: Literal["checkpoint"] = "checkpoint"
    step: int
    name: str
    train_loss: float | None = None
    train_mean_token_accuracy: float | None = None
    valid_loss: float | None = None
    valid_mean_token_accuracy: float | None = None


class Finished(_Event):
    """`OUT/adapter` is complete."""

    type: Literal["finished"] = "finished"
    steps: int
    trained_tokens: int
    published_step: int
    published_reason: str = Field(description="Why this checkpoint: best validation loss, or the last one.")
    peak_memory_bytes: int
    train_seconds: float


class Failed(_Event):
    """Why the trainer gives up; written last, before exit 3 or 4."""

    type: Literal["failed"] = "failed"
    code: str
    message: str
    param: str | None = None
    peak_memory_bytes: int | None = Field(default=None, description="Most memory held, where memory was the reason.")


TrainerEvent = Annotated[
    Message | Started | Metrics | Validation | CheckpointSaved | Finished | Failed, Field(discriminator="type")
]
TRAINER_EVENT: TypeAdapter[TrainerEvent] = TypeAdapter(TrainerEvent)
