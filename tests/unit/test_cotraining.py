from __future__ import annotations

from typing import Any

import pytest
from pydantic import ValidationError

from shared.contract.cotraining import CotrainingSpec, reason_not_together, reason_to_train_alone
from shared.contract.spec import AttemptSpec

FACTS = {
    "architecture": "LlamaForCausalLM",
    "parameters": 100_000,
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "intermediate_size": 128,
    "vocab_size": 260,
    "max_position_embeddings": 512,
}
PARENT = {
    "id": "adapter-a",
    "name": "ft:tiny:acme::0",
    "job_id": "ftjob-0",
    "init_from": "continue",
    "method": "lora",
    "rank": 4,
    "files": [],
}


def attempt(job_id: str = "ftjob-a", *, attempt: dict[str, Any] | None = None, **parts: dict[str, Any]) -> AttemptSpec:
    job: dict[str, Any] = {
        "base_model": {
            "name": "tiny",
            "public_name": "example/tiny",
            "source": "hub",
            "revision": "0" * 40,
            "facts": FACTS,
        },
        "objective": {"type": "supervised"},
        "data": {"format": "chat", "train_rows": 4},
        "adapter": {"method": "qlora"},
        "quantization": {},
        "training": {},
        "placement": {},
        "queue": {},
        "seed": 1,
    }
    for name, part in parts.items():
        job[name] = {**(job.get(name) or {}), **part}
    written = {
        "job_id": job_id,
        "model_name": "ft:tiny:acme::1",
        "job": job,
        "base_model_path": "/models/tiny",
        "train_file": "/rows",
        "micro_batch_size": 1,
        **(attempt or {}),
    }
    return AttemptSpec.model_validate(written)


def test_jobs_with_their_own_rows_adapters_and_schedules_may_share_a_base() -> None:
    trainees = [
        attempt("ftjob-a"),
        attempt("ftjob-b", adapter={"r": 64, "target_modules": ["q_proj"], "lora_dropout": 0.1}),
        attempt("ftjob-c", adapter={"method": "qdora", "loraplus_lr_ratio": 16.0}),
        attempt("ftjob-d", objective={"type": "dpo"}, data={"format": "preference", "train_rows": 9}),
        attempt("ftjob-e", training={"batch_size": 2, "packing": False}, attempt={"micro_batch_size": 2}),
    ]

    assert reason_not_together(trainees) is None


@pytest.mark.parametrize(
    ("parts", "reason"),
    [
        ({"adapter": {"method": "full"}}, "every weight of its base trains"),
        ({"adapter": {"bias": "all"}}, "it trains the base's biases"),
        ({"adapter": {"modules_to_save": ["lm_head"]}}, "it trains modules of the base"),
        ({"adapter": {"target_modules": "experts"}}, "its adapter stands in the base's own tensors"),
        ({"adapter": {"init_lora_weights": "pissa"}}, "its start moves a part of the base into the adapter"),
        ({"adapter": {"init_lora_weights": "olora"}}, "its start moves a part of the base into the adapter"),
        ({"parent": PARENT}, "it goes on from a tuned model"),
        ({"placement": {"strategy": "ddp", "gpus": 2}}, "it trains on several devices"),
    ],
)
def test_a_job_that_writes_into_its_base_trains_alone(parts: dict[str, Any], reason: str) -> None:
    assert reason_to_train_alone(attempt(**parts)) == reason
    assert reason_not_together([attempt("ftjob-b"), attempt(**parts)]) == f"ftjob-a: {reason}"


@pytest.mark.parametrize("job_id", ["..", "ftjob-a/b", "", "ftjob-" + "a" * 81, "ftjob-a\n", "stop"])
def test_an_id_that_is_no_jobs_is_refused(job_id: str) -> None:
    assert reason_to_train_alone(attempt(job_id)) == "its id is no job's"


@pytest.mark.parametrize(
    ("parts", "names"),
    [
        ({"attempt": {"base_model_path": "/models/other"}}, "base model"),
        ({"base_model": {"revision": "1" * 40}}, "base model"),
        ({"adapter": {"method": "lora"}}, "method's storage"),
        ({"quantization": {"bnb_4bit_quant_type": "fp4"}}, "quantization"),
        ({"training": {"dtype": "float32"}}, "dtype"),
        ({"attempt": {"device": "cuda"}}, "device"),
        ({"attempt": {"cpu_threads": 2}}, "threads"),
        ({"attempt": {"keep_dequantized": True}}, "kept weights"),
        ({"training": {"dtype": "float32"}, "attempt": {"cpu_threads": 2}}, "dtype, threads"),
    ],
)
def test_jobs_whose_base_would_not_be_the_same_in_memory_are_told_what_differs(
    parts: dict[str, Any], names: str
) -> None:
    assert reason_not_together([attempt(), attempt("ftjob-b", **parts)]) == f"ftjob-b and ftjob-a differ in {names}"


def test_a_job_is_named_once() -> None:
    assert reason_not_together([attempt(), attempt()]) == "a job is named twice"


def test_a_co_training_has_a_trainee_and_a_bound() -> None:
    with pytest.raises(ValidationError):
        CotrainingSpec(trainees=[])
    with pytest.raises(ValidationError):
        CotrainingSpec(trainees=[attempt(f"ftjob-{number}") for number in range(65)])


def test_a_trainee_has_its_own_folder_where_one_is_named() -> None:
    spec = CotrainingSpec(trainees=[attempt("ftjob-a"), attempt("ftjob-b")], outs={"ftjob-b": "/elsewhere/b/out"})

    assert CotrainingSpec.model_validate_json(spec.model_dump_json()).outs == {"ftjob-b": "/elsewhere/b/out"}
