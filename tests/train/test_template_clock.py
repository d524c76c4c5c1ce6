"""A template that writes the date: a job's rows are the same on every day, a question has the present."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta, tzinfo
from pathlib import Path
from typing import Any, Final

import pytest
from pydantic import ValidationError
from transformers.utils import chat_template_utils

from shared.contract.events import EXIT_DONE
from shared.contract.generation import Question
from shared.contract.spec import AttemptSpec, DataFacts, Training
from shared.errors import Invalid
from tests.train.interrupted import interrupt
from tests.train.template_families import family_tokenizer
from tests.train.tiny import CHATML, chat, losses, make_spec, make_tokenizer, read_events, run
from worker.train import rendering
from worker.train.answering import Prompts
from worker.train.data import KeptRow, RowReader

DATED: Final = "{{ 'Today: ' ~ strftime_now('%d %b %Y') ~ '\\n' }}" + CHATML
# To the microsecond: no two renderings would be alike.
CLOCK: Final = DATED.replace("%d %b %Y", "%H:%M:%S.%f")
ROW: Final = chat("What day is it?", "One of many.")
FINE: Final = "2026-11-30T23:59:58"


class Calendar:
    """What libraries take for `datetime`: the clock goes as ever, so many days ahead."""

    days = 0

    @classmethod
    def now(cls, tz: tzinfo | None = None) -> datetime:
        return datetime.now(tz) + timedelta(days=cls.days)

    fromisoformat = datetime.fromisoformat


@pytest.fixture
def calendar(monkeypatch: pytest.MonkeyPatch) -> type[Calendar]:
    """Clocks of the templates and of us that a test can set."""
    monkeypatch.setattr(Calendar, "days", 0)
    for module in (chat_template_utils, rendering):
        monkeypatch.setattr(module, "datetime", Calendar)
    return Calendar


def read(tokenizer: Any, row: dict[str, Any] = ROW, *, kind: str = "chat", **training: Any) -> KeptRow:
    facts = DataFacts.model_validate({"format": kind, "train_rows": 1})
    (taken,) = RowReader(tokenizer, facts=facts, training=Training.model_validate(training)).take([row])
    assert not isinstance(taken, Invalid), taken.message
    return taken


def text(tokenizer: Any, ids: Any) -> str:
    return str(tokenizer.decode(list(ids)))


@pytest.mark.parametrize(
    ("name", "written"), [("llama3_2", "Today Date: 30 Nov 2026"), ("gpt_oss", "Current date: 2026-11-30")]
)
def test_templates_of_families_write_the_day_of_the_job(name: str, written: str) -> None:
    tokenizer = family_tokenizer(name)
    row: Any = read(tokenizer, template_time=FINE).whole

    assert written in text(tokenizer, row.text_ids)


def test_rows_are_the_same_on_another_day_and_a_question_has_the_present(calendar: type[Calendar]) -> None:
    tokenizer = make_tokenizer(DATED)
    rows: list[str] = []
    asked: list[str] = []
    for calendar.days in (0, 400):
        row: Any = read(tokenizer, template_time=FINE).whole
        rows.append(text(tokenizer, row.text_ids))
        prompts = Prompts(tokenizer, ends=[tokenizer.eos_token_id])
        asked.append(text(tokenizer, prompts.tokens(Question(number=1, messages=ROW["messages"][:1]))))

    assert rows[0] == rows[1]
    assert rows[0].startswith("Today: 30 Nov 2026\n")
    years = [int(words.split("\n")[0].rpartition(" ")[2]) for words in asked]
    assert years[1] - years[0] in {1, 2}, "serving writes the present"


def test_a_job_that_names_no_time_writes_one_for_all_its_rows(calendar: type[Calendar]) -> None:
    tokenizer = make_tokenizer(DATED)
    reader = RowReader(tokenizer, facts=DataFacts(format="chat", train_rows=2), training=Training())
    first: list[Any] = []
    later: list[Any] = []
    for calendar.days, rows in ((0, first), (400, later)):
        rows.extend(reader.take([ROW]))

    assert first[0].whole.ids.tolist() == later[0].whole.ids.tolist()


@pytest.mark.parametrize("kind", ["chat", "preference"])
def test_a_template_may_write_the_time_as_finely_as_it_likes(kind: str) -> None:
    tokenizer = make_tokenizer(CLOCK)
    question, answer = ROW["messages"]
    pair = {"messages": [question], "chosen": answer, "rejected": {**answer, "content": "None."}}

    row: Any = read(tokenizer, ROW if kind == "chat" else pair, kind=kind).whole

    if kind == "chat":
        assert text(tokenizer, row.ids[row.labelled]) == "One of many.<|im_end|>"
    else:
        assert [text(tokenizer, ids) for ids in row.answers] == ["One of many.<|im_end|>", "None.<|im_end|>"]


def test_a_run_that_goes_on_on_another_day_has_the_curve_of_one_that_was_not_stopped(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, calendar: type[Calendar]
) -> None:
    training = {"chat_template": DATED, "train_on": "all", "packing": False}

    def spec(folder: str) -> Path:
        """As a worker writes it, which knows when the job was created."""
        file = make_spec(tmp_path / folder, model=model, training=training)
        attempt = AttemptSpec.model_validate_json(file.read_bytes())
        dated = attempt.model_copy(update={"job": attempt.job.dated(datetime(2026, 11, 30, 23, 59, tzinfo=UTC))})
        file.write_text(dated.model_dump_json(), encoding="utf-8")
        return file

    assert run(spec("whole"), tmp_path / "whole/out")[0] == EXIT_DONE
    interrupt(spec("broken"), tmp_path / "broken/out", after=2, monkeypatch=monkeypatch)
    calendar.days = 400
    assert run(tmp_path / "broken/spec.json", tmp_path / "broken/out")[0] == EXIT_DONE

    curves = [losses(read_events(tmp_path / folder / "out")) for folder in ("whole", "broken")]
    assert curves[0] == curves[1]
    run(make_spec(tmp_path / "undated", model=model, training=training), tmp_path / "undated/out")
    assert losses(read_events(tmp_path / "undated/out")) != curves[0], "the day is read, or nothing is shown here"


@pytest.mark.parametrize("written", ["2026-12-01", "2026-12-01T09:30", FINE])
def test_a_job_may_name_a_day_or_a_moment(written: str) -> None:
    asked = Training.model_validate({"template_time": written}).template_time

    assert rendering.read_time(asked) == datetime.fromisoformat(written)


@pytest.mark.parametrize("written", ["1 December", "2026-02-30", "2026-12-01 09:30", "2026-12-01T25:00", "2026-12-01Z"])
def test_what_is_no_moment_is_refused(written: str) -> None:
    with pytest.raises(ValidationError):
        Training.model_validate({"template_time": written})
