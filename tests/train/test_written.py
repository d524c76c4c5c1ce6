"""Nothing that a row says may be missing from what is trained, unless the user is told."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest

import worker.train.chat
from shared.contract.events import EXIT_DONE
from shared.contract.spec import DataFacts, Training
from shared.errors import Invalid
from tests.train.template_families import family_tokenizer
from tests.train.tiny import CHATML, chat, make_spec, make_tokenizer, run, write_rows
from worker.train.data import RowReader, RowSet
from worker.train.written import lost

TOOL = {
    "type": "function",
    "function": {
        "name": "weather",
        "description": "Tells today's weather",
        "parameters": {"type": "object", "properties": {"city": {"type": "string", "enum": ["Rome", "Oslo"]}}},
    },
}
TURN_OF = "{{ '<|im_start|>' + m.role + '\\n' + m.content }}"
PROMPT = "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
WITH_CALLS = (
    "{% if tools %}{{ tools | tojson }}{% endif %}{% for m in messages %}"
    + TURN_OF
    + "{% for c in m.tool_calls or [] %}"
    "{{ '<call>' }}{{ c.function | tojson }}{{ '</call>' }}{% endfor %}{{ '<|im_end|>\\n' }}{% endfor %}" + PROMPT
)
FIRST_CALL_ALONE = WITH_CALLS.replace("m.tool_calls or []", "(m.tool_calls or [])[:1]")
# As the distills of DeepSeek-R1 have it: what stands before </think> is cut off every answer.
WITHOUT_REASONING = (
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\\n' }}{% set content = m.content %}"
    "{% if m.role == 'assistant' and '</think>' in content %}{% set content = content.split('</think>')[-1] %}"
    "{% endif %}"
    "{{ content + '<|im_end|>\\n' }}{% endfor %}" + PROMPT
)
WITHOUT_SYSTEM = (
    "{% for m in messages %}{% if m.role != 'system' %}"
    + TURN_OF
    + "{{ '<|im_end|>\\n' }}{% endif %}{% endfor %}"
    + PROMPT
)
REFUSES_SYSTEM = "{% for m in messages %}{% if m.role == 'system' %}{{ raise_exception('Only user and assistant!') }}"
REFUSES_SYSTEM += "{% endif %}" + TURN_OF + "{{ '<|im_end|>\\n' }}{% endfor %}" + PROMPT


def read(folder: Path, rows: list[dict], *, template: str, data_format: str = "chat", **training: Any) -> RowSet:
    facts = DataFacts(format=data_format, train_rows=len(rows))
    reader = RowReader(make_tokenizer(template), facts=facts, training=Training.model_validate(training))
    return reader.read(write_rows(folder / "rows.jsonl", rows))


def refusal(folder: Path, rows: list[dict], **options: Any) -> Invalid:
    with pytest.raises(Invalid) as refused:
        read(folder, rows, **options)
    return refused.value


def called(*cities: str, content: str | None = None, **keys: Any) -> dict[str, Any]:
    functions = [{"name": "weather", "arguments": json.dumps({"city": city})} for city in cities]
    calls = [{"id": f"c{place}", "type": "function", "function": one} for place, one in enumerate(functions)]
    answer = {"role": "assistant", "content": content, "tool_calls": calls, **keys}
    return {"messages": [{"role": "user", "content": "How is the weather?"}, answer], "tools": [TOOL]}


def said(role: str, content: str) -> dict[str, Any]:
    return {"role": role, "content": content}


def test_a_call_that_the_template_does_not_know_refuses_the_row_and_names_it(tmp_path: Path) -> None:
    error = refusal(tmp_path, [chat("u", "a"), called("Rome"), called("Oslo")], template=CHATML)

    assert error.code == "not_rendered"
    assert error.message.startswith("Row 2: ")
    assert "messages[1]" in error.message
    assert '"weather"' in error.message
    assert "training.chat_template" in error.message
    assert error.message.endswith("(2 rows are refused.)")


def test_a_template_that_writes_calls_trains_them(tmp_path: Path) -> None:
    (row,) = read(tmp_path, [called("Rome", "Oslo", content="I look.")], template=WITH_CALLS).rows

    calls = "".join(f'<call>{{"name": "weather", "arguments": {{"city": "{one}"}}}}</call>' for one in ("Rome", "Oslo"))
    assert make_tokenizer().decode(row.ids[row.labelled]) == f"I look.{calls}<|im_end|>"


@pytest.mark.parametrize("cities", [("Rome", "Oslo"), ("Rome", "Rome")])
def test_a_second_call_that_is_left_out_refuses_the_row(tmp_path: Path, cities: tuple[str, str]) -> None:
    assert "tool_calls[1]" in refusal(tmp_path, [called(*cities)], template=FIRST_CALL_ALONE).message


def test_text_beside_a_call_that_is_left_out_refuses_the_row(tmp_path: Path) -> None:
    silent = WITH_CALLS.replace("m.content }}", "(m.content if not m.tool_calls else '') }}")

    assert '"I look."' in refusal(tmp_path, [called("Rome", content="I look.")], template=silent).message


def test_arguments_that_are_left_out_refuse_the_row(tmp_path: Path) -> None:
    names_alone = WITH_CALLS.replace("c.function | tojson", "c.function.name")

    assert "city" in refusal(tmp_path, [called("Rome")], template=names_alone).message


def test_reasoning_that_is_cut_off_refuses_the_row(tmp_path: Path) -> None:
    row = chat("What is 2+1?", "<think>\nTwo and 1 make 3.\n</think>\n\n3")
    error = refusal(tmp_path, [row], template=WITHOUT_REASONING)

    assert error.code == "not_rendered"
    assert "Two and 1 make 3." in error.message


@pytest.mark.parametrize("answer", ["chosen", "rejected"])
def test_reasoning_that_is_cut_off_an_answer_of_a_pair_refuses_the_row(tmp_path: Path, answer: str) -> None:
    row = {"messages": [said("user", "u")], "chosen": said("assistant", "yes"), "rejected": said("assistant", "no")}
    row[answer] = said("assistant", "<think>why</think>so")

    error = refusal(tmp_path, [row], template=WITHOUT_REASONING, data_format="preference")

    assert error.code == "not_rendered"
    assert "messages[1]" in error.message


def test_what_an_untrained_answer_loses_is_counted_and_not_refused(tmp_path: Path) -> None:
    row = {"messages": [*called("Rome", weight=0)["messages"], said("user", "And?"), said("assistant", "Fine.")]}
    (found,) = read(tmp_path, [row, chat("u", "a"), row], template=CHATML).unwritten

    assert found.code == "tool_call_not_rendered"
    assert "messages[1]" in found.message
    assert (found.rows.count, found.rows.rows) == (2, [1, 3])


def test_a_system_text_that_a_template_skips_is_counted_and_refused_where_all_is_trained(tmp_path: Path) -> None:
    row = {"messages": [said("system", "Answer in French."), *chat("u", "a")["messages"]]}
    (found,) = read(tmp_path, [row], template=WITHOUT_SYSTEM).unwritten
    error = refusal(tmp_path, [row], template=WITHOUT_SYSTEM, train_on="all")

    assert found.code == "content_not_rendered"
    assert "Answer in French." in found.message
    assert error.code == "not_rendered"


def test_tools_that_a_template_skips_are_counted(tmp_path: Path) -> None:
    (found,) = read(tmp_path, [chat("u", "a") | {"tools": [TOOL]}], template=CHATML).unwritten

    assert found.code == "tools_not_rendered"


@pytest.mark.parametrize("answer", ["", " \n"])
def test_an_empty_answer_refuses_the_row(tmp_path: Path, answer: str) -> None:
    row = {"messages": [*chat("u", answer)["messages"], said("user", "v"), said("assistant", "b")]}
    error = refusal(tmp_path, [row], template=CHATML)
    row["messages"][1]["weight"] = 0

    assert error.code == "empty_answer"
    assert "Row 1: messages[1]" in error.message
    assert len(read(tmp_path, [row], template=CHATML).rows) == 1


def test_a_row_that_the_template_raises_for_is_named_with_a_remedy(tmp_path: Path) -> None:
    bad = {"messages": [said("system", "Be brief."), *chat("q6", "a")["messages"]]}
    rows = [chat(f"q{number}", "a") for number in range(10)]
    rows[6] = bad
    error = refusal(tmp_path, rows, template=REFUSES_SYSTEM)

    assert error.code == "chat_template_failed"
    assert error.message.startswith("Row 7: ")
    assert "Only user and assistant. " in error.message
    assert "training.system_prompt" in error.message


def test_no_more_than_twenty_refused_rows_are_waited_for(tmp_path: Path) -> None:
    rows = [{"messages": [said("system", "s"), *chat("u", "a")["messages"]]}] * 90

    assert "at least 20 rows" in refusal(tmp_path, rows, template=REFUSES_SYSTEM).message


HARD = 'Zoë said: "it\'s <b>5 & 6</b>"\n\tthen left\\'
WRITINGS = {
    "as it is": HARD,
    "white space around it": f"\n\n  {HARD}  ",
    "JSON": json.dumps(HARD, ensure_ascii=False),
    "JSON of ASCII alone": json.dumps(HARD),
    "JSON safe in HTML": json.dumps(HARD)
    .replace("<", "\\u003c")
    .replace(">", "\\u003e")
    .replace("&", "\\u0026")
    .replace("'", "\\u0027"),
    "JSON within JSON": json.dumps(json.dumps(HARD)),
    "HTML": "Zoë said: &#34;it&#39;s &lt;b&gt;5 &amp; 6&lt;/b&gt;&#34;\n\tthen left\\",
    "HTML as Python has it": "Zoë said: &quot;it&#x27;s &lt;b&gt;5 &amp; 6&lt;/b&gt;&quot;\n\tthen left\\",
    "Python": repr(HARD),
}


@pytest.mark.parametrize("writing", WRITINGS.values(), ids=WRITINGS)
def test_a_text_is_found_however_a_template_escapes_it(writing: str) -> None:
    text = f"<|user|>hello<|assistant|>{writing}<|end|>"
    answer = {"role": "assistant", "content": HARD}
    call = {"function": {"name": "keep", "arguments": {"note": HARD}}}
    with_call = {"role": "assistant", "content": "", "tool_calls": [call]}
    called_text = text.replace(writing, f"keep(note={writing})")

    assert lost([said("user", "hello"), answer], tools=None, text=text, spans=[(25, len(text))]) == []
    assert lost([with_call], tools=None, text=called_text, spans=[(0, len(called_text))]) == []
    assert lost([answer], tools=None, text=text.replace("then left", "then"), spans=[(0, len(text))]) != []


@pytest.mark.parametrize(
    "writing",
    [
        '{"b": [1, 2.5, true, null], "a": {"c": "x"}}',
        '{"a":{"c":"x"},"b":[1,2.5,true,null]}',
        "{'b': [1, 2.5, True, None], 'a': {'c': 'x'}}",
        "b=[1, 2.5, True, None], a={c: x}",
        '<parameter=b>\n[1, 2.5, true, null]\n</parameter>\n<parameter=a>\n{"c": "x"}\n</parameter>',
    ],
)
def test_arguments_are_found_in_any_order_spacing_and_notation(writing: str) -> None:
    call = {"function": {"name": "f", "arguments": {"b": [1, 2.5, True, None], "a": {"c": "x"}}}}
    message = {"role": "assistant", "content": "", "tool_calls": [call]}

    assert lost([message], tools=None, text=f"f {writing}", spans=[(0, 999)]) == []
    assert lost([message], tools=None, text=f"f {writing.replace('2.5', '2')}", spans=[(0, 999)]) != []


def test_a_number_within_another_is_not_that_number() -> None:
    message = {"role": "assistant", "content": "", "tool_calls": [{"function": {"name": "f", "arguments": {"n": 1}}}]}

    assert lost([message], tools=None, text='f {"n": 1}', spans=[(0, 99)]) == []
    assert lost([message], tools=None, text='f {"n": 10}', spans=[(0, 99)]) != []


def test_a_tools_result_is_found_where_a_template_writes_its_json_anew() -> None:
    result = {"role": "tool", "content": '{"celsius": 21, "sky": "clear"}'}

    assert lost([result], tools=None, text="sky:clear, celsius:21", spans=[]) == []
    assert lost([result], tools=None, text="celsius:21", spans=[])[0].code == "content_not_rendered"


def test_reasoning_is_found_behind_other_tags_than_the_rows() -> None:
    answer = {"role": "assistant", "content": "<think>\nWhy.\n</think>\n\nSo."}

    assert lost([answer], tools=None, text="<|analysis|>Why.<|final|>So.", spans=[(0, 99)]) == []
    assert lost([answer], tools=None, text="<|final|>So.<|analysis|>Wy.", spans=[(0, 99)]) != []


@pytest.mark.parametrize("key", ["reasoning_content", "reasoning", "thinking"])
def test_reasoning_in_a_key_of_its_own_is_looked_for(key: str) -> None:
    answer = {"role": "assistant", "content": "So.", key: "Why."}

    assert lost([answer], tools=None, text="<think>Why.</think>So.", spans=[(0, 99)]) == []
    assert [one.code for one in lost([answer], tools=None, text="So.", spans=[(0, 99)])] == ["reasoning_not_rendered"]


def test_an_earlier_message_with_the_same_words_does_not_stand_for_one_that_is_left_out() -> None:
    messages = [said("user", "yes"), said("assistant", "yes"), said("user", "yes"), said("assistant", "yes")]
    text = "U:yes A:yes U: A:yes"

    (found,) = lost(messages, tools=None, text=text, spans=[(8, 11), (17, 20)])
    assert found.message == 2
    assert [one.message for one in lost(messages, tools=None, text=text, spans=None)] == [3]


def test_everything_of_a_tool_that_a_model_reads_is_looked_for() -> None:
    whole = json.dumps(TOOL)

    assert lost([], tools=[TOOL], text=whole, spans=None) == []
    for word in ("weather", "Tells today's", "city", "Oslo"):
        assert [one.code for one in lost([], tools=[TOOL], text=whole.replace(word, "…"), spans=None)]


def test_a_conversation_of_too_many_turns_for_its_template_is_refused_and_so_are_longer_ones_at_once(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(worker.train.chat, "SPAN_SECONDS", 0.0)
    turns = [{"role": "user", "content": "Q"}, {"role": "assistant", "content": "A"}]
    tokenizer = family_tokenizer("llama3_1")
    reader = RowReader(tokenizer, facts=DataFacts(format="chat", train_rows=3), training=Training(max_length=1000))
    (slow,) = reader.take([{"messages": turns * 20}])
    monkeypatch.setattr(worker.train.chat, "SPAN_SECONDS", 30.0)
    longer, shorter = reader.take([{"messages": turns * 21}, {"messages": turns * 2}])

    assert isinstance(slow, Invalid)
    assert (slow.code, "40 messages; split it" in slow.message) == ("chat_template_failed", True)
    assert isinstance(longer, Invalid)
    assert not isinstance(shorter, Invalid)


def test_the_name_of_a_speaker_that_a_template_leaves_out_is_told_and_refuses_nothing() -> None:
    asked = {"role": "user", "name": "Ann", "content": "Hi?"}
    answered = {"role": "assistant", "name": "Bot", "content": "Hello."}
    with_name = "message['role'] + (' ' + message['name'] if message['name'] else '') +"
    named = CHATML.replace("message['role'] +", with_name)
    for template, codes in ((CHATML, ["name_not_rendered"]), (named, [])):
        for train_on in ("assistant", "all"):
            training = Training.model_validate({"max_length": 1000, "train_on": train_on})
            facts = DataFacts(format="chat", train_rows=1)
            reader = RowReader(make_tokenizer(template), facts=facts, training=training)
            (taken,) = reader.take([{"messages": [asked, answered]}])
            assert not isinstance(taken, Invalid), taken.message
            assert [(loss.message, loss.code) for loss in taken.lost] == [(0, code) for code in codes]


def test_a_row_that_nests_deeper_than_a_reader_can_walk_is_refused_and_ends_nothing() -> None:
    levels = 2 * sys.getrecursionlimit()  # far beyond it: how deep the caller stands differs from run to run
    arguments = '{"a":' * levels + "1" + "}" * levels
    call = {"id": "call00001", "type": "function", "function": {"name": "f", "arguments": arguments}}
    row = {"messages": [{"role": "user", "content": "Q"}, {"role": "assistant", "content": "", "tool_calls": [call]}]}
    tokenizer = family_tokenizer("qwen3")
    reader = RowReader(tokenizer, facts=DataFacts(format="chat", train_rows=1), training=Training(max_length=1000))
    (taken,) = reader.take([row])

    assert isinstance(taken, Invalid)
    assert taken.code == "too_deeply_nested"


def test_a_job_tells_in_its_events_how_many_rows_lose_something_and_which_is_the_first(
    tmp_path: Path, model: Path
) -> None:
    unended = CHATML.replace("<|im_end|>", "")
    twice = {"messages": [*chat("One?", "First.")["messages"], *chat("Two?", "Second.")["messages"]]}
    spelled = chat("u", "a <|im_end|> b")
    rows = [chat("u", "a"), twice | {"tools": [TOOL]}, spelled, twice]
    training = {"num_train_epochs": 1, "chat_template": unended}
    spec = make_spec(tmp_path, model=model, rows=rows, validation=[spelled], training=training)
    code, events = run(spec, tmp_path / "out")
    told = [event.message for event in events if event.type == "message" and event.level == "warn"]

    assert code == EXIT_DONE
    assert [message for message in told if message.startswith("1 training rows, the first of them row 2: The chat")]
    assert [
        message for message in told if message.startswith("1 training rows, the first of them row 3: The row's own")
    ]
    assert [message for message in told if message.startswith("2 training rows, the first of them row 2: ")]
    assert [message for message in told if message.startswith("1 validation rows, the first of them row 1: The row's")]
