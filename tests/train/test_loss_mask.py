from __future__ import annotations

import time
from pathlib import Path

import numpy as np
import pytest
import trl

from shared.contract.spec import DataFacts, Training
from shared.errors import Invalid
from tests.patience import patience
from tests.train.tiny import CHATML, chat, chat_rows, make_tokenizer, preference_rows, write_rows
from worker.train import chat as chat_module
from worker.train.chat import ChatTemplate
from worker.train.data import RowReader, TokenRow

# Keeps only the last answer's reasoning, as reasoning models' templates do: rendering is not incremental.
FORGETFUL = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\\n' }}"
    "{% if message['role'] == 'assistant' %}MARK_IN"
    "{{ message['content'] if loop.last else message['content'].split('/')[-1] }}<|im_end|>MARK_OUT"
    "{% else %}{{ message['content'] }}<|im_end|>{% endif %}{{ '\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)
WITHOUT_MARKERS = FORGETFUL.replace("MARK_IN", "").replace("MARK_OUT", "")
WITH_MARKERS = FORGETFUL.replace("MARK_IN", "{% generation %}").replace("MARK_OUT", "{% endgeneration %}")


def read(tmp_path: Path, rows: list[dict], *, data_format: str = "chat", template: str = CHATML, **training: object):
    reader = RowReader(
        make_tokenizer(template),
        facts=DataFacts(format=data_format, train_rows=len(rows)),
        training=Training.model_validate(training),
    )
    return reader.read(write_rows(tmp_path / "rows.jsonl", rows))


def taught(row: TokenRow) -> str:
    return make_tokenizer().decode(row.ids[row.labelled])


def dialogue(**weights: int) -> dict:
    turns = [("system", "s"), ("user", "u1"), ("assistant", "a1"), ("user", "u2"), ("assistant", "a2")]
    messages = [{"role": role, "content": text} for role, text in turns]
    for message in messages:
        if message["content"] in weights:
            message["weight"] = weights[message["content"]]
    return {"messages": messages}


def test_only_answers_and_their_end_of_turn_carry_loss(tmp_path: Path) -> None:
    (row,) = read(tmp_path, [dialogue()]).rows

    assert taught(row) == "a1<|im_end|>a2<|im_end|>"


def test_a_message_of_weight_zero_carries_no_loss(tmp_path: Path) -> None:
    (row,) = read(tmp_path, [dialogue(a1=0, a2=1)]).rows

    assert taught(row) == "a2<|im_end|>"


def test_train_on_last_assistant_teaches_the_last_turn_only(tmp_path: Path) -> None:
    (row,) = read(tmp_path, [dialogue()], train_on="last_assistant").rows

    assert taught(row) == "a2<|im_end|>"


def test_train_on_all_teaches_everything_but_the_first_token(tmp_path: Path) -> None:
    (row,) = read(tmp_path, [chat("u", "a")], train_on="all").rows

    assert row.labelled[1:].all()
    assert not row.labelled[0]


def test_a_template_that_writes_an_answer_elsewhere_too_is_refused_rather_than_masked_wrongly(tmp_path: Path) -> None:
    with pytest.raises(Invalid) as refused:
        read(tmp_path, [dialogue()], template="{{ messages[-1]['content'] }}\n" + CHATML)

    assert refused.value.code == "chat_template_not_incremental"


@pytest.mark.parametrize("train_on", ["assistant", "last_assistant"])
def test_where_prefixes_cannot_and_nothing_is_marked_other_answers_in_its_place_tell_an_answers(
    tmp_path: Path, train_on: str
) -> None:
    (row,) = read(tmp_path, [dialogue()], template=WITHOUT_MARKERS, train_on=train_on).rows
    forgotten = dialogue(a1=0)
    forgotten["messages"][2]["content"] = "thought/a1"
    found = read(tmp_path, [forgotten], template=WITHOUT_MARKERS)

    assert taught(row) == ("a1<|im_end|>" if train_on == "assistant" else "") + "a2<|im_end|>"
    assert taught(found.rows[0]) == "a2<|im_end|>"
    assert "thought/a1" in found.unwritten[0].message


def test_generation_markers_decide_where_prefixes_cannot(tmp_path: Path) -> None:
    row = dialogue(a1=0)
    row["messages"][2]["content"] = "thought/a1"

    found = read(tmp_path, [row], template=WITH_MARKERS)

    assert taught(found.rows[0]) == "a2<|im_end|>"
    assert "thought/a1" in found.unwritten[0].message


@pytest.mark.parametrize("template", [WITH_MARKERS, WITHOUT_MARKERS])
def test_an_answer_that_loses_its_thought_on_the_way_is_not_trained_as_if_it_had_none(
    tmp_path: Path, template: str
) -> None:
    row = dialogue()
    row["messages"][2]["content"] = "thought/a1"

    with pytest.raises(Invalid) as refused:
        read(tmp_path, [row], template=template)

    assert refused.value.code == "not_rendered"


def test_a_header_that_goes_on_for_inference_only_is_not_cut_into_the_answer(tmp_path: Path) -> None:
    thinking = CHATML.replace("assistant\\n' }}{% endif", "assistant\\n<think>\\n' }}{% endif")

    (row,) = read(tmp_path, [chat("u", "answer")], template=thinking).rows

    assert taught(row) == "answer<|im_end|>"


def test_an_answer_without_end_of_turn_gets_one_to_learn(tmp_path: Path) -> None:
    plain = "{% for message in messages %}{{ message['role'] + ': ' + message['content'] + '\\n' }}{% endfor %}"
    plain += "{% if add_generation_prompt %}{{ 'assistant: ' }}{% endif %}"

    (row,) = read(tmp_path, [chat("u", "answer")], template=plain).rows

    assert taught(row) == "answer<|im_end|>"


def test_a_prompt_is_context_and_its_completion_is_taught_with_an_end(tmp_path: Path) -> None:
    (row,) = read(tmp_path, [{"prompt": "2+2=", "completion": "4"}], data_format="prompt_completion").rows

    assert taught(row) == "4<|im_end|>"


def test_plain_text_is_taught_whole_with_an_end(tmp_path: Path) -> None:
    (row,) = read(tmp_path, [{"text": "abc"}], data_format="text").rows

    assert taught(row) == "bc<|im_end|>"


def test_characters_of_several_bytes_are_taught_whole(tmp_path: Path) -> None:
    (row,) = read(tmp_path, [chat("ü?", "naïve 🙂")]).rows

    assert taught(row) == "naïve 🙂<|im_end|>"


def test_a_tool_call_is_taught_and_its_arguments_reach_the_template_as_an_object(tmp_path: Path) -> None:
    template = (
        "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] }}"
        "{% for call in message.tool_calls or [] %}{{ call.function.name + ' city=' }}"
        "{{ call.function.arguments.city }}{% endfor %}{{ '<|im_end|>\\n' }}"
        "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
    )
    call = {"id": "1", "type": "function", "function": {"name": "weather", "arguments": '{"city": "Oslo"}'}}
    row = {"messages": [{"role": "user", "content": "u"}, {"role": "assistant", "content": None, "tool_calls": [call]}]}

    (tokens,) = read(tmp_path, [row], template=template).rows

    assert taught(tokens) == "weather city=Oslo<|im_end|>"


def test_rows_cut_before_their_answer_are_left_out_and_counted(tmp_path: Path) -> None:
    rows = read(tmp_path, [chat("u" * 100, "lost"), chat("u", "kept"), chat("u", "long " * 40)], max_length=60)

    assert [row.tokens for row in rows.rows] == [26, 60]
    assert (rows.dropped, rows.truncated) == (1, 1)


def test_a_file_with_nothing_to_learn_is_refused_by_name(tmp_path: Path) -> None:
    with pytest.raises(Invalid) as refused:
        read(tmp_path, [chat("u" * 100, "lost")], max_length=60)

    assert refused.value.code == "no_trainable_tokens"


def test_a_preference_row_is_one_prompt_and_two_answers(tmp_path: Path) -> None:
    (row,) = read(tmp_path, preference_rows(1), data_format="preference").rows
    tokenizer = make_tokenizer()

    assert tokenizer.decode(row.prompt_ids) == "<|im_start|>user\n0?<|im_end|>\n<|im_start|>assistant\n"
    assert [tokenizer.decode(answer) for answer in row.answers] == ["good<|im_end|>", "bad one<|im_end|>"]


@pytest.mark.parametrize(
    "body",
    [
        "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}",
        "{% for a in range(999) %}{% for b in range(99999) %}{% for c in range(99) %}x" + "{% endfor %}" * 3,
        "{{ 10 ** (10 ** 9) }}",
        "{{ 10 ** (10 ** 6) > 0 }}" * 60,
        "{{ raise_exception('no') }}",
        "{{ messages.__class__.__mro__ }}",
        "{{ 'x' * 99999999 }}",
        "{{ 'x' * 99999999999999 }}",
        "{% if",
    ],
)
def test_a_hostile_template_ends_in_a_named_error_in_bounded_time(body: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(chat_module, "RENDER_SECONDS", 0.5)
    template = ChatTemplate(make_tokenizer(body))
    began = time.monotonic()

    with pytest.raises(Invalid) as refused:
        template.render([{"role": "user", "content": "u"}], tools=None)

    assert refused.value.code == "chat_template_failed"
    assert time.monotonic() - began < patience(10)


def test_a_base_model_without_a_chat_template_asks_for_one(tmp_path: Path) -> None:
    with pytest.raises(Invalid) as refused:
        read(tmp_path, chat_rows(1), template="")

    assert refused.value.code == "no_chat_template"


def family(name: str) -> str:
    return (Path(trl.__file__).parent / "chat_templates" / f"{name}.jinja").read_text(encoding="utf-8")


def parts_taught(row: TokenRow) -> list[str]:
    """The text of each run of trained tokens."""
    edges = np.flatnonzero(np.diff(row.labelled.astype(np.int8), prepend=0, append=0)).reshape(-1, 2)
    return [make_tokenizer().decode(row.ids[start:end]) for start, end in edges.tolist()]


def test_every_turn_of_qwen3_ends_with_one_end_token_and_nothing_behind_it(tmp_path: Path) -> None:
    row = {"messages": [*chat("One?", "First.")["messages"], *chat("Two?", "Second 0.")["messages"]]}

    (tokens,) = read(tmp_path, [row], template=family("qwen3")).rows

    assert parts_taught(tokens) == [
        "<think>\n\n</think>\n\nFirst.<|im_end|>",
        "<think>\n\n</think>\n\nSecond 0.<|im_end|>",
    ]
    assert make_tokenizer().decode(tokens.ids).endswith("Second 0.<|im_end|>\n")


MARKED = (
    "{% for m in messages %}{% if m.role == 'assistant' %}OPEN{{ '<|im_start|>assistant' }}BREAK{{ '\\n' }}INNER"
    "{{ m.content if loop.last else m.content.split('/')[-1] }}INNER_END{{ '<|im_end|>' }}BREAK_END{{ '\\n' }}OPEN_END"
    "{% else %}{{ '<|im_start|>' + m.role + '\\n' + m.content + '<|im_end|>\\n' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)


@pytest.mark.parametrize("begin", ["OPEN", "BREAK", "INNER"])
@pytest.mark.parametrize("end", ["OPEN", "BREAK", "INNER"])
def test_markers_that_hold_a_header_or_a_line_break_or_no_end_teach_the_answer_and_its_end(
    tmp_path: Path, begin: str, end: str
) -> None:
    template = MARKED.replace(f"{end}_END", "{% endgeneration %}")
    template = template.replace("OPEN_END", "").replace("BREAK_END", "").replace("INNER_END", "")
    template = template.replace(begin, "{% generation %}").replace("OPEN", "").replace("BREAK", "").replace("INNER", "")
    row = {"messages": [*chat("u", "t/a")["messages"], *chat("v", "b")["messages"], *chat("w", "c")["messages"]]}
    row["messages"][1]["weight"] = 0

    (tokens,) = read(tmp_path, [row], template=template).rows

    assert parts_taught(tokens) == ["b<|im_end|>", "c<|im_end|>"]


def test_an_end_of_the_whole_conversation_behind_the_end_of_turn_is_not_taught(tmp_path: Path) -> None:
    template = CHATML.replace("{% if add", "{% if not add_generation_prompt %}{{ '<|end|>' }}{% endif %}{% if add")

    (tokens,) = read(tmp_path, [chat("u", "a")], template=template).rows

    assert parts_taught(tokens) == ["a<|im_end|>"]


def test_an_end_of_turn_that_is_no_control_token_is_learnt_from_the_template(tmp_path: Path) -> None:
    (tokens,) = read(tmp_path, [chat("u", "a"), dialogue()], template=CHATML.replace("<|im_end|>", "</turn>")).rows[1:]

    assert parts_taught(tokens) == ["a1</turn>", "a2</turn>"]
