"""A call's arguments reach each chat template in the form that it writes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from shared.contract.spec import DataFacts, Training
from tests.train.tiny import make_tokenizer, write_rows
from worker.train.data import RowReader

# As DeepSeek V3's template: the call's name and arguments are joined as texts.
JOINS_TEXTS = (
    "{% for m in messages %}{% if m['role'] == 'user' %}{{ '<|user|>' + m['content'] }}"
    "{% elif m['role'] == 'tool' %}{{ '<|tool|>' + m['content'] }}"
    "{% elif 'tool_calls' in m %}{{ '<|assistant|>' }}{% for c in m['tool_calls'] %}"
    "{{ '<|call|>' + c['function']['name'] + '\\n' + c['function']['arguments'] + '<|done|>' }}{% endfor %}"
    "{{ eos_token }}{% else %}{{ '<|assistant|>' + m['content'] + eos_token }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
)
WRITES_WORDS = JOINS_TEXTS.replace("+ c['function']['arguments'] +", "~ c['function']['arguments'] ~")
WRITES_JSON = JOINS_TEXTS.replace("c['function']['arguments']", "c['function']['arguments'] | tojson")
TOOL = {"type": "function", "function": {"name": "weather", "parameters": {"type": "object"}}}
ARGUMENTS = '{"city": "Rome", "post": 1460323737035677698}'


def row() -> dict[str, Any]:
    call = {"id": "call_1", "type": "function", "function": {"name": "weather", "arguments": ARGUMENTS}}
    asked = {"role": "user", "content": "Weather?"}
    called = {"role": "assistant", "content": None, "tool_calls": [call]}
    told = {"role": "tool", "tool_call_id": "call_1", "content": "21 C"}
    return {"messages": [asked, called, told, {"role": "assistant", "content": "It is 21 C."}]}


def read(folder: Path, given: dict, *, template: str, data_format: str = "chat") -> Any:
    facts = DataFacts(format=data_format, train_rows=1)
    reader = RowReader(make_tokenizer(template), facts=facts, training=Training())
    (found,) = reader.read(write_rows(folder / "rows.jsonl", [given])).rows
    return found


@pytest.mark.parametrize("template", [JOINS_TEXTS, WRITES_WORDS, WRITES_JSON], ids=["joins", "words", "json"])
def test_arguments_are_trained_as_json_once_whatever_form_the_template_takes(tmp_path: Path, template: str) -> None:
    found = read(tmp_path, row(), template=template)

    called = f"<|call|>weather\n{ARGUMENTS}<|done|><|im_end|>"
    assert make_tokenizer().decode(found.ids[found.labelled]) == called + "It is 21 C.<|im_end|>"


def test_arguments_of_a_preferred_answer_reach_the_template_as_text(tmp_path: Path) -> None:
    asked, called, *_ = row()["messages"]
    pair = {"messages": [asked], "chosen": called, "rejected": {"role": "assistant", "content": "No."}}
    found = read(tmp_path, pair, template=JOINS_TEXTS, data_format="preference")

    assert make_tokenizer().decode(found.answers[0]) == f"<|call|>weather\n{ARGUMENTS}<|done|><|im_end|>"


def test_a_template_is_probed_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    probed: list[object] = []
    monkeypatch.setattr("worker.train.chat.wants_arguments_as_text", lambda render: bool(probed.append(render)) or True)
    reader = RowReader(make_tokenizer(JOINS_TEXTS), facts=DataFacts(format="chat", train_rows=3), training=Training())

    assert len(reader.read(write_rows(tmp_path / "rows.jsonl", [row()] * 3)).rows) == 3
    assert len(probed) == 1
