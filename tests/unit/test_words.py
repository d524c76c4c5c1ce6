"""The words of the house, read from the source: what a variable must not be called, and turns that are read twice."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterable, Iterator

import pytest

from tests.unit.test_architecture import ROOT, SOURCE, at, files, nodes

SPENT = {"found", "one", "told", "said", "acquainted", "bury", "evened", "forsake", "insist", "obey"}
"""The first four say how a value came, never what it is. The noun says it: `catalogue`, `events`, `match`, `reply`.

The others tell a story. A verb says what is done: `with_neighbours`, `stop_and_drain`, `retry_until_database_answers`.
"""


def named(children: Iterable[ast.AST]) -> Iterator[tuple[ast.AST, str]]:
    """Every name that one of these nodes gives to something: a variable, a parameter, an attribute, a function."""
    for child in children:
        match child:
            case ast.Name(id=name, ctx=ast.Store()) | ast.arg(arg=name) | ast.Attribute(attr=name, ctx=ast.Store()):
                yield child, name
            case ast.FunctionDef(name=name) | ast.AsyncFunctionDef(name=name) | ast.ClassDef(name=name):
                yield child, name
            case ast.ExceptHandler(name=str(name)) | ast.MatchAs(name=str(name)) | ast.MatchStar(name=str(name)):
                yield child, name


def test_nothing_has_a_name_that_does_not_say_what_it_is_or_does() -> None:
    spent = [
        f"{at(path, node)}: {name}"  # type: ignore[arg-type]  # each of these nodes has a line
        for path in files(*SOURCE)
        for node, name in named(nodes(path))
        if name in SPENT
    ]

    assert not spent, "\n".join(spent)


@pytest.mark.parametrize(
    "source",
    [
        "found = 1",
        "def f(one): ...",
        "def f(*, told=()): ...",
        "[said for said in ()]",
        "self.found = 1",
        "(one := 1)",
        "with f() as told: ...",
        "try: ...\nexcept E as found: ...",
        "class A:\n    said: int",
        "match a:\n    case [one, *_]: ...",
        "def found(): ...",
        "def obey(self): ...",
    ],
)
def test_the_scan_for_spent_names_sees_what_it_must(source: str) -> None:
    assert {name for _, name in named(ast.walk(ast.parse(source)))} & SPENT


# Turns that a reader understands at the second reading only, and what says the same at the first: "except for"; a new
# sentence with the thing as its subject; "since"; "likewise" with a verb.
TURNS = re.compile(r"\bbut for\b|, (?:of which|of whom|most of which)\b|\bfor that sake\b", re.I)


def prose() -> Iterator[tuple[str, str]]:
    """Every page, and every line of the source that holds a comment or a text."""
    for path in [*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md"), *(ROOT / "cli").glob("*.md")]:
        yield str(path.relative_to(ROOT)), path.read_text(encoding="utf-8")
    for path in files(*SOURCE):
        yield str(path.relative_to(ROOT)), path.read_text(encoding="utf-8")


def test_no_sentence_has_a_turn_that_is_read_twice() -> None:
    spent = [
        f"{place}:{text.count(chr(10), 0, match.start()) + 1}: {match[0]}"
        for place, text in prose()
        for match in TURNS.finditer(text)
    ]

    assert not spent, "\n".join(spent)


@pytest.mark.parametrize("text", ["all but for one", "files, of which one is read", "a list, most of which is old"])
def test_the_scan_for_turns_sees_what_it_must(text: str) -> None:
    assert TURNS.search(text)
