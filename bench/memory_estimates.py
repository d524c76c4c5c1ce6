"""Predicted against published peak memory: `python -m bench.memory_estimates` prints every point and the errors.

Every source ran its own program, so each has a `Stack` saying what that program adds (plain logits, float32 embeddings)
and whether the driver's context is in its figures. Points that cannot be compared are kept, marked with the reason, and
counted apart.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass, replace
from statistics import median

from shared.contract.base_facts import ModelFacts
from shared.contract.spec import MethodName
from shared.settle.sizing import GIB, PLAIN_LOGITS, SoftwareStack, estimate
from shared.settle.workload import Workload

GB = 10**9


def _facts(
    architecture: str,
    *,
    parameters: float,
    h: int,
    layers: int,
    heads: int,
    kv: int | None = None,
    head_dim: int = 128,
    ff: int,
    vocabulary: int,
    tied: bool = False,
) -> ModelFacts:
    return ModelFacts(
        architecture=architecture,
        parameters=round(parameters * 1e9),
        hidden_size=h,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=kv or heads,
        head_dim=head_dim,
        intermediate_size=ff,
        vocab_size=vocabulary,
        max_position_embeddings=131072,
        tie_word_embeddings=tied,
    )


# From each model's config.json. Qwen (first generation) states both halves of its gated MLP as one intermediate_size.
PHI_15 = _facts("PhiForCausalLM", parameters=1.418, h=2048, layers=24, heads=32, head_dim=64, ff=8192, vocabulary=51200)
STABLELM_3B = _facts("GPTNeoXForCausalLM", parameters=3.638, h=4096, layers=16, heads=32, ff=16384, vocabulary=50688)
LLAMA_2_7B = _facts("LlamaForCausalLM", parameters=6.738, h=4096, layers=32, heads=32, ff=11008, vocabulary=32000)
LLAMA_2_13B = _facts("LlamaForCausalLM", parameters=13.016, h=5120, layers=40, heads=40, ff=13824, vocabulary=32000)
LLAMA_2_70B = _facts(
    "LlamaForCausalLM", parameters=68.977, h=8192, layers=80, heads=64, kv=8, ff=28672, vocabulary=32000
)
LLAMA_31_8B = _facts(
    "LlamaForCausalLM", parameters=8.030, h=4096, layers=32, heads=32, kv=8, ff=14336, vocabulary=128256
)
LLAMA_31_70B = _facts(
    "LlamaForCausalLM", parameters=70.554, h=8192, layers=80, heads=64, kv=8, ff=28672, vocabulary=128256
)
LLAMA_31_405B = _facts(
    "LlamaForCausalLM", parameters=405.9, h=16384, layers=126, heads=128, kv=8, ff=53248, vocabulary=128256
)
LLAMA_32_3B = _facts(
    "LlamaForCausalLM", parameters=3.213, h=3072, layers=28, heads=24, kv=8, ff=8192, vocabulary=128256, tied=True
)
YI_34B = _facts("LlamaForCausalLM", parameters=34.389, h=7168, layers=60, heads=56, kv=8, ff=20480, vocabulary=64000)
MISTRAL_7B = _facts(
    "MistralForCausalLM", parameters=7.242, h=4096, layers=32, heads=32, kv=8, ff=14336, vocabulary=32000
)
QWEN_18B = _facts("QWenLMHeadModel", parameters=1.837, h=2048, layers=24, heads=16, ff=5504, vocabulary=151936)
QWEN_7B = _facts("QWenLMHeadModel", parameters=7.721, h=4096, layers=32, heads=32, ff=11008, vocabulary=151936)
QWEN_14B = _facts("QWenLMHeadModel", parameters=14.167, h=5120, layers=40, heads=40, ff=13696, vocabulary=152064)
QWEN_72B = _facts("QWenLMHeadModel", parameters=72.288, h=8192, layers=80, heads=64, ff=24576, vocabulary=152064)
QWEN3_4B = _facts(
    "Qwen3ForCausalLM", parameters=4.022, h=2560, layers=36, heads=32, kv=8, ff=9728, vocabulary=151936, tied=True
)


@dataclass(frozen=True)
class Point:
    """One published measurement, bytes. `outlier` names why it cannot be compared."""

    source: str
    run: str
    work: Workload
    stack: SoftwareStack
    measured: float
    outlier: str = ""

    @property
    def predicted(self) -> int:
        return estimate(self.work, stack=self.stack).total

    @property
    def error(self) -> float:
        return self.predicted / self.measured - 1


# Sources that read torch's allocator have no driver context in their figures (process=0); those that read its
# *reserved* memory have its gaps too. Bytes per logit follow the program: float16 loss 8, float32 loss 12 to 14.
LITGPT = SoftwareStack(process=0, logits=PLAIN_LOGITS)
QWEN = SoftwareStack(process=900 * 10**6, logits=12)
QWEN_GPTQ = SoftwareStack(process=900 * 10**6, logits=8, wide_head=True)
FSDP_QLORA = SoftwareStack(process=0, logits=PLAIN_LOGITS, gaps=0.3)
PEFT_BENCH = SoftwareStack(process=0, logits=PLAIN_LOGITS, full=8)  # full: everything in bfloat16
TORCHTUNE = SoftwareStack(process=0, logits=PLAIN_LOGITS, full=8)
UNSLOTH_HF = SoftwareStack(process=1400 * 10**6, logits=PLAIN_LOGITS, wide_head=True)
MS_SWIFT = SoftwareStack(process=900 * 10**6, logits=12)

_OLD_BITSANDBYTES = "bitsandbytes 0.41 kept activations twice (fixed in 0.43.2)"
_DEEPSPEED = "DeepSpeed keeps a second copy of weights and gradients"
_OFFLOADED = "activations or weights offloaded to the host"
_COMPILED = "torch.compile and a chunked loss save activations"
_LENGTH = "the rows' lengths are not stated"


def litgpt() -> list[Point]:
    """LitGPT's LoRA tutorial: A100-40, Alpaca (longest row 1,304 tokens), LoRA on q and v, rank 8."""
    base = Workload(
        facts=LLAMA_2_7B, method="lora", r=8, target_modules=("q_proj", "v_proj"), optim="adamw_torch", length=1304
    )
    table = [
        ("phi-1.5", PHI_15, (4.82, 3.78, 3.72)),
        ("StableLM-3B", STABLELM_3B, (9.69, 6.35, 6.19)),
        ("Llama-2-7B", LLAMA_2_7B, (21.30, 14.14, 13.84)),
        ("Llama-2-13B", LLAMA_2_13B, (38.12, 23.14, 22.55)),
    ]
    points = []
    for name, facts, (wide, nf4, double) in table:
        targets = ("query_key_value",) if facts is STABLELM_3B else ("q_proj", "v_proj")
        work = replace(base, facts=facts, target_modules=targets)
        four_bit = replace(work, method="qlora")
        points += [
            Point("LitGPT", f"{name} bf16", work, LITGPT, wide * GB),
            Point("LitGPT", f"{name} nf4", replace(four_bit, double_quant=False), LITGPT, nf4 * GB, _OLD_BITSANDBYTES),
            Point("LitGPT", f"{name} nf4-dq", four_bit, LITGPT, double * GB, _OLD_BITSANDBYTES),
        ]
    two = replace(base, micro_batch=2)
    return [*points, Point("LitGPT", "Llama-2-7B bf16 micro-batch 2", two, LITGPT, 29.07 * GB)]


def qwen() -> list[Point]:
    """Qwen's README: A100-80, batch 1, FlashAttention 2, rank 64, checkpointing; Q-LoRA on a GPTQ base."""
    base = Workload(facts=QWEN_7B, method="lora", r=64, optim="adamw_torch", gradient_checkpointing=True)
    lengths = (256, 512, 1024, 2048, 4096, 8192)
    table: list[tuple[str, ModelFacts, MethodName, tuple[float, ...]]] = [
        ("1.8B", QWEN_18B, "lora", (6.7, 7.4, 8.4, 11.0, 16.2, 21.8)),
        ("1.8B", QWEN_18B, "qlora", (5.8, 6.0, 6.6, 7.8, 10.2, 15.8)),
        ("7B", QWEN_7B, "lora", (20.1, 20.4, 21.5, 23.8, 29.7, 36.6)),
        ("7B", QWEN_7B, "qlora", (11.5, 11.5, 12.3, 13.9, 16.9, 23.5)),
        ("14B", QWEN_14B, "lora", (34.6, 35.1, 35.3, 37.4, 42.5, 55.2)),
        ("14B", QWEN_14B, "qlora", (18.7, 18.4, 18.9, 19.9, 23.0, 27.9)),
        ("72B", QWEN_72B, "qlora", (61.4, 61.4, 62.9, 64.1, 68.0, 75.6)),
    ]
    points = []
    for name, facts, method, figures in table:
        stack = QWEN_GPTQ if method == "qlora" else QWEN  # GPTQ goes through prepare_model_for_kbit_training
        for length, figure in zip(lengths, figures, strict=True):
            work = replace(base, facts=facts, method=method, length=length)
            points.append(Point("Qwen", f"{name} {method} {length}", work, stack, figure * GB))
    full = replace(base, facts=QWEN_18B, method="full")
    points += [
        Point("Qwen", f"1.8B full {length}", replace(full, length=length), QWEN, figure * GB, _DEEPSPEED)
        for length, figure in ((256, 43.5), (8192, 48.3))
    ]
    return points


def fsdp_qlora() -> list[Point]:
    """fsdp_qlora's benchmarks: two GPUs, checkpointing; reserved GiB. Rank 64 and rows of 2,048 where not stated."""
    base = Workload(facts=LLAMA_2_7B, r=64, optim="adamw_torch", gradient_checkpointing=True, length=2048, shards=2)
    lora, ddp = replace(base, method="lora"), replace(base, shards=1, replicas=2)
    rows = [
        ("7B QLoRA 1×512", replace(base, length=512), 4.98, ""),
        ("7B QLoRA 1×2048", base, 5.21, ""),
        ("7B QLoRA 4×2048", replace(base, micro_batch=4), 11.22, ""),
        ("7B QLoRA 10×2048", replace(base, micro_batch=10), 20.97, ""),
        ("7B QLoRA ddp 8×2048", replace(ddp, micro_batch=8), 20.94, ""),
        ("7B LoRA 1×2048", lora, 10.24, ""),
        ("7B LoRA 4×2048", replace(lora, micro_batch=4), 16.14, ""),
        ("7B LoRA 6×2048", replace(lora, micro_batch=6), 21.35, ""),
        ("7B LoRA ddp 4×2048", replace(ddp, method="lora", micro_batch=4), 22.04, ""),
        ("Yi-34B QLoRA 2×2048", replace(base, facts=YI_34B, micro_batch=2), 23.05, ""),
        ("70B QLoRA 2×2048", replace(base, facts=LLAMA_2_70B, micro_batch=2), 14.92, _OFFLOADED),
        ("Mistral-7B 1×24576", replace(base, facts=MISTRAL_7B, length=24576), 22.54, _OFFLOADED),
    ]
    return [Point("fsdp_qlora", run, work, FSDP_QLORA, figure * GIB, outlier) for run, work, figure, outlier in rows]


def peft() -> list[Point]:
    """PEFT's method comparison: Llama-3.2-3B, 4 rows of up to 768 tokens, no checkpointing; GiB."""
    base = Workload(
        facts=LLAMA_32_3B,
        method="lora",
        r=32,
        target_modules=("q_proj", "v_proj"),
        optim="adamw_torch",
        micro_batch=4,
        length=768,
    )
    mlp = ("gate_proj", "up_proj", "down_proj")
    rows = [
        ("LoRA r32 q,v", base, 20.8),
        ("LoRA r64 q,v", replace(base, r=64), 21.0),
        ("LoRA r10 MLP", replace(base, r=10, target_modules=mlp), 23.0),
        ("DoRA r32 q,v", replace(base, method="dora"), 22.8),
        ("full", replace(base, method="full"), 36.2),
        ("LoRA-FA q,v", base, 20.7),
    ]
    return [Point("PEFT", run, work, PEFT_BENCH, figure * GIB) for run, work, figure in rows]


def unsloth_hf() -> list[Point]:
    """Unsloth's context tables, column Hugging Face + FlashAttention 2: the longest row that fits a card; QLoRA r32."""
    base = Workload(facts=LLAMA_31_8B, r=32, optim="adamw_8bit", gradient_checkpointing=True)
    rows = [(12, 932), (16, 2551), (24, 5789), (40, 12264), (48, 15502), (80, 28454)]
    points = [
        Point("Unsloth HF", f"8B on {card} GB", replace(base, length=length), UNSLOTH_HF, card * GB)
        for card, length in rows
    ]
    large = replace(base, facts=LLAMA_31_70B, length=6916)
    return [*points, Point("Unsloth HF", "70B on 80 GB", large, UNSLOTH_HF, 80 * GB)]


def others() -> list[Point]:
    """ms-swift's Qwen3-4B figure, and torchtune's README (GiB). Most of these cannot be compared."""
    swift = Workload(facts=QWEN3_4B, method="lora", r=8, optim="adamw_torch", gradient_checkpointing=True, length=2048)
    packed = Workload(facts=LLAMA_32_3B, method="full", optim="adamw_torch", micro_batch=2, length=4096)
    lora3 = replace(packed, method="lora", r=64, gradient_checkpointing=True)
    lora8 = replace(lora3, facts=LLAMA_31_8B, length=2048)
    rows = [
        ("3B full baseline", packed, 25.5, _LENGTH),
        ("3B full packed 2×4096", packed, 60.0, ""),
        ("3B full packed, compiled", packed, 51.0, _COMPILED),
        ("3B full packed, compiled, chunked", packed, 42.9, _COMPILED),
        ("3B LoRA 2×4096", lora3, 8.5, _OFFLOADED),
        ("3B QLoRA 2×4096", replace(lora3, method="qlora"), 4.6, _OFFLOADED),
        ("8B LoRA 2×2048, 4090", lora8, 16.2, _OFFLOADED),
        ("8B QLoRA 2×2048, 4090", replace(lora8, method="qlora"), 7.4, _OFFLOADED),
        ("8B LoRA 2×2048, A6000", replace(lora8, gradient_checkpointing=False), 30.3, _COMPILED),
        ("70B LoRA on 8", replace(lora8, facts=LLAMA_31_70B, shards=8), 27.6, _LENGTH),
        ("405B QLoRA on 8", replace(lora8, facts=LLAMA_31_405B, method="qlora", shards=8), 44.8, _LENGTH),
    ]
    return [
        Point("ms-swift", "Qwen3-4B LoRA r8 2048", swift, MS_SWIFT, 13 * GB),
        *(Point("torchtune", run, work, TORCHTUNE, figure * GIB, outlier) for run, work, figure, outlier in rows),
    ]


def points() -> list[Point]:
    return [*litgpt(), *qwen(), *fsdp_qlora(), *peft(), *unsloth_hf(), *others()]


@dataclass(frozen=True)
class Errors:
    """Relative errors over some points: median of the absolute ones, share within 20 %."""

    count: int
    median: float
    within_20: float


def errors(of: list[Point]) -> Errors:
    sizes = [abs(point.error) for point in of]
    return Errors(len(of), median(sizes), sum(size <= 0.2 for size in sizes) / len(of))


def main() -> int:
    every = points()
    comparable = [point for point in every if not point.outlier]
    for point in every:
        figures = f"{point.measured / GB:7.2f} {point.predicted / GB:7.2f} {point.error:+7.1%}"
        print(f"{point.source:11} {point.run:34} {figures}  {point.outlier}".rstrip())
    for name, group in (("comparable", comparable), ("all, outliers included", every)):
        found = errors(group)
        print(f"{name}: {found.count} points, median error {found.median:.1%}, {found.within_20:.0%} within 20 %")
    found = errors(comparable)
    return 0 if found.median <= 0.08 and found.within_20 >= 0.9 else 1


if __name__ == "__main__":
    sys.exit(main())
