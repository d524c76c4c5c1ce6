"""Micro-batch, checkpointing and at last length: the fastest choice whose estimated memory fits the device. Pure."""

from __future__ import annotations

import math
from bisect import bisect_left
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import Any, Final

from shared.contract.methods import METHODS
from shared.contract.passes import PACKED_TOKENS
from shared.contract.spec import JobSpec
from shared.settle.automatic_values import constant, up_to_64
from shared.settle.calibration import Calibration, Measurement, calibrate
from shared.settle.durations import own_passes
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


# A pass costs as much beside its tokens as so many tokens more: weights are read and expanded, kernels are started.
# Computed for 4-bit weights of 8B on an RTX 4090 (190) and an H100 (258).
_PASS_TOKENS: Final = 256

_EXPERTS: Final = "quantization.load_experts_in_4bit"
_MICRO: Final = "training.per_device_train_batch_size"
_CHECKPOINTING: Final = "training.gradient_checkpointing"
_LAYERS: Final = "training.gradient_checkpointing_layers"


def fit(settling: Settling, build: Callable[[], JobSpec]) -> None:
    """Settle micro-batch and checkpointing as the fastest that fits.

    If nothing does, experts go into 4 bits, then the base is spread over the devices, and rows are shortened last.
    """
    settling.settle(_MICRO, constant(1, ""))
    settling.settle(_LAYERS, constant(None, "all layers"))
    named = settling.settled[_LAYERS] is not None
    settling.settle(_CHECKPOINTING, constant(named, f"{_LAYERS.rpartition('.')[2]} is given"))
    while not _fits_somehow(settling, build) and (_pack_experts(settling) or _spread(settling) or _shorten(settling)):
        pass
    size = "within" if _bytes(settling, build) <= settling.device.budget else "more than"
    room = (
        f"{_bytes(settling, build) / GIB:.1f} GiB, {size} the {settling.device.budget / GIB:.1f} GiB to use"
        f" ({_sure(settling, build)})"
    )
    if _MICRO in settling.reasons:
        settling.change(_MICRO, settling.settled[_MICRO], f"{_micro_reason(settling)}: {room}")
    if _CHECKPOINTING in settling.reasons and _is_open(settling):
        settling.change(_CHECKPOINTING, settling.settled[_CHECKPOINTING], f"{_recomputing_reason(settling)}: {room}")
    if _LAYERS in settling.reasons and settling.settled[_LAYERS] is not None:
        settling.change(_LAYERS, settling.settled[_LAYERS], "the fewest that leave room for the others' activations")


def _is_open(settling: Settling) -> bool:
    """Whether it is ours to say how many layers are recomputed."""
    return _CHECKPOINTING in settling.reasons and settling.wished.get(_LAYERS) is None


def _recomputing_reason(settling: Settling) -> str:
    layers, every = settling.settled[_LAYERS], settling.facts.num_hidden_layers
    if not settling.settled[_CHECKPOINTING]:
        return "not needed, and it costs a third"
    return "needed: it would not fit otherwise" if layers is None else f"needed for {layers} of {every} layers"


def _micro_reason(settling: Settling) -> str:
    if not settling.settled["training.packing"]:
        return "the fastest pass that fits"
    length = settling.settled["training.max_length"]
    tokens = settling.settled["training.per_device_train_batch_size"] * length
    return f"packed passes of up to {tokens:,} tokens"


def _fits_somehow(settling: Settling, build: Callable[[], JobSpec]) -> bool:
    """Leave the fastest pass in place that fits, or the smallest, if none does."""
    choices = list(_choices(settling, build))
    if choices:
        rows, layers = min(choices, key=lambda choice: _cost(settling, *choice))
        settling.settled |= _laid_out(settling, rows, layers)
        return True
    every = settling.facts.num_hidden_layers
    smallest = [*_micro_batches(settling)][-1] if _MICRO in settling.reasons else settling.settled[_MICRO]
    settling.settled |= _laid_out(settling, smallest, every if _is_open(settling) else None)
    return False


def _choices(settling: Settling, build: Callable[[], JobSpec]) -> Iterator[tuple[int, int | None]]:
    """Rows of a pass that fit, larger ones first, each with the fewest recomputed layers that make it fit.

    The layers are None where they are not ours to choose.
    """
    every = settling.facts.num_hidden_layers
    for rows in _micro_batches(settling) if _MICRO in settling.reasons else (settling.settled[_MICRO],):
        if not _is_open(settling):
            settling.settled |= _laid_out(settling, rows, None)
            if _bytes(settling, build) <= settling.device.budget:
                yield rows, None
            continue
        settling.settled |= _laid_out(settling, rows, every)
        work, correction = _estimated(settling, build)

        def fits(layers: int, work: Workload = work, correction: Calibration = correction) -> bool:
            return correction.upper(peak(_recomputing(work, layers)).total) <= settling.device.budget

        fewest = bisect_left(range(every + 1), x=True, key=fits)
        if fewest <= every:
            yield rows, fewest if _LAYERS in settling.reasons or fewest == 0 else every


def _recomputing(work: Workload, layers: int) -> Workload:
    return replace(work, gradient_checkpointing=layers > 0, recomputed=layers or None)


def _laid_out(settling: Settling, rows: int, layers: int | None) -> dict[str, Any]:
    """What is settled for passes of so many rows, with so many layers recomputed; None: as it is."""
    if layers is None:
        return {_MICRO: rows}
    every = settling.facts.num_hidden_layers
    return {_MICRO: rows, _CHECKPOINTING: layers > 0, _LAYERS: layers if 0 < layers < every else None}


def _cost(settling: Settling, rows: int, layers: int | None) -> float:
    """Time for a token, in that of a long pass without recomputing. Of equals the one that is named first wins."""
    again = (layers or 0) / settling.facts.num_hidden_layers / own_passes(settling.method)
    return (1 + again) * (1 + _PASS_TOKENS / (rows * _tokens_of_row(settling)))


def _bytes(settling: Settling, build: Callable[[], JobSpec]) -> int:
    work, correction = _estimated(settling, build)
    return correction.upper(peak(work).total)


def _sure(settling: Settling, build: Callable[[], JobSpec]) -> str:
    return _estimated(settling, build)[1].sure


def _estimated(settling: Settling, build: Callable[[], JobSpec]) -> tuple[Workload, Calibration]:
    spec = build()
    work = workload(spec, device=settling.device.kind, memory=settling.device.total_bytes)
    return work, calibration(work, spec=spec, measurements=settling.measurements)


def _micro_batches(settling: Settling) -> list[int]:
    """Divisors of a device's share of a step, largest first, that do not exceed a full pass.

    Packed, a row stands for max_length tokens: as many as hold the share, however they are spread over its rows. On a
    CPU one: larger packs cost memory and bring little.
    """
    share = max(1, settling.settled["training.batch_size"] // settling.world)
    kind, length = settling.device.kind, settling.settled["training.max_length"]
    typical = _typical_row(settling)
    if settling.settled["training.packing"] and kind == "cpu":
        return [1]
    if settling.settled["training.packing"]:
        most = min(PACKED_TOKENS[kind] // length, math.ceil(share * typical / length))
    else:
        most = _FULL_PASS_TOKENS[kind] // typical
    return [rows for rows in range(share, 0, -1) if share % rows == 0 and rows <= max(1, most)]


def _typical_row(settling: Settling) -> int:
    mean = row_tokens(settling.data.mean_characters, per_token=CHARACTERS_PER_TOKEN)
    longest: int = settling.settled["training.max_length"]
    return min(mean, longest)


def _tokens_of_row(settling: Settling) -> int:
    """Tokens that a row adds to a pass: packed, all that it has room for."""
    if settling.settled["training.packing"]:
        length: int = settling.settled["training.max_length"]
        return length
    return _typical_row(settling) * settling.facts_of_objective.sequences


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
