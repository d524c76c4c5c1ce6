"""What other tenants wrote is shown as text: it breaks no table and reaches no terminal as an order."""

from __future__ import annotations

import json
from types import SimpleNamespace
from typing import Any

import pytest
from tunepool import printing

HOSTILE = ["[/x]", "[bold]", "[link=file:///etc]x", "\x1b]0;PWNED\x07\x1b[2J", "\x9b2J", "\u202egnp.exe", "a\rb"]


def shown(capsys: pytest.CaptureFixture[str], value: Any) -> str:
    context: Any = SimpleNamespace(obj=SimpleNamespace(as_json=False))
    printing.show_rows(context, [{"name": value, "details": {"x": value}}], ("name", "details"))
    printing.show(context, {}, f"project {value}")
    return capsys.readouterr().out


@pytest.mark.parametrize("text", HOSTILE)
def test_a_tenants_text_neither_breaks_an_answer_nor_acts_on_the_terminal(
    capsys: pytest.CaptureFixture[str], text: str
) -> None:
    out = shown(capsys, text)

    assert all(one.isprintable() or one == "\n" for one in out)
    assert out.count(printing.printable(text)) >= 2


def test_ordinary_text_is_shown_as_it_is(capsys: pytest.CaptureFixture[str]) -> None:
    assert shown(capsys, "größe 字 [1, 2]").count("größe 字 [1, 2]") == 3


@pytest.mark.parametrize("text", [*HOSTILE, "a\x7fb", "\u2066b", "\U000e0001"])
def test_json_for_programs_holds_the_same_text_and_nothing_that_acts_on_a_terminal(
    capsys: pytest.CaptureFixture[str], text: str
) -> None:
    context: Any = SimpleNamespace(obj=SimpleNamespace(as_json=True))

    printing.show(context, {"name": text, text: ["größe"]}, "")

    line = capsys.readouterr().out
    assert line.removesuffix("\n").isprintable()
    assert json.loads(line) == {"name": text, text: ["größe"]}
    assert "größe" in line
