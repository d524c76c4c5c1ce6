"""Answers of a given form: whatever the model would rather say, what it says is JSON of the schema."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import jsonschema
import pytest

from shared.contract.generation import Question, Sampling
from shared.errors import Invalid
from tests.train.test_batched_answers import resident
from worker.train.answering import ModelRunner
from worker.train.joined_answers import JoinedAnswers
from worker.train.tokenizer import load_tokenizer_of

TICKET = {
    "type": "object",
    "properties": {
        "team": {"enum": ["billing", "shipping"]},
        "urgent": {"type": "boolean"},
        "parts": {"type": "array", "items": {"type": "integer", "minimum": 0, "maximum": 9}, "maxItems": 2},
    },
    "required": ["team", "urgent", "parts"],
    "additionalProperties": False,
}


def asked(number: int, schema: dict[str, Any], **sampling: Any) -> Question:
    settings = Sampling(**({"temperature": 1.0, "seed": number, "max_tokens": 400} | sampling))
    return Question(number=number, text="once ", answer_schema=schema, sampling=settings)


def speaker_of(folder: Path) -> ModelRunner:
    return ModelRunner(resident(folder), load_tokenizer_of(str(folder)), answer_tokens=400, context_tokens=512)


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_answers_beside_each_other_keep_each_to_its_own_schema(model: Path, temperature: float) -> None:
    speaker, answers = speaker_of(model), JoinedAnswers(together=True)
    schemas = [TICKET, {"type": "array", "items": {"enum": [1, "two", None]}, "minItems": 1, "maxItems": 3}]
    begun = [speaker.begin(asked(n, schemas[n % 2], temperature=temperature))[0] for n in range(6)]
    for answer in begun:
        answers.add(answer)
    while answers:
        list(answers.step(speaker))

    for number, answer in enumerate(begun):
        assert answer.reason == "stop"
        jsonschema.validate(json.loads(answer.text), schemas[number % 2])


def test_an_answer_that_is_cut_off_says_so(model: Path) -> None:
    speaker = speaker_of(model)
    answer, _ = speaker.begin(asked(1, TICKET, max_tokens=3))
    while answer.reason is None:
        list(answer.step(speaker.forward))

    assert answer.reason == "length"


@pytest.mark.parametrize(
    "schema", [{"type": "nonsense"}, {"$ref": "http://example.com/x"}, {"type": "string", "pattern": "(?=x)y"}]
)
def test_a_schema_that_cannot_be_kept_to_is_refused_by_name(model: Path, schema: dict[str, Any]) -> None:
    with pytest.raises(Invalid) as caught:
        speaker_of(model).begin(asked(1, schema))
    assert (caught.value.code, caught.value.param) == ("invalid_json_schema", "response_format")
