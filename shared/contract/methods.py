"""The table of methods, and the table of combinations that cannot work.

Pure. Nobody else asks for a method by name: the estimate takes its memory terms from here, the settling of a job its
defaults, the check of a request its refusals, the trainer what it builds, and docs/methods.md its rows.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final, Literal

from shared.contract.objectives import objectives
from shared.contract.spec import MethodName, Optimizer
from shared.errors import Invalid


@dataclass(frozen=True)
class MethodFacts:
    """One way to adapt weights.

    `adapter`: a LoRA adapter is trained, otherwise every weight. `quantized`: the frozen base is stored in 4 bits.
    `magnitude`: direction and length of each output are trained apart (DoRA, arXiv 2402.09353).
    `learning_rate_factor` is relative to LoRA's rate: full fine-tuning wants about a tenth ("LoRA Without Regret",
    Thinking Machines, 2025-09).
    """

    adapter: bool
    quantized: bool
    magnitude: bool
    optim: Optimizer
    learning_rate_factor: float
    summary: str
    choose: str
    costs: str


METHODS: Final[dict[MethodName, MethodFacts]] = {
    "lora": MethodFacts(
        adapter=True,
        quantized=False,
        magnitude=False,
        optim="adamw_torch",
        learning_rate_factor=1.0,
        summary="W' = W + (alpha/r)·B·A beside 16-bit frozen weights (arXiv 2106.09685)",
        choose="the base fits in 16 bits: the fastest method",
        costs="2 bytes per base parameter",
    ),
    "qlora": MethodFacts(
        adapter=True,
        quantized=True,
        magnitude=False,
        optim="adamw_torch",
        learning_rate_factor=1.0,
        summary="LoRA beside frozen 4-bit weights (arXiv 2305.14314)",
        choose="the default: every base fits in a quarter of the memory",
        costs="about 0.52 bytes per parameter; steps take 1.05 to 1.5 times LoRA's",
    ),
    "dora": MethodFacts(
        adapter=True,
        quantized=False,
        magnitude=True,
        optim="adamw_torch",
        learning_rate_factor=1.0,
        summary="LoRA with a trained length per output column (arXiv 2402.09353)",
        choose="small ranks, when a comparison on your data shows a gain",
        costs="LoRA plus about 26 % time and two more activations per target",
    ),
    "qdora": MethodFacts(
        adapter=True,
        quantized=True,
        magnitude=True,
        optim="adamw_torch",
        learning_rate_factor=1.0,
        summary="DoRA beside frozen 4-bit weights",
        choose="as dora, when 16 bits do not fit",
        costs="QLoRA plus a dequantised copy of each target's weights per pass",
    ),
    "full": MethodFacts(
        adapter=False,
        quantized=False,
        magnitude=False,
        optim="paged_adamw_8bit",
        learning_rate_factor=0.1,
        summary="every weight trains; the product is a whole model",
        choose="much data far from the base's own, or as the row to compare with",
        costs="16 bytes per parameter (6 with 8-bit AdamW), and a whole model per job",
    ),
}


def method_for(*, load_in_4bit: bool | None) -> MethodName:
    """The method of a job that names none."""
    return "lora" if load_in_4bit is False else "qlora"


def with_other_weights(method: MethodName) -> MethodName | None:
    """The method that does the same on a base of the other precision (lora and qlora); None: there is none."""
    facts = METHODS[method]
    alike = (facts.adapter, facts.magnitude, not facts.quantized)
    return next((name for name, it in METHODS.items() if (it.adapter, it.magnitude, it.quantized) == alike), None)


Dimension = Literal[
    "method",
    "objective",
    "strategy",
    "init",
    "optim",
    "dtype",
    "bias",
    "packing",
    "rslora",
    "patterns",
    "saved",
    "experts",
    "packed_experts",
    "dropout",
    "layers",
    "generate",
]


@dataclass(frozen=True)
class Refusal:
    """A combination that must not start: every dimension in `when` has one of the values named."""

    when: Mapping[Dimension, frozenset[str]]
    param: str
    reason: str


def _of(*values: str) -> frozenset[str]:
    return frozenset(values)


_MUTATING = _of("pissa", "olora")  # initialisations that subtract B·A from the base weights
_REFERRING = frozenset(objectives(needs_reference=True))
_UNPACKED = frozenset(objectives(may_pack=False))
_REFERRING_NAMES = " and ".join(objectives(needs_reference=True))

# Read in peft 0.21.2, trl 1.16.0 and transformers 5.23.0; the places are named in docs/methods.md.
UNSUPPORTED: tuple[Refusal, ...] = (
    Refusal(
        {"method": _of("full"), "objective": _REFERRING},
        "tunepool.adapter.method",
        f"{_REFERRING_NAMES} take their reference model by switching the adapter off, and full fine-tuning has none; "
        "use lora or qlora",
    ),
    Refusal(
        {"method": _of("full"), "dtype": _of("float16")},
        "tunepool.training.dtype",
        "float16 gradients of float16 weights cannot be unscaled; use bfloat16 or float32",
    ),
    Refusal(
        {"method": _of("dora", "qdora"), "strategy": _of("fsdp")},
        "tunepool.placement.strategy",
        "DoRA reads whole weight matrices for its norms and FSDP shards them; use ddp, or method lora",
    ),
    Refusal(
        {"method": _of("full"), "strategy": _of("fsdp")},
        "tunepool.placement.strategy",
        "fsdp spreads frozen weights over the devices and full fine-tuning has none; use ddp, or method lora or qlora",
    ),
    Refusal(
        {"method": _of("qlora", "qdora"), "init": _of("pissa")},
        "tunepool.adapter.init_lora_weights",
        "PiSSA decomposes 16-bit weights and refuses 4-bit ones; use method lora, or init_lora_weights default",
    ),
    Refusal(
        {"method": _of("qlora", "qdora"), "init": _of("olora")},
        "tunepool.adapter.init_lora_weights",
        "OLoRA quantises the changed base again, so the adapter would not fit the plain base; "
        "use method lora, or init_lora_weights default",
    ),
    Refusal(
        {"method": _of("lora", "dora", "qdora"), "init": _of("loftq")},
        "tunepool.adapter.init_lora_weights",
        "LoftQ makes up for 4-bit rounding in plain LoRA layers; use method qlora, or init_lora_weights default",
    ),
    Refusal(
        {"method": _of("dora"), "init": _MUTATING},
        "tunepool.adapter.init_lora_weights",
        "the conversion of PiSSA and OLoRA into an adapter for the plain base drops DoRA's magnitudes; "
        "use method lora, or init_lora_weights default",
    ),
    Refusal(
        {"method": _of("dora", "qdora"), "init": _of("eva")},
        "tunepool.adapter.init_lora_weights",
        "DoRA's magnitudes are set before EVA has looked at the data; use method lora or qlora, or default",
    ),
    Refusal(
        {"init": _MUTATING, "objective": _REFERRING},
        "tunepool.adapter.init_lora_weights",
        "PiSSA and OLoRA change the base, and the reference model is the base with the adapter off; "
        "use init_lora_weights default",
    ),
    Refusal(
        {"init": _of("loftq"), "objective": _REFERRING},
        "tunepool.adapter.init_lora_weights",
        "with LoftQ the model differs from its reference before the first step; use init_lora_weights default",
    ),
    Refusal(
        {"init": _MUTATING, "rslora": _of("true"), "patterns": _of("true")},
        "tunepool.adapter.use_rslora",
        "PiSSA and OLoRA cannot be converted with use_rslora and rank_pattern or alpha_pattern together; drop one",
    ),
    Refusal(
        {"init": _MUTATING, "saved": _of("true")},
        "tunepool.adapter.modules_to_save",
        "the conversion of PiSSA and OLoRA keeps the LoRA matrices only; drop modules_to_save, or use default",
    ),
    Refusal(
        {"init": _MUTATING, "bias": _of("all", "lora_only")},
        "tunepool.adapter.bias",
        "the conversion of PiSSA and OLoRA keeps the LoRA matrices only; use bias none, or init_lora_weights default",
    ),
    Refusal(
        {"bias": _of("all", "lora_only"), "objective": _REFERRING},
        "tunepool.adapter.bias",
        "switching the adapter off leaves trained biases on, so there would be no reference model; use bias none",
    ),
    Refusal(
        {"packing": _of("true"), "objective": _UNPACKED},
        "tunepool.training.packing",
        "preference rows are compared row by row and cannot share a sequence; use packing false",
    ),
    Refusal(
        {"experts": _of("true"), "method": _of("dora", "qdora")},
        "tunepool.adapter.target_modules",
        "PEFT adapts tensors of experts without DoRA's magnitudes; use method lora or qlora, or all-linear",
    ),
    Refusal(
        {"experts": _of("true"), "dropout": _of("true")},
        "tunepool.adapter.lora_dropout",
        "an adapter of expert tensors is added to the weights, so no input of its own could be dropped; use 0",
    ),
    Refusal(
        {"experts": _of("true"), "bias": _of("all", "lora_only")},
        "tunepool.adapter.bias",
        "PEFT trains no biases beside adapted expert tensors; use bias none",
    ),
    Refusal(
        {"experts": _of("true"), "init": _of("pissa", "olora", "eva", "loftq")},
        "tunepool.adapter.init_lora_weights",
        "computed starts read linear layers, not expert tensors; use default or gaussian",
    ),
    Refusal(
        {"experts": _of("true"), "layers": _of("true")},
        "tunepool.adapter.layers_to_transform",
        "PEFT selects layers for modules only, not for expert tensors; drop it",
    ),
    Refusal(
        {"experts": _of("true"), "strategy": _of("fsdp")},
        "tunepool.placement.strategy",
        "the adapter is added to whole stacks of experts and fsdp shards them; use ddp, or all-linear",
    ),
    Refusal(
        {"experts": _of("true"), "packed_experts": _of("true")},
        "tunepool.quantization.load_experts_in_4bit",
        "the adapter is added to experts in 16 bits; use false, or all-linear",
    ),
    Refusal(
        {"packed_experts": _of("true"), "strategy": _of("fsdp")},
        "tunepool.quantization.load_experts_in_4bit",
        "fsdp spreads experts as they are published; use false, or ddp",
    ),
    Refusal(
        {"generate": _of("true"), "strategy": _of("fsdp")},
        "tunepool.training.eval.generate",
        "an answer needs the whole model on one device and fsdp shards it; use ddp, or drop it",
    ),
)


def first_refusal(combination: Mapping[Dimension, str]) -> Refusal | None:
    """The first row of UNSUPPORTED that the combination meets; absent dimensions meet no row."""
    for refusal in UNSUPPORTED:  # plain loops: every submission asks, and generators would cost it 150 calls
        for dimension, values in refusal.when.items():
            if combination.get(dimension) not in values:
                break
        else:
            return refusal
    return None


def refuse_unsupported(combination: Mapping[Dimension, str]) -> None:
    """Raise Invalid for a combination that meets a row of UNSUPPORTED."""
    refusal = first_refusal(combination)
    if refusal is not None:
        met = ", ".join(f"{dimension} {combination[dimension]}" for dimension in refusal.when)
        raise Invalid(f"'{refusal.param}' cannot be used like this ({met}): {refusal.reason}.", param=refusal.param)
