"""The rule of each value that a request leaves open. docs/methods.md says where the rules come from. Pure."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, Final

from shared.contract.families import FAMILIES, leaves_float16
from shared.contract.methods import METHODS, method_for
from shared.contract.spec import Dtype, EarlyStopping, Evaluation, MethodName, Strategy
from shared.settle.settling import Settling
from shared.settle.wishes import wished_world
from shared.settle.workload import CHARACTERS_PER_TOKEN, row_tokens

# Each rule returns (value, reason) and may read what the rules above it settled.


def constant(value: Any, reason: str) -> Callable[[Settling], tuple[Any, str]]:
    return lambda _settling: (value, reason)


def _method(s: Settling) -> tuple[MethodName, str]:
    method = method_for(load_in_4bit=s.wished.get("quantization.load_in_4bit"))
    if METHODS[method].quantized:
        return method, "fits the most devices, and the result does not depend on which of them was free"
    return method, "load_in_4bit is false, so the base stays in 16 bits"


def _rank(s: Settling) -> tuple[int, str]:
    rows = s.data.train_rows
    if s.scenario is not None:
        low, high = s.scenario.r
        return (high, f"preset {s.preset}, {rows} rows") if rows >= 10_000 else (low, f"preset {s.preset}")
    if rows > 50_000:
        return 64, f"{rows} rows hold more than rank 16 can learn (about 2 bits per trained value)"
    return 16, "enough for up to 50,000 rows; smaller ranks save little"


def _alpha(s: Settling) -> tuple[int, str]:
    if s.settled["adapter.use_rslora"]:
        return 16, "rsLoRA keeps alpha fixed and scales by alpha/sqrt(r)"
    return s.settled["adapter.r"], "alpha = r: the update is neither enlarged nor reduced"


def _targets(s: Settling) -> tuple[str | list[str], str]:
    if s.settled["adapter.layers_to_transform"] is not None:
        return list(FAMILIES[s.facts.architecture].linear), "every linear module, by name, as layers_to_transform needs"
    return "all-linear", "adapting attention alone learns less, even at equal size"


def _four_bit(s: Settling) -> tuple[bool, str]:
    return METHODS[s.method].quantized, f"method {s.method}"


def _dtype(s: Settling) -> tuple[Dtype, str]:
    if s.device.bfloat16:
        return "bfloat16", "the device computes in bfloat16"
    if s.device.kind == "cuda" and leaves_float16(s.facts.architecture):
        return "float32", "this GPU has no bfloat16, and activations of this family leave float16's range"
    if s.device.kind == "cuda" and METHODS[s.method].adapter:
        return "float16", "this GPU has no bfloat16"
    if s.device.kind == "cuda":
        return "float32", "this GPU has no bfloat16, and full fine-tuning cannot use float16"
    return "float32", "on this CPU products in bfloat16 are not clearly faster than in float32, which rounds less"


def _strategy(s: Settling) -> tuple[Strategy, str]:
    if wished_world(s.wished) == 1:
        return "single", "one device"
    return "ddp", "several devices: a copy of the base on each is the fastest way if it fits"


def _gpus(s: Settling) -> tuple[int, str]:
    gpus = wished_world(s.wished) // s.wished.get("placement.nodes", 1)
    return (
        gpus,
        "one device per host" if gpus == 1 else f"the least that {s.settled['placement.strategy']} makes sense on",
    )


def _longest(s: Settling) -> tuple[int, int, str]:
    """Tokens of the longest row, the most that are kept of a row, and why."""
    longest, mean = (
        row_tokens(s.data.max_characters),
        row_tokens(s.data.mean_characters, per_token=CHARACTERS_PER_TOKEN),
    )
    ceiling, reads = max(2048, 8 * mean), s.facts.max_position_embeddings
    return (longest, reads, "what the base reads") if reads <= ceiling else (longest, ceiling, "8 times the mean row")


def _packing(s: Settling) -> tuple[bool, str]:
    if not s.facts_of_objective.may_pack:
        return False, f"{s.objective.type} compares row by row"
    if s.facts.carries_state is not None:
        return False, f"packed rows would leak into each other through this base's {s.facts.carries_state} layers"
    longest, ceiling, _why = _longest(s)
    longest, limit = min(longest, ceiling), 1024 if s.device.kind == "cpu" else 4096
    if longest > limit and "training.max_length" not in s.wished:
        return False, f"rows of up to about {longest} tokens fill a forward pass by themselves"
    share = s.data.mean_characters / max(1, s.data.max_characters)
    if share < 0.7 or longest <= limit // 2:
        return (
            True,
            f"rows are short or uneven (mean {share:.0%} of the longest): apart they would waste passes on padding",
        )
    return False, f"rows are of like length (mean {share:.0%} of the longest): there is little padding to save"


def _max_length(s: Settling) -> tuple[int, str]:
    reads = s.facts.max_position_embeddings
    if s.data.max_characters == 0:
        return min(1024, reads), "the rows were not measured"
    longest, ceiling, why = _longest(s)
    if longest > ceiling:
        kept = up_to_64(ceiling, most=reads)
        return kept, f"the longest row has about {longest} tokens; capped at {why}, and what is longer is cut"
    packed = {"cpu": 512, "cuda": 2048}[s.device.kind] if s.settled["training.packing"] else 64
    length = up_to_64(max(packed, longest), most=reads)
    room = ", and room for several rows" if packed > longest else ""
    return length, f"the longest row ({s.data.max_characters} characters) has at most about {longest} tokens{room}"


def up_to_64(length: int, *, most: int) -> int:
    return max(8, min(math.ceil(length / 64) * 64, most))


def _epochs(s: Settling) -> tuple[int, str]:
    rows, steps = s.data.train_rows, s.settled["training.max_steps"]
    if steps is not None:
        batch = s.wished.get("training.batch_size", _batch_for(s, epochs=None))
        return min(50, math.ceil(steps / math.ceil(rows / batch))), f"enough for max_steps {steps}"
    if s.scenario is not None:
        low, high = s.scenario.epochs
        return (high, f"preset {s.preset}, below 2,000 rows") if rows < 2000 else (low, f"preset {s.preset}")
    return s.facts_of_objective.epochs_for(rows)


MIN_STEPS: Final = 100


def _batch(s: Settling) -> tuple[int, str]:
    epochs = None if s.settled["training.max_steps"] else s.settled["training.num_train_epochs"]
    size = _batch_for(s, epochs=epochs)
    return (
        size,
        f"0.2 % of {s.data.train_rows} rows, between 8 and 32, less where a run would have under {MIN_STEPS} steps",
    )


def _batch_for(s: Settling, *, epochs: int | None) -> int:
    """Rows per step: a power of two times the micro-batch and the devices, so that it can be halved and shared."""
    unit = max(wished_world(s.wished), s.facts_of_objective.least_batch)
    micro: int | None = s.wished.get("training.per_device_train_batch_size")
    unit = unit if micro is None else math.lcm(unit, micro * wished_world(s.wished))
    wanted = min(32, max(8, round(0.002 * s.data.train_rows)))
    if epochs is not None:
        wanted = min(wanted, max(1, s.data.train_rows * epochs // MIN_STEPS))
    return unit * (1 << max(0, (wanted // unit).bit_length() - 1))


def _learning_rate(s: Settling) -> tuple[float, str]:
    rate, reasons = 2e-4, ["2e-4 at width 4096 and rank 16"]
    if s.scenario is not None:
        rate, reasons = s.scenario.learning_rate, [f"preset {s.preset}"]
    else:
        rate *= min(5.0, max(0.5, (4096 / s.facts.hidden_size) ** 0.781))
        reasons.append(f"width {s.facts.hidden_size}")
        if METHODS[s.method].adapter:
            rate *= min(1.5, max(0.5, math.sqrt(16 / s.settled["adapter.r"])))
            reasons.append(f"rank {s.settled['adapter.r']}")
    factor, objective = METHODS[s.method].learning_rate_factor, s.facts_of_objective
    for scale, reason in (
        (factor, f"method {s.method} takes {factor:g} of LoRA's"),
        (objective.learning_rate_factor, f"{s.objective.type} {objective.learning_rate_reason}"),
        (s.multiplier, f"learning_rate_multiplier {s.multiplier:g}"),
    ):
        rate *= scale
        reasons += [reason] if scale != 1.0 else []
    return float(f"{min(1.0, max(1e-12, rate)):.3g}"), "; ".join(reasons)


def _optim(s: Settling) -> tuple[str, str]:
    method = METHODS[s.method]
    optim = method.optim
    if s.device.kind == "cpu" and METHODS[s.method].adapter:
        return (
            "adamw_torch",
            "a CPU has nothing to page to, and 8-bit moments of a small adapter cost more than they save",
        )
    if method.quantized and s.settled["adapter.modules_to_save"]:
        return "paged_adamw_8bit", "modules_to_save train whole: 8-bit moments, paged to the host when room is needed"
    if optim == "adamw_torch":
        return optim, "an adapter's optimizer state is small: exact moments cost little"
    return optim, "8-bit moments, paged to the host when a long row needs the room"


def _early_stopping(s: Settling) -> tuple[EarlyStopping | None, str]:
    if s.data.validation_rows == 0:
        return None, "no validation file"
    return EarlyStopping(), "ends a run whose validation loss has not fallen for 3 evaluations"


def _publish(s: Settling) -> tuple[str, str]:
    if s.data.validation_rows == 0:
        return "last", "no validation file to compare checkpoints on"
    return "best", "the checkpoint with the lowest validation loss"


def _compute_dtype(s: Settling) -> tuple[Dtype, str]:
    return s.settled["training.dtype"], "as training.dtype"


# Order matters: a rule may read what stands above it. Micro-batch and checkpointing are planned last, by `fit`.
RULES: Final[dict[str, Callable[[Settling], tuple[Any, str]]]] = {
    "adapter.method": _method,
    "adapter.r": _rank,
    "adapter.use_rslora": constant(value=False, reason="matters from rank 64 on"),
    "adapter.lora_alpha": _alpha,
    "adapter.lora_dropout": constant(0.0, "short runs do not need it, and it slows them"),
    "adapter.layers_to_transform": constant(None, "all layers"),
    "adapter.target_modules": _targets,
    "adapter.bias": constant("none", "the adapter can then be switched off exactly"),
    "adapter.init_lora_weights": constant("default", "other starts gain 1 to 2 % once the learning rate is tuned"),
    "adapter.rank_pattern": constant({}, "one rank for all modules"),
    "adapter.alpha_pattern": constant({}, "one alpha for all modules"),
    "adapter.modules_to_save": constant(None, "no module trains whole"),
    "adapter.loraplus_lr_ratio": constant(None, "one learning rate for A and B"),
    "placement.strategy": _strategy,
    "placement.gpus": _gpus,
    "placement.nodes": constant(1, "one host"),
    "placement.allow_cpu": constant(value=False, reason="a job settled for a GPU takes many times as long on a CPU"),
    "training.dtype": _dtype,
    "quantization.load_in_4bit": _four_bit,
    "quantization.load_experts_in_4bit": constant(value=False, reason="experts are used as published where they fit"),
    "quantization.bnb_4bit_quant_type": constant("nf4", "fits normally distributed weights best"),
    "quantization.bnb_4bit_use_double_quant": constant(value=True, reason="saves 0.37 bits per parameter at no loss"),
    "quantization.bnb_4bit_compute_dtype": _compute_dtype,
    "quantization.dequantize": constant(value=False, reason="weights are used as they are published"),
    "training.max_steps": constant(None, "the run ends with its epochs"),
    "training.num_train_epochs": _epochs,
    "training.batch_size": _batch,
    "training.packing": _packing,
    "training.max_length": _max_length,
    "training.learning_rate": _learning_rate,
    "training.lr_scheduler_type": constant("cosine", "falls to zero, so the last checkpoint is a settled one"),
    "training.warmup_ratio": constant(0.03, "the first steps are small"),
    "training.optim": _optim,
    "training.weight_decay": constant(0.0, "a low-rank update needs no further restraint"),
    "training.max_grad_norm": constant(1.0, "tames the odd row"),
    "training.neftune_noise_alpha": constant(None, "no noise"),
    "training.train_on": constant("assistant", "the model learns to answer, not to ask"),
    "training.chat_template": constant(None, "the base model's own"),
    "training.template_time": constant(None, "when the job was created"),
    "training.mask_reasoning": constant(value=False, reason="reasoning is part of the answer"),
    "training.drop_history_reasoning": constant(value=False, reason="rows are trained as they are"),
    "training.system_prompt": constant("keep", "the chat template writes it"),
    "training.special_tokens": constant("text", "what a row says is text"),
    "training.columns": constant(None, "the file's own names"),
    "training.logging_steps": constant(1, "every step"),
    "training.save_steps": constant(None, "a checkpoint per epoch"),
    "training.eval": constant(Evaluation(), "four times a run, on at most 500 rows"),
    "training.early_stopping": _early_stopping,
    "training.publish": _publish,
}
