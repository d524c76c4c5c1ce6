"""Builds every object key. Keys hold only ids, never a user's text."""

from __future__ import annotations

from shared.errors import Invalid
from shared.ids import is_id


def _id(value: str) -> str:
    if not is_id(value):
        raise Invalid(f"'{value[:100]}' is not an id of this service.")
    return value


def file_key(project_id: str, file_id: str) -> str:
    """Where an uploaded or made file lies."""
    return f"{_id(project_id)}/files/{_id(file_id)}"


def rows_key(file_key: str, number: int) -> str:
    """The JSONL rows that check `number` has made of an uploaded file."""
    return f"{file_key}.rows{number:03d}"


def upload_prefix(project_id: str, upload_id: str) -> str:
    """Everything that was ever written for an upload in parts."""
    return f"{_id(project_id)}/uploads/{_id(upload_id)}"


def part_key(project_id: str, upload_id: str, part_id: str) -> str:
    return f"{upload_prefix(project_id, upload_id)}/{_id(part_id)}"


def assembled_key(project_id: str, upload_id: str, file_id: str) -> str:
    """Where the file of an upload in parts lies."""
    return f"{upload_prefix(project_id, upload_id)}/{_id(file_id)}"


def attempt_prefix(project_id: str, job_id: str, fence: int) -> str:
    """Everything that one lease writes. A later lease has another fence, so nothing is ever overwritten."""
    return f"{_id(project_id)}/jobs/{_id(job_id)}/a{fence:06d}"


def adapter_prefix(project_id: str, job_id: str, fence: int) -> str:
    return f"{attempt_prefix(project_id, job_id, fence)}/adapter"


def checkpoint_prefix(project_id: str, job_id: str, fence: int, step: int) -> str:
    return f"{attempt_prefix(project_id, job_id, fence)}/checkpoints/step-{step:08d}"


def result_key(project_id: str, job_id: str, fence: int) -> str:
    """The metrics CSV of a job."""
    return f"{attempt_prefix(project_id, job_id, fence)}/step_metrics.csv"


def log_key(project_id: str, job_id: str, fence: int) -> str:
    """What the trainer of an attempt printed."""
    return f"{attempt_prefix(project_id, job_id, fence)}/trainer.log"


def merge_prefix(project_id: str, merge_id: str) -> str:
    """Everything that was ever written for a merge or combination."""
    return f"{_id(project_id)}/merges/{_id(merge_id)}"


def export_prefix(project_id: str, export_id: str) -> str:
    """Everything that was ever written for an export."""
    return f"{_id(project_id)}/exports/{_id(export_id)}"


def export_attempt_prefix(project_id: str, export_id: str, fence: int) -> str:
    return f"{export_prefix(project_id, export_id)}/a{fence:06d}"


def merge_attempt_prefix(project_id: str, merge_id: str, fence: int) -> str:
    return f"{merge_prefix(project_id, merge_id)}/a{fence:06d}"
