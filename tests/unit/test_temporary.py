from __future__ import annotations

import os
import tempfile
from pathlib import Path

import pytest

from worker.program import processes, temporary
from worker.program.processes import Tag

LONGEST_BELOW = "pymp-xxxxxxxx/listener-xxxxxxxx"


def tag(home: Path, *, fence: int = 1) -> Tag:
    return processes.own_tag(home=home, job_id="ftjob-1", fence=fence)


def test_temporary_files_lie_in_the_attempts_own_folder() -> None:
    out = Path("/var/lib/tunepool/work/ftjob-abcdefghijklmnopqrstuvwx/1/out")

    assert temporary.folder(out, tag(Path("/var/lib/tunepool"))) == out / "tmp"


@pytest.mark.parametrize("length", range(40, 140))
def test_a_socket_among_them_never_has_a_path_too_long(length: int) -> None:
    out = Path("/" + "h" * length)

    below = temporary.folder(out, tag(out)) / LONGEST_BELOW

    assert len(os.fsencode(below)) <= 107 or below.is_relative_to(tempfile.gettempdir())


def test_a_worker_removes_what_an_earlier_one_of_its_home_left_under_a_short_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    deep = Path("/" + "h" * 100)
    ours, another, neighbours = (
        temporary.folder(deep, tag(home, fence=fence)) for home, fence in ((deep, 1), (deep, 2), (tmp_path, 1))
    )
    for place in (ours, another, neighbours):
        temporary.make(place, uid=None)
        (place / "pymp-1").mkdir()

    temporary.sweep(deep)

    assert list(tmp_path.iterdir()) == [neighbours]
