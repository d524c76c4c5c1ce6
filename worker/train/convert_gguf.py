"""Turn one GGUF file into a plain model directory: `python -m worker.train.convert_gguf GGUF_FILE OUT_DIR`.

For base models that are published only quantised; the weights are dequantised once and kept as safetensors.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Final

from worker.train import light_start

if __name__ == "__main__":
    light_start.begin()

import gguf as gguf_format
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

MADE_ONCE: Final = ("GGUFReader", "get_tensor_name_map")


def convert(gguf: Path, *, out: Path) -> None:
    """Write `out/` with model.safetensors (bfloat16), config, tokenizer and chat template; atomic by rename.

    Raises:
        OSError: the file is no GGUF file, or of an architecture that transformers cannot read.
    """
    source = {"gguf_file": gguf.name, "trust_remote_code": False, "local_files_only": True}
    with read_once():
        model = AutoModelForCausalLM.from_pretrained(
            gguf.parent, quantization_config=GgufConfig(dequantize=True), dtype=torch.bfloat16, **source
        )
        tokenizer = AutoTokenizer.from_pretrained(gguf.parent, **source)
    unfinished = out.with_name(out.name + ".tmp")
    # A dequantised model still carries the marker of its file; a saved directory must read as a plain model.
    for holder in (model, model.config):
        if hasattr(holder, "quantization_config"):
            del holder.quantization_config
    model.save_pretrained(unfinished)
    tokenizer.save_pretrained(unfinished)
    unfinished.rename(out)


@contextmanager
def read_once() -> Iterator[None]:
    """Have transformers take a file apart once, and make the table of an architecture's names once.

    It does the first for the config, the weights and the tokenizer each, and the second for each module of the model:
    more than half of a conversion. Both only read what they get.
    """
    originals = {name: getattr(gguf_format, name) for name in MADE_ONCE}
    try:
        for name, original in originals.items():
            setattr(gguf_format, name, cache(original))
        yield
    finally:
        for name, original in originals.items():
            setattr(gguf_format, name, original)


if __name__ == "__main__":
    light_start.end()
    convert(Path(sys.argv[1]), out=Path(sys.argv[2]))
