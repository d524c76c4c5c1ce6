"""LLaMA-Factory's own words for a task of `bench/peers.py`: its configuration, its rows, and what its run leaves."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

ROWS: Final = "rows"
TEMPLATE: Final = "chatml"  # SmolLM2's; every row of the demo brings its own system message
ENVIRONMENT: Final = {"DISABLE_VERSION_CHECK": "1", "USE_MODELSCOPE_HUB": "0", "WANDB_DISABLED": "true"}


def write(task: Mapping[str, Any], folder: Path) -> Path:
    """`folder/train.yaml`, for `llamafactory-cli train`, with its rows and their description beside it."""
    shutil.copy(task["rows"], folder / f"{ROWS}.jsonl")
    (folder / "dataset_info.json").write_text(json.dumps({ROWS: DATASET}), encoding="utf-8")
    file = folder / "train.yaml"  # JSON is YAML; a file that ends in .json it cannot read (0.9.5)
    base = base_in(task["dtype"], Path(task["base"]), folder / "base")
    file.write_text(json.dumps(configuration(task, base=base, folder=folder), indent=1), encoding="utf-8")
    return file


DATASET: Final = {
    "file_name": f"{ROWS}.jsonl",
    "formatting": "sharegpt",
    "columns": {"messages": "messages"},
    "tags": {
        "role_tag": "role",
        "content_tag": "content",
        "user_tag": "user",
        "assistant_tag": "assistant",
        "system_tag": "system",
    },
}


def configuration(task: Mapping[str, Any], *, base: Path, folder: Path) -> dict[str, Any]:
    """All rows of a step in one batch and no recomputed activations: its fastest on a model this small."""
    return {
        "stage": "sft",
        "do_train": True,
        "finetuning_type": "lora",
        "model_name_or_path": str(base),
        "template": TEMPLATE,
        "dataset_dir": str(folder),
        "dataset": ROWS,
        "cutoff_len": task["max_length"],
        "output_dir": str(Path(task["out"]) / "adapter"),
        "lora_rank": task["r"],
        "lora_alpha": task["lora_alpha"],
        "lora_dropout": 0.0,
        "lora_target": "all",
        "per_device_train_batch_size": task["batch"],
        "gradient_accumulation_steps": 1,
        "learning_rate": task["learning_rate"],
        "lr_scheduler_type": "cosine",
        "warmup_steps": task["warmup_steps"],
        "num_train_epochs": 1.0,
        "optim": "adamw_torch",
        "bf16": task["dtype"] == "bfloat16",
        "use_cpu": True,
        "disable_gradient_checkpointing": True,
        "seed": task["seed"],
        "save_strategy": "no",
        "report_to": "none",
        "logging_steps": 1,
    } | ({"quantization_bit": 4} if task["method"] == "qlora" else {})


def base_in(dtype: str, base: Path, out: Path) -> Path:
    """The same weights under a config that names this dtype: without bf16 it computes in the one of the config."""
    out.mkdir()
    for file in base.iterdir():
        (out / file.name).symlink_to(file.resolve())
    config = json.loads((base / "config.json").read_text(encoding="utf-8"))
    (out / "config.json").unlink()
    (out / "config.json").write_text(json.dumps(config | {"dtype": dtype, "torch_dtype": dtype}), encoding="utf-8")
    return out


def seconds(results: str) -> float:
    """Of training alone, from `all_results.json`."""
    return float(json.loads(results)["train_runtime"])
