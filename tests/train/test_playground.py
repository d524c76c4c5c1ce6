"""The program that holds a base: questions in, answers out, over the socket that it is born with."""

from __future__ import annotations

import socket
import threading
from pathlib import Path
from typing import Any

from pydantic import BaseModel

from shared.contract.events import EXIT_DONE, EXIT_USER_FAULT
from shared.contract.generation import SAID, PlaygroundSpec, Question, Sampling, Withdrawn
from tests.patience import patience
from tests.train.test_merging import make_adapter
from worker.train.playground import main

ASKED = [{"role": "user", "content": "What is 2 plus 2?"}]


def question(number: int, *, tokens: int = 6, **values: Any) -> Question:
    sampling = Sampling(temperature=0.0, max_tokens=tokens)
    return Question(**({"number": number, "messages": ASKED, "sampling": sampling} | values))


class Asker(threading.Thread):
    """The other end: asks once the base is warm, and closes when every question has had its last word."""

    def __init__(self, ours: socket.socket, asked: list[BaseModel]) -> None:
        super().__init__(daemon=True)
        self.ours, self.asked = ours, asked
        self.heard: list[Any] = []

    def run(self) -> None:
        left = {question.number for question in self.asked if isinstance(question, Question)}
        left -= {question.number for question in self.asked if isinstance(question, Withdrawn)}
        with self.ours, self.ours.makefile("rb") as lines:
            for line in lines:
                self.heard.append(SAID.validate_json(line))
                if self.heard[-1].type == "warmed":
                    for question in self.asked:
                        self.ours.sendall(question.model_dump_json().encode() + b"\n")
                if self.heard[-1].type in {"ended", "declined"}:
                    left.discard(self.heard[-1].number)
                    if not left:
                        return


def talk(tmp: Path, base: Path, asked: list[BaseModel], **values: Any) -> tuple[int, list[Any]]:
    """The program in this process: its exit code and all that it said."""
    ours, its = socket.socketpair()
    asker = Asker(ours, asked)
    asker.start()
    spec = {"base_model_path": str(base), "quantization": None, "dtype": "float32", "channel": its.detach()}
    file = tmp / "spec.json"
    file.write_text(PlaygroundSpec(**(spec | values)).model_dump_json(), encoding="utf-8")
    code = main(file)
    asker.join(patience(10))
    return code, asker.heard


def text(heard: list[Any], number: int) -> str:
    return "".join(said.text for said in heard if said.type == "piece" and said.number == number)


def last(heard: list[Any], number: int) -> Any:
    return next(said for said in heard if said.type in {"ended", "declined"} and said.number == number)


def test_questions_of_several_adapters_are_answered_side_by_side_each_as_if_alone(model: Path, tmp_path: Path) -> None:
    folders = {f"adapter_{n}": str(make_adapter(model, tmp_path / str(n), seed=n)) for n in (1, 2)}
    voices = [{}, *({"adapter": key, "adapter_path": path} for key, path in folders.items())]
    asked = [question(number, tokens=40, **voices[number % 3]) for number in range(1, 7)]

    code, heard = talk(tmp_path, model, asked, answers_at_once=4)

    assert code == EXIT_DONE
    alone = [talk(tmp_path, model, [one])[1] for one in asked[:3]]
    assert [text(heard, one.number) for one in asked] == 2 * [text(its, n + 1) for n, its in enumerate(alone)]
    assert len({text(heard, number) for number in (1, 2, 3)}) == 3
    order = [said.number for said in heard if said.type == "piece"]
    assert order.index(2) < len(order) - order[::-1].index(1), "nobody waits until another's answer is complete"
    assert [said.adapters for said in heard if said.type == "held"][-1] == ["adapter_1", "adapter_2"]


def test_what_cannot_be_answered_is_declined_by_name_and_the_others_are_answered(model: Path, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    asked = [
        question(1, adapter="adapter_9", adapter_path=str(tmp_path / "empty")),
        question(2, chat_template="{{ messages.nothing.at.all }}"),
        question(3, messages=None, text=""),
        question(4),
    ]

    code, heard = talk(tmp_path, model, asked)

    assert code == EXIT_DONE
    codes = [getattr(last(heard, number), "code", None) for number in (1, 2, 3, 4)]
    assert codes[:2] == ["adapter_unusable", "chat_template_failed"]
    assert last(heard, 4).completion_tokens == 6


def test_a_withdrawn_question_is_answered_no_further(model: Path, tmp_path: Path) -> None:
    asked = [question(1, tokens=400), Withdrawn(number=1), question(2)]

    _, heard = talk(tmp_path, model, asked)

    assert last(heard, 2).type == "ended"
    assert [said for said in heard if said.type == "ended" and said.number == 1] == []


def test_a_base_that_cannot_be_loaded_is_told_and_ends_the_program(tmp_path: Path) -> None:
    (tmp_path / "nothing").mkdir()

    code, heard = talk(tmp_path, tmp_path / "nothing", [])

    assert code == EXIT_USER_FAULT
    assert [said.type for said in heard] == ["declined"]
