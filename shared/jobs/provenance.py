"""Where an adapter comes from, as a statement that verifiers of other projects read. The publishing side signs it.

An in-toto Statement v1 (github.com/in-toto/attestation/blob/main/spec/v1/statement.md) about every file of the adapter,
with the predicate SLSA Provenance v1 (slsa.dev/spec/v1.0/provenance). The trainer, which read a stranger's data, has no
say in it, except in the figures of the run.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from importlib.metadata import version
from typing import Any, Final

from sqlalchemy import func, select
from sqlalchemy.orm import Session

from shared.contract.documents import ManifestEntry
from shared.contract.events import Finished
from shared.contract.spec import BaseModelRef, JobSpec, Parent
from shared.lease.values import Lease, NewFile
from shared.store.tables import CheckpointRow, FileRow, JobRow

FILE_NAME: Final = "provenance.dsse.json"
PAYLOAD_TYPE: Final = "application/vnd.in-toto+json"
STATEMENT_TYPE: Final = "https://in-toto.io/Statement/v1"
PREDICATE_TYPE: Final = "https://slsa.dev/provenance/v1"
BUILD_TYPE: Final = "urn:tunepool:fine-tuning:1"  # says what the parameters mean: docs/provenance.md
_COMMIT: Final = re.compile(r"[0-9a-f]{40}|[0-9a-f]{64}")

_NOBODYS_AFFAIR: Final = frozenset({"integrations"})  # where a run is reported to is no part of what was made

Resource = dict[str, Any]


@dataclass(frozen=True, slots=True)
class RunFacts:
    """What only the worker knows of a run. `base_files`: sha256 of the base model's tokenizer files, by name."""

    files: tuple[ManifestEntry, ...]
    result: NewFile
    finished: Finished
    devices: tuple[str, ...]
    device_kind: str
    libraries: Mapping[str, str]
    base_files: Mapping[str, str]
    micro_batch_size: int
    gradient_checkpointing: bool
    recomputed_layers: int | None
    builder: str


def statement(session: Session, lease: Lease, spec: JobSpec, run: RunFacts) -> dict[str, Any]:
    """The statement on the product of an attempt that has finished."""
    job = session.get_one(JobRow, lease.id)
    now = session.scalars(select(func.now())).one()
    return {
        "_type": STATEMENT_TYPE,
        "subject": [{"name": file.name, "digest": {"sha256": file.sha256}} for file in run.files],
        "predicateType": PREDICATE_TYPE,
        "predicate": {
            "buildDefinition": {
                "buildType": BUILD_TYPE,
                "externalParameters": {
                    "request": {name: value for name, value in job.request.items() if name not in _NOBODYS_AFFAIR},
                    "metadata": job.job_metadata or {},
                    "seed": spec.seed,
                },
                "internalParameters": {
                    "spec": spec.dated(job.created_at).model_dump(mode="json"),
                    "micro_batch_size": run.micro_batch_size,
                    "gradient_checkpointing": run.gradient_checkpointing,
                    "gradient_checkpointing_layers": run.recomputed_layers,
                    "device_kind": run.device_kind,
                    "devices": list(run.devices),
                },
                "resolvedDependencies": list(_dependencies(session, job, spec, run)),
            },
            "runDetails": {
                "builder": {
                    "id": run.builder,
                    "version": {"tunepool-server": version("tunepool-server"), **run.libraries},
                },
                "metadata": {
                    "invocationId": f"{job.id}/{lease.fence}",
                    "startedOn": None if job.started_at is None else job.started_at.isoformat(),
                    "finishedOn": now.isoformat(),
                },
                "byproducts": [*_figures(run), *_checkpoints(session, job)],
            },
        },
    }


def _dependencies(session: Session, job: JobRow, spec: JobSpec, run: RunFacts) -> Iterable[Resource]:
    for name, file_id in (("training_file", job.training_file), ("validation_file", job.validation_file)):
        if file_id is not None:
            yield _data(session.get_one(FileRow, file_id), name=name, spec=spec)
    yield _base(spec.base_model)
    for name, digest in run.base_files.items():
        yield {"name": f"base_model/{name}", "digest": {"sha256": digest}}
    if spec.training.chat_template is not None:
        digest = hashlib.sha256(spec.training.chat_template.encode()).hexdigest()
        yield {"name": "chat_template", "digest": {"sha256": digest}}
    if spec.parent is not None:
        yield _parent(spec.parent)
    commit = (job.job_metadata or {}).get("git_sha", "")
    if _COMMIT.fullmatch(commit):
        yield {"name": "source", "digest": {"gitCommit": commit}}


def _data(row: FileRow, *, name: str, spec: JobSpec) -> Resource:
    rows = spec.data.train_rows if name == "training_file" else spec.data.validation_rows
    return {
        "name": name,
        "uri": f"urn:tunepool:file:{row.id}",
        "digest": {"sha256": row.sha256},
        "annotations": {"filename": row.filename, "bytes": row.bytes, "rows": rows},
    }


def _base(base: BaseModelRef) -> Resource:
    """A folder's revision is no digest; its tokenizer files have theirs."""
    algorithm = {"hub": "gitCommit", "pypi": "sha256"}.get(base.source)
    digest = {"digest": {algorithm: base.revision}} if algorithm else {"annotations": {"revision": base.revision}}
    return {"name": "base_model", "uri": f"urn:tunepool:base:{base.source}:{base.public_name}", **digest}


def _parent(parent: Parent) -> Resource:
    """The tuned model that training went on from; by all its files, as `digest_of` adds them up."""
    digest = digest_of({file.name: file.sha256 for file in parent.files})
    return {
        "name": "parent_adapter",
        "uri": f"urn:tunepool:model:{parent.name}",
        "digest": {"sha256": digest},
        "annotations": {"init_from": parent.init_from},
    }


def _figures(run: RunFacts) -> Iterable[Resource]:
    figures = run.finished.model_dump(mode="json", exclude={"type", "time"}, exclude_none=True)
    yield {"name": run.result.filename, "digest": {"sha256": run.result.sha256}, "annotations": figures}


def _checkpoints(session: Session, job: JobRow) -> Iterable[Resource]:
    rows = session.scalars(select(CheckpointRow).where(CheckpointRow.job_id == job.id).order_by(CheckpointRow.step))
    for row in rows:
        files = {file["name"]: file["sha256"] for file in row.manifest.get("files", ())}
        yield {"name": row.name, "digest": {"sha256": digest_of(files)}, "annotations": row.metrics}


def digest_of(files: Mapping[str, str]) -> str:
    """One sha256 for a folder: of its `sha256  name` lines in the order of names, as sha256sum writes them."""
    lines = "".join(f"{sha256}  {name}\n" for name, sha256 in sorted(files.items()))
    return hashlib.sha256(lines.encode()).hexdigest()


def payload(stated: dict[str, Any]) -> bytes:
    """The bytes that are signed. Raises ValueError for a number that JSON does not know."""
    return json.dumps(stated, ensure_ascii=False, allow_nan=False, separators=(",", ":")).encode()
