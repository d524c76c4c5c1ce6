"""One job over two supervisors with the real trainer: the middle between a plan and torchrun, end to end."""

from __future__ import annotations

import json
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest
from safetensors.torch import load

from shared.contract.events import EXIT_DONE
from shared.contract.spec import AttemptSpec, JobSpec, Placement
from tests.lifecycle.real_trainer import open_real_stack
from tests.lifecycle.stack import Servers, Stack
from tests.patience import lease
from tests.train.tiny import chat_rows, losses, run, write_rows

REAL = {
    "TUNEPOOL_GANG_LAUNCHER": "worker.train.gang",
    # Importing the training stack twice keeps a busy machine from everything else for a while.
    "TUNEPOOL_HEARTBEAT_SECONDS": "5",
    "TUNEPOOL_LEASE_SECONDS": lease(30),
}
SETTINGS = {
    "adapter": {"method": "lora", "r": 4},
    # In whole precision, so that a sum in another order is all that can differ.
    "training": {
        "batch_size": 4,
        "num_train_epochs": 2,
        "learning_rate": 0.01,
        "max_length": 256,
        "dtype": "float32",
        "optim": "adamw_torch",
    },
}


@pytest.fixture
def own_signals() -> Iterator[None]:
    """The trainer of the comparison runs inside the test process and takes SIGTERM; give it back."""
    before = signal.getsignal(signal.SIGTERM)
    yield
    signal.signal(signal.SIGTERM, before)


@pytest.fixture
def two(servers: Servers, tmp_path: Path) -> Iterator[Stack]:
    with open_real_stack(tmp_path / "stack", servers, **REAL) as made:
        for number in (0, 1):
            made.start_worker(home=f"host-{number}", TUNEPOOL_CPU_SLOTS="2", TUNEPOOL_DEVICES=f"cpu-{number}")
        made.wait_for_worker(devices=2)
        yield made
        broken = made.broken_invariants()
    assert broken == []


def alone(spec: JobSpec, *, model: Path, rows: Path, folder: Path) -> dict[int, float]:
    """Step and loss of the same job in one process."""
    attempt = AttemptSpec(
        job_id="ftjob-alone",
        model_name="ft:tiny:acme::alone",
        job=spec.model_copy(update={"placement": Placement()}),
        base_model_path=str(model),
        train_file=str(rows),
        micro_batch_size=spec.training.per_device_train_batch_size,
    )
    file = folder / "alone.json"
    file.write_text(attempt.model_dump_json(), encoding="utf-8")
    code, events = run(file, folder / "alone")
    assert code == EXIT_DONE
    return losses(events)


@pytest.mark.usefixtures("own_signals")
@pytest.mark.filterwarnings("ignore:Paged optimizers are not supported on CPU")
def test_two_supervisors_train_one_job_to_the_losses_of_one_process_and_publish_it_once(
    two: Stack, tmp_path: Path
) -> None:
    rows = write_rows(tmp_path / "rows.jsonl", chat_rows(13))

    placement = {"strategy": "ddp", "gpus": 1, "nodes": 2}
    job = two.wait(two.submit_file(two.upload(rows.read_bytes()), placement=placement, **SETTINGS), seconds=200)

    assert job.status == "succeeded", job.error
    told = {
        event.data["step"]: event.data["train_loss"]
        for event in two.events(job.id)
        if "train_loss" in (event.data or {})
    }
    spec = JobSpec.model_validate(job.spec)
    assert told == pytest.approx(alone(spec, model=two.home / "tiny", rows=rows, folder=tmp_path), rel=1e-4)
    assert len(told) == 8
    names = {file["name"] for file in job.manifest["files"]}
    assert {"adapter_config.json", "adapter_model.safetensors"} <= names
    assert load(two.read(f"{job.manifest['prefix']}/adapter_model.safetensors"))
    assert json.loads(two.read(f"{job.manifest['prefix']}/adapter_config.json"))["r"] == 4
    (attempt,) = two.attempts(job.id)
    assert len({device.split(":")[1] for device in attempt.device_ids}) == 2
    assert attempt.outcome == "succeeded"
