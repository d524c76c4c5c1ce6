"""Speaks like `worker.train.playground` and loads no weights: `python -m tests.fake_playground SPEC OUT`.

An answer is the last message's words, each with the adapter before it, one word a token. A message orders more:
`slow=SECONDS` before each word, `crash=WORD` to die at that word, `wait=FILE` to say nothing until the file is there.
A word that is the name of an offered tool is called.
"""

from __future__ import annotations

import json
import os
import queue
import re
import socket
import sys
import threading
import time
from pathlib import Path
from typing import Any

from shared.contract.generation import (
    ASKED,
    Begun,
    Called,
    ChosenToken,
    Ended,
    Held,
    Piece,
    PlaygroundSpec,
    Question,
    TokenLogprob,
    ToolCall,
    Warmed,
)


def order(text: str, name: str) -> str:
    match = re.search(rf"{name}=(\S+)", text)
    return match[1] if match else ""


class Answer:
    def __init__(self, question: Question) -> None:
        text = question.text or (question.messages or [{"content": ""}])[-1]["content"]
        if question.answer_schema is not None:
            text += " " + json.dumps(question.answer_schema, separators=(",", ":"))
        self.number, self.voice = question.number, question.adapter or "base"
        self.words = text.split()[: question.sampling.max_tokens or 1000]
        self.cut = len(self.words) < len(text.split())
        self.slow, self.crash = float(order(text, "slow") or 0), order(text, "crash")
        self.wait = Path(order(text, "wait") or "/")
        self.told = 0
        self.tools = {tool["function"]["name"] for tool in question.tools or []}
        self.top = question.sampling.top_logprobs
        self.calls = [
            ToolCall(name=word, arguments=f'{{"of": {len(self.words)}}}') for word in self.words if word in self.tools
        ]

    def step(self) -> list[Any]:
        if not self.wait.exists():
            time.sleep(0.001)
            return []
        if self.told == len(self.words):
            reason = "tool_calls" if self.calls else "length" if self.cut else "stop"
            ended = Ended(number=self.number, finish_reason=reason, completion_tokens=self.told)  # type: ignore[arg-type]
            return [Called(number=self.number, calls=self.calls), ended] if self.calls else [ended]
        time.sleep(self.slow)
        word = self.words[self.told]
        if word == self.crash:
            os.abort()
        self.told += 1
        text = f"{self.voice}:{word} "
        return [] if word in self.tools else [Piece(number=self.number, text=text, logprobs=self.logprobs(text))]

    def logprobs(self, text: str) -> list[ChosenToken] | None:
        if self.top is None:
            return None
        likeliest = [TokenLogprob(token=f"{text}{number}", logprob=-float(number)) for number in range(self.top)]
        return [ChosenToken(token=text, logprob=-0.5, top=likeliest)]


def main(spec_file: Path) -> None:
    spec = PlaygroundSpec.model_validate_json(spec_file.read_bytes())
    asked: queue.SimpleQueue[Any] = queue.SimpleQueue()
    channel = socket.socket(fileno=spec.channel)

    def listen() -> None:
        for line in channel.makefile("rb"):
            asked.put(ASKED.validate_json(line))
        os._exit(0)

    def say(what: Any) -> None:
        channel.sendall(what.model_dump_json().encode() + b"\n")

    say(Warmed())
    threading.Thread(target=listen, daemon=True).start()
    answers: list[Answer] = []
    held: dict[str, None] = {}
    while True:
        while not answers or not asked.empty():
            said = asked.get()
            if not isinstance(said, Question):
                answers = [answer for answer in answers if answer.number != said.number]
                continue
            if said.adapter is not None and said.adapter not in held:
                assert Path(said.adapter_path or "").is_dir()
                held[said.adapter] = None
                say(Held(adapters=list(held)))
            answers.append(Answer(said))
            say(Begun(number=said.number, prompt_tokens=len(answers[-1].words)))
        for answer in list(answers):
            for what in answer.step():
                say(what)
                if isinstance(what, Ended):
                    answers.remove(answer)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
