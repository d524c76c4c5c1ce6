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
from torch.nn.utils.rnn import pad_sequence
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
    lines = Path(rows).read_text(encoding="utf-8").splitlines()[:16]
    chats = [json.loads(line)["messages"] for line in lines]
    whole = [_tokens(tokenizer, messages) for messages in chats]
    # A question's own words are close calls, and nobody asks for them.
    asked = torch.tensor([len(_tokens(tokenizer, messages[:-1], add_generation_prompt=True)) for messages in chats])
    # All rows in one pass: the 4-bit weights are expanded once.
    mask = pad_sequence([torch.ones_like(ids) for ids in whole], batch_first=True)
    batch = {"input_ids": pad_sequence(whole, batch_first=True), "attention_mask": mask}
    kept = mask.shape[1] - int(asked.min()) + 1
    with torch.no_grad():
        best, other = (model(**batch, logits_to_keep=kept).logits.argmax(-1) for model in (tuned, plain))
    places = torch.arange(mask.shape[1])
    of_answers = ((places >= asked[:, None] - 1) & (mask == 1))[:, -kept:]
    return float((best == other)[of_answers].double().mean())


def _tokens(tokenizer: Any, messages: list[dict[str, str]], **options: Any) -> torch.Tensor:
    ids: torch.Tensor = tokenizer.apply_chat_template(messages, return_tensors="pt", **options)["input_ids"][0]
    return ids


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
