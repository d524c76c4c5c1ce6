"""Several adapters on one base model: load, switch, scale, disable. Plain transformers and PEFT, nothing of ours."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from peft.helpers import rescale_adapter_scale
from transformers import AutoModelForCausalLM


def load(base: Path, adapters: Mapping[str, Path], *, dtype: torch.dtype) -> Any:
    """The base model once, with every adapter by its name; the first one is active."""
    model = AutoModelForCausalLM.from_pretrained(base, dtype=dtype, local_files_only=True, trust_remote_code=False)
    (first, directory), *others = adapters.items()
    adapted = PeftModel.from_pretrained(model, directory, adapter_name=first)
    for name, place in others:
        adapted.load_adapter(place, adapter_name=name)
    return adapted.eval()


@contextmanager
def using(model: Any, name: str | None, *, scale: float = 1.0) -> Iterator[None]:
    """Answer with adapter `name`, its update multiplied by `scale`; with the base alone for None."""
    if name is None:
        with model.disable_adapter():
            yield
        return
    before = model.active_adapter
    model.set_adapter(name)
    try:
        with rescale_adapter_scale(model, scale):
            yield
    finally:
        model.set_adapter(before)
