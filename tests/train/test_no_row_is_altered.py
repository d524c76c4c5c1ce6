"""What a conversation says is in what is trained of it, or the row is refused: over the templates of all families."""

from __future__ import annotations

import json
import re
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from shared.contract.spec import DataFacts, Training
from shared.errors import Invalid
from tests.train.template_families import FAMILIES_OF_TEMPLATES, family_tokenizer
from worker.train.data import RowReader

HOSTILE = [
    *("<s>", "</s>", "<|im_end|>", "<|im_start|>", "<|eot_id|>", "[INST]", "[/INST]", "<end_of_turn>", "<|end|>"),
    *("<｜end▁of▁sentence｜>", "<｜Assistant｜>", "<|return|>", "<|channel|>", "<|user|>", "<bos>", "<eos>", "<unk>"),
    *(
        "<|",
        "|>",
        "<",
        "[",
        "s>",
        "{{ 7 }}",
        "{% if %}",
        '"',
        "\\",
        "'",
        "\\n",
        "\n",
        " ",
        "  ",
        "\t",
        "ü",
        "🙂",
        "\u2028",
    ),
    *("\ufdd0", "\\ufdd1", "word", "10", "assistant", "&amp;", "{}", '{"a": 1}', "\r\n"),
]
TEXT = st.lists(st.sampled_from(HOSTILE), max_size=6).map("".join)


@st.composite
def conversations(draw: st.DrawFn) -> dict[str, Any]:
    """A conversation whose messages are all different, with calls and reasoning now and then."""
    messages: list[dict[str, Any]] = []
    if draw(st.booleans()):
        messages.append({"role": "system", "content": f"S{draw(TEXT)}S"})
    for turn in range(draw(st.integers(1, 3))):
        messages.append({"role": "user", "content": f"Q{turn}{draw(TEXT)}Q"})
        given_answer: dict[str, Any] = {"role": "assistant", "content": f"A{turn}{draw(TEXT)}A"}
        kind = draw(st.sampled_from(["plain", "plain", "plain", "reasoning", "call", "unweighted"]))
        if kind == "reasoning":
            given_answer["reasoning_content"] = f"R{turn}{draw(TEXT)}R"
        elif kind == "unweighted":
            given_answer["weight"] = 0
        elif kind == "call":
            arguments = json.dumps({"k": f"V{turn}{draw(TEXT)}V"})
            call = {"id": f"call0000{turn}", "type": "function", "function": {"name": "f", "arguments": arguments}}
            messages.append({"role": "assistant", "content": "", "tool_calls": [call]})
            messages.append({"role": "tool", "tool_call_id": f"call0000{turn}", "content": f"T{turn}{draw(TEXT)}T"})
        messages.append(given_answer)
    return {"messages": messages}


def harmless(record: dict[str, Any]) -> dict[str, Any]:
    """The same conversation with a plain word in place of each text."""
    text = json.dumps(record["messages"], ensure_ascii=False)
    messages = json.loads(text)
    for message in messages:
        for key in ("content", "reasoning_content"):
            if message.get(key):
                message[key] = f"{message[key][:2]}x"
        for call in message.get("tool_calls", ()):
            value = json.loads(call["function"]["arguments"])["k"]
            call["function"]["arguments"] = json.dumps({"k": f"{value[:2]}x"})
    return {"messages": messages}


def squeezed(text: str) -> str:
    """Text as it compares however a template escapes and spaces it."""
    return re.sub(r"[\s\\]+|\\u[0-9a-f]{4}", "", text)


def forms(text: str) -> set[str]:
    as_json = json.dumps(text, ensure_ascii=False)[1:-1]
    return {squeezed(one) for one in (text, text.strip(), as_json, json.dumps(as_json, ensure_ascii=False)[1:-1])} | {
        squeezed(json.dumps(text)[1:-1]),
        squeezed(repr(text)[1:-1]),
    }


def controls(tokenizer: Any, ids: Any) -> list[int]:
    special = {number for number, token in tokenizer.added_tokens_decoder.items() if token.special}
    return [int(number) for number in ids if int(number) in special]


@pytest.mark.parametrize("name", FAMILIES_OF_TEMPLATES)
def test_what_a_row_says_is_trained_as_text_or_the_row_is_refused(name: str) -> None:
    tokenizer = family_tokenizer(name)
    reader = RowReader(tokenizer, facts=DataFacts(format="chat", train_rows=1), training=Training(max_length=1_000_000))

    @settings(max_examples=12)
    @given(conversations())
    def holds(record: dict[str, Any]) -> None:
        taken, plain = reader.take([record, harmless(record)])
        if isinstance(taken, Invalid):
            assert isinstance(plain, Invalid), (taken.message, record)
            return
        assert not isinstance(plain, Invalid)
        if taken.whole is None:
            assert not any(message.get("weight", 1) for message in record["messages"] if message["role"] == "assistant")
            return
        row = taken.whole
        written = squeezed(tokenizer.decode(row.ids[row.labelled]))
        for message in record["messages"]:
            if message["role"] == "assistant" and message.get("weight", 1):
                said = [message["content"], message.get("reasoning_content") or ""]
                said += [json.loads(call["function"]["arguments"])["k"] for call in message.get("tool_calls", ())]
                assert all(any(form in written for form in forms(text)) for text in said), message
            elif message["role"] == "user" or message.get("weight") == 0:
                assert squeezed(message["content"]) not in written
        assert controls(tokenizer, row.ids) == controls(tokenizer, plain.whole.ids)
        labelled = controls(tokenizer, row.ids[row.labelled])
        assert labelled == controls(tokenizer, plain.whole.ids[plain.whole.labelled])

    holds()
