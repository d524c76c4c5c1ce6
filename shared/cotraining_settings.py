"""Settings of jobs that train together on one base in memory (docs/scheduling.md)."""

from __future__ import annotations

from typing import Literal

from pydantic import Field
from pydantic_settings import BaseSettings


class CotrainingSettings(BaseSettings):
    cotraining: Literal["off", "project", "any"] = Field(
        default="off",
        description="Whether small jobs that wait share a device and one base model in memory: off; project, those of "
        "one project; any, of all projects, whose rows are then in one process (docs/scheduling.md).",
    )
    cotraining_jobs: int = Field(default=4, ge=2, le=8, description="Jobs that train together at most.")
    cotraining_seconds: float = Field(
        default=900.0, gt=0, description="No job with a longer forecast trains together with others."
    )
    cotrainer: str = Field(
        default="worker.train.together", description="Module run for jobs that train together; tests name another."
    )
