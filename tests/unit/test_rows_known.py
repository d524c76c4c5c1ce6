"""Rows that were read and found good are not read again before the queue, unless anything has changed since."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest

from shared.contract.spec import JobSpec
from shared.errors import Invalid
from shared.lease.values import Claim
from shared.settings import Settings
from shared.settle.catalogue import local_folder
from tests.factories import make_spec
from worker.chores import row_reading, rows_known

FILE = SimpleNamespace(id="file-1", sha256="a" * 64)
LEASE = SimpleNamespace(id="ftjob-1")


@dataclass(frozen=True)
class Asked:
    """As much of a claim as this looks at."""

    project_id: str = "proj_a"
    training_file: Any = field(default_factory=lambda: FILE)  # it has no hash, as a plain default must
    validation_file: Any = None
    lease: Any = field(default_factory=lambda: LEASE)


@pytest.fixture
def host(tmp_path: Path) -> Any:
    settings = Settings(home=tmp_path / "home")
    entry: Any = SimpleNamespace(ref=make_spec().base_model, locator="")
    model = local_folder(entry, cache=settings.cache)
    model.mkdir(parents=True)
    (model / "tokenizer.json").write_text("{}")
    catalogue = SimpleNamespace(entry=lambda _name: entry, entries={entry.ref.name: entry})
    return SimpleNamespace(settings=settings, worker=SimpleNamespace(version="1.0"), catalogue=lambda: catalogue)


def mark(host: Any, claim: Any = None, spec: JobSpec | None = None) -> str:
    entry, asked = host.catalogue().entry(""), cast("Claim", claim or Asked())
    return rows_known.mark_of(host, asked, spec or make_spec(), entry).name


def test_what_a_refusal_does_not_rest_on_is_the_same_mark(host: Any) -> None:
    assert mark(host, spec=make_spec(learning_rate=0.5, max_steps=3)) == mark(host)
    assert mark(host, spec=make_spec().model_copy(update={"seed": 99})) == mark(host)


def test_what_it_rests_on_is_another_mark(host: Any) -> None:
    other = SimpleNamespace(id="file-2", sha256="b" * 64)
    marks = [
        mark(host),
        mark(host, spec=make_spec(max_length=77)),
        mark(host, spec=make_spec(train_on="all")),
        mark(host, Asked(project_id="proj_b")),
        mark(host, replace(Asked(), training_file=other)),
        mark(host, replace(Asked(), validation_file=other)),
    ]
    host.worker.version = "2.0"
    marks.append(mark(host))
    (local_folder(host.catalogue().entry(""), cache=host.settings.cache) / "tokenizer.json").write_text('{"a": 1}')
    marks.append(mark(host))

    assert len(set(marks)) == len(marks)


def tokens(*, kept: int) -> Any:
    return SimpleNamespace(training=SimpleNamespace(fault_count=0, kept_tokens=kept, rows=3), validation=None)


def test_good_rows_are_read_once_and_bad_ones_each_time(host: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    read: list[int] = []

    def report(kept: int) -> Any:
        def reading(*_: Any) -> Any:
            read.append(kept)
            return SimpleNamespace(report=lambda _spec: tokens(kept=kept))

        return reading

    claim: Any = Asked()
    monkeypatch.setattr(row_reading, "_bring_base", lambda *_: None)  # it is there
    monkeypatch.setattr(row_reading, "RowReading", report(0))
    for _ in range(2):
        with pytest.raises(Invalid, match="no row has a token"):
            row_reading.refuse_bad_rows(host, claim, make_spec(), SimpleNamespace())  # type: ignore[arg-type]
    monkeypatch.setattr(row_reading, "RowReading", report(5))
    for _ in range(2):
        row_reading.refuse_bad_rows(host, claim, make_spec(), SimpleNamespace())  # type: ignore[arg-type]

    assert read == [0, 0, 5]


def test_of_too_many_marks_the_oldest_go(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rows_known, "MOST", 4)
    for number in range(5):
        rows_known.remember(tmp_path / "marks" / str(number))

    left = {place.name for place in (tmp_path / "marks").iterdir()}
    assert len(left) == 2
    assert "4" in left
