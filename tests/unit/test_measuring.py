"""What a measure says of one answer, and that no pattern or schema of a stranger's holds anybody up."""

from __future__ import annotations

import json
import time
from typing import Any

import pytest
from pydantic import TypeAdapter, ValidationError

from shared.contract.evaluation import CreateEvaluation, Measure
from shared.contract.evaluation_run import ITEM_ANSWER, ItemAnswer, storable
from shared.errors import Invalid
from shared.rows import general_suite
from shared.rows.evaluation_items import EvaluationItem, items
from shared.rows.measuring import Scorer, needs_answers, needs_likelihood
from tests.patience import patience

MEASURE: TypeAdapter[Any] = TypeAdapter(Measure)


def measure(kind: str, **values: Any) -> Any:
    return MEASURE.validate_python({"type": kind, "name": "m", **values})


def score(
    wanted: Any, answer: str | None, *, reference: str | None = None, row: dict[str, Any] | None = None, **more: Any
) -> float | str:
    """The value, or why there is none."""
    item = EvaluationItem(number=1, line=1, reference=reference, row=row or {})
    said = ItemAnswer(part="items", item=1, subject=0, answer=answer, **more)
    values, problems = Scorer([wanted]).scores(item, said)
    return values.get("m", problems.get("m", "neither"))


@pytest.mark.parametrize(
    ("kind", "options", "answer", "reference", "expected"),
    [
        ("exact_match", {}, " Paris\n", "Paris", 1.0),
        ("exact_match", {}, "paris", "Paris", 0.0),
        ("exact_match", {"ignore_case": True}, "STRASSE", "straße", 1.0),
        ("contains", {}, "It is Paris.", "Paris", 1.0),
        ("contains", {}, "Paris", "It is Paris.", 0.0),
        ("regex", {"pattern": r"\bP\w+s\b"}, "It is Paris.", None, 1.0),
        ("regex", {"pattern": "paris"}, "Paris", None, 0.0),
        ("regex", {"pattern": "paris", "ignore_case": True}, "Paris", None, 1.0),
        ("json_valid", {}, '{"a": [1, null]}', None, 1.0),
        ("json_valid", {}, "```json\n{}\n```", None, 0.0),
        ("json_valid", {}, "NaN", None, 0.0),
        ("json_valid", {}, "[" * 100_000, None, 0.0),
        ("json_valid", {}, "9" * 10_000, None, 0.0),
        ("numeric", {}, "The sum is 1,234.50", "1234.5", 1.0),
        ("numeric", {"absolute": 0.5}, "about 3", "3.4", 1.0),
        ("numeric", {"relative": 0.1}, "109", "100", 1.0),
        ("numeric", {"relative": 0.1}, "111", "100", 0.0),
        ("numeric", {}, "none at all", "4", 0.0),
        ("numeric", {}, "first 5, then -4", "-4", 1.0),
        ("json_fields", {}, '{"a": 1, "b": {"c": "x"}}', '{"a": 1.0, "b": {"c": "y"}}', 0.5),
        ("json_fields", {}, '{"a": true}', '{"a": 1}', 0.0),
        ("json_fields", {}, "no JSON", '{"a": 1}', 0.0),
        (
            "json_fields",
            {"fields": ["b.c", "l[1]"]},
            '{"b": {"c": 2}, "l": [0, 9]}',
            '{"b": {"c": 2}, "l": [0, 1]}',
            0.5,
        ),
    ],
)
def test_an_answer_has_the_value_that_its_measure_means(
    kind: str, options: dict[str, Any], answer: str, reference: str | None, expected: float
) -> None:
    assert score(measure(kind, **options), answer, reference=reference) == expected


def test_a_reference_may_be_put_together_of_the_rows_own_keys() -> None:
    wanted = measure("exact_match", reference="{{ item.city }}, {{ item.country.code }}")

    assert score(wanted, "Paris, FR", row={"city": "Paris", "country": {"code": "FR"}}) == 1.0
    assert "item.country" in score(wanted, "Paris", row={"city": "Paris"})


def test_a_schema_judges_what_is_json_and_nothing_else_passes() -> None:
    wanted = measure(
        "json_schema",
        json_schema={
            "type": "object",
            "required": ["kind", "tags"],
            "properties": {"kind": {"enum": ["bug", "idea"]}, "tags": {"$ref": "#/$defs/tags"}},
            "additionalProperties": False,
            "$defs": {"tags": {"type": "array", "items": {"type": "string", "pattern": "^[a-z]+$"}}},
        },
    )

    assert score(wanted, '{"kind": "bug", "tags": ["a"]}') == 1.0
    assert score(wanted, '{"kind": "bug", "tags": ["A"]}') == 0.0
    assert score(wanted, '{"kind": "bug", "tags": [], "more": 1}') == 0.0
    assert score(wanted, "kind: bug") == 0.0


def test_likelihood_and_effort_are_what_the_program_has_counted() -> None:
    counted = {"loss": 0.5, "loss_tokens": 4, "correct_tokens": 3, "seconds": 1.5, "tokens": 7}

    assert score(measure("loss"), None, **counted) == 0.5
    assert score(measure("perplexity"), None, **counted) == 0.5, "the figure takes the exponential of the mean"
    assert score(measure("token_accuracy"), None, **counted) == 0.75
    assert score(measure("latency"), "four", **counted) == 1.5
    assert score(measure("length"), "four", **counted) == 4.0
    assert score(measure("tokens"), "four", **counted) == 7.0


def test_a_grader_gives_what_the_graders_route_gives() -> None:
    grader = {
        "type": "string_check",
        "name": "is",
        "operation": "eq",
        "input": "{{ sample.output_text }}",
        "reference": "{{ item.answer }}",
    }

    assert score(measure("grader", grader=grader), "Paris", row={"answer": "Paris"}) == 1.0
    assert "no such part" in score(measure("grader", grader=grader), "Paris")
    of_json = measure("grader", grader={**grader, "input": "{{ sample.output_json.city }}"})
    assert score(of_json, "no JSON", row={"answer": "Paris"}) == 0.0, (
        "an answer that should be JSON and is none is wrong"
    )


@pytest.mark.parametrize(
    ("wanted", "answer", "reference"),
    [
        (measure("exact_match"), "x", None),
        (measure("numeric"), "1", "none"),
        (measure("json_fields"), "{}", "none"),
        (measure("json_fields", fields=["a"]), "{}", '{"b": 1}'),
        (measure("exact_match"), None, "x"),
        (measure("loss"), "x", "x"),
    ],
)
def test_where_a_measure_means_nothing_there_is_no_value_and_a_reason(
    wanted: Any, answer: str | None, reference: str | None
) -> None:
    assert isinstance(score(wanted, answer, reference=reference), str)


def test_a_program_that_says_nan_is_not_believed() -> None:
    with pytest.raises(ValidationError):
        ITEM_ANSWER.validate_json('{"part": "items", "item": 1, "subject": 0, "loss": NaN, "loss_tokens": 1}')


# --- bombs


def bomb() -> dict[str, Any]:
    """A schema of 30 lines that takes 2^30 steps."""
    layers = {f"l{n}": {"allOf": [{"$ref": f"#/$defs/l{n + 1}"}] * 2} for n in range(30)}
    return {"$ref": "#/$defs/l0", "$defs": {**layers, "l30": {"type": "number"}}}


@pytest.mark.parametrize(
    ("wanted", "answer"),
    [
        (measure("regex", pattern="(a+)+$"), "a" * 40 + "!"),
        (measure("regex", pattern="(?:(?:a|aa)+)+b"), "a" * 5000),
        (measure("json_schema", json_schema={"pattern": "^(a|a)*$"}), json.dumps("a" * 40 + "!")),
        (measure("json_schema", json_schema=bomb()), "1"),
        (measure("json_schema", json_schema={"$ref": "#"}), "1"),
        (measure("json_schema", json_schema={"uniqueItems": True}), json.dumps([{"a": n} for n in range(3000)])),
    ],
)
def test_a_bomb_ends_soon_and_its_item_has_no_value(wanted: Any, answer: str) -> None:
    began = time.monotonic()

    assert isinstance(score(wanted, answer), str | float)

    assert time.monotonic() - began < patience(10)


@pytest.mark.parametrize(
    ("wanted", "param"),
    [
        (measure("regex", pattern="("), "measures[0].pattern"),
        (measure("json_schema", json_schema={"type": "nothing"}), "measures[0].json_schema"),
        (measure("json_schema", json_schema={"$ref": "http://example.org/x"}), "measures[0].json_schema"),
        (measure("json_schema", json_schema={"$ref": "#/properties/a"}), "measures[0].json_schema"),
        (measure("json_schema", json_schema={"patternProperties": {"(a+)+$": {}}}), "measures[0].json_schema"),
        (measure("json_schema", json_schema={"pattern": "("}), "measures[0].json_schema"),
        (measure("json_schema", json_schema={"enum": ["x" * 200_000]}), "measures[0].json_schema"),
        (measure("exact_match", reference="{{ secret.x }}"), "measures[0].reference"),
    ],
)
def test_what_could_judge_no_answer_is_refused_when_it_is_asked(wanted: Any, param: str) -> None:
    with pytest.raises(Invalid) as refused:
        Scorer([wanted])

    assert refused.value.param == param


def test_a_property_may_have_the_name_of_a_keyword_that_is_not_offered() -> None:
    wanted = measure("json_schema", json_schema={"properties": {"patternProperties": {"type": "number"}}})

    assert score(wanted, '{"patternProperties": 1}') == 1.0


# --- requests


def request(**values: Any) -> CreateEvaluation:
    return CreateEvaluation.model_validate(
        {"subjects": ["a", "b"], "items": {"type": "suite", "suite": "general"}, **values}
    )


@pytest.mark.parametrize(
    ("values", "param"),
    [
        ({"subjects": ["a", "a"]}, "subjects"),
        ({"measures": [{"type": "loss", "name": "x"}, {"type": "length", "name": "x"}]}, "measures"),
        ({"against": "c"}, "against"),
        ({"measures": [{"type": "win_rate", "name": "w", "by": "w"}]}, "against"),
        ({"against": "a", "measures": [{"type": "win_rate", "name": "w", "by": "w"}]}, "measures[0].by"),
        (
            {
                "against": "a",
                "measures": [{"type": "length", "name": "l"}, {"type": "win_rate", "name": "w", "by": "l"}],
            },
            "measures[1].by",
        ),
    ],
)
def test_a_request_whose_names_do_not_agree_is_refused_by_name(values: dict[str, Any], param: str) -> None:
    with pytest.raises(Invalid) as refused:
        request(**values)

    assert refused.value.param == param


def test_nothing_is_generated_for_likelihood_alone() -> None:
    assert not needs_answers([measure("loss"), measure("token_accuracy")])
    assert needs_likelihood([measure("loss")])
    assert needs_answers([measure("length")])
    assert not needs_likelihood([measure("length")])


# --- items


def lines(*rows: Any) -> list[bytes]:
    return [(row if isinstance(row, str) else json.dumps(row)).encode() + b"\n" for row in rows]


def test_a_row_that_trains_is_an_item_whose_last_answer_is_the_reference() -> None:
    user, answer = {"role": "user", "content": "2+2?"}, {"role": "assistant", "content": "4"}
    asked = list(
        items(
            lines(
                {"messages": [user, answer], "level": 1},
                {"messages": [user]},
                {"prompt": "a", "completion": "b"},
                {"text": "only text"},
                {"messages": [user], "completion": [answer], "label": False},
                {"input": {"messages": [user]}, "preferred_output": 1},
                "no JSON",
                "[1]",
            ),
            most=100,
        )
    )

    chat, question, completion, text, bad, *faulty = asked
    assert (chat.reference, chat.messages, chat.row) == ("4", [user], {"level": 1})
    assert chat.record == {"messages": [user, answer]}
    assert (question.reference, question.record, question.messages) == (None, None, [user])
    assert (completion.text, completion.reference) == ("a", "b")
    assert (text.messages, text.text, text.record) == (None, None, {"text": "only text"})
    assert (bad.reference, bad.record) == (None, None), "a bad answer is no reference"
    assert [one.fault.code for one in faulty if one.fault] == ["invalid_row", "invalid_json", "invalid_row"]
    assert [one.line for one in asked] == list(range(1, 9))


def test_a_split_takes_the_same_rows_in_whatever_order_they_come() -> None:
    rows = lines(*({"prompt": f"question {n}", "completion": "x"} for n in range(400)))

    taken = {item.text for item in items(rows, most=1000, share=0.25)}

    assert taken == {item.text for item in items(reversed(rows), most=1000, share=0.25)}
    assert 70 < len(taken) < 130
    assert taken < {item.text for item in items(rows, most=1000, share=0.5)}


def test_slices_are_values_of_the_row_as_text() -> None:
    item = EvaluationItem(number=1, line=1, row={"metadata": {"language": "de", "level": 3}})

    assert item.slices(["metadata.language", "metadata.level", "metadata.none", "]["]) == {
        "metadata.language": "de",
        "metadata.level": "3",
        "metadata.none": None,
        "][": None,
    }


def test_hostile_text_is_kept_as_postgres_takes_it() -> None:
    assert ItemAnswer(part="items", item=1, subject=0, answer="a\0b").answer == "a\ufffdb"
    assert storable("a\0b\ud800c") == "a\ufffdb?c"


def test_the_suite_is_a_few_dozen_items_that_a_training_could_read() -> None:
    suite = general_suite.general(part="forgetting")

    assert 36 <= len(suite) <= 60
    assert all(item.reference and item.record and item.row["topic"] and item.fault is None for item in suite)
    assert len({item.prompt for item in suite}) == len(suite)
