"""Calls of tools in answers: told apart from text in the families whose templates write them in a form that is read."""

from __future__ import annotations

import json
from typing import Any

import pytest

from shared.contract.generation import Question, Sampling, ToolCall
from shared.errors import Invalid
from tests.train.template_families import FAMILIES_OF_TEMPLATES, family_tokenizer
from tests.train.test_generation_stops import ENDS, MOST, Pupil, last_answer
from tests.train.test_template_families import ASKED, ROWS, TOOLS
from worker.train.answering import Answer, ModelRunner
from worker.train.call_format import CallFormat, CallReader

# gpt-oss asks for calls otherwise than its template writes them down.
READ = {
    *("qwen2_5", "qwen3", "qwen3_2507", "llama3_1", "llama3_2", "mistral_v3", "devstral", "command_r7b"),
    *("phi4_mini", "hermes_3", "deepseek_v31", "granite_4", "exaone_4"),
}
ROME, OSLO = (ToolCall(name="weather", arguments=json.dumps({"city": city})) for city in ("Rome", "Oslo"))
HERMES = CallFormat("<tool_call>", ("name", "arguments"), "", "</tool_call>\n<tool_call>", "")
LLAMA = CallFormat("", ("name", "parameters"), "", None, "")


def asked(**values: Any) -> Question:
    sampling = Sampling(temperature=0.0, max_tokens=MOST)
    return Question(number=1, messages=[ASKED], tools=TOOLS, read_calls=True, sampling=sampling, **values)


def said(answer: Answer, speaker: ModelRunner) -> tuple[str, list[ToolCall], str | None]:
    """The text of an answer, its calls and how it ended."""
    pieces: list[Any] = []
    while answer.reason is None:
        pieces += answer.step(speaker.forward)
    text = "".join(piece.text for piece in pieces if piece.type == "piece")
    return text, [call for piece in pieces if piece.type == "called" for call in piece.calls], answer.reason


def of_pupil(name: str, kind: str) -> tuple[str, list[ToolCall], str | None]:
    row = last_answer(name, kind)
    assert row is not None
    tokenizer = family_tokenizer(name)
    (babble,) = tokenizer("z", add_special_tokens=False)["input_ids"]
    stops = ENDS.get(name, (tokenizer.eos_token,))
    pupil = Pupil(row[1], ends=tokenizer.convert_tokens_to_ids(list(stops)), babble=babble)
    speaker = ModelRunner(pupil, tokenizer, answer_tokens=MOST, context_tokens=100_000)
    return said(speaker.begin(asked())[0], speaker)


@pytest.mark.parametrize("name", sorted(READ))
def test_what_a_model_was_trained_to_call_is_told_as_calls(name: str) -> None:
    one_alone = name in {"llama3_1", "llama3_2"}
    text, calls, reason = of_pupil(name, "null content" if one_alone else "parallel calls")

    assert calls == ([ROME] if one_alone else [ROME, OSLO])
    assert text.strip() in {"", "<think>\n\n</think>"}  # Qwen 3 writes an empty thought
    assert reason == "tool_calls"


@pytest.mark.parametrize("name", sorted(READ))
def test_an_answer_without_calls_is_text_also_where_tools_are_offered(name: str) -> None:
    text, calls, reason = of_pupil(name, "one turn")

    assert ("Hello." in text, calls, reason) == (True, [], "stop")


@pytest.mark.parametrize("name", sorted(set(FAMILIES_OF_TEMPLATES) - READ - {"gpt_oss"}))
def test_tools_are_refused_where_a_template_writes_no_calls_that_are_read(name: str) -> None:
    tokenizer = family_tokenizer(name)
    speaker = ModelRunner(Pupil([], ends=[], babble=0), tokenizer, answer_tokens=MOST, context_tokens=100_000)

    with pytest.raises(Invalid) as caught:
        speaker.begin(asked())
    assert (caught.value.code, caught.value.param) == ("unsupported_parameter", "tools")


@pytest.mark.parametrize("name", ["qwen2_5", "mistral_v3", "granite_4"])
def test_calls_and_their_results_reach_the_model_that_goes_on(name: str) -> None:
    speaker = ModelRunner(
        Pupil([], ends=[], babble=0), family_tokenizer(name), answer_tokens=MOST, context_tokens=100_000
    )
    answer, _ = speaker.begin(asked().model_copy(update={"messages": ROWS["tools"]["messages"][:-1]}))

    prompt = family_tokenizer(name).decode(answer.prompt)
    assert "Rome" in prompt
    assert "21 C" in prompt


def test_results_of_tools_that_a_template_leaves_out_are_refused() -> None:
    speaker = ModelRunner(
        Pupil([], ends=[], babble=0), family_tokenizer("smollm2"), answer_tokens=9, context_tokens=9_999
    )
    question = asked().model_copy(update={"messages": ROWS["tools"]["messages"][:-1], "tools": None})

    with pytest.raises(Invalid) as caught:
        speaker.begin(question)
    assert caught.value.param in {"messages.1", "messages.2"}


@pytest.mark.parametrize("size", [1, 3, 1000])
def test_text_before_calls_is_shown_as_it_comes_and_calls_never(size: int) -> None:
    written = 'Let me <b>see</b>.\n<tool_call>{"name": "f", "arguments": {"a": "}"}}</tool_call> bye'
    reader = CallReader(HERMES, {"f"})

    shown = "".join(reader.push(written[at : at + size]) for at in range(0, len(written), size))

    assert shown == "Let me <b>see</b>.\n"
    assert reader.finish() == ("", [ToolCall(name="f", arguments='{"a": "}"}')])


@pytest.mark.parametrize(
    ("form", "text"),
    [
        (HERMES, '<tool_call>{"name": "g", "arguments": {}}</tool_call>'),  # no tool of ours
        (HERMES, '<tool_call>{"name": "f", "arguments": {'),
        (HERMES, '<tool_call>{"name": "f", "arguments": [1]}'),
        (HERMES, "<tool_call>"),
        (LLAMA, '{"name": "f", "parameters": "none"}'),
        (LLAMA, '{"answer": 42}'),
        (LLAMA, "Well {"),
    ],
)
def test_what_is_no_call_of_an_offered_tool_stays_text(form: CallFormat, text: str) -> None:
    reader = CallReader(form, {"f"})

    shown = reader.push(text)
    rest, calls = reader.finish()

    assert (shown + rest, calls) == (text, [])
