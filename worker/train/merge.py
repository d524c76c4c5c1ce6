"""Merges an adapter into its base model: `python -m worker.train.merge SPEC OUT`. Same contract as the trainer.

`OUT/product` becomes a plain model directory: safetensors, config, tokenizer, chat template, model card, manifest.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any, Literal

from worker.train import light_start

if __name__ == "__main__":
    light_start.begin()

import torch
from peft import PeftModel
from transformers import AutoConfig, AutoModelForCausalLM

from shared.contract.merge_request import CreateMerge, MergeSpec
from shared.errors import Invalid
from worker.train.base_model import expanding, four_bit, keeps_layout
from worker.train.export import forget_this_host, library_versions
from worker.train.product import make_product
from worker.train.rounding import round_to_4_bits
from worker.train.tokenizer import load_tokenizer


def merge(spec: MergeSpec, folder: Path) -> None:
    """Write the merged model into `folder`.

    Raises:
        Invalid: `merge_impossible`, the weights contain numbers that are not finite afterwards.
    """
    assert isinstance(spec.request, CreateMerge)
    merged = merged_model(spec, onto=spec.request.onto)
    merged.save_pretrained(folder, save_original_format=keeps_layout(spec.job))
    load_tokenizer(spec).save_pretrained(folder)
    forget_this_host(folder / "tokenizer_config.json")
    (folder / "README.md").write_text(_card(spec), encoding="utf-8")
    (folder / "merge_manifest.json").write_text(json.dumps(_manifest(spec), indent=1), encoding="utf-8")


def merged_model(spec: MergeSpec, *, onto: Literal["base", "dequantized"]) -> Any:
    """The base model with the adapter in its weights. Raises Invalid: `merge_impossible`, as above."""
    adapted = PeftModel.from_pretrained(LOADERS[onto](spec), spec.adapter_paths[0], autocast_adapter_dtype=False)
    try:
        return adapted.merge_and_unload(safe_merge=True)
    except ValueError as error:  # what safe_merge raises when it finds NaN
        raise Invalid(f"This adapter cannot be merged: {error}", param="adapter", code="merge_impossible") from error


def _published_base(spec: MergeSpec) -> Any:
    config = AutoConfig.from_pretrained(spec.base_model_path, trust_remote_code=False, local_files_only=True)
    return AutoModelForCausalLM.from_pretrained(
        spec.base_model_path,
        dtype="auto",  # as the weights are stored, bfloat16 as a rule
        quantization_config=expanding(config),
        use_safetensors=True,
        trust_remote_code=False,
        local_files_only=True,
    )


def _dequantized_base(spec: MergeSpec) -> Any:
    """The base as a QLoRA run saw it: rounded to 4 bits and expanded (peft#2105, peft#2321)."""
    model = _published_base(spec)
    round_to_4_bits(model, four_bit(spec.job.quantization))
    return model


LOADERS = {"base": _published_base, "dequantized": _dequantized_base}


def _manifest(spec: MergeSpec) -> dict[str, Any]:
    return {
        "model": spec.name,
        "request": spec.request.model_dump(mode="json"),
        "base_model": spec.job.base_model.model_dump(mode="json"),
        "quantization": spec.job.quantization.model_dump(mode="json"),
        "adapter_config": json.loads(Path(spec.adapter_paths[0], "adapter_config.json").read_text(encoding="utf-8")),
        "libraries": library_versions(),
    }


def _card(spec: MergeSpec) -> str:
    assert isinstance(spec.request, CreateMerge)
    base, quantization = spec.job.base_model, spec.job.quantization
    onto = (
        f"the weights of that revision, rounded to {quantization.bnb_4bit_quant_type} and expanded again"
        if spec.request.onto == "dequantized"
        else "the weights of that revision as published"
    )
    return f"""---
base_model: {json.dumps(base.public_name)}
base_model_relation: merge
library_name: transformers
pipeline_tag: text-generation
---
# {spec.name}

{spec.request.adapter}, merged into {base.public_name} (revision `{base.revision}`): onto {onto}.
`merge_manifest.json` holds the adapter's configuration and the library versions.

```python
from transformers import AutoModelForCausalLM, AutoTokenizer

tokenizer = AutoTokenizer.from_pretrained("PATH")
model = AutoModelForCausalLM.from_pretrained("PATH", dtype="auto")
```
"""


if __name__ == "__main__":
    light_start.end()
    torch.set_grad_enabled(mode=False)
    sys.exit(make_product(merge, spec_file=Path(sys.argv[1]), out=Path(sys.argv[2])))
