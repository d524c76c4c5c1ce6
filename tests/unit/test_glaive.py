"""glaive's function-calling rows become messages, calls and tools, or are refused with the way to convert them."""

from __future__ import annotations

from typing import Any, Final

import pytest

from tests.unit.test_public_shapes import read, refused

RATE: Final = {
    "name": "rate",
    "description": "Gives a rate {of money}",
    "parameters": {"type": "object", "properties": {"base": {"type": "string"}}},
}
SYSTEM: Final = """SYSTEM: You have functions. Use them if required -
{
    "name": "rate",
    "description": "Gives a rate {of money}",
    "parameters": {"type": "object", "properties": {"base": {"type": "string"}}}
}

{"name": "clock", "parameters": {}}
"""
CHAT: Final = (
    "USER: How much is it?\n\n\nASSISTANT: I look. <functioncall> "
    '{"name": "rate", "arguments": \'{"base": "USD", "note": "it\\\'s"}\'} <|endoftext|>\n\n\n'
    'FUNCTION RESPONSE: {"rate": 0.85}\n\n\nASSISTANT: It is 0.85.\n\n1. USER: said so. <|endoftext|>\n\n\n'
    "USER: Thanks\n\n\nASSISTANT: Bye! <|endoftext|>\n\n\n"
)


def test_turns_calls_results_and_functions_are_read() -> None:
    (row,), report = read({"system": SYSTEM, "chat": CHAT})

    system, asked, called, result, answer, thanks, bye = row["messages"]
    assert [tool["function"] for tool in row["tools"]] == [RATE, {"name": "clock", "parameters": {}}]
    assert system == {"role": "system", "content": "You have functions. Use them if required -"}
    assert (asked["content"], thanks["content"]) == ("How much is it?", "Thanks")
    assert called["content"] == "I look."
    (call,) = called["tool_calls"]
    assert call["function"] == {"name": "rate", "arguments": '{"base": "USD", "note": "it\'s"}'}
    assert (result["tool_call_id"], result["content"]) == (call["id"], '{"rate": 0.85}')
    assert answer["content"] == "It is 0.85.\n\n1. USER: said so."
    assert bye == {"role": "assistant", "content": "Bye!"}
    assert "converted_glaive" in {warning.code for warning in report.warnings}


def test_a_conversation_without_functions_has_no_tools() -> None:
    (row,), _ = read({"system": "SYSTEM: You have no functions.\n", "chat": "USER: Hi\n\n\nASSISTANT: Yes?"})

    assert [message["content"] for message in row["messages"]] == ["You have no functions.", "Hi", "Yes?"]
    assert "tools" not in row


@pytest.mark.parametrize(
    "call",
    [
        '{"name": "rate", "arguments": {"base": "USD", "id": 12345678901234567890}}',
        '{"name": "rate", "arguments": \'{"base": "USD", "id": 12345678901234567890}\'}',
        '{"name": "rate", "arguments": "{\\"base\\": \\"USD\\", \\"id\\": 12345678901234567890}"}',
    ],
)
def test_arguments_may_be_an_object_or_text_in_either_quotes(call: str) -> None:
    (row,), _ = read({"chat": f"USER: Hi\n\n\nASSISTANT: <functioncall> {call} <|endoftext|>"})

    (read_call,) = row["messages"][1]["tool_calls"]
    assert read_call["function"]["arguments"] == '{"base": "USD", "id": 12345678901234567890}'


@pytest.mark.parametrize(
    "row",
    [
        {"chat": 'USER: Hi\n\n\nASSISTANT: <functioncall> {"name": "f", "arguments": \'bad\'}'},
        {"chat": 'USER: Hi\n\n\nASSISTANT: <functioncall> {"name": "f", "arguments": {}} and more'},
        {"chat": "USER: Hi\n\n\nFUNCTION RESPONSE: {}\n\n\nASSISTANT: a"},
        {"chat": "Hello USER: Hi\n\n\nASSISTANT: a"},
        {"chat": "just a text"},
        {"chat": "USER: Hi\n\n\nASSISTANT: a", "system": "SYSTEM: Use - {not json}"},
        {"chat": "USER: Hi\n\n\nASSISTANT: a", "system": 'SYSTEM: Use - {"name": "f"} and so on'},
        {"chat": "USER: Hi\n\n\nASSISTANT: a", "system": 5},
    ],
)
def test_what_cannot_be_read_exactly_is_refused_with_the_way_to_convert_it(row: dict[str, Any]) -> None:
    _, code, message = refused(row)

    assert code == "unknown_format"
    assert "<functioncall> into tool_calls" in message
