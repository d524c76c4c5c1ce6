"""Templates see rows without the copy that transformers makes, and write the same."""

from __future__ import annotations

from collections.abc import Callable
from datetime import datetime
from itertools import product
from typing import Any

import pytest
from jinja2 import TemplateError
from transformers.utils import chat_template_utils

from tests.train.template_families import FAMILIES_OF_TEMPLATES, family_tokenizer
from tests.train.test_template_families import ROWS, TOOLS
from tests.train.tiny import make_tokenizer
from worker.train.chat import FAULTS, ChatTemplate
from worker.train.rendering import rendered


class OneMoment(datetime):
    @classmethod
    def now(cls, tz: Any = None) -> OneMoment:
        return cls(2026, 12, 1, 9, 30, tzinfo=tz)


def outcome(write: Callable[..., str], *given: Any, **options: Any) -> str:
    try:
        return write(*given, **options)
    except (TemplateError, *FAULTS) as error:
        return f"{type(error).__name__}: {error}"


@pytest.mark.parametrize("name", FAMILIES_OF_TEMPLATES)
def test_a_template_writes_what_transformers_has_it_write(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(chat_template_utils, "datetime", OneMoment)
    tokenizer = family_tokenizer(name)
    prepared = ChatTemplate(tokenizer).prepared
    names, texts = tokenizer.special_tokens_map, 0
    for row, tools, opened in product(ROWS.values(), (None, TOOLS), (False, True)):
        messages, source = prepared(row["messages"]), tokenizer.get_chat_template(None, tools)
        given = {"tools": tools, "add_generation_prompt": opened}
        ours = outcome(rendered, source, messages, names=names, **given)
        assert ours == outcome(tokenizer.apply_chat_template, messages, tokenize=False, **given)
        texts += ours.count("Hi?")
    assert texts, "the questions are written"


def test_a_template_cannot_alter_a_row() -> None:
    row = [{"role": "user", "content": "Hi?"}, {"role": "assistant", "content": "Hello."}]
    for deed in ("messages.append(1)", "messages[0].update({'content': 'x'})", "messages[0].pop('role')"):
        template = ChatTemplate(make_tokenizer("{{ " + deed + " }}"))
        with pytest.raises(TemplateError):
            template._render([dict(message) for message in row], tools=None)
