"""OpenAI's evals by the unmodified client, from the criteria to the judged answers."""

from __future__ import annotations

import io
import json
from collections.abc import Iterator
from typing import Any

import pytest
from openai import OpenAI

from shared.store.db import session_scope
from tests.factories import make_key
from tests.lifecycle.stack import Servers, Stack, open_stack
from tests.lifecycle.test_evaluating import PROGRAM, work
from tests.live import live_api
from tests.openai_types import FAULTS, held

CRITERIA: list[Any] = [
    {
        "type": "string_check",
        "name": "names it",
        "input": "{{ sample.output_text }}",
        "reference": "{{item.label}}",
        "operation": "like",
    },
    {
        "type": "text_similarity",
        "name": "is close",
        "input": "{{sample.output_text}}",
        "reference": "{{item.label}}",
        "evaluation_metric": "rouge_l",
        "pass_threshold": 0.9,
    },
]
SCHEMA = {"type": "object", "properties": {"label": {"type": "string"}}, "required": ["label"]}
CONFIG: Any = {"type": "custom", "item_schema": SCHEMA, "include_sample_schema": True}
TEMPLATE: Any = {
    "type": "template",
    "template": [
        {"role": "developer", "content": "Answer."},
        {"role": "user", "content": {"type": "input_text", "text": "{{item.text}}"}},
    ],
}


@pytest.fixture(scope="module")
def quiet(servers: Servers, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stack]:
    with open_stack(tmp_path_factory.mktemp("stack"), servers, **PROGRAM) as made:
        yield made


@pytest.fixture(scope="module")
def client(quiet: Stack) -> Iterator[OpenAI]:
    with session_scope(quiet.engine) as session:
        _, key = make_key(session)
    with live_api(quiet.settings) as url, OpenAI(base_url=f"{url}/v1", api_key=key, http_client=held()) as made:
        yield made


@pytest.fixture(autouse=True)
def _answers_are_as_openai_types_them() -> Iterator[None]:
    before = len(FAULTS)
    yield
    found, FAULTS[before:] = FAULTS[before:], []
    assert found == []


def made_eval(client: OpenAI, **values: Any) -> str:
    return client.evals.create(name="labels", data_source_config=CONFIG, testing_criteria=CRITERIA, **values).id


def test_a_model_answers_a_file_of_items_and_every_criterion_judges_each(quiet: Stack, client: OpenAI) -> None:
    lines = [{"item": {"text": f"it is {label}", "label": label}} for label in ("red", "blue")]
    lines += [{"item": {"text": "no label"}}, {"item": {"text": "endless", "label": "x"}}, {"item": {"label": "x"}}]
    content = "\n".join(map(json.dumps, lines)).encode() + b"\nno JSON"
    file = client.files.create(file=("items.jsonl", io.BytesIO(content)), purpose="evals")
    judged = made_eval(client)

    source: Any = {
        "type": "completions",
        "source": {"type": "file_id", "id": file.id},
        "model": "tiny",
        "input_messages": TEMPLATE,
        "sampling_params": {"temperature": 0, "max_completion_tokens": 16},
    }
    run = client.evals.runs.create(judged, name="first", data_source=source, metadata={"by": "ci"})
    assert (run.status, run.model, run.eval_id, run.metadata) == ("queued", "tiny", judged, {"by": "ci"})
    work(quiet)

    run = client.evals.runs.retrieve(run.id, eval_id=judged)
    assert run.status == "completed", run.error
    counts = run.result_counts
    assert (counts.total, counts.passed, counts.failed, counts.errored) == (6, 0, 2, 4)
    by_name = {each.testing_criteria: (each.passed, each.failed) for each in run.per_testing_criteria_results}
    assert by_name == {"names it": (2, 0), "is close": (0, 2)}
    assert [(each.run_model_name, each.invocation_count) for each in run.per_model_usage] == [("tiny", 2)]
    items = list(client.evals.runs.output_items.list(run.id, eval_id=judged, limit=2))
    assert [item.status for item in items] == ["fail", "fail", "error", "error", "error", "error"]
    first = items[0]
    assert first.datasource_item == lines[0]["item"]
    assert [(message.role, message.content) for message in first.sample.input] == [
        ("system", "Answer."),
        ("user", "it is red"),
    ]
    assert first.sample.output[0].content is not None
    assert first.sample.output[0].content.endswith("it is red")
    assert [(result.name, result.passed) for result in first.results] == [("names it", True), ("is close", False)]
    assert [item.sample.error.code for item in items[2:]] == [
        "invalid_item",
        "context_length_exceeded",
        "invalid_variable",
        "invalid_json",
    ]
    same = client.evals.runs.output_items.retrieve(first.id, eval_id=judged, run_id=run.id)
    assert same.to_dict() == first.to_dict()
    assert [run.id] == [each.id for each in client.evals.runs.list(judged, status="completed")]


def test_answers_that_come_with_their_items_are_judged_without_a_model(quiet: Stack, client: OpenAI) -> None:
    judged = made_eval(client)
    content = [{"item": {"label": "red"}, "sample": {"output_text": text}} for text in ("red", "reddish", "blue")]
    source: Any = {"type": "jsonl", "source": {"type": "file_content", "content": content}}

    run = client.evals.runs.create(judged, data_source=source)
    work(quiet)

    run = client.evals.runs.retrieve(run.id, eval_id=judged)
    assert (run.status, run.model, run.per_model_usage) == ("completed", "", [])
    counts = run.result_counts
    assert (counts.total, counts.passed, counts.failed, counts.errored) == (3, 1, 2, 0)
    assert [item.status for item in client.evals.runs.output_items.list(run.id, eval_id=judged)] == [
        "pass",
        "fail",
        "fail",
    ]
    (passed,) = client.evals.runs.output_items.list(run.id, eval_id=judged, status="pass")
    assert passed.sample.output[0].content == "red"
