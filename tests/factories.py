"""Rows with sensible values; a test names only what matters to it."""

from __future__ import annotations

from typing import Any

from sqlalchemy.orm import Session

from shared.contract.job_request import CreateJob
from shared.contract.spec import (
    Adapter,
    DataFacts,
    JobSpec,
    ModelFacts,
    Placement,
    Quantization,
    Queue,
    Supervised,
    Training,
)
from shared.fleet import snapshot
from shared.ids import new_id
from shared.jobs import submission
from shared.jobs.moves import claim_training, claim_validation, validated
from shared.lease.values import Claim, FileRef, Lease
from shared.plan.verdicts import Verdict
from shared.settle.catalogue import SMOLLM2
from shared.store.tables import DeviceRow, FileRow, JobRow, OrganizationRow, ProjectRow, WorkerRow
from shared.tenants import keys
from shared.tenants.keys import Caller

GIB = 1 << 30
LLAMA_8B = ModelFacts(
    architecture="LlamaForCausalLM",
    parameters=8_030_261_248,
    hidden_size=4096,
    num_hidden_layers=32,
    num_attention_heads=32,
    num_key_value_heads=8,
    head_dim=128,
    intermediate_size=14336,
    vocab_size=128256,
    max_position_embeddings=131072,
)


def make_caller(
    session: Session, *, name: str | None = None, scopes: tuple[str, ...] = ("*",), **project: Any
) -> Caller:
    """A new organization, project and key."""
    return make_key(session, name=name, scopes=scopes, **project)[0]


def make_key(
    session: Session, *, name: str | None = None, scopes: tuple[str, ...] = ("*",), **project: Any
) -> tuple[Caller, str]:
    """A new organization, project and key, and the key's secret."""
    organization = OrganizationRow(id=new_id("org_"), name=name or new_id("org_"))
    session.add(organization)
    session.flush()
    row = ProjectRow(id=new_id("proj_"), organization_id=organization.id, name="project", **project)
    session.add(row)
    session.flush()
    _, secret = keys.create(session, project_id=row.id, name="key", scopes=scopes)
    return keys.authenticate(session, secret), secret


def make_file(session: Session, caller: Caller, **values: Any) -> FileRow:
    """A checked training file of 20 chat rows."""
    file_id = new_id("file-")
    row = FileRow(
        **{
            "id": file_id,
            "project_id": caller.project_id,
            "filename": "train.jsonl",
            "purpose": "fine-tune",
            "bytes": 2000,
            "sha256": "0" * 64,
            "key": f"{caller.project_id}/files/{file_id}",
            "status": "processed",
            "report": None,
            **values,
        }
    )
    session.add(row)
    session.flush()
    return row


def make_request(training_file: str, **values: Any) -> CreateJob:
    return CreateJob.model_validate({"model": SMOLLM2.ref.name, "training_file": training_file, **values})


def make_job(session: Session, caller: Caller, *, file: FileRow | None = None, **values: Any) -> JobRow:
    """A job that has just been accepted: its files are about to be checked."""
    training = file or make_file(session, caller)
    request = make_request(training.id, **values)
    return submission.submit(session, request, caller=caller, base=SMOLLM2.ref, request_sha256=new_id("req_")).job


def make_spec(**training: Any) -> JobSpec:
    """A resolved job with the parts' own defaults."""
    return JobSpec(
        base_model=SMOLLM2.ref,
        objective=Supervised(),
        data=DataFacts(format="chat", train_rows=20),
        adapter=Adapter(),
        quantization=Quantization(),
        training=Training(**training),
        placement=Placement(),
        queue=Queue(),
        seed=1,
    )


def make_claim(lease: Lease, *, device_ids: tuple[str, ...] = ("host:cpu",), **values: Any) -> Claim:
    """A job's work as the holder of its lease has it; nothing of it is in a database."""
    return Claim(
        lease=lease,
        project_id="proj_1",
        request=CreateJob(model="tiny", training_file="file-1"),
        base_model="tiny",
        seed=1,
        spec=make_spec(),
        model_name="ft:tiny:acme::1",
        training_file=FileRef(id="file-1", key="k", bytes=1, sha256="", report=None),
        validation_file=None,
        device_ids=device_ids,
        **values,
    )


def make_queued_job(session: Session, caller: Caller, *, placement: Placement | None = None, **values: Any) -> JobRow:
    """A job whose files were found good: it waits for a device, or for those of its placement."""
    job = make_job(session, caller, **values)
    spec = make_spec().model_copy(update={"placement": placement or Placement()})
    claim = claim_validation(session, worker_id="checker", lease_seconds=60)
    assert claim is not None
    assert claim.lease.id == job.id
    assert validated(session, claim.lease, spec=spec, auto=[], bytes_per_device=GIB)
    session.refresh(job)
    return job


def make_worker(session: Session, *, devices: int = 1, pool: str = "default", **values: Any) -> WorkerRow:
    """A worker with free devices of 16 GiB."""
    worker_id = new_id("worker_")
    row = WorkerRow(id=worker_id, host=worker_id, pool=pool, boot_id="boot", version="test")
    session.add(row)
    session.flush()
    for index in range(devices):
        session.add(
            DeviceRow(
                **{
                    "id": f"{worker_id}:{index}",
                    "worker_id": worker_id,
                    "host": worker_id,
                    "pool": pool,
                    "kind": "cuda",
                    "name": "Test GPU",
                    "total_bytes": 16 * GIB,
                    "free_bytes": 16 * GIB,
                    "cached_models": [SMOLLM2.ref.name],
                    **values,
                }
            )
        )
    session.flush()
    return row


def claim_on(session: Session, worker: WorkerRow) -> Claim | None:
    """What this worker's pull would lease now."""
    return claim_training(session, worker_id=worker.id, pool_name=worker.pool, lease_seconds=60)


def verdict_of(session: Session, job_id: str, *, pool_name: str = "default") -> Verdict | None:
    """Why a queued job waits; None when the next pull would start it, or when it does not wait."""
    return snapshot.make_plan(snapshot.snapshot(session, pool_name=pool_name)).verdicts.get(job_id)
