"""The tuned model that a job goes on from, as the settling of the job reads it. Pure."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from shared.contract.spec import JobSpec, ParentFile


@dataclass(frozen=True, slots=True)
class ParentModel:
    """An adapter, a whole model or a checkpoint of either.

    Attributes:
        id: of its row.
        spec: of the job that made it.
        keys: file -> key of its bytes in the store.
    """

    id: str
    name: str
    job_id: str
    spec: JobSpec
    files: tuple[ParentFile, ...]
    keys: Mapping[str, str]
