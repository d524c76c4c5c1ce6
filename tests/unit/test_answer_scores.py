"""Plain measures of answers, and how those of a look reach clients and the result file."""

from __future__ import annotations

import pytest

from shared.contract.answer_scores import score
from shared.contract.events import Metrics, Validation
from shared.jobs.metrics_file import COLUMNS, metrics_csv
from worker.program.trainer_events import EventsSoFar, client_event

LOOK = Validation(time=0.0, step=2, valid_loss=0.5, valid_answers=4, valid_exact_match=0.75, valid_json_valid=1.0)


@pytest.mark.parametrize(
    ("measure", "answer", "reference", "value"),
    [
        ("exact_match", " 4\n", "4", 1.0),
        ("exact_match", "44", "4", 0.0),
        ("contains", "it is red.", "red", 1.0),
        ("json_valid", '{"a": 1}', "x", 1.0),
        ("json_valid", "NaN", "x", 0.0),
        ("json_valid", "[" * 100_000, "x", 0.0),
        ("numeric", "so 1,200", "1200.0", 1.0),
        ("numeric", "none", "3", 0.0),
        ("numeric", "3", "none", None),
    ],
)
def test_a_plain_measure_is_one_nought_or_nothing(
    measure: str, answer: str, reference: str, value: float | None
) -> None:
    assert score(measure, answer, reference) == value  # type: ignore[arg-type]  # names from the table above


def test_scores_of_a_look_are_in_its_event_in_the_progress_and_in_columns_behind_openais() -> None:
    step = Metrics(
        time=0.0,
        step=2,
        total_steps=4,
        epoch=0.5,
        train_loss=1.0,
        learning_rate=0.1,
        trained_tokens=9,
        seconds_per_step=1,
    )
    event, story = client_event(LOOK), EventsSoFar(lambda: 0.0)
    for told in (step, LOOK):
        story.hear(told)

    assert event is not None
    assert event.message == "Step 2: validation loss=0.5, exact_match=0.75, json_valid=1"
    progress = story.progress()
    assert progress is not None
    assert progress.valid_scores == {"exact_match": 0.75, "json_valid": 1.0}
    with_answers = metrics_csv([step.model_dump(), LOOK.model_dump()]).splitlines()
    assert with_answers == [",".join([*COLUMNS, "valid_exact_match", "valid_json_valid"]), "2,1.0,,0.5,,0.75,1.0"]
    assert metrics_csv([step.model_dump()]).splitlines()[0] == ",".join(COLUMNS)
