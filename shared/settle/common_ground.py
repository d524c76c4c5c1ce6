"""The ground of a settled job: whatever it can share with others in one training process. Pure.

Two jobs with the same ground, on one device, pass `reason_not_together`: all that must be equal there follows from the
ground and the device. One word of it is another ground, so what an older version wrote is shared with no newer job.
"""

from __future__ import annotations

import hashlib

from shared.contract.cotraining import reason_for_a_job_alone
from shared.contract.methods import METHODS
from shared.plan.companions import CommonGround
from shared.settle.resolve import Resolution
from shared.settle.workload import keeps_copy

# Terms of an estimate that a process holds once, however many adapters train on its base. A 16-bit copy of 4-bit
# weights belongs to each job's own layers.
_ONCE = ("process", "weights", "experts in 4 bits", "experts in 16 bits", "experts in 32 bits")
_EVERYWHERE = 2**62  # bytes: a device on which any copy would fit


def ground(settled: Resolution) -> CommonGround | None:
    """What the job shares with others on its device; None: it trains alone."""
    spec, terms = settled.spec, settled.estimate.terms
    if reason_for_a_job_alone(spec) is not None:
        return None
    base, quantized = spec.base_model, METHODS[spec.adapter.method].quantized
    equal = (
        *(
            base.name,
            base.source,
            base.revision,
            str(quantized),
            spec.quantization.model_dump_json(),
            spec.training.dtype,
        ),
        str(keeps_copy(spec, device="cpu", memory=_EVERYWHERE)),
    )
    words = f"{base.name} {hashlib.sha256(repr(equal).encode()).hexdigest()[:16]}"
    once = sum(terms.get(term, 0) for term in _ONCE)
    # Of a job that asks for less than the formula says, as measured, the base is so much smaller, too.
    asked = min(1.0, settled.bytes_per_device / settled.estimate.total)
    return CommonGround(words, int(once * asked))
