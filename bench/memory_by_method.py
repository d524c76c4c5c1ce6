"""What known base models need of a GPU, by method: `python -m bench.memory_by_method` prints a table of docs/models.md.

From the estimator alone, before any measurement: rows of 2,048 tokens, one in a pass, activations recomputed, rank 16
on all linear layers. A job asks for what the estimator's uncertainty adds (docs/memory.md).
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Final, NamedTuple

from shared.contract.methods import METHODS as LOADS
from shared.contract.spec import MethodName
from shared.settle.calibration import Calibration
from shared.settle.model_facts import facts_of
from shared.settle.sizing import GIB, estimate
from shared.settle.workload import Workload

METHODS: Final[tuple[MethodName, ...]] = ("qlora", "lora", "full")
LENGTH: Final = 2048


def _dense(architecture: str, sizes: tuple[int, int, int, int, int, int, int], **more: Any) -> dict[str, Any]:
    """Hidden size, layers, heads, key-value heads, head size, intermediate size, vocabulary."""
    names = ("hidden_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads", "head_dim")
    named = dict(zip((*names, "intermediate_size", "vocab_size"), sizes, strict=True))
    return {"architectures": [architecture], "max_position_embeddings": 131072, **named, **more}


class KnownModel(NamedTuple):
    """A repository at the hub and the numbers of its config.json."""

    name: str
    repository: str
    config: dict[str, Any]
    gated: bool = False
    packed: bool = False  # published in fewer than 16 bits, which no method quantises again


QWEN3_30B: Final = {
    **_dense("Qwen3MoeForCausalLM", (2048, 48, 32, 4, 128, 6144, 151936)),
    "moe_intermediate_size": 768,
    "num_experts": 128,
    "num_experts_per_tok": 8,
}
GPT_OSS_20B: Final = {
    **_dense("GptOssForCausalLM", (2880, 24, 64, 8, 64, 2880, 201088)),
    "num_local_experts": 32,
    "num_experts_per_tok": 4,
}


def _every(step: int, layers: int, *, first: int) -> list[str]:
    """Layer types of a hybrid: attention at `first` and each `step` layers on, state along the sequence elsewhere."""
    attends = range(first, layers, step)
    return ["full_attention" if layer in attends else "linear_attention" for layer in range(layers)]


# Of hybrids no formula counts the parameters. These are the language model's, built by transformers 5.23 on torch's
# `meta` device with these sizes; the tower for images of Qwen3.5 is not among them.
QWEN35_9B: Final = {
    **_dense("Qwen3_5ForConditionalGeneration", (4096, 32, 16, 4, 256, 12288, 248320)),
    "layer_types": _every(4, 32, first=3),
    "num_parameters": 8_953_803_264,
}
QWEN35_27B: Final = {
    **_dense("Qwen3_5ForConditionalGeneration", (5120, 64, 24, 4, 256, 17408, 248320)),
    "layer_types": _every(4, 64, first=3),
    "num_parameters": 26_895_998_464,
}
QWEN35_35B: Final = {
    **_dense("Qwen3_5MoeForConditionalGeneration", (2048, 40, 16, 2, 256, 512, 248320)),
    "layer_types": _every(4, 40, first=3),
    "moe_intermediate_size": 512,
    "num_experts": 256,
    "num_experts_per_tok": 8,
    "num_parameters": 34_660_610_688,
}
GRANITE4: Final = "GraniteMoeHybridForCausalLM"
GRANITE4_MICRO: Final = {
    **_dense(GRANITE4, (2560, 40, 40, 8, 64, 8192, 100352), tie_word_embeddings=True),
    "model_type": "granitemoehybrid",
    "layer_types": ["full_attention"] * 40,
    "num_parameters": 3_402_836_480,
}
GRANITE4_H_TINY: Final = {
    **_dense(GRANITE4, (1536, 40, 12, 4, 128, 512, 100352), tie_word_embeddings=True),
    "layer_types": _every(10, 40, first=5),
    "num_local_experts": 64,
    "num_experts_per_tok": 6,
    "num_parameters": 6_939_037_248,
}
GRANITE4_H_SMALL: Final = {
    **_dense(GRANITE4, (4096, 40, 32, 8, 128, 768, 100352), tie_word_embeddings=True),
    "layer_types": _every(10, 40, first=5),
    "num_local_experts": 72,
    "num_experts_per_tok": 10,
    "num_parameters": 32_207_337_984,
}
MODELS: Final = (
    KnownModel(
        "llama-3.1-8b",
        "meta-llama/Llama-3.1-8B-Instruct",
        _dense("LlamaForCausalLM", (4096, 32, 32, 8, 128, 14336, 128256)),
        gated=True,
    ),
    KnownModel(
        "qwen3-4b",
        "Qwen/Qwen3-4B-Instruct-2507",
        _dense("Qwen3ForCausalLM", (2560, 36, 32, 8, 128, 9728, 151936), tie_word_embeddings=True),
    ),
    KnownModel("qwen3-8b", "Qwen/Qwen3-8B", _dense("Qwen3ForCausalLM", (4096, 36, 32, 8, 128, 12288, 151936))),
    KnownModel("qwen3-30b-a3b", "Qwen/Qwen3-30B-A3B", QWEN3_30B),
    KnownModel(
        "mistral-7b",
        "mistralai/Mistral-7B-Instruct-v0.3",
        _dense("MistralForCausalLM", (4096, 32, 32, 8, 128, 14336, 32768)),
    ),
    KnownModel(
        "gemma-3-1b",
        "google/gemma-3-1b-it",
        _dense("Gemma3ForCausalLM", (1152, 26, 4, 1, 256, 6912, 262144), tie_word_embeddings=True),
        gated=True,
    ),
    KnownModel("gpt-oss-20b", "openai/gpt-oss-20b", GPT_OSS_20B, packed=True),
    KnownModel("qwen3.5-9b", "Qwen/Qwen3.5-9B", QWEN35_9B),
    KnownModel("qwen3.5-27b", "Qwen/Qwen3.5-27B", QWEN35_27B),
    KnownModel("qwen3.5-35b-a3b", "Qwen/Qwen3.5-35B-A3B", QWEN35_35B),
    KnownModel("granite-4.0-micro", "ibm-granite/granite-4.0-micro", GRANITE4_MICRO),
    KnownModel("granite-4.0-h-tiny", "ibm-granite/granite-4.0-h-tiny", GRANITE4_H_TINY),
    KnownModel("granite-4.0-h-small", "ibm-granite/granite-4.0-h-small", GRANITE4_H_SMALL),
)


def rows() -> Iterator[str]:
    """The table's lines in Markdown."""
    yield "| entry | repository | parameters | asks for its terms | GiB with qlora | with lora | with full |"
    yield "|---|---|---|---|---|---|---|"
    for model in MODELS:
        facts = facts_of(model.config, name=model.name)
        work = {name: Workload(facts, method=name, length=LENGTH, gradient_checkpointing=True) for name in METHODS}
        needs = ("refused" if model.packed and LOADS[name].quantized else _gib(work[name]) for name in METHODS)
        gated = "yes" if model.gated else "no"
        cells = (f"`{model.name}`", f"`{model.repository}`", f"{facts.parameters / 1e9:.1f} billion", gated, *needs)
        yield f"| {' | '.join(cells)} |"


def _gib(work: Workload) -> str:
    return f"{Calibration().upper(estimate(work).total) / GIB:.0f}"


if __name__ == "__main__":
    print("\n".join(rows()))
