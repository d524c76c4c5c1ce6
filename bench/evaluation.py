"""How fast an evaluation answers: `python bench/evaluation.py MODEL`, a folder with a base model's weights.

Prints, greedy and in one process: answers per second of items one after the other, of items in batches, and of
transformers' own `generate` over the same batches, which has one length for all. Prompts and lengths differ, as those
of real items do; answers end at their length alone, so that all three make the same tokens, except for what `generate`
makes beyond an answer's end. Rounds take turns, because a machine's speed drifts; each figure is the median.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from bench.machine import header
from shared.contract.generation import PlaygroundSpec, Question, Sampling
from shared.rows import general_suite
from worker.train.answering import Answer, ModelRunner
from worker.train.batched_answers import Batcher
from worker.train.resident import load_resident
from worker.train.tokenizer import load_tokenizer_of


class Stand:
    """A model and the questions of the suite `general`, with lengths as answers have them: a few long, most short."""

    def __init__(self, folder: str, *, device: Any, dtype: Any, answers: int, tokens: int, alike: bool) -> None:
        self.model = load_resident(
            PlaygroundSpec(base_model_path=folder, quantization=None, dtype=dtype, device=device, channel=0)
        )
        self.tokenizer = load_tokenizer_of(folder)
        self.speaker = ModelRunner(self.model, self.tokenizer, answer_tokens=tokens, context_tokens=4096)
        items = general_suite.general(part="items")
        self.asked = [items[number % len(items)].messages for number in range(answers)]
        self.lengths = [tokens if alike else max(1, tokens >> (number % 4)) for number in range(answers)]

    def begun(self) -> list[Answer]:
        answers = []
        for number, (messages, length) in enumerate(zip(self.asked, self.lengths, strict=True)):
            sampling = Sampling(temperature=0.0, max_tokens=length)
            answer = self.speaker.begin(Question(number=number, messages=messages, sampling=sampling))[0]
            answer._ends = frozenset()
            answers.append(answer)
        return answers

    def ours(self, at_once: int) -> list[str]:
        batcher = Batcher(self.model, pad_id=self.tokenizer.pad_token_id, at_once=at_once)
        over = {answer.number: answer.text for answer in batcher.answer(self.model, self.begun())}
        return [over[number] for number in range(len(self.asked))]

    def upstream(self, at_once: int) -> list[str]:
        """`generate`, batch by batch, rows sorted by length as ours are."""
        self.tokenizer.padding_side = "left"
        waiting = sorted(self.begun(), key=lambda answer: -(len(answer.prompt) + answer.limit))
        texts: dict[int, str] = {}
        for begin in range(0, len(waiting), at_once):
            batch = waiting[begin : begin + at_once]
            rows = self.tokenizer.pad({"input_ids": [answer.prompt for answer in batch]}, return_tensors="pt")
            longest = max(answer.limit for answer in batch)
            written = self.model.generate(
                **rows.to(self.model.device),
                max_new_tokens=longest,
                min_new_tokens=longest,
                do_sample=False,
                use_cache=True,
                pad_token_id=self.tokenizer.pad_token_id,
            )[:, rows["input_ids"].shape[1] :]
            for answer, row in zip(batch, written, strict=True):
                texts[answer.number] = self.tokenizer.decode(row[: answer.limit], skip_special_tokens=True)
        return [texts[number] for number in range(len(self.asked))]


def measured(stand: Stand, *, at_once: int, rounds: int) -> dict[str, Any]:
    ways: dict[str, Callable[[], list[str]]] = {
        "one by one": lambda: stand.ours(1),
        "batched": lambda: stand.ours(at_once),
        "generate": lambda: stand.upstream(at_once),
    }
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    texts: dict[str, list[str]] = {}
    for _ in range(rounds):
        for name, way in ways.items():
            begun = time.perf_counter()
            texts[name] = way()
            seconds[name].append(time.perf_counter() - begun)
    rates = {name: len(stand.asked) / statistics.median(taken) for name, taken in seconds.items()}
    same = sum(a == b for a, b in zip(texts["one by one"], texts["batched"], strict=True))
    return {
        "answers per second": {name: round(rate, 2) for name, rate in rates.items()},
        "batched / one by one": round(rates["batched"] / rates["one by one"], 2),
        "batched / generate": round(rates["batched"] / rates["generate"], 2),
        "same as one by one": f"{same} of {len(stand.asked)}",
    }


@torch.inference_mode()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model", type=Path)
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--answers", type=int, default=64)
    parser.add_argument("--tokens", type=int, default=48, help="of the longest answers")
    parser.add_argument("--at-once", type=int, default=32)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=0)
    asked = parser.parse_args()
    print(header(), flush=True)
    if asked.threads:
        torch.set_num_threads(asked.threads)
    for alike in (True, False):
        stand = Stand(
            str(asked.model),
            device=asked.device,
            dtype=asked.dtype,
            answers=asked.answers,
            tokens=asked.tokens,
            alike=alike,
        )
        figures = measured(stand, at_once=asked.at_once, rounds=asked.rounds)
        print(json.dumps({"lengths": "alike" if alike else "unlike"} | figures), flush=True)


if __name__ == "__main__":
    main()
