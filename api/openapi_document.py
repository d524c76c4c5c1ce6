"""The OpenAPI document: what FastAPI writes of our routes, with the bodies that we parse ourselves, and the API key."""

from __future__ import annotations

from typing import Any

from fastapi import FastAPI

from api import (
    alias_bodies,
    oidc_bodies,
    operations,
    pool_bodies,
    schedule_bodies,
    secret_bodies,
    upload_bodies,
    webhook_bodies,
)
from api.views import completion_views, job_views
from shared.contract.completions import CreateChatCompletion, CreateCompletion
from shared.contract.evals import CreateEval, CreateEvalRun, UpdateEval
from shared.contract.graders import RunGrader, ValidateGrader
from shared.contract.job_request import CreateJob, CreatePreflight


def describe(app: FastAPI) -> None:
    """Add the bodies that we parse ourselves, and the bearer key, to the OpenAPI document."""
    plain = app.openapi

    def complete() -> dict[str, Any]:
        if app.openapi_schema is None:
            schema = plain()
            components = schema["components"]
            parsed = (CreateJob, CreatePreflight, ValidateGrader, RunGrader, CreateChatCompletion, CreateCompletion)
            for body in (
                *parsed,
                *(CreateEval, UpdateEval, CreateEvalRun),
                *pool_bodies.BODIES,
                *alias_bodies.BODIES,
                *upload_bodies.BODIES,
                *webhook_bodies.BODIES,
                *oidc_bodies.BODIES,
                *secret_bodies.BODIES,
                *schedule_bodies.BODIES,
            ):
                reference = body.model_json_schema(ref_template="#/components/schemas/{model}")
                components["schemas"] |= {**reference.pop("$defs", {}), body.__name__: reference}
            # FastAPI drops every null of an example, and these nulls are fields that are always there.
            components["schemas"]["FineTuningJob"]["examples"] = [job_views.JOB_EXAMPLE]
            components["securitySchemes"] = {"ApiKey": {"type": "http", "scheme": "bearer"}}
            schema["security"] = [{"ApiKey": []}]
            open_paths = ("/v1/tunepool/objects/{token}", "/v1/tunepool/oidc/token", "/v1/tunepool/signing-keys")
            for path in ("/livez", "/readyz", *open_paths):
                for operation in schema["paths"][path].values():
                    operation["security"] = []
            _describe_chunks(schema)
            _correct_streams(schema)
            operations.add_links(schema)
            app.openapi_schema = schema
        return app.openapi_schema

    app.openapi = complete  # type: ignore[method-assign]  # FastAPI's documented way to extend the schema


def _describe_chunks(schema: dict[str, Any]) -> None:
    """Say of routes that stream on request what their events hold."""
    chunk = completion_views.ChatCompletionChunk
    reference = chunk.model_json_schema(ref_template="#/components/schemas/{model}")
    schema["components"]["schemas"] |= {**reference.pop("$defs", {}), chunk.__name__: reference}
    for operation in (operation for path in schema["paths"].values() for operation in path.values()):
        event = operation.pop("x-stream-of", None)
        if event is not None:
            operation["responses"]["200"]["content"]["text/event-stream"] = {"itemSchema": event}


def _correct_streams(schema: dict[str, Any]) -> None:
    """Describe a stream's errors as JSON: they come instead of the stream. FastAPI describes them as streams.

    `itemSchema` is OpenAPI 3.2's; the document is 3.1, whose readers know `schema` only.
    """
    for operation in (operation for path in schema["paths"].values() for operation in path.values()):
        for answer in operation["responses"].values():
            stream = answer.get("content", {}).get("text/event-stream", {})
            if "schema" in stream:
                answer["content"] = {"application/json": stream}
            elif "itemSchema" in stream:
                stream["schema"] = stream.pop("itemSchema")
