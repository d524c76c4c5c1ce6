"""Micro-batch, checkpointing and at last length: the fastest choice whose estimated memory fits the device. Pure."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Final

from shared.contract.methods import METHODS
from shared.contract.passes import PACKED_TOKENS
from shared.contract.spec import JobSpec
from shared.settle.automatic_values import constant, up_to_64
from shared.settle.calibration import Calibration, Measurement, calibrate
from shared.settle.expert_sizes import may_pack_experts
from shared.settle.settling import Settling
from shared.settle.sizing import GIB, Estimate, estimate, estimate_evaluation
from shared.settle.workload import CHARACTERS_PER_TOKEN, Workload, row_tokens, workload


def peak(work: Workload) -> Estimate:
    """The larger of the peaks of training and of validating, which reads the same passes without gradients."""
    return max(estimate(work), estimate_evaluation(work), key=lambda memory: memory.total)


def calibration(work: Workload, *, spec: JobSpec, measurements: Sequence[Measurement]) -> Calibration:
    """What finished jobs say of the estimate for `work`."""
    return calibrate(
        measurements, base=spec.base_model.name, method=work.method, tokens=work.tokens, device=work.device
    )


# Tokens in one forward pass of padded rows beyond which larger passes bring nothing; on a CPU they fall out of its
# caches.
_FULL_PASS_TOKENS: Final = {"cuda": 16_384, "cpu": 1024}


_EXPERTS: Final = "quantization.load_experts_in_4bit"


def fit(settling: Settling, build: Callable[[], JobSpec]) -> None:
    """Settle micro-batch and checkpointing as the fastest that fits.

    If nothing does, experts go into 4 bits, then the base is spread over the devices, and rows are shortened last.
    """
    micro, checkpointing = "training.per_device_train_batch_size", "training.gradient_checkpointing"
    settling.settle(micro, constant(1, ""))
    settling.settle(checkpointing, constant(value=False, reason=""))
    while not _fits_somehow(settling, build) and (_pack_experts(settling) or _spread(settling) or _shorten(settling)):
        pass
    size = "within" if _bytes(settling, build) <= settling.device.budget else "more than"
    room = (
        f"{_bytes(settling, build) / GIB:.1f} GiB, {size} the {settling.device.budget / GIB:.1f} GiB to use"
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


def _micro_reason(settling: Settling) -> str:
    if not settling.settled["training.packing"]:
        return "the largest useful pass that fits"
    length = settling.settled["training.max_length"]
    tokens = settling.settled["training.per_device_train_batch_size"] * length
    return f"packed passes of up to {tokens:,} tokens"


def _fits_somehow(settling: Settling, build: Callable[[], JobSpec]) -> bool:
    """Try without checkpointing first, larger micro-batches first; leave the last one tried in place."""
    micro, checkpointing = "training.per_device_train_batch_size", "training.gradient_checkpointing"
    for recompute in (False, True) if checkpointing in settling.reasons else (settling.settled[checkpointing],):
        for rows in _micro_batches(settling) if micro in settling.reasons else (settling.settled[micro],):
            settling.settled |= {micro: rows, checkpointing: recompute}
            if _bytes(settling, build) <= settling.device.budget:
                return True
    return False


def _bytes(settling: Settling, build: Callable[[], JobSpec]) -> int:
    spec = build()
    work = workload(spec, device=settling.device.kind, memory=settling.device.total_bytes)
    return calibration(work, spec=spec, measurements=settling.measurements).upper(peak(work).total)


def _sure(settling: Settling, build: Callable[[], JobSpec]) -> str:
    spec = build()
    work = workload(spec, device=settling.device.kind, memory=settling.device.total_bytes)
    return calibration(work, spec=spec, measurements=settling.measurements).sure


def _micro_batches(settling: Settling) -> list[int]:
    """Divisors of a device's share of a step, largest first, that do not exceed a full pass.

    Packed, a row stands for max_length tokens: as many as hold the share, however they are spread over its rows. On a
    CPU one: larger packs cost memory and bring little.
    """
    share = max(1, settling.settled["training.batch_size"] // settling.world)
    kind, length = settling.device.kind, settling.settled["training.max_length"]
    mean = row_tokens(settling.data.mean_characters, per_token=CHARACTERS_PER_TOKEN)
    typical = min(mean, length)
    if settling.settled["training.packing"] and kind == "cpu":
        return [1]
    if settling.settled["training.packing"]:
        most = min(PACKED_TOKENS[kind] // length, math.ceil(share * typical / length))
    else:
        most = _FULL_PASS_TOKENS[kind] // typical
    return [rows for rows in range(share, 0, -1) if share % rows == 0 and rows <= max(1, most)]


def _pack_experts(settling: Settling) -> bool:
    """Have the experts of a 4-bit base in 4 bits too; False when that is not ours to do, or done already."""
    ours = _EXPERTS in settling.reasons and not settling.settled[_EXPERTS]
    whole = settling.settled["adapter.target_modules"] == "experts" or settling.settled["placement.strategy"] == "fsdp"
    if not ours or whole or not may_pack_experts(settling.facts) or not METHODS[settling.method].quantized:
        return False
    settling.change(_EXPERTS, value=True, reason="in 16 bits the experts do not fit the device")
    return True


def _spread(settling: Settling) -> bool:
    """Change an automatic ddp to fsdp, where the method can; False when that is not ours to do, or done already."""
    name = "placement.strategy"
    method = METHODS[settling.method]
    ours = name in settling.reasons and settling.settled[name] == "ddp"
    if not ours or not method.adapter or method.magnitude:  # DoRA reads whole matrices, full has nothing frozen
        return False
    if settling.settled[_EXPERTS]:
        if _EXPERTS not in settling.reasons:
            return False
        settling.change(_EXPERTS, value=False, reason="fsdp spreads experts as they are published")
    settling.change(name, "fsdp", "a copy of the base does not fit each device, so it is spread over them")
    return True


def _shorten(settling: Settling) -> bool:
    """Halve an automatic max_length, down to 512; False when that is no longer ours to do."""
    name = "training.max_length"
    length = settling.settled[name]
    if name not in settling.reasons or length <= 512:
        return False
    shorter = up_to_64(length // 2, most=settling.facts.max_position_embeddings)
    settling.change(name, max(512, shorter), "shortened to fit the device's memory; longer rows are cut")
    return True
