"""Obeys the contract of `worker.train.evaluate` without torch: `python -m tests.fake_evaluator SPEC OUT`.

An answer is the adapter's key (or `base`), this process's number, and what was asked. A question orders more:
`slow=SECONDS` before its answer, `crash` to die instead of it, `endless` for one that does not fit the context.
An adapter whose weights are a number N (tests/fake_trainer.py, `wrong=N`) answers the first N items wrongly.
"""

from __future__ import annotations

import json
import os
import re
import sys
import time
from pathlib import Path

from shared.contract.evaluation_run import EvaluationSpec, ItemAnswer, ItemAsked, ItemFault, SubjectAsked
from tests.fake_trainer import handed_over


def answer(item: ItemAsked, subject: SubjectAsked) -> ItemAnswer:
    text = item.text or (item.messages or [{"content": ""}])[-1]["content"]
    slow = re.search(r"slow=(\S+)", text)
    time.sleep(float(slow[1]) if slow else 0)
    if "crash" in text.split():
        os.abort()
    key = {"part": item.part, "item": item.item, "subject": subject.place}
    if "endless" in text.split():
        return ItemAnswer(**key, error=ItemFault(code="context_length_exceeded", message="It does not fit."))
    tuned = subject.adapter is not None
    if item.item <= wrong_items(subject):
        text = f"not {text}"
    said = text if tuned else f"base {os.getpid()} {text}"
    loss = {"loss": 0.5 if tuned else 1.0, "loss_tokens": 4, "correct_tokens": 2} if item.record else {}
    return ItemAnswer(**key, answer=said, finish_reason="stop", tokens=3, seconds=0.1, **loss)


def wrong_items(subject: SubjectAsked) -> int:
    if subject.adapter_path is None:
        return 0
    weights = (Path(subject.adapter_path) / "adapter_model.safetensors").read_bytes()
    return int(weights) if weights.isdigit() else 0


def main(spec_file: Path, out: Path) -> int:
    spec = EvaluationSpec.model_validate_json(spec_file.read_bytes())
    with (out / "answers.jsonl").open("a") as answers:
        print("no JSON", file=answers)
        for subject in spec.subjects:
            assert subject.adapter_path is None or (Path(subject.adapter_path) / "adapter_model.safetensors").is_file()
            for line in Path(spec.items_path).read_text().splitlines():
                item = ItemAsked.model_validate(json.loads(line))
                if subject.place in item.subjects:
                    print(answer(item, subject).model_dump_json(), file=answers, flush=True)
    return 0


if __name__ == "__main__":
    words = sys.argv[1:]
    sys.exit(main(*map(Path, handed_over(int(words[1])) if words[0] == "--handover" else words)))
