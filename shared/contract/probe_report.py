"""What the trainer's programs find when they try a device: `worker.train.probe` writes it, the worker reads it."""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel, ConfigDict, Field

# What a CPU trains in.
Arithmetic = Literal["float32", "bfloat16"]

# In the order in which they are tried. The first that fails ends the probe.
Stage = Literal[
    "access",  # the trainers' user may open the driver's files
    "build",  # this PyTorch is made for such devices
    "device",  # it finds one
    "architecture",  # it has machine code for it
    "product",  # a product and its backward are right
    "bfloat16",
    "compiler",  # Triton compiles at run time: a C compiler ...
    "header",  # ... and Python.h
    "triton",  # it builds and runs a kernel
    "quantization",  # bitsandbytes quantizes to 4 bits and back
    "rates",  # how fast a processor multiplies, by type
]


class ProbeSpec(BaseModel):
    """One device, which the environment makes the only one that is seen."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    kind: Literal["cuda", "rocm", "cpu"]
    compiler: str = Field(default="", description="The C compiler that CC names in a trainer's environment.")


class ProbeReport(BaseModel):
    """The results of the stages up to the first one that failed."""

    model_config = ConfigDict(extra="forbid")

    torch: str = Field(max_length=100)
    cuda: str = Field(default="", max_length=40, description="Of the build, such as 13.0; empty: not built for it.")
    hip: str = Field(default="", max_length=100)
    architectures: list[str] = Field(default=[], max_length=200)
    capability: tuple[int, int] | None = None
    bfloat16: bool = False
    rates: dict[Arithmetic, float] = Field(
        default={}, description="GFLOP/s of a training step's product; measured on processors alone."
    )
    passed: list[Stage] = []
    failed: Stage | None = None
    words: str = Field(default="", max_length=1000, description="The last line of what went wrong.")
