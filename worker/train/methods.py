"""Adapts the base model by the method of the job. The table of methods is in shared/contract/methods.py."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import bitsandbytes
import torch
from peft import EvaConfig, LoraConfig, get_peft_model
from peft.optimizers import create_loraplus_optimizer
from transformers import Trainer, set_seed

from shared.contract.methods import METHODS, Dimension, MethodFacts, first_refusal
from shared.contract.spec import Adapter, AttemptSpec
from shared.errors import Invalid
from worker.train.data import Row
from worker.train.fused_lora import FusedLinear4bit, JoinedLinear4bit, KeptLinear4bit
from worker.train.initialisation import finish, pissa_by_upstreams_name
from worker.train.parent_adapter import begins_as, continue_adapter, put_beneath, stands_on
from worker.train.targets import Targets, is_linear, parts_beside, targets_of

# LoftQ is applied afterwards; the others keep their name.
_UPSTREAM_INITS: dict[str, Any] = {"default": True, "loftq": True}


def adapt(model: Any, *, spec: AttemptSpec, initial: Path | None, rows: Sequence[Row]) -> Any:
    """Wrap `model` for training by the job's method; the same seed gives the same adapter.

    Args:
        initial: where the untouched adapter of a mutating initialisation is kept for the conversion at the end;
            None for a rank that writes nothing.
        rows: the training rows, whose activations EVA looks at.

    Raises:
        Invalid: `target_modules_not_found`, `modules_not_found`, `layers_not_found`, `unsupported_combination`,
            `parent_does_not_fit`, `parent_not_plain`.
    """
    adapter, method = spec.job.adapter, METHODS[spec.job.adapter.method]
    combination: dict[Dimension, str] = {
        "method": adapter.method,
        "objective": spec.job.objective.type,
        "init": adapter.init_lora_weights,
    }
    assert first_refusal(combination) is None, f"refused at submit: {combination}"
    set_seed(spec.job.seed)
    if not method.adapter:
        return _trained_in_full(model)
    check_modules(model, adapter)
    # EVA fills the adapter afterwards; until then PEFT wants it without memory.
    without_memory = adapter.init_lora_weights == "eva"
    config = lora_config(adapter, method=method, targets=targets_of(model, adapter))
    if adapter.init_lora_weights == "pissa":
        config.init_lora_weights = pissa_by_upstreams_name(model, adapter)
    if method.quantized and spec.job.placement.strategy != "fsdp" and "fused_lora" not in spec.without:
        kept = KeptLinear4bit if "joined_products" in spec.without else JoinedLinear4bit
        layer = kept if spec.keep_dequantized else FusedLinear4bit
        config._register_custom_module({bitsandbytes.nn.Linear4bit: layer})  # PEFT's door for layers of one's own
    if (beneath := stands_on(spec)) is not None:
        put_beneath(model, beneath)
    adapted = get_peft_model(model, config, low_cpu_mem_usage=without_memory)
    if (start := begins_as(spec)) is not None:
        continue_adapter(adapted, start)
    finish(adapted, adapter, base=Path(spec.base_model_path), initial=initial, rows=rows)
    return adapted


def _trained_in_full(model: Any) -> Any:
    model.requires_grad_(requires_grad=True)
    for part in parts_beside(model):
        model.get_submodule(part).requires_grad_(requires_grad=False)
    return model


def lora_config(adapter: Adapter, *, method: MethodFacts, targets: Targets) -> LoraConfig:
    """The spec's adapter under PEFT's names."""
    init = adapter.init_lora_weights
    return LoraConfig(
        task_type="CAUSAL_LM",
        r=adapter.r,
        lora_alpha=adapter.lora_alpha,
        lora_dropout=adapter.lora_dropout,
        target_modules=targets.modules,
        target_parameters=targets.parameters or None,
        exclude_modules=targets.excluded,
        bias=adapter.bias,
        use_rslora=adapter.use_rslora,
        use_dora=method.magnitude,
        init_lora_weights=_UPSTREAM_INITS.get(init, init),
        # rho 1: every module keeps the rank that was asked for, so the adapter's size is known beforehand.
        eva_config=EvaConfig(rho=1.0) if init == "eva" else None,
        rank_pattern=_suffix_patterns(adapter.rank_pattern),
        alpha_pattern=_suffix_patterns(adapter.alpha_pattern),
        layers_to_transform=adapter.layers_to_transform,
        modules_to_save=adapter.modules_to_save,
    )


def _suffix_patterns(pattern: dict[str, int]) -> dict[str, int]:
    """PEFT reads keys as regular expressions; ours are names, so a dot means a dot."""
    return {re.escape(name): value for name, value in pattern.items()}


def check_modules(model: torch.nn.Module, adapter: Adapter) -> None:
    """Refuse names that match nothing, and say which exist."""
    adaptable = {name for name, module in model.named_modules() if is_linear(module)}
    if isinstance(adapter.target_modules, list):
        _require(
            adapter.target_modules, among=adaptable, param="adapter.target_modules", code="target_modules_not_found"
        )
        _refuse_head(model, adapter.target_modules)
    named = {name for name, _ in model.named_modules() if name}
    _require(adapter.modules_to_save or [], among=named, param="adapter.modules_to_save", code="modules_not_found")
    for field in ("rank_pattern", "alpha_pattern"):
        _require(getattr(adapter, field), among=adaptable, param=f"adapter.{field}", code="modules_not_found")
    layers = model.config.get_text_config().num_hidden_layers
    beyond = [layer for layer in adapter.layers_to_transform or [] if layer >= layers]
    if beyond:
        message = f"The base model has layers 0 to {layers - 1}; there is no layer {beyond[0]}."
        raise Invalid(message, code="layers_not_found", param="adapter.layers_to_transform")


def _require(names: Iterable[str], *, among: set[str], param: str, code: str) -> None:
    for name in names:
        if not any(candidate == name or candidate.endswith(f".{name}") for candidate in among):
            existing = ", ".join(sorted({candidate.rsplit(".", 1)[-1] for candidate in among}))
            raise Invalid(
                f"No module of the base model is named {name}; there are: {existing}.", code=code, param=param
            )


def _refuse_head(model: Any, names: Sequence[str]) -> None:
    head = next((name for name, module in model.named_modules() if module is model.get_output_embeddings()), None)
    if head is not None and any(head == name or head.endswith(f".{name}") for name in names):
        raise Invalid(
            f"{head} is the output layer; its loss is computed without an adapter. Name it in modules_to_save instead.",
            code="unsupported_combination",
            param="adapter.target_modules",
        )


def make_optimizer(trainer: Trainer, adapter: Adapter) -> torch.optim.Optimizer:
    """Upstream's optimizer by its name; with LoRA+ the B matrices learn faster (arXiv 2402.12354)."""
    if adapter.loraplus_lr_ratio is None:
        return trainer.create_optimizer()
    kind, options = trainer.get_optimizer_cls_and_kwargs(trainer.args, trainer.model)
    trainer.optimizer = create_loraplus_optimizer(
        trainer.model,
        kind,
        loraplus_lr_ratio=adapter.loraplus_lr_ratio,
        loraplus_weight_decay=trainer.args.weight_decay,
        **options,
    )
    return trainer.optimizer


def trainable(model: torch.nn.Module) -> dict[str, torch.nn.Parameter]:
    """Name → parameter of everything that learns."""
    return {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}


def with_float32_adapters(model: Any, build: Callable[[], Any]) -> Any:
    """Run `build` (a TRL trainer's constructor) and undo its rounding of quantised models' adapters to bfloat16.

    The copy that a preference objective refers to, where there is one, gets the same values.

    The adapter is the only thing that learns: float32 keeps small updates, makes a saved checkpoint exact, and is
    far faster on CPUs without bfloat16 arithmetic. Under autocast the products are bfloat16 all the same.
    """
    exact = {name: parameter.data.float() for name, parameter in trainable(model).items()}
    built = build()
    every = dict(model.named_parameters())
    for name, values in exact.items():
        every[name].data = values
        copy = every.get(name.replace(".default.", ".ref.")) if ".default." in name else None
        if copy is not None:
            copy.data = values.clone()
    return built
