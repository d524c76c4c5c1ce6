"""A job on a tuned model: what it takes over, what it refuses, and how it says which way it begins."""

from __future__ import annotations

from typing import Any

import pytest

from shared.contract.job_request import CreateJob
from shared.contract.parent_model import ParentModel
from shared.contract.published import published_shape
from shared.contract.spec import Adapter, AttemptSpec, DataFacts, JobSpec, Parent, ParentFile, Quantization
from shared.errors import Conflict, Invalid
from shared.settle import going_on
from shared.settle.catalogue import SMOLLM2
from shared.settle.refusals import check_request
from shared.settle.resolve import Resolution, resolve
from tests.factories import make_spec
from tests.unit.test_resolve import GPU

NAME = "ft:smollm2-135m-instruct:acme::0193"
FILES = (ParentFile(name="adapter_model.safetensors", bytes=9, sha256="a" * 64),)
DPO = {"method": {"type": "dpo"}}


def parent(
    *, quantization: dict[str, Any] | None = None, training: dict[str, Any] | None = None, **shape: Any
) -> ParentModel:
    spec = make_spec(**(training or {})).model_copy(
        update={"adapter": Adapter(**shape), "quantization": Quantization(**(quantization or {}))}
    )
    return ParentModel(
        id="adapter_1", name=NAME, job_id="ftjob-0193", spec=spec, files=FILES, keys={"adapter_model.safetensors": "k"}
    )


def request(**fields: Any) -> CreateJob:
    return CreateJob.model_validate({"model": NAME, "training_file": "file-a", **fields})


def on_top(**adapter: Any) -> CreateJob:
    return request(tunepool={"adapter": {"init_from": "merged", **adapter}})


def going_on_from(origin: ParentModel, data_format: str = "chat", **fields: Any) -> Resolution:
    wanted = request(**fields)
    check_request(wanted, SMOLLM2.ref, origin)
    data = DataFacts.model_validate({"format": data_format, "train_rows": 100})
    return resolve(wanted, base=SMOLLM2.ref, data=data, device=GPU, seed=1, parent=origin)


def reason(settled: Resolution, field: str) -> str:
    return next(value.reason for value in settled.auto if value.field == field)


def test_a_job_on_a_tuned_model_continues_its_adapter_in_its_shape_and_says_so() -> None:
    shape = {"method": "dora", "r": 24, "lora_alpha": 48, "use_rslora": True, "target_modules": ["q_proj", "v_proj"]}
    settled = going_on_from(parent(**shape, lora_dropout=0.1))

    adapter = settled.spec.adapter
    assert adapter.model_dump(include=set(shape)) == shape
    assert adapter.lora_dropout == 0.0  # no weight depends on it
    assert settled.spec.parent == Parent(
        id="adapter_1", name=NAME, job_id="ftjob-0193", init_from="continue", method="dora", rank=24, files=list(FILES)
    )
    assert "trains on" in reason(settled, "adapter.init_from")
    assert reason(settled, "adapter.r") == f"as {NAME}"


def test_template_and_quantization_are_inherited_unless_they_are_asked_for() -> None:
    origin = parent(
        quantization={"bnb_4bit_quant_type": "fp4", "bnb_4bit_use_double_quant": False},
        training={"chat_template": "{{ messages }}", "system_prompt": "merge"},
    )
    spec = going_on_from(origin).spec
    assert (spec.training.chat_template, spec.training.system_prompt) == ("{{ messages }}", "merge")
    assert (spec.quantization.bnb_4bit_quant_type, spec.quantization.bnb_4bit_use_double_quant) == ("fp4", False)

    own = going_on_from(
        origin, tunepool={"training": {"chat_template": "mine"}, "quantization": {"load_in_4bit": False}}
    )
    assert own.spec.training.chat_template == "mine"
    assert (own.spec.adapter.method, own.spec.quantization.load_in_4bit) == ("lora", False)


def test_on_top_a_new_adapter_has_a_shape_of_its_own_in_the_same_places() -> None:
    origin = parent(r=24, lora_alpha=48, target_modules=["q_proj"])
    settled = going_on_from(origin, tunepool={"adapter": {"init_from": "merged", "r": 8}})

    spec = settled.spec
    assert (spec.adapter.r, spec.adapter.lora_alpha, spec.adapter.target_modules) == (8, 8, ["q_proj"])
    assert (spec.parent.init_from, spec.parent.rank) == ("merged", 24)
    assert not any(value.field == "adapter.init_from" for value in settled.auto)  # it was asked for
    assert (published_shape(spec).r, published_shape(spec).lora_alpha) == (32, 32)


def test_the_next_one_goes_on_from_the_shape_that_was_published() -> None:
    twice = going_on_from(
        parent(method="lora", init_lora_weights="pissa", r=8, lora_alpha=4, rank_pattern={"q_proj": 2})
    )
    assert (twice.spec.adapter.r, twice.spec.adapter.lora_alpha) == (16, 8)
    assert twice.spec.adapter.rank_pattern == {"q_proj": 4}
    assert twice.spec.adapter.init_lora_weights == "default"

    above = going_on_from(parent(r=8), tunepool={"adapter": {"init_from": "merged", "r": 4}}).spec
    third = going_on_from(ParentModel("adapter_2", NAME, "ftjob-2", above, FILES, {})).spec
    assert (third.adapter.r, third.adapter.lora_alpha, third.parent.rank) == (12, 12, 12)


def test_a_whole_model_trains_on_whole_and_an_adapter_may_go_into_its_base_for_that() -> None:
    whole = going_on_from(parent(method="full")).spec
    assert (whole.adapter.method, whole.parent.init_from, whole.parent.rank) == ("full", "continue", 0)

    settled = going_on_from(parent(r=8), tunepool={"adapter": {"method": "full"}})
    assert (settled.spec.adapter.method, settled.spec.parent.init_from) == ("full", "merged")
    assert "in its base" in reason(settled, "adapter.init_from")


@pytest.mark.parametrize(
    ("origin", "wanted", "param"),
    [
        (parent(r=8), request(tunepool={"adapter": {"r": 16}}), "tunepool.adapter.r"),
        (parent(r=8), request(hyperparameters={"lora_alpha": 64}), "tunepool.adapter.lora_alpha"),
        (parent(), request(tunepool={"adapter": {"target_modules": ["q_proj"]}}), "tunepool.adapter.target_modules"),
        (parent(), request(tunepool={"adapter": {"method": "dora"}}), "tunepool.adapter.method"),
        (parent(), request(tunepool={"adapter": {"init_lora_weights": "eva"}}), "tunepool.adapter.init_lora_weights"),
        (
            parent(method="lora", init_lora_weights="olora", use_rslora=True),
            request(),
            "tunepool.adapter.init_from",
        ),
        (
            parent(),
            request(**DPO, tunepool={"placement": {"strategy": "fsdp", "gpus": 2}}),
            "tunepool.placement.strategy",
        ),
        (parent(bias="all"), request(**DPO), "tunepool.adapter.bias"),
        (parent(method="full"), request(tunepool={"adapter": {"method": "lora"}}), "tunepool.adapter.method"),
        (parent(method="full"), request(hyperparameters={"lora_r": 8}), "tunepool.adapter.r"),
        (parent(method="full"), on_top(), "tunepool.adapter.init_from"),
        (parent(), request(tunepool={"adapter": {"method": "full", "init_from": "continue"}}), "adapter.init_from"),
        (parent(method="dora"), on_top(method="lora"), "tunepool.adapter.init_from"),
        (parent(modules_to_save=["norm"]), on_top(), "tunepool.adapter.init_from"),
        (parent(), on_top(method="qdora"), "tunepool.adapter.init_from"),
        (parent(), on_top(bias="lora_only"), "tunepool.adapter.init_from"),
        (parent(), on_top(target_modules=["q_proj"]), "tunepool.adapter.target_modules"),
        (parent(method="lora"), on_top(init_lora_weights="pissa"), "tunepool.adapter.init_lora_weights"),
        (None, on_top(), "tunepool.adapter.init_from"),
    ],
)
def test_what_contradicts_the_tuned_model_is_refused_by_name(
    origin: ParentModel | None, wanted: CreateJob, param: str
) -> None:
    with pytest.raises(Invalid) as refused:
        check_request(wanted, SMOLLM2.ref, origin)

    assert (refused.value.param or "").endswith(param)
    assert any(word in refused.value.message for word in ("use ", "leave it out", "drop it"))


def test_the_same_shape_in_other_words_is_no_contradiction() -> None:
    origin = parent(r=8, target_modules=["q_proj", "v_proj"])
    adapter = {"r": 8, "target_modules": ["v_proj", "q_proj"], "rank_pattern": {}, "init_lora_weights": "default"}
    assert going_on_from(origin, tunepool={"adapter": adapter}).spec.adapter.r == 8


def test_the_base_must_be_there_in_the_revision_that_the_parent_was_trained_on() -> None:
    origin = parent()
    assert going_on.must_stand_on(origin, SMOLLM2.ref) == SMOLLM2.ref
    with pytest.raises(Conflict, match="no more") as gone:
        going_on.must_stand_on(origin, None)
    with pytest.raises(Conflict, match="revision") as changed:
        going_on.must_stand_on(origin, SMOLLM2.ref.model_copy(update={"revision": "other"}))
    assert (gone.value.code, changed.value.code) == ("base_model_gone", "base_model_changed")


def test_what_stays_frozen_beside_the_trained_adapter_counts_in_the_estimate() -> None:
    origin = parent(r=64)
    alone = going_on_from(origin).estimate.terms
    above = going_on_from(origin, tunepool={"adapter": {"init_from": "merged", "r": 8}}).estimate.terms
    compared = going_on_from(origin, "preference", **DPO).estimate.terms

    assert "frozen adapter" not in alone
    assert above["frozen adapter"] == 8 * above["trained weights"] == alone["trained weights"]
    assert compared["frozen adapter"] == compared["trained weights"]


def test_a_request_with_a_parent_is_kept_so_that_an_older_version_does_not_understand_it() -> None:
    kept = going_on.marked(request(suffix="x", tunepool={"adapter": {"r": 8}}))
    again = CreateJob.model_validate(kept.model_dump(mode="json", exclude_unset=True))

    assert kept.model_dump(mode="json", exclude_unset=True)["tunepool"]["adapter"] == {"init_from": "auto", "r": 8}
    assert going_on.is_marked(again)
    assert not going_on.is_marked(request())
    assert not going_on.is_marked(request(tunepool={"adapter": {"r": 8}}))


def test_the_spec_of_a_job_without_a_parent_is_written_as_the_version_before_reads_it() -> None:
    assert "parent" not in make_spec().model_dump(mode="json")
    spec = going_on_from(parent()).spec
    assert JobSpec.model_validate(spec.model_dump(mode="json")) == spec
    attempt = AttemptSpec(
        job_id="j", model_name="m", job=spec, base_model_path="b", train_file="t", parent_path="p", micro_batch_size=1
    )
    assert AttemptSpec.model_validate_json(attempt.model_dump_json()) == attempt
