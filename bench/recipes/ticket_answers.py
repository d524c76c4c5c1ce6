"""What a trained model answers to the held-out messages: `python -m bench.recipes.ticket_answers BASE TRAINED ROWS`.

TRAINED is an adapter's directory or a whole model's; an adapter is put on the base as it was stored in training.
Prints a JSON list of {expected, tuned}.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from examples import serving
from examples.answers import fast_dtype, generate


def main(base: Path, trained: Path, held_out: Path) -> list[dict[str, str]]:
    tokenizer = AutoTokenizer.from_pretrained(trained, padding_side="left", trust_remote_code=False)
    if (trained / "adapter_config.json").exists():
        # On the base as it was stored in training: what a QLoRA job has validated.
        stored = serving.quantization_of(trained)
        model = serving.load(base, {"tuned": trained}, dtype=fast_dtype(), four_bit=stored)
    else:
        model = AutoModelForCausalLM.from_pretrained(trained, dtype=fast_dtype(), trust_remote_code=False)
    rows = [json.loads(line)["messages"] for line in held_out.read_text(encoding="utf-8").splitlines()]
    prompts = [tokenizer.apply_chat_template(row[:-1], tokenize=False, add_generation_prompt=True) for row in rows]
    with torch.inference_mode():
        answers = generate(model.eval(), tokenizer, prompts)
    return [{"expected": row[-1]["content"], "tuned": answer} for row, answer in zip(rows, answers, strict=True)]


if __name__ == "__main__":
    print(json.dumps(main(*map(Path, sys.argv[1:4]))))
