"""OpenAI's evals as their users meet them: kept, changed, refused by name, listed, cancelled, withdrawn."""

from __future__ import annotations

from typing import Any

import httpx2
import openai
import pytest

from tests.integration.conftest import Api
from tests.integration.test_evaluations import BASE, refusal

CONFIG: Any = {"type": "custom", "item_schema": {"type": "object", "required": ["q"]}}
CHECK: Any = {
    "type": "string_check",
    "name": "right",
    "input": "{{sample.output_text}}",
    "reference": "{{item.a}}",
    "operation": "eq",
}
ASKED: Any = {"type": "template", "template": [{"role": "user", "content": "{{item.q}}"}]}
CONTENT: Any = {"type": "file_content", "content": [{"item": {"q": "2+2?", "a": "4"}}]}
ANSWERED: Any = {"type": "completions", "source": CONTENT, "model": BASE, "input_messages": ASKED}


def made(api: Api, **values: Any) -> str:
    asked: dict[str, Any] = {"data_source_config": CONFIG, "testing_criteria": [CHECK], **values}
    return api.openai().evals.create(**asked).id


def post(api: Api, path: str, body: dict[str, Any]) -> httpx2.Response:
    with api.http() as http:
        return http.post(f"/v1/evals{path}", json=body)


def test_an_eval_is_kept_changed_listed_and_withdrawn(api: Api) -> None:
    client = api.openai()
    created = client.evals.create(
        name="tickets", data_source_config=CONFIG, testing_criteria=[CHECK], metadata={"team": "a"}
    )
    other = made(api)

    assert (created.object, created.name, created.metadata) == ("eval", "tickets", {"team": "a"})
    shape = created.data_source_config.schema_  # type: ignore[union-attr]  # of a custom one
    assert shape["properties"] == {"item": CONFIG["item_schema"]}
    assert created.testing_criteria[0].name == "right"
    changed = client.evals.update(created.id, name="mail")
    assert (changed.name, changed.metadata) == ("mail", {"team": "a"})
    assert client.evals.retrieve(created.id).to_dict() == changed.to_dict()
    ids = [each.id for each in client.evals.list(limit=1)]
    assert ids.index(created.id) < ids.index(other)
    assert next(iter(client.evals.list(order="desc", order_by="updated_at"))).id == created.id
    assert client.evals.delete(created.id).deleted is True
    with pytest.raises(openai.NotFoundError):
        client.evals.retrieve(created.id)


@pytest.mark.parametrize(
    ("values", "param"),
    [
        ({"testing_criteria": []}, "testing_criteria"),
        ({"testing_criteria": [CHECK, CHECK]}, "testing_criteria[1].name"),
        ({"testing_criteria": [{**CHECK, "operation": "neq"}]}, "testing_criteria.0.operation"),
        ({"testing_criteria": [{**CHECK, "input": "{{row.x}}"}]}, "testing_criteria[0].input"),
        ({"testing_criteria": [{"type": "label_model", "name": "x", "model": "m"}]}, "testing_criteria.0.type"),
        ({"testing_criteria": [{"type": "score_model", "name": "x"}]}, "testing_criteria.0.type"),
        ({"testing_criteria": [{"type": "python", "name": "x", "source": "1"}]}, "testing_criteria.0.type"),
        ({"data_source_config": {"type": "stored_completions"}}, "data_source_config.type"),
        ({"data_source_config": {"type": "logs"}}, "data_source_config.type"),
        ({"data_source_config": {**CONFIG, "item_schema": {"type": 1}}}, "data_source_config.item_schema"),
    ],
)
def test_what_an_eval_cannot_be_is_refused_by_name(api: Api, values: dict[str, Any], param: str) -> None:
    answer = post(api, "", {"data_source_config": CONFIG, "testing_criteria": [CHECK], **values})

    assert refusal(answer)[1] == param


@pytest.mark.parametrize(
    ("source", "status", "param"),
    [
        ({"type": "responses", "source": CONTENT}, 400, "data_source.type"),
        ({**ANSWERED, "source": {"type": "stored_completions"}}, 400, "data_source.source.type"),
        ({**ANSWERED, "model": "nobody"}, 404, "data_source.model"),
        ({**ANSWERED, "source": {"type": "file_id", "id": "file-x"}}, 404, "data_source.source.id"),
        (
            {**ANSWERED, "sampling_params": {"reasoning_effort": "low"}},
            400,
            "data_source.sampling_params.reasoning_effort",
        ),
        (
            {**ANSWERED, "input_messages": {"type": "template", "template": [{"role": "user", "content": "{{x}}"}]}},
            400,
            "data_source.input_messages.template[0].content",
        ),
        (
            {**ANSWERED, "input_messages": {"type": "template", "template": [{"role": "assistant", "content": "x"}]}},
            400,
            "data_source.input_messages.template[0].role",
        ),
        (
            {**ANSWERED, "source": {"type": "file_content", "content": [{"item": {"q": "x"}}, {"item": {}}]}},
            400,
            "data_source.source.content[1]",
        ),
        ({"type": "jsonl", "source": CONTENT}, 400, "data_source.source.content[0]"),
    ],
)
def test_what_a_run_cannot_be_is_refused_by_name(api: Api, source: dict[str, Any], status: int, param: str) -> None:
    answer = post(api, f"/{made(api)}/runs", {"data_source": source})

    assert refusal(answer, status)[1] == param


def test_a_run_is_listed_cancelled_and_withdrawn_and_is_no_evaluation_of_ours(api: Api) -> None:
    client, judged = api.openai(), made(api)
    first, second = (client.evals.runs.create(judged, name=name, data_source=ANSWERED) for name in ("a", "b"))

    assert [run.id for run in client.evals.runs.list(judged, limit=1)] == [first.id, second.id]
    assert [run.id for run in client.evals.runs.list(judged, order="desc")] == [second.id, first.id]
    assert client.evals.runs.cancel(first.id, eval_id=judged).status == "canceled"
    assert client.evals.runs.cancel(first.id, eval_id=judged).status == "canceled"
    assert [run.id for run in client.evals.runs.list(judged, status="queued")] == [second.id]
    with api.http() as http:
        assert first.id.removeprefix("evalrun_") not in http.get("/v1/tunepool/evaluations?limit=100").text
    assert client.evals.runs.delete(second.id, eval_id=judged).run_id == second.id
    for gone in (second.id, "evalrun_x", first.id.replace("evalrun_", "eval_")):
        with pytest.raises(openai.NotFoundError):
            client.evals.runs.retrieve(gone, eval_id=judged)
    client.evals.delete(judged)
    with pytest.raises(openai.NotFoundError):
        client.evals.runs.retrieve(first.id, eval_id=judged)


def test_a_strangers_eval_and_its_runs_are_not_found(api: Api, stranger: str) -> None:
    judged = made(api)
    run = api.openai().evals.runs.create(judged, data_source=ANSWERED).id
    with api.http(stranger) as http:
        for path in (
            "",
            "/runs",
            f"/runs/{run}",
            f"/runs/{run}/output_items",
            f"/runs/{run}/output_items/outputitem_1",
        ):
            assert http.get(f"/v1/evals/{judged}{path}").status_code == 404
        assert http.post(f"/v1/evals/{judged}", json={"name": "x"}).status_code == 404
        assert http.post(f"/v1/evals/{judged}/runs", json={"data_source": ANSWERED}).status_code == 404
        assert http.post(f"/v1/evals/{judged}/runs/{run}/cancel").status_code == 404
        assert http.delete(f"/v1/evals/{judged}/runs/{run}").status_code == 404
        assert http.delete(f"/v1/evals/{judged}").status_code == 404
