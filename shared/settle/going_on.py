"""A job whose `model` is a tuned one: where it starts, what it takes over from there, and what is refused. Pure."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final

from shared.contract.job_request import CreateJob, TunepoolRequest
from shared.contract.methods import METHODS, with_other_weights
from shared.contract.objectives import OBJECTIVES
from shared.contract.parent_model import ParentModel
from shared.contract.published import MUTATING, largest_rank, published_shape
from shared.contract.spec import AUTO, Adapter, BaseModelRef, InitFrom, MethodName, Parent
from shared.errors import Conflict, NotFound
from shared.settle.wishes import objective_name, refuse, shown

INIT_FROM: Final = "adapter.init_from"
_PARAM: Final = f"tunepool.{INIT_FROM}"
# What the weights of an adapter decide, so that one which trains on keeps it.
SHAPE: Final = (
    "r",
    "lora_alpha",
    "use_rslora",
    "target_modules",
    "layers_to_transform",
    "bias",
    "rank_pattern",
    "alpha_pattern",
    "modules_to_save",
)
# What a new adapter on top shares with the one below: both are published as one.
PLACES: Final = ("target_modules", "layers_to_transform")


def marked(request: CreateJob) -> CreateJob:
    """The request of a job with a parent, as it is kept: an older version must not take its base for its start."""
    ours = request.tunepool
    adapter = {} if ours.adapter is None else ours.adapter.model_dump(exclude_unset=True)
    parts = ours.model_dump(exclude_unset=True) | {"adapter": {"init_from": AUTO, **adapter}}
    return request.model_copy(update={"tunepool": TunepoolRequest.model_validate(parts)})


def is_marked(request: CreateJob) -> bool:
    """Whether the job has a parent."""
    adapter = request.tunepool.adapter
    return adapter is not None and "init_from" in adapter.model_fields_set


def parent_gone(name: str) -> NotFound:
    return NotFound(
        f"The tuned model '{name[:200]}' that this job goes on from is not there any more, or not for this project. "
        "Submit the job again with another model.",
        param="model",
        code="parent_gone",
    )


def must_stand_on(parent: ParentModel, base: BaseModelRef | None) -> BaseModelRef:
    """The base that the parent was trained on. Raises Conflict when the catalogue has it no more, or another one."""
    trained_on = parent.spec.base_model
    if base is None:
        raise Conflict(
            f"'{parent.name}' was trained on '{trained_on.name}', which this installation has no more. An "
            f"administrator adds it again: {trained_on.public_name}, revision {trained_on.revision}.",
            param="model",
            code="base_model_gone",
        )
    if base.revision != trained_on.revision:
        raise Conflict(
            f"'{parent.name}' was trained on revision {trained_on.revision} of '{trained_on.name}'; this installation "
            f"has revision {base.revision} now. An administrator adds the earlier one under a name of its own.",
            param="model",
            code="base_model_changed",
        )
    return base


def init_from(wished: Mapping[str, Any], parent: ParentModel) -> tuple[InitFrom, str]:
    """How a job begins that does not say, and why."""
    if not METHODS[parent.spec.adapter.method].adapter:
        return "continue", f"{parent.name} is a whole model: all its weights train on"
    asked = wished.get("adapter.method")
    if asked is not None and not METHODS[asked].adapter:
        return "merged", f"every weight trains, beginning with the adapter of {parent.name} in its base"
    return "continue", f"the adapter of {parent.name} trains on, and stays as small as it is"


def beginning(wished: Mapping[str, Any], parent: ParentModel) -> InitFrom:
    chosen: InitFrom = wished.get(INIT_FROM) or init_from(wished, parent)[0]
    return chosen


def method_of(wished: Mapping[str, Any], parent: ParentModel) -> MethodName:
    """The parent's, on weights of the precision that is asked for."""
    if "adapter.method" in wished:
        asked: MethodName = wished["adapter.method"]
        return asked
    method, four_bit = parent.spec.adapter.method, wished.get("quantization.load_in_4bit")
    if four_bit is not None and four_bit != METHODS[method].quantized:
        return with_other_weights(method) or method
    return method


def inherited(wished: Mapping[str, Any], parent: ParentModel) -> dict[str, Any]:
    """Field -> value that the job takes over where it asks for nothing."""
    spec, method, begins = parent.spec, method_of(wished, parent), beginning(wished, parent)
    values: dict[str, Any] = {
        "adapter.method": method,
        "quantization.dequantize": spec.quantization.dequantize,
        "training.chat_template": spec.training.chat_template,
        "training.system_prompt": spec.training.system_prompt,
    }
    if METHODS[method].quantized and METHODS[spec.adapter.method].quantized:
        values["quantization.bnb_4bit_quant_type"] = spec.quantization.bnb_4bit_quant_type
        values["quantization.load_experts_in_4bit"] = spec.quantization.load_experts_in_4bit
        values["quantization.bnb_4bit_use_double_quant"] = spec.quantization.bnb_4bit_use_double_quant
    if METHODS[method].adapter and METHODS[spec.adapter.method].adapter:
        shape = published_shape(spec)
        values |= {f"adapter.{name}": getattr(shape, name) for name in (SHAPE if begins == "continue" else PLACES)}
        if begins == "continue":
            values["adapter.init_lora_weights"] = "default"
    return {name: value for name, value in values.items() if name not in wished}


def as_parent(parent: ParentModel, begins: InitFrom) -> Parent:
    """What the job's spec says of it."""
    shape = published_shape(parent.spec)
    return Parent(
        id=parent.id,
        name=parent.name,
        job_id=parent.job_id,
        init_from=begins,
        method=shape.method,
        rank=largest_rank(shape) if METHODS[shape.method].adapter else 0,
        files=list(parent.files),
    )


# --- what cannot be -------------------------------------------------------------------------------------------------


def check(request: CreateJob, wished: Mapping[str, Any], parent: ParentModel | None) -> None:
    """Raises Invalid where the request contradicts the tuned model that the job goes on from."""
    if parent is None:
        if INIT_FROM in wished:
            refuse(_PARAM, wished[INIT_FROM], "model names a base model; name a tuned one (ft:…), or drop it")
        return
    method, begins = method_of(wished, parent), beginning(wished, parent)
    if not METHODS[parent.spec.adapter.method].adapter:
        _check_whole(wished, parent, method)
    elif not METHODS[method].adapter:
        if begins == "continue":
            refuse(_PARAM, begins, "method full trains every weight and no adapter; use merged, or leave it out")
    elif begins == "continue":
        _check_continued(wished, parent, method)
        _check_reference(request, wished, parent)
    else:
        _check_merged(wished, parent, method)


def _check_whole(wished: Mapping[str, Any], parent: ParentModel, method: MethodName) -> None:
    if METHODS[method].adapter:
        why = f"{parent.name} is a whole model, and its adapter would fit no base model; use full, or leave it out"
        refuse("tunepool.adapter.method", method, why)
    if wished.get(INIT_FROM) == "merged":
        refuse(_PARAM, "merged", f"{parent.name} is a whole model; use continue, or leave it out")


def _check_continued(wished: Mapping[str, Any], parent: ParentModel, method: MethodName) -> None:
    shape = published_shape(parent.spec)
    on_top = "leave it out, or train a new adapter on top of it with tunepool.adapter.init_from merged"
    if METHODS[method].magnitude != METHODS[shape.method].magnitude:
        why = f"the adapter of {parent.name} is of method {shape.method}"
        refuse("tunepool.adapter.method", method, f"{why}; leave it out")
    _must_agree(wished, shape, SHAPE, why=f"the adapter of {parent.name} has {{value}}; {on_top}")
    if wished.get("adapter.init_lora_weights", "default") != "default":
        why = f"the weights of {parent.name} are the start; drop it"
        refuse("tunepool.adapter.init_lora_weights", wished["adapter.init_lora_weights"], why)
    if (
        parent.spec.adapter.init_lora_weights in MUTATING
        and parent.spec.adapter.use_rslora
        and parent.spec.parent is None
    ):
        why = f"the scale that {parent.name} is published with is no whole number; use merged"
        refuse(_PARAM, "continue", why)


def _check_reference(request: CreateJob, wished: Mapping[str, Any], parent: ParentModel) -> None:
    """A copy of the adapter is what the objective refers to."""
    objective = objective_name(request)
    if not OBJECTIVES[objective].needs_reference:
        return
    if wished.get("placement.strategy") == "fsdp":
        why = f"{objective} refers to a second copy of the adapter, which fsdp does not spread"
        refuse("tunepool.placement.strategy", "fsdp", f"{why}; use ddp, or tunepool.adapter.init_from merged")
    if published_shape(parent.spec).target_modules == "experts":
        why = f"{objective} refers to a second copy of the adapter, and expert tensors have place for one"
        refuse("model", parent.name, f"{why}; use another objective")


def _check_merged(wished: Mapping[str, Any], parent: ParentModel, method: MethodName) -> None:
    below = published_shape(parent.spec)
    odd, no_sum = _more_than_matrices(below), "which no sum of adapters keeps"
    if odd is not None:
        refuse(_PARAM, "merged", f"the adapter of {parent.name} has {odd}, {no_sum}; use continue")
    asked = {
        "method": method,
        "bias": wished.get("adapter.bias", "none"),
        "modules_to_save": wished.get("adapter.modules_to_save"),
    }
    odd = _more_than_matrices(below.model_copy(update=asked))
    if odd is not None:
        refuse(_PARAM, "merged", f"the new adapter would have {odd}, {no_sum}; drop it, or use continue")
    why = "both are published as one adapter; leave it out"
    _must_agree(wished, below, PLACES, why=f"the adapter of {parent.name} has {{value}}, and {why}")
    start = wished.get("adapter.init_lora_weights")
    if start in (*MUTATING, "loftq"):
        why = f"this start changes what {parent.name} answers before the first step; use default, gaussian or eva"
        refuse("tunepool.adapter.init_lora_weights", start, why)


def _more_than_matrices(adapter: Adapter) -> str | None:
    """What an adapter has beside A and B of linear layers."""
    if METHODS[adapter.method].magnitude:
        return "DoRA's magnitudes"
    if adapter.bias != "none":
        return "trained biases"
    if adapter.modules_to_save:
        return "modules that train whole"
    return "adapted expert tensors" if adapter.target_modules == "experts" else None


def _must_agree(wished: Mapping[str, Any], shape: Adapter, names: tuple[str, ...], *, why: str) -> None:
    for name in names:
        value, theirs = wished.get(f"adapter.{name}"), getattr(shape, name)
        if f"adapter.{name}" in wished and _comparable(value) != _comparable(theirs):
            refuse(f"tunepool.adapter.{name}", value, why.format(value=shown(theirs)))


def _comparable(value: Any) -> Any:
    """Names of modules and layers in no order; nothing named is nothing."""
    if isinstance(value, list):
        return frozenset(value) or None
    return value or None if isinstance(value, dict) else value
