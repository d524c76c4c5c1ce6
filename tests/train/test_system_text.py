"""A system text that the chat template has no place for: refused by name, or merged into the first question."""

from __future__ import annotations

from typing import Any

import pytest

from shared.contract.spec import DataFacts, Training
from shared.errors import Invalid
from tests.train.tiny import make_tokenizer
from worker.train.data import RowReader

# As Mistral's v3 templates: the system text stands before the last message, if that is the user's.
BEFORE_THE_LAST = (
    "{% if messages[0]['role'] == 'system' %}{% set system = messages[0]['content'] %}{% set rest = messages[1:] %}"
    "{% else %}{% set rest = messages %}{% endif %}{{ bos_token }}{% for m in rest %}{% if m['role'] == 'user' %}"
    "{% if loop.last and system is defined %}{{ '[INST] ' + system + '\n\n' + m['content'] + '[/INST]' }}{% else %}"
    "{{ '[INST] ' + m['content'] + '[/INST]' }}{% endif %}{% else %}{{ ' ' + m['content'] + eos_token }}{% endif %}"
    "{% endfor %}"
)
REFUSING = (
    "{% for m in messages %}{% if m.role == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}"
    "{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
SKIPPING = REFUSING.replace(
    "{{ raise_exception('System role not supported') }}{% endif %}{{", "{% else %}{{", 1
).replace("{% endfor %}", "{% endif %}{% endfor %}", 1)
SYSTEM = {"role": "system", "content": "Answer in French."}


def row(*turns: str) -> dict[str, Any]:
    roles = ("user", "assistant") * len(turns)
    return {"messages": [SYSTEM, *({"role": role, "content": text} for role, text in zip(roles, turns, strict=False))]}


def taken(template: str, record: dict[str, Any], *, data_format: str = "chat", **training: Any) -> Any:
    facts = DataFacts(format=data_format, train_rows=1)
    reader = RowReader(make_tokenizer(template), facts=facts, training=Training.model_validate(training))
    return next(iter(reader.take([record])))


@pytest.mark.parametrize("template", [BEFORE_THE_LAST, REFUSING])
@pytest.mark.parametrize("train_on", ["assistant", "last_assistant", "all"])
def test_a_refusal_of_a_dropped_system_text_names_its_remedy_and_none_that_hides_it(
    template: str, train_on: str
) -> None:
    refused = taken(template, row("Hello 0?", "Bonjour."), train_on=train_on)

    assert isinstance(refused, Invalid)
    assert 'training.system_prompt to "merge"' in refused.message
    assert "train_on" not in refused.message


def test_a_dropped_system_text_of_a_prompt_is_told_with_its_remedy() -> None:
    (lost,) = taken(SKIPPING, row("Hello 0?", "Bonjour.")).lost

    assert lost.what == 'the system text "Answer in French."'
    assert 'training.system_prompt to "merge"' in lost.remedy


@pytest.mark.parametrize(
    ("template", "expected"),
    [
        (BEFORE_THE_LAST, "<|im_start|>[INST] Answer in French.\n\nHello 0?[/INST] Bonjour.<|im_end|>"),
        (
            REFUSING,
            "<|im_start|>user\nAnswer in French.\n\nHello 0?<|im_end|>\n<|im_start|>assistant\nBonjour.<|im_end|>\n",
        ),
    ],
)
def test_merged_it_opens_the_first_question(template: str, expected: str) -> None:
    tokenizer = make_tokenizer()
    whole = taken(template, row("Hello 0?", "Bonjour."), system_prompt="merge").whole

    assert tokenizer.decode(whole.ids) == expected
    assert tokenizer.decode(whole.ids[whole.labelled]).strip() == "Bonjour.<|im_end|>"


def test_later_questions_stay_as_they_are_and_faults_name_the_rows_own_messages() -> None:
    record = row("u1", "a1", "u2", "")
    refused = taken(REFUSING, record, system_prompt="merge")
    record["messages"][4]["weight"] = 0
    whole = taken(REFUSING, record, system_prompt="merge").whole

    assert isinstance(refused, Invalid)
    assert refused.message.startswith("messages[4] is trained and empty")
    assert make_tokenizer().decode(whole.ids).count("Answer in French.") == 1


def test_pairs_are_merged_too() -> None:
    answers = {key: {"role": "assistant", "content": key} for key in ("chosen", "rejected")}
    whole = taken(
        REFUSING, {"messages": row("u")["messages"], **answers}, data_format="preference", system_prompt="merge"
    ).whole

    assert make_tokenizer().decode(whole.prompt_ids).startswith("<|im_start|>user\nAnswer in French.\n\nu<|im_end|>")
