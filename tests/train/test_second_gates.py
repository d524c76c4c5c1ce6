"""What the submission has refused does not come to the trainer: it asserts so, and words no refusal of its own."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from shared.contract.families import WHOLE_ONLY
from worker.train.base_model import load_model


def attempt(*, device: str = "cpu", dtype: str = "float32", architecture: str = "LlamaForCausalLM") -> Any:
    facts = SimpleNamespace(architecture=architecture)
    job = SimpleNamespace(training=SimpleNamespace(dtype=dtype), base_model=SimpleNamespace(facts=facts))
    return SimpleNamespace(device=device, job=job)


def test_float16_on_a_cpu_is_no_case_of_the_trainer(tmp_path: Path) -> None:
    with pytest.raises(AssertionError, match="loss scaling"):
        load_model(attempt(dtype="float16"), weights=tmp_path, quantized=False, trains_in_full=False)


def test_four_bits_for_a_family_that_cannot_are_no_case_of_the_trainer(tmp_path: Path) -> None:
    family = attempt(device="cuda", architecture=sorted(WHOLE_ONLY)[0])

    with pytest.raises(AssertionError, match="4-bit"):
        load_model(family, weights=tmp_path, quantized=True, trains_in_full=False)
