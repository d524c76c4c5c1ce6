"""Several adapters on one base model: load, switch, scale, disable. Plain transformers and PEFT, nothing of ours."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from bitsandbytes.nn import Linear4bit
from peft import PeftModel
from peft.helpers import rescale_adapter_scale
from transformers import AutoModelForCausalLM, BitsAndBytesConfig


def load(
    base: Path,
    adapters: Mapping[str, Path],
    *,
    dtype: torch.dtype,
    four_bit: BitsAndBytesConfig | None = None,
    unpacked: bool = False,
) -> Any:
    """The base model once, with every adapter by its name; the first one is active.

    `four_bit`: as `quantization_of` tells it. A QLoRA adapter was trained on the base rounded to four bits and corrects
    that rounding too: only on such a base it is what its job has validated. `unpacked`: the weights stay rounded, but
    lie in `dtype`: four to eight times the memory, and no work to unpack them for each token.
    """
    model = AutoModelForCausalLM.from_pretrained(
        base, dtype=dtype, quantization_config=four_bit, local_files_only=True, trust_remote_code=False
    )
    if unpacked and four_bit is not None:
        model = model.dequantize(dtype=dtype)
    (first, directory), *others = adapters.items()
    adapted = PeftModel.from_pretrained(model, directory, adapter_name=first)
    for name, place in others:
        adapted.load_adapter(place, adapter_name=name)
    if any(config.use_dora for config in adapted.peft_config.values()):
        keep_layout(adapted)
    return adapted.eval()


def keep_layout(model: torch.nn.Module) -> None:
    """Have 4-bit weights stay as they were loaded, for DoRA, which reads them for its norms.

    On CPUs with AVX512-BF16 bitsandbytes (0.50) rearranges them in place at the first answer, and `dequantize_4bit`
    does not know: the norms would be noise, and so would every answer. Plain LoRA never reads them, and is faster so.
    """
    for module in model.modules():
        if isinstance(module, Linear4bit):
            module.support_avx512bf16_for_cpu = False


def quantization_of(adapter: Path) -> BitsAndBytesConfig | None:
    """How the base was stored while this adapter was trained, from its run manifest; None: in 16 bits or more."""
    spec = json.loads((adapter / "run_manifest.json").read_text(encoding="utf-8"))["spec"]
    if spec["adapter"]["method"] not in ("qlora", "qdora"):
        return None
    settings = dict(spec["quantization"])
    compute = getattr(torch, settings.pop("bnb_4bit_compute_dtype"))
    return BitsAndBytesConfig(**settings, bnb_4bit_compute_dtype=compute)


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
