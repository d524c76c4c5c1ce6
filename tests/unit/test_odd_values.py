"""Whatever stands in place of any value of a row of any form: the check says so, and what it takes is read alike."""

from __future__ import annotations

import copy
import json
from collections.abc import Iterator
from typing import Any, Final

from hypothesis import given, settings
from hypothesis import strategies as st

from shared.rows.check import check
from shared.rows.convert import canonical_lines, checked_lines
from tests.unit.test_foreign_rows import FOREIGN
from tests.unit.test_services import MORE
from tests.unit.test_services import SHAPES as SERVED
from tests.unit.test_turn_lists import SHAPES

Path = tuple[str | int, ...]
ROWS: Final[list[dict[str, Any]]] = [
    *(row for _, row, _ in FOREIGN),
    *(row for _, row, _ in (*SERVED.values(), *MORE.values())),
    *(row for _, row, _ in SHAPES),
]
ODD: Final[list[Any]] = [
    *(None, "", "x", "[", "[1]", '{"a": 1}', 0, 1, -1, 1.5, True, False, [], {}, [None], [[]], [{}], ["x"]),
    *([["user", "x"]], {"role": "user"}, {"role": ["a"], "content": ["b"]}, {"from": {}, "value": []}),
    *({"function": []}, {"text": {}}, {"name": {}}, [{"type": {}}], [{"type": "function_call"}]),
    *([{"role": "Chatbot"}], {"functionCall": 1}, {"toolUse": 1}, {"reasoningContent": []}),
]


def places(value: Any, at: Path = ()) -> Iterator[Path]:
    if isinstance(value, dict | list):
        for key, below in value.items() if isinstance(value, dict) else enumerate(value):
            yield (*at, key)
            yield from places(below, (*at, key))


def replaced(row: dict[str, Any], place: Path, odd: Any) -> dict[str, Any]:
    made = copy.deepcopy(row)
    within: Any = made
    for key in place[:-1]:
        within = within[key]
    within[place[-1]] = odd
    return made


@st.composite
def odd_rows(draw: st.DrawFn) -> dict[str, Any]:
    row = draw(st.sampled_from(ROWS))
    for _ in range(draw(st.integers(1, 3))):
        there = list(places(row))
        if there:
            row = replaced(row, draw(st.sampled_from(there)), draw(st.sampled_from(ODD)))
    more = draw(st.sampled_from(ROWS))
    return row | {key: more[key] for key in draw(st.sets(st.sampled_from(sorted(more)), max_size=1))}


@settings(max_examples=1500)
@given(odd_rows())
def test_an_odd_value_is_refused_or_read_alike_and_never_a_crash(row: dict[str, Any]) -> None:
    data = json.dumps(row).encode() + b"\n"
    if not check([data]).ok:
        return
    lines = list(canonical_lines([data]))

    assert list(checked_lines([data])) == lines
    assert check(lines).ok
    assert list(canonical_lines(lines)) == lines


def test_an_item_that_is_no_object_beside_a_tagged_call_is_named() -> None:
    called = {"from": "gpt", "value": '<tool_call>{"name": "a", "arguments": {}}</tool_call>'}
    row = {"conversations": [{"from": "human", "value": "Hi"}, "x", called]}
    (problem, *_) = check([json.dumps(row).encode()]).problems

    assert (problem.param, problem.code) == ("conversations[1]", "wrong_type")
