"""The contradictions of a request that are refused at submit, before anything is stored.

Pure: no data, no device, no storage. What survives `check_request` is settled by `shared/settle/resolve.py`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Final

from shared.contract.job_request import CreateJob, chosen
from shared.contract.methods import METHODS, Dimension, method_for, refuse_unsupported, with_other_weights
from shared.contract.modules import HEADS, last
from shared.contract.objectives import OBJECTIVES
from shared.contract.parent_model import ParentModel
from shared.contract.part import Part
from shared.contract.spec import BaseModelRef, GeneratedAnswers, PublishBy
from shared.settle import base_refusals, going_on
from shared.settle.wishes import (
    HYPERPARAMETER_FIELDS,
    PARTS,
    FlatRequest,
    hyperparameter_sources,
    hyperparameters,
    refuse,
    shown,
    wished_world,
    wishes_beside,
)

MAX_DEVICES: Final = 256  # every device needs a row of each step, and a step has at most 256


def check_request(request: CreateJob, base: BaseModelRef, parent: ParentModel | None = None) -> None:
    """Refuse, before anything is stored, every contradiction that is visible without data and device.

    `parent`: the tuned model that the job goes on from. What it inherits is checked as if it had been asked for.

    Raises:
        Invalid: names the wire field, its value and the remedy.
    """
    given = hyperparameters(request)
    wished = wishes_beside(given, request.tunepool)
    going_on.check(request, wished, parent)
    if parent is not None:
        wished = going_on.inherited(wished, parent) | wished
    asked = FlatRequest(request, facts=base.facts, base_name=base.name, given=given, wished=wished)
    for check in _CHECKS:
        check(asked)
    refuse_unsupported(_combination(asked))


def _combination(asked: FlatRequest) -> dict[Dimension, str]:
    return {
        "method": asked.method,
        "objective": asked.objective,
        "strategy": asked.get("placement.strategy", "auto"),
        "init": asked.get("adapter.init_lora_weights", "default"),
        "optim": asked.get("training.optim", "auto"),
        "dtype": asked.get("training.dtype", "auto"),
        "bias": asked.get("adapter.bias", "none"),
        "packing": str(asked.get("training.packing", "auto")).lower(),
        "rslora": str(asked.get("adapter.use_rslora", False)).lower(),
        "patterns": str(bool(asked.get("adapter.rank_pattern") or asked.get("adapter.alpha_pattern"))).lower(),
        "saved": str(bool(asked.get("adapter.modules_to_save"))).lower(),
        "packed_experts": str(asked.get("quantization.load_experts_in_4bit", False)).lower(),
        "experts": str(asked.get("adapter.target_modules") == "experts").lower(),
        "dropout": str(bool(asked.get("adapter.lora_dropout"))).lower(),
        "layers": str(asked.get("adapter.layers_to_transform") is not None).lower(),
        "generate": str(_generated(asked) is not None).lower(),
    }


def _check_objective(asked: FlatRequest) -> None:
    method, objective = asked.request.method, asked.request.tunepool.objective
    if method is None:
        return
    named: str | None = None if objective is None else objective.type
    if objective is not None and named != method.type:
        refuse("tunepool.objective.type", objective.type, f"method.type is {method.type}; give one of the two")
    if objective is not None:
        _check_numbers(asked, objective)
    for other in method.given().keys() - {method.type}:
        refuse("method.type", method.type, f"there is a method.{other} object; drop it, or set method.type to {other}")


def _check_numbers(asked: FlatRequest, objective: Part) -> None:
    """What `method` and `tunepool.objective` both say must be the same."""
    for name, value in chosen(objective).items():
        path, other = asked.given.get(name, ("", value))
        if other != value:
            refuse(f"tunepool.objective.{name}", value, f"'{path}' says {other}; give it in one place")


def _check_one_source(asked: FlatRequest) -> None:
    """The deprecated top-level `hyperparameters` and `method`'s may not disagree, nor either with `tunepool`."""
    seen: dict[str, tuple[str, Any]] = {}
    for path, source in hyperparameter_sources(asked.request):
        for key, value in chosen(source).items():
            _refuse_second_value(seen, field=HYPERPARAMETER_FIELDS.get(key, key), path=f"{path}.{key}", value=value)
    for part in PARTS:
        for name, value in chosen(getattr(asked.request.tunepool, part)).items():
            _refuse_second_value(seen, field=f"{part}.{name}", path=f"tunepool.{part}.{name}", value=value)


def _refuse_second_value(seen: dict[str, tuple[str, Any]], *, field: str, path: str, value: Any) -> None:
    first_path, first = seen.setdefault(field, (path, value))
    if first != value:
        refuse(path, value, f"'{first_path}' says {shown(first)}; give it in one place")


def _check_columns(asked: FlatRequest) -> None:
    """Two of our names for one column of the file would write it twice."""
    named: dict[str, str] = {}
    for name, column in (asked.get("training.columns") or {}).items():
        if column in named:
            why = f"{named[column]} and {name} would both be {column}; give each column of the file one name"
            refuse(f"tunepool.training.columns.{name}", column, why)
        named[column] = name


def _check_learning_rate(asked: FlatRequest) -> None:
    path, multiplier = asked.given.get("learning_rate_multiplier", ("", 1.0))
    if multiplier != 1.0 and "training.learning_rate" in asked.wished:
        rate = asked.wished["training.learning_rate"]
        refuse(
            path, multiplier, f"it scales the automatic learning rate and learning_rate is given as {rate}; drop one"
        )


def _check_length_of_run(asked: FlatRequest) -> None:
    epochs, steps = asked.get("training.num_train_epochs"), asked.get("training.max_steps")
    if epochs is not None and steps is not None:
        refuse("tunepool.training.max_steps", steps, f"the number of epochs is given as {epochs} too; drop one of them")


def _check_lora_flag(asked: FlatRequest) -> None:
    path, lora = asked.given.get("lora", ("", None))
    method = chosen(asked.request.tunepool.adapter).get("method")
    if lora is not None and method is not None and lora != METHODS[method].adapter:
        refuse(path, lora, f"'tunepool.adapter.method' says {method}; drop one of them")


def _check_quantization(asked: FlatRequest) -> None:
    method, four_bit = asked.method, asked.get("quantization.load_in_4bit")
    quantized = METHODS[method].quantized
    if four_bit is not None and four_bit != quantized:
        remedy = f"use method {with_other_weights(method) or method_for(load_in_4bit=True)}"
        stores = "4 bits" if quantized else "16 bits"
        refuse("tunepool.quantization.load_in_4bit", four_bit, f"method {method} keeps its base in {stores}; {remedy}")
    for name, value in chosen(asked.request.tunepool.quantization).items():
        if name not in {"load_in_4bit", "dequantize"} and not quantized:
            why = f"method {method} does not quantise its base; drop it, or use method qlora"
            refuse(f"tunepool.quantization.{name}", value, why)


def _check_full(asked: FlatRequest) -> None:
    """Nothing of an adapter may be asked for where there is none."""
    if METHODS[asked.method].adapter:
        return
    for name, value in asked.wished.items():
        if name.startswith("adapter.") and name not in ("adapter.method", going_on.INIT_FROM):
            refuse(
                f"tunepool.{name}",
                value,
                "method full trains every weight and has no adapter; drop it, or use method lora",
            )


def _check_initialisation(asked: FlatRequest) -> None:
    init, r = asked.get("adapter.init_lora_weights", "default"), asked.get("adapter.r", 16)
    if init == "loftq" and (asked.get("adapter.lora_alpha", r) != r or asked.get("adapter.use_rslora")):
        refuse(
            "tunepool.adapter.init_lora_weights", init, "LoftQ holds for lora_alpha = r without use_rslora; set them so"
        )
    narrowest = min(asked.facts.hidden_size, asked.facts.num_key_value_heads * asked.facts.head_dim)
    if init in ("pissa", "olora", "eva", "loftq") and r > narrowest:
        refuse("tunepool.adapter.r", r, f"{init} takes at most {narrowest} directions from this base; lower r to that")


def _check_module_names(asked: FlatRequest) -> None:
    targets = asked.get("adapter.target_modules", "all-linear")
    if isinstance(targets, list):
        if not targets:
            refuse(
                "tunepool.adapter.target_modules",
                "[]",
                "an adapter needs modules to adapt; name some, or use all-linear",
            )
        _check_linear_names(asked, targets, param="tunepool.adapter.target_modules")
    for pattern in ("rank_pattern", "alpha_pattern"):
        _check_linear_names(asked, list(asked.get(f"adapter.{pattern}", {})), param=f"tunepool.adapter.{pattern}")


def _check_linear_names(asked: FlatRequest, names: list[str], *, param: str) -> None:
    for name in names:
        if last(name) in HEADS:
            refuse(
                param,
                name,
                "the output layer's loss is computed without an adapter; name it in modules_to_save instead",
            )
        if asked.family is not None and last(name) not in asked.family.linear:
            there = ", ".join(asked.family.linear)
            refuse(param, name, f"{asked.facts.architecture} has no linear module of that name; there are {there}")


def _check_modules_to_save(asked: FlatRequest) -> None:
    param = "tunepool.adapter.modules_to_save"
    family = asked.family
    for name in asked.get("adapter.modules_to_save") or ():
        if family is None:
            continue
        there = (family.embedding, family.head, *family.norms)
        if last(name) not in there:
            refuse(
                param,
                name,
                f"{asked.facts.architecture} can train {', '.join(there)} whole; linear modules go to target_modules",
            )
        if asked.facts.tie_word_embeddings and last(name) in (family.embedding, family.head):
            refuse(
                param,
                name,
                "this base uses one matrix for input and output, and a copy of it could not be merged; drop it",
            )


def _check_layers(asked: FlatRequest) -> None:
    param, layers = "tunepool.adapter.layers_to_transform", asked.get("adapter.layers_to_transform")
    if layers is None:
        return
    deepest = asked.facts.num_hidden_layers - 1
    if not layers:
        refuse(param, "[]", "an adapter needs layers; name some, or drop it for all")
    if max(layers) > deepest:
        refuse(param, max(layers), f"{asked.base_name} has layers 0 to {deepest}; name those")
    if asked.get("adapter.target_modules") == "all-linear" or (
        asked.family is None and "adapter.target_modules" not in asked.wished
    ):
        refuse(param, layers, "PEFT selects layers only for modules given by name; list target_modules")


def _check_lengths(asked: FlatRequest) -> None:
    length, longest = asked.get("training.max_length"), asked.facts.max_position_embeddings
    if length is not None and length > longest:
        refuse(
            "tunepool.training.max_length",
            length,
            f"{asked.base_name} reads at most {longest} tokens; use {longest} or less",
        )


def _check_packing(asked: FlatRequest) -> None:
    carries = asked.facts.carries_state
    if carries is not None and asked.get("training.packing") is True:
        path, _value = asked.given.get("packing", ("tunepool.training.packing", True))
        why = f"packed rows would leak into each other through the {carries} layers of {asked.base_name}"
        refuse(path, value=True, why=f"{why}; use packing false, or leave it out")


def _check_placement(asked: FlatRequest) -> None:
    gpus, nodes = asked.get("placement.gpus"), asked.get("placement.nodes")
    strategy, world = asked.get("placement.strategy"), (gpus or 1) * (nodes or 1)
    if world > MAX_DEVICES:
        refuse(
            "tunepool.placement.gpus",
            gpus,
            f"{world} devices are too many: a step has at most {MAX_DEVICES} rows; use fewer",
        )
    if strategy == "single" and world > 1:
        refuse(
            "tunepool.placement.strategy",
            strategy,
            f"{world} devices are asked for; use ddp or fsdp, or gpus 1 and nodes 1",
        )
    if strategy in ("ddp", "fsdp") and gpus is not None and world == 1:
        refuse("tunepool.placement.strategy", strategy, "one device is asked for; raise gpus or nodes, or use single")


def _check_batch(asked: FlatRequest) -> None:
    world, objective = wished_world(asked.wished), asked.objective
    batch, micro = asked.get("training.batch_size"), asked.get("training.per_device_train_batch_size")
    if batch is not None and batch % world:
        refuse("tunepool.training.batch_size", batch, f"{world} devices share each step; use a multiple of {world}")
    if batch is not None and micro is not None and batch % (micro * world):
        why = f"each device's {batch // world} rows of a step do not divide by it; use a divisor of {batch // world}"
        refuse("tunepool.training.per_device_train_batch_size", micro, why)
    facts = OBJECTIVES[objective]
    if batch is not None and batch < facts.least_batch:
        why = f"{objective} {facts.batch_reason}; use {facts.least_batch} or more"
        refuse("tunepool.training.batch_size", batch, why)


def _check_recomputing(asked: FlatRequest) -> None:
    layers, every = asked.get("training.gradient_checkpointing_layers"), asked.facts.num_hidden_layers
    if layers is None:
        return
    param = "tunepool.training.gradient_checkpointing_layers"
    if asked.get("training.gradient_checkpointing") is False:
        refuse(param, layers, "gradient_checkpointing is false; set it to true, or drop the number")
    if layers > every:
        refuse(param, layers, f"{asked.base_name} has {every} layers; leave it out to recompute all")


def _check_validation(asked: FlatRequest) -> None:
    if asked.request.validation_file is not None:
        return
    for name, idle in (("eval", None), ("early_stopping", None), ("publish", "last")):
        value = asked.get(f"training.{name}")
        if value is not None and value != idle:
            refuse(
                f"tunepool.training.{name}", value, "there is no validation_file to measure on; give one, or drop it"
            )


def _generated(asked: FlatRequest) -> GeneratedAnswers | None:
    evaluation = asked.get("training.eval")
    return None if evaluation is None else evaluation.generate


def _check_publish(asked: FlatRequest) -> None:
    publish, generated = asked.get("training.publish"), _generated(asked)
    if isinstance(publish, PublishBy) and (generated is None or publish.by not in generated.measures):
        why = "no answers are measured by it; name it in tunepool.training.eval.generate.measures"
        refuse("tunepool.training.publish.by", publish.by, why)


def _check_train_on(asked: FlatRequest) -> None:
    objective, train_on = asked.objective, asked.get("training.train_on")
    if not OBJECTIVES[objective].may_pack and train_on is not None:
        refuse("tunepool.training.train_on", train_on, f"{objective} compares whole answers; drop it")
    masks = asked.get("training.mask_reasoning")
    if masks:
        if not OBJECTIVES[objective].may_pack:
            refuse("tunepool.training.mask_reasoning", masks, f"{objective} compares whole answers; drop it")
        if train_on == "all":
            refuse(
                "tunepool.training.mask_reasoning", masks, "train_on all trains every token; set train_on to assistant"
            )


_CHECKS: Final[tuple[Callable[[FlatRequest], None], ...]] = (
    _check_objective,
    _check_one_source,
    _check_columns,
    _check_learning_rate,
    _check_length_of_run,
    _check_lora_flag,
    _check_quantization,
    base_refusals.check_class,
    base_refusals.check_stored_weights,
    base_refusals.check_four_bits,
    base_refusals.check_float16,
    base_refusals.check_experts,
    base_refusals.check_packed_experts,
    _check_full,
    _check_initialisation,
    _check_module_names,
    _check_modules_to_save,
    _check_layers,
    _check_lengths,
    _check_packing,
    _check_placement,
    _check_batch,
    _check_recomputing,
    _check_validation,
    _check_publish,
    _check_train_on,
)
