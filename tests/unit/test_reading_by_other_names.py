"""Files that are read again under the names of `training.columns`: such a check has its time by its size, too."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
from obstore.store import LocalStore

from shared.contract.job_request import CreateJob
from shared.jobs.claims import SETTLING
from shared.lease.values import FileRef, Lease
from shared.rows.check import check, read_report
from shared.settings import Settings
from shared.store.storage import Store
from tests.factories import make_claim
from worker.chores import checks
from worker.chores.run_program import LeaseWatch

ROWS = b"".join(json.dumps({"question": "a?", "completion": str(number)}).encode() + b"\n" for number in range(20))


@pytest.fixture
def host(tmp_path: Path) -> Any:
    store = Store(LocalStore(prefix=str(tmp_path / "store"), mkdir=True))
    store.put_bytes("rows", ROWS)
    return SimpleNamespace(store=store, settings=Settings(home=tmp_path))


def claim_of(*files: FileRef) -> Any:
    request = CreateJob.model_validate(
        {
            "model": "tiny",
            "training_file": "file-1",
            "tunepool": {"training": {"columns": {"prompt": "question"}}},
        }
    )
    claim = make_claim(Lease(kind=SETTLING.kind, id="ftjob-1", worker_id="worker_1", attempt=1, fence=1))
    return replace(claim, request=request, training_file=files[0], validation_file=files[1])


def a_table_of_a_byte() -> FileRef:
    """The rows that were made of a table are more bytes than it."""
    return FileRef(id="file-1", key="rows", bytes=1, sha256="", report=check([ROWS]).document())


def test_rows_are_read_under_the_names_of_the_job(host: Any) -> None:
    file = a_table_of_a_byte()
    watch = cast("LeaseWatch", SimpleNamespace(check=lambda: None))

    read = checks.read_as_asked(host, claim_of(file, file), watch)

    for report in (read.training_file.report, read.validation_file.report):
        assert read_report(report).rows == 20
        assert not read_report(report).problem_count


def test_reading_under_other_names_has_its_time_by_the_size_of_the_rows(
    host: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    sizes: list[int] = []

    def no_time(size: int) -> float:
        sizes.append(size)
        return -1.0

    monkeypatch.setattr(checks, "checking_seconds", no_time)
    file = a_table_of_a_byte()
    watch = cast("LeaseWatch", SimpleNamespace(check=lambda: None))

    read = checks.read_as_asked(host, claim_of(file, file), watch)

    assert sizes == [len(ROWS), len(ROWS)]
    for report in (read.training_file.report, read.validation_file.report):
        assert [problem.code for problem in read_report(report).problems] == ["too_slow"]
