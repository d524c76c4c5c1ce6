"""Templates that people write by hand or publish with slips: the answer and its end are trained, and no header."""

from __future__ import annotations

from typing import Any, Final

import numpy as np
import pytest

from shared.contract.spec import DataFacts, Training
from shared.contract.talk import Question
from shared.errors import Invalid
from tests.train.template_families import family_tokenizer
from tests.train.test_template_families import TOOLS
from tests.train.tiny import CHATML, make_tokenizer
from worker.train.answering import Prompts
from worker.train.data import RowReader

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


def trained(tokenizer: Any, row: dict[str, Any]) -> list[str]:
    facts = DataFacts(format="chat", train_rows=1)
    reader = RowReader(tokenizer, facts=facts, training=Training(max_length=10_000), ends=[tokenizer.eos_token])
    (taken,) = reader.take([row])
    assert not isinstance(taken, Invalid), taken.message
    read: Any = taken.whole
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
