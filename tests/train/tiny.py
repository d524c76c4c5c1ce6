"""A random two-layer model with a byte tokenizer, and specs and rows for it: real upstream code, seconds per test."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedTokenizerFast

from shared.contract.events import TRAINER_EVENT, TrainerEvent
from shared.contract.spec import AttemptSpec
from worker.train.__main__ import main

CHATML = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>\\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)

FACTS = {
    "architecture": "LlamaForCausalLM",
    "parameters": 100_000,
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "intermediate_size": 128,
    "vocab_size": 260,
    "max_position_embeddings": 512,
    "tie_word_embeddings": True,
}


def make_tokenizer(template: str = CHATML) -> PreTrainedTokenizerFast:
    """One token per byte and four special ones."""
    special = ["<|im_start|>", "<|im_end|>", "<|pad|>", "<|end|>"]
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: number for number, token in enumerate([*special, *alphabet])}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(special)
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<|im_start|>", eos_token="<|im_end|>", pad_token="<|pad|>"
    )
    fast.chat_template = template
    return fast


def make_model_directory(folder: Path, config: Any = None, *, template: str = CHATML) -> Path:
    """A random model of `config` (a small Llama by default) with its tokenizer, saved as safetensors."""
    torch.manual_seed(0)
    tokenizer = make_tokenizer(template)
    config = config or LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=512,
        tie_word_embeddings=True,
        initializer_range=0.1,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def chat(question: str, answer: str) -> dict[str, Any]:
    return {"messages": [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]}


def chat_rows(count: int) -> list[dict[str, Any]]:
    """Rows of mixed lengths."""
    return [chat(f"{number} plus {number}?" + " please" * (number % 4), f"{2 * number}") for number in range(count)]


def preference_rows(count: int) -> list[dict[str, Any]]:
    def answer(text: str) -> dict[str, str]:
        return {"role": "assistant", "content": text}

    questions = [[{"role": "user", "content": f"{number}?"}] for number in range(count)]
    return [{"messages": one, "chosen": answer("good"), "rejected": answer("bad one")} for one in questions]


def kto_rows(count: int) -> list[dict[str, Any]]:
    return [
        {
            "messages": row["messages"],
            "completion": row["chosen"] if place % 2 else row["rejected"],
            "label": bool(place % 2),
        }
        for place, row in enumerate(preference_rows(count))
    ]


def write_rows(file: Path, rows: list[dict[str, Any]]) -> Path:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return file


def make_spec(
    folder: Path,
    *,
    model: Path,
    rows: list[dict[str, Any]] | None = None,
    validation: list[dict[str, Any]] | None = None,
    data_format: str = "chat",
    objective: dict[str, Any] | None = None,
    adapter: dict[str, Any] | None = None,
    training: dict[str, Any] | None = None,
    quantization: dict[str, Any] | None = None,
    placement: dict[str, Any] | None = None,
    facts: dict[str, Any] | None = None,
    parent: dict[str, Any] | None = None,
    **attempt: Any,
) -> Path:
    """Write data and `folder/spec.json` of one attempt on the tiny model."""
    rows = rows or chat_rows(12)
    job = {
        "base_model": {
            "name": "tiny",
            "public_name": "example/tiny",
            "source": "hub",
            "revision": "0" * 40,
            "facts": facts or FACTS,
        },
        "objective": objective or {"type": "supervised"},
        "data": {"format": data_format, "train_rows": len(rows), "validation_rows": len(validation or [])},
        "adapter": {"method": "lora", "r": 4, **(adapter or {})},
        "quantization": {"bnb_4bit_compute_dtype": "float32", **(quantization or {})},
        "training": {
            "dtype": "float32",
            "num_train_epochs": 2,
            "batch_size": 4,
            "learning_rate": 0.01,
            "max_length": 256,
            "optim": "adamw_torch",
            **(training or {}),
        },
        "placement": placement or {},
        "queue": {},
        "seed": 11,
        "parent": parent,
    }
    spec = {
        "job_id": "ftjob-tiny",
        "model_name": "ft:tiny:acme::1",
        "job": job,
        "base_model_path": str(model),
        "train_file": str(write_rows(folder / "train.jsonl", rows)),
        "validation_file": str(write_rows(folder / "valid.jsonl", validation)) if validation else None,
        "micro_batch_size": 4,
        "cpu_threads": 1,
        **attempt,
    }
    file = folder / "spec.json"
    file.write_text(AttemptSpec.model_validate(spec).model_dump_json(), encoding="utf-8")
    return file


def read_events(out: Path) -> list[TrainerEvent]:
    lines = (out / "events.jsonl").read_text(encoding="utf-8").splitlines()
    return [TRAINER_EVENT.validate_json(line) for line in lines]


def steps_told(out: Path) -> int:
    """How many training steps a run that may go on has told of."""
    file = out / "events.jsonl"
    return file.read_bytes().count(b'"metrics"') if file.exists() else 0


def run(spec: Path, out: Path) -> tuple[int, list[TrainerEvent]]:
    """The trainer in this process: its exit code and its events."""
    code = main(spec, out)
    return code, read_events(out)


def losses(events: list[TrainerEvent]) -> dict[int, float]:
    """Step → training loss; a later attempt's figure replaces an earlier one's."""
    return {event.step: event.train_loss for event in events if event.type == "metrics"}
