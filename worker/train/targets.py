"""Which layers of a base an adapter works on: the linear ones of its language model, and its experts where asked.

Never the output layer (its loss is computed without an adapter), a router, or a part beside the language model, such as
a tower for images. PEFT's own `all-linear` knows only the first of these; and in families whose experts were single
layers once it reads the names of those layers as "adapt every expert" (`transformers_weight_conversion.py`, 0.21).
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Final

import torch
from bitsandbytes.nn.parametrize import Bnb4bitParametrization
from peft import LoraConfig
from peft.utils.transformers_weight_conversion import convert_peft_config_for_transformers

from shared.contract.families import HOW_TO_ADAPT_EXPERTS, NEVER_ADAPTED, frozen_experts
from shared.contract.methods import METHODS
from shared.contract.modules import last
from shared.contract.spec import Adapter, AttemptSpec
from shared.errors import Invalid
from worker.train.reporting import Reporter

_ROUTER: Final = re.compile(r"router|shared_expert_gate|(^|\.)gate$", re.IGNORECASE)
_PARAM: Final = "adapter.target_modules"


@dataclass(frozen=True)
class Targets:
    """PEFT's `target_modules`, `target_parameters` and `exclude_modules` of one adapter."""

    modules: str | list[str]
    parameters: list[str]
    excluded: str | None


def targets_of(model: Any, adapter: Adapter) -> Targets:
    """What of `model` the adapter works on.

    Raises:
        Invalid: experts are asked for and there are none, or a name may not be adapted.
    """
    linear, barred, parts = linear_modules(model), _barred(model), parts_beside(model)
    stacks = sorted({f"experts.{last(path)}" for path in expert_stacks(model)})
    if adapter.target_modules == "experts" and not stacks:
        raise Invalid(
            "The base model has no experts to adapt; use all-linear.", code="target_modules_not_found", param=_PARAM
        )
    if isinstance(adapter.target_modules, list):
        names: list[str] = adapter.target_modules
        _refuse_barred(names, barred)
    elif not stacks and not barred:
        return Targets("all-linear", [], None)
    else:
        names = sorted({last(path) for path in linear.keys() - barred.keys()})
    shared = [part for part in parts if any(_names(path, names) for path in linear if path.startswith(f"{part}."))]
    excluded = "|".join(rf"{re.escape(part)}\..*" for part in shared)
    return Targets(names, stacks if adapter.target_modules == "experts" else [], excluded or None)


def linear_modules(model: Any) -> dict[str, torch.nn.Module]:
    """Path → module of all linear layers but the output layer."""
    head = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None
    return {path: module for path, module in model.named_modules() if is_linear(module) and path and module is not head}


def adaptable(model: Any) -> set[str]:
    """Paths of the linear layers that all-linear adapts."""
    return linear_modules(model).keys() - _barred(model).keys()


def is_linear(module: torch.nn.Module) -> bool:
    """Whether PEFT adapts it as a linear layer."""
    # Conv1D: GPT-2's linear layer with transposed weights; 4-bit layers are subclasses of Linear.
    return isinstance(module, torch.nn.Linear) or type(module).__name__ == "Conv1D"


def expert_stacks(model: Any) -> dict[str, torch.Size]:
    """Path → shape of the stacks of experts: (experts, inputs, outputs) or (experts, outputs, inputs) each."""
    return {
        f"{path}.{name}": shape
        for path, module in model.named_modules()
        if last(path) == "experts"
        for name, shape in _shapes(module).items()
        if len(shape) == 3
    }


def _shapes(module: torch.nn.Module) -> dict[str, torch.Size]:
    """Of a module's own parameters; of those in 4 bits as they are when they are expanded."""
    plain = {name: parameter.shape for name, parameter in module.named_parameters(recurse=False)}
    packed: dict[str, torch.Size] = {}
    for name, chain in dict(getattr(module, "parametrizations", {})).items():
        if isinstance(chain[0], Bnb4bitParametrization):
            packed[name] = chain[0].quant_state.shape
    return plain | packed


def parts_beside(model: Any) -> list[str]:
    """Paths of what stands beside the language model, such as a tower for images and its projector."""
    decoder, head = model.get_decoder(), model.get_output_embeddings()
    if decoder is model:
        return []
    within, parts = set(decoder.modules()), list[str]()
    for path, module in model.named_modules():
        beside = module not in within and module is not head and decoder not in set(module.modules())
        if beside and next(module.parameters(), None) is not None and not _names_within(path, parts):
            parts.append(path)
    return parts


def _names_within(path: str, parts: Iterable[str]) -> bool:
    return any(path.startswith(f"{part}.") for part in parts)


def _barred(model: Any) -> dict[str, str]:
    """Path → why, of the linear layers that no adapter may have."""
    linear, parts = linear_modules(model), parts_beside(model)
    experts = _read_as_experts(model, {last(path) for path in linear})
    model_type = model.config.get_text_config().model_type
    barred: dict[str, str] = {}
    for path, module in linear.items():
        if _names_within(path, parts):
            barred[path] = "it stands beside the language model, which alone is trained"
        elif _ROUTER.search(last(path)) or "Router" in type(module).__name__:
            barred[path] = "it chooses the experts, and stays as it is"
        elif last(path) in experts:
            barred[path] = "PEFT reads this name as all experts of this base; to adapt those, use experts"
        elif last(path) in NEVER_ADAPTED.get(model_type, ()):
            barred[path] = f"PEFT adapts no layer of this name in {model_type}"
    return barred


def _read_as_experts(model: Any, names: set[str]) -> set[str]:
    """Those of the names that PEFT turns into names of expert tensors before it looks for modules."""
    asked = LoraConfig(target_modules=sorted(names))
    convert_peft_config_for_transformers(asked, model, conversions=None)
    return names - set(asked.target_modules or ())


def _refuse_barred(names: Iterable[str], barred: Mapping[str, str]) -> None:
    """A name is refused where it matches a layer that nobody may adapt; parts beside the model are left out instead."""
    for name in names:
        why = next((why for path, why in barred.items() if _names(path, [name]) and "beside" not in why), None)
        if why is not None:
            raise Invalid(f"{name} cannot be adapted: {why}.", code="unsupported_combination", param=_PARAM)


def _names(path: str, names: Iterable[str]) -> bool:
    return any(path == name or path.endswith(f".{name}") for name in names)


def say_what_stays_frozen(model: Any, spec: AttemptSpec, *, reporter: Reporter) -> None:
    """Tell the user of parts beside the language model, and of experts that no adapter works on."""
    parts, stacks = parts_beside(model), expert_stacks(model)
    if parts:
        reporter.say(f"Only the language model is trained; {', '.join(parts)} stay as they are.")
    adapter = spec.job.adapter
    if not stacks or not METHODS[adapter.method].adapter or adapter.target_modules == "experts":
        return
    values = sum(shape.numel() for shape in stacks.values())
    reporter.say(f"{frozen_experts(values)} {HOW_TO_ADAPT_EXPERTS}", level="warn")
