"""Makes one adapter of several on one base: `python -m worker.train.combine SPEC OUT`. Same contract as the trainer.

`OUT/product` becomes a plain PEFT directory. The arithmetic is PEFT's `add_weighted_adapter`.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

from worker.train import light_start

if __name__ == "__main__":
    light_start.begin()

import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, set_seed

from shared.contract.merge_request import CreateCombination, MergeSpec
from shared.errors import Invalid
from worker.train.export import forget_this_host, library_versions, name_the_base
from worker.train.product import make_product
from worker.train.tokenizer import load_tokenizer

COMBINED = "combined"


def combine(spec: MergeSpec, folder: Path) -> None:
    """Write the combined adapter into `folder`.

    Raises:
        Invalid: `combination_impossible`, PEFT refuses (different ranks, incompatible modules …).
    """
    request = spec.request
    assert isinstance(request, CreateCombination)
    set_seed(request.seed)  # dare drops at random
    model = _with_all_adapters(spec)
    names = list(model.peft_config)
    # PEFT copies the first configuration and sets lora_alpha = r, which means a scale of 1 in plain LoRA only.
    model.peft_config[names[0]].use_rslora = False
    try:
        model.add_weighted_adapter(
            adapters=names,
            weights=[part.weight for part in request.adapters],
            adapter_name=COMBINED,
            combination_type=request.combination_type,
            svd_rank=request.svd_rank,
            svd_full_matrices=False,  # the largest singular vectors are the same, and no square of the width is held
            density=request.density,
            majority_sign_method=request.majority_sign_method,
        )
    except ValueError as error:
        raise Invalid(
            f"These adapters cannot be combined by '{request.combination_type}': {error}",
            param="adapters",
            code="combination_impossible",
        ) from error
    _save(model, folder, spec=spec)


def _with_all_adapters(spec: MergeSpec) -> Any:
    model = AutoModelForCausalLM.from_pretrained(
        spec.base_model_path, dtype="auto", use_safetensors=True, trust_remote_code=False, local_files_only=True
    )
    first, *others = spec.adapter_paths
    adapted = PeftModel.from_pretrained(model, first, adapter_name="adapter_0")
    for number, path in enumerate(others, start=1):
        adapted.load_adapter(path, adapter_name=f"adapter_{number}")
    return adapted


def _save(model: Any, folder: Path, *, spec: MergeSpec) -> None:
    model.save_pretrained(str(folder), selected_adapters=[COMBINED], save_embedding_layers=False)
    for file in (folder / COMBINED).iterdir():  # PEFT gives every adapter but "default" a folder of its own
        file.rename(folder / file.name)
    (folder / COMBINED).rmdir()
    name_the_base(folder, base=spec.job.base_model)
    load_tokenizer(spec).save_pretrained(folder)
    forget_this_host(folder / "tokenizer_config.json")
    (folder / "README.md").write_text(_card(spec), encoding="utf-8")
    manifest = {
        "model": spec.name,
        "request": spec.request.model_dump(mode="json"),
        "base_model": spec.job.base_model.model_dump(mode="json"),
        "libraries": library_versions(),
    }
    (folder / "merge_manifest.json").write_text(json.dumps(manifest, indent=1), encoding="utf-8")


def _card(spec: MergeSpec) -> str:
    assert isinstance(spec.request, CreateCombination)
    base = spec.job.base_model
    parts = "\n".join(f"- {part.weight:g} × {part.adapter}" for part in spec.request.adapters)
    return f"""---
base_model: {json.dumps(base.public_name)}
library_name: peft
pipeline_tag: text-generation
---
# {spec.name}

Adapters of {base.public_name} (revision `{base.revision}`), combined by `{spec.request.combination_type}`:

{parts}

```python
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer

tokenizer = AutoTokenizer.from_pretrained("PATH")
model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained("{base.public_name}"), "PATH")
```
"""


if __name__ == "__main__":
    light_start.end()
    torch.set_grad_enabled(mode=False)
    sys.exit(make_product(combine, spec_file=Path(sys.argv[1]), out=Path(sys.argv[2])))
