"""Messages as other tools write them: each form is read and counted, or refused by name. Nothing goes in silence."""

from __future__ import annotations

import json
from typing import Any

import pytest

from shared.rows.check import check
from shared.rows.convert import canonical_lines, checked_lines
from shared.rows.foreign import recast

JsonObject = dict[str, Any]
U: JsonObject = {"role": "user", "content": "Hi"}
A: JsonObject = {"role": "assistant", "content": "Yes"}
TOOL: JsonObject = {"type": "function", "function": {"name": "w", "parameters": {"type": "object"}}}
RESULT: JsonObject = {"role": "tool", "tool_call_id": "c1", "content": "r"}


def call(call_id: str | None = "c1", arguments: Any = '{"x": 1}') -> JsonObject:
    named = {"function": {"name": "w", "arguments": arguments}}
    return named if call_id is None else {"id": call_id, "type": "function", **named}


def calls(*some: JsonObject, content: Any = None) -> JsonObject:
    return {"role": "assistant", "content": content, "tool_calls": list(some)}


def canonical_calls(*ids: str, arguments: str = '{"x": 1}') -> JsonObject:
    return {"role": "assistant", "content": "", "tool_calls": [call(one, arguments) for one in ids]}


def answered(call_id: str, content: str = "r") -> JsonObject:
    return {"role": "tool", "content": content, "tool_call_id": call_id}


def chat(*messages: JsonObject, **more: Any) -> JsonObject:
    return {"messages": list(messages), **more}


def of(*messages: JsonObject) -> JsonObject:
    return {"messages": [U, *messages]}


def human(value: str) -> JsonObject:
    return {"from": "human", "value": value}


def gpt(value: str, **more: Any) -> JsonObject:
    return {"from": "gpt", "value": value, **more}


THOUGHT: JsonObject = {"role": "assistant", "content": "Yes", "reasoning_content": "So."}
# name, row, what is trained, how the report names the form (None: as it is)
READ: list[tuple[str, JsonObject, JsonObject, str | None]] = [
    ("reasoning_content", chat(U, THOUGHT), of(THOUGHT), None),
    ("reasoning", chat(U, {**A, "reasoning": "So."}), of(THOUGHT), "reasoning"),
    ("thinking", chat(U, {**A, "thinking": "So."}), of(THOUGHT), "reasoning"),
    ("the same reasoning twice", chat(U, {**THOUGHT, "reasoning": "So."}), of(THOUGHT), "reasoning"),
    ("no reasoning", chat(U, {**A, "reasoning_content": "", "thinking": None}), of(A), None),
    ("Anthropic's thinking", chat(U, {**A, "content": [{"type": "thinking", "thinking": "So."}, {"type": "text",
     "text": "Yes"}]}), of(THOUGHT), "parts"),
    ("Mistral's thinking", chat(U, {**A, "content": [{"type": "thinking", "thinking": [{"type": "text",
     "text": "So."}]}, {"type": "text", "text": "Yes"}]}), of(THOUGHT), "parts"),
    ("reasoning of an item", {"conversations": [human("Hi"), gpt("Yes", reasoning="So.")]}, of(THOUGHT), None),
    ("train", chat(U, {**A, "train": False}, U, {**A, "train": True}), of({**A, "weight": 0}, U, {**A, "weight": 1}),
     "train_flag"),
    ("training", chat({**U, "training": False}, {**A, "training": True}), of({**A, "weight": 1}), "train_flag"),
    ("loss", chat(U, {**A, "loss": False}, U, A), of({**A, "weight": 0}, U, A), "train_flag"),
    ("loss and weight", chat(U, {**A, "loss": True, "weight": 0}, U, A), of({**A, "weight": 0}, U, A), "train_flag"),
    ("what the Python client dumps", chat(U, {**A, "refusal": None, "annotations": [], "audio": None,
     "function_call": None, "tool_calls": None}), of(A), None),
    ("ids and times", chat({**U, "id": "a", "timestamp": 3}, {**A, "model": "x"}), of(A), None),
    ("arguments as an object", chat(U, calls(call(arguments={"x": 1})), RESULT, A, tools=[TOOL]),
     {**of(canonical_calls("c1"), answered("c1"), A), "tools": [TOOL]}, "arguments_as_object"),
    ("calls without ids", chat(U, calls(call(None), call(None)), {"role": "tool", "name": "w", "content": "r"},
     {"role": "tool", "name": "w", "content": "s"}, A, tools=[TOOL]),
     {**of(canonical_calls("call_1", "call_1_1"), {**answered("call_1"), "name": "w"},
           {**answered("call_1_1", "s"), "name": "w"}, A), "tools": [TOOL]}, "calls_without_ids"),
    ("answers without ids", chat(U, calls(call()), {"role": "tool", "content": "r"}, A, tools=[TOOL]),
     {**of(canonical_calls("c1"), answered("c1"), A), "tools": [TOOL]}, "calls_without_ids"),
    ("bare calls", chat(U, calls({"id": "c1", "name": "w", "arguments": '{"x": 1}'}), RESULT, A, tools=[TOOL]),
     {**of(canonical_calls("c1"), answered("c1"), A), "tools": [TOOL]}, "bare_calls"),
    ("a call with parameters, as Llama writes it", chat(U, calls({"id": "c1", "name": "w", "parameters": {"x": 1}}),
     RESULT, A, tools=[TOOL]), {**of(canonical_calls("c1"), answered("c1"), A), "tools": [TOOL]}, "bare_calls"),
    ("a function with input", chat(U, calls({"id": "c1", "function": {"name": "w", "input": {"x": 1}}}),
     RESULT, A, tools=[TOOL]), {**of(canonical_calls("c1"), answered("c1"), A), "tools": [TOOL]}, "bare_calls"),
    ("calls as a stream numbers them", chat(U, calls({**call(), "index": 0}), tools=[TOOL]),
     {**of(canonical_calls("c1")), "tools": [TOOL]}, None),
    ("the old call with an object", chat(U, {**A, "content": None, "function_call": {"name": "w",
     "arguments": {"x": 1}}}, tools=[TOOL]), {**of(canonical_calls("call_1")), "tools": [TOOL]},
     "arguments_as_object"),
    ("ms-swift's roles", chat(U, {"role": "tool_call", "content": '{"name": "w", "arguments": {"x": 1}}'},
     {"role": "tool_call", "content": '{"name": "w", "arguments": {"x": 1}}'}, {"role": "tool_response",
     "content": "r"}, {"role": "tool_response", "content": "s"}, A, tools=json.dumps([TOOL])),
     {**of(canonical_calls("call_1", "call_1_1"), answered("call_1"), answered("call_1_1", "s"), A), "tools": [TOOL]},
     "call_roles"),
    ("tool_call of ShareGPT", {"conversations": [human("Hi"), {"from": "tool_call",
     "value": '{"name": "w", "arguments": {"x": 1}}'}, {"from": "tool_response", "value": "r"}, gpt("Yes")],
     "tools": [TOOL]}, {**of(canonical_calls("call_1"), answered("call_1"), A), "tools": [TOOL]}, None),
    ("parts of the Responses API", chat({"role": "user", "content": [{"type": "input_text", "text": "Hi"}]},
     {"role": "assistant", "content": [{"type": "output_text", "text": "Yes", "annotations": []}]}), of(A), "parts"),
    ("a refusal as a part", chat(U, {"role": "assistant", "content": [{"type": "refusal", "refusal": "No"}]}),
     of({"role": "assistant", "content": "No"}), "parts"),
    ("a flag as a table has it", chat(U, {**A, "train": 0}, U, {**A, "loss": 1.0}),
     of({**A, "weight": 0}, U, {**A, "weight": 1}), "train_flag"),
    ("an empty refusal beside an answer", chat(U, {**A, "refusal": ""}), of(A), None),
    ("weight 0 of a question", chat({**U, "weight": 0}, {**A, "weight": 1}), of({**A, "weight": 1}), None),
    ("tools as JSON text", chat(U, A, tools=json.dumps([TOOL])), {**of(A), "tools": [TOOL]}, "tools"),
    ("bare functions as tools", chat(U, A, tools=[TOOL["function"]]), {**of(A), "tools": [TOOL]}, "tools"),
    ("tools of the Responses API", chat(U, A, tools=[{"type": "function", **TOOL["function"]}]),
     {**of(A), "tools": [TOOL]}, "tools"),
    ("a prompt of messages and a text", {"prompt": [U], "completion": "Yes"}, of(A), None),
    ("a prompt of text and messages", {"prompt": "Hi", "completion": [A]}, of(A), None),
    ("a context beside question and answer", {"question": "Who?", "context": "He did it.", "answer": "He."},
     {"messages": [{"role": "user", "content": "Who?\n\nHe did it."}, {"role": "assistant", "content": "He."}]},
     "question"),
    ("rejected_response", {**chat(U, A), "rejected_response": "No"},
     {"messages": [U], "chosen": A, "rejected": {"role": "assistant", "content": "No"}}, "rejected"),
    ("rejected_messages", {**chat(U, A), "rejected_messages": [U, {"role": "assistant", "content": "No"}]},
     {"messages": [U], "chosen": A, "rejected": {"role": "assistant", "content": "No"}}, "rejected"),
    ("reasoning in a pair", {"prompt": "Hi", "chosen": [{**A, "thinking": "So."}], "rejected": [A]},
     {"messages": [U], "chosen": THOUGHT, "rejected": A}, "reasoning"),
    ("roles in capitals", chat({**U, "role": "User"}, {**A, "role": "ASSISTANT"}), of(A), "capitals"),
    ("speakers in capitals", {"conversations": [{**human("Hi"), "from": "Human"}, {**gpt("Yes"), "from": "GPT"}]},
     of(A), "capitals"),
    ("calls and answers in capitals", chat(U, calls(call()), {**RESULT, "role": "Tool"}, {**A, "role": "Assistant"},
     tools=[TOOL]), {**of(canonical_calls("c1"), answered("c1"), A), "tools": [TOOL]}, "capitals"),
    ("arguments in the input of a pair", {"input": {"messages": [U, calls(call(arguments={"x": 1})), RESULT]},
     "preferred_completion": [A], "non_preferred_completion": [{"role": "assistant", "content": "No"}]},
     {"messages": [U, canonical_calls("c1"), answered("c1")], "chosen": A,
      "rejected": {"role": "assistant", "content": "No"}}, "arguments_as_object"),
]  # fmt: skip


@pytest.mark.parametrize(("row", "trained", "form"), [case[1:] for case in READ], ids=[case[0] for case in READ])
def test_a_message_of_another_tool_is_read_and_counted(row: JsonObject, trained: JsonObject, form: str | None) -> None:
    data = json.dumps(row).encode() + b"\n"
    report = check([data, data.replace(b'": ', b'":  ', 1)])
    lines = list(checked_lines([data]))

    assert report.problems == ()
    assert [json.loads(line) for line in lines] == [trained]
    assert lines == list(canonical_lines([data]))
    forms = {one.code: one.rows for one in report.warnings if one.code.startswith("converted_")}
    assert form is None or forms[f"converted_{form}"] == 2
    assert list(checked_lines(lines)) == lines


def test_a_row_of_openais_own_form_is_not_touched() -> None:
    row = chat(
        {"role": "system", "content": "s"}, U, {**A, "weight": 1}, {**U, "name": "x"}, calls(call()), tools=[TOOL]
    )

    assert recast(row).forms == ()
    assert recast(row).row == row


def test_keys_that_only_say_who_wrote_a_message_are_dropped_and_counted() -> None:
    row = chat({**U, "id": "a", "timestamp": 3}, {**A, "id": "b", "annotations": []})

    assert check([json.dumps(row).encode()]).dropped_columns == ("messages[].id", "messages[].timestamp")


# name, row, param, words
REFUSED: list[tuple[str, JsonObject, str, str]] = [
    ("two kinds of reasoning", chat(U, {**A, "reasoning": "a", "thinking": "b"}), "messages[1].reasoning", "known key"),
    ("reasoning of a user", chat({**U, "reasoning_content": "a"}, A), "messages[0].reasoning_content", "known key"),
    ("reasoning that is no text", chat(U, {**A, "reasoning_content": ["a"]}), "messages[1].reasoning_content",
     "use text"),
    ("reasoning of a human", {"conversations": [{**human("a"), "thinking": "b"}, gpt("c")]},
     "conversations[0].thinking", "beside an answer"),
    ("calls beside an item", {"conversations": [human("a"), gpt("b", tool_calls=[call()])]},
     "conversations[1].tool_calls", "from function_call"),
    ("a flag that asks to train a question", chat({**U, "train": True}, A), "messages[0].train", "known key"),
    ("a flag that is no truth", chat(U, {**A, "train": "yes"}), "messages[1].train", "true or false"),
    ("a mask", chat(U, {**A, "loss_mask": 0}), "messages[1].loss_mask", "use train"),
    ("a flag of another tool", chat(U, {**A, "ignore_loss": True}), "messages[1].ignore_loss", "use train"),
    ("a mask of a question", chat({**U, "loss_mask": 0}, A), "messages[0].loss_mask", "use train"),
    ("a role of another tool", chat(U, {**A, "role": "ai"}), "messages[1].role", 'use "assistant"'),
    ("a role under another key", chat({"type": "human", "content": "Hi"}, A), "messages[0].role", "stands under type"),
    ("a flag as text", chat(U, {**A, "train": "false"}), "messages[1].train", "use true or false"),
    ("a picture beside a message", chat({**U, "images": ["x.png"]}, A), "messages[0].images", "text-only"),
    ("a picture beside an item", {"conversations": [{"from": "human", "value": "Hi", "image": "x.png"},
     {"from": "gpt", "value": "Yes?"}]}, "conversations[0].image", "text-only"),
    ("a flag of skipping", {"conversations": [{"from": "human", "value": "Hi"},
     {"from": "gpt", "value": "Yes?", "skip": True}]}, "conversations[1].skip", "use train"),
    ("calls of another kit", chat(U, {**A, "content": [{"type": "tool-call", "toolName": "x"}]}),
     "messages[1].content[0].type", "write it as tool_calls"),
    ("an answer beside messages", {"messages": [U], "response": "Yes"}, "messages", "write response as"),
    ("functions beside tools", {**chat(U, A), "functions": [{"name": "a"}],
     "tools": [{"type": "function", "function": {"name": "b"}}]}, "functions", "would not be read"),
    *((f"a choice of what is trained ({key})", {**chat(U, A), key: value}, key, "no place") for key, value in (
        ("train_last_only", True), ("loss_on", "last"), ("roles_to_train", ["assistant"]), ("assistant_only_loss", 1),
        ("mask_prompt", False),
    )),
    ("thoughts in a column", {"question": "a", "answer": "b", "cot": "c"}, "cot", "reasoning_content"),
    ("a file of a picture", {**chat({**U, "content": "<image> What?"}, A), "screenshot": "a/b.png"}, "screenshot",
     "text-only"),
    ("boxes of pictures", {**chat(U, A), "objects": {"ref": ["a"], "bbox": [[1, 2, 3, 4]]}}, "objects", "text-only"),
    ("a pair without its other answer", {"prompt": "a", "chosen": "b"}, "rejected", "missing"),
    ("options of a template", {**chat(U, A), "chat_template_kwargs": {"enable_thinking": False}},
     "chat_template_kwargs", "no place"),
    ("weights of rows", {**chat(U, A), "loss_weight": 0.5}, "loss_weight", "no place"),
    ("a mask of tokens", {**chat(U, A), "input_mask": [1, 0]}, "input_mask", "no place"),
    ("a judgement under another name", {"prompt": "a", "completion": "b", "desirable": True}, "desirable",
     '{"label": "desirable"}'),
    ("a judgement in a word", chat(U, A, label="good"), "label", "true or false where it says how good"),
    ("a system text beside a prompt", {"prompt": "a", "completion": "b", "system": "c"}, "system",
     '{"instruction": "prompt", "output": "completion"}'),
    ("turns before a prompt", {"prompt": "a", "completion": "b", "history": [["c", "d"]]}, "history",
     '{"instruction": "prompt", "output": "completion"}'),
    ("a message of a tree", {"text": "Hi", "role": "prompter", "parent_id": "x"}, "role", "no place"),
    ("arguments of many levels", chat(U, calls(call(arguments='{"a":' * 40 + "1" + "}" * 40))),
     "messages[1].tool_calls[0].function.arguments", "32 levels"),
    ("a tool of many levels", chat(U, A, tools=[{**TOOL, "strict": json.loads("[" * 40 + "]" * 40)}]), "tools[0]",
     "too deeply"),
    ("an unknown key with a value", chat(U, {**A, "prefix": True}), "messages[1].prefix", "known key"),
    ("a weight of rows", {**chat(U, A), "sample_weight": 0.5}, "sample_weight", "no place"),
    ("reasoning beside a prompt", {"prompt": "a", "completion": "b", "thinking": "c"}, "thinking", "no place"),
    ("a call as a part", chat(U, {**A, "content": [{"type": "tool_use", "name": "w", "input": {}}]}),
     "messages[1].content[0].type", "write it as tool_calls"),
    ("a result as a part", chat({**U, "content": [{"type": "tool_result", "content": "x"}]}, A),
     "messages[0].content[0].type", "role tool"),
    ("a picture as a part", chat({**U, "content": [{"type": "image_url", "image_url": {"url": "x"}}]}, A),
     "messages[0].content[0].type", "text-only"),
    ("an answer before its call", chat(U, {"role": "tool", "content": "r"}, calls(call(None)), A, tools=[TOOL]),
     "messages[1].tool_call_id", "no earlier tool call, add tool_calls"),
    ("a call that is no JSON", chat(U, {"role": "tool_call", "content": "w(1)"}, A), "messages[1].role", "use"),
    ("a response beside a prompt", {"prompt": "a", "response": "b"}, "completion", '{"completion": "response"}'),
    ("a better answer of weight 0", {"prompt": [U], "chosen": [{**A, "weight": 0}], "rejected": "No"}, "chosen",
     "weight 0"),
    ("a call in Python's words", {"conversations": [human("a"), gpt("<tool_call>\n{'name': 'w'}\n</tool_call>"),
     {"from": "tool", "value": "r"}, gpt("b")]}, "conversations[2].from", "the <tool_call> before it cannot be read"),
    ("arguments that are a list", chat(U, calls(call(arguments=[1])), tools=[TOOL]),
     "messages[1].tool_calls[0].function.arguments", "json.dumps"),
    ("reasoning under another name", chat(U, {**A, "thought": "a"}), "messages[1].thought", "mean reasoning_content"),
    ("reasoning of an item under another name", {"conversations": [human("a"), gpt("b", cot="c")]},
     "conversations[1].cot", "mean reasoning_content"),
    ("a label of an item", {"conversations": [human("a"), gpt("b", label=False)]}, "conversations[1].label",
     "use train"),
    ("a label of a message", chat(U, {**A, "label": 0}), "messages[1].label", "use train"),
    ("reasoning beside messages", {**chat(U, A), "reasoning": "I think so."}, "reasoning", "no place"),
    ("thoughts turned off", {**chat(U, A), "enable_thinking": False}, "enable_thinking", "no place"),
    ("Llama's role of a result", chat(U, calls(call()), {"role": "ipython", "content": "r"}, A, tools=[TOOL]),
     "messages[2].role", 'use "tool"'),
    ("tools in Python's words", chat(U, A, tools=str([TOOL])), "tools", "Python literal"),
    ("tools of an item in Python's words", {"conversations": [human("a"), gpt("b")], "tools": str([TOOL])}, "tools",
     "Python literal"),
    ("a tool as broken JSON text", chat(U, A, tools=[json.dumps(TOOL)[:-1]]), "tools[0]", "use {"),
    ("no arguments", chat(U, calls({"id": "c1", "type": "function", "function": {"name": "w"}}), tools=[TOOL]),
     "messages[1].tool_calls[0].function.arguments", "write {}"),
    ("arguments under an unknown key", chat(U, calls({"id": "c1", "type": "function", "function": {"name": "w",
     "params": {}}}), tools=[TOOL]), "messages[1].tool_calls[0].function.params", "known key"),
    ("hostile roles", chat(U, {"role": ["x"], "content": {}}), "messages[1].role", "use one of"),
    ("hostile parts", chat(U, {**A, "content": [{"type": ["x"]}, 3]}), "messages[1].content[0]", "use"),
    ("hostile calls", chat(U, {**A, "tool_calls": [{"function": 3}, {"id": "a"}]}), "messages[1].tool_calls[0].id",
     "text id"),
]  # fmt: skip


@pytest.mark.parametrize(("row", "param", "words"), [case[1:] for case in REFUSED], ids=[case[0] for case in REFUSED])
def test_what_cannot_be_obeyed_is_refused_by_name(row: JsonObject, param: str, words: str) -> None:
    problems = check([json.dumps(row).encode()]).problems

    assert param in {problem.param for problem in problems}
    assert any(words in problem.message for problem in problems if problem.param == param)
