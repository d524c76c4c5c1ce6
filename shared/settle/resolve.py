"""From what was asked for to what will run: contradictions refused, every open value settled with its reason.

Pure. `check_request` needs no data and runs at submit; `resolve` runs when the rows and the device are known.
The rules and where they come from: docs/methods.md.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Final

from pydantic import BaseModel

from shared.contract.job_request import CreateJob
from shared.contract.methods import METHODS, method_for
from shared.contract.modules import FAMILIES
from shared.contract.objectives import OBJECTIVES, ObjectiveFacts
from shared.contract.spec import (
    Adapter,
    AutoValue,
    BaseModelRef,
    DataFacts,
    DeviceKind,
    Dtype,
    EarlyStopping,
    Evaluation,
    JobSpec,
    MethodName,
    ModelFacts,
    Objective,
    Placement,
    Preset,
    Quantization,
    Queue,
    Strategy,
    Training,
)
from shared.errors import Invalid
from shared.settle.calibration import Calibration, Measurement, calibrate
from shared.settle.refusals import check_request, refuse
from shared.settle.sizing import Estimate, estimate, estimate_evaluation
from shared.settle.wishes import hyperparameters, wished_objective, wished_world, wishes
from shared.settle.workload import CHARACTERS_PER_TOKEN, Workload, row_tokens, workload

__all__ = ["PRESETS", "DeviceFacts", "Resolution", "check_request", "expected_steps", "resolve"]


@dataclass(frozen=True)
class DeviceFacts:
    """The device (or each of them) that the job will run on. Sizes are bytes."""

    kind: DeviceKind
    total_bytes: int
    free_bytes: int
    bfloat16: bool
    capability: tuple[int, int] | None = None

    @property
    def budget(self) -> int:
        """What a job may use: what is free, less a margin for what the estimate does not know."""
        return int(min(self.free_bytes, self.total_bytes) * 0.92)


@dataclass(frozen=True)
class Resolution:
    """A settled job.

    Attributes:
        bytes_per_device: what the job asks the plan for: nine of ten such jobs need no more than the plan then gives.
        estimate: the formula's terms for `work`, as yet uncorrected by `calibration`.
        fits: whether `bytes_per_device` is within the device's budget.
    """

    spec: JobSpec
    auto: tuple[AutoValue, ...]
    bytes_per_device: int
    expected_steps: int
    estimate: Estimate
    calibration: Calibration
    work: Workload
    fits: bool


@dataclass(frozen=True)
class Scenario:
    """One row of the practice's table: rank, learning rate, epochs (fewest, most)."""

    r: tuple[int, int]
    learning_rate: float
    epochs: tuple[int, int]


PRESETS: Final[dict[Preset, Scenario]] = {
    "prototype": Scenario(r=(8, 8), learning_rate=3e-4, epochs=(1, 2)),
    "general": Scenario(r=(16, 16), learning_rate=2e-4, epochs=(3, 3)),
    "complex": Scenario(r=(32, 64), learning_rate=1e-4, epochs=(3, 5)),
    "large_dataset": Scenario(r=(16, 16), learning_rate=5e-5, epochs=(1, 2)),
}


@dataclass
class _Settling:
    """The values settled so far, and the reasons of those that we chose."""

    wished: Mapping[str, Any]
    facts: ModelFacts
    data: DataFacts
    device: DeviceFacts
    objective: Objective
    preset: Preset | None
    multiplier: float
    measurements: Sequence[Measurement]
    settled: dict[str, Any] = field(default_factory=dict)
    reasons: dict[str, str] = field(default_factory=dict)

    def settle(self, name: str, automatic: Callable[[_Settling], tuple[Any, str]]) -> None:
        if name in self.wished:
            self.settled[name] = self.wished[name]
        else:
            self.settled[name], self.reasons[name] = automatic(self)

    def change(self, name: str, value: Any, reason: str) -> None:
        """Replace a value that was ours to choose."""
        assert name in self.reasons
        self.settled[name], self.reasons[name] = value, reason

    def part(self, part: str) -> dict[str, Any]:
        return {name.split(".")[1]: value for name, value in self.settled.items() if name.startswith(f"{part}.")}

    @property
    def method(self) -> MethodName:
        method: MethodName = self.settled["adapter.method"]
        return method

    @property
    def facts_of_objective(self) -> ObjectiveFacts:
        return OBJECTIVES[self.objective.type]

    @property
    def world(self) -> int:
        gpus: int = self.settled["placement.gpus"]
        nodes: int = self.settled["placement.nodes"]
        return gpus * nodes

    @property
    def scenario(self) -> Scenario | None:
        return None if self.preset is None else PRESETS[self.preset]


def resolve(
    request: CreateJob,
    *,
    base: BaseModelRef,
    data: DataFacts,
    device: DeviceFacts,
    seed: int,
    measurements: Sequence[Measurement] = (),
) -> Resolution:
    """Settle every open value of a request that has passed `check_request`.

    `measurements` of finished jobs correct the memory estimate; none: the formula alone.

    Raises:
        Invalid: the rows do not suit the objective, or a choice does not suit the device.
    """
    settling = _Settling(
        wished=wishes(request),
        facts=base.facts,
        data=data,
        device=device,
        objective=wished_objective(request),
        preset=request.tunepool.preset,
        multiplier=hyperparameters(request).get("learning_rate_multiplier", ("", 1.0))[1],
        measurements=measurements,
    )
    _check_data(settling)
    for name, automatic in _RULES.items():
        settling.settle(name, automatic)
    _check_device(settling)
    build = _builder(settling, base=base, queue=request.tunepool.queue or Queue(), seed=seed)
    _fit(settling, build)
    spec = build()
    work = workload(spec, device=device.kind, memory=device.total_bytes)
    found = calibration(work, spec=spec, measurements=measurements)
    return Resolution(
        spec=spec,
        auto=tuple(_auto_value(name, settling) for name in settling.reasons),
        bytes_per_device=found.admitted(peak(work).total),
        expected_steps=expected_steps(spec),
        estimate=peak(work),
        calibration=found,
        work=work,
        fits=found.admitted(peak(work).total) <= device.budget,
    )


def peak(work: Workload) -> Estimate:
    """The larger of the peaks of training and of validating, which reads the same passes without gradients."""
    return max(estimate(work), estimate_evaluation(work), key=lambda one: one.total)


def calibration(work: Workload, *, spec: JobSpec, measurements: Sequence[Measurement]) -> Calibration:
    """What finished jobs say of the estimate for `work`."""
    return calibrate(
        measurements, base=spec.base_model.name, method=work.method, tokens=work.tokens, device=work.device
    )


def expected_steps(spec: JobSpec) -> int:
    """Optimizer steps of the whole run; rows form steps before they are packed, so packing changes nothing."""
    planned = math.ceil(spec.data.train_rows / spec.training.batch_size) * spec.training.num_train_epochs
    return planned if spec.training.max_steps is None else min(planned, spec.training.max_steps)


def _auto_value(name: str, settling: _Settling) -> AutoValue:
    value = settling.settled[name]
    shown = value.model_dump(mode="json") if isinstance(value, BaseModel) else value
    return AutoValue(field=name, value=shown, reason=settling.reasons[name])


def _builder(settling: _Settling, *, base: BaseModelRef, queue: Queue, seed: int) -> Callable[[], JobSpec]:
    def build() -> JobSpec:
        return JobSpec(
            base_model=base,
            objective=settling.objective,
            data=settling.data,
            adapter=Adapter(**settling.part("adapter")),
            quantization=Quantization(**settling.part("quantization")),
            training=Training(**settling.part("training")),
            placement=Placement(**settling.part("placement")),
            queue=queue,
            seed=seed,
        )

    return build


def _check_data(settling: _Settling) -> None:
    objective, found = settling.objective.type, settling.data.format
    if found not in OBJECTIVES[objective].formats:
        fitting = next(one for one in OBJECTIVES.values() if found in one.formats)
        reads = " or ".join(OBJECTIVES[objective].formats)
        why = f"objective {objective} reads {reads} rows; {fitting.remedy}"
        raise Invalid(f"'training_file' has {found} rows, but {why}.", param="training_file")
    if found == "text" and settling.wished.get("training.chat_template") is not None:
        raise Invalid(
            "'tunepool.training.chat_template' is given, but text rows are read as they are; drop it.",
            param="tunepool.training.chat_template",
        )


def _check_device(settling: _Settling) -> None:
    if settling.device.kind == "cuda":
        return
    if settling.settled["training.dtype"] == "float16":
        refuse("tunepool.training.dtype", "float16", "CPUs have no loss scaling for it; use bfloat16 or float32")
    if settling.settled["adapter.init_lora_weights"] == "loftq":
        refuse("tunepool.adapter.init_lora_weights", "loftq", "PEFT computes it on a GPU only; use default")


# ---- One rule per field. Each returns (value, reason) and may read what the rules above it settled ----


def _constant(value: Any, reason: str) -> Callable[[_Settling], tuple[Any, str]]:
    return lambda _settling: (value, reason)


def _method(s: _Settling) -> tuple[MethodName, str]:
    method = method_for(load_in_4bit=s.wished.get("quantization.load_in_4bit"))
    if METHODS[method].quantized:
        return method, "fits the most devices, and the result does not depend on which of them was free"
    return method, "load_in_4bit is false, so the base stays in 16 bits"


def _rank(s: _Settling) -> tuple[int, str]:
    rows = s.data.train_rows
    if s.scenario is not None:
        low, high = s.scenario.r
        return (high, f"preset {s.preset}, {rows} rows") if rows >= 10_000 else (low, f"preset {s.preset}")
    if rows > 50_000:
        return 64, f"{rows} rows hold more than rank 16 can learn (about 2 bits per trained value)"
    return 16, "enough for up to 50,000 rows; smaller ranks save little"


def _alpha(s: _Settling) -> tuple[int, str]:
    if s.settled["adapter.use_rslora"]:
        return 16, "rsLoRA keeps alpha fixed and scales by alpha/sqrt(r)"
    return s.settled["adapter.r"], "alpha = r: the update is neither enlarged nor reduced"


def _targets(s: _Settling) -> tuple[str | list[str], str]:
    if s.settled["adapter.layers_to_transform"] is not None:
        return list(FAMILIES[s.facts.architecture].linear), "every linear module, by name, as layers_to_transform needs"
    return "all-linear", "adapting attention alone learns less, even at equal size"


def _four_bit(s: _Settling) -> tuple[bool, str]:
    return METHODS[s.method].quantized, f"method {s.method}"


def _dtype(s: _Settling) -> tuple[Dtype, str]:
    if s.device.bfloat16:
        return "bfloat16", "the device computes in bfloat16"
    if s.device.kind == "cuda" and METHODS[s.method].adapter:
        return "float16", "this GPU has no bfloat16"
    if s.device.kind == "cuda":
        return "float32", "this GPU has no bfloat16, and full fine-tuning cannot use float16"
    return "float32", "this CPU only emulates bfloat16: float32 is about 4.5 times faster"


def _strategy(s: _Settling) -> tuple[Strategy, str]:
    if wished_world(s.wished) == 1:
        return "single", "one device"
    return "ddp", "several devices: a copy of the base on each is the fastest way if it fits"


def _gpus(s: _Settling) -> tuple[int, str]:
    gpus = wished_world(s.wished) // s.wished.get("placement.nodes", 1)
    return (
        gpus,
        "one device per host" if gpus == 1 else f"the least that {s.settled['placement.strategy']} makes sense on",
    )


def _longest(s: _Settling) -> tuple[int, int, str]:
    """Tokens of the longest row, the most that are kept of a row, and why."""
    longest, mean = (
        row_tokens(s.data.max_characters),
        row_tokens(s.data.mean_characters, per_token=CHARACTERS_PER_TOKEN),
    )
    ceiling, reads = max(2048, 8 * mean), s.facts.max_position_embeddings
    return (longest, reads, "what the base reads") if reads <= ceiling else (longest, ceiling, "8 times the mean row")


def _packing(s: _Settling) -> tuple[bool, str]:
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


def _max_length(s: _Settling) -> tuple[int, str]:
    reads = s.facts.max_position_embeddings
    if s.data.max_characters == 0:
        return min(1024, reads), "the rows were not measured"
    longest, ceiling, why = _longest(s)
    if longest > ceiling:
        kept = _up_to_64(ceiling, most=reads)
        return kept, f"the longest row has about {longest} tokens; capped at {why}, and what is longer is cut"
    packed = {"cpu": 512, "cuda": 2048}[s.device.kind] if s.settled["training.packing"] else 64
    length = _up_to_64(max(packed, longest), most=reads)
    room = ", and room for several rows" if packed > longest else ""
    return length, f"the longest row ({s.data.max_characters} characters) has at most about {longest} tokens{room}"


def _up_to_64(length: int, *, most: int) -> int:
    return max(8, min(math.ceil(length / 64) * 64, most))


def _epochs(s: _Settling) -> tuple[int, str]:
    rows, steps = s.data.train_rows, s.settled["training.max_steps"]
    if steps is not None:
        batch = s.wished.get("training.batch_size", _batch_for(s, epochs=None))
        return min(50, math.ceil(steps / math.ceil(rows / batch))), f"enough for max_steps {steps}"
    if s.scenario is not None:
        low, high = s.scenario.epochs
        return (high, f"preset {s.preset}, below 2,000 rows") if rows < 2000 else (low, f"preset {s.preset}")
    return s.facts_of_objective.epochs_for(rows)


MIN_STEPS: Final = 100


def _batch(s: _Settling) -> tuple[int, str]:
    epochs = None if s.settled["training.max_steps"] else s.settled["training.num_train_epochs"]
    size = _batch_for(s, epochs=epochs)
    return (
        size,
        f"0.2 % of {s.data.train_rows} rows, between 8 and 32, less where a run would have under {MIN_STEPS} steps",
    )


def _batch_for(s: _Settling, *, epochs: int | None) -> int:
    """Rows per step: a power of two times the micro-batch and the devices, so that it can be halved and shared."""
    unit = max(wished_world(s.wished), s.facts_of_objective.least_batch)
    micro: int | None = s.wished.get("training.per_device_train_batch_size")
    unit = unit if micro is None else math.lcm(unit, micro * wished_world(s.wished))
    wanted = min(32, max(8, round(0.002 * s.data.train_rows)))
    if epochs is not None:
        wanted = min(wanted, max(1, s.data.train_rows * epochs // MIN_STEPS))
    return unit * (1 << max(0, (wanted // unit).bit_length() - 1))


def _learning_rate(s: _Settling) -> tuple[float, str]:
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


def _optim(s: _Settling) -> tuple[str, str]:
    optim = METHODS[s.method].optim
    if s.device.kind == "cpu" and METHODS[s.method].adapter:
        return (
            "adamw_torch",
            "a CPU has nothing to page to, and 8-bit moments of a small adapter cost more than they save",
        )
    if optim == "adamw_torch":
        return optim, "an adapter's optimizer state is small: exact moments cost little"
    return optim, "8-bit moments, paged to the host when a long row needs the room"


def _early_stopping(s: _Settling) -> tuple[EarlyStopping | None, str]:
    if s.data.validation_rows == 0:
        return None, "no validation file"
    return EarlyStopping(), "ends a run whose validation loss has not fallen for 3 evaluations"


def _publish(s: _Settling) -> tuple[str, str]:
    if s.data.validation_rows == 0:
        return "last", "no validation file to compare checkpoints on"
    return "best", "the checkpoint with the lowest validation loss"


def _compute_dtype(s: _Settling) -> tuple[Dtype, str]:
    return s.settled["training.dtype"], "as training.dtype"


# Order matters: a rule may read what stands above it. Micro-batch and checkpointing are planned last, by `_fit`.
_RULES: Final[dict[str, Callable[[_Settling], tuple[Any, str]]]] = {
    "adapter.method": _method,
    "adapter.r": _rank,
    "adapter.use_rslora": _constant(value=False, reason="matters from rank 64 on"),
    "adapter.lora_alpha": _alpha,
    "adapter.lora_dropout": _constant(0.0, "short runs do not need it, and it slows them"),
    "adapter.layers_to_transform": _constant(None, "all layers"),
    "adapter.target_modules": _targets,
    "adapter.bias": _constant("none", "the adapter can then be switched off exactly"),
    "adapter.init_lora_weights": _constant("default", "other starts gain 1 to 2 % once the learning rate is tuned"),
    "adapter.rank_pattern": _constant({}, "one rank for all modules"),
    "adapter.alpha_pattern": _constant({}, "one alpha for all modules"),
    "adapter.modules_to_save": _constant(None, "no module trains whole"),
    "adapter.loraplus_lr_ratio": _constant(None, "one learning rate for A and B"),
    "placement.strategy": _strategy,
    "placement.gpus": _gpus,
    "placement.nodes": _constant(1, "one host"),
    "training.dtype": _dtype,
    "quantization.load_in_4bit": _four_bit,
    "quantization.bnb_4bit_quant_type": _constant("nf4", "fits normally distributed weights best"),
    "quantization.bnb_4bit_use_double_quant": _constant(value=True, reason="saves 0.37 bits per parameter at no loss"),
    "quantization.bnb_4bit_compute_dtype": _compute_dtype,
    "training.max_steps": _constant(None, "the run ends with its epochs"),
    "training.num_train_epochs": _epochs,
    "training.batch_size": _batch,
    "training.packing": _packing,
    "training.max_length": _max_length,
    "training.learning_rate": _learning_rate,
    "training.lr_scheduler_type": _constant("cosine", "falls to zero, so the last checkpoint is a settled one"),
    "training.warmup_ratio": _constant(0.03, "the first steps are small"),
    "training.optim": _optim,
    "training.weight_decay": _constant(0.0, "a low-rank update needs no further restraint"),
    "training.max_grad_norm": _constant(1.0, "tames the odd row"),
    "training.neftune_noise_alpha": _constant(None, "no noise"),
    "training.train_on": _constant("assistant", "the model learns to answer, not to ask"),
    "training.chat_template": _constant(None, "the base model's own"),
    "training.logging_steps": _constant(1, "every step"),
    "training.save_steps": _constant(None, "a checkpoint per epoch"),
    "training.eval": _constant(Evaluation(), "four times a run, on at most 500 rows"),
    "training.early_stopping": _early_stopping,
    "training.publish": _publish,
}


# ---- Micro-batch, checkpointing, and at last length: what fits ----

# Tokens in one forward pass beyond which larger passes bring nothing; on a CPU they fall out of its caches.
_FULL_PASS_TOKENS: Final = {"cuda": 16_384, "cpu": 1024}


def _fit(settling: _Settling, build: Callable[[], JobSpec]) -> None:
    """Settle micro-batch and checkpointing as the fastest that fits; shorten rows only if nothing else does."""
    micro, checkpointing = "training.per_device_train_batch_size", "training.gradient_checkpointing"
    settling.settle(micro, _constant(1, ""))
    settling.settle(checkpointing, _constant(value=False, reason=""))
    while not _fits_somehow(settling, build) and _shorten(settling):
        pass
    size = "within" if _bytes(settling, build) <= settling.device.budget else "more than"
    room = (
        f"{_bytes(settling, build) / 1e9:.1f} GB, {size} the {settling.device.budget / 1e9:.1f} GB to use"
        f" ({_sure(settling, build)})"
    )
    if micro in settling.reasons:
        settling.change(micro, settling.settled[micro], f"{_micro_reason(settling)}: {room}")
    if checkpointing in settling.reasons:
        needed = (
            "needed: it would not fit otherwise"
            if settling.settled[checkpointing]
            else "not needed, and it costs a third"
        )
        settling.change(checkpointing, settling.settled[checkpointing], f"{needed}: {room}")


def _micro_reason(settling: _Settling) -> str:
    if settling.settled["training.packing"]:
        return "one packed sequence per pass, as attention masks grow with its square"
    return "the largest useful pass that fits"


def _fits_somehow(settling: _Settling, build: Callable[[], JobSpec]) -> bool:
    """Try without checkpointing first, larger micro-batches first; leave the last one tried in place."""
    micro, checkpointing = "training.per_device_train_batch_size", "training.gradient_checkpointing"
    for recompute in (False, True) if checkpointing in settling.reasons else (settling.settled[checkpointing],):
        for rows in _micro_batches(settling) if micro in settling.reasons else (settling.settled[micro],):
            settling.settled |= {micro: rows, checkpointing: recompute}
            if _bytes(settling, build) <= settling.device.budget:
                return True
    return False


def _bytes(settling: _Settling, build: Callable[[], JobSpec]) -> int:
    spec = build()
    work = workload(spec, device=settling.device.kind, memory=settling.device.total_bytes)
    return calibration(work, spec=spec, measurements=settling.measurements).admitted(peak(work).total)


def _sure(settling: _Settling, build: Callable[[], JobSpec]) -> str:
    spec = build()
    work = workload(spec, device=settling.device.kind, memory=settling.device.total_bytes)
    return calibration(work, spec=spec, measurements=settling.measurements).sure


def _micro_batches(settling: _Settling) -> list[int]:
    """Divisors of a device's share of a step, largest first, that do not exceed a full pass."""
    share = max(1, settling.settled["training.batch_size"] // settling.world)
    if settling.settled["training.packing"]:
        return [1]
    mean = row_tokens(settling.data.mean_characters, per_token=CHARACTERS_PER_TOKEN)
    typical = min(mean, settling.settled["training.max_length"])
    most = max(1, _FULL_PASS_TOKENS[settling.device.kind] // typical)
    return [rows for rows in range(share, 0, -1) if share % rows == 0 and rows <= most]


def _shorten(settling: _Settling) -> bool:
    """Halve an automatic max_length, down to 512; False when that is no longer ours to do."""
    name = "training.max_length"
    length = settling.settled[name]
    if name not in settling.reasons or length <= 512:
        return False
    shorter = _up_to_64(length // 2, most=settling.facts.max_position_embeddings)
    settling.change(name, max(512, shorter), "shortened to fit the device's memory; longer rows are cut")
    return True
