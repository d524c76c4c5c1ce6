"""The published contract: complete, self-consistent, and changed only on purpose.

After a change that is meant: `python -m tests.unit.test_openapi > tests/unit/openapi.json`, and read the difference.
"""

from __future__ import annotations

import json
import re
import sys
import tempfile
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import pytest
from openapi_spec_validator import OpenAPIV31SpecValidator

from api.app import create_app
from api.not_offered import NOT_OFFERED
from api.views import error_views, job_views
from shared.contract.job_request import CreateJob
from shared.settings import Settings

SNAPSHOT = Path(__file__).with_name("openapi.json")


@cache
def schema() -> dict[str, Any]:
    """As a client gets it. Building it opens no connection."""
    with tempfile.TemporaryDirectory() as home:
        settings = Settings(
            home=Path(home),
            database_url="postgresql+psycopg://nobody@127.0.0.1:1/nothing",
            redis_url="",
            storage_url="",
        )
        document: dict[str, Any] = create_app(settings).openapi()
        assert home not in json.dumps(document)
    return document


def written() -> str:
    return json.dumps(schema(), indent=1, sort_keys=True, ensure_ascii=False) + "\n"


def operations() -> list[tuple[str, dict[str, Any]]]:
    return [
        (f"{method.upper()} {path}", operation)
        for path, methods in schema()["paths"].items()
        for method, operation in methods.items()
    ]


def nodes(part: Any) -> Iterator[dict[str, Any]]:
    if isinstance(part, dict):
        yield part
    for child in part.values() if isinstance(part, dict) else part if isinstance(part, list) else ():
        yield from nodes(child)


def resolved(reference: str) -> Any:
    found: Any = schema()
    for name in reference.removeprefix("#/").split("/"):
        found = found[name]
    return found


def test_the_contract_is_the_one_that_was_agreed() -> None:
    assert written() == SNAPSHOT.read_text(encoding="utf-8"), __doc__


def test_the_page_of_openais_wire_names_every_route_and_every_field_of_a_job() -> None:
    page = (Path(__file__).parents[2] / "docs" / "api.md").read_text(encoding="utf-8")
    ours = [path for path in schema()["paths"] if path.startswith("/v1/") and not path.startswith("/v1/tunepool/")]

    assert len(ours) > 25
    for path in (*ours, *NOT_OFFERED):
        assert f"`{path}`" in page or f" {path}`" in page, path
    for field in CreateJob.model_fields:
        assert f"`{field}`" in page or f"`{field}." in page, field


def test_operations_have_openais_names_and_links_lead_from_what_is_made_to_what_can_be_done_with_it() -> None:
    names = {name: operation["operationId"] for name, operation in operations()}

    assert len(set(names.values())) == len(names)
    assert all(re.fullmatch("[a-z]+([A-Z][a-z]*)*", name) for name in names.values())
    assert names["POST /v1/files"] == "createFile"
    assert names["POST /v1/fine_tuning/jobs"] == "createFineTuningJob"
    assert names["GET /v1/fine_tuning/jobs"] == "listPaginatedFineTuningJobs"
    made = schema()["paths"]["/v1/fine_tuning/jobs"]["post"]["responses"]["200"]["links"]
    assert made["cancelFineTuningJob"]["parameters"] == {"job_id": "$response.body#/id"}
    for link in (link for node in nodes(schema()) for link in node.get("links", {}).values()):
        path, operation = next(
            (path, operation)
            for path, methods in schema()["paths"].items()
            for operation in methods.values()
            if operation["operationId"] == link["operationId"]
        )
        assert set(re.findall(r"{(\w+)}", path)) == set(link["parameters"]), operation["operationId"]


def test_the_document_is_valid_openapi() -> None:
    """By a validator that others wrote; generators of clients refuse what it refuses."""
    assert schema()["openapi"].startswith("3.1.")
    assert [error.message for error in OpenAPIV31SpecValidator(schema()).iter_errors()] == []

    broken = json.loads(json.dumps(schema()))
    media = broken["paths"]["/v1/models"]["get"]["responses"]["200"]["content"]["application/json"]
    media["itemSchema"] = media.pop("schema")  # of OpenAPI 3.2
    assert next(OpenAPIV31SpecValidator(broken).iter_errors(), None) is not None


def test_every_reference_leads_somewhere() -> None:
    references = [node["$ref"] for node in nodes(schema()) if isinstance(node.get("$ref"), str)]

    assert len(references) > 100
    for reference in references:
        assert resolved(reference)


@pytest.mark.parametrize(("route", "operation"), operations(), ids=[route for route, _ in operations()])
def test_every_route_tells_what_it_does_what_it_answers_and_how_it_fails(route: str, operation: dict[str, Any]) -> None:
    answers = operation["responses"]

    assert operation["description"].endswith(".")
    assert answers["200"]["content"]
    for media in answers["200"]["content"].values():
        assert media.get("schema") or media["itemSchema"]  # of a stream: each of its events
    for status in ("400", "401", "403", "404", "409", "413", "415", "422", "429", "500", "503"):
        (media,) = answers[status]["content"].values()
        assert media["schema"] == {"$ref": "#/components/schemas/ErrorEnvelope"}
    assert "HTTPValidationError" not in json.dumps(operation)


def test_only_probes_signed_links_id_tokens_and_public_keys_need_no_key() -> None:
    assert schema()["security"] == [{"ApiKey": []}]
    assert {route for route, operation in operations() if operation.get("security") == []} == {
        "GET /livez",
        "GET /readyz",
        "GET /v1/tunepool/objects/{token}",
        "GET /v1/tunepool/signing-keys",
        "POST /v1/tunepool/oidc/token",
    }


def test_the_body_of_a_job_is_described_field_by_field_with_bounds() -> None:
    body = dict(operations())["POST /v1/fine_tuning/jobs"]["requestBody"]["content"]["application/json"]

    described = resolved(body["schema"]["$ref"])
    assert described["required"] == ["model", "training_file"]
    assert described["properties"].keys() == CreateJob.model_fields.keys()
    assert described["additionalProperties"] is False
    rank = resolved("#/components/schemas/OpenAdapter")["properties"]["r"]
    assert {"minimum": 1, "maximum": 1024, "type": "integer"} in rank["anyOf"]


def test_the_examples_are_true() -> None:
    body = dict(operations())["POST /v1/fine_tuning/jobs"]["requestBody"]["content"]["application/json"]
    components = schema()["components"]["schemas"]

    CreateJob.model_validate(body["example"])
    for model in (error_views.ErrorEnvelope, job_views.FineTuningJob):
        for example in components[model.__name__]["examples"]:
            assert model.model_validate(example).model_dump(exclude_unset=True) == example


def test_an_upload_is_described_as_a_form_with_a_file() -> None:
    body = dict(operations())["POST /v1/files"]["requestBody"]["content"]["multipart/form-data"]["schema"]

    assert body["required"] == ["file", "purpose"]
    assert body["properties"]["file"] == {"type": "string", "format": "binary"}


def test_downloads_are_described_as_bytes() -> None:
    for route in ("GET /v1/files/{file_id}/content", "GET /v1/tunepool/objects/{token}"):
        content = dict(operations())[route]["responses"]["200"]["content"]
        assert content["application/octet-stream"]["schema"] == {"type": "string", "format": "binary"}


if __name__ == "__main__":
    sys.stdout.write(written())
