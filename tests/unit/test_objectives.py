"""What the table of objectives says of each is what a job is settled, refused and estimated by."""

from __future__ import annotations

from dataclasses import replace
from typing import Any, get_args

import pytest
from tunepool import requests

from shared.contract.job_request import CreateJob
from shared.contract.objectives import OBJECTIVES
from shared.contract.spec import OBJECTIVE_PARTS, DataFacts, Objective, ObjectiveName, Orpo, Simpo
from shared.errors import Invalid
from shared.settle.catalogue import SMOLLM2
from shared.settle.refusals import check_request
from shared.settle.resolve import Resolution, resolve
from shared.settle.settling import DeviceFacts
from shared.settle.sizing import estimate
from shared.settle.wishes import wished_objective

GPU = DeviceFacts(kind="cuda", total_bytes=24 * 10**9, free_bytes=24 * 10**9, bfloat16=True)


def request(objective: str, /, **fields: Any) -> CreateJob:
    return CreateJob.model_validate(
        {"model": "m", "training_file": "file-a", "method": {"type": objective}, "tunepool": fields}
    )


def settled(objective: str, *, rows: int = 5000, found: str | None = None, **fields: Any) -> Resolution:
    asked = request(objective, **fields)
    check_request(asked, SMOLLM2.ref)
    data = DataFacts.model_validate(
        {
            "format": found or OBJECTIVES[asked.method.type].formats[0] if asked.method else "",
            "train_rows": rows,
            "mean_characters": 300.0,
            "max_characters": 900,
        }
    )
    return resolve(asked, base=SMOLLM2.ref, data=data, device=GPU, seed=1)


def test_every_name_has_a_class_a_row_and_a_place_in_the_union() -> None:
    names = get_args(ObjectiveName)
    union = get_args(get_args(Objective)[0])

    assert set(OBJECTIVES) == set(OBJECTIVE_PARTS) == set(names)
    assert set(OBJECTIVE_PARTS.values()) == set(union)
    assert get_args(requests.MethodName) == names, "the command line offers them all"


@pytest.mark.parametrize("objective", [name for name in OBJECTIVES if "preference" in OBJECTIVES[name].formats])
def test_a_pair_takes_the_memory_of_two_sequences(objective: str) -> None:
    work = settled(objective, training={"per_device_train_batch_size": 4}).work

    assert work.rows == 2
    one = replace(work, rows=1)
    assert work.tokens == 2 * one.tokens
    assert estimate(work).terms["activations"] == 2 * estimate(one).terms["activations"]


@pytest.mark.parametrize(("objective", "share"), [("dpo", 0.05), ("kto", 0.05), ("orpo", 0.4), ("simpo", 0.05)])
def test_automatic_values_of_preferences_are_gentle(objective: str, share: float) -> None:
    training, plain = settled(objective).spec.training, settled("supervised").spec.training

    assert training.learning_rate == pytest.approx(share * plain.learning_rate, rel=1e-2)
    assert (training.num_train_epochs, training.packing) == (1, False)
    assert settled(objective, rows=500).spec.training.num_train_epochs == 2


def test_a_number_of_an_objective_may_stand_in_either_place_and_in_both_only_alike() -> None:
    given = {"type": "simpo", "simpo": {"hyperparameters": {"beta": 5.0, "n_epochs": 2}}}
    job = CreateJob.model_validate({"model": "m", "training_file": "file-a", "method": given})
    assert wished_objective(job) == Simpo(beta=5.0)

    both = CreateJob.model_validate(
        {
            "model": "m",
            "training_file": "file-a",
            "method": given,
            "tunepool": {"objective": {"type": "simpo", "gamma": 0.3}},
        }
    )
    check_request(both, SMOLLM2.ref)
    assert wished_objective(both) == Simpo(beta=5.0, gamma=0.3)
    assert wished_objective(CreateJob.model_validate({**job.model_dump(), "method": {"type": "orpo"}})) == Orpo()


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"training": {"packing": True}}, "tunepool.training.packing"),
        ({"training": {"train_on": "all"}}, "tunepool.training.train_on"),
        ({"objective": {"type": "dpo"}}, "tunepool.objective.type"),
    ],
)
@pytest.mark.parametrize("objective", ["orpo", "simpo"])
def test_what_does_not_go_with_pairs_is_refused(objective: str, fields: dict[str, Any], param: str) -> None:
    with pytest.raises(Invalid) as refused:
        check_request(request(objective, **fields), SMOLLM2.ref)

    assert refused.value.param == param


@pytest.mark.parametrize("objective", ["orpo", "simpo"])
def test_another_number_in_each_place_is_refused(objective: str) -> None:
    job = CreateJob.model_validate(
        {
            "model": "m",
            "training_file": "file-a",
            "method": {"type": objective, objective: {"hyperparameters": {"beta": 0.5}}},
            "tunepool": {"objective": {"type": objective, "beta": 0.6}},
        }
    )
    with pytest.raises(Invalid, match=f"'method.{objective}.hyperparameters.beta' says 0.5"):
        check_request(job, SMOLLM2.ref)


@pytest.mark.parametrize("objective", ["orpo", "simpo"])
@pytest.mark.parametrize(
    "adapter", [{"method": "full"}, {"method": "lora", "init_lora_weights": "pissa"}, {"bias": "all"}]
)
def test_what_needs_no_reference_goes_with_what_would_spoil_one(objective: str, adapter: dict[str, Any]) -> None:
    check_request(request(objective, adapter=adapter), SMOLLM2.ref)
    with pytest.raises(Invalid):
        check_request(request("dpo", adapter=adapter), SMOLLM2.ref)


@pytest.mark.parametrize(
    ("objective", "found", "remedy"),
    [("orpo", "chat", "method.type supervised"), ("simpo", "kto", "kto"), ("supervised", "preference", "dpo")],
)
def test_rows_that_an_objective_does_not_read_are_refused_with_the_one_that_does(
    objective: str, found: str, remedy: str
) -> None:
    with pytest.raises(Invalid, match=f"has {found} rows.*{remedy}"):
        settled(objective, found=found)
