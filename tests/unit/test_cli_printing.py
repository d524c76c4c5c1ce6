"""What other tenants wrote is shown as text: it breaks no table and reaches no terminal as an order."""

from __future__ import annotations

import json
from types import SimpleNamespace
from typing import Any

import pytest
from markdown_it import MarkdownIt
from tunepool import printing

LINKS = ["[here](http://evil)", "![](http://evil/seen.png)", "[here]: http://evil", "<http://evil>", "<img src=x>"]
MARKS = [
    "a | b",
    "a \\| b",
    "a \\\\| b",
    "`code`",
    "``",
    "a\nb",
    "| - |\n\n# Head",
    "R&D &lt;b&gt; a < b",
    "ends in \\",
]
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


@pytest.mark.parametrize("text", [*HOSTILE, *LINKS, *MARKS])
def test_in_a_table_of_markdown_it_is_text_of_its_cell_and_no_link_picture_or_tag(text: str) -> None:
    row = f"| {printing.markdown_text(text)} | {printing.markdown_code(text)} |"
    tokens = MarkdownIt("commonmark").enable("table").parse(f"| a | b |\n|---|---|\n{row}\n")

    cells = [token.children or [] for token in tokens if token.type == "inline"][2:]
    line = printing.printable(text).replace("\n", " ")
    assert [{child.type for child in cell} for cell in cells] == [{"text"}, {"code_inline"}]
    assert "".join(child.content for child in cells[0]) == line
    assert "".join(child.content for child in cells[1]) == line.replace("`", "'").replace("|", "\u00a6")
