"""What base and tuned model answer: `python -m examples.answers BASE_DIR ADAPTER_DIR HELD_OUT_JSONL`.

Prints one JSON object. Plain transformers and PEFT, nothing of this project: the adapter must be usable by anyone who
has its base model. The base is loaded once; its own answers come from the same weights with the adapter switched off.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import AutoTokenizer

from examples import serving

BATCH = 16  # prompts per generation call
MAX_NEW_TOKENS = 64  # the longest ticket takes under 50


def compare(base: Path, adapter: Path, held_out: Path) -> dict[str, Any]:
    """Greedy answers of both models to every held-out prompt, and the seconds each model took."""
    tokenizer = AutoTokenizer.from_pretrained(adapter, padding_side="left", trust_remote_code=False)
    model = serving.load(base, {"tuned": adapter}, dtype=fast_dtype())
    rows = [json.loads(line)["messages"] for line in held_out.read_text(encoding="utf-8").splitlines()]
    prompts = [tokenizer.apply_chat_template(row[:-1], tokenize=False, add_generation_prompt=True) for row in rows]

    started = time.monotonic()
    with torch.inference_mode(), serving.using(model, None):
        base_answers = answers_of(model, tokenizer, prompts)
    switched = time.monotonic()
    with torch.inference_mode(), serving.using(model, "tuned"):
        tuned_answers = answers_of(model, tokenizer, prompts)
    ended = time.monotonic()

    return {
        "rows": [
            {"message": row[-2]["content"], "expected": row[-1]["content"], "base": base_answer, "tuned": tuned_answer}
            for row, base_answer, tuned_answer in zip(rows, base_answers, tuned_answers, strict=True)
        ],
        "base_seconds": round(switched - started, 2),
        "tuned_seconds": round(ended - switched, 2),
    }


def answers_of(model: Any, tokenizer: Any, prompts: Sequence[str]) -> list[str]:
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
