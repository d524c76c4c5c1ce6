"""How the next attempt of a job uses less memory, after its trainer ran out of it. Pure."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final

from shared.contract.events import Failed
from shared.contract.passes import PACKED_TOKENS, is_packed
from shared.contract.spec import DeviceKind, JobSpec
from shared.settle.sizing import estimate
from shared.settle.workload import CHARACTERS_PER_TOKEN, workload

# Smaller packs save little: weights, adapter and optimizer stay.
LEAST_TOKENS: Final = 512
# Fields of the training below which there is no less.
LEAST: Final[Mapping[str, Any]] = {
    "per_device_train_batch_size": 1,
    "gradient_checkpointing": True,
    "gradient_checkpointing_layers": None,
}


@dataclass(frozen=True, slots=True)
class MemoryLadderStep:
    """The message to the user, and columns of the job's row."""

    message: str
    next_try: Mapping[str, Any]


def lower(
    spec: JobSpec,
    *,
    kind: DeviceKind,
    micro_batch_size: int,
    gradient_checkpointing: bool,
    pass_tokens: int | None,
    recomputed: int | None = None,
) -> MemoryLadderStep | None:
    """Half the rows of a pass, or half its packed tokens, then recomputed activations; None: there is no less.

    Where some layers recompute theirs, all do first: that gives the most room, and the job was settled to fill it.

    Args:
        pass_tokens: bound of the packed tokens of a pass that an earlier rung has set.
        recomputed: layers that recompute their activations now; None: all, where any does.
    """
    if gradient_checkpointing and recomputed is not None:
        words = f"Out of memory with {recomputed} layers recomputed; trying again with gradient checkpointing of all."
        return MemoryLadderStep(words, {"gradient_checkpointing": True})
    packed = is_packed(spec)
    if micro_batch_size > 1 and not packed:
        half = micro_batch_size // 2
        words = f"Out of memory with {micro_batch_size} rows a pass; trying again with {half}."
        return MemoryLadderStep(words, {"micro_batch_size": half})
    tokens = pass_tokens or min(micro_batch_size * spec.training.max_length, PACKED_TOKENS[kind])
    fewer = max(tokens // 2, _longest_row(spec), LEAST_TOKENS)
    if packed and fewer < tokens:
        words = f"Out of memory with {tokens:,} packed tokens a pass; trying again with {fewer:,}."
        return MemoryLadderStep(words, {"pass_tokens": fewer})
    if not gradient_checkpointing:
        words = "Out of memory with one row a pass; trying again with gradient checkpointing."
        return MemoryLadderStep(words, {"micro_batch_size": 1, "gradient_checkpointing": True})
    return None


def _longest_row(spec: JobSpec) -> int:
    """Tokens of the longest row, about: a row is never parted, so fewer tokens a pass would change nothing."""
    return min(spec.training.max_length, int(spec.data.max_characters / CHARACTERS_PER_TOKEN))


def out_of_room(spec: JobSpec, *, kind: DeviceKind, there: int, failed: Failed | None) -> str:
    """What is said below the last rung, on a device of `there` bytes: what was estimated, what was seen, what helps."""
    smallest = spec.model_copy(update={"training": spec.training.model_copy(update=LEAST)})
    needed = estimate(workload(smallest, device=kind, memory=there)).total
    figures = [f"{needed / 2**30:.1f} GiB were estimated"]
    if failed is not None and failed.peak_memory_bytes is not None:
        figures.append(f"{failed.peak_memory_bytes / 2**30:.1f} GiB were held when it failed")
    return (
        f"Out of memory on a device of {there / 2**30:.1f} GiB with one row a pass and gradient checkpointing:"
        f" {', '.join(figures)}. Lower training.max_length or adapter.r, or use method qlora."
    )
