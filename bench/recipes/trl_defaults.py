"""The classic recipe, as tutorials have it: plain SFTTrainer. `python -m bench.recipes.trl_defaults SPEC OUT`.

Micro-batches of four padded rows, no packing, gradient checkpointing on, paged 8-bit AdamW. Model, data, LoRA, learning
rate, schedule, epochs, effective batch and seed are those of SPEC, which our own trainer reads too; what no tutorial
sets stays as TRL has it. Leaves `OUT/adapter` and `OUT/figures.json`.
"""

from __future__ import annotations

import json
import resource
import sys
from pathlib import Path

import torch
from datasets import Dataset
from peft import LoraConfig
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl import SFTConfig, SFTTrainer

from bench.recipes.stopwatch import Stopwatch
from shared.contract.spec import AttemptSpec
from worker.train.base_model import four_bit
from worker.train.data import RowReader, TokenRow

MICRO_BATCH = 4


def main(spec_file: Path, out: Path) -> None:
    spec = AttemptSpec.model_validate_json(spec_file.read_bytes())
    torch.set_num_threads(spec.cpu_threads)
    tokenizer = AutoTokenizer.from_pretrained(spec.base_model_path, trust_remote_code=False)
    reader = RowReader(tokenizer, facts=spec.job.data, training=spec.job.training)
    rows: list[TokenRow] = reader.read(Path(spec.train_file)).rows
    watch = Stopwatch()
    trainer = SFTTrainer(
        model=AutoModelForCausalLM.from_pretrained(
            spec.base_model_path,
            quantization_config=four_bit(spec.job.quantization),
            dtype=getattr(torch, spec.job.training.dtype),
            trust_remote_code=False,
        ),
        args=arguments(spec, out),
        train_dataset=labelled(rows),
        processing_class=tokenizer,
        peft_config=lora(spec),
        callbacks=[watch],
    )
    trainer.train()
    trainer.save_model(str(out / "adapter"))
    tokens = sum(row.tokens for row in rows) * spec.job.training.num_train_epochs
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    (out / "figures.json").write_text(
        json.dumps({"tokens": tokens, "seconds": watch.seconds, "peak_bytes": peak}), encoding="utf-8"
    )


def arguments(spec: AttemptSpec, out: Path) -> SFTConfig:
    training = spec.job.training
    steps = -(-spec.job.data.train_rows // training.batch_size) * training.num_train_epochs
    return SFTConfig(
        output_dir=str(out),
        per_device_train_batch_size=MICRO_BATCH,
        gradient_accumulation_steps=training.batch_size // MICRO_BATCH,
        num_train_epochs=training.num_train_epochs,
        learning_rate=training.learning_rate,
        lr_scheduler_type=training.lr_scheduler_type,
        warmup_steps=round(training.warmup_ratio * steps),
        max_grad_norm=training.max_grad_norm,
        optim="paged_adamw_8bit",
        max_length=training.max_length,
        gradient_checkpointing=True,
        bf16=training.dtype == "bfloat16",
        use_cpu=True,
        seed=spec.job.seed,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
    )


def labelled(rows: list[TokenRow]) -> Dataset:
    """The very tokens and labels that our trainer learns from, so that both answer the same question."""
    return Dataset.from_dict(
        {
            "input_ids": [row.ids.tolist() for row in rows],
            "labels": [
                [int(one) if on else -100 for one, on in zip(row.ids, row.labelled, strict=True)] for row in rows
            ],
        }
    )


def lora(spec: AttemptSpec) -> LoraConfig:
    adapter = spec.job.adapter
    return LoraConfig(
        task_type="CAUSAL_LM", r=adapter.r, lora_alpha=adapter.lora_alpha, target_modules=adapter.target_modules
    )


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
