"""Promises about rows as other tools and public data sets write them: the meaning is kept, or refused by name."""

from __future__ import annotations

import json
from typing import Any

import pytest

from shared.rows.check import DatasetReport, check
from shared.rows.convert import canonical_lines, checked_lines

U = {"role": "user", "content": "Who won?"}
A = {"role": "assistant", "content": "Nobody."}
TOOL = {"type": "function", "function": {"name": "land", "parameters": {"type": "object"}}}


def line(row: dict[str, Any]) -> bytes:
    return json.dumps(row).encode() + b"\n"


def read(*rows: dict[str, Any]) -> tuple[list[dict[str, Any]], DatasetReport]:
    """The canonical rows, which both roads to the trainer agree on, and the report."""
    data = b"".join(map(line, rows))
    report = check([data])
    assert report.ok, report.problems
    made = list(canonical_lines([data]))
    assert list(checked_lines([data])) == made
    return [json.loads(one) for one in made], report


def warned(report: DatasetReport) -> dict[str, int]:
    return {warning.code: warning.rows for warning in report.warnings if warning.code != "duplicate_rows"}


def refused(row: dict[str, Any]) -> tuple[str, str, str]:
    report = check([line(row)])
    assert report.problem_count == 1, report.problems
    assert report.problems[0].line == 1
    return report.problems[0].param, report.problems[0].code, report.problems[0].message


def calling(arguments: Any) -> dict[str, Any]:
    call = {"id": "c1", "type": "function", "function": {"name": "land", "arguments": arguments}}
    return {"messages": [U, {"role": "assistant", "tool_calls": [call]}], "tools": [TOOL]}


def arguments_of(row: dict[str, Any]) -> str:
    text: str = row["messages"][1]["tool_calls"][0]["function"]["arguments"]
    return text


@pytest.mark.parametrize("times", [2, 3])
def test_arguments_encoded_again_are_read_as_the_object_inside_and_counted(times: int) -> None:
    encoded = '{"where": "here"}'
    for _ in range(times - 1):
        encoded = json.dumps(encoded)

    rows, report = read(calling(encoded), calling('{"where": "there"}'), calling(encoded))

    assert [arguments_of(row) for row in rows] == ['{"where": "here"}', '{"where": "there"}', '{"where": "here"}']
    assert warned(report) == {"arguments_encoded_twice": 2}


def test_the_old_function_call_and_sharegpt_have_their_arguments_read_too() -> None:
    twice = json.dumps('{"a": 1}')
    old = {"messages": [U, {"role": "assistant", "function_call": {"name": "land", "arguments": twice}}]}
    share = {
        "conversations": [
            {"from": "human", "value": "Who won?"},
            {"from": "function_call", "value": json.dumps({"name": "land", "arguments": twice})},
        ]
    }

    assert arguments_of(read(old)[0][0]) == '{"a": 1}'
    assert arguments_of(read(share)[0][0]) == '{"a": 1}'


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ('"land"', "json.dumps"),
        ("[1]", "json.dumps"),
        ("{'up': True}", "Python literal"),
        ('{"up": True}', "Python literal"),
        ('{"a": 1, "a": 2}', "stands twice"),
        ('{"a": NaN}', "NaN"),
        (json.dumps('{"a": 1e999}'), "out of range"),
        (["a"], "json.dumps"),
        ("", "write {}"),
        (None, "write {}"),
    ],
)
def test_arguments_that_are_no_object_stay_refused_with_their_reason(arguments: Any, words: str) -> None:
    param, code, message = refused(calling(arguments))

    assert (param, code) == ("messages[1].tool_calls[0].function.arguments", "invalid_arguments")
    assert words in message


@pytest.mark.parametrize("number", [2**53 + 1, 1460323737035677698, 2**64 + 1, -(10**40)])
def test_long_integers_in_arguments_and_schemas_are_kept_digit_for_digit(number: int) -> None:
    row = calling(json.dumps({"post": number}))
    row["tools"] = [{"type": "function", "function": {"name": "land", "parameters": {"const": number}}}]

    (made,), _ = read(row)

    assert json.loads(arguments_of(made)) == {"post": number}
    assert made["tools"][0]["function"]["parameters"] == {"const": number}


@pytest.mark.parametrize(
    ("number", "rounded"),
    [
        ("0.12345678901234567890123", True),
        ("123456789012345678.5", True),
        ("-1.2345678901234567891e-7", True),
        ("0.30000000000000004", False),
        ("1.50000000000000000000", False),
        ("12345678901234567890", False),
        ('"0.12345678901234567890123"', False),
    ],
)
def test_a_decimal_that_programs_would_round_is_told_and_its_text_is_kept(number: str, rounded: bool) -> None:
    (made,), report = read(calling(f'{{"price": {number}}}'))

    assert arguments_of(made) == f'{{"price": {number}}}'
    assert ("rounded_decimal" in warned(report)) is rounded


@pytest.mark.parametrize(("number", "rounded"), [("0.12345678901234567890123", True), ("0.30000000000000004", False)])
def test_a_decimal_of_arguments_given_as_an_object_is_told_when_it_is_rounded(number: str, rounded: bool) -> None:
    row = json.dumps(calling({"price": 7})).replace('"price": 7', f'"price": {number}')
    report = check([row.encode()])

    assert report.ok, report.problems
    assert ("rounded_decimal" in warned(report)) is rounded


def test_an_empty_prompt_leaves_the_whole_completion_to_train() -> None:
    (made,), report = read({"prompt": "", "completion": " In our voice."})

    assert made == {"prompt": "", "completion": " In our voice."}
    assert (report.trained_characters, warned(report)) == (14, {})


@pytest.mark.parametrize("prompt", ["", [], None])
def test_an_empty_prompt_of_messages_leaves_the_whole_completion_to_train(prompt: Any) -> None:
    assert read({"prompt": prompt, "completion": [A]})[0] == [{"messages": [A]}]


def test_an_alpaca_row_may_ask_in_its_input_alone() -> None:
    (made,), _ = read({"instruction": "", "input": "Who won?", "output": "Nobody."})

    assert made == {"messages": [U, A]}
    assert refused({"instruction": "", "input": " ", "output": "x"})[:2] == ("instruction", "empty_text")


def test_an_empty_answer_passes_where_it_is_not_trained_and_is_named_where_it_is() -> None:
    empty = {"role": "assistant", "content": ""}

    read({"messages": [U, {**empty, "weight": 0}, U, A]})

    assert refused({"prompt": "", "completion": ""})[:2] == ("completion", "empty_text")
    assert refused({"messages": [U, empty]})[1] == "no_trainable_tokens"


@pytest.mark.parametrize(
    "more",
    [
        {"prompt": "Who won?", "prompt_id": "7", "category": "Chat"},  # no_robots, ultrachat
        {"source": "web"},  # smoltalk, tulu
        {"id": 1460323737035677698, "score": 0.5, "meta": {"a": [1]}},
    ],
)
def test_columns_of_no_account_beside_messages_are_dropped_and_counted_by_name(more: dict[str, Any]) -> None:
    rows, report = read({"messages": [U, A], **more}, {"messages": [U, A]}, {"messages": [U, A], **more})

    assert rows == [{"messages": [U, A]}] * 3
    assert report.dropped_columns == tuple(sorted(more))
    assert warned(report) == {"dropped_columns": 2}
    assert all(f"{name} (2 rows)" in report.warnings[0].message for name in more)


@pytest.mark.parametrize(
    ("row", "slip", "meant"),
    [
        ({"messages": [U, A], "tool": [TOOL]}, "tool", "tools"),
        ({"messages": [U, A], "parallel_tool_call": True}, "parallel_tool_call", "parallel_tool_calls"),
        ({"messages": [U, A], "Tools": [TOOL]}, "Tools", "tools"),
        ({"prompt": "a", "completion": "b", "completions": "c"}, "completions", "completion"),
        ({"conversations": [{"from": "gpt", "value": "a"}], "sytem": "s"}, "sytem", "system"),
        ({"instruction": "a", "output": "b", "inputs": "c"}, "inputs", "input"),
    ],
)
def test_a_near_miss_of_a_known_key_stays_refused(row: dict[str, Any], slip: str, meant: str) -> None:
    param, code, message = refused(row)

    assert (param, code) == (slip, "unknown_key")
    assert f"did you mean {meant}?" in message


@pytest.mark.parametrize(
    ("row", "column"),
    [
        ({"messages": [U, A], "kto_tag": "yes"}, "kto_tag"),
        ({"messages": [U, A], "train_on_input": True}, "train_on_input"),
        ({"prompt": "a", "completion": "b", "system": "s"}, "system"),
        ({"text": "a", "label": 1}, "label"),
        ({"instruction": "a", "output": "b", "weight": 0}, "weight"),
        ({"conversations": [{"from": "gpt", "value": "a"}], "mask": [0]}, "mask"),
    ],
)
def test_a_column_that_means_something_is_never_dropped(row: dict[str, Any], column: str) -> None:
    assert refused(row)[:2] == (column, "unknown_key")


@pytest.mark.parametrize(
    "more", [{"label": {"topic": ["x"]}}, {"reasoning": "on"}, {"thinking": False}, {"label": ["x"]}]
)
def test_a_column_of_a_known_name_that_cannot_have_its_meaning_is_dropped_and_counted(more: dict[str, Any]) -> None:
    (row,), report = read({"messages": [U, A], **more})

    assert row == {"messages": [U, A]}
    assert report.dropped_columns == tuple(more)


SHARE = [{"from": "human", "value": "<image>\nWhat is it?"}, {"from": "gpt", "value": "A bus."}]


@pytest.mark.parametrize(
    "column",
    ["image", "images", "video", "audios", "Image", "picture", "photos", "image_file", "video_path", "audio-url"],
)
@pytest.mark.parametrize("row", [{"conversations": SHARE}, {"messages": [U, A]}, {"instruction": "a", "output": "b"}])
def test_a_column_of_pictures_or_sounds_is_refused_in_every_shape(row: dict[str, Any], column: str) -> None:
    param, code, message = refused({**row, column: "000.jpg"})

    assert (param, code) == (column, "unsupported_content")
    assert "text-only" in message


@pytest.mark.parametrize("column", ["picture_1", "image_0", "screenshot"])
def test_a_column_of_one_of_several_pictures_is_refused_too(column: str) -> None:
    assert refused({"messages": [U, A], column: "000.jpg"})[:2] == (column, "unsupported_content")


def test_a_picture_as_text_is_refused_under_any_name() -> None:
    assert refused({"messages": [U, A], "view": "data:image/png;base64,aGk="})[:2] == ("view", "unsupported_content")


@pytest.mark.parametrize("more", [{"skip": True}, {"only_last": 1}, {"last_turn_only": True}])
def test_a_choice_of_what_is_trained_of_a_row_is_refused_by_name(more: dict[str, Any]) -> None:
    assert refused({"messages": [U, A], **more})[:2] == (next(iter(more)), "unknown_key")
    assert read({"messages": [U, A], **dict.fromkeys(more, False)})[0] == [{"messages": [U, A]}]


@pytest.mark.parametrize("column", ["image_caption", "video_id", "photo_credit", "media", "imaging"])
def test_a_column_of_words_about_pictures_is_dropped_and_counted(column: str) -> None:
    (row,), report = read({"messages": [U, A], column: "a bus"})

    assert (row, report.dropped_columns) == ({"messages": [U, A]}, (column,))


def test_a_placeholder_without_a_column_of_pictures_is_text_and_is_told() -> None:
    (row,), report = read({"conversations": SHARE, "image_id": "7"})

    assert row["messages"][0]["content"] == "<image>\nWhat is it?"
    assert warned(report) == {"media_placeholder": 1, "dropped_columns": 1}


def test_a_placeholder_beside_an_empty_image_column_is_refused_and_an_empty_column_alone_is_not() -> None:
    assert refused({"conversations": SHARE, "image": None})[:2] == ("image", "unsupported_content")
    assert read({"messages": [U, A], "images": []})[0] == [{"messages": [U, A]}]


@pytest.mark.parametrize("row", [{"messages": [U, A]}, {"conversations": [{"from": "human", "value": "Who won?"}]}])
def test_a_system_column_becomes_the_first_message_once(row: dict[str, Any]) -> None:
    if "conversations" in row:
        row["conversations"].append({"from": "gpt", "value": "Nobody."})
    system = {"role": "system", "content": "Be brief."}

    for column in ("system", "system_prompt"):
        assert read({**row, column: "Be brief."})[0] == [{"messages": [system, U, A]}]
    assert read({"messages": [system, U, A], "system": "Be brief."})[0] == [{"messages": [system, U, A]}]
    assert refused({**row, "system": 5})[:2] == ("system", "wrong_type")


B = {"role": "assistant", "content": "We did."}
PAIR = {"messages": [U], "chosen": A, "rejected": B}
SYSTEM = {"role": "system", "content": "Be brief."}
FOREIGN = [
    # the form, the row as the data set writes it, the canonical row
    (
        "transcript",
        {
            "chosen": "\n\nHuman: Hi\n\nAssistant: Yes?\n\nHuman: Who won?\n\nAssistant: Nobody.",
            "rejected": "\n\nHuman: Hi\n\nAssistant: Yes?\n\nHuman: Who won?\n\nAssistant: We did.",
        },
        {
            "messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Yes?"}, U],
            "chosen": A,
            "rejected": B,
        },
    ),
    (
        "transcript",
        {"prompt": "\n\nHuman: Who won?\n\nAssistant:", "chosen": "Nobody.", "rejected": "We did."},
        PAIR,
    ),
    (
        "",
        {
            "prompt": "Who won?",
            "prompt_id": "x",
            "messages": [U, A],
            "chosen": [U, A],
            "rejected": [U, B],
            "score_chosen": 9.0,
        },
        PAIR,
    ),
    (
        "",
        {"prompt": "Who won?", "chosen": [SYSTEM, U, A], "rejected": [SYSTEM, U, B]},
        {**PAIR, "messages": [SYSTEM, U]},
    ),
    (
        "",
        {"prompt": "Who won?", "chosen": [U, A], "rejected": [U, B], "system": "Be brief."},
        {**PAIR, "messages": [SYSTEM, U]},
    ),
    (
        "question",
        {"system": "Be brief.", "question": "Who won?", "chosen": "Nobody.", "rejected": "We did."},
        {**PAIR, "messages": [SYSTEM, U]},
    ),
    ("question", {"question": "Who won?", "answer": "Nobody."}, {"messages": [U, A]}),
    (
        "question",
        {"id": "niv.1", "system_prompt": "Be brief.", "question": "Who won?", "response": "Nobody."},
        {"messages": [SYSTEM, U, A]},
    ),
    ("question", {"id": "1", "system_prompt": "", "question": "Who won?", "response": "Nobody."}, {"messages": [U, A]}),
    (
        "question",
        {"query": "Who won?", "response": "Nobody.", "history": [["Hi", "Yes?"]]},
        {"messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Yes?"}, U, A]},
    ),
    (
        "dolly",
        {"instruction": "Who won?", "context": "Match 3.", "response": "Nobody.", "category": "qa"},
        {"messages": [{"role": "user", "content": "Who won?\n\nMatch 3."}, A]},
    ),
    (
        "preferred_outputs",  # OpenAI's guide, Fireworks, Together
        {"input": {"messages": [U]}, "preferred_output": [A], "non_preferred_output": [B]},
        PAIR,
    ),
    ("dolly", {"instruction": "Who won?", "context": "", "response": "Nobody."}, {"messages": [U, A]}),
    ("instruction_pair", {"instruction": "Who won?", "input": "", "chosen": "Nobody.", "rejected": "We did."}, PAIR),
    ("tagged", {"messages": [U, B], "label": False}, {"messages": [U], "completion": B, "label": False}),
    (
        "tagged",
        {
            "conversations": [{"from": "human", "value": "Who won?"}, {"from": "gpt", "value": "Nobody."}],
            "kto_tag": True,
        },
        {"messages": [U], "completion": A, "label": True},
    ),
    (
        "tagged",
        {"instruction": "Who won?", "input": "", "output": "Nobody.", "kto_tag": True},
        {"messages": [U], "completion": A, "label": True},
    ),
    ("tagged", {"messages": [U, A], "label": "False"}, {"messages": [U], "completion": A, "label": False}),
    (
        "",
        {"prompt": "Who won?", "completion": "Nobody.", "label": "1"},
        {"messages": [U], "completion": A, "label": True},
    ),
    (
        "tagged",
        {"prompt": "Who won?", "completion": "Nobody.", "kto_tag": True},
        {"messages": [U], "completion": A, "label": True},
    ),
]


@pytest.mark.parametrize(("form", "row", "wanted"), FOREIGN, ids=[f"{n} {f[0]}" for n, f in enumerate(FOREIGN)])
def test_a_row_of_a_public_set_loads_as_it_is_and_is_counted(
    form: str, row: dict[str, Any], wanted: dict[str, Any]
) -> None:
    rows, report = read(row, row)

    assert rows == [wanted, wanted]
    assert {code: rows for code, rows in warned(report).items() if code.startswith("converted_")} == (
        {f"converted_{form}": 2} if form else {}
    )


@pytest.mark.parametrize(
    ("row", "words"),
    [
        (
            {"system": "SYSTEM: You help.", "chat": "Hello USER: Hi\n\n\nASSISTANT: Yes? <|endoftext|>"},
            "FUNCTION RESPONSE",
        ),
        ({"instruction": "Hi", "completions": [{"response": "a"}], "models": []}, "prompt, chosen and rejected"),
        ({"Prompt": "a", "Completion": "b"}, "capitals"),
        ({"dialogue": [U, A], "model": "x"}, '{"messages": "dialogue"}'),
        ({"talk": [{"from": "human", "value": "a"}]}, '{"conversations": "talk"}'),
        ({"problem": "a", "solution": "b"}, '{"prompt": "problem", "completion": "solution"}'),
        ({"segments": [{"label": True, "text": "a"}]}, "weight 0"),
    ],
)
def test_a_form_that_cannot_be_read_is_refused_with_the_way_to_convert_it(row: dict[str, Any], words: str) -> None:
    _, code, message = refused(row)

    assert code == "unknown_format"
    assert words in message


@pytest.mark.parametrize(
    ("row", "column"),
    [
        ({"question": "Who won?", "answer": ""}, "answer"),
        ({"instruction": "a", "context": 5, "response": "b"}, "context"),
        ({"query": None, "response": "b"}, "query"),
    ],
)
def test_a_fault_in_a_converted_row_is_told_under_the_name_that_the_file_has(row: dict[str, Any], column: str) -> None:
    param, _, message = refused(row)

    assert param == column
    assert message.startswith(column)


def test_a_transcript_in_a_prompt_of_text_alone_stays_text() -> None:
    row = {"prompt": "Human: hi", "chosen": "a", "rejected": "b"}

    assert read(row)[0][0]["messages"] == [{"role": "user", "content": "Human: hi"}]


def test_an_empty_answer_of_a_transcript_is_named() -> None:
    asked = "\n\nHuman: Who won?\n\nAssistant:"
    param, code, message = refused({"chosen": f"{asked} Nobody.", "rejected": f"{asked} "})

    assert (param, code) == ("rejected", "no_trainable_tokens")
    assert "empty" in message


def test_an_answer_that_is_judged_may_call_tools() -> None:
    function = {"name": "score", "parameters": {"type": "object"}}
    call = {"id": "c1", "type": "function", "function": {"name": "score", "arguments": "{}"}}
    answer = {"role": "assistant", "content": "", "tool_calls": [call]}
    tools = [{"type": "function", "function": function}]
    row = {"prompt": [U], "completion": [answer], "label": True, "tools": tools}

    assert read(row)[0] == [{"messages": [U], "tools": tools, "completion": answer, "label": True}]
    unlisted = {**row, "tools": [{"type": "function", "function": {"name": "other"}}]}
    assert refused(unlisted)[:2] == ("completion[0].tool_calls[0].function.name", "unknown_tool")


@pytest.mark.parametrize("key", ["\\ud83d", "a\\u0000", "k" * 5000 + "\\ud83d"])
def test_a_report_names_no_key_that_cannot_be_stored(key: str) -> None:
    (problem,) = check([f'{{"messages": [{{"role": "user", "{key}": 1}}]}}'.encode()]).problems

    assert problem.code in {"lone_surrogate", "nul_character"}
    assert problem.param.startswith("messages[0].")
    assert len(problem.param) < 250
    for text in (problem.param, problem.message):
        assert "\0" not in text
        assert text.encode()
