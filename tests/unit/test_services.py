"""Rows of other services and of public sets become messages; what has no place in them is refused by name."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, Final

import pytest

from shared.rows import logged, services
from shared.rows.check import check
from shared.rows.convert import canonical_lines
from shared.rows.foreign import recast
from tests.unit.test_file_kinds import KINDS, made
from tests.unit.test_public_shapes import read, refused

HI: Final = {"role": "user", "content": "Hi"}
YES: Final = {"role": "assistant", "content": "Yes?"}
BRIEF: Final = {"role": "system", "content": "Be brief."}
SCHEMA: Final = {"type": "object", "properties": {"city": {"type": "string"}}}
TOOL: Final = {"type": "function", "function": {"name": "weather", "description": "Tells.", "parameters": SCHEMA}}


def calling(call_id: str, content: str = "") -> dict[str, Any]:
    call = {"id": call_id, "type": "function", "function": {"name": "weather", "arguments": '{"city": "Rome"}'}}
    return {"role": "assistant", "content": content, "tool_calls": [call]}


def gemini(*parts: dict[str, Any], role: str = "model") -> dict[str, Any]:
    return {"role": role, "parts": list(parts)}


ASKED: Final = gemini({"text": "Hi"}, role="user")
CALL: Final = {"functionCall": {"name": "weather", "args": {"city": "Rome"}}}
RESULT: Final = {"functionResponse": {"name": "weather", "response": {"t": 21}}}
USE: Final = {"type": "tool_use", "id": "t1", "name": "weather", "input": {"city": "Rome"}}
ANSWERED: Final = {"messages": [HI, YES]}
SHAPES: Final[dict[str, tuple[str, dict[str, Any], dict[str, Any]]]] = {
    "glaive": (
        "glaive",
        {
            "system": f"SYSTEM: Be brief.\n{json.dumps(TOOL['function'], indent=4)}\n",
            "chat": "USER: Hi\n\n\nASSISTANT: <functioncall> "
            '{"name": "weather", "arguments": \'{"city": "Rome"}\'} <|endoftext|>\n\n\n'
            "FUNCTION RESPONSE: 21 C\n\n\nASSISTANT: Yes? <|endoftext|>\n\n\n",
        },
        {
            "messages": [
                *(BRIEF, HI, calling("call_2")),
                {"role": "tool", "content": "21 C", "name": "weather", "tool_call_id": "call_2"},
                YES,
            ],
            "tools": [TOOL],
        },
    ),
    "gemini": (
        "contents",
        {
            "systemInstruction": {"role": "system", "parts": [{"text": "Be brief."}]},
            "contents": [ASKED, gemini({"text": "Yes?"})],
        },
        {"messages": [BRIEF, HI, YES]},
    ),
    "bedrock": (
        "blocks",
        {
            "schemaVersion": "bedrock-conversation-2024",
            "system": [{"text": "Be brief."}],
            "messages": [
                {"role": "user", "content": [{"text": "Hi"}]},
                {"role": "assistant", "content": [{"text": "Yes?"}]},
            ],
        },
        {"messages": [BRIEF, HI, YES]},
    ),
    "capybara": ("conversation", {"conversation": [{"input": "Hi", "output": "Yes?"}]}, {"messages": [HI, YES]}),
    "firefly": ("conversation", {"conversation": [{"human": "Hi", "assistant": "Yes?"}]}, {"messages": [HI, YES]}),
    "wildchat": (
        "conversation",
        {"conversation": [{**HI, "toxic": False, "country": "DE"}, {**YES, "toxic": False, "country": None}]},
        {"messages": [HI, YES]},
    ),
    "distilabel": ("dolly", {"instruction": "Hi", "generation": "Yes?"}, {"messages": [HI, YES]}),
}
MORE: Final[dict[str, tuple[str, dict[str, Any], dict[str, Any]]]] = {
    "gemini calls": (
        "contents",
        {
            "contents": [
                *(ASKED, gemini(CALL), gemini(RESULT, role="user")),
                gemini({"text": "Warm.", "thought": True}, {"text": "Yes?"}),
            ],
            "tools": [{"functionDeclarations": [TOOL["function"]]}],
        },
        {
            "messages": [
                *(HI, calling("call_1")),
                {"role": "tool", "content": '{"t": 21}', "name": "weather", "tool_call_id": "call_1"},
                {**YES, "reasoning_content": "Warm."},
            ],
            "tools": [TOOL],
        },
    ),
    "anthropic": (
        "blocks",
        {
            "system": "Be brief.",
            "tools": [{"name": "weather", "description": "Tells.", "input_schema": SCHEMA}],
            "messages": [
                HI,
                {"role": "assistant", "content": [{"type": "text", "text": "I look."}, USE]},
                {
                    "role": "user",
                    "content": [
                        {"type": "tool_result", "tool_use_id": "t1", "content": [{"type": "text", "text": "21 C"}]},
                        {"type": "text", "text": "And?"},
                    ],
                },
                YES,
            ],
        },
        {
            "messages": [
                *(BRIEF, HI, calling("t1", "I look.")),
                {"role": "tool", "content": "21 C", "tool_call_id": "t1"},
                *({"role": "user", "content": "And?"}, YES),
            ],
            "tools": [TOOL],
        },
    ),
    "bedrock calls": (
        "blocks",
        {
            "toolConfig": {
                "tools": [{"toolSpec": {"name": "weather", "description": "Tells.", "inputSchema": {"json": SCHEMA}}}]
            },
            "messages": [
                {"role": "user", "content": [{"text": "Hi"}]},
                {
                    "role": "assistant",
                    "content": [{"toolUse": {"toolUseId": "t1", "name": "weather", "input": {"city": "Rome"}}}],
                },
                {
                    "role": "user",
                    "content": [
                        {"toolResult": {"toolUseId": "t1", "content": [{"json": {"t": 21}}], "status": "success"}}
                    ],
                },
                {"role": "assistant", "content": [{"text": "Yes?"}]},
            ],
        },
        {
            "messages": [HI, calling("t1"), {"role": "tool", "content": '{"t": 21}', "tool_call_id": "t1"}, YES],
            "tools": [TOOL],
        },
    ),
    "gemini calls with ids": (
        "contents",
        {
            "contents": [
                ASKED,
                gemini({"functionCall": {**CALL["functionCall"], "id": "t1"}, "thoughtSignature": "c2ln"}),
                gemini({"functionResponse": {**RESULT["functionResponse"], "id": "t1"}}, role="user"),
                gemini({"text": "Yes?", "thoughtSignature": "c2ln"}),
            ],
        },
        {
            "messages": [
                *(HI, calling("t1")),
                {"role": "tool", "content": '{"t": 21}', "name": "weather", "tool_call_id": "t1"},
                YES,
            ]
        },
    ),
    "bedrock reasoning": (
        "blocks",
        {
            "messages": [
                {"role": "user", "content": [{"text": "Hi"}, {"cachePoint": {"type": "default"}}]},
                {
                    "role": "assistant",
                    "content": [
                        {"reasoningContent": {"reasoningText": {"text": "Warm.", "signature": "c2ln"}}},
                        {"text": "Yes?"},
                    ],
                },
            ],
        },
        {"messages": [HI, {**YES, "reasoning_content": "Warm."}]},
    ),
    "vertex pair": (
        "contents",
        {
            "contents": [ASKED],
            "completions": [
                {"score": 0.0, "completion": gemini({"text": "No."})},
                {"score": 1.0, "completion": gemini({"text": "Yes?"})},
            ],
        },
        {"messages": [HI], "chosen": YES, "rejected": {**YES, "content": "No."}},
    ),
    "xtuner": (
        "conversation",
        {
            "conversation": [
                {"system": "Be brief.", "input": "Hi", "output": "Yes?", "output_with_loss": False},
                {"system": "Be brief.", "input": "Hi", "output": "Yes?"},
            ]
        },
        {"messages": [BRIEF, HI, {**YES, "weight": 0}, HI, YES]},
    ),
    "openrouter": (
        "reasoning",
        {
            "messages": [
                HI,
                {**YES, "reasoning": "Hm.", "reasoning_details": [{"type": "reasoning.text", "text": "Hm."}]},
            ]
        },
        {"messages": [HI, {**YES, "reasoning_content": "Hm."}]},
    ),
    "openai stored": ("logged", {"id": "x", "messages": [HI], "choices": [{"index": 0, "message": YES}]}, ANSWERED),
    "helicone": (
        "logged",
        {"request_body": {"messages": [HI]}, "response_body": {"choices": [{"message": YES}]}},
        ANSWERED,
    ),
    "langfuse": ("logged", {"input": [HI], "output": YES, "metadata": None}, ANSWERED),
    "langsmith": (
        "logged",
        {
            "inputs": {"input": [{"type": "human", "data": {"content": "Hi"}}]},
            "outputs": {"output": {"type": "ai", "data": {"content": "Yes?"}}},
        },
        ANSWERED,
    ),
    "nemotron": (
        "logged",
        {"input": [HI], "output": "Yes?", "system_prompt": "Be brief.", "used_in_training": "yes", "reasoning": "on"},
        {"messages": [BRIEF, HI, YES]},
    ),
    "earlier answers are not trained again": (
        "logged",
        {"input": [HI, YES, HI], "output": [YES]},
        {"messages": [HI, {**YES, "weight": 0}, HI, YES]},
    ),
    "anthropic log": (
        "logged",
        {
            "request": {"model": "m", "system": "Be brief.", "messages": [HI]},
            "response": {
                "type": "message",
                "role": "assistant",
                "usage": {},
                "stop_reason": "end_turn",
                "content": [{"type": "text", "text": "Yes?"}],
            },
        },
        {"messages": [BRIEF, HI, YES]},
    ),
    "vertex log": (
        "logged",
        {
            "request": {"contents": [ASKED]},
            "response": {"candidates": [{"content": gemini({"text": "Yes?"})}]},
        },
        ANSWERED,
    ),
    "responses log": (
        "logged",
        {
            "instructions": "Be brief.",
            "input": "Hi",
            "output": [
                {"type": "message", "role": "assistant", "content": [{"type": "output_text", "text": "Yes?"}]},
            ],
        },
        {"messages": [BRIEF, HI, YES]},
    ),
    "xlam": (
        "query_and_calls",
        {
            "query": "Hi",
            "answers": '[{"name": "weather", "arguments": {"city": "Rome"}}]',
            "tools": json.dumps([TOOL["function"]]),
        },
        {"messages": [HI, calling("call_1")], "tools": [TOOL]},
    ),
}


@pytest.mark.parametrize("name", [*SHAPES, *MORE])
def test_a_row_of_another_service_is_read_and_counted(name: str) -> None:
    form, row, wanted = (SHAPES | MORE)[name]
    (made_of_it,), report = read(row)

    assert made_of_it == wanted
    assert f"converted_{form}" in {warning.code for warning in report.warnings}


@pytest.mark.parametrize("name", ["rows.json", "rows.parquet"])
def test_rows_of_other_services_load_from_other_kinds_of_file(tmp_path: Path, name: str) -> None:
    for _, row, wanted in SHAPES.values():
        lines, columns = made(tmp_path, name, KINDS[name]([row, row]))

        assert check([lines], made_of=columns.unit, left=columns.dropped).ok
        assert [json.loads(line) for line in canonical_lines([lines])] == [wanted, wanted]


@pytest.mark.parametrize(
    ("row", "param", "word"),
    [
        (
            {"contents": [gemini({"inlineData": {"data": "x"}}, role="user"), gemini({"text": "a"})]},
            "messages[0]",
            "text-only",
        ),
        ({"contents": [ASKED, {**gemini({"text": "a"}), "mood": "good"}]}, "messages[1].mood", "known key"),
        ({"messages": [HI, {**YES, "content": [USE, {"type": "text", "text": "a"}]}]}, "messages[1]", "tool_calls"),
        (
            {"messages": [HI, {**YES, "content": [{**USE, "type": "tool_result", "is_error": True}]}]},
            "messages[1]",
            "role tool",
        ),
    ],
)
def test_what_has_no_place_in_messages_is_refused_by_name(row: dict[str, Any], param: str, word: str) -> None:
    where, _, message = refused(row)

    assert where.startswith(param)
    assert word in message


@pytest.mark.parametrize(
    ("row", "remedy"),
    [
        ({"prompt": "Hi", "answers": [{"answer": "a", "rank": 1}]}, "its best and its worst"),
        ({"instruction": "Hi", "generations": ["a", "b"]}, "the better and the worse"),
        ({"context": [HI], "response1": "a", "response2": "b", "overall_preference": 1}, "context as prompt"),
        ({"conversation_a": [HI, YES], "conversation_b": [HI, YES], "winner": "model_a"}, "without ties"),
        ({"message_id": "a", "parent_id": None, "role": "prompter", "text": "Hi"}, "prompter as user"),
        ({"message_tree_id": "a", "prompt": {"text": "Hi", "replies": []}}, "prompter as user"),
        ({"chat": {"turn_1": {}}, "meta_instruction": "x"}, "MOSS as assistant"),
        ({"history": "Hi", "human_ref_A": "a", "human_ref_B": "b", "labels": 1}, "history as prompt"),
        ({"kind": "x", "input": "Hi", "target": "Yes?"}, '"completion": "target"'),
        ({"input": [HI], "ideal": "Yes?"}, '{"prompt": "input", "completion": "ideal"}'),
        ({"chat": {"messages": [HI, YES]}, "title": "t"}, "chat.messages as messages"),
        ({"chat_messages": [{"sender": "human", "text": "Hi"}], "name": "t"}, "claude.ai"),
        ({"mapping": {}, "current_node": "x", "title": "t"}, "ends at current_node"),
        ({"message": "Hi", "chat_history": [], "response": "Yes?"}, "CHATBOT as assistant"),
        ({"custom_id": "a", "response": {"body": {"choices": [{"message": YES}]}}}, "custom_id"),
        ({"prompt": "Hi", "response_0": "a", "response_1": "b"}, "better or safer"),
        ({"prompt": "Hi", "completions": ["a", "b"], "labels": [True, False]}, "better and the worse"),
        (
            {"prompt": "Hi", "preferred": "a", "non_preferred": "b"},
            '{"chosen": "preferred", "rejected": "non_preferred"}',
        ),
        ({"question": "Hi", "solution": "a", "answer": "b"}, "more than one answer (answer, solution)"),
        ({"question": "Hi", "choices": ["a", "b"], "answer": "B"}, "write them into the question"),
        ({"request": {"messages": [HI]}, "response": {"choices": [{"message": YES}] * 2}}, "lies under request"),
        ({"query": "Hi", "answers": "[]", "tools": "[]"}, "hold no calls"),
    ],
)
def test_a_row_of_several_answers_is_refused_with_its_own_remedy(row: dict[str, Any], remedy: str) -> None:
    _, code, message = refused(row)

    assert code == "unknown_format"
    assert remedy in message


@pytest.mark.parametrize("reason", ["length", "content_filter"])
def test_an_answer_that_was_cut_off_is_no_row_of_a_log(reason: str) -> None:
    param, code, message = refused({"messages": [HI], "choices": [{"message": YES, "finish_reason": reason}]})

    assert (param, code) == ("messages", "no_trainable_tokens")
    assert "the one of choices that is whole" in message
    cut = {"request": {"messages": [HI]}, "response": {**YES, "stop_reason": "max_tokens"}}
    assert refused(cut)[1] == "unknown_format"


def test_several_answers_beside_messages_are_columns_like_others() -> None:
    (row,), report = read({"messages": [HI, YES], "generations": ["a"], "answers": []})

    assert row == {"messages": [HI, YES]}
    assert report.dropped_columns == ("answers", "generations")


ODD: Final[tuple[Any, ...]] = (
    None,
    1,
    "x",
    [],
    {},
    [1],
    [None],
    ["a"],
    [{}],
    [[]],
    {"a": 1},
    [{"role": [], "parts": [1, {}, {"text": 1}]}],
)


def test_odd_values_are_never_a_crash() -> None:
    keys = sorted(services.COLUMNS | logged.COLUMNS | {"system", "messages", "history", "completions"})
    for key in keys:
        for value in (
            *ODD,
            [{"role": "user", "content": [{"type": []}, {"toolUse": 1}, {"toolResult": {"status": []}}]}],
        ):
            recast({key: value})
            recast({"messages": [HI, YES], key: value})
            recast({"input": [HI], "output": value, key: [HI]})
            recast({"input": value, "output": [{"type": "message", **YES}]})
            recast({"request": {"messages": [HI], "instructions": value}, "response": {"choices": value}})
            recast({"messages": [{"type": "ai", "content": "a", "tool_calls": value, "additional_kwargs": value}]})
