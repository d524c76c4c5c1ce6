"""OpenAI's graders: what scores they give, and how a formula or a placeholder from a stranger is held."""

from __future__ import annotations

import math
from typing import Any

import pytest
from pydantic import TypeAdapter, ValidationError

from shared.contract.formula import BadFormula, Formula, NoNumber
from shared.contract.graders import Grader, Grading
from shared.errors import Invalid
from shared.rows import grading, placeholders
from shared.rows.similarity import similarity

ITEM = {"answer": "Paris", "facts": {"cities": ["Lyon", "Nice"], "count": 2, "none": None}}


def grader(**fields: Any) -> Any:
    return TypeAdapter(Grader).validate_python({"name": "g", **fields})


def check(operation: str, text: str = "{{sample.output_text}}", reference: str = "{{ item.answer }}") -> Any:
    return grader(type="string_check", input=text, reference=reference, operation=operation)


def grade(wanted: Any, sample: str = "It is Paris.", item: dict[str, Any] | None = None) -> Grading:
    return grading.run(wanted, sample=sample, item=ITEM if item is None else item)


def flags(graded: Grading) -> set[str]:
    return {name for name, value in graded.metadata.errors.model_dump().items() if value}


@pytest.mark.parametrize(
    ("operation", "sample", "reward"),
    [
        ("eq", "Paris", 1), ("eq", "paris", 0), ("ne", "paris", 1), ("ne", "Paris", 0),
        ("like", "It is Paris.", 1), ("like", "It is PARIS.", 0), ("ilike", "It is PARIS.", 1), ("ilike", "Lyon", 0),
    ],
)  # fmt: skip
def test_a_string_check_compares_as_openai_says(operation: str, sample: str, reward: float) -> None:
    assert grade(check(operation), sample).reward == reward


@pytest.mark.parametrize(
    ("metric", "low", "high"),
    [
        ("fuzzy_match", 0.9, 1.0), ("bleu", 0.273, 0.275), ("gleu", 0.4, 0.8), ("rouge_1", 0.90, 0.92),
        ("rouge_2", 0.66, 0.67), ("rouge_3", 0.28, 0.29), ("rouge_5", 0.0, 0.0), ("rouge_l", 0.90, 0.92),
    ],
)  # fmt: skip
def test_similarities_of_a_known_pair(metric: Any, low: float, high: float) -> None:
    # By hand: five of six words, three of five pairs, one of four triples. BLEU: e^-0.2 (1 x 3/4 x 1/3 x 0.1/2)^0.25.
    value = similarity("the cat on the mat", "the cat sat on the mat", metric=metric)

    assert low <= value <= high
    assert similarity("the cat sat on the mat", "the cat sat on the mat", metric=metric) == pytest.approx(1.0)
    assert similarity("zebra", "the cat sat on the mat", metric=metric) < 0.5
    assert similarity("", " ", metric=metric) == 1.0
    assert similarity("", "word", metric=metric) == 0.0


def test_a_multi_grader_computes_its_formula_over_named_graders() -> None:
    wanted = grader(
        type="multi",
        graders={
            "exact": {"type": "string_check", "input": "{{sample.output_text}}", "reference": "x", "operation": "eq"},
            "near": {"type": "string_check", "input": "{{sample.output_text}}", "reference": "is", "operation": "like"},
        },
        calculate_output="0.25 * exact + 0.75 * near ^ 2",
    )
    graded = grade(wanted)

    assert graded.reward == 0.75
    assert graded.sub_rewards == {"exact": 0.0, "near": 1.0}
    assert wanted.graders["near"].name == "near"


@pytest.mark.parametrize("form", ["list", "single"])
def test_a_multi_grader_takes_the_forms_of_openais_examples_and_types(form: str) -> None:
    inner = {"type": "string_check", "name": "same", "input": "a", "reference": "a", "operation": "eq"}
    wanted = grader(type="multi", graders=[inner] if form == "list" else inner, calculate_output="same")

    assert grade(wanted).reward == 1.0


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("-2 ^ 2", -4), ("2 ^ 3 ^ 2", 512), ("min(a, b) + max(a, b)", 0.75),
        ("abs(0 - 3)", 3), ("floor(1.5) + ceil(1.5)", 3),
        ("sqrt(4) * exp(0) + log(1)", 2), ("(a + b) / 2", 0.375), ("1e3", 1000),
    ],
)  # fmt: skip
def test_formulas_compute_as_on_paper(text: str, value: float) -> None:
    formula = Formula(text, names=frozenset({"a", "b"}))

    assert formula.of({"a": 0.25, "b": 0.5}) == pytest.approx(value)


@pytest.mark.parametrize(
    "text",
    [
        "", "a +", "__import__('os')", "a.real", "a[0]", "[a]", "lambda: 1", "a if a else 0", "a > 0", "'x'", "True",
        "b", "max()", "max(a)", "sqrt(a, a)", "sqrt(x=a)", "pow(a, 2)", "a // 2", "a ** 2", "(" * 900, "a;a", "f'{a}'",
        "a" * 2000, "+".join(["a"] * 400), "1j", "a and a", "not a", "~1", "a := 1",
    ],
)  # fmt: skip
def test_what_is_no_formula_is_refused_and_never_run(text: str) -> None:
    with pytest.raises(BadFormula):
        Formula(text, names=frozenset({"a"}))


@pytest.mark.parametrize(
    "text", ["1 / (a - a)", "log(0)", "sqrt(0 - 1)", "9 ^ 9 ^ 9 ^ 9", "exp(10000)", "floor(1e999)", "1e308 * 10"]
)
def test_a_formula_without_a_finite_value_gives_no_number(text: str) -> None:
    with pytest.raises(NoNumber):
        Formula(text, names=frozenset({"a"})).of({"a": 1.0})


def test_a_formula_that_fails_in_a_run_is_a_flag_and_reward_0() -> None:
    inner = {"type": "string_check", "input": "a", "reference": "a", "operation": "eq"}
    graded = grade(grader(type="multi", graders={"same": inner}, calculate_output="1 / (same - 1)"))

    assert graded.reward == 0.0
    assert flags(graded) == {"formula_parse_error"}
    assert math.isfinite(graded.reward)


@pytest.mark.parametrize(
    ("text", "filled"),
    [
        ("{{ item.facts.cities[1] }}", "Nice"), ("{{item.facts}}", '{"cities":["Lyon","Nice"],"count":2,"none":null}'),
        ("{{item.facts.count}} of {{item.answer}}", "2 of Paris"), ("{{item.facts.none}}", "null"),
        ("{{ sample.choices[0].message.content }}", "hi"), ("no { braces }", "no { braces }"),
        ("{{item.answer", "{{item.answer"),
    ],
)  # fmt: skip
def test_placeholders_are_filled_with_texts_as_they_are_and_compact_json(text: str, filled: str) -> None:
    variables = {"item": ITEM, "sample": {"choices": [{"message": {"content": "hi"}}]}}

    assert placeholders.fill(text, variables) == filled


def test_what_a_row_says_is_not_filled_again() -> None:
    graded = grade(check("eq", "{{item.a}}", "{{ item.b }}"), item={"a": "{{item.b}}", "b": "{{item.b}}"})

    assert graded.reward == 1.0


@pytest.mark.parametrize(
    "inner", ["env.HOME", "item", "item.", "item.a.b.", "item[a]", "item.__class__ x", "", "sample|upper", "item.a[0"]
)
def test_a_placeholder_that_no_row_could_fill_is_refused_by_field(inner: str) -> None:
    with pytest.raises(Invalid) as refused:
        grading.check(check("eq", reference="{{" + inner + "}}"))

    assert refused.value.param == "grader.reference"


@pytest.mark.parametrize(
    "inner", ["item.nothing", "item.facts.cities[7]", "item.answer.x", "item.__class__", "sample.output_tools[0]"]
)
def test_a_variable_that_is_not_there_is_a_flag_and_no_empty_text(inner: str) -> None:
    graded = grade(check("ne", reference="{{" + inner + "}}"))

    assert graded.reward == 0.0
    assert flags(graded) == {"invalid_variable_error"}


def test_an_answer_that_is_no_json_is_told_from_a_missing_variable() -> None:
    wanted = check("eq", "{{sample.output_json.city}}", "Paris")

    assert grade(wanted, '{"city": "Paris"}').reward == 1.0
    assert flags(grade(wanted, "Paris")) == {"sample_parse_error"}


def test_a_filled_text_is_bounded() -> None:
    with pytest.raises(Invalid, match="1,000,000"):
        grade(check("eq", "{{item.long}}" * 4), item={"long": "x" * 300_000})


@pytest.mark.parametrize("long", ["x" * 20_001, "x " * 2001])
def test_texts_that_would_hold_a_thread_for_long_are_not_compared(long: str) -> None:
    wanted = grader(type="text_similarity", input="{{sample.output_text}}", reference="x", evaluation_metric="rouge_l")

    with pytest.raises(Invalid, match="2,000 words"):
        grade(wanted, long)


def test_a_multi_grader_holds_no_multi_grader() -> None:
    with pytest.raises(ValidationError):
        grader(
            type="multi", graders={"a": {"type": "multi", "graders": {}, "calculate_output": "1"}}, calculate_output="a"
        )
