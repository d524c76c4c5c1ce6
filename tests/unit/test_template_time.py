"""The time that a chat template writes belongs to the job: each attempt's trainer is told the same."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta, timezone
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from shared.contract.job_request import CreateJob
from shared.contract.spec import DataFacts, JobSpec
from shared.settle.catalogue import SMOLLM2
from shared.settle.resolve import resolve
from shared.settle.settling import DeviceFacts
from worker.attempt.attempt_folder import AttemptFolder

CREATED = datetime(2026, 12, 1, 0, 59, 58, 999, tzinfo=timezone(timedelta(hours=1)))
CPU = DeviceFacts(kind="cpu", total_bytes=16 * 10**9, free_bytes=14 * 10**9, bfloat16=False)


def settled(**training: Any) -> tuple[CreateJob, JobSpec]:
    asked = {"training_file": "file-a", "model": "m", "tunepool": {"training": training}}
    request = CreateJob.model_validate(asked)
    data = DataFacts(format="chat", train_rows=100, mean_characters=800.0, max_characters=4000)
    return request, resolve(request, base=SMOLLM2.ref, data=data, device=CPU, seed=7).spec


def trainers_spec(request: CreateJob, spec: JobSpec, *, attempt: int) -> JobSpec:
    lease = SimpleNamespace(id="ftjob-1", fence=attempt, attempt=attempt)
    claim = SimpleNamespace(lease=lease, request=request, model_name="ft:m", pass_tokens=None, created_at=CREATED)
    folder: Any = SimpleNamespace(
        claim=claim, spec=spec, prepared=None, parent=None, micro_batch_size=1, gradient_checkpointing=False,
        recomputed_layers=None, kind="cpu", _threads=1, device=SimpleNamespace(total_bytes=16 * 10**9, kind="cpu"),
    )  # fmt: skip
    return AttemptFolder._attempt_spec(folder, Path("/model"), Path("/rows"), None).job


@pytest.mark.parametrize(
    ("training", "written"), [({}, "2026-11-30T23:59:58"), ({"template_time": "2026-07-26"}, "2026-07-26")]
)
def test_every_attempt_writes_the_moment_of_the_job(training: dict[str, str], written: str) -> None:
    request, spec = settled(**training)

    specs = [trainers_spec(request, spec, attempt=attempt) for attempt in (1, 2)]

    assert specs[0] == specs[1]
    assert specs[0].training.template_time == written


def test_a_version_that_knows_no_such_time_reads_every_job_that_names_none() -> None:
    _, spec = settled()

    assert "template_time" not in spec.model_dump(mode="json")["training"]
    assert spec.dated(None) == spec
    assert JobSpec.model_validate(spec.dated(CREATED).model_dump(mode="json")).dated(datetime.now(UTC)) == (
        spec.dated(CREATED)
    )
