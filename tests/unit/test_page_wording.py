"""Why a job waits, in the words of its page."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from api.ui import wording


def waiting(**place: Any) -> wording.JobHeadline:
    queue = SimpleNamespace(**{"position": 1, "blocked_by": None, "detail": "the next pull starts it", **place})
    job: Any = SimpleNamespace(status="queued", tunepool=SimpleNamespace(queue=queue))
    return wording.situation(job)


@pytest.mark.parametrize(
    ("place", "headline"),
    [
        ({}, "About to start"),
        ({"blocked_by": "NO_FREE_DEVICE"}, "Waiting: number 1 in the queue"),
        ({"position": None, "blocked_by": "HELD"}, "Waiting for a device"),
        ({"blocked_by": "BASE_MODEL_FETCHING"}, "Its base model is being fetched"),
    ],
)
def test_the_headline_says_what_a_waiting_job_waits_for(place: dict[str, Any], headline: str) -> None:
    assert waiting(**place).headline == headline


def test_the_plans_reason_is_a_sentence_of_its_own() -> None:
    assert waiting(blocked_by="NO_WORKER", detail="needs 4 hosts; 3 are registered").detail == (
        "Needs 4 hosts; 3 are registered."
    )
    assert wording.sentence("") == ""


def test_who_waits_for_a_base_model_is_told_that_there_is_nothing_to_do_and_how_far_it_is() -> None:
    detail = waiting(blocked_by="BASE_MODEL_FETCHING", detail="host-1 has 1 of 2 bytes").detail

    assert "starts by itself" in detail
    assert detail.endswith("host-1 has 1 of 2 bytes.")
