"""The JSON documents in rows, one class for each. Writers and readers use the same class.

A reader passes over keys that it does not know: a newer version may have written them.
"""

from __future__ import annotations

from typing import Any, Final, Self

from pydantic import BaseModel, ConfigDict

READ: Final = ConfigDict(frozen=True, extra="ignore", protected_namespaces=())


class Document(BaseModel):
    """A document of a row."""

    model_config = READ

    @classmethod
    def read(cls, stored: dict[str, Any]) -> Self:
        """From what the row keeps. Raises pydantic's ValidationError for what this version does not understand."""
        return cls.model_validate(stored)

    def document(self) -> dict[str, Any]:
        """As the row keeps it; what was never given is left out."""
        return self.model_dump(mode="json", exclude_unset=True)


class JobError(Document):
    """Why a job, an attempt, a member or a chore ended."""

    code: str
    message: str
    param: str | None = None


def error_document(code: str, message: str, *, param: str | None = None) -> dict[str, Any]:
    """A JobError as rows keep it: `param` is there, null or not."""
    return JobError(code=code, message=message, param=param).document()


class ManifestEntry(Document):
    """A file of a product or checkpoint; `name` is its path below the manifest's prefix."""

    name: str
    bytes: int
    sha256: str


class Manifest(Document):
    """The files of a product or checkpoint in the store. `name` and `step` are a checkpoint's."""

    prefix: str
    files: tuple[ManifestEntry, ...] = ()
    name: str | None = None
    step: int | None = None

    def key(self, entry: ManifestEntry) -> str:
        """The key of a file in the store."""
        return f"{self.prefix}/{entry.name}"


class StoredLog(Document):
    """An attempt's log in the store. Offsets count bytes of the whole log; from `head_bytes` to `tail_from` is a gap.

    `tail_at`: where in the object the tail begins, behind a line that says what is left out.
    """

    key: str
    bytes: int
    sha256: str
    size: int
    head_bytes: int
    tail_from: int
    tail_at: int


class JobProgress(Document):
    """How far a running job is, for clients and for the plan. Times in seconds."""

    step: int
    total_steps: int
    epoch: float
    train_loss: float
    valid_loss: float | None
    trained_tokens: int
    seconds_per_step: float
    seconds_left: float
    valid_scores: dict[str, float] | None = None  # of answers at the last look, by measure

    @staticmethod
    def left(stored: dict[str, Any] | None) -> float | None:
        """Seconds left as the row keeps them. The plan reads every running job: it must not fail for one of them."""
        left = (stored or {}).get("seconds_left")
        return None if left is None else float(left)
