"""Jobs that train together on one base in memory: the file that `worker.train.together` is started with, and who may.

Pure. Trainees share frozen weights and a process, and nothing else: what one trainee trains must be its own. So a job
that writes into the base itself trains alone.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any, Final, Literal

from pydantic import Field

from shared.contract.methods import METHODS
from shared.contract.part import Part
from shared.contract.spec import AttemptSpec, JobSpec

MOST_TRAINEES: Final = 64
# Under the trainee's own folder; see docs/trainer.md.
END_FILE: Final = "end.json"

# It becomes the name of a folder, beside files of the process.
_JOB_ID: Final = re.compile(r"ftjob-[A-Za-z0-9_-]{1,80}")
# These starts take directions out of the base's weights and give them to the adapter.
_INITS_THAT_MOVE_THE_BASE: Final = ("pissa", "olora")


class CotrainingSpec(Part):
    """The file of a co-training: attempts on one host and one base."""

    version: Literal[1] = 1
    trainees: list[AttemptSpec] = Field(min_length=1, max_length=MOST_TRAINEES)
    outs: dict[str, str] = Field(
        default_factory=dict, description="Job id -> that trainee's own OUT; one that is not named has OUT/JOB_ID."
    )
    memory_limit_bytes: int | None = Field(
        default=None, ge=1, description="Of the whole process; limits of the trainees do not count. null: no limit."
    )


class TraineeEnd(Part):
    """`OUT/JOB_ID/end.json`: written last, in one piece. A trainee without it ended with the process."""

    code: int = Field(description="What the trainer would have exited with alone.")
    device_seconds: float = Field(ge=0.0, description="Of its own turns: rows and adapter, steps, looks, product.")


def reason_for_a_job_alone(job: JobSpec) -> str | None:
    """Why this job shares no base, wherever it runs; None: it may."""
    adapter = job.adapter
    reasons = {
        "every weight of its base trains": not METHODS[adapter.method].adapter,
        "it trains the base's biases": adapter.bias != "none",
        "it trains modules of the base": bool(adapter.modules_to_save),
        "its adapter stands in the base's own tensors": adapter.target_modules == "experts",
        "its start moves a part of the base into the adapter": adapter.init_lora_weights in _INITS_THAT_MOVE_THE_BASE,
        "it goes on from a tuned model": job.parent is not None,
        "it trains on several devices": job.placement.strategy != "single",
    }
    return next((reason for reason, holds in reasons.items() if holds), None)


def reason_to_train_alone(spec: AttemptSpec) -> str | None:
    """Why this attempt shares no base; None: it may."""
    if (reason := reason_for_a_job_alone(spec.job)) is not None:
        return reason
    return "its id is no job's" if _JOB_ID.fullmatch(spec.job_id) is None else None


def reason_not_together(trainees: Sequence[AttemptSpec]) -> str | None:
    """Why these attempts cannot share one base; None: they can."""
    for trainee in trainees:
        if (reason := reason_to_train_alone(trainee)) is not None:
            return f"{trainee.job_id}: {reason}"
    if len({trainee.job_id for trainee in trainees}) < len(trainees):
        return "a job is named twice"
    first = _ground(trainees[0])
    for trainee in trainees[1:]:
        unlike = [name for name, value in _ground(trainee).items() if value != first[name]]
        if unlike:
            return f"{trainee.job_id} and {trainees[0].job_id} differ in {', '.join(unlike)}"
    return None


def _ground(spec: AttemptSpec) -> dict[str, Any]:
    """What the trainees have in common: the base as it lies in memory, and the process."""
    return {
        "base model": (spec.base_model_path, spec.job.base_model.revision),
        "method's storage": METHODS[spec.job.adapter.method].quantized,
        "quantization": spec.job.quantization,
        "dtype": spec.job.training.dtype,
        "device": spec.device,
        "threads": spec.cpu_threads,
        "kept weights": spec.keep_dequantized,
    }
