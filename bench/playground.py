"""How fast a playground answers beside plain `generate`: `python bench/playground.py HOME`, where a server is up.

Prints, for the demo model in float32 and greedy: seconds to the first token and tokens per second of transformers'
`generate`, of our own loop in this process, and of a stream through API and playground. Each is the median of the
rounds, which take turns, because a machine's speed drifts.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from openai import OpenAI
from transformers import TextStreamer
from tunepool.connection import read_credentials

from examples.stack import server_command
from shared.contract.talk import Ended, PlaygroundSpec, Question, Sampling
from worker.train.answering import Speaker
from worker.train.resident import load_resident
from worker.train.tokenizer import load_tokenizer_of

MODEL = "smollm2-135m-instruct"
ASKED = [{"role": "user", "content": "Write a long story about a lighthouse keeper and a storm."}]


class Speed(NamedTuple):
    first_token_seconds: float
    tokens_per_second: float


class Clock(TextStreamer):
    """When `generate` has chosen its first token."""

    def __init__(self) -> None:
        self.first: float | None = None
        self._prompt = True

    def put(self, value: Any) -> None:
        if not self._prompt and self.first is None:
            self.first = time.perf_counter()
        self._prompt = False

    def end(self) -> None:
        pass


def plain(base: Any, prompt: torch.Tensor, tokens: int) -> Speed:
    clock, begun = Clock(), time.perf_counter()
    base.generate(prompt, max_new_tokens=tokens, min_new_tokens=tokens, do_sample=False, use_cache=True, streamer=clock)
    return speed(begun, clock.first or begun, time.perf_counter(), tokens)


def ours(speaker: Speaker, tokens: int) -> Speed:
    begun = time.perf_counter()
    question = Question(number=1, messages=ASKED, sampling=Sampling(temperature=0.0, max_tokens=tokens))
    answer, _ = speaker.begin(question)
    said: list[Any] = list(answer.step(speaker.forward))
    first = time.perf_counter()
    while answer.reason is None:
        said += answer.step(speaker.forward)
    assert isinstance(said[-1], Ended)
    return speed(begun, first, time.perf_counter(), answer.tokens)


def through_the_api(client: OpenAI, tokens: int) -> Speed:
    begun, first, used = time.perf_counter(), None, tokens
    messages: Any = ASKED
    for chunk in client.chat.completions.create(
        model=MODEL,
        messages=messages,
        temperature=0,
        max_completion_tokens=tokens,
        stream=True,
        stream_options={"include_usage": True},
    ):
        if first is None and chunk.choices and chunk.choices[0].delta.content:
            first = time.perf_counter()
        used = chunk.usage.completion_tokens if chunk.usage else used
    return speed(begun, first or begun, time.perf_counter(), used)


def speed(begun: float, first: float, ended: float, tokens: int) -> Speed:
    """`tokens_per_second` counts those after the first."""
    return Speed(first - begun, (tokens - 1) / (ended - first))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("home", type=Path)
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=3)
    arguments = parser.parse_args()
    folder = server_command("models", "path", MODEL, home=arguments.home)
    client = read_credentials(arguments.home).client(timeout_seconds=300.0)
    spec = PlaygroundSpec(base_model_path=folder, quantization=None, dtype="float32", channel=0)
    base, tokenizer = load_resident(spec), load_tokenizer_of(folder)
    prompt = tokenizer.apply_chat_template(ASKED, return_tensors="pt", add_generation_prompt=True)["input_ids"]
    speaker = Speaker(base, tokenizer, answer_tokens=1024, context_tokens=8192)
    ways: dict[str, Callable[[], Speed]] = {
        "generate": lambda: plain(base, prompt, arguments.tokens),
        "playground's loop": lambda: ours(speaker, arguments.tokens),
        "stream through the API": lambda: through_the_api(client, arguments.tokens),
    }
    for way in ways.values():
        way()  # warm
    speeds = {name: [] for name in ways}
    for _ in range(arguments.rounds):
        for name, way in ways.items():
            speeds[name].append(way())
    for name, measured in speeds.items():
        medians = {part: statistics.median(getattr(one, part) for one in measured) for part in Speed._fields}
        print(json.dumps({"way": name} | {part: round(value, 3) for part, value in medians.items()}))


if __name__ == "__main__":
    main()
