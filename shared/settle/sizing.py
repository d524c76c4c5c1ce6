"""How many bytes of a device a job will hold at its peak, term by term, before anything runs.

Pure arithmetic on a base model's facts; the derivation of each term and the published points it was checked against are
in docs/memory.md and bench/memory_estimates.py. All sizes are bytes.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import lru_cache

from shared.contract.base_facts import LayerKind, ModelFacts
from shared.contract.methods import METHODS
from shared.contract.modules import last
from shared.contract.spec import DeviceKind
from shared.settle.expert_sizes import FEED_FORWARD, expert_adapter, expert_parameters
from shared.settle.scans import scan_bytes
from shared.settle.workload import BYTES, Workload, family

GIB = 2**30
MB = 10**6

# bitsandbytes: 4 bits a value and a float32 scale per 64; double quantization stores the scales in 8 bits.
FOUR_BIT = 0.5 + 4 / 64
FOUR_BIT_DOUBLE = 0.5 + (1 + 4 / 256) / 64


# AdamW's two moments per trained value; 8-bit ones carry a float32 scale per 256 values each.
OPTIMIZER_BYTES = {
    "adamw_torch": 8.0,
    "paged_adamw_32bit": 8.0,
    "paged_adamw_8bit": 2 * (1 + 4 / 256),
    "adamw_8bit": 2 * (1 + 4 / 256),
    "sgd": 0.0,
}

PLAIN_LOGITS = 14.0  # bytes per token and vocabulary entry when logits are materialised: 16-bit, float32 copy, gradient


@dataclass(frozen=True)
class SoftwareStack:
    """What a training program adds to the arithmetic of the model.

    Attributes:
        process: bytes before any model is loaded: driver context and cuBLAS on CUDA, Python with torch on the CPU.
        logits: bytes per token and vocabulary entry where logits are materialised; 0: fused head, in tiles.
        wide_head: embeddings and output layer are cast to float32 (PEFT's prepare_model_for_kbit_training).
        gaps: share of activations and logits that the allocator loses to fragmentation.
        full: bytes per parameter for everything standing when every weight trains; 0: from dtype and optim.
        adapter_whole: sharding spreads the frozen layers only. What learns stays whole on each device, and embeddings
            and output layer are put together for the whole pass (worker/train/sharding.py).
    """

    process: int
    logits: float = 0.0
    wide_head: bool = False
    gaps: float = 0.05
    full: float = 0.0
    adapter_whole: bool = False


# CUDA: context and cuBLAS take 0.5 to 1.4 GB by card and version; TRL's fused head. CPU: Python with torch and the
# training stack; logits, their softmax and gradient in float32; and glibc's heap, whose resident peak is nearly twice
# the living tensors (measured on a 135M model, docs/memory.md).
OURS: dict[DeviceKind, SoftwareStack] = {
    "cuda": SoftwareStack(process=900 * MB, adapter_whole=True),
    "cpu": SoftwareStack(process=750 * MB, logits=12.0, gaps=0.9, adapter_whole=True),
}


@dataclass(frozen=True)
class Estimate:
    """Predicted peak of one device. `terms` add up to `total`."""

    terms: dict[str, int] = field(default_factory=dict)

    @property
    def total(self) -> int:
        return sum(self.terms.values())


def linears(facts: ModelFacts) -> Sequence[LayerKind]:
    """The linear layers of the language model by name and shape: as it is built, where it was built.

    Else those that the table of its architecture names, or Llama's. Of a mixture of experts those of attention then:
    experts are no linear modules.
    """
    if facts.linear is not None:
        return facts.linear
    attention = (facts.num_attention_heads * facts.head_dim, facts.num_key_value_heads * facts.head_dim)
    sizes = (facts.hidden_size, facts.intermediate_size, *attention, facts.num_hidden_layers)
    return _by_table(facts.architecture, sizes, mixture=facts.experts is not None)


@lru_cache(maxsize=256)
def _by_table(architecture: str, sizes: tuple[int, int, int, int, int], *, mixture: bool) -> tuple[LayerKind, ...]:
    h, ff, q, kv, layers = sizes
    shapes: dict[str, list[tuple[int, int]]] = {
        **{name: [(h, q)] for name in ("q_proj",)},
        **{name: [(h, kv)] for name in ("k_proj", "v_proj")},
        **{name: [(q, h)] for name in ("o_proj", "dense", "out_proj")},
        **{name: [(h, q + 2 * kv)] for name in ("query_key_value", "qkv_proj", "c_attn")},
        **{name: [(h, ff)] for name in ("gate_proj", "up_proj", "fc1", "fc_in", "c_fc", "dense_h_to_4h", "w1", "w2")},
        "gate_up_proj": [(h, 2 * ff)],
        **{name: [(ff, h)] for name in ("down_proj", "fc2", "fc_out", "dense_4h_to_h")},
        # One name for the attention's and the MLP's output, where the attention's has none of its own.
        "c_proj": [(q, h), (ff, h)],
    }
    if "o_proj" in family(architecture).linear:
        shapes["c_proj"] = [(ff, h)]
    return tuple(
        LayerKind(name=name, inputs=inputs, outputs=outputs, count=layers, adapted=True)
        for name in family(architecture).linear
        for inputs, outputs in shapes[name]
        if not (mixture and name in FEED_FORWARD)
    )


def adapter_parameters(work: Workload) -> int:
    """Trained values of the adapter: r·(in+out) per target, and DoRA's length per output."""
    lengths = 1 if METHODS[work.method].magnitude else 0
    each = (kind.count * (work.r * kind.inputs + (work.r + lengths) * kind.outputs) for kind in _targets(work))
    experts = expert_adapter(work.facts, r=work.r) if work.target_modules == "experts" else 0
    return _of_chosen_layers(work, sum(each)) + experts


def _of_chosen_layers(work: Workload, size: int) -> int:
    """The share of `size`, that of all layers, which the adapted ones have."""
    every = work.facts.num_hidden_layers
    return -(-size * min(work.layers or every, every) // every)


def _targets(work: Workload) -> list[LayerKind]:
    if not METHODS[work.method].adapter:
        return []
    every = linears(work.facts)
    adapted = [kind for kind in every if kind.adapted]
    if isinstance(work.target_modules, str):
        return adapted
    names = {last(name) for name in work.target_modules}
    # Names of an architecture that is not in the table: as if every linear module were meant, to be safe.
    return [kind for kind in every if kind.name in names] or adapted


def estimate(work: Workload, *, stack: SoftwareStack | None = None) -> Estimate:
    """Peak bytes of one device while training; `stack` is our own trainer unless another is named."""
    stack = stack or OURS[work.device]
    terms = {"process": stack.process, **_standing(work, stack=stack), **_mask(work)}
    if work.shards > 1:
        terms["gathered layer"] = 2 * _weights(work, stack=stack) // work.facts.num_hidden_layers
        terms["gathered embeddings"] = BYTES[work.dtype] * _embeddings(work) if stack.adapter_whole else 0
    moving = _moving(work, stack=stack)
    return Estimate({**terms, **moving, "fragmentation": math.ceil(stack.gaps * sum(moving.values()))})


def _mask(work: Workload) -> dict[str, int]:
    """Which position sees which in a packed pass: one byte each, and two conditions that it is made of."""
    return {"attention mask": 3 * work.tokens**2} if work.packed else {}


def estimate_evaluation(work: Workload, *, stack: SoftwareStack | None = None) -> Estimate:
    """Peak bytes of one device while validating: no gradients, and one layer is gone when the next one runs."""
    stack = stack or OURS[work.device]
    terms = {name: size for name, size in estimate(work, stack=stack).terms.items() if name not in _TRAINING_ONLY}
    moving = {"logits or one layer": max(work.tokens * _layer_bytes(work), _logits(work, stack=stack))}
    return Estimate({**terms, **moving, "fragmentation": math.ceil(stack.gaps * sum(moving.values()))})


_TRAINING_ONLY = ("gradients", "buckets", "activations", "logits", "logits or one layer", "fragmentation")


def _standing(work: Workload, *, stack: SoftwareStack) -> dict[str, int]:
    """Bytes that stay from the first step to the last."""
    if stack.full and not METHODS[work.method].adapter:
        return {"weights": math.ceil(stack.full * work.facts.parameters / work.shards)}
    trained = trained_parameters(work)
    spread = {
        **_weights_and_experts(work, stack=stack),
        "trained weights": 4 * trained if METHODS[work.method].adapter else 0,
        "gradients": 4 * trained,
        "optimizer": math.ceil(OPTIMIZER_BYTES[work.optim] * trained),
        **({"frozen adapter": 4 * adapter_parameters(replace(work, r=work.frozen_rank))} if work.frozen_rank else {}),
    }
    whole = spread.keys() & _LEARNS if stack.adapter_whole else set[str]()
    shared_out = {name: size if name in whole else math.ceil(size / work.shards) for name, size in spread.items()}
    scales = _whole_scales(work) if stack.adapter_whole else 0
    more = {"16-bit copy": _copy(work), "buckets": 4 * trained if work.replicas > 1 else 0}
    return {**shared_out, **({"scales": scales} if scales else {}), **more}


_LEARNS = {"trained weights", "gradients", "optimizer", "frozen adapter"}


def _whole_scales(work: Workload) -> int:
    """What sharding leaves whole of 4-bit weights, less the share that is counted with them.

    bitsandbytes keeps their scales beside the parameters, and `fully_shard` spreads parameters.
    """
    if work.shards == 1 or not METHODS[work.method].quantized:
        return 0
    scale = _narrow(work) - 0.5
    packed = min(quantizable_parameters(work.facts), work.facts.parameters)
    return math.ceil(scale * packed * (1 - 1 / work.shards))


def _moving(work: Workload, *, stack: SoftwareStack) -> dict[str, int]:
    """Bytes that come and go within a step, at the moment when there are most of them."""
    layer, logits = work.tokens * _layer_bytes(work), _logits(work, stack=stack)
    recomputed, single = work.recomputed_layers, {"dequantised weight": _dequantised(work)} | _written_experts(work)
    inputs = work.tokens * BYTES[work.dtype] * work.facts.hidden_size * recomputed
    kept = layer * (work.facts.num_hidden_layers - recomputed)
    if kept:  # of the last layers: all of it, and the logits, is gone when one of the first is recomputed
        return {"activations": inputs + kept, "logits": logits, **single}
    # The logits are gone when the first layer is recomputed: the larger of the two counts.
    return {"activations": inputs, "logits or one layer": max(layer, logits), **single}


def _written_experts(work: Workload) -> dict[str, int]:
    """Expert stacks with the adapter added, which PEFT writes for each pass, and the gradient of one layer's.

    Or stacks in 4 bits, expanded for each pass. Those of all layers wait for the backward pass, unless recomputed.
    """
    experts = work.facts.experts
    adapted = work.target_modules == "experts"
    if experts is None or not (adapted or work.packed_experts):
        return {}
    one_layer = BYTES[work.dtype] * expert_parameters(work.facts) // experts.layers
    kept = max(1, min(experts.layers, work.facts.num_hidden_layers - work.recomputed_layers))
    return {"adapted experts": one_layer * (kept + 1)} if adapted else {"expanded experts": one_layer * kept}


def trained_parameters(work: Workload) -> int:
    if not METHODS[work.method].adapter:
        return work.facts.parameters
    return adapter_parameters(work) + work.trained_whole


def _weights_and_experts(work: Workload, *, stack: SoftwareStack) -> dict[str, int]:
    """The base's weights; frozen experts apart, since they stay in 16 bits on a 4-bit base too unless asked otherwise.

    bitsandbytes quantises linear modules, and experts are tensors of their own in transformers 5.
    """
    whole = _weights(work, stack=stack)
    if work.facts.experts is None or not METHODS[work.method].adapter:
        return {"weights": whole}
    experts = BYTES[work.dtype] * expert_parameters(work.facts)
    rest = max(0, whole - experts)
    if work.packed_experts:
        return {"weights": rest, "experts in 4 bits": math.ceil(_narrow(work) * expert_parameters(work.facts))}
    return {"weights": rest, "experts in 16 bits" if BYTES[work.dtype] == 2 else "experts in 32 bits": experts}


def _narrow(work: Workload) -> float:
    """Bytes of a value in 4 bits, with its share of the scales."""
    return FOUR_BIT_DOUBLE if work.double_quant else FOUR_BIT


def _weights(work: Workload, *, stack: SoftwareStack) -> int:
    """The base's weights. All others (MoE experts, say) stay 16-bit: only known linears are quantised."""
    parameters, wide = work.facts.parameters, BYTES[work.dtype]
    if not METHODS[work.method].adapter:
        return parameters * (4 if wide == 4 else 6)  # float32, and autocast's 16-bit copies
    widened = (4 - wide) * _embeddings(work) if stack.wide_head else 0
    if not METHODS[work.method].quantized:
        return wide * parameters + widened
    packed = min(quantizable_parameters(work.facts), parameters)
    return math.ceil(packed * _narrow(work) + (parameters - packed) * wide) + widened


def _embeddings(work: Workload) -> int:
    """Values of the embeddings and of an output layer of its own."""
    return work.facts.vocab_size * work.facts.hidden_size * (1 if work.facts.tie_word_embeddings else 2)


def _copy(work: Workload) -> int:
    """Frozen weights of the adapted modules in 16 bits."""
    if not work.keeps_copy:
        return 0
    return _of_chosen_layers(work, BYTES["bfloat16"] * sum(map(_weight, _targets(work))))


def quantizable_parameters(facts: ModelFacts) -> int:
    """Weights inside linear modules but the output layer: what bitsandbytes stores in 4 bits."""
    return sum(map(_weight, linears(facts)))


def _weight(kind: LayerKind) -> int:
    """Values of the weights of all layers of a kind."""
    return kind.inputs * kind.outputs * kind.count


def _layer_bytes(work: Workload) -> int:
    """Activations that one decoder layer keeps for the backward pass, per token.

    Frozen linears do not keep their inputs, adapted ones do; counts derived from the modelling code, checked
    in bench/memory_estimates.py.
    """
    facts, targets = work.facts, _targets(work)
    h, ff = facts.hidden_size, facts.intermediate_size
    q, kv = facts.num_attention_heads * facts.head_dim, facts.num_key_value_heads * facts.head_dim
    everywhere = not METHODS[work.method].adapter or any(ff in (kind.inputs, kind.outputs) for kind in targets)
    if family(facts.architecture).gated_mlp:
        values = 10 * h + 4 * kv + 5 * ff if everywhere else 8 * h + 2 * q + 2 * kv + 3.5 * ff
    else:
        values = 3 * h + 2 * q + 2 * kv + 2 * ff if everywhere else h + 2 * q + 2 * kv + ff
    if METHODS[work.method].magnitude:
        values += sum(kind.outputs * kind.count for kind in targets) / facts.num_hidden_layers
    if work.lora_dropout > 0:
        dropped = sum(kind.inputs * kind.count for kind in targets) / facts.num_hidden_layers
        values += 1.5 * dropped  # a copy and a one-byte mask
    return math.ceil(BYTES[work.dtype] * values) + scan_bytes(facts)


def _logits(work: Workload, *, stack: SoftwareStack) -> int:
    vocabulary = work.facts.vocab_size
    if stack.logits:
        return math.ceil(stack.logits * work.tokens * work.labelled * vocabulary)
    # TRL's fused head (trl/kernels/chunked_logprob.py): one 16-bit tile of logits, float32 gradients of hidden states.
    tile = min(work.tokens, 4096) * min(vocabulary, 32768) * 2
    return tile + math.ceil(work.tokens * work.labelled) * work.facts.hidden_size * 4


def _dequantised(work: Workload) -> int:
    if not METHODS[work.method].quantized:
        return 0
    copies = 2 if METHODS[work.method].magnitude else 1
    return copies * BYTES[work.dtype] * largest_linear(work.facts)


def largest_linear(facts: ModelFacts) -> int:
    return max((kind.inputs * kind.outputs for kind in linears(facts)), default=0)
