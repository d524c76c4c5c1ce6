"""Of every conversation, through every template that is at hand: all is trained, or told, or the row is refused.

The templates are all that TRL brings, for training and for asking, and those of `template_families`. What a row says is
looked for here anew, in the tokens alone.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final

import pytest
import trl
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken

from shared.contract.spec import DataFacts, Training
from shared.errors import Invalid
from tests.train.template_families import FAMILIES_OF_TEMPLATES, family_tokenizer
from tests.train.test_no_row_is_altered import TEXT, forms, squeezed
from tests.train.tiny import make_tokenizer
from worker.train.data import RowReader

FOLDER: Final = Path(trl.__file__).parent / "chat_templates"
BUNDLED: Final = sorted(file.stem for file in FOLDER.glob("*.jinja"))
REFUSALS: Final = {"not_rendered", "chat_template_failed", "empty_answer", "control_token_text"} | {
    "chat_template_not_incremental"
}
_CONTROL: Final = re.compile(
    r"<[|｜][^<>|｜{}\s]{1,40}[|｜]>|<(?:start|end)_of_(?:turn|utterance)>|\[/?(?:INST|THINK)\]"
)


def tokenizer_of(name: str) -> Any:
    """A family's own tokenizer, or one of bytes with the control tokens that the template spells."""
    if name in FAMILIES_OF_TEMPLATES:
        return family_tokenizer(name)
    template = (FOLDER / f"{name}.jinja").read_text(encoding="utf-8")
    tokenizer = make_tokenizer(template)
    found = sorted(set(_CONTROL.findall(template)))
    tokenizer.add_tokens([AddedToken(token, normalized=False, special=True) for token in found])
    return tokenizer


LEAVES: Final = st.one_of(
    TEXT.map(lambda text: f"V{text}V"),
    st.sampled_from([0, -1, 7, 2**53 + 1, 2**64 + 1, 1234567890123456789, 0.5, -2.25, True, False, None]),
)
ARGUMENTS: Final = st.dictionaries(
    st.sampled_from(["city", "a b", "_k", "zoë", "n"]),
    st.one_of(LEAVES, st.lists(LEAVES, max_size=2), st.dictionaries(st.sampled_from(["x", "y"]), LEAVES, max_size=2)),
    max_size=3,
)
SCHEMA: Final = {"type": "object", "properties": {"city": {"type": "string", "description": "P1ace."}}}


@st.composite
def rows(draw: st.DrawFn) -> dict[str, Any]:
    """A conversation of an agent: system text, tools, calls side by side, results, reasoning, weights, hostile text."""
    messages: list[dict[str, Any]] = []
    if draw(st.booleans()):
        messages.append({"role": "system", "content": f"Sys{draw(TEXT)}S"})
    calls = draw(st.booleans())
    for turn in range(draw(st.integers(1, 3))):
        messages.append({"role": "user", "content": f"Q{turn}{draw(TEXT)}Q"})
        if calls and draw(st.booleans()):
            messages += _called(draw, turn)
        answered: dict[str, Any] = {"role": "assistant", "content": f"A{turn}{draw(TEXT)}A"}
        if draw(st.integers(0, 3)) == 0:
            answered["reasoning_content"] = f"R{turn}{draw(TEXT)}R"
        if draw(st.integers(0, 3)) == 0:
            answered["weight"] = 0
        messages.append(answered)
    row: dict[str, Any] = {"messages": messages}
    if calls:
        function = {"name": "l00kup", "description": f"T{draw(TEXT)}T", "parameters": SCHEMA}
        row["tools"] = [{"type": "function", "function": function}]
    return row


def _called(draw: st.DrawFn, turn: int) -> list[dict[str, Any]]:
    several = draw(st.integers(1, 2))
    ids = [f"call{turn}000{place}" for place in range(several)]
    made = [json.dumps(draw(ARGUMENTS), ensure_ascii=draw(st.booleans())) for _ in ids]
    called = [
        {"id": one, "type": "function", "function": {"name": "l00kup", "arguments": arguments}}
        for one, arguments in zip(ids, made, strict=True)
    ]
    beside = f"B{turn}B" if draw(st.booleans()) else ""
    results = [
        draw(st.one_of(TEXT.map(lambda text: f"r{text}r"), ARGUMENTS.map(lambda value: json.dumps(value) or "{}")))
        for _ in ids
    ]
    answers = [
        {"role": "tool", "tool_call_id": one, "content": result} for one, result in zip(ids, results, strict=True)
    ]
    return [{"role": "assistant", "content": beside, "tool_calls": called}, *answers]


def values(value: Any) -> Iterator[Any]:
    if isinstance(value, dict):
        for key, below in value.items():
            yield key
            yield from values(below)
    elif isinstance(value, list):
        for below in value:
            yield from values(below)
    else:
        yield value


def is_in(value: Any, text: str) -> bool:
    if isinstance(value, str):
        return any(form in text for form in forms(value))
    return json.dumps(value) in text or str(value) in text


def says(message: dict[str, Any]) -> list[Any]:
    """Everything that a message says, value by value."""
    said: list[Any] = [message["content"], message.get("reasoning_content") or ""]
    for call in message.get("tool_calls", ()):
        said += [call["function"]["name"], *values(json.loads(call["function"]["arguments"]))]
    return said


def is_written(message: dict[str, Any], text: str) -> bool:
    if all(is_in(value, text) for value in says(message)):
        return True
    if message["role"] != "tool":
        return False
    try:  # a template may write a result's JSON anew
        return all(is_in(value, text) for value in values(json.loads(message["content"])))
    except ValueError:
        return False


@pytest.mark.parametrize("name", [*BUNDLED, *FAMILIES_OF_TEMPLATES])
def test_what_a_row_says_is_trained_or_told_or_the_row_is_refused(name: str) -> None:
    tokenizer = tokenizer_of(name)
    facts = DataFacts(format="chat", train_rows=1)
    readers = {
        which: RowReader(
            tokenizer, facts=facts, training=Training.model_validate({"max_length": 1_000_000, "train_on": which})
        )
        for which in ("assistant", "last_assistant", "all")
    }

    @settings(max_examples=15)
    @given(rows(), st.sampled_from(["assistant", "assistant", "last_assistant", "all"]))
    def holds(row: dict[str, Any], which: str) -> None:
        (taken,) = readers[which].take([row])
        if isinstance(taken, Invalid):
            assert taken.code in REFUSALS, (taken.code, taken.message)
            return
        if taken.whole is None or not taken.whole.labelled.any():
            return
        read: Any = taken.whole
        whole = squeezed(tokenizer.decode(read.ids))
        trained = squeezed(tokenizer.decode(read.ids[read.labelled]))
        told = {loss.message for loss in taken.lost}
        last = len(row["messages"]) - 1
        for place, message in enumerate(row["messages"]):
            is_trained = message["role"] == "assistant" and message.get("weight", 1) and which != "last_assistant"
            is_trained = is_trained or (which == "last_assistant" and place == last and message.get("weight", 1))
            if is_trained:
                assert is_written(message, trained), message
            else:
                assert place in told or is_written(message, whole), message
        for tool in row.get("tools", ()):
            function = tool["function"]
            seen = all(is_in(value, whole) for value in (function["name"], function["description"], "city", "P1ace."))
            assert seen or "tools_not_rendered" in {loss.code for loss in taken.lost}

    holds()


@pytest.mark.parametrize("name", [*BUNDLED, *FAMILIES_OF_TEMPLATES])
def test_a_plain_question_and_its_answer_are_taken(name: str) -> None:
    tokenizer = tokenizer_of(name)
    reader = RowReader(tokenizer, facts=DataFacts(format="chat", train_rows=1), training=Training(max_length=1_000_000))
    messages = [{"role": "user", "content": "Which gate?"}, {"role": "assistant", "content": "Gate 4."}]
    (taken,) = reader.take([{"messages": messages}])

    assert not isinstance(taken, Invalid), taken.message
    row: Any = taken.whole
    trained = tokenizer.decode(row.ids[row.labelled])
    assert "Gate 4." in trained
    assert "Which gate?" not in trained
