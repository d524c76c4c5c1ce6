"""The demo asks in several processes: all rows come back in their order, and a failure is told (examples/asking.py)."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

from examples import asking
from examples.asking import Asking
from examples.stack import StackFailed


def printing(*documents: object, code: int = 0, words: str = "") -> list[str]:
    """A command that prints lines of JSON, says `words` on its standard error, and ends with `code`."""
    lines = "".join(json.dumps(document) + "\n" for document in documents)
    program = f"import sys; sys.stdout.write({lines!r}); sys.stderr.write({words!r}); sys.exit({code})"
    return [sys.executable, "-c", program]


def test_rows_of_all_parts_come_in_the_order_of_the_file() -> None:
    parts = [printing({"share": 0.5}, {"rows": [{"message": name} for name in names]}) for names in ("ace", "bd")]

    with Asking(parts, threads=1) as models:
        rows = models.rows(lambda _: None)

    assert "".join(row["message"] for row in rows) == "abcde"


def test_the_share_told_is_that_of_all_parts(tmp_path: Path) -> None:
    heard = tmp_path / "heard"
    waits = (
        "import os, time; print('{\"share\": 0.5}', flush=True)\n"
        f"while not os.path.exists({str(heard)!r}): time.sleep(0.01)\n"
        "print('{\"rows\": []}')"
    )

    def say(words: str) -> None:
        if words == "38%":  # of 50 and 25
            heard.touch()

    with Asking([[sys.executable, "-c", waits], printing({"share": 0.25}, {"rows": []})], threads=1) as models:
        assert models.rows(say) == []


def test_a_part_that_fails_ends_the_others_and_its_last_words_are_told() -> None:
    endless = [sys.executable, "-c", "import time; time.sleep(600)"]

    with (
        pytest.raises(StackFailed, match="no such adapter"),
        Asking([endless, printing(code=3, words="no such adapter")], threads=1) as models,
    ):
        models.rows(lambda _: None)

    assert [part.running for part in models.parts] == [False, False]


@pytest.mark.parametrize(("cores", "parts", "threads"), [(1, 1, 1), (2, 2, 1), (16, 2, 8)])
def test_the_cores_are_shared_out(monkeypatch: pytest.MonkeyPatch, cores: int, parts: int, threads: int) -> None:
    started: list[tuple[list[str], int]] = []
    monkeypatch.setattr(asking.os, "sched_getaffinity", lambda _: set(range(cores)))
    monkeypatch.setattr(asking, "Asking", lambda commands, threads: started.append((commands, threads)))

    asking.asking(Path("base"), adapter=Path("adapter"), held_out=Path("rows"))

    ((commands, each),) = started
    assert [command[-1] for command in commands] == [f"{part}/{parts}" for part in range(parts)]
    assert each == threads
