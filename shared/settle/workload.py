"""The workload of one device: the few numbers of a resolved job that decide its memory. Pure."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from shared.contract.base_facts import ModelFacts
from shared.contract.families import FAMILIES, USUAL, Family
from shared.contract.methods import METHODS
from shared.contract.modules import last
from shared.contract.objectives import OBJECTIVES
from shared.contract.passes import KEPT_SHARE, PACKED_TOKENS, is_packed
from shared.contract.spec import DeviceKind, Dtype, JobSpec, MethodName

BYTES: dict[Dtype, int] = {"float32": 4, "bfloat16": 2, "float16": 2}


CHARACTERS_PER_TOKEN = 3.5  # mean over English chat rows; for sizes that may be a little wrong
SAFE_CHARACTERS_PER_TOKEN = 2.5  # for the longest row: cutting rows is worse than reserving room
TEMPLATE_TOKENS = 64  # roles, turn marks and a default system prompt around a row


def row_tokens(characters: float, *, per_token: float = SAFE_CHARACTERS_PER_TOKEN) -> int:
    """About how many tokens a row of so many characters has, template included."""
    return math.ceil(characters / per_token) + TEMPLATE_TOKENS


@dataclass(frozen=True)
class Workload:
    """What runs on one device.

    Attributes:
        micro_batch: sequences in one forward pass.
        length: tokens per sequence, padding or packing included.
        labelled: share of tokens that carry loss.
        recomputed: layers that recompute their activations, the first ones; None: all, where any does.
        rows: sequences of a row in one pass (`ObjectiveFacts.sequences`): 2 where chosen and rejected are compared.
        shards: devices that the weights are spread over (fsdp), else 1.
        replicas: devices that hold a copy each (ddp), else 1.
        keeps_copy: frozen 4-bit weights are held in 16 bits as well.
        frozen_rank: of an adapter that stays as it is beside the one that trains.
        packed: rows share a sequence.
        packed_experts: stacks of experts are stored in 4 bits.
    """

    facts: ModelFacts
    method: MethodName = "qlora"
    r: int = 16
    target_modules: Literal["all-linear", "experts"] | tuple[str, ...] = "all-linear"
    layers: int | None = None
    lora_dropout: float = 0.0
    trained_whole: int = 0
    double_quant: bool = True
    dtype: Dtype = "bfloat16"
    optim: str = "paged_adamw_8bit"
    micro_batch: int = 1
    length: int = 1024
    labelled: float = 1.0
    rows: int = 1
    gradient_checkpointing: bool = False
    recomputed: int | None = None
    shards: int = 1
    replicas: int = 1
    keeps_copy: bool = False
    frozen_rank: int = 0
    packed: bool = False
    packed_experts: bool = False
    device: DeviceKind = "cuda"

    @property
    def tokens(self) -> int:
        """Tokens in one forward pass."""
        return self.micro_batch * self.length * self.rows

    @property
    def recomputed_layers(self) -> int:
        """How many layers recompute their activations."""
        every = self.facts.num_hidden_layers
        return min(self.recomputed or every, every) if self.gradient_checkpointing else 0


def family(architecture: str) -> Family:
    """The module table of a base's architecture; Llama's where it is not known."""
    return FAMILIES.get(architecture, USUAL)


def keeps_copy(spec: JobSpec, *, device: DeviceKind, memory: int) -> bool:
    """Whether a device of `memory` bytes holds frozen 4-bit weights in 16 bits as well, for plain QLoRA's fast step."""
    method = METHODS[spec.adapter.method]
    plain = (
        method.quantized
        and not method.magnitude
        and spec.adapter.lora_dropout == 0
        and spec.training.dtype == "bfloat16"
    )
    plain = plain and (
        spec.parent is None or spec.parent.init_from == "continue"
    )  # beneath a new one PEFT's way is gone
    little = BYTES["bfloat16"] * spec.base_model.facts.parameters < KEPT_SHARE * memory
    return device == "cpu" and plain and spec.placement.strategy != "fsdp" and little


def workload(spec: JobSpec, *, device: DeviceKind, memory: int) -> Workload:
    """What a resolved job asks of one device of `memory` bytes."""
    adapter, training, placement = spec.adapter, spec.training, spec.placement
    world = placement.gpus * placement.nodes
    packed = is_packed(spec)
    targets: Literal["all-linear", "experts"] | tuple[str, ...] = (
        adapter.target_modules if isinstance(adapter.target_modules, str) else tuple(adapter.target_modules)
    )
    return Workload(
        facts=spec.base_model.facts,
        method=adapter.method,
        r=max([adapter.r, *adapter.rank_pattern.values()]),
        target_modules=targets,
        layers=None if adapter.layers_to_transform is None else len(set(adapter.layers_to_transform)),
        lora_dropout=adapter.lora_dropout,
        trained_whole=_saved_parameters(spec.base_model.facts, modules=adapter.modules_to_save or ()),
        double_quant=spec.quantization.bnb_4bit_use_double_quant,
        dtype=training.dtype,
        optim=training.optim,
        micro_batch=1 if packed else training.per_device_train_batch_size,
        length=_packed_length(spec, device=device) if packed else _longest_row(spec),
        rows=OBJECTIVES[spec.objective.type].sequences,
        gradient_checkpointing=training.gradient_checkpointing,
        recomputed=training.gradient_checkpointing_layers,
        shards=world if placement.strategy == "fsdp" else 1,
        replicas=world if placement.strategy == "ddp" else 1,
        keeps_copy=keeps_copy(spec, device=device, memory=memory),
        frozen_rank=_frozen_rank(spec),
        packed=packed,
        packed_experts=spec.quantization.load_experts_in_4bit,
        device=device,
    )


def _frozen_rank(spec: JobSpec) -> int:
    """A parent beneath a new adapter stays as it is; of one that trains on, a preference objective keeps the start."""
    if spec.parent is None or not METHODS[spec.adapter.method].adapter:
        return 0
    if spec.parent.init_from == "merged":
        return spec.parent.rank
    return spec.parent.rank if OBJECTIVES[spec.objective.type].needs_reference else 0


def _longest_row(spec: JobSpec) -> int:
    limit = spec.training.max_length
    return min(limit, row_tokens(spec.data.max_characters)) if spec.data.max_characters else limit


def _packed_length(spec: JobSpec, *, device: DeviceKind) -> int:
    """Tokens of the largest packed pass: what fits in, or the longest row."""
    asked = spec.training.per_device_train_batch_size * spec.training.max_length
    return max(_longest_row(spec), min(asked, PACKED_TOKENS[device]))


def _saved_parameters(facts: ModelFacts, *, modules: Sequence[str]) -> int:
    """Values in modules that train whole; a module that is not known counts as an embedding."""
    norms = sum(last(name) in family(facts.architecture).norms for name in modules)
    wide = len(modules) - norms
    return wide * facts.vocab_size * facts.hidden_size + norms * facts.hidden_size * (facts.num_hidden_layers + 1)
