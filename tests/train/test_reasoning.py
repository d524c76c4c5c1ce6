"""Reasoning in answers: trained, read only, or left out of earlier answers."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from shared.contract.spec import DataFacts, Training
from shared.errors import Invalid
from tests.train.template_families import family_tokenizer
from tests.train.tiny import CHATML, make_tokenizer
from worker.train.data import RowReader

TAGGED = {"role": "assistant", "content": "<think>\nA greeting.\n</think>\n\nHello."}
NAMED = {"role": "assistant", "content": "Hello.", "reasoning_content": "A greeting."}
CALL = {"id": "call00001", "type": "function", "function": {"name": "f", "arguments": '{"k": 1}'}}


def taken(name: str, *messages: dict[str, Any], **training: Any) -> Any:
    facts = DataFacts(format="chat", train_rows=1)
    reader = RowReader(family_tokenizer(name), facts=facts, training=Training.model_validate(training))
    return next(iter(reader.take([{"messages": [{"role": "user", "content": "Hi?"}, *messages]}])))


def trained(name: str, *messages: dict[str, Any], **training: Any) -> list[str]:
    row = taken(name, *messages, **training)
    assert not isinstance(row, Invalid), row.message
    edges = np.flatnonzero(np.diff(row.whole.labelled.astype(np.int8), prepend=0, append=0)).reshape(-1, 2)
    return [family_tokenizer(name).decode(row.whole.ids[start:end]) for start, end in edges]


@pytest.mark.parametrize("answer", [TAGGED, NAMED])
@pytest.mark.parametrize(
    ("name", "end"),
    [
        ("qwen3", "<|im_end|>"),
        ("qwen3_5", "<|im_end|>"),
        ("glm4_moe", "<|endoftext|>"),
        ("nemotron_3", "<|im_end|>"),
    ],
)
def test_masked_reasoning_is_read_and_not_trained(name: str, end: str, answer: dict[str, Any]) -> None:
    row = taken(name, answer, mask_reasoning=True)

    assert trained(name, answer, mask_reasoning=True) == [f"Hello.{end}"]
    assert "A greeting." in family_tokenizer(name).decode(row.whole.ids)
    assert "A greeting." in trained(name, answer)[0]


@pytest.mark.parametrize("key", ["reasoning_content", "reasoning", "thinking"])
def test_a_template_gets_reasoning_under_the_key_that_it_reads(key: str) -> None:
    template = CHATML.replace("message['content']", f"(message.{key} or '') + '/' + message['content']")
    assert template != CHATML
    facts = DataFacts(format="chat", train_rows=1)
    reader = RowReader(make_tokenizer(template), facts=facts, training=Training())
    (row,) = reader.take([{"messages": [{"role": "user", "content": "Hi?"}, NAMED]}])

    assert not isinstance(row, Invalid), row.message
    assert make_tokenizer().decode(row.whole.ids[row.whole.labelled]) == "A greeting./Hello.<|im_end|>"


def test_a_call_behind_masked_reasoning_is_trained() -> None:
    answer = {"role": "assistant", "content": "", "reasoning_content": "A greeting.", "tool_calls": [CALL]}

    (part,) = trained("qwen3", answer, mask_reasoning=True)

    assert part == '<tool_call>\n{"name": "f", "arguments": {"k": 1}}\n</tool_call><|im_end|>'


def test_an_answer_without_reasoning_is_trained_whole() -> None:
    plain = {"role": "assistant", "content": "Hello."}

    assert trained("qwen2_5", plain, mask_reasoning=True) == ["Hello.<|im_end|>"]


@pytest.mark.parametrize("answer", [TAGGED, NAMED])
def test_reasoning_of_earlier_answers_is_left_out_where_asked_and_told(answer: dict[str, Any]) -> None:
    turns = (answer, {"role": "user", "content": "And?"}, {**NAMED, "content": "Bye.", "reasoning_content": "Parting."})
    row = taken("lfm2", *turns, drop_history_reasoning=True)
    text = family_tokenizer("lfm2").decode(row.whole.ids)

    assert "A greeting." not in text
    assert "Parting." in text
    assert [lost.code for lost in row.lost] == ["history_reasoning_dropped"]
