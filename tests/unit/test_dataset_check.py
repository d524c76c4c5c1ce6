"""Promises of the streaming check: every bad form is named with line, column, field, code and remedy."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from shared.rows.check import DatasetReport, Limits, RowProblem, check, read_report
from shared.rows.convert import canonical_lines, checked_lines

USER = {"role": "user", "content": "Hi"}
ANSWER = {"role": "assistant", "content": "Hello"}
GOOD = json.dumps({"messages": [USER, ANSWER]}).encode()
CALL = {"id": "c1", "type": "function", "function": {"name": "f", "arguments": "{}"}}
TOOL = {"type": "function", "function": {"name": "f", "parameters": {"type": "object"}}}


def chat(*messages: object, **more: object) -> bytes:
    return json.dumps({"messages": list(messages), **more}).encode()


def row(**fields: object) -> bytes:
    return json.dumps(fields).encode()


def only(report: DatasetReport) -> RowProblem:
    assert report.problem_count == 1, report.problems
    return report.problems[0]


def codes(report: DatasetReport) -> set[str]:
    return {warning.code for warning in report.warnings}


FILES = [
    # id, bytes, line, column, param, code, a word of the remedy
    ("empty", b"", 1, 1, "file", "empty_file", "write one JSON object per line"),
    ("blank lines only", b"\n \r\n\t\n", 1, 1, "file", "empty_file", "blank lines"),
    ("CR only", GOOD + b"\r" + GOOD, 1, len(GOOD) + 1, "", "cr_line_endings", "LF"),
    ("UTF-16 with mark", GOOD.decode().encode("utf-16"), 1, 1, "file", "wrong_encoding", "UTF-16 (little endian)"),
    ("UTF-16 BE", GOOD.decode().encode("utf-16-be"), 1, 1, "file", "wrong_encoding", "save it as UTF-8"),
    ("UTF-32", GOOD.decode().encode("utf-32"), 1, 1, "file", "wrong_encoding", "UTF-32"),
    ("invalid UTF-8", GOOD + b'\n{"text": "\xff"}', 2, 11, "", "invalid_utf8", "save the file as UTF-8"),
    ("cut at the end", GOOD + b"\n" + GOOD[:20], 2, 16, "", "truncated_json", "upload it again"),
    ("cut in the middle", GOOD[:30] + b"\n" + GOOD, 1, 31, "", "invalid_json", "on one line"),
    ("bad syntax", b"{'text': 1}\n", 1, 2, "", "invalid_json", "json.dumps"),
    ("two on a line", GOOD + GOOD + b"\n", 1, len(GOOD) + 1, "", "invalid_json", "a line of its own"),
    ("raw tab", b'{"text": "a\tb"}', 1, 12, "", "invalid_json", r"\t"),
    ("NaN", b'{"text": NaN}', 1, 10, "text", "not_a_number", "use a number"),
    ("-Infinity", b'{"a": {"b": [1, -Infinity]}}', 1, 17, "a.b[1]", "not_a_number", "use a number"),
    ("1e999", b'{"text": 1e999}', 1, 10, "text", "number_out_of_range", "write it as a string"),
    ("5,000 digits", b'{"text": ' + b"7" * 5000 + b"}", 1, 10, "text", "number_out_of_range", "5,000 characters"),
    ("lone high surrogate", rb'{"text": "a\ud83d"}', 1, 12, "text", "lone_surrogate", "both halves"),
    ("lone low surrogate", rb'{"text": "a\ude00"}', 1, 12, "text", "lone_surrogate", "both halves"),
    ("NUL", rb'{"text": "a\u0000b"}', 1, 12, "text", "nul_character", "remove it"),
    ("100,000 levels", b'{"text": ' + b"[" * 100_000, 1, None, "", "too_deeply_nested", "fewer"),
    ("duplicate key", b'{"text": "a", "text": "b"}', 1, 15, "text", "duplicate_key", "keep one"),
    ("duplicate escaped", rb'{"a": [{"x": 1, "\u0078": 2}]}', 1, 17, "a[0].x", "duplicate_key", "keep one"),
    ("mixed formats", GOOD + b'\n{"text": "a"}', 2, 1, "", "mixed_formats", "text, but line 1 is chat"),
    ("a number", b"17", 1, 1, "", "not_an_object", "one JSON object per line"),
    ("unknown format", b'{"question": "a"}', 1, 1, "", "unknown_format", "use messages"),
    ("JSON array", b"[\n" + GOOD + b"\n]", 1, 1, "file", "json_array", "one object per line"),
    ("gzip", b"\x1f\x8b\x08\x00", 1, 1, "file", "wrong_file_type", "gunzip"),
    ("zip", b"PK\x03\x04\x14", 1, 1, "file", "wrong_file_type", "unzip"),
    ("zstd", b"\x28\xb5\x2f\xfd\x00", 1, 1, "file", "wrong_file_type", "unzstd"),
    ("parquet", b"PAR1\x15\x04", 1, 1, "file", "wrong_file_type", "Parquet"),
    ("pickle", b"\x80\x04\x95\x00", 1, 1, "file", "wrong_file_type", "json.dumps"),
    ("web page", b"<!DOCTYPE html><html>", 1, 1, "file", "wrong_file_type", "web page"),
]


@pytest.mark.parametrize("bad", FILES, ids=[f[0] for f in FILES])
@pytest.mark.parametrize("size", [1, 7, 1 << 20])
def test_a_bad_file_is_named_with_line_column_and_remedy(
    bad: tuple[str, bytes, int, int | None, str, str, str], size: int
) -> None:
    _, data, line, column, param, code, remedy = bad

    problem = only(check(sliced(data, size)))

    assert (problem.line, problem.column, problem.param, problem.code) == (line, column, param, code)
    assert remedy in problem.message


ROWS = [
    # id, row, param, code, the text at the column, a word of the remedy
    ("no messages", chat(), "messages", "wrong_type", '"messages"', "at least one"),
    ("messages text", row(messages="hi"), "messages", "wrong_type", '"messages"', "list"),
    ("message text", chat("hi", ANSWER), "messages[0]", "wrong_type", '"hi"', "role and content"),
    (
        "unknown role",
        chat({"role": "bot", "content": "a"}, ANSWER),
        "messages[0].role",
        "unknown_role",
        '"role": "bot"',
        '"assistant"',
    ),
    (
        "role missing",
        chat({"content": "a"}, ANSWER),
        "messages[0].role",
        "unknown_role",
        '{"content"',
        "system, developer, user",
    ),
    (
        "role a list",
        chat({"role": ["user"], "content": "a"}, ANSWER),
        "messages[0].role",
        "unknown_role",
        '"role": [',
        "one of",
    ),
    ("no assistant", chat(USER), "messages", "no_trainable_tokens", '"messages"', "weight 0"),
    (
        "empty assistant",
        chat(USER, {"role": "assistant", "content": " "}),
        "messages",
        "no_trainable_tokens",
        '"messages"',
        "text",
    ),
    ("all weight 0", chat(USER, {**ANSWER, "weight": 0}), "messages", "no_trainable_tokens", '"messages"', "weight 0"),
    (
        "one empty assistant",
        chat(USER, {**ANSWER, "content": ""}, USER, ANSWER),
        "messages[1]",
        "empty_assistant_message",
        '{"role": "assistant"',
        "weight 0",
    ),
    (
        "ends with user",
        chat(USER, ANSWER, USER),
        "messages[2].role",
        "last_message_not_assistant",
        '"role": "user", "content": "Hi"}]',
        "end with",
    ),
    ("weight 2", chat(USER, {**ANSWER, "weight": 2}), "messages[1].weight", "invalid_weight", '"weight"', "use 0"),
    (
        "weight true",
        chat(USER, {**ANSWER, "weight": True}),
        "messages[1].weight",
        "invalid_weight",
        '"weight"',
        "use 0",
    ),
    (
        "weight on user",
        chat({**USER, "weight": 1}, ANSWER),
        "messages[0].weight",
        "invalid_weight",
        '"weight"',
        "remove",
    ),
    (
        "content null",
        chat({**USER, "content": None}, ANSWER),
        "messages[0].content",
        "missing_content",
        '"content": null',
        "use text",
    ),
    (
        "content number",
        chat({**USER, "content": 5}, ANSWER),
        "messages[0].content",
        "wrong_type",
        '"content": 5',
        "use text",
    ),
    (
        "image part",
        chat({**USER, "content": [{"type": "image_url"}]}, ANSWER),
        "messages[0].content[0].type",
        "unsupported_content",
        '"type"',
        "text-only",
    ),
    (
        "part without text",
        chat({**USER, "content": [{"type": "text"}]}, ANSWER),
        "messages[0].content[0]",
        "wrong_type",
        '{"type"',
        '"text"',
    ),
    (
        "unknown message key",
        chat({**USER, "contents": 1}, ANSWER),
        "messages[0].contents",
        "unknown_key",
        '"contents"',
        "did you mean content",
    ),
    ("unknown row key", chat(USER, ANSWER, tool=1), "tool", "unknown_key", '"tool"', "allowed: functions, messages"),
    (
        "tool without call",
        chat(USER, {"role": "tool", "tool_call_id": "x", "content": "1"}, ANSWER),
        "messages[1].tool_call_id",
        "unknown_tool_call_id",
        '"tool_call_id"',
        "earlier tool call",
    ),
    (
        "arguments an object",
        chat(
            USER,
            {"role": "assistant", "tool_calls": [{**CALL, "function": {"name": "f", "arguments": []}}]},
            tools=[TOOL],
        ),
        "messages[1].tool_calls[0].function.arguments",
        "invalid_arguments",
        '"arguments"',
        "json.dumps",
    ),
    (
        "arguments not JSON",
        chat(
            USER,
            {"role": "assistant", "tool_calls": [{**CALL, "function": {"name": "f", "arguments": "{a"}}]},
            tools=[TOOL],
        ),
        "messages[1].tool_calls[0].function.arguments",
        "invalid_arguments",
        '"arguments"',
        "json.dumps",
    ),
    (
        "call without id",
        chat(USER, {"role": "assistant", "tool_calls": [{**CALL, "id": ""}, CALL]}, tools=[TOOL]),
        "messages[1].tool_calls[0].id",
        "missing_tool_call_id",
        '"id"',
        "text id",
    ),
    (
        "call of another tool",
        chat(
            USER,
            {"role": "assistant", "tool_calls": [{**CALL, "function": {"name": "g", "arguments": "{}"}}]},
            tools=[TOOL],
        ),
        "messages[1].tool_calls[0].function.name",
        "unknown_tool",
        '"name": "g"',
        "add it to tools",
    ),
    (
        "function answer without call",
        chat(USER, {"role": "function", "name": "f", "content": "1"}, ANSWER),
        "messages[1].role",
        "unknown_tool_call_id",
        '"role": "function"',
        "add the call",
    ),
    ("tools an object", chat(USER, ANSWER, tools={}), "tools", "wrong_type", '"tools"', "list"),
    (
        "tool without function",
        chat(USER, ANSWER, tools=[{"type": "function"}]),
        "tools[0].function",
        "wrong_type",
        '{"type"',
        "name and parameters",
    ),
    ("completion missing", row(prompt="a"), "completion", "wrong_type", "{", "use text"),
    ("prompt number", row(prompt=1, completion="a"), "prompt", "wrong_type", '"prompt"', "use text"),
    ("empty text", row(text=" "), "text", "empty_text", '"text"', "write some text"),
    ("text with a label", row(text="a", label=1), "label", "unknown_key", '"label"', "allowed: text"),
    (
        "two answers",
        row(input={"messages": [USER]}, preferred_completion=[ANSWER, ANSWER], non_preferred_completion=[ANSWER]),
        "preferred_completion",
        "wrong_completion",
        '"preferred',
        "exactly one",
    ),
    (
        "equal answers",
        row(input={"messages": [USER]}, preferred_completion=[ANSWER], non_preferred_completion=[ANSWER]),
        "non_preferred_completion",
        "identical_completions",
        '"non_',
        "must differ",
    ),
    (
        "answer by user",
        row(input={"messages": [USER]}, preferred_completion=[USER], non_preferred_completion=[ANSWER]),
        "preferred_completion",
        "wrong_completion",
        '"preferred',
        "assistant message",
    ),
    (
        "input text",
        row(input="a", preferred_completion=[ANSWER], non_preferred_completion=[ANSWER]),
        "input",
        "wrong_type",
        '"input"',
        "messages",
    ),
    ("label text", row(prompt="a", completion="b", label="yes"), "label", "wrong_type", '"label"', "true (good)"),
    ("pair without prompt", row(chosen="a", rejected="b"), "prompt", "missing_prompt", "{", "add prompt"),
    (
        "pair with other prompts",
        row(chosen=[USER, ANSWER], rejected=[{**USER, "content": "x"}, ANSWER], prompt="q"),
        "rejected",
        "different_prompts",
        '"rejected"',
        "only the last",
    ),
    (
        "sharegpt role",
        row(conversations=[{"from": "alien", "value": "a"}]),
        "conversations[0].from",
        "unknown_role",
        '"from"',
        "human, gpt",
    ),
    (
        "sharegpt value",
        row(conversations=[{"from": "gpt", "value": 1}]),
        "conversations[0].value",
        "wrong_type",
        '"value"',
        "use text",
    ),
    (
        "sharegpt call",
        row(conversations=[{"from": "function_call", "value": "x"}]),
        "conversations[0].value",
        "invalid_arguments",
        '"value"',
        "name and arguments",
    ),
    ("alpaca output", row(instruction="a", output=""), "output", "empty_text", '"output"', "write some text"),
    (
        "alpaca history",
        row(instruction="a", output="b", history=[["a"]]),
        "history",
        "wrong_type",
        '"history"',
        "pairs",
    ),
]


@pytest.mark.parametrize(
    ("data", "param", "code", "at", "remedy"), [r[1:] for r in ROWS], ids=[str(r[0]) for r in ROWS]
)
def test_a_bad_row_is_named_with_column_field_and_remedy(
    data: bytes, param: str, code: str, at: str, remedy: str
) -> None:
    problem = only(check([b"\n" + data + b"\n"]))

    assert (problem.line, problem.param, problem.code) == (2, param, code)
    assert problem.column is not None
    assert data.decode()[problem.column - 1 :].startswith(at)
    assert remedy in problem.message


GOOD_ROWS = [
    ("chat", GOOD),
    ("crlf", GOOD + b"\r\n" + GOOD + b"\r\n"),
    ("no final newline", GOOD + b"\n" + GOOD),
    ("U+2028 inside", json.dumps({"text": "a\u2028b"}, ensure_ascii=False).encode()),
    ("escaped emoji", rb'{"text": "\ud83d\ude00 and \\u0000 as text"}'),
    ("parts", chat({"role": "user", "content": [{"type": "text", "text": "a"}]}, ANSWER)),
    ("nulls", chat({**USER, "tool_calls": None, "audio": None}, {**ANSWER, "weight": None, "refusal": None})),
    ("weights", chat(USER, {**ANSWER, "weight": 0}, USER, {**ANSWER, "weight": 1})),
    (
        "tools",
        chat(
            USER,
            {"role": "assistant", "tool_calls": [CALL]},
            {"role": "tool", "tool_call_id": "c1", "content": "1"},
            ANSWER,
            tools=[TOOL],
            parallel_tool_calls=False,
        ),
    ),
    (
        "functions",
        chat(
            USER,
            {"role": "assistant", "content": None, "function_call": CALL["function"]},
            {"role": "function", "name": "f", "content": "1"},
            ANSWER,
            functions=[TOOL["function"]],
        ),
    ),
    ("kto", row(prompt="a", completion="b", label=False)),
    ("kto messages", row(messages=[USER], completion=[ANSWER], label=True)),
]


@pytest.mark.parametrize("data", [g[1] for g in GOOD_ROWS], ids=[g[0] for g in GOOD_ROWS])
def test_a_good_file_passes_and_converts(data: bytes) -> None:
    report = check([data])

    assert report.ok, report.problems
    canonical = list(canonical_lines([data]))
    assert check(canonical).ok
    assert list(checked_lines([data])) == canonical


def test_every_example_of_the_documentation_passes_and_every_format_has_one() -> None:
    page = Path(__file__).parents[2] / "docs" / "data-formats.md"
    reports = [check([line.encode()]) for line in page.read_text().splitlines() if line.startswith('{"')]

    assert [problem for report in reports for problem in report.problems] == []
    assert {report.format for report in reports} == {"chat", "prompt_completion", "text", "preference", "kto"}


def test_a_byte_order_mark_is_ignored_with_a_warning() -> None:
    for size in (1, 1000):
        report = check(sliced(b"\xef\xbb\xbf" + GOOD, size))
        assert report.ok
        assert codes(report) == {"byte_order_mark"}


def test_all_problems_are_counted_and_the_first_twenty_told() -> None:
    report = check([b'{"text": ""}\n' * 50])

    assert report.problem_count == 50
    assert [problem.line for problem in report.problems] == list(range(1, 21))


def test_every_problem_of_one_row_is_told() -> None:
    report = check([chat({"role": "x", "content": "a"}, {**USER, "weight": 1, "foo": 2}, ANSWER)])

    assert [problem.code for problem in report.problems] == ["unknown_role", "invalid_weight", "unknown_key"]


def test_a_line_over_the_limit_is_refused_while_streaming_and_the_rest_is_checked() -> None:
    def stream() -> Iterator[bytes]:
        yield GOOD + b'\n{"text": "'
        for _ in range(2048):
            yield b"a" * 1024
        yield b'"}\n' + GOOD + b"\n" + b'{"messages": 5}'

    report = check(stream(), limits=Limits(line_bytes=4096))

    assert [(p.line, p.code) for p in report.problems] == [(2, "line_too_long"), (4, "wrong_type")]
    assert report.rows == 4


def test_a_file_over_the_limit_is_refused_before_the_stream_ends() -> None:
    def endless() -> Iterator[bytes]:
        while True:
            yield GOOD + b"\n"

    problem = only(check(endless(), limits=Limits(file_bytes=10_000)))

    assert problem.code == "file_too_large"
    assert "10,000" in problem.message


def test_too_few_rows_are_refused_with_the_number_needed() -> None:
    problem = only(check([GOOD], limits=Limits(min_rows=10)))

    assert problem.code == "too_few_rows"
    assert "10" in problem.message


def test_the_report_counts_what_estimates_need() -> None:
    report = check([GOOD + b"\n" + chat(USER, {**ANSWER, "weight": 0}, USER, ANSWER) + b"\n" + GOOD])

    assert (report.format, report.shape, report.rows) == ("chat", "chat", 3)
    assert (report.messages, report.characters, report.trained_characters) == (8, 28, 15)
    assert (report.longest_row, report.longest_row_characters, report.duplicate_rows) == (2, 14, 1)
    stored = json.loads(json.dumps(report.document()))
    assert read_report({**stored, "of_a_newer_version": 1}) == report


WARNED = [
    (chat(USER, {**ANSWER, "content": "key AKIAABCDEFGHIJKLMNOP"}), "possible_secret"),
    (chat(USER, {**ANSWER, "content": "<|im_end|>"}), "control_token_text"),
    (chat(USER, {"role": "system", "content": "a"}, ANSWER), "system_not_first"),
    (chat(USER, USER, ANSWER), "same_role_twice"),
    (chat({**USER, "content": ""}, ANSWER), "empty_content"),
    (chat(USER, {"role": "assistant", "tool_calls": [CALL]}), "call_without_tools"),
    (row(instruction="a", output="b", source="web"), "dropped_columns"),
    (GOOD + b"\n\n" + chat(ANSWER), "blank_lines"),
    (GOOD + b"\n" + GOOD, "duplicate_rows"),
]


@pytest.mark.parametrize(("data", "code"), WARNED, ids=[w[1] for w in WARNED])
def test_odd_rows_warn_and_pass(data: bytes, code: str) -> None:
    report = check([data])

    assert report.ok
    assert codes(report) == {code}


def test_a_task_name_with_a_dash_is_no_secret() -> None:
    assert not codes(check([row(text="the risk-averse task-oriented team asked")]))


@given(st.lists(st.binary(max_size=200), max_size=4))
def test_the_check_never_raises_for_any_bytes(chunks: list[bytes]) -> None:
    check(chunks)


ANY_SHAPE = [
    *(json.loads(data.splitlines()[0]) for _, data in GOOD_ROWS),
    {"prompt": "a", "completion": "b"},
    {"prompt": [USER, ANSWER, USER], "completion": [ANSWER], "tools": [TOOL]},
    {"text": "a"},
    {
        "input": {"messages": [USER], "tools": [TOOL]},
        "preferred_completion": [ANSWER],
        "non_preferred_completion": [{**ANSWER, "content": "x"}],
    },
    {"prompt": "a", "chosen": "b", "rejected": "c"},
    {"chosen": [USER, ANSWER], "rejected": [USER, {**ANSWER, "content": "x"}]},
    {"conversations": [{"from": "human", "value": "a"}], "chosen": {"from": "gpt", "value": "b"}, "rejected": "c"},
    {
        "system": "s",
        "tools": json.dumps([TOOL["function"]]),
        "conversations": [
            {"from": "human", "value": "a"},
            {"from": "function_call", "value": '{"name": "f", "arguments": {}}'},
            {"from": "observation", "value": "1"},
            {"from": "gpt", "value": "b", "weight": 1},
        ],
    },
    {"instruction": "a", "input": "b", "output": "c", "system": "d", "history": [["e", "f"]]},
]
HOSTILE = [
    None,
    True,
    0,
    1.5,
    "",
    " ",
    "user",
    "gpt",
    [],
    {},
    [None],
    [[]],
    [{}],
    {"from": "gpt"},
    [USER],
    [ANSWER],
    "[1]",
]


@pytest.mark.parametrize("good", ANY_SHAPE, ids=" ".join)
def test_a_row_with_any_value_replaced_is_refused_or_converts_to_a_row_that_passes(good: dict[str, object]) -> None:
    assert check([json.dumps(good).encode()]).ok
    for path in paths(good):
        for value in HOSTILE:
            data = json.dumps(replaced(good, path, value)).encode()
            if check([data]).ok:
                again = list(canonical_lines([data]))
                assert check(again).ok, (data, again)
                assert list(canonical_lines(again)) == again
                assert list(checked_lines([data])) == again


def paths(value: object, at: tuple[str | int, ...] = ()) -> Iterator[tuple[str | int, ...]]:
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, child in items:
        yield (*at, key)
        yield from paths(child, (*at, key))


def replaced(value: object, path: tuple[str | int, ...], new: object) -> object:
    if not path:
        return new
    copy = dict(value) if isinstance(value, dict) else list(value)
    copy[path[0]] = replaced(copy[path[0]], path[1:], new)
    return copy


def sliced(data: bytes, size: int) -> Iterator[bytes]:
    return (data[start : start + size] for start in range(0, len(data), size))
