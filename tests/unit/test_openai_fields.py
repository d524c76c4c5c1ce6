"""Every field and query that the installed `openai` package can send is known here: obeyed, or refused by its name.

What is unknown would be told as an unknown parameter, which looks like a typing error.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any, Final

import pytest
from openai.types import (
    eval_create_params,
    eval_list_params,
    eval_update_params,
    file_create_params,
    file_list_params,
    upload_complete_params,
    upload_create_params,
)
from openai.types.chat import (
    ChatCompletionAssistantMessageParam,
    ChatCompletionDeveloperMessageParam,
    ChatCompletionStreamOptionsParam,
    ChatCompletionSystemMessageParam,
    ChatCompletionToolMessageParam,
    ChatCompletionUserMessageParam,
)
from openai.types.evals import run_create_params, run_list_params
from openai.types.evals.runs import output_item_list_params
from openai.types.fine_tuning import (
    DpoHyperparametersParam,
    DpoMethodParam,
    SupervisedHyperparametersParam,
    SupervisedMethodParam,
    job_create_params,
    job_list_events_params,
    job_list_params,
)
from openai.types.fine_tuning.alpha import grader_run_params, grader_validate_params
from openai.types.fine_tuning.checkpoints import permission_create_params, permission_list_params
from openai.types.fine_tuning.jobs import checkpoint_list_params
from openai.types.shared_params import FunctionDefinition
from openai.types.shared_params.response_format_json_schema import JSONSchema
from openai.types.uploads import part_create_params
from pydantic import BaseModel

from shared.contract import completions
from shared.contract.completions import CreateChatCompletion, CreateCompletion

ROOT: Final = Path(__file__).parents[2]
DOCUMENT: Final[dict[str, Any]] = json.loads((ROOT / "tests/unit/openapi.json").read_text(encoding="utf-8"))
JOBS: Final = "/v1/fine_tuning/jobs"
PERMISSIONS: Final = "/v1/fine_tuning/checkpoints/{checkpoint}/permissions"
RUNS: Final = "/v1/evals/{eval_id}/runs"


def of_query(path: str) -> set[str]:
    return {parameter["name"] for parameter in DOCUMENT["paths"][path]["get"].get("parameters", ())}


def of_body(path: str) -> set[str]:
    """Names of a body's fields; `a[b]` of a form is the field `a`."""
    (content,) = DOCUMENT["paths"][path]["post"]["requestBody"]["content"].values()
    schema = content["schema"]
    while "$ref" in schema:
        schema = DOCUMENT["components"]["schemas"][schema["$ref"].rpartition("/")[2]]
    return {name.partition("[")[0] for name in schema["properties"]}


@pytest.mark.parametrize(
    ("path", "theirs"),
    [
        ("/v1/files", file_create_params.FileCreateParams),
        ("/v1/uploads", upload_create_params.UploadCreateParams),
        ("/v1/uploads/{upload_id}/parts", part_create_params.PartCreateParams),
        ("/v1/uploads/{upload_id}/complete", upload_complete_params.UploadCompleteParams),
        (JOBS, job_create_params.JobCreateParams),
        (PERMISSIONS, permission_create_params.PermissionCreateParams),
        ("/v1/fine_tuning/alpha/graders/run", grader_run_params.GraderRunParams),
        ("/v1/fine_tuning/alpha/graders/validate", grader_validate_params.GraderValidateParams),
        ("/v1/evals", eval_create_params.EvalCreateParams),
        ("/v1/evals/{eval_id}", eval_update_params.EvalUpdateParams),
        (RUNS, run_create_params.RunCreateParams),
    ],
)
def test_every_field_of_a_body_is_known(path: str, theirs: Any) -> None:
    fields = set(theirs.__annotations__)

    assert fields
    assert fields - of_body(path) == set()


@pytest.mark.parametrize(
    ("path", "theirs"),
    [
        ("/v1/files", file_list_params.FileListParams),
        (JOBS, job_list_params.JobListParams),
        (f"{JOBS}/{{job_id}}/events", job_list_events_params.JobListEventsParams),
        (f"{JOBS}/{{job_id}}/checkpoints", checkpoint_list_params.CheckpointListParams),
        (PERMISSIONS, permission_list_params.PermissionListParams),
        ("/v1/evals", eval_list_params.EvalListParams),
        (RUNS, run_list_params.RunListParams),
        (f"{RUNS}/{{run_id}}/output_items", output_item_list_params.OutputItemListParams),
    ],
)
def test_every_query_of_a_list_is_known(path: str, theirs: Any) -> None:
    queries = set(theirs.__annotations__) - set(re.findall(r"\{(\w+)\}", path))

    assert queries
    assert queries - of_query(path) == set()


@pytest.mark.parametrize(
    ("theirs", "ours"),
    [
        (ChatCompletionUserMessageParam, completions.ChatTurn),
        (ChatCompletionSystemMessageParam, completions.ChatTurn),
        (ChatCompletionDeveloperMessageParam, completions.ChatTurn),
        (ChatCompletionAssistantMessageParam, completions.ChatTurn),
        (ChatCompletionToolMessageParam, completions.ChatTurn),
        (ChatCompletionStreamOptionsParam, completions.StreamOptions),
        (FunctionDefinition, completions.OfferedFunction),
        (JSONSchema, completions.AnswerSchema),
    ],
)
def test_every_field_within_a_question_is_known(theirs: Any, ours: type[BaseModel]) -> None:
    assert set(theirs.__annotations__) - {field.alias or name for name, field in ours.model_fields.items()} == set()


@pytest.mark.parametrize(
    ("name", "theirs"),
    [
        ("supervised", SupervisedMethodParam),
        ("dpo", DpoMethodParam),
        ("supervised.hyperparameters", SupervisedHyperparametersParam),
        ("dpo.hyperparameters", DpoHyperparametersParam),
    ],
)
def test_every_field_of_a_method_stands_in_the_document(name: str, theirs: Any) -> None:
    text = json.dumps(DOCUMENT["components"]["schemas"])

    assert [field for field in theirs.__annotations__ if f'"{field}"' not in text] == [], name


@pytest.mark.parametrize("body", [CreateChatCompletion, CreateCompletion])
def test_the_page_on_serving_says_of_every_field_what_becomes_of_it(body: type[BaseModel]) -> None:
    page = (ROOT / "docs/serving.md").read_text(encoding="utf-8")
    table = page[page.index("## Requests") : page.index("## Hosts and walls")]

    assert [name for name in body.model_fields if not re.search(rf"`{name}\b", table)] == []
