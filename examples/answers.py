"""What base and tuned model answer: `python -m examples.answers BASE_DIR ADAPTER_DIR HELD_OUT_JSONL [PART/PARTS]`.

Prints lines of JSON: how far it is, and at last all answers; those of every PARTS-th row from PART on, counted from 0.
Plain transformers and PEFT, nothing of this project: the adapter must be usable by anyone who has its base model. The
base's own answers come from the same weights with the adapter switched off.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import AutoTokenizer, StoppingCriteriaList

from examples import serving

BATCH = 48  # prompts per generation call: a token of all costs little more than one of a third
MAX_NEW_TOKENS = 64  # the longest ticket takes under 50
SIGN_SECONDS = 2.0  # between two signs of life


def compare(base: Path, adapter: Path, held_out: Path, *, part: int = 0, parts: int = 1) -> dict[str, Any]:
    """Greedy answers to held-out prompts: of the base, the tuned model, and the adapter on the 16-bit base."""
    tokenizer = AutoTokenizer.from_pretrained(adapter, padding_side="left", trust_remote_code=False)
    lines = held_out.read_text(encoding="utf-8").splitlines()[part::parts]
    rows = [json.loads(line)["messages"] for line in lines]
    prompts = [tokenizer.apply_chat_template(row[:-1], tokenize=False, add_generation_prompt=True) for row in rows]

    life = SignsOfLife(answers=3 * len(prompts))
    published = serving.load(base, {"tuned": adapter}, dtype=fast_dtype())
    answers = {
        "base": answers_of(published, tokenizer, prompts, adapter=None, life=life),
        "tuned_16_bit": answers_of(published, tokenizer, prompts, adapter="tuned", life=life),
    }
    trained_on = serving.quantization_of(adapter)
    as_trained = serving.load(base, {"tuned": adapter}, dtype=fast_dtype(), four_bit=trained_on, unpacked=True)
    answers["tuned"] = answers_of(as_trained, tokenizer, prompts, adapter="tuned", life=life)
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


class SignsOfLife:
    """A stopping criterion that stops nothing. Prints the share of the work done, a line in two seconds at most."""

    def __init__(self, *, answers: int) -> None:
        self._tokens = answers * MAX_NEW_TOKENS  # at most; what an answer leaves is counted as done with its batch
        self._done = 0
        self._in_batch = 0
        self._spoke_at = 0.0

    def __call__(self, input_ids: torch.LongTensor, scores: torch.FloatTensor, **_: Any) -> torch.Tensor:
        self._in_batch += input_ids.shape[0]
        if time.monotonic() - self._spoke_at >= SIGN_SECONDS:
            self._spoke_at = time.monotonic()
            print(json.dumps({"share": round((self._done + self._in_batch) / self._tokens, 3)}), flush=True)
        return torch.zeros(input_ids.shape[0], dtype=torch.bool, device=input_ids.device)

    def batch_is_done(self, answers: int) -> None:
        self._done, self._in_batch = self._done + answers * MAX_NEW_TOKENS, 0


def answers_of(
    model: Any, tokenizer: Any, prompts: Sequence[str], *, adapter: str | None, life: SignsOfLife
) -> list[str]:
    """Greedy answers with this adapter; with the base alone for None."""
    with torch.inference_mode(), serving.using(model, adapter):
        return generate(model, tokenizer, prompts, life=life)


def generate(model: Any, tokenizer: Any, prompts: Sequence[str], *, life: SignsOfLife | None = None) -> list[str]:
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
            stopping_criteria=StoppingCriteriaList([] if life is None else [life]),
        )
        if life is not None:
            life.batch_is_done(output.shape[0])
        new_tokens = output[:, batch["input_ids"].shape[1] :]
        answers += [text.strip() for text in tokenizer.batch_decode(new_tokens, skip_special_tokens=True)]
    return answers


def fast_dtype(*, clock: Callable[[], float] = time.perf_counter) -> torch.dtype:
    """bfloat16 where this machine multiplies it clearly faster; many processors only emulate it."""
    if torch.cuda.is_available():
        return torch.bfloat16
    seconds = {dtype: _best_seconds(dtype, clock) for dtype in (torch.float32, torch.bfloat16)}
    return torch.bfloat16 if 1.3 * seconds[torch.bfloat16] <= seconds[torch.float32] else torch.float32


def _best_seconds(dtype: torch.dtype, clock: Callable[[], float]) -> float:
    left, right = torch.randn(512, 576).to(dtype), torch.randn(1536, 576).to(dtype)
    took = []
    for _ in range(5):
        began = clock()
        torch.matmul(left, right.T)
        took.append(clock() - began)
    return min(took)


if __name__ == "__main__":
    base, adapter, held_out = map(Path, sys.argv[1:4])
    part, _, parts = (sys.argv[4] if len(sys.argv) > 4 else "0/1").partition("/")
    print(json.dumps(compare(base, adapter, held_out, part=int(part), parts=int(parts))))
