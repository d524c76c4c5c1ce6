"""Turn one GGUF file into a plain model directory: `python -m worker.train.convert_gguf GGUF_FILE OUT_DIR`.

For base models that are published only quantised; the weights are dequantised once and kept as safetensors.
"""

from __future__ import annotations

import sys
from pathlib import Path

from worker.train import light_start

if __name__ == "__main__":
    light_start.begin()

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig


def convert(gguf: Path, *, out: Path) -> None:
    """Write `out/` with model.safetensors (bfloat16), config, tokenizer and chat template; atomic by rename.

    Raises:
        OSError: the file is no GGUF file, or of an architecture that transformers cannot read.
    """
    source = {"gguf_file": gguf.name, "trust_remote_code": False, "local_files_only": True}
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


if __name__ == "__main__":
    light_start.end()
    convert(Path(sys.argv[1]), out=Path(sys.argv[2]))
