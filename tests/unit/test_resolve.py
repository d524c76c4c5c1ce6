"""Every open value is settled, with a reason; what the user settled stays."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from shared.contract.base_facts import ModelFacts
from shared.contract.job_request import CreateJob
from shared.contract.spec import DataFacts, JobSpec
from shared.errors import Invalid
from shared.settle.catalogue import SMOLLM2
from shared.settle.resolve import Resolution, resolve
from shared.settle.settling import PRESETS, DeviceFacts
from shared.settle.sizing import estimate
from shared.settle.workload import workload
from tests.factories import LLAMA_8B

GB = 10**9
CPU = DeviceFacts(kind="cpu", total_bytes=16 * GB, free_bytes=14 * GB, bfloat16=False)
GPU = DeviceFacts(kind="cuda", total_bytes=24 * GB, free_bytes=23 * GB, bfloat16=True)


def settled(
    *, device: DeviceFacts = GPU, facts: ModelFacts = LLAMA_8B, data: dict[str, Any] | None = None, **fields: Any
) -> Resolution:
    known = {"format": "chat", "train_rows": 1000, "mean_characters": 800.0, "max_characters": 4000, **(data or {})}
    job = CreateJob.model_validate({"model": "m", "training_file": "file-a", **fields})
    base = SMOLLM2.ref.model_copy(update={"facts": facts})
    return resolve(job, base=base, data=DataFacts.model_validate(known), device=device, seed=7)


def demo(**fields: Any) -> Resolution:
    rows = {"train_rows": 320, "validation_rows": 40, "mean_characters": 350.0, "max_characters": 520}
    return settled(device=CPU, facts=SMOLLM2.ref.facts, data=rows, **fields)


def test_the_demo_resolves_to_a_short_packed_run_that_fits_a_small_machine() -> None:
    job = demo()
    training = job.spec.training
    assert (job.spec.adapter.method, job.spec.adapter.r, job.spec.adapter.target_modules) == ("qlora", 16, "all-linear")
    assert (training.batch_size, training.max_length, training.packing) == (8, 512, True)
    assert 5e-4 < training.learning_rate < 2e-3
    assert job.expected_steps == 120
    assert job.bytes_per_device < 4 * GB


def test_ten_rows_still_make_a_run_with_some_steps() -> None:
    job = settled(data={"train_rows": 10})
    assert job.expected_steps >= 30


def test_every_field_that_was_not_given_is_reported_once_with_a_reason() -> None:
    job = demo(tunepool={"training": {"learning_rate": 1e-3}, "adapter": {"r": 4}})
    reported = [value.field for value in job.auto]
    parts = {"adapter", "quantization", "training", "placement"}
    every = {f"{part}.{name}" for part in parts for name in type(getattr(job.spec, part)).model_fields}
    assert len(reported) == len(set(reported))
    assert set(reported) == every - {"training.learning_rate", "adapter.r"}
    assert all(len(value.reason) > 5 for value in job.auto)


def test_tunepool_wins_over_other_services_keys_over_openais_over_the_preset() -> None:
    openai = {"n_epochs": 4, "batch_size": 2}
    job = settled(hyperparameters={**openai, "lora_r": 4}, tunepool={"preset": "complex"})
    assert (job.spec.training.num_train_epochs, job.spec.training.batch_size, job.spec.adapter.r) == (4, 2, 4)
    assert job.spec.training.learning_rate == PRESETS["complex"].learning_rate
    over = settled(hyperparameters={"lora_r": 4}, tunepool={"preset": "complex", "adapter": {"r": 2}})
    assert over.spec.adapter.r == 2


@pytest.mark.parametrize(
    ("preset", "rows", "r", "rate", "epochs"),
    [
        ("prototype", 500, 8, 3e-4, 2),
        ("prototype", 5000, 8, 3e-4, 1),
        ("general", 1000, 16, 2e-4, 3),
        ("complex", 1000, 32, 1e-4, 5),
        ("complex", 20_000, 64, 1e-4, 3),
        ("large_dataset", 100_000, 16, 5e-5, 1),
    ],
)
def test_presets_are_the_practices_table(preset: str, rows: int, r: int, rate: float, epochs: int) -> None:
    spec = settled(data={"train_rows": rows}, tunepool={"preset": preset}).spec
    found = (spec.adapter.r, spec.adapter.lora_alpha, spec.training.learning_rate, spec.training.num_train_epochs)
    assert found == (r, r, rate, epochs)


def test_a_learning_rate_multiplier_scales_the_automatic_rate() -> None:
    plain, doubled = (settled(hyperparameters={"learning_rate_multiplier": by}) for by in (1.0, 2.0))
    assert doubled.spec.training.learning_rate == pytest.approx(2 * plain.spec.training.learning_rate, rel=0.01)


def test_preferences_and_full_fine_tuning_learn_more_slowly() -> None:
    supervised = settled().spec.training.learning_rate
    full = settled(tunepool={"adapter": {"method": "full"}}).spec.training.learning_rate
    dpo = settled(data={"format": "preference"}, method={"type": "dpo"}).spec.training.learning_rate
    assert supervised == pytest.approx(2e-4)
    assert full == pytest.approx(supervised / 10)
    assert dpo == pytest.approx(supervised / 20)


@pytest.mark.parametrize(
    ("kind", "bfloat16", "method", "dtype"),
    [
        ("cuda", True, "qlora", "bfloat16"),
        ("cuda", False, "qlora", "float16"),
        ("cuda", False, "full", "float32"),
        ("cpu", True, "qlora", "bfloat16"),
        ("cpu", False, "qlora", "float32"),
    ],
)
def test_arithmetic_follows_the_hardware(kind: Any, bfloat16: bool, method: str, dtype: str) -> None:
    device = DeviceFacts(kind=kind, total_bytes=80 * GB, free_bytes=80 * GB, bfloat16=bfloat16)
    spec = settled(device=device, facts=SMOLLM2.ref.facts, tunepool={"adapter": {"method": method}}).spec
    assert (spec.training.dtype, spec.quantization.bnb_4bit_compute_dtype) == (dtype, dtype)


@pytest.mark.parametrize(
    ("architecture", "dtype"),
    [
        ("LlamaForCausalLM", "float16"),
        ("MistralForCausalLM", "float16"),
        ("Gemma3ForConditionalGeneration", "float32"),
        ("Gemma2ForCausalLM", "float32"),
        ("Qwen3MoeForCausalLM", "float32"),
        ("GptOssForCausalLM", "float32"),
    ],
)
def test_a_family_that_leaves_float16s_range_takes_float32_where_bfloat16_is_missing(
    architecture: str, dtype: str
) -> None:
    turing = DeviceFacts(kind="cuda", total_bytes=80 * GB, free_bytes=80 * GB, bfloat16=False)
    facts = SMOLLM2.ref.facts.model_copy(update={"architecture": architecture})

    job = settled(device=turing, facts=facts)

    assert (job.spec.training.dtype, job.spec.quantization.bnb_4bit_compute_dtype) == (dtype, dtype)


def test_a_small_device_gets_smaller_passes_then_checkpointing_at_the_same_batch() -> None:
    rows = {"mean_characters": 3000.0, "max_characters": 4000}
    wish = {"tunepool": {"training": {"packing": False, "batch_size": 16}}}
    shapes = []
    for gigabytes in (80, 24, 12, 9):
        device = DeviceFacts(kind="cuda", total_bytes=gigabytes * GB, free_bytes=gigabytes * GB, bfloat16=True)
        job = settled(device=device, data=rows, **wish)
        assert job.fits
        assert job.spec.training.batch_size == 16
        shapes.append((not job.spec.training.gradient_checkpointing, job.spec.training.per_device_train_batch_size))
    assert shapes == sorted(shapes, reverse=True)
    assert shapes[0] == (True, 8) or shapes[0][1] > shapes[-1][1] or shapes[-1][0] is False
    assert shapes[-1][0] is False


def test_rows_are_shortened_only_when_nothing_else_fits() -> None:
    device = DeviceFacts(kind="cuda", total_bytes=9 * GB, free_bytes=9 * GB, bfloat16=True)
    job = settled(device=device, data={"mean_characters": 40_000.0, "max_characters": 60_000})
    assert job.fits
    assert job.spec.training.gradient_checkpointing
    reasons = {value.field: value.reason for value in job.auto}
    assert "memory" in reasons["training.max_length"]


MISTRAL_7B = LLAMA_8B.model_copy(update={"parameters": 7_241_732_096, "vocab_size": 32_000})


@pytest.mark.parametrize("facts", [MISTRAL_7B, LLAMA_8B], ids=["mistral-7b", "llama-8b"])
@pytest.mark.parametrize("mib", [16_376, 24_564, 49_140])
@pytest.mark.parametrize("desktop", [0.0, 0.6, 1.5, 2.3])
def test_what_fits_a_card_with_a_desktop_is_found_by_the_plan(facts: ModelFacts, mib: int, desktop: float) -> None:
    total = mib << 20
    device = DeviceFacts(kind="cuda", total_bytes=total, free_bytes=total - int(desktop * GB), bfloat16=True)

    job = settled(device=device, facts=facts)

    assert job.fits
    assert job.bytes_per_device <= device.free_bytes


def test_a_base_that_does_not_fit_each_device_is_spread_over_them_before_rows_are_cut() -> None:
    small = DeviceFacts(kind="cuda", total_bytes=12 * GB, free_bytes=12 * GB, bfloat16=True)
    wish: dict[str, Any] = {"adapter": {"method": "lora"}, "placement": {"gpus": 4}}

    roomy, spread = settled(tunepool=wish), settled(device=small, tunepool=wish)
    asked = settled(device=small, tunepool={**wish, "placement": {"gpus": 4, "strategy": "ddp"}})

    assert (roomy.spec.placement.strategy, spread.spec.placement.strategy) == ("ddp", "fsdp")
    assert spread.fits
    assert spread.spec.training.max_length == roomy.spec.training.max_length
    assert {one.field: one.reason for one in spread.auto}["placement.strategy"].startswith("a copy of the base")
    assert (asked.spec.placement.strategy, asked.fits) == ("ddp", False)


def test_what_cannot_fit_says_so() -> None:
    tiny = DeviceFacts(kind="cuda", total_bytes=4 * GB, free_bytes=4 * GB, bfloat16=True)
    job = settled(device=tiny)
    assert not job.fits
    assert job.bytes_per_device > tiny.budget


@pytest.mark.parametrize(
    ("fields", "found", "remedy"),
    [
        ({}, "preference", "method.type to dpo"),
        ({}, "kto", "tunepool.objective"),
        ({"method": {"type": "dpo"}}, "chat", "method.type supervised"),
        ({"tunepool": {"objective": {"type": "kto"}}}, "text", "method.type supervised"),
    ],
)
def test_rows_of_another_objective_are_refused(fields: dict[str, Any], found: str, remedy: str) -> None:
    with pytest.raises(Invalid, match=remedy):
        settled(data={"format": found}, **fields)


def test_what_a_cpu_cannot_do_is_refused_there() -> None:
    float16: dict[str, Any] = {"training": {"dtype": "float16"}}
    with pytest.raises(Invalid, match="use"):
        demo(tunepool=float16)
    settled(tunepool=float16)


def test_loftq_starts_on_a_cpu_too() -> None:
    """The trainer's own computation runs anywhere; PEFT's ran on a GPU only."""
    job = demo(tunepool={"adapter": {"init_lora_weights": "loftq"}})
    assert job.spec.adapter.init_lora_weights == "loftq"


@pytest.mark.parametrize(
    "asked", [{"mask_reasoning": True}, {"drop_history_reasoning": True}, {"system_prompt": "merge"}]
)
def test_what_changes_messages_is_refused_for_rows_without_any(asked: dict[str, Any]) -> None:
    with pytest.raises(Invalid, match="drop it"):
        settled(tunepool={"training": asked}, data={"format": "text"})

    assert settled(tunepool={"training": asked}).spec.training.model_dump().items() >= asked.items()


def test_control_tokens_are_read_in_raw_text_only() -> None:
    asked = {"training": {"special_tokens": "parse"}}
    with pytest.raises(Invalid, match="text of chat rows is text"):
        settled(tunepool=asked)

    assert settled(tunepool=asked, data={"format": "text"}).spec.training.special_tokens == "parse"
    assert settled().spec.training.special_tokens == "text"


def test_layers_by_number_get_modules_by_name() -> None:
    spec = settled(tunepool={"adapter": {"layers_to_transform": [0, 1]}}).spec
    assert isinstance(spec.adapter.target_modules, list)
    assert "down_proj" in spec.adapter.target_modules


def test_max_steps_alone_is_reached() -> None:
    job = settled(data={"train_rows": 100}, tunepool={"training": {"max_steps": 60}})
    assert job.expected_steps == 60


REQUESTS = st.fixed_dictionaries(
    {},
    optional={
        "preset": st.sampled_from(sorted(PRESETS)),
        "adapter": st.fixed_dictionaries(
            {"method": st.sampled_from(["lora", "qlora", "dora", "qdora"])}, optional={"r": st.integers(1, 128)}
        ),
        "training": st.fixed_dictionaries(
            {},
            optional={"packing": st.booleans(), "max_length": st.integers(8, 8192), "max_steps": st.integers(1, 999)},
        ),
        "placement": st.fixed_dictionaries({"gpus": st.integers(1, 8)}),
    },
)
DEVICES = st.builds(
    lambda kind, gigabytes, bfloat16: DeviceFacts(kind, gigabytes * GB, gigabytes * GB, bfloat16),
    st.sampled_from(["cuda", "cpu"]),
    st.integers(2, 200),
    st.booleans(),
)


@settings(max_examples=60)
@given(
    ours=REQUESTS, device=DEVICES, rows=st.integers(1, 200_000), mean=st.integers(0, 9000), more=st.integers(0, 200_000)
)
def test_whatever_is_asked_resolves_to_a_spec_that_validates_and_keeps_every_wish(
    ours: dict[str, Any], device: DeviceFacts, rows: int, mean: int, more: int
) -> None:
    data = {"train_rows": rows, "mean_characters": float(mean), "max_characters": mean + more}
    job = settled(device=device, data=data, tunepool=ours)
    assert JobSpec.model_validate_json(job.spec.model_dump_json()) == job.spec
    training, placement = job.spec.training, job.spec.placement
    assert training.batch_size % (placement.gpus * placement.nodes) == 0
    assert training.max_length <= LLAMA_8B.max_position_embeddings
    assert job.expected_steps >= 1
    assert job.estimate == estimate(workload(job.spec, device=device.kind, memory=device.total_bytes))
    assert job.bytes_per_device == job.calibration.upper(job.estimate.total)
    for part in ("adapter", "training", "placement"):
        for name, value in ours.get(part, {}).items():
            assert getattr(getattr(job.spec, part), name) == value
