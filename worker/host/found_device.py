"""A device as its host shows it now."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Kind = Literal["cuda", "rocm", "cpu"]


@dataclass(frozen=True, slots=True)
class FoundDevice:
    """Sizes are bytes. `free_bytes` is what a job can have once our own trainers there have ended."""

    uuid: str
    kind: Kind
    name: str
    total_bytes: int
    free_bytes: int
    foreign_bytes: int
    bfloat16: bool  # its products are clearly faster than in float32 (a CPU), or it has them (a GPU)
    ailment: str | None = None  # why it must not be used
    cores: int | None = None  # of a CPU slot
    capability: int | None = None  # NVIDIA's compute capability: 80 is 8.0
    readings: dict[str, float] | None = None  # utilization (of 1), watts, celsius, as far as the GPU tells
    probed: str | None = None  # what the trainer's own program found there (worker/host/probing.py)

    @property
    def healthy(self) -> bool:
        return self.ailment is None
