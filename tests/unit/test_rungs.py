"""After running out of memory a job does with less, a rung at a time, until there is none."""

from __future__ import annotations

from typing import Any

from shared.contract.spec import DataFacts, DeviceKind, JobSpec
from tests.factories import make_spec
from worker.attempt.rungs import lower


def climbed_down(spec: JobSpec, *, kind: DeviceKind = "cuda") -> list[dict[str, Any]]:
    """Every change until the job would be given up."""
    at: dict[str, Any] = {
        "micro_batch_size": spec.training.per_device_train_batch_size,
        "gradient_checkpointing": spec.training.gradient_checkpointing,
        "pass_tokens": None,
    }
    changes = []
    while rung := lower(spec, kind=kind, **at):
        changes.append(dict(rung.next_try))
        at |= rung.next_try
    return changes


RECOMPUTED = {"micro_batch_size": 1, "gradient_checkpointing": True}


def spec(*, longest: int = 400, **training: Any) -> JobSpec:
    job = make_spec(gradient_checkpointing=False, **training)
    return job.model_copy(update={"data": DataFacts(format="chat", train_rows=20, max_characters=longest)})


def test_packed_passes_have_fewer_tokens_before_activations_are_recomputed() -> None:
    packed = spec(packing=True, per_device_train_batch_size=1, max_length=4096)

    assert climbed_down(packed) == [{"pass_tokens": 2048}, {"pass_tokens": 1024}, {"pass_tokens": 512}, RECOMPUTED]
    assert climbed_down(packed, kind="cpu") == [{"pass_tokens": 512}, RECOMPUTED]


def test_a_packed_pass_of_several_lengths_has_fewer_tokens_and_not_fewer_rows() -> None:
    packed = spec(packing=True, per_device_train_batch_size=4, max_length=1024)

    assert climbed_down(packed) == [{"pass_tokens": 2048}, {"pass_tokens": 1024}, {"pass_tokens": 512}, RECOMPUTED]


def test_a_pass_is_not_asked_to_be_shorter_than_the_longest_row() -> None:
    packed = spec(packing=True, per_device_train_batch_size=1, max_length=2048, longest=1_000_000)

    assert climbed_down(packed) == [RECOMPUTED]


def test_rows_that_are_not_packed_become_fewer_in_a_pass() -> None:
    padded = spec(packing=False, per_device_train_batch_size=4, max_length=4096)

    assert climbed_down(padded) == [{"micro_batch_size": 2}, {"micro_batch_size": 1}, RECOMPUTED]


def test_what_is_tried_next_is_told() -> None:
    rung = lower(spec(packing=True), kind="cuda", micro_batch_size=1, gradient_checkpointing=False, pass_tokens=None)

    assert rung is not None
    assert rung.message == "Out of memory with 2,048 packed tokens a pass; trying again with 1,024."
