"""Words that a chat template adds to a trained answer are told before a device is touched."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from shared.contract.spec import DataFacts, Training
from shared.errors import Invalid
from tests.train.template_families import FAMILIES_OF_TEMPLATES, family_tokenizer
from tests.train.test_template_families import ROWS, TOOLS
from tests.train.tiny import CHATML, make_tokenizer, write_rows
from worker.train.added_words import added_words
from worker.train.data import RowReader
from worker.train.unwritten import ADDED

SAID = {"role": "assistant", "content": "Hello."}
ASKED = {"role": "user", "content": "Who?"}
LONG = {  # words of a call that read like a phrase
    "messages": [
        ASKED,
        {
            "role": "assistant",
            "content": "",
            "tool_calls": [
                {
                    "id": "call00001",
                    "type": "function",
                    "function": {"name": "weather", "arguments": '{"city": "The city in which \\"she\\" lives"}'},
                }
            ],
        },
    ],
    "tools": TOOLS,
}
EAGER = CHATML.replace("message['content']", "('Sure! ' if message.role == 'assistant' else '') + message['content']")


@pytest.mark.parametrize(
    ("part", "words"),
    [
        ("Hello.<|im_end|>", None),
        ("Hello.<|im_end|>\n", None),
        ("<think>\n\n</think>\n\nHello.<|im_end|>", None),
        ("<|channel|>final<|message|>Hello.<|return|>", None),
        ("final<|message|>Hello.<|return|>", None),
        ("<|START_RESPONSE|>Hello.<|END_RESPONSE|>", None),
        ("[THINK][/THINK]Hello.</s>", None),
        ("Sure! Hello.<|im_end|>", "Sure!"),
        ("Hello.Hello.<|im_end|>", "Hello."),
        ("Hello.\nTask done.<|im_end|>", "Task done."),
        (f"{'word ' * 40}Hello.", ("word " * 12)[:60] + "…"),
    ],
)
def test_what_is_said_beside_the_content_is_told_from_markup(part: str, words: str | None) -> None:
    assert added_words(SAID, part, ends=("<|im_end|>", "<|return|>", "</s>")) == words


def test_who_speaks_is_said_by_the_row() -> None:
    assert added_words({**SAID, "name": "Bot"}, "Bot: Hello.", ends=()) is None


CALL = {"function": {"name": "note_it", "arguments": {"text": 'He said "hi there my friend"', "to": "me and you too"}}}
CALLING = {"role": "assistant", "content": "", "tool_calls": [CALL]}
THINKING = {**SAID, "reasoning_content": "She greets me in a kind way."}


@pytest.mark.parametrize(
    ("message", "part", "words"),
    [
        (CALLING, json.dumps(CALL["function"]), None),
        (CALLING, f"I will call a tool. {json.dumps(CALL['function'])}", "I will call a tool."),
        (CALLING, f"我将调用一个工具{json.dumps(CALL['function'])}", "我将调用一个工具"),
        (CALLING, "<call>note_it\ntext: He said &quot;hi there my friend&quot;\nto: me and you too</call>", None),
        (CALLING, f" to=functions.note_it<|channel|>commentary json<|message|>{json.dumps(CALL)}<|call|>", None),
        ({**CALLING, "content": "Let me note that."}, f"Let me note that.{json.dumps(CALL)}</turn of it>", None),
        (
            {**CALLING, "content": "Let me note that."},
            f"Let me note that.\nLet me note that.{json.dumps(CALL)}",
            "Let me note that.",
        ),
        (THINKING, "<think>\nShe greets me in a kind way.\n</think>\n\nHello.", None),
        (THINKING, "Thoughts: She greets me in a kind way. Hello.", None),
        (THINKING, "Here is what I think: She greets me in a kind way. Hello.", "Here is what I think:"),
        (THINKING, "<think>\nShe greets me in a kind way.\n</think>\n\nHello. Now all is said.", "Now all is said."),
    ],
)
def test_beside_calls_and_reasoning_a_phrase_is_told(message: dict[str, Any], part: str, words: str | None) -> None:
    assert added_words(message, part, ends=("</turn of it>", "<|call|>")) == words


def told(tokenizer: Any, folder: Path, row: dict[str, Any], data_format: str = "chat") -> list[str]:
    facts = DataFacts(format=data_format, train_rows=1)  # type: ignore[arg-type]
    reader = RowReader(tokenizer, facts=facts, training=Training(max_length=10_000), ends=[tokenizer.eos_token])
    read = reader.read(write_rows(folder / "rows.jsonl", [row]))
    return [entry.message for entry in read.unwritten if entry.code == ADDED]


@pytest.mark.parametrize(
    ("row", "data_format"),
    [
        ({"messages": [ASKED, SAID, ASKED, SAID]}, "chat"),
        ({"messages": [ASKED], "chosen": SAID, "rejected": {**SAID, "content": "Go."}}, "preference"),
    ],
    ids=["chat", "preference"],
)
def test_a_row_into_which_a_template_speaks_is_told(tmp_path: Path, row: dict[str, Any], data_format: str) -> None:
    (message,) = told(make_tokenizer(EAGER), tmp_path, row, data_format)

    assert message == "The chat template writes words of its own into a trained answer: 'Sure!'."
    assert told(make_tokenizer(CHATML), tmp_path, row, data_format) == []


def test_an_answer_that_is_not_trained_may_hold_them(tmp_path: Path) -> None:
    row = {"messages": [ASKED, {**SAID, "weight": 0}, ASKED, SAID]}
    first = CHATML.replace("message['content']", "('Sure! ' if loop.index0 == 1 else '') + message['content']")

    assert told(make_tokenizer(first), tmp_path, row) == []


@pytest.mark.parametrize("name", sorted(FAMILIES_OF_TEMPLATES))
def test_no_published_template_is_suspected(name: str) -> None:
    tokenizer = family_tokenizer(name)
    reader = RowReader(
        tokenizer, facts=DataFacts(format="chat", train_rows=1), training=Training(max_length=10_000), ends=[]
    )
    rows = [*ROWS.values(), LONG]
    read = [row for row in reader.take(rows) if not isinstance(row, Invalid)]

    assert read  # what a family refuses is in the table of families
    assert not [lost.what for row in read for lost in row.lost if lost.code == ADDED]
