"""What a measure says of one answer: a number, or why there is none. The graders are those of the graders' routes."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, Final

from shared.contract import answer_scores
from shared.contract.evaluation import (
    EffortMeasure,
    FieldsMeasure,
    GraderMeasure,
    JsonMeasure,
    LikelihoodMeasure,
    Measure,
    NumericMeasure,
    RegexMeasure,
    SchemaMeasure,
    TextMeasure,
    WinRateMeasure,
)
from shared.contract.evaluation_run import ItemAnswer
from shared.errors import Invalid
from shared.rows import grading, json_scores, placeholders
from shared.rows.evaluation_items import EvaluationItem
from shared.rows.json_scores import BadSchema, Schema, TooMuch
from shared.rows.placeholders import BadPlaceholder, NoSuchVariable, TooLong


class NoValue(Exception):  # a fact about one item
    """The measure has no value here. Its words are for the user."""


Scored = Callable[[EvaluationItem, ItemAnswer], float]


def needs_answers(measures: Sequence[Measure]) -> bool:
    """Whether anything must be generated."""
    return any(not isinstance(measure, LikelihoodMeasure | WinRateMeasure) for measure in measures)


def needs_likelihood(measures: Sequence[Measure]) -> bool:
    return any(isinstance(measure, LikelihoodMeasure) for measure in measures)


class Scorer:
    """Measures that have been read: patterns and schemas are compiled once.

    Raises:
        Invalid: a pattern, schema or grader that no answer could be judged by, with its place in the request.
    """

    def __init__(self, measures: Sequence[Measure]) -> None:
        self._scored: dict[str, Scored] = {}
        for number, measure in enumerate(measures):
            if not isinstance(measure, WinRateMeasure):  # of two subjects: shared/rows/figures.py
                self._scored[measure.name] = _scored(measure, f"measures[{number}]")

    def scores(self, item: EvaluationItem, answer: ItemAnswer) -> tuple[dict[str, float], dict[str, str]]:
        """Values by measure, and for the others why they have none."""
        values: dict[str, float] = {}
        problems: dict[str, str] = {}
        for name, scored in self._scored.items():
            try:
                value = scored(item, answer)
            except NoValue as none:
                problems[name] = str(none)[:300]
                continue
            if math.isfinite(value):
                values[name] = value
            else:
                problems[name] = "The value is not finite."
        return values, problems


def _scored(measure: Measure, param: str) -> Scored:
    return _MAKERS[type(measure)](measure, param)


# --- what is read of an answer ----------------------------------------------------------------------------------------


def _said(answer: ItemAnswer) -> str:
    if answer.answer is None:
        raise NoValue("There is no answer." if answer.error is None else answer.error.message)
    return answer.answer


def _likelihood(kind: str, answer: ItemAnswer) -> float:
    if answer.loss is None or not answer.loss_tokens:
        raise NoValue("There is no reference to foretell." if answer.error is None else answer.error.message)
    return (answer.correct_tokens or 0) / answer.loss_tokens if kind == "token_accuracy" else answer.loss


def _effort(kind: str, answer: ItemAnswer) -> float:
    text = _said(answer)
    if kind == "length":
        return float(len(text))
    value = answer.seconds if kind == "latency" else answer.tokens
    if value is None:
        raise NoValue("It was not counted.")
    return float(value)


def _reference(item: EvaluationItem) -> str:
    if item.reference is None:
        raise NoValue("The row has no reference answer.")
    return item.reference


# --- measures ---------------------------------------------------------------------------------------------------------


def _text(measure: TextMeasure, item: EvaluationItem, answer: str) -> float:
    reference = _reference(item) if measure.reference is None else _filled(measure.reference, item, answer)
    compared = answer_scores.is_reference if measure.type == "exact_match" else answer_scores.has_reference
    return float(compared(answer, reference, ignore_case=measure.ignore_case))


def _filled(text: str, item: EvaluationItem, answer: str) -> str:
    try:
        return placeholders.fill(text, {"item": item.row, "sample": {"output_text": answer}})
    except NoSuchVariable as error:
        raise NoValue(f"The row has no {error}.") from None
    except TooLong:
        raise NoValue("The reference is too long with its placeholders filled.") from None


def _check_placeholders(measure: TextMeasure, param: str) -> None:
    try:
        placeholders.check(measure.reference or "")
    except BadPlaceholder as error:
        raise Invalid(
            f"'{{{{ {error} }}}}' is no placeholder; write item.NAME or sample.NAME.", param=f"{param}.reference"
        ) from None


def _regex(measure: RegexMeasure, param: str) -> Scored:
    try:
        pattern = json_scores.compiled(measure.pattern, ignore_case=measure.ignore_case)
    except ValueError as error:
        raise Invalid(f"The pattern cannot be read: {error}.", param=f"{param}.pattern") from None

    def scored(_: EvaluationItem, answer: ItemAnswer) -> float:
        try:
            return float(json_scores.search(pattern, _said(answer)))
        except TooMuch as error:
            raise NoValue(str(error)) from None

    return scored


_NO_JSON: Final = object()


def _json(text: str) -> Any:
    try:
        return answer_scores.parsed_json(text)
    except ValueError:
        return _NO_JSON


def _schema(measure: SchemaMeasure, param: str) -> Scored:
    try:
        schema = Schema(measure.json_schema)
    except BadSchema as error:
        raise Invalid(f"The schema {error}.", param=f"{param}.json_schema") from None

    def scored(_: EvaluationItem, answer: ItemAnswer) -> float:
        value = _json(_said(answer))
        if value is _NO_JSON:
            return 0.0
        try:
            return float(schema.accepts(value))
        except (TooMuch, BadSchema) as error:
            raise NoValue(f"The schema {error}." if isinstance(error, BadSchema) else str(error)) from None

    return scored


def _numeric(measure: NumericMeasure, item: EvaluationItem, answer: str) -> float:
    wanted = answer_scores.last_number(_reference(item))
    if wanted is None:
        raise NoValue("The reference has no number.")
    given = answer_scores.last_number(answer)
    if given is None:
        return 0.0
    return float(abs(given - wanted) <= max(measure.absolute, measure.relative * abs(wanted)))


def _fields(measure: FieldsMeasure, item: EvaluationItem, answer: str) -> float:
    reference = _json(_reference(item))
    if reference is _NO_JSON:
        raise NoValue("The reference is no JSON.")
    given = _json(answer)
    try:
        share = json_scores.fields_right(given, reference, fields=measure.fields)
    except (TooMuch, RecursionError) as error:
        raise NoValue(str(error)) from None
    if share is None:
        raise NoValue("The reference has none of the fields.")
    return 0.0 if given is _NO_JSON else share


def _check_grader(measure: GraderMeasure, param: str) -> None:
    try:
        grading.check(measure.grader)
    except Invalid as error:
        raise Invalid(error.message, param=f"{param}.{error.param}") from None


def _graded(measure: GraderMeasure, item: EvaluationItem, answer: str) -> float:
    try:
        graded = grading.run(measure.grader, sample=answer, item=dict(item.row))
    except Invalid as error:
        raise NoValue(error.message) from None
    errors = graded.metadata.errors
    if errors.invalid_variable_error:
        raise NoValue("The row has no such part as a placeholder names.")
    if errors.formula_parse_error:
        raise NoValue("The formula has no finite value here.")
    return graded.reward  # an answer that should be JSON and is none has 0


def _checked_text(measure: TextMeasure, param: str) -> Scored:
    _check_placeholders(measure, param)
    return lambda item, answer: _text(measure, item, _said(answer))


def _checked_grader(measure: GraderMeasure, param: str) -> Scored:
    _check_grader(measure, param)
    return lambda item, answer: _graded(measure, item, _said(answer))


# Each makes of a measure and its place in the request what scores an answer.
_MAKERS: Final[dict[type[Measure], Callable[[Any, str], Scored]]] = {
    LikelihoodMeasure: lambda measure, _: lambda _item, answer: _likelihood(measure.type, answer),
    EffortMeasure: lambda measure, _: lambda _item, answer: _effort(measure.type, answer),
    TextMeasure: _checked_text,
    RegexMeasure: _regex,
    JsonMeasure: lambda _measure, _: lambda _item, answer: float(_json(_said(answer)) is not _NO_JSON),
    SchemaMeasure: _schema,
    NumericMeasure: lambda measure, _: lambda item, answer: _numeric(measure, item, _said(answer)),
    FieldsMeasure: lambda measure, _: lambda item, answer: _fields(measure, item, _said(answer)),
    GraderMeasure: _checked_grader,
}
