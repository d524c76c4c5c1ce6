"""A contradiction is refused at submit, with the field, its value and a remedy."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

from shared.contract.families import FAMILIES
from shared.contract.job_request import CreateJob
from shared.contract.methods import METHODS, UNSUPPORTED, refuse_unsupported
from shared.contract.objectives import OBJECTIVES
from shared.contract.spec import BaseModelRef, Dpo
from shared.errors import Invalid
from shared.settle.catalogue import SMOLLM2
from shared.settle.refusals import check_request
from shared.settle.wishes import wished_objective


def request(**fields: Any) -> CreateJob:
    return CreateJob.model_validate({"model": "m", "training_file": "file-a", **fields})


def ours(**parts: Any) -> CreateJob:
    return request(tunepool=parts)


def adapter(**fields: Any) -> CreateJob:
    return ours(adapter=fields)


def training(**fields: Any) -> CreateJob:
    return ours(training=fields)


def base(**facts: Any) -> BaseModelRef:
    return SMOLLM2.ref.model_copy(update={"facts": SMOLLM2.ref.facts.model_copy(update=facts)})


DPO: dict[str, Any] = {"method": {"type": "dpo"}}
KTO: dict[str, Any] = {"objective": {"type": "kto"}}
SUPERVISED_TWO = {"type": "supervised", "supervised": {"hyperparameters": {"n_epochs": 2}}}

REFUSED: list[tuple[str, CreateJob, str]] = [
    (
        "lora in 4 bits",
        ours(adapter={"method": "lora"}, quantization={"load_in_4bit": True}),
        "quantization.load_in_4bit",
    ),
    ("qlora in 16 bits", ours(adapter={"method": "qlora"}, quantization={"load_in_4bit": False}), "load_in_4bit"),
    ("full in 4 bits", ours(adapter={"method": "full"}, quantization={"load_in_4bit": True}), "load_in_4bit"),
    (
        "fp4 for lora",
        ours(adapter={"method": "lora"}, quantization={"bnb_4bit_quant_type": "fp4"}),
        "bnb_4bit_quant_type",
    ),
    ("rank for full", adapter(method="full", r=8), "adapter.r"),
    ("pissa in 4 bits", adapter(init_lora_weights="pissa"), "init_lora_weights"),
    ("olora in 4 bits", adapter(init_lora_weights="olora"), "init_lora_weights"),
    ("loftq in 16 bits", adapter(method="lora", init_lora_weights="loftq"), "init_lora_weights"),
    ("loftq scaled", adapter(init_lora_weights="loftq", r=8, lora_alpha=16), "init_lora_weights"),
    ("pissa for dora", adapter(method="dora", init_lora_weights="pissa"), "init_lora_weights"),
    ("eva for qdora", adapter(method="qdora", init_lora_weights="eva"), "init_lora_weights"),
    ("pissa too wide", adapter(method="lora", init_lora_weights="pissa", r=512), "adapter.r"),
    (
        "pissa with saved modules",
        adapter(method="lora", init_lora_weights="pissa", modules_to_save=["norm"]),
        "modules_to_save",
    ),
    ("biases in dpo", request(**DPO, tunepool={"adapter": {"bias": "all"}}), "adapter.bias"),
    (
        "two betas",
        request(
            method={"type": "dpo", "dpo": {"hyperparameters": {"beta": 0.2}}},
            tunepool={"objective": {"type": "dpo", "beta": 0.3}},
        ),
        "objective.beta",
    ),
    ("full dpo", request(**DPO, tunepool={"adapter": {"method": "full"}}), "adapter.method"),
    ("packed dpo", request(**DPO, tunepool={"training": {"packing": True}}), "training.packing"),
    ("reasoning masked in dpo", request(**DPO, tunepool={"training": {"mask_reasoning": True}}), "mask_reasoning"),
    ("reasoning masked where all is trained", training(mask_reasoning=True, train_on="all"), "mask_reasoning"),
    ("train_on in dpo", request(**DPO, tunepool={"training": {"train_on": "all"}}), "training.train_on"),
    ("full float16", ours(adapter={"method": "full"}, training={"dtype": "float16"}), "training.dtype"),
    ("dora sharded", ours(adapter={"method": "dora"}, placement={"strategy": "fsdp"}), "placement.strategy"),
    ("full sharded", ours(adapter={"method": "full"}, placement={"strategy": "fsdp"}), "placement.strategy"),
    ("unknown module", adapter(target_modules=["c_attn"]), "target_modules"),
    ("output layer", adapter(target_modules=["q_proj", "lm_head"]), "target_modules"),
    ("no module", adapter(target_modules=[]), "target_modules"),
    ("pattern of nothing", adapter(rank_pattern={"wqkv": 4}), "rank_pattern"),
    ("saved linear", adapter(modules_to_save=["q_proj"]), "modules_to_save"),
    ("tied embedding", adapter(modules_to_save=["embed_tokens"]), "modules_to_save"),
    ("layer beyond", adapter(layers_to_transform=[0, 30]), "layers_to_transform"),
    ("no layer", adapter(layers_to_transform=[]), "layers_to_transform"),
    ("layers of all-linear", adapter(layers_to_transform=[0], target_modules="all-linear"), "layers_to_transform"),
    ("longer than the base reads", training(max_length=8193), "training.max_length"),
    ("steps and epochs", training(max_steps=10, num_train_epochs=2), "training.max_steps"),
    (
        "steps and n_epochs",
        request(hyperparameters={"n_epochs": 2}, tunepool={"training": {"max_steps": 10}}),
        "max_steps",
    ),
    (
        "two epochs",
        request(hyperparameters={"n_epochs": 3}, method=SUPERVISED_TWO),
        "method.supervised.hyperparameters.n_epochs",
    ),
    ("two ranks", request(hyperparameters={"lora_r": 8}, tunepool={"adapter": {"r": 16}}), "tunepool.adapter.r"),
    (
        "rate and multiplier",
        request(hyperparameters={"learning_rate": 1e-4, "learning_rate_multiplier": 2.0}),
        "multiplier",
    ),
    (
        "lora flag",
        request(hyperparameters={"lora": False}, tunepool={"adapter": {"method": "qlora"}}),
        "hyperparameters.lora",
    ),
    ("two objectives", request(**DPO, tunepool=KTO), "tunepool.objective.type"),
    ("wrong method object", request(method={"type": "supervised", "dpo": {}}), "method.type"),
    ("single on two", ours(placement={"strategy": "single", "gpus": 2}), "placement.strategy"),
    ("ddp on one", ours(placement={"strategy": "ddp", "gpus": 1}), "placement.strategy"),
    ("single on several hosts", ours(placement={"strategy": "single", "nodes": 2}), "placement.strategy"),
    ("too many devices", ours(placement={"strategy": "ddp", "gpus": 64, "nodes": 8}), "placement.gpus"),
    ("batch not shared evenly", ours(placement={"gpus": 2}, training={"batch_size": 7}), "training.batch_size"),
    ("micro-batch not dividing", training(batch_size=8, per_device_train_batch_size=3), "per_device_train_batch_size"),
    ("kto alone", ours(**KTO, training={"batch_size": 1}), "training.batch_size"),
    ("early stopping blind", training(early_stopping={"patience": 2}), "training.early_stopping"),
    ("best of nothing", training(publish="best"), "training.publish"),
    ("answers of nothing", training(eval={"generate": {}}), "training.eval"),
    (
        "answers of a sharded model",
        request(
            validation_file="file-v",
            tunepool={"training": {"eval": {"generate": {}}}, "placement": {"strategy": "fsdp", "gpus": 2}},
        ),
        "training.eval.generate",
    ),
    (
        "best by what is not measured",
        request(
            validation_file="file-v",
            tunepool={"training": {"eval": {"generate": {"measures": ["contains"]}}, "publish": {"by": "numeric"}}},
        ),
        "training.publish.by",
    ),
]


@pytest.mark.parametrize(("job", "param"), [row[1:] for row in REFUSED], ids=[row[0] for row in REFUSED])
def test_a_contradiction_is_refused_at_submit_naming_field_value_and_remedy(job: CreateJob, param: str) -> None:
    with pytest.raises(Invalid) as refused:
        check_request(job, SMOLLM2.ref)
    error = refused.value
    assert error.param is not None
    assert param in error.param
    assert f"'{error.param}'" in error.message
    assert re.search(r"\b(use|drop|give|set|name|lower|raise|list|leave|target_modules)\b", error.message), (
        error.message
    )


FINE: list[CreateJob] = [
    request(),
    request(hyperparameters={"n_epochs": "auto", "batch_size": "auto", "learning_rate_multiplier": "auto"}),
    request(hyperparameters={"n_epochs": 2}, method=SUPERVISED_TWO),
    request(hyperparameters={"learning_rate": 1e-4, "learning_rate_multiplier": 1.0}),
    request(**DPO),
    ours(**KTO),
    ours(objective={"type": "dpo", "loss_type": "ipo"}),
    adapter(method="lora", init_lora_weights="pissa"),
    adapter(init_lora_weights="loftq"),
    adapter(init_lora_weights="eva"),
    adapter(layers_to_transform=[0, 29]),
    adapter(target_modules=["model.layers.0.self_attn.q_proj"]),
    ours(placement={"strategy": "ddp", "gpus": 2}),
    ours(placement={"strategy": "fsdp"}),
    ours(adapter={"method": "qlora"}, placement={"strategy": "fsdp"}, training={"optim": "paged_adamw_8bit"}),
    training(max_length=8192),
    training(max_steps=10),
]


@pytest.mark.parametrize("job", FINE)
def test_what_upstream_can_do_is_let_through(job: CreateJob) -> None:
    check_request(job, SMOLLM2.ref)


def test_an_unknown_architecture_leaves_module_names_to_the_trainer() -> None:
    check_request(adapter(target_modules=["in_proj"], modules_to_save=["thing"]), base(architecture="NewForCausalLM"))


def test_an_unknown_architecture_needs_module_names_to_select_layers() -> None:
    with pytest.raises(Invalid, match="list target_modules"):
        check_request(adapter(layers_to_transform=[0]), base(architecture="NewForCausalLM"))


@pytest.mark.parametrize(
    ("architecture", "name"),
    [
        ("LlamaForCausalLM", "down_proj"),
        ("MistralForCausalLM", "gate_proj"),
        ("QWenLMHeadModel", "c_attn"),
        ("Qwen2ForCausalLM", "up_proj"),
        ("Qwen3ForCausalLM", "o_proj"),
        ("PhiForCausalLM", "dense"),
        ("Phi3ForCausalLM", "qkv_proj"),
        ("GPTNeoXForCausalLM", "query_key_value"),
        ("GPT2LMHeadModel", "c_proj"),
        ("FalconForCausalLM", "dense_h_to_4h"),
        ("Gemma2ForCausalLM", "v_proj"),
    ],
)
def test_each_family_knows_its_module_names_and_refuses_anothers(architecture: str, name: str) -> None:
    check_request(adapter(target_modules=[name]), base(architecture=architecture))
    with pytest.raises(Invalid, match=re.escape(", ".join(FAMILIES[architecture].linear))):
        check_request(adapter(target_modules=["no_such_proj"]), base(architecture=architecture))


@pytest.mark.parametrize("refusal", UNSUPPORTED, ids=lambda refusal: " ".join(refusal.when))
def test_every_row_of_the_table_refuses_its_combination_and_only_with_all_of_it(refusal: Any) -> None:
    whole = {dimension: sorted(values)[0] for dimension, values in refusal.when.items()}
    with pytest.raises(Invalid):
        refuse_unsupported(whole)
    for dimension in whole:
        refuse_unsupported({name: value for name, value in whole.items() if name != dimension})


def test_the_table_of_methods_is_what_the_trainer_can_do() -> None:
    assert {name for name, method in METHODS.items() if method.quantized} == {"qlora", "qdora"}
    assert {name for name, method in METHODS.items() if not method.adapter} == {"full"}


def test_the_documentation_shows_every_method_and_every_refusal() -> None:
    page = (Path(__file__).parents[2] / "docs" / "methods.md").read_text(encoding="utf-8")
    for name, method in METHODS.items():
        assert f"| `{name}` | {method.summary} | {method.choose} | {method.costs} |" in page
    for name, objective in OBJECTIVES.items():
        assert re.search(
            rf"^\| {name} \| {re.escape(objective.asked)} \| .* \| {re.escape(objective.choose)} \|$", page, re.M
        )
    for refusal in UNSUPPORTED:
        assert f"| {refusal.reason} |" in page


def test_a_dpo_loss_is_chosen_under_our_key_and_beta_under_either() -> None:
    beta = {"type": "dpo", "dpo": {"hyperparameters": {"beta": 0.2}}}
    ipo = {"type": "dpo", "loss_type": "ipo"}

    assert wished_objective(ours(objective=ipo)) == Dpo(loss_type="ipo")
    assert wished_objective(request(method=beta, tunepool={"objective": ipo})) == Dpo(loss_type="ipo", beta=0.2)
    assert wished_objective(request(method=beta)) == Dpo(beta=0.2)
