"""/v1/fine_tuning/alpha/graders: OpenAI's graders, checked and tried on one answer."""

from __future__ import annotations

import time

from fastapi import APIRouter

from api.body import RawBody, body_of, parse
from api.deps import JobsWriter
from shared.contract.graders import Grading, RunGrader, ValidateGrader
from shared.rows import grading

router = APIRouter(prefix="/v1/fine_tuning/alpha/graders", tags=["graders"])

# An answer and a row are data: they may hold tabs, line breaks and whatever a model wrote.
_DATA = ("model_sample", "item", "grader")


@router.post("/validate", response_model=ValidateGrader, openapi_extra=body_of(ValidateGrader))
def validate_grader(_: JobsWriter, body: RawBody) -> ValidateGrader:
    """The grader as it is understood; a 400 names the field that cannot be."""
    wanted = parse(body, ValidateGrader, data=_DATA)
    grading.check(wanted.grader)
    return wanted


@router.post("/run", response_model=Grading, openapi_extra=body_of(RunGrader))
def run_grader(_: JobsWriter, body: RawBody) -> Grading:
    """The reward of one answer. A grader that fails while it runs answers 200, with reward 0 and its error's flag."""
    wanted = parse(body, RunGrader, data=_DATA)
    began = time.perf_counter()
    graded = grading.run(wanted.grader, sample=wanted.model_sample, item=wanted.item)
    metadata = graded.metadata.model_copy(update={"execution_time": time.perf_counter() - began})
    return graded.model_copy(update={"metadata": metadata})
