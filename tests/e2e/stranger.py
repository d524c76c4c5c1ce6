"""What a stranger does with an adapter directory: `python -I stranger.py`. Nothing of this project is imported.

Reads a question in each line, `[NAME, {PARAMETER: VALUE}]`, and answers it in a line of JSON.
"""

from __future__ import annotations

import gc
import json
import sys
from pathlib import Path
from typing import Any

if __name__ == "__main__":
    gc.disable()  # a third of the start

import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig


def change(base: str, adapter: str) -> float:
    """How far the adapter moves what the base says."""
    tokenizer = AutoTokenizer.from_pretrained(adapter)
    said = [{"role": "user", "content": "Hi"}]
    ids = tokenizer.apply_chat_template(said, return_tensors="pt", add_generation_prompt=True)
    model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32), adapter)
    with torch.no_grad():
        tuned = model(**ids).logits
        with model.disable_adapter():
            plain = model(**ids).logits
    return float((tuned - plain).abs().max())


def same_answers(base: str, adapter: str, merged: str, rows: str, dtype: str) -> float:
    """The share of answers' tokens that a merged model chooses as the adapter does on the 4-bit base it was trained on.

    A merged model is a plain model directory.
    """
    tokenizer = AutoTokenizer.from_pretrained(merged)
    tuned = PeftModel.from_pretrained(_four_bit(base, dtype), adapter).eval()
    plain = AutoModelForCausalLM.from_pretrained(merged, dtype=getattr(torch, dtype)).eval()
    same = total = 0
    for line in Path(rows).read_text(encoding="utf-8").splitlines()[:16]:
        messages = json.loads(line)["messages"]
        ids = tokenizer.apply_chat_template(messages, return_tensors="pt")
        asked = tokenizer.apply_chat_template(messages[:-1], return_tensors="pt", add_generation_prompt=True)
        # A question's own words are close calls, and nobody asks for them.
        answer = ids["input_ids"].shape[1] - asked["input_ids"].shape[1] + 1
        with torch.no_grad():
            best, other = (model(**ids, logits_to_keep=answer).logits[0].argmax(-1) for model in (tuned, plain))
        same, total = same + int((best == other).sum()), total + best.numel()
    return same / total


def greedy(base: str, adapter: str, dtype: str, question: dict[str, str], tokens: int) -> str:
    """What upstream's own `generate` says: the adapter on the 4-bit base, expanded."""
    tokenizer = AutoTokenizer.from_pretrained(adapter)
    expanded = _four_bit(base, dtype, device_map={"": "cpu"}).dequantize(dtype=getattr(torch, dtype))
    tuned = PeftModel.from_pretrained(expanded, adapter).eval()
    ids = tokenizer.apply_chat_template([question], return_tensors="pt", add_generation_prompt=True)["input_ids"]
    made = tuned.generate(input_ids=ids, max_new_tokens=tokens, do_sample=False)[0, ids.shape[1] :]
    return str(tokenizer.decode(made, skip_special_tokens=True))


def modules() -> list[str]:
    """The packages that are imported."""
    return sorted({name.partition(".")[0] for name in sys.modules})


def _four_bit(base: str, dtype: str, **where: Any) -> Any:
    kind = getattr(torch, dtype)
    four_bit = BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True, bnb_4bit_compute_dtype=kind
    )
    return AutoModelForCausalLM.from_pretrained(base, quantization_config=four_bit, dtype=kind, **where)


if __name__ == "__main__":
    known = {act.__name__: act for act in (change, same_answers, greedy, modules)}
    answers, sys.stdout = sys.stdout, sys.stderr  # libraries print
    for line in sys.stdin:
        name, values = json.loads(line)
        print(json.dumps(known[name](**values)), file=answers, flush=True)
        gc.collect()  # the models that it had
