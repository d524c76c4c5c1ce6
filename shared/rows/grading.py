"""Runs a grader on one answer. The graders' routes call this; nothing else decides what a score is."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any, Final

from shared.contract.formula import NoNumber
from shared.contract.graders import Grader, Grading, GradingErrors, GradingMetadata, Multi, StringCheck, TextSimilarity
from shared.errors import Invalid
from shared.rows import placeholders
from shared.rows.placeholders import BadPlaceholder, NoSuchVariable, TooLong

# A comparison's time grows with the product of the lengths; a thread of the API must not be held for seconds.
MAX_COMPARED_CHARACTERS: Final = 20_000
MAX_COMPARED_WORDS: Final = 2000

Single = StringCheck | TextSimilarity


def check(grader: Grader) -> None:
    """Raises Invalid, with the field's name, for a placeholder that no row could fill."""
    parts = grader.graders.items() if isinstance(grader, Multi) else [(None, grader)]
    for name, part in parts:
        for field in ("input", "reference"):
            param = f"grader.{field}" if name is None else f"grader.graders.{name}.{field}"
            try:
                placeholders.check(getattr(part, field))
            except BadPlaceholder as error:
                raise Invalid(
                    f"Invalid value for '{param}': '{{{{ {error} }}}}' is no placeholder; write item.NAME or"
                    " sample.NAME, with dots and [i] for what lies deeper.",
                    param=param,
                ) from None


def run(grader: Grader, *, sample: str, item: Mapping[str, Any]) -> Grading:
    """The reward of one answer.

    Args:
        sample: the model's answer.
        item: the row's other keys, any JSON.

    Raises:
        Invalid: a placeholder is wrong, or two texts are too long to be compared.
    """
    check(grader)
    variables = {"item": item, "sample": _sample(sample)}
    scores: dict[str, float] = {}
    try:
        if isinstance(grader, Multi):
            scores = {name: _score(part, variables) for name, part in grader.graders.items()}
            reward = grader.formula().of(scores)
        else:
            reward = _score(grader, variables)
    except NoSuchVariable as error:
        unread = str(error).startswith("sample.output_json")
        return _failed(grader, scores, GradingErrors(sample_parse_error=unread, invalid_variable_error=not unread))
    except NoNumber:
        return _failed(grader, scores, GradingErrors(formula_parse_error=True))
    return _graded(grader, reward, scores, GradingErrors())


def _sample(text: str) -> dict[str, Any]:
    sample = {"output_text": text, "choices": [{"index": 0, "message": {"role": "assistant", "content": text}}]}
    try:
        sample["output_json"] = json.loads(text)
    except (ValueError, RecursionError):
        return sample
    return sample


def _score(grader: Single, variables: Mapping[str, Any]) -> float:
    try:
        text = placeholders.fill(grader.input, variables)
        reference = placeholders.fill(grader.reference, variables)
    except TooLong:
        raise Invalid(
            f"A text with its placeholders filled has more than {placeholders.MAX_RENDERED:,} characters;"
            " name a smaller part of the item.",
            param="grader",
        ) from None
    if isinstance(grader, StringCheck):
        return float(_holds(text, reference, grader.operation))
    for compared in (text, reference):
        if len(compared) > MAX_COMPARED_CHARACTERS or len(compared.split()) > MAX_COMPARED_WORDS:
            raise Invalid(
                f"text_similarity compares texts of at most {MAX_COMPARED_CHARACTERS:,} characters and"
                f" {MAX_COMPARED_WORDS:,} words; grade a shorter part, or use string_check.",
                param="grader",
            )
    # Not at the top: nltk takes a second and 40 MB, and most APIs never grade.
    from shared.rows.similarity import similarity

    return similarity(text, reference, metric=grader.evaluation_metric)


def _holds(text: str, reference: str, operation: str) -> bool:
    if operation in ("eq", "ne"):
        return (text == reference) == (operation == "eq")
    return reference in text if operation == "like" else reference.casefold() in text.casefold()


def _failed(grader: Grader, scores: dict[str, float], errors: GradingErrors) -> Grading:
    return _graded(grader, 0.0, scores, errors)


def _graded(grader: Grader, reward: float, scores: dict[str, float], errors: GradingErrors) -> Grading:
    named = scores or {grader.name: reward}
    return Grading(
        reward=reward,
        sub_rewards=scores,
        model_grader_token_usage_per_model={},
        metadata=GradingMetadata(name=grader.name, type=grader.type, errors=errors, execution_time=0.0, scores=named),
    )
