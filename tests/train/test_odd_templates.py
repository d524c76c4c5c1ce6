"""Templates that people write by hand or publish with slips: the answer and its end are trained, and no header."""

from __future__ import annotations

from typing import Any, Final

import numpy as np
import pytest

from shared.contract.generation import Question
from shared.contract.spec import DataFacts, Training
from shared.errors import Invalid
from tests.train.template_families import FAMILIES_OF_TEMPLATES, family_tokenizer
from tests.train.test_template_families import ROWS as ROWS_OF_FAMILIES
from tests.train.test_template_families import STOPS, TOOLS
from tests.train.tiny import CHATML, make_tokenizer
from worker.train.answering import Prompts
from worker.train.data import KeptRow, RowReader
from worker.train.unwritten import ENDLESS

HI, HELLO = {"role": "user", "content": "Hi?"}, {"role": "assistant", "content": "Hello."}
AND, BYE = {"role": "user", "content": "And?"}, {"role": "assistant", "content": "Bye."}
WELCOME: Final = {"role": "assistant", "content": "Welcome."}
TURN: Final = "<|im_start|>' + m.role + '\\n' + m.content + '<|im_end|>"
PROMPT: Final = "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"


def of(turn: str, *, before: str = "", behind: str = PROMPT) -> str:
    return f"{before}{{% for m in messages %}}{turn}{{% endfor %}}{behind}"


ODD: Final = {
    "as it should be": of(f"{{{{ '{TURN}\\n' }}}}"),
    "no line break behind a turn": of(f"{{{{ '{TURN}' }}}}"),
    "another end behind the conversation": of(f"{{{{ '{TURN}\\n' }}}}", behind="{{ '<|end|>' }}" + PROMPT),
    "no prompt, asked for or not": of(f"{{{{ '{TURN}\\n' }}}}", behind=""),
    "a prompt, asked for or not": of(f"{{{{ '{TURN}\\n' }}}}", behind="{{ '<|im_start|>assistant\\n' }}"),
    "a line break between turns": of(
        f"{{{{ '{TURN}' }}}}{{% if not loop.last %}}{{{{ '\\n' }}}}{{% endif %}}",
        behind=PROMPT.replace("'<|im_start|>", "'\\n<|im_start|>"),
    ),
    "a last answer without its end": of(
        f"{{{{ '{TURN.removesuffix('<|im_end|>')}' }}}}"
        "{% if not (loop.last and m.role == 'assistant') %}{{ '<|im_end|>\\n' }}{% endif %}"
    ),
    "a line break behind the last answer alone": of(
        f"{{{{ '{TURN}' }}}}{{% if not (loop.last and m.role == 'assistant') %}}{{{{ '\\n' }}}}{{% endif %}}"
    ),
    "a prompt that opens a thought": of(
        f"{{{{ '{TURN}\\n' }}}}", behind=PROMPT.replace("assistant\\n", "assistant\\n<think>\\n")
    ),
}
ROWS: Final[dict[str, tuple[list[dict[str, str]], list[str]]]] = {
    "one turn": ([HI, HELLO], ["Hello."]),
    "two": ([HI, HELLO, AND, BYE], ["Hello.", "Bye."]),
    "an answer first": ([WELCOME, HI, HELLO], ["Welcome.", "Hello."]),
    "two answers": ([HI, HELLO, BYE], ["Hello.", "Bye."]),
}


def taken(tokenizer: Any, row: dict[str, Any], **training: Any) -> KeptRow:
    asked = Training.model_validate({"max_length": 10_000, **training})
    facts = DataFacts(format="chat", train_rows=1)
    (read,) = RowReader(tokenizer, facts=facts, training=asked, ends=[tokenizer.eos_token]).take([row])
    assert not isinstance(read, Invalid), read.message
    return read


def trained(tokenizer: Any, row: dict[str, Any]) -> list[str]:
    read: Any = taken(tokenizer, row).whole
    edges = np.flatnonzero(np.diff(read.labelled.astype(np.int8), prepend=0, append=0)).reshape(-1, 2)
    return [tokenizer.decode(read.ids[start:end]) for start, end in edges]


@pytest.mark.parametrize("rows", ROWS)
@pytest.mark.parametrize("name", ODD)
def test_the_answer_and_its_end_are_trained_and_no_header(name: str, rows: str) -> None:
    messages, answers = ROWS[rows]

    assert trained(make_tokenizer(ODD[name]), {"messages": messages}) == [f"{answer}<|im_end|>" for answer in answers]


def test_tools_that_move_to_the_last_question_leave_each_answer_in_its_place() -> None:
    row = {"messages": [HI, HELLO, AND, BYE], "tools": TOOLS}

    assert trained(family_tokenizer("mistral_v3"), row) == [" Hello.</s>", " Bye.</s>"]


def test_a_question_ends_with_the_header_where_the_template_writes_it_with_answers_alone() -> None:
    def asked(template: str) -> str:
        tokenizer: Any = make_tokenizer(template)
        prompts = Prompts(tokenizer, ends=[tokenizer.eos_token_id])
        return tokenizer.decode(prompts.tokens(Question(number=1, messages=[HI])))

    assert (
        asked(ODD["no prompt, asked for or not"])
        == asked(CHATML)
        == "<|im_start|>user\nHi?<|im_end|>\n<|im_start|>assistant\n"
    )


JOINED: Final = (  # answers in a row under one header, as in templates that make roles take turns
    "{% for m in messages %}{% if loop.first or m.role != messages[loop.index0 - 1].role %}"
    "{{ '<|im_start|>' ~ m.role ~ '\n' }}{% endif %}{{ m.content }}"
    "{% if loop.last or m.role != messages[loop.index0 + 1].role %}{{ '<|im_end|>\n' }}{% else %}{{ '\n' }}{% endif %}"
    "{% endfor %}" + PROMPT
)


def test_answers_that_a_template_joins_keep_their_own_weights() -> None:
    tokenizer = make_tokenizer(JOINED)

    assert trained(tokenizer, {"messages": [HI, HELLO, BYE]}) == ["Hello.", "Bye.<|im_end|>"]
    assert trained(tokenizer, {"messages": [HI, {**HELLO, "weight": 0}, BYE]}) == ["Bye.<|im_end|>"]
    assert trained(tokenizer, {"messages": [HI, HELLO, {**BYE, "weight": 0}]}) == ["Hello."]


LAST_END: Final = of(
    "{{ ('### Ask\n' if m.role == 'user' else '### Say\n') ~ m.content ~ '\n\n' }}",
    behind="{% if add_generation_prompt %}{{ '### Say\n' }}{% else %}{{ eos_token }}{% endif %}",
)


def test_an_end_that_stands_behind_the_conversation_alone_is_the_last_answers() -> None:
    tokenizer = make_tokenizer(LAST_END)

    assert trained(tokenizer, {"messages": [HI, HELLO]}) == ["Hello.\n\n<|im_end|>"]  # as the template writes it
    assert trained(tokenizer, {"messages": [HI, HELLO, AND, BYE]}) == ["Hello.", "Bye.\n\n<|im_end|>"]
    assert trained(tokenizer, {"messages": [HI, HELLO, AND, {**BYE, "weight": 0}]}) == ["Hello."]
    assert len(told(LAST_END, HI, HELLO, AND, BYE)) == 1
    assert told(LAST_END, HI, HELLO) == []


SAID: Final = "{{ m.role ~ ': ' ~ m.content"
ASKED: Final = "{% if add_generation_prompt %}{{ 'assistant: ' }}{% endif %}"
END: Final = "<|im_end|>"
UNENDED: Final = {
    "a line break behind a turn": of(f"{SAID} ~ '\n' }}}}", behind=ASKED),
    "two line breaks behind a turn": of(f"{SAID} ~ '\n\n' }}}}", behind=ASKED),
    "a space behind a turn": of(f"{SAID} ~ ' ' }}}}", behind=ASKED),
    "a header behind all, asked for or not": of(f"{SAID} ~ '\\n' }}}}", behind="{{ 'assistant: ' }}"),
    "nothing behind a turn": of(f"{SAID} }}}}", behind=ASKED),
    "a line break between turns alone": of(
        f"{SAID} }}}}{{% if not loop.last %}}{{{{ '\n' }}}}{{% endif %}}", behind=ASKED.replace("'a", "'\na")
    ),
    "an end behind the last turn alone": of(
        f"{SAID} }}}}{{{{ '{END}' if loop.last and m.role == 'assistant' else '\n' }}}}", behind=ASKED
    ),
}


@pytest.mark.parametrize("name", UNENDED)
def test_without_an_end_of_turn_an_answer_is_trained_alone_and_the_last_of_a_row_with_the_end_token(name: str) -> None:
    tokenizer = make_tokenizer(UNENDED[name])

    assert trained(tokenizer, {"messages": [HI, HELLO]}) == [f"Hello.{END}"]
    assert trained(tokenizer, {"messages": [HI, HELLO, AND, BYE]}) == ["Hello.", f"Bye.{END}"]
    unfinished = {"messages": [HI, HELLO, AND, {**BYE, "weight": 0}]}
    assert trained(tokenizer, unfinished) == ["Hello."]
    broken = {"messages": [HI, {**HELLO, "content": "Hello.\n"}]}  # a line break of the row's own
    assert trained(tokenizer, broken) == [f"Hello.\n{END}"]


def told(template: str, *messages: dict[str, Any], **training: Any) -> list[str]:
    read = taken(make_tokenizer(template), {"messages": list(messages)}, **training)
    return [lost.what for lost in read.lost if lost.code == ENDLESS]


@pytest.mark.parametrize("name", UNENDED)
def test_an_answer_behind_which_nothing_ends_a_turn_is_told_with_the_remedy(name: str) -> None:
    (words,) = told(UNENDED[name], HI, HELLO, AND, BYE)

    assert words == (
        "The chat template writes nothing that ends a turn behind a trained answer, so nothing teaches the model to"
        " stop there. To teach it, write eos_token behind each answer in training.chat_template, or choose another base"
        " model."
    )
    assert told(UNENDED[name], HI, HELLO, AND, BYE, train_on="all") == [words]
    assert told(UNENDED[name], HI, HELLO) == told(UNENDED[name], HI, {**HELLO, "weight": 0}, AND, BYE) == []


def test_an_end_of_turn_that_is_no_token_is_told_and_one_that_is_never() -> None:
    (words,) = told(CHATML.replace(END, "</turn>"), HI, HELLO)

    assert "ends an answer with text, '</turn>', which is no token" in words
    assert all(told(template, HI, HELLO, AND, BYE) == [] for template in ODD.values())


@pytest.mark.parametrize("name", FAMILIES_OF_TEMPLATES)
def test_no_published_template_is_said_to_have_no_end(name: str) -> None:
    tokenizer = family_tokenizer(name)
    facts = DataFacts(format="chat", train_rows=1)
    reader = RowReader(tokenizer, facts=facts, training=Training(), ends=STOPS.get(name, (tokenizer.eos_token,)))
    read = [row for row in reader.take(ROWS_OF_FAMILIES.values()) if not isinstance(row, Invalid)]

    assert read
    assert ENDLESS not in [lost.code for row in read for lost in row.lost]
