"""The graders' routes as the `openai` client and a careless caller meet them."""

from __future__ import annotations

import json
from typing import Any

import pytest

from tests.integration.conftest import Api
from tests.integration.test_bad_requests import refused

CHECK: dict[str, Any] = {
    "type": "string_check", "name": "exact", "input": "{{sample.output_text}}", "reference": "{{item.answer}}",
    "operation": "eq",
}  # fmt: skip


def test_the_openai_client_runs_a_grader(api: Api) -> None:
    graded = api.openai().fine_tuning.alpha.graders.run(grader=CHECK, model_sample="Paris", item={"answer": "Paris"})  # type: ignore[arg-type]

    assert graded.reward == 1.0
    assert graded.metadata.name == "exact"
    assert graded.metadata.scores == {"exact": 1.0}
    assert graded.metadata.execution_time >= 0
    assert not graded.metadata.errors.other_error
    assert len(graded.metadata.errors.to_dict()) == 14


def test_a_grader_is_given_back_in_its_plain_form(api: Api) -> None:
    multi: Any = {"type": "multi", "name": "both", "graders": [CHECK], "calculate_output": "exact * 2"}

    validated = api.openai().fine_tuning.alpha.graders.with_raw_response.validate(grader=multi)

    plain = {"type": "multi", "name": "both", "graders": {"exact": CHECK}, "calculate_output": "exact * 2"}
    assert json.loads(validated.text)["grader"] == plain


def test_an_answer_and_a_row_may_hold_any_character(api: Api) -> None:
    text = "\x1b[31m\tred\n\u202e"

    graded = api.openai().fine_tuning.alpha.graders.run(grader=CHECK, model_sample=text, item={"answer": text})  # type: ignore[arg-type]

    assert graded.reward == 1.0


@pytest.mark.parametrize(
    ("change", "param", "words"),
    [
        ({"type": "python"}, "grader.type", "run code"), ({"type": "score_model"}, "grader.type", "another model"),
        ({"type": "label_model"}, "grader.type", "another model"), ({"operation": "neq"}, "grader.operation", '"ne"'),
        ({"name": None}, "grader.name", "string"), ({"weight": 1}, "grader.weight", "Unknown"),
        ({"input": 5}, "grader.input", "string"), ({"input": "{{env.KEY}}"}, "grader.input", "item.NAME"),
    ],
)  # fmt: skip
def test_a_grader_that_cannot_be_understood_is_refused_by_field(
    api: Api, change: dict[str, Any], param: str, words: str
) -> None:
    with api.http() as http:
        answer = http.post("/v1/fine_tuning/alpha/graders/validate", json={"grader": CHECK | change})

    error = refused(api, answer)
    assert error["param"] == param
    assert words in error["message"]


@pytest.mark.parametrize(("metric", "words"), [("cosine", "embedding"), ("meteor", "WordNet"), ("rouge_9", "rouge_5")])
def test_a_metric_that_is_not_offered_says_why(api: Api, metric: str, words: str) -> None:
    grader = {"type": "text_similarity", "name": "g", "input": "a", "reference": "a", "evaluation_metric": metric}
    with api.http() as http:
        answer = http.post("/v1/fine_tuning/alpha/graders/run", json={"grader": grader, "model_sample": "a"})

    error = refused(api, answer)
    assert error["param"] == "grader.evaluation_metric"
    assert words in error["message"]


def test_a_formula_that_cannot_be_read_is_refused_by_field(api: Api) -> None:
    multi = {"type": "multi", "name": "m", "graders": {"exact": CHECK}, "calculate_output": "exact + near"}
    with api.http() as http:
        answer = http.post("/v1/fine_tuning/alpha/graders/validate", json={"grader": multi})

    error = refused(api, answer)
    assert error["param"] == "grader.calculate_output"
    assert "'near', which is no grader" in error["message"]
