"""Holds a base model and answers questions about it: `python -m worker.train.playground SPEC OUT`.

Questions come and answers go as JSON lines over a socket that this program is born with; it opens none itself. It
ends when that socket closes, and the kernel ends it when whoever started it dies. Exit codes are the trainer's.
"""

from __future__ import annotations

import queue
import socket
import sys
import threading
from collections import OrderedDict, deque
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Final

from worker.train import light_start

if __name__ == "__main__":
    light_start.begin()

from pydantic import BaseModel

from shared.contract.events import EXIT_DONE, EXIT_OUT_OF_MEMORY, EXIT_USER_FAULT
from shared.contract.generation import (
    ASKED,
    LINE_BYTES,
    Begun,
    Declined,
    Held,
    PlaygroundSpec,
    Question,
    Warmed,
    Withdrawn,
)
from shared.errors import TunepoolError
from worker.train import resident
from worker.train.answering import ModelRunner
from worker.train.batched_answers import takes_rows
from worker.train.joined_answers import JoinedAnswers, failure
from worker.train.memory import MAY_MEAN_MEMORY, out_of_memory_code
from worker.train.resident import ResidentModel

# Tokens that the answers of one adapter get before those of the next have their turn: a change of adapters walks over
# all layers, a few milliseconds.
TURN_TOKENS: Final = 8

AdapterAtScale = tuple[str | None, float]  # an adapter, none for the base alone, and its scale


class Inbox(threading.Thread):
    """Reads what is asked, so that a withdrawal is noticed while an answer is being made."""

    def __init__(self, channel: socket.socket) -> None:
        super().__init__(name="inbox", daemon=True)
        self._channel = channel
        self._asked: queue.SimpleQueue[Question | Withdrawn | None] = queue.SimpleQueue()

    def run(self) -> None:
        with self._channel.makefile("rb") as lines:
            while (line := lines.readline(LINE_BYTES)).endswith(b"\n"):
                self._asked.put(ASKED.validate_json(line))
        self._asked.put(None)

    def take(self, *, wait: bool) -> Iterable[Question | Withdrawn | None]:
        """What has come; with `wait` at least one. None: nobody will ask any more."""
        if wait:
            yield self._asked.get()
        while not self._asked.empty():
            yield self._asked.get()


class Playground:
    """The loop: takes questions, gives each running answer its turn."""

    def __init__(
        self,
        speaker: ModelRunner,
        model: ResidentModel,
        *,
        at_once: int,
        inbox: Inbox,
        say: Callable[[BaseModel], None],
    ) -> None:
        self._speaker, self._model, self._at_once, self._inbox, self._say = speaker, model, at_once, inbox, say
        self._together = takes_rows(model.base)
        self._waiting: deque[Question] = deque()
        self._voices: OrderedDict[AdapterAtScale, JoinedAnswers] = OrderedDict()  # whose turn it is comes first

    def run(self) -> None:
        """Answer until the socket closes, or the base is spoilt."""
        while not self._model.spoilt and self._heard(wait=not self._voices and not self._waiting):
            while self._waiting and sum(map(len, self._voices.values())) < self._at_once:
                self._begin(self._waiting.popleft())
            if self._voices:
                self._turn()

    def _heard(self, *, wait: bool) -> bool:
        for asked in self._inbox.take(wait=wait):
            if asked is None:
                return False
            if isinstance(asked, Question):
                self._waiting.append(asked)
            else:
                self._forget(asked.number)
        return True

    def _forget(self, number: int) -> None:
        self._waiting = deque(question for question in self._waiting if question.number != number)
        for answers in self._voices.values():
            answers.forget(number)
        self._voices = OrderedDict((voice, answers) for voice, answers in self._voices.items() if answers)

    def _begin(self, question: Question) -> None:
        try:
            if question.adapter is not None and self._model.need(question.adapter, Path(question.adapter_path or "")):
                self._say(Held(adapters=self._model.held))
            answer, prompt_tokens = self._speaker.begin(question)
        except TunepoolError as error:
            self._say(Declined(number=question.number, code=error.code, message=error.message, param=error.param))
        except MAY_MEAN_MEMORY as error:
            self._say(failure(question.number, error))
        else:
            voice = (question.adapter, question.scale)
            self._voices.setdefault(voice, JoinedAnswers(together=self._together)).add(answer)
            self._say(Begun(number=question.number, prompt_tokens=prompt_tokens))

    def _turn(self) -> None:
        """A few tokens for each answer of the first voice; then the others are first."""
        voice, answers = next(iter(self._voices.items()))
        adapter, scale = voice
        if adapter is not None and adapter not in self._model.held:  # let go for another's sake meanwhile
            self._model.need(adapter, Path(answers.adapter_path))
            self._say(Held(adapters=self._model.held))
        with self._model.speaking(adapter, scale) as model:
            self._speaker.use(model)
            for _ in range(TURN_TOKENS if len(self._voices) > 1 else 1):
                for spoken in answers.step(self._speaker):
                    self._say(spoken)
        self._voices.move_to_end(voice)
        if not answers:
            del self._voices[voice]


def main(spec_file: Path) -> int:
    """Answer until nobody asks any more. Returns one of the trainer's exit codes."""
    spec = PlaygroundSpec.model_validate_json(spec_file.read_bytes())
    resident.begin(spec)
    with socket.socket(fileno=spec.channel) as channel:

        def say(what: BaseModel) -> None:
            channel.sendall(what.model_dump_json().encode() + b"\n")

        try:
            serve(spec, Inbox(channel), say)
        except TunepoolError as error:
            say(Declined(code=error.code, message=error.message, param=error.param))
            return EXIT_USER_FAULT
        except MAY_MEAN_MEMORY as error:
            if isinstance(error, BrokenPipeError | ConnectionResetError):  # nobody listens any more
                return EXIT_DONE
            if out_of_memory_code(error) is None:
                raise
            say(failure(0, error))
            return EXIT_OUT_OF_MEMORY
    return EXIT_DONE


def serve(spec: PlaygroundSpec, inbox: Inbox, say: Callable[[BaseModel], None]) -> None:
    """Load the weights, say so, and answer."""
    tokenizer, base = resident.load(spec)
    speaker = ModelRunner(base, tokenizer, answer_tokens=spec.answer_tokens, context_tokens=spec.context_tokens)
    model = ResidentModel(base, kept=spec.adapters_kept)
    inbox.start()
    say(Warmed())
    Playground(speaker, model, at_once=spec.answers_at_once, inbox=inbox, say=say).run()


if __name__ == "__main__":
    light_start.end()
    sys.exit(main(Path(sys.argv[1])))
