"""TRL at its best on a processor, in an environment of its own: `python plain_trl.py TASK.json` (`bench/peers.py`).

Stands alone: of this project it imports only the stopwatch beside it. TASK has base, rows, LoRA, steps and arithmetic.
All rows of a step are one padded batch, and no activations are recomputed: that is fastest for a model as small as the
demo's. Leaves `OUT/adapter` and `OUT/figures.json`.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from peft import LoraConfig
from stopwatch import Stopwatch  # beside this file, in an environment without the project
from transformers import AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig
from trl import SFTConfig, SFTTrainer


def main(task: dict[str, Any]) -> None:
    torch.set_num_threads(task["threads"])
    dtype = getattr(torch, task["dtype"])
    four_bit = BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True, bnb_4bit_compute_dtype=dtype
    )
    watch, out = Stopwatch(), Path(task["out"])
    trainer = SFTTrainer(
        model=AutoModelForCausalLM.from_pretrained(
            task["base"],
            dtype=dtype,
            quantization_config=four_bit if task["method"] == "qlora" else None,
            trust_remote_code=False,
        ),
        args=SFTConfig(
            output_dir=str(out),
            per_device_train_batch_size=task["batch"],
            num_train_epochs=1,
            learning_rate=task["learning_rate"],
            lr_scheduler_type="cosine",
            warmup_steps=task["warmup_steps"],
            optim="adamw_torch",
            max_length=task["max_length"],
            gradient_checkpointing=False,
            bf16=task["dtype"] == "bfloat16",
            use_cpu=True,
            seed=task["seed"],
            save_strategy="no",
            report_to="none",
            disable_tqdm=True,
        ),
        train_dataset=rows(Path(task["rows"])),
        processing_class=AutoTokenizer.from_pretrained(task["base"], trust_remote_code=False),
        peft_config=LoraConfig(
            task_type="CAUSAL_LM", r=task["r"], lora_alpha=task["lora_alpha"], target_modules="all-linear"
        ),
        callbacks=[watch],
    )
    trainer.train()
    trainer.save_model(str(out / "adapter"))
    (out / "figures.json").write_text(json.dumps({"seconds": watch.seconds}), encoding="utf-8")


def rows(file: Path) -> Dataset:
    """The last message is the answer, which alone is trained."""
    conversations = [json.loads(line)["messages"] for line in file.read_text(encoding="utf-8").splitlines()]
    return Dataset.from_list([{"prompt": one[:-1], "completion": one[-1:]} for one in conversations])


if __name__ == "__main__":
    main(json.loads(Path(sys.argv[1]).read_text(encoding="utf-8")))
