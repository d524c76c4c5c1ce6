"""What a preflight says before it is answered: rows from all over a file, how far it is, and how people read it."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import pytest
from obstore.store import LocalStore
from rich.console import Console
from tunepool import preflights

from shared.contract.preflight_report import RowProgress
from shared.lease.values import FileRef
from shared.store.storage import Store
from worker.chores import sampling
from worker.chores.reading_progress import NOTE_SECONDS, ReadingProgress
from worker.chores.sampling import PIECE_BYTES, PIECES, SAMPLED_FROM_BYTES, stage_sample
from worker.program.workdir import Workdir


def nothing() -> None:
    return


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return Store(LocalStore(prefix=str(tmp_path / "store"), mkdir=True))


def stored(store: Store, content: bytes) -> FileRef:
    store.put_bytes("rows", content)
    return FileRef(id="file-1", key="rows", bytes=len(content), sha256="", report=None)


def row(number: int, *, width: int) -> bytes:
    turns = [{"role": "user", "content": "x" * width}, {"role": "assistant", "content": str(number)}]
    return json.dumps({"messages": turns}).encode() + b"\n"


def numbers(sample: Path) -> list[int]:
    return [int(json.loads(line)["messages"][1]["content"]) for line in sample.read_bytes().splitlines()]


def test_a_sample_has_whole_rows_from_all_over_a_large_file(store: Store, tmp_path: Path) -> None:
    content = b"\xef\xbb\xbf" + b"".join(row(number, width=3000) for number in range(5600))
    assert len(content) > SAMPLED_FROM_BYTES

    assert stage_sample(store, stored(store, content), tmp_path / "train.jsonl", interrupt=nothing)

    rows = numbers(tmp_path / "train.jsonl")
    assert rows == sorted(set(rows))
    assert rows[0] == 0
    assert len({number * PIECES // 5600 for number in rows}) == PIECES
    assert (tmp_path / "train.jsonl").stat().st_size < PIECES * PIECE_BYTES


def test_a_small_file_and_one_whose_rows_break_rules_have_no_sample(
    store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert not stage_sample(store, stored(store, row(1, width=10)), tmp_path / "small", interrupt=nothing)

    monkeypatch.setattr(sampling, "SAMPLED_FROM_BYTES", 1)
    assert not stage_sample(store, stored(store, b'{"messages": 3}\n'), tmp_path / "bad", interrupt=nothing)
    assert not stage_sample(store, stored(store, b"x" * 300_000), tmp_path / "one-line", interrupt=nothing)
    assert stage_sample(store, stored(store, row(1, width=10)), tmp_path / "good", interrupt=nothing)


class Watched:
    """A watch, its clock, and what was noted."""

    def __init__(self) -> None:
        self.now, self.noted = 0.0, list[RowProgress]()
        self.progress = ReadingProgress(self, self.noted.append, staged_bytes=200, rows=40, clock=lambda: self.now)

    def check(self) -> None:
        return

    def later(self) -> RowProgress:
        self.now += NOTE_SECONDS
        self.progress.check()
        return self.noted[-1]


def test_progress_is_what_lies_in_the_folder_and_never_more_than_there_is(tmp_path: Path) -> None:
    place, watched = Workdir(tmp_path), Watched()
    for folder in (place.data, place.out):
        folder.mkdir()
    watched.progress.check()
    assert watched.noted == []

    watched.progress.at(place)
    assert watched.later() == RowProgress(stage="staging", percent=0, rows_total=40)
    (place.data / "train.jsonl.upload").write_bytes(b"x" * 100)
    assert watched.later().percent == 25
    (place.data / "train.jsonl").write_bytes(b"x" * 50)
    assert watched.later().percent == 37
    (place.data / "train.jsonl.upload").unlink()
    (place.data / "train.jsonl").write_bytes(b"x" * 300)
    assert watched.later().percent == 99

    place.spec.touch()
    assert watched.later() == RowProgress(stage="reading", percent=0, rows_read=0, rows_total=40)
    for said, rows in (('{"rows": 10}', 10), ('{"rows": 9000000000}', 40), ('{"rows": -1}', 0), ("[" * 2000, 0)):
        (place.out / "progress.json").write_text(said)
        assert (watched.later().rows_read, watched.noted[-1].percent) == (rows, 100 * rows // 40)
    before = len(watched.noted)
    watched.later()
    assert len(watched.noted) == before


def sample(**figures: Any) -> dict[str, Any]:
    run = {"steps": 6250, "steps_per_epoch": 6250, "rows": 100_000, "tokens": 9_000_000}
    counts = {"truncated": 3, "left_out": 1, "refused": 0}
    lengths = {"mean_tokens": 90.4, "p95_tokens": 200.0, "longest_tokens": 900}
    rest = {"ok": True, "fault": None, "memory": None, "time": None, "devices": [], "run": run}
    return {"rows": 1000, "of_rows": 100_000, **counts, **lengths, **rest, **figures}


def heard(*records: dict[str, Any]) -> list[str]:
    out = io.StringIO()
    news = preflights.PreflightNotes(Console(file=out, width=200, highlight=False))
    for record in records:
        news(record)
    return out.getvalue().splitlines()


def test_the_command_says_each_tenth_of_the_way_and_a_sample_once() -> None:
    def reading(percent: int) -> dict[str, Any]:
        progress = {"stage": "reading", "percent": percent, "rows_read": percent * 1000, "rows_total": 100_000}
        return {"progress": progress, "sample": sample()}

    lines = heard({}, {"progress": None, "sample": None}, reading(1), reading(2), reading(31))

    assert lines == [
        "From 1,000 of 100,000 rows, the others are still being read: the job would train.",
        "about 6,250 steps and 9,000,000 tokens; a row has 90 tokens on average; 3 are cut, 1 left out",
        "reading: 1,000 of 100,000 rows, 1 %",
        "reading: 31,000 of 100,000 rows, 31 %",
    ]


def test_the_reason_of_a_refused_row_does_not_act_on_the_terminal() -> None:
    lines = heard({"progress": None, "sample": sample(ok=False, refused=2, fault="\x1b]0;PWNED\x07[bold]no[/bold]")})

    assert lines[0].endswith("the job would not train as it is.")
    assert "[bold]no[/bold]" in lines[1]
    assert all(letter.isprintable() for line in lines for letter in line)
