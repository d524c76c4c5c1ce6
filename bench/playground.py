"""How fast a playground answers beside plain `generate`: `python bench/playground.py [HOME]`; a server that answers
there is asked, else one is started.

Prints, for the demo model in float32 and greedy: seconds to the first token and tokens per second of transformers'
`generate`, of our own loop in this process, of eight answers that go through the model together in it, and of one and
of eight streams through API and playground. Each is the median of the rounds, which take turns, because a machine's
speed drifts; `beside_generate` is the median of the ratios within the rounds. Of several streams the first token is
that of the last, and the tokens are those of all. Then, once, fifty streams at once, and how many of them were lost.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import torch
from openai import OpenAI, OpenAIError
from transformers import TextStreamer

from bench.machine import header
from examples.stack import running_stack, server_command
from shared.contract.generation import Ended, PlaygroundSpec, Question, Sampling
from worker.train.answering import ModelRunner
from worker.train.joined_answers import JoinedAnswers
from worker.train.resident import load_resident
from worker.train.tokenizer import load_tokenizer_of

MODEL = "smollm2-135m-instruct"
ASKED = [{"role": "user", "content": "Write a long story about a lighthouse keeper and a storm."}]


TOGETHER = 8
CROWD = 50


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


def ours(speaker: ModelRunner, tokens: int) -> Speed:
    begun = time.perf_counter()
    question = Question(number=1, messages=ASKED, sampling=Sampling(temperature=0.0, max_tokens=tokens))
    answer, _ = speaker.begin(question)
    said: list[Any] = list(answer.step(speaker.forward))
    first = time.perf_counter()
    while answer.reason is None:
        said += answer.step(speaker.forward)
    assert isinstance(said[-1], Ended)
    return speed(begun, first, time.perf_counter(), answer.tokens)


def together(speaker: ModelRunner, tokens: int) -> Speed:
    begun, firsts, answers = time.perf_counter(), set[int](), JoinedAnswers(together=True)
    for number in range(TOGETHER):
        sampling = Sampling(temperature=1.0, seed=number, max_tokens=tokens)
        answers.add(speaker.begin(Question(number=number, messages=ASKED, sampling=sampling))[0])
    first, made = begun, 0
    while answers:
        for said in answers.step(speaker):
            if said.number not in firsts:
                firsts.add(said.number)
                first = time.perf_counter()
            made += said.completion_tokens if isinstance(said, Ended) else 0
    return Speed(first - begun, made / (time.perf_counter() - begun))


def streams(client: OpenAI, tokens: int, *, count: int = TOGETHER) -> Speed:
    """Several streams through the API at once. Raises what a stream that is lost raises."""
    begun = time.perf_counter()
    with ThreadPoolExecutor(count) as pool:
        speeds = list(pool.map(lambda _: through_the_api(client, tokens), range(count)))
    made = count * tokens
    return Speed(max(each.first_token_seconds for each in speeds), made / (time.perf_counter() - begun))


def crowd(client: OpenAI, tokens: int) -> dict[str, Any]:
    """Fifty streams at once, each to its end: whole answers only count, and the client asks none a second time."""
    client = client.with_options(max_retries=0)
    begun, ends = time.perf_counter(), list[Speed | str]()
    with ThreadPoolExecutor(CROWD) as pool:
        for asked in [pool.submit(through_the_api, client, tokens) for _ in range(CROWD)]:
            try:
                ends.append(asked.result())
            except (OpenAIError, AssertionError) as error:
                ends.append(f"{type(error).__name__}: {error}"[:200])
    seconds, whole = time.perf_counter() - begun, [end for end in ends if isinstance(end, Speed)]
    firsts = sorted(end.first_token_seconds for end in whole)
    return {
        "lost": [end for end in ends if isinstance(end, str)],
        "whole": len(whole),
        "first_token_seconds": {"median": round(statistics.median(firsts), 2), "last": round(firsts[-1], 2)},
        "seconds_to_the_last_end": round(seconds, 2),
        "tokens_per_second": round(len(whole) * tokens / seconds, 1),
    }


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
    assert first is not None, "a stream without a word"
    assert used == tokens, f"a stream of {used} tokens"
    return speed(begun, first, time.perf_counter(), used)


def speed(begun: float, first: float, ended: float, tokens: int) -> Speed:
    """`tokens_per_second` counts those after the first."""
    return Speed(first - begun, (tokens - 1) / (ended - first))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("home", type=Path, nargs="?", default=Path(".tunepool"))
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=3)
    arguments = parser.parse_args()
    print(header(), flush=True)
    with running_stack(arguments.home, port=0) as credentials:
        measure(arguments, credentials.client(timeout_seconds=300.0))


def measure(arguments: argparse.Namespace, client: OpenAI) -> None:
    folder = server_command("models", "path", MODEL, home=arguments.home)
    spec = PlaygroundSpec(base_model_path=folder, quantization=None, dtype="float32", channel=0)
    base, tokenizer = load_resident(spec), load_tokenizer_of(folder)
    prompt = tokenizer.apply_chat_template(ASKED, return_tensors="pt", add_generation_prompt=True)["input_ids"]
    speaker = ModelRunner(base, tokenizer, answer_tokens=1024, context_tokens=8192)
    ways: dict[str, Callable[[], Speed]] = {
        "generate": lambda: plain(base, prompt, arguments.tokens),
        "playground's loop": lambda: ours(speaker, arguments.tokens),
        "eight together": lambda: together(speaker, arguments.tokens),
        "stream through the API": lambda: through_the_api(client, arguments.tokens),
        "eight streams through the API": lambda: streams(client, arguments.tokens),
    }
    for way in ways.values():
        way()  # warm
    speeds = {name: [] for name in ways}
    for _ in range(arguments.rounds):
        for name, way in ways.items():
            speeds[name].append(way())
    print(json.dumps({"way": f"{CROWD} streams through the API, once"} | crowd(client, arguments.tokens)))
    for name, measured in speeds.items():
        medians = {part: statistics.median(getattr(one, part) for one in measured) for part in Speed._fields}
        pairs = zip(measured, speeds["generate"], strict=True)
        medians["beside_generate"] = statistics.median(
            one.tokens_per_second / plain.tokens_per_second for one, plain in pairs
        )
        print(json.dumps({"way": name} | {part: round(value, 3) for part, value in medians.items()}))


if __name__ == "__main__":
    main()
