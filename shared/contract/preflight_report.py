"""The report of a preflight. The worker that examined the files writes it, the API reads it.

A job that would fail before it trains has a refusal, and nothing of what comes after it.
"""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field

from shared.contract.documents import Document, JobError
from shared.contract.events import TokenReport


class CheckedFile(Document):
    """What the check of a file has found; every figure is null until the file is read."""

    id: str
    format: str | None = None
    shape: str | None = Field(default=None, description="As uploaded: chat, sharegpt, alpaca …")
    rows: int | None = None
    bytes: int | None = None
    characters: int | None = None
    duplicate_rows: int | None = None
    dropped_columns: list[str] = Field(default_factory=list)
    problem_count: int | None = None
    problems: list[dict[str, Any]] = Field(
        default_factory=list, description="The first 20: line, column, param, code, message."
    )
    warnings: list[dict[str, Any]] = Field(default_factory=list)


class Memory(Document):
    """Bytes of one device at the peak."""

    predicted_bytes: int
    upper_bytes: int = Field(description="Nine of ten such jobs need no more.")
    evaluation_bytes: int
    sure: str
    measurements: int = Field(description="Finished jobs behind the prediction; 0: the formula alone.")
    terms: dict[str, int]


class Run(Document):
    steps: int
    steps_per_epoch: int
    rows: int = Field(description="Rows that teach something.")
    tokens: int = Field(description="Over the whole run.")


class Time(Document):
    """Seconds of training, without waiting, loading and publishing."""

    device: str
    expected: float
    low: float
    high: float
    basis: str


class RowProgress(Document):
    """How far a running preflight is."""

    stage: Literal["staging", "reading"] = Field(description="The files come to the worker; then their rows are read.")
    percent: int = Field(ge=0, le=100, description="Of this stage.")
    rows_read: int = 0
    rows_total: int


class DeviceFit(Document):
    id: str
    name: str
    kind: str
    fits: bool
    needed_bytes: int
    offered_bytes: int
    reason: str
    time: Time | None = Field(
        default=None, description="Null: it does not fit, or neither finished jobs nor the device's name tell."
    )


Server = Literal["peft", "playground", "vllm", "sglang", "llama_cpp"]


class ServerVerdict(Document):
    """Whether a server can serve what the job publishes."""

    server: Server
    servable: bool | None = Field(description="null: nobody has looked.")
    reason: str | None = Field(default=None, description="What the server needs for it, or why it does not take it.")


class Report(Document):
    ok: bool = Field(description="A job with this body would begin to train.")
    files: dict[str, CheckedFile]
    refusal: JobError | None = Field(description="Why the job would fail before it trains.")
    spec: dict[str, Any] | None = Field(default=None, description="The resolved JobSpec.")
    auto: list[dict[str, Any]] = Field(default_factory=list)
    warnings: list[str] = Field(default_factory=list, description="What the base model costs or leaves frozen.")
    tokens: TokenReport | None = None
    run: Run | None = None
    memory: Memory | None = None
    time: Time | None = Field(
        default=None, description="Null: no job of this kind has finished, and the device is not known."
    )
    devices: list[DeviceFit] = Field(default_factory=list)
    servable: list[ServerVerdict] = Field(default_factory=list, description="Which servers will take the product.")


class Sample(Document):
    """What some rows of a large training file say, before all are read. Whatever is not counted is an estimate."""

    rows: int = Field(description="Rows that were read, from places spread evenly over the file.")
    of_rows: int
    ok: bool = Field(description="A job with this body would begin to train, as far as these rows tell.")
    mean_tokens: float
    p95_tokens: float
    longest_tokens: int
    truncated: int = Field(description="Of the rows that were read, as are left_out and refused.")
    left_out: int
    refused: int
    fault: str | None = Field(description="Why the first of the refused rows is refused. Its number is not known yet.")
    run: Run
    memory: Memory | None
    time: Time | None
    devices: list[DeviceFit]
