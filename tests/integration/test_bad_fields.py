"""Every field that a job may have, read from the schema: one added tomorrow is tested without being named."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any, NamedTuple

import httpx2
import pytest

from shared.contract.job_request import CreateJob
from shared.store.db import session_scope
from tests.factories import make_file
from tests.integration.conftest import Api
from tests.integration.test_bad_requests import at, jobs_there_are, merged, post, refused

SCHEMA = CreateJob.model_json_schema()


class Field(NamedTuple):
    """A place in the body, and the schemas that its value may follow."""

    path: str
    options: list[dict[str, Any]]


def options(node: dict[str, Any]) -> list[dict[str, Any]]:
    if "$ref" in node:
        return options(SCHEMA["$defs"][node["$ref"].rsplit("/", 1)[1]])
    members = [*node.get("anyOf", ()), *node.get("oneOf", ())]
    return [option for member in members for option in options(member)] or [node]


def fields(node: dict[str, Any], path: str = "") -> Iterator[Field]:
    """Every field below `node`, those of nested objects too."""
    for option in options(node):
        for name, child in option.get("properties", {}).items():
            where = f"{path}.{name}".lstrip(".")
            yield Field(where, options(child))
            yield from fields(child, where)


FIELDS = list(fields(SCHEMA))


def bad_values(field: Field) -> Iterator[Any]:
    """Values of every type that the field does not take, and those just outside its bounds."""
    kinds = {option.get("type") for option in field.options}
    samples: dict[str, Any] = {
        "string": "no such value",
        "boolean": True,
        "integer": 1,
        "number": 0.5,
        "array": [[]],
        "object": {"no such key": {}},
        "null": None,
    }
    free_text = any(
        option.get("type") == "string" and not {"const", "enum"} & option.keys() for option in field.options
    )
    for kind, sample in samples.items():
        if kind == "string" and free_text:
            continue
        if kind == "integer" and kinds & {"integer", "number"}:
            continue
        if kind in kinds and kind in {"boolean", "null", "number"}:
            continue
        yield sample
    for option in field.options:
        yield from outside(option)


def outside(option: dict[str, Any]) -> Iterator[Any]:
    step = 1 if option.get("type") == "integer" else 0.001
    if "minimum" in option:
        yield option["minimum"] - step
    if "maximum" in option:
        yield option["maximum"] + step
    if "exclusiveMinimum" in option:
        yield option["exclusiveMinimum"]
    if "exclusiveMaximum" in option:
        yield option["exclusiveMaximum"]
    if option.get("type") == "integer":
        yield from (1.5, 10**30, -(10**30))
    if "minLength" in option:
        yield "x" * (option["minLength"] - 1)
    if "maxLength" in option:
        yield "x" * (option["maxLength"] + 1)
    if "pattern" in option:
        yield from ("", "a b", "x;y", "x\n", "ä")


@pytest.fixture(scope="module")
def training_file(api: Api) -> str:
    with session_scope(api.engine) as session:
        return make_file(session, api.caller).id


@pytest.fixture(scope="module")
def http(api: Api) -> Iterator[httpx2.Client]:
    with api.http() as client:
        yield client


def body_with(path: str, value: Any, *, training_file: str) -> dict[str, Any]:
    body: dict[str, Any] = {"model": "smollm2-135m-instruct", "training_file": training_file}
    if path.startswith("method."):
        body = merged(body, {"method": {"type": "dpo" if ".dpo" in path else "supervised"}})
    if path.startswith("tunepool.objective."):
        body = merged(body, {"tunepool": {"objective": {"type": "dpo"}}})
    if path.startswith("integrations."):
        name = path.removeprefix("integrations.")
        wandb = {"type": "wandb", "wandb": {"project": "p"}}
        return {**body, "integrations": [merged(wandb, at(name, value))]}
    return merged(body, at(path, value))


def test_the_schema_is_walked_to_its_leaves() -> None:
    paths = {field.path for field in FIELDS}

    assert len(FIELDS) > 90
    assert paths >= {
        "seed",
        "method.dpo.hyperparameters.beta",
        "tunepool.training.eval.max_rows",
        "tunepool.queue.supersede",
        "tunepool.objective.beta",
    }


@pytest.mark.parametrize("field", FIELDS, ids=[field.path for field in FIELDS])
def test_a_value_of_another_type_or_out_of_bounds_is_refused_by_name(
    api: Api, http: httpx2.Client, training_file: str, field: Field
) -> None:
    before = jobs_there_are(api)
    tried = list(bad_values(field))

    for value in tried:
        error = refused(api, post(http, json.dumps(body_with(field.path, value, training_file=training_file))))
        place = (error["param"] or "").replace("integrations.0", "integrations")
        # A fault of an element or a key is named more precisely than its field.
        assert place == field.path or place.startswith(f"{field.path}."), (value, error)
        assert error["type"] == "invalid_request_error"
        assert "pydantic" not in error["message"]
        assert "Input should" not in error["message"]

    assert len(tried) >= 4
    assert jobs_there_are(api) == before


@pytest.mark.parametrize("hostile", ["NaN", "Infinity", "-Infinity", "1e999", '"a\\u0000b"', '"\\udc00"', "9" * 5000])
@pytest.mark.parametrize("field", FIELDS, ids=[field.path for field in FIELDS])
def test_no_field_takes_what_is_no_json_value(
    api: Api, http: httpx2.Client, training_file: str, field: Field, hostile: str
) -> None:
    body = json.dumps(body_with(field.path, "<here>", training_file=training_file)).replace('"<here>"', hostile)

    refused(api, post(http, body))


@pytest.mark.parametrize(
    ("path", "value", "sentence"),
    [
        ("method.supervised.hyperparameters.n_epochs", 0, 'must be an integer from 1 to 50, or "auto", not 0.'),
        ("tunepool.adapter.r", "16", 'must be an integer from 1 to 1024, or "auto", not "16".'),
        ("tunepool.adapter.lora_dropout", 1.0, 'must be a number at least 0 and below 1, or "auto", not 1.'),
        ("tunepool.training.eval", 5, 'must be an object, or "auto", not 5.'),
        ("metadata", {"k" * 65: "v"}, "each key must be a string of 1 to 64 characters."),
        ("method.type", "reinforcement", "Reinforcement fine-tuning is not offered."),
    ],
)
def test_a_refusal_says_all_that_the_field_accepts(
    api: Api, http: httpx2.Client, training_file: str, *, path: str, value: Any, sentence: str
) -> None:
    error = refused(api, post(http, json.dumps(body_with(path, value, training_file=training_file))))

    assert error["message"].endswith(sentence)


@pytest.mark.parametrize(
    ("body", "sentence"),
    [
        ({"messages": []}, "'messages': must be a list of 1 to 10000 entries, not []."),
        ({"messages": [{"role": "user", "content": "a"}], "stop": ["a"] * 5}, "a list of at most 4 entries, or null"),
    ],
)
def test_a_list_of_too_few_or_too_many_entries_hears_its_bounds(
    http: httpx2.Client, *, body: dict[str, Any], sentence: str
) -> None:
    answer = http.post("/v1/chat/completions", json={"model": "tiny", **body})

    assert answer.status_code == 400
    assert sentence in answer.json()["error"]["message"]


def test_a_bad_element_of_a_list_is_named_by_its_place(api: Api, http: httpx2.Client, training_file: str) -> None:
    body = body_with("tunepool.adapter.target_modules", ["q_proj", "(a+)+$"], training_file=training_file)

    assert refused(api, post(http, json.dumps(body)))["param"] == "tunepool.adapter.target_modules.1"


def test_a_misspelt_name_is_answered_with_the_nearest_right_one(
    api: Api, http: httpx2.Client, training_file: str
) -> None:
    body = body_with("tunepool.training.learning_rat", 1, training_file=training_file)

    assert "Did you mean 'learning_rate'?" in refused(api, post(http, json.dumps(body)))["message"]


def test_a_huge_name_or_value_is_not_sent_back_whole(api: Api, http: httpx2.Client, training_file: str) -> None:
    for body in ({"k" * 900_000: 1}, {"seed": "v" * 900_000}, {"metadata": {"k" * 900_000: "v"}}):
        answer = post(http, json.dumps({"model": "m", "training_file": training_file, **body}))

        refused(api, answer)
        assert len(answer.content) < 2000


def test_an_answer_holds_no_character_that_turns_or_steers_a_terminal(
    api: Api, http: httpx2.Client, training_file: str
) -> None:
    answer = post(http, json.dumps({"model": "m", "training_file": training_file, "seed": "a\u202eb\x1b[31m\u2028c"}))

    assert refused(api, answer)["message"].isprintable()
