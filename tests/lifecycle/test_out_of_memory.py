"""Out of memory with the real trainer under a real supervisor: the limit is the operating system's."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
from sqlalchemy import update
from transformers import LlamaConfig

from shared.store.db import session_scope
from shared.store.tables import JobRow
from tests.lifecycle.real_trainer import curve_of, open_real_stack
from tests.lifecycle.stack import Servers, Stack
from tests.patience import patience
from tests.train.tiny import losses, make_spec, run
from worker.train.packing import StepPlan

pytestmark = pytest.mark.timeout(patience(600))

SEED, ROWS, BATCH, LENGTH = 11, 24, 8, 1024
# A wide MLP: about 260 MB of activations per long row, so eight of them need 2 GB above the process's own, four need 1.
WIDE = LlamaConfig(
    vocab_size=260,
    hidden_size=64,
    intermediate_size=8192,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    max_position_embeddings=LENGTH,
    bos_token_id=0,
    eos_token_id=1,
    pad_token_id=2,
)
LIMIT = 2_300_000_000
TRAINING = {
    "max_length": LENGTH,
    "batch_size": BATCH,
    "num_train_epochs": 1,
    "learning_rate": 0.001,
    "packing": False,
    "optim": "adamw_torch",
    "dtype": "float32",
    "save_steps": 1,
    "gradient_checkpointing": False,
}


@pytest.fixture
def small(servers: Servers, tmp_path: Path) -> Iterator[Stack]:
    """A stack whose device has `LIMIT` bytes, with a real base model."""
    with open_real_stack(tmp_path, servers, config=WIDE, TUNEPOOL_CPU_MEMORY_BYTES=str(LIMIT)) as made:
        yield made


def rows() -> list[dict[str, str]]:
    """Short rows, and long ones for the last optimizer step only: two checkpoints exist when memory runs out."""
    plan = StepPlan(rows=ROWS, batch_size=BATCH, epochs=1, max_steps=None, seed=SEED)
    long = set(plan.row_indices(2))
    return [{"text": f"{place} " + "word " * (200 if place in long else 2)} for place in range(ROWS)]


def test_a_trainer_without_memory_goes_on_from_its_checkpoint_with_half_the_rows_and_the_same_curve(
    small: Stack, tmp_path: Path
) -> None:
    file_id = small.upload("".join(json.dumps(row) + "\n" for row in rows()).encode())
    training = {**TRAINING, "per_device_train_batch_size": 1}
    job_id = small.submit_file(
        file_id, seed=SEED, adapter={"method": "lora", "r": 4, "lora_alpha": 16}, training=training
    )
    with session_scope(small.engine) as session:  # as if the estimate had let eight rows pass
        session.execute(update(JobRow).where(JobRow.id == job_id).values(micro_batch_size=BATCH))
    small.start_worker()
    small.start_janitor()

    job = small.wait(job_id, seconds=480)

    assert job.status == "succeeded", job.error
    attempts = small.attempts(job_id)
    assert [row.outcome for row in attempts] == ["out_of_memory"] * (len(attempts) - 1) + ["succeeded"]
    assert job.micro_batch_size == BATCH // 2 ** (len(attempts) - 1) < BATCH
    told = [event.message for event in small.events(job_id)]
    assert "Resuming from the checkpoint of step 2" in told
    assert dict(curve_of(small, job_id)) == pytest.approx(undisturbed(small, tmp_path), rel=1e-4)


def undisturbed(stack: Stack, tmp_path: Path) -> dict[int, float]:
    """The curve of the same job with all the memory it wants."""
    spec = make_spec(
        tmp_path / "roomy",
        model=stack.home / "tiny",
        rows=rows(),
        data_format="text",
        adapter={"lora_alpha": 16},
        training={**TRAINING, "warmup_ratio": 0.03},
        micro_batch_size=2,
    )
    return losses(run(spec, tmp_path / "roomy" / "out")[1])
