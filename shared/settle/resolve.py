"""From what was asked for to what will run: contradictions refused, every open value settled with its reason.

Pure. `check_request` needs no data and runs at submit; `resolve` runs when the rows and the device are known.
The rules stand in `automatic_values.py` and `memory_fit.py`; where they come from: docs/methods.md.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from pydantic import BaseModel

from shared.contract.job_request import CreateJob
from shared.contract.objectives import OBJECTIVES
from shared.contract.parent_model import ParentModel
from shared.contract.spec import (
    Adapter,
    AutoValue,
    BaseModelRef,
    DataFacts,
    JobSpec,
    Parent,
    Placement,
    Quantization,
    Queue,
    Training,
)
from shared.errors import Invalid
from shared.settle import going_on
from shared.settle.automatic_values import RULES
from shared.settle.calibration import Calibration, Measurement
from shared.settle.memory_fit import calibration, fit, peak
from shared.settle.settling import DeviceFacts, Settling
from shared.settle.sizing import Estimate
from shared.settle.wishes import hyperparameters, refuse, wished_objective, wishes
from shared.settle.workload import Workload, workload


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


def resolve(
    request: CreateJob,
    *,
    base: BaseModelRef,
    data: DataFacts,
    device: DeviceFacts,
    seed: int,
    measurements: Sequence[Measurement] = (),
    parent: ParentModel | None = None,
) -> Resolution:
    """Settle every open value of a request that has passed `check_request`.

    Args:
        measurements: of finished jobs, which correct the memory estimate; none: the formula alone.
        parent: the tuned model that the job goes on from.

    Raises:
        Invalid: the rows do not suit the objective, or a choice does not suit the device.
    """
    wished = wishes(request)
    settling = Settling(
        wished=wished,
        facts=base.facts,
        data=data,
        device=device,
        objective=wished_objective(request),
        preset=request.tunepool.preset,
        multiplier=hyperparameters(request).get("learning_rate_multiplier", ("", 1.0))[1],
        measurements=measurements,
        inherited={} if parent is None else going_on.inherited(wished, parent),
        heir_of="" if parent is None else parent.name,
    )
    _check_data(settling)
    descent = None if parent is None else _descend(settling, parent)
    for name, automatic in RULES.items():
        settling.settle(name, automatic)
    _check_device(settling)
    build = _builder(settling, base=base, queue=request.tunepool.queue or Queue(), seed=seed, parent=descent)
    fit(settling, build)
    spec = build()
    work = workload(spec, device=device.kind, memory=device.total_bytes)
    correction = calibration(work, spec=spec, measurements=measurements)
    return Resolution(
        spec=spec,
        auto=tuple(_auto_value(name, settling) for name in settling.reasons),
        bytes_per_device=correction.upper(peak(work).total),
        expected_steps=expected_steps(spec),
        estimate=peak(work),
        calibration=correction,
        work=work,
        fits=correction.upper(peak(work).total) <= device.budget,
    )


def expected_steps(spec: JobSpec) -> int:
    """Optimizer steps of the whole run; rows form steps before they are packed, so packing changes nothing."""
    planned = math.ceil(spec.data.train_rows / spec.training.batch_size) * spec.training.num_train_epochs
    return planned if spec.training.max_steps is None else min(planned, spec.training.max_steps)


def _descend(settling: Settling, parent: ParentModel) -> Parent:
    settling.settle(going_on.INIT_FROM, lambda s: going_on.init_from(s.wished, parent))
    return going_on.as_parent(parent, settling.settled[going_on.INIT_FROM])


def _auto_value(name: str, settling: Settling) -> AutoValue:
    value = settling.settled[name]
    shown = value.model_dump(mode="json") if isinstance(value, BaseModel) else value
    return AutoValue(field=name, value=shown, reason=settling.reasons[name])


def _builder(
    settling: Settling, *, base: BaseModelRef, queue: Queue, seed: int, parent: Parent | None
) -> Callable[[], JobSpec]:
    def build() -> JobSpec:
        return JobSpec(
            base_model=base,
            objective=settling.objective,
            data=settling.data,
            adapter=Adapter(**{name: settling.settled[f"adapter.{name}"] for name in Adapter.model_fields}),
            quantization=Quantization(**settling.part("quantization")),
            training=Training(**settling.part("training")),
            placement=Placement(**settling.part("placement")),
            queue=queue,
            seed=seed,
            parent=parent,
        )

    return build


def _check_data(settling: Settling) -> None:
    objective, row_format = settling.objective.type, settling.data.format
    if row_format not in OBJECTIVES[objective].formats:
        fitting = next(traits for traits in OBJECTIVES.values() if row_format in traits.formats)
        reads = " or ".join(OBJECTIVES[objective].formats)
        why = f"objective {objective} reads {reads} rows; {fitting.remedy}"
        raise Invalid(f"'training_file' has {row_format} rows, but {why}.", param="training_file")
    if row_format == "text" and settling.wished.get("training.chat_template") is not None:
        raise Invalid(
            "'tunepool.training.chat_template' is given, but text rows are read as they are; drop it.",
            param="tunepool.training.chat_template",
        )
    looks = settling.wished.get("training.eval")
    if row_format == "text" and looks is not None and looks.generate is not None:
        raise Invalid(
            "'tunepool.training.eval.generate' is given, but text rows ask nothing that could be answered; drop it.",
            param="tunepool.training.eval.generate",
        )
    for name in ("mask_reasoning", "drop_history_reasoning"):
        asked = settling.wished.get(f"training.{name}")
        if asked and row_format in ("text", "prompt_completion"):
            refuse(
                f"tunepool.training.{name}", asked, f"{row_format} rows have no messages to find reasoning in; drop it"
            )
    if row_format in ("text", "prompt_completion") and settling.wished.get("training.system_prompt") == "merge":
        refuse("tunepool.training.system_prompt", "merge", f"{row_format} rows have no system text; drop it")
    if row_format not in ("text", "prompt_completion") and settling.wished.get("training.special_tokens") == "parse":
        why = f"text of {row_format} rows is text; it is for text and prompt_completion rows, drop it"
        refuse("tunepool.training.special_tokens", "parse", why)


def _check_device(settling: Settling) -> None:
    if settling.device.kind == "cuda":
        return
    if settling.settled["training.dtype"] == "float16":
        refuse("tunepool.training.dtype", "float16", "CPUs have no loss scaling for it; use bfloat16 or float32")
