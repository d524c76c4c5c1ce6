"""A base model quantised beforehand: the orders of the program that makes it, and of the spare that holds it."""

from __future__ import annotations

from typing import Final

from pydantic import Field

from shared.contract.part import Part
from shared.contract.spec import Dtype, Quantization

# The folder of the model that a program of this kind leaves in OUT.
MADE: Final = "prepared"


class PrepareSpec(Part):
    """The file `python -m worker.train.prepare_base` is started with."""

    base_model_path: str
    dtype: Dtype = Field(description="Of the weights that are not quantised: `training.dtype` of the jobs it is for.")
    quantization: Quantization
    marks: str = Field(default="", description="How the base's files looked to who asked, for who takes the result.")
    cpu_threads: int = Field(default=1, ge=1)


class HeldBase(Part):
    """The file with which a spare is told to hold a base model in memory before it has work."""

    base_model_path: str
    prepared_path: str = Field(description="As in a trainer's spec: who gets the same path gets the model from memory.")
    dtype: Dtype
