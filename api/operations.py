"""What generated clients are made of: names of operations, as in OpenAI's own document, and links between them."""

from __future__ import annotations

import re
from typing import Any, Final

from fastapi.routing import APIRoute

JsonObject = dict[str, Any]

# Our function -> OpenAI's `operationId`, where that is another than the function's name without underscores.
_OPENAI: Final = {
    "upload_file": "createFile",
    "file_content": "downloadFile",
    "create_job": "createFineTuningJob",
    "list_jobs": "listPaginatedFineTuningJobs",
    "retrieve_job": "retrieveFineTuningJob",
    "cancel_job": "cancelFineTuningJob",
    "pause_job": "pauseFineTuningJob",
    "resume_job": "resumeFineTuningJob",
    "list_events": "listFineTuningEvents",
    "list_checkpoints": "listFineTuningJobCheckpoints",
    "create_permissions": "createFineTuningCheckpointPermission",
    "list_permissions": "listFineTuningCheckpointPermissions",
    "delete_permission": "deleteFineTuningCheckpointPermission",
    "retrieve_eval": "getEval",
    "list_eval_runs": "getEvalRuns",
    "retrieve_eval_run": "getEvalRun",
    "cancel_eval_run": "cancelEvalRun",
    "cancel_run": "cancelEvalRunByPath",
    "list_output_items": "getEvalRunOutputItems",
    "retrieve_output_item": "getEvalRunOutputItem",
}
_PARAMETER: Final = re.compile(r"\{(\w+)\}")


def operation_id(route: APIRoute) -> str:
    """The name of a route's operation: OpenAI's where it has the route, else the function's in the same way."""
    if route.name in _OPENAI:
        return _OPENAI[route.name]
    first, *others = route.name.split("_")
    return first + "".join(word.capitalize() for word in others)


def add_links(schema: JsonObject) -> None:
    """Say of what makes a thing by POST where its `id` leads: to the operations on one such thing."""
    paths: JsonObject = schema["paths"]
    for path, methods in paths.items():
        made = methods.get("post", {}).get("responses", {})
        answer = next((made[status] for status in ("200", "201") if status in made), None)
        if answer is None or "id" not in _properties(schema, answer):
            continue
        links = {
            operation["operationId"]: {"operationId": operation["operationId"], "parameters": parameters}
            for below, operations in paths.items()
            if (parameters := _leading(path, below)) is not None
            for operation in operations.values()
        }
        if links:
            answer["links"] = links


def _leading(path: str, below: str) -> dict[str, str] | None:
    """The parameters of `below`, a path about one thing of `path`; None for any other."""
    known, rest = _PARAMETER.findall(path), below.removeprefix(f"{path}/")
    new = _PARAMETER.findall(rest)
    if rest == below or len(new) != 1 or not rest.startswith(f"{{{new[0]}}}"):
        return None
    return {**{name: f"$request.path.{name}" for name in known}, new[0]: "$response.body#/id"}


def _properties(schema: JsonObject, answer: JsonObject) -> JsonObject:
    body = answer.get("content", {}).get("application/json", {}).get("schema", {})
    if "$ref" in body:
        body = schema["components"]["schemas"][body["$ref"].rpartition("/")[2]]
    properties: JsonObject = body.get("properties", {})
    return properties
