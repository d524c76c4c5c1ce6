"""The product: a plain PEFT directory that loads without this project, and says where it comes from."""

from __future__ import annotations

import importlib.metadata
import json
import platform
import shutil
from pathlib import Path
from typing import Any

from peft import PeftModel

from shared.contract.methods import METHODS
from shared.contract.spec import AttemptSpec, BaseModelRef, Parent
from worker.train.base_model import keeps_layout
from worker.train.checkpoints import describe, settle
from worker.train.initialisation import MUTATING_INITS, fit_to_untouched_base
from worker.train.parent_adapter import join_parent, stands_on

LIBRARIES = ("torch", "transformers", "peft", "trl", "bitsandbytes", "accelerate", "safetensors", "tokenizers")

# Fields of a PEFT config whose order says nothing: one job's files are the same bytes each time.
SETS = frozenset({"exclude_modules", "modules_to_save", "target_modules"})


def write_weights(model: Any, folder: Path, *, spec: AttemptSpec, initial: Path) -> None:
    """The trained weights as upstream saves them; on the untouched base also where training moved part of it."""
    if not isinstance(model, PeftModel):
        model.save_pretrained(folder, save_original_format=keeps_layout(spec.job))
        return
    # PEFT makes a card from a template at each save, an eighth of a small job's time; ours takes its place below.
    model.create_or_update_model_card = _no_card
    # A preference job that trains an adapter on has a frozen copy of its start beside it.
    model.save_pretrained(str(folder), selected_adapters=["default"], save_embedding_layers=False)
    if (beneath := stands_on(spec)) is not None:
        join_parent(folder, parent=beneath)
    if spec.job.adapter.init_lora_weights in MUTATING_INITS:
        fit_to_untouched_base(folder, initial=initial)
    name_the_base(folder, base=spec.job.base_model)
    (folder / "README.md").write_text(model_card(spec), encoding="utf-8")


def _no_card(_folder: str) -> None:
    """Write none."""


def publish(checkpoint: Path, *, out: Path, spec: AttemptSpec, tokenizer: Any, reason: str) -> Path:
    """Make `out/adapter` from a checkpoint's weights; atomic by rename, and may happen twice.

    Returns:
        `out/adapter`.
    """
    place, unfinished = out / "adapter", out / "adapter.tmp"
    shutil.rmtree(unfinished, ignore_errors=True)
    shutil.copytree(checkpoint / "adapter", unfinished)
    tokenizer.save_pretrained(unfinished)
    forget_this_host(unfinished / "tokenizer_config.json")
    (unfinished / "README.md").write_text(model_card(spec), encoding="utf-8")
    manifest = run_manifest(spec, step=int(checkpoint.name.removeprefix("step-")), reason=reason)
    (unfinished / "run_manifest.json").write_text(json.dumps(manifest, indent=1), encoding="utf-8")
    settle(unfinished, place=place)
    return place


def run_manifest(spec: AttemptSpec, *, step: int, reason: str) -> dict[str, Any]:
    """What is needed to run this again: the resolved spec, the versions, the data's hashes."""
    files = {"train": spec.train_file, "validation": spec.validation_file}
    return {
        "job_id": spec.job_id,
        "model": spec.model_name,
        "published_step": step,
        "published_reason": reason,
        "seed": spec.job.seed,
        "spec": spec.job.model_dump(mode="json"),
        "parent": None if spec.job.parent is None else spec.job.parent.model_dump(mode="json"),
        "data": {use: _hash_and_size(Path(file)) for use, file in files.items() if file is not None},
        "libraries": library_versions(),
        "python": platform.python_version(),
        "micro_batch_size": spec.micro_batch_size,
        "gradient_checkpointing": spec.gradient_checkpointing,
        "gradient_checkpointing_layers": spec.gradient_checkpointing_layers,
        "device": spec.device,
    }


def model_card(spec: AttemptSpec) -> str:
    """README.md with the metadata block that model hubs read."""
    job = spec.job
    adapted = METHODS[job.adapter.method].adapter
    base = f'AutoModelForCausalLM.from_pretrained("{job.base_model.public_name if adapted else "PATH"}")'
    load = f'PeftModel.from_pretrained({base}, "PATH")' if adapted else base
    return f"""---
base_model: {json.dumps(job.base_model.public_name)}
library_name: {"peft" if adapted else "transformers"}
pipeline_tag: text-generation
tags: [{job.adapter.method}, {job.objective.type}]
---
# {spec.model_name}

{job.base_model.public_name} (revision `{job.base_model.revision}`), fine-tuned with {job.adapter.method}
on {job.data.train_rows} {job.data.format} rows: {job.objective.type} objective, {job.training.num_train_epochs} epochs,
{job.training.batch_size} rows per step, learning rate {job.training.learning_rate:g}, seed {job.seed}.
`run_manifest.json` holds every setting, library version and data hash.{_descent(job.parent)}
`provenance.dsse.json`, where the server signs, says which files belong here and what they were made of, under its
signature: `tunepool verify PATH`.

```python
from transformers import AutoModelForCausalLM, AutoTokenizer
{"from peft import PeftModel" if adapted else ""}
tokenizer = AutoTokenizer.from_pretrained("PATH")
model = {load}
```
"""


def _descent(parent: Parent | None) -> str:
    """The card's paragraph about the tuned model that the job went on from, with the hashes of its weights."""
    if parent is None:
        return ""
    how = {
        "continue": "Its weights were the start, and were trained on",
        "merged": "A new adapter was trained on top of it, and the files here hold both",
    }[parent.init_from]
    weights = [file for file in parent.files if file.name.endswith(".safetensors")]
    hashes = "\n".join(f"- `{file.name}` sha256 `{file.sha256}`" for file in weights)
    return f"\n\nIt goes on from `{parent.name}`. {how}.\n{hashes}"


def _hash_and_size(file: Path) -> dict[str, Any]:
    line = describe(file, root=file.parent)
    return {"bytes": line["bytes"], "sha256": line["sha256"]}


def library_versions() -> dict[str, str]:
    return {name: importlib.metadata.version(name) for name in LIBRARIES}


def name_the_base(folder: Path, *, base: BaseModelRef) -> None:
    """Have a PEFT directory name its base by public name and revision, never by a path of this host."""
    file = folder / "adapter_config.json"
    config = json.loads(file.read_text(encoding="utf-8"))
    config["base_model_name_or_path"] = base.public_name
    for name in SETS.intersection(config):  # PEFT writes them in the order of this process's hashes
        if isinstance(config[name], list):
            config[name] = sorted(config[name])
    # PEFT asks the hub for this very revision of the base; a wheel's hash or a folder's "local" is none.
    config["revision"] = base.revision if base.source == "hub" else None
    file.write_text(json.dumps(config, indent=2, sort_keys=True), encoding="utf-8")


def forget_this_host(tokenizer_config: Path) -> None:
    """transformers notes how *we* loaded the tokenizer; a stranger's load must not be forced offline by it."""
    config = json.loads(tokenizer_config.read_text(encoding="utf-8"))
    for key in ("is_local", "local_files_only", "name_or_path"):
        config.pop(key, None)
    tokenizer_config.write_text(json.dumps(config, indent=2), encoding="utf-8")
