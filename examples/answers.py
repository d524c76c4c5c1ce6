"""What base and tuned model answer: `python -m examples.answers BASE_DIR ADAPTER_DIR HELD_OUT_JSONL`.

Prints one JSON object. Plain transformers and PEFT, nothing of this project: the adapter must be usable by anyone who
has its base model. The base's own answers come from the same weights with the adapter switched off.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import AutoTokenizer

from examples import serving

BATCH = 16  # prompts per generation call
MAX_NEW_TOKENS = 64  # the longest ticket takes under 50


def compare(base: Path, adapter: Path, held_out: Path) -> dict[str, Any]:
    """Greedy answers to every held-out prompt: of the base, the tuned model, and the adapter on the 16-bit base."""
    tokenizer = AutoTokenizer.from_pretrained(adapter, padding_side="left", trust_remote_code=False)
    rows = [json.loads(line)["messages"] for line in held_out.read_text(encoding="utf-8").splitlines()]
    prompts = [tokenizer.apply_chat_template(row[:-1], tokenize=False, add_generation_prompt=True) for row in rows]

    published = serving.load(base, {"tuned": adapter}, dtype=fast_dtype())
    answers = {
        "base": answers_of(published, tokenizer, prompts, adapter=None),
        "tuned_16_bit": answers_of(published, tokenizer, prompts, adapter="tuned"),
    }
    trained_on = serving.quantization_of(adapter)
    as_trained = serving.load(base, {"tuned": adapter}, dtype=fast_dtype(), four_bit=trained_on)
    answers["tuned"] = answers_of(as_trained, tokenizer, prompts, adapter="tuned")
    return {
        "rows": [
            {
                "message": row[-2]["content"],
                "expected": row[-1]["content"],
                **{who: given[number] for who, given in answers.items()},
            }
            for number, row in enumerate(rows)
        ]
    }


def answers_of(model: Any, tokenizer: Any, prompts: Sequence[str], *, adapter: str | None) -> list[str]:
    """Greedy answers with this adapter; with the base alone for None."""
    with torch.inference_mode(), serving.using(model, adapter):
        return generate(model, tokenizer, prompts)


def generate(model: Any, tokenizer: Any, prompts: Sequence[str]) -> list[str]:
    """Greedy answers of a model as it stands."""
    answers: list[str] = []
    for start in range(0, len(prompts), BATCH):
        batch = tokenizer(
            list(prompts[start : start + BATCH]), return_tensors="pt", padding=True, add_special_tokens=False
        )
        output = model.generate(
            **batch.to(model.device),
            max_new_tokens=MAX_NEW_TOKENS,
            do_sample=False,
            pad_token_id=tokenizer.pad_token_id or tokenizer.eos_token_id,
        )
        new_tokens = output[:, batch["input_ids"].shape[1] :]
        answers += [text.strip() for text in tokenizer.batch_decode(new_tokens, skip_special_tokens=True)]
    return answers


def fast_dtype() -> torch.dtype:
    """bfloat16 where the hardware multiplies it; elsewhere it is emulated and slower than float32."""
    if torch.cuda.is_available():
        return torch.bfloat16
    flags = Path("/proc/cpuinfo").read_text(encoding="utf-8") if Path("/proc/cpuinfo").exists() else ""
    return torch.bfloat16 if "avx512_bf16" in flags or "amx_bf16" in flags else torch.float32


if __name__ == "__main__":
    base, adapter, held_out = map(Path, sys.argv[1:4])
    print(json.dumps(compare(base, adapter, held_out)))
