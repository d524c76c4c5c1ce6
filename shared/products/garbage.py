"""Finds objects that may be deleted: of expired files, and of attempts that published nothing."""

from __future__ import annotations

from datetime import timedelta
from typing import Any, Final

from sqlalchemy import func, select
from sqlalchemy.orm import Session

from shared.contract.documents import Manifest
from shared.store import layout
from shared.store.tables import AttemptRow, CheckpointRow, ExportRow, FileRow, JobRow, MergeRow, UploadRow

# No transaction is open for so long.
SETTLED: Final = timedelta(hours=1)
# A late writer of a dead fence may still be at it; a day later it is not.
MIN_AGE: Final = timedelta(hours=24)
# Each attempt is looked at for a day of passes, then never again: the store is not listed for ever.
MAX_AGE: Final = timedelta(hours=48)


def deleted_file_keys(session: Session) -> list[str]:
    """Keys of the objects of files deleted an hour to two days ago; none of them has an unfinished job."""
    gone = session.execute(
        select(FileRow.key, FileRow.rows_key).where(
            FileRow.deleted_at.between(func.now() - MAX_AGE, func.now() - SETTLED)
        )
    )
    return [key for keys in gone for key in keys if key is not None]


def dead_prefixes(session: Session) -> list[tuple[str, frozenset[str]]]:
    """(prefix of an ended attempt's objects, prefixes below it that rows name and that must stay)."""
    ended = session.execute(
        select(AttemptRow.job_id, AttemptRow.fence, JobRow.project_id)
        .join(JobRow, JobRow.id == AttemptRow.job_id)
        .where(AttemptRow.ended_at.between(func.now() - MAX_AGE, func.now() - MIN_AGE))
    ).all()
    kept = _named(session, {row.job_id for row in ended})
    return [
        (layout.attempt_prefix(row.project_id, row.job_id, row.fence), kept.get(row.job_id, frozenset()))
        for row in ended
    ]


def dead_merge_prefixes(session: Session) -> list[tuple[str, frozenset[str]]]:
    """The same for merges: all objects of a deleted one; of a finished one those outside its manifest's prefix."""
    deleted = MergeRow.deleted_at.between(func.now() - MAX_AGE, func.now() - SETTLED)
    ended = MergeRow.finished_at.between(func.now() - MAX_AGE, func.now() - MIN_AGE) & MergeRow.deleted_at.is_(None)
    rows = session.scalars(select(MergeRow).where(deleted | ended))
    return [(layout.merge_prefix(row.project_id, row.id), _standing(row)) for row in rows]


def dead_export_prefixes(session: Session) -> list[tuple[str, frozenset[str]]]:
    """The same for exports."""
    deleted = ExportRow.deleted_at.between(func.now() - MAX_AGE, func.now() - SETTLED)
    ended = ExportRow.finished_at.between(func.now() - MAX_AGE, func.now() - MIN_AGE) & ExportRow.deleted_at.is_(None)
    rows = session.scalars(select(ExportRow).where(ExportRow.kind != "hub", deleted | ended))
    return [(layout.export_prefix(row.project_id, row.id), _standing(row)) for row in rows]


def _standing(row: MergeRow | ExportRow) -> frozenset[str]:
    """The prefix of a product that is still there."""
    return frozenset({_prefix(row.manifest)}) if row.manifest and row.deleted_at is None else frozenset()


def dead_upload_prefixes(session: Session) -> list[tuple[str, frozenset[str]]]:
    """The same for uploads in parts that have ended: of a completed one the file stays, and the rows made of it."""
    ended = session.execute(
        select(UploadRow.project_id, UploadRow.id, FileRow.key)
        .outerjoin(FileRow, FileRow.id == UploadRow.file_id)
        .where(UploadRow.ended_at.between(func.now() - MAX_AGE, func.now() - SETTLED))
    )
    return [
        (layout.upload_prefix(row.project_id, row.id), frozenset() if row.key is None else frozenset({row.key}))
        for row in ended
    ]


def _named(session: Session, job_ids: set[str]) -> dict[str, frozenset[str]]:
    """For each job, the prefixes that adapter, checkpoints and resumption point lie under, and keys of files."""
    by_job: dict[str, set[str]] = {job_id: set() for job_id in job_ids}
    jobs = session.execute(select(JobRow.id, JobRow.manifest, JobRow.last_checkpoint).where(JobRow.id.in_(job_ids)))
    for job_id, *manifests in jobs:
        by_job[job_id] |= {_prefix(manifest) for manifest in manifests if manifest}
    for job_id, manifest in session.execute(
        select(CheckpointRow.job_id, CheckpointRow.manifest).where(CheckpointRow.job_id.in_(job_ids))
    ):
        by_job[job_id].add(_prefix(manifest))
    results = (
        select(JobRow.id, FileRow.key).join(FileRow, FileRow.id == JobRow.result_file).where(JobRow.id.in_(job_ids))
    )
    for job_id, key in session.execute(results):
        by_job[job_id].add(key)
    logs = select(AttemptRow.job_id, func.jsonb_extract_path_text(AttemptRow.log, "key")).where(
        AttemptRow.job_id.in_(job_ids), AttemptRow.log.is_not(None)
    )
    for job_id, key in session.execute(logs):
        by_job[job_id].add(key)
    return {job_id: frozenset(prefixes) for job_id, prefixes in by_job.items()}


def _prefix(manifest: dict[str, Any]) -> str:
    return f"{Manifest.read(manifest).prefix}/"
