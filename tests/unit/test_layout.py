"""Object keys: ids alone, a fence in everything an attempt writes, nothing of a user's words."""

from __future__ import annotations

import pytest

from shared.errors import Invalid
from shared.ids import new_id
from shared.store import layout

PROJECT, JOB, FILE = new_id("proj_"), new_id("ftjob-"), new_id("file-")


def test_everything_of_a_project_lies_below_its_id() -> None:
    keys = [
        layout.file_key(PROJECT, FILE),
        layout.adapter_prefix(PROJECT, JOB, 3),
        layout.checkpoint_prefix(PROJECT, JOB, 3, 40),
        layout.result_key(PROJECT, JOB, 3),
    ]

    assert all(key.startswith(f"{PROJECT}/") for key in keys)


def test_two_fences_never_share_a_key() -> None:
    first, second = layout.attempt_prefix(PROJECT, JOB, 1), layout.attempt_prefix(PROJECT, JOB, 10)

    assert not first.startswith(second)
    assert not second.startswith(first)
    assert layout.adapter_prefix(PROJECT, JOB, 1).startswith(f"{first}/")
    assert layout.checkpoint_prefix(PROJECT, JOB, 1, 5) != layout.checkpoint_prefix(PROJECT, JOB, 10, 5)


@pytest.mark.parametrize(
    "text", ["", "..", "../../etc", "file-a/b", "file-a\x00", "train.jsonl", "file-", "file-ä", "a#b"]
)
def test_what_is_no_id_never_becomes_a_key(text: str) -> None:
    for build in (
        lambda: layout.file_key(text, FILE),
        lambda: layout.file_key(PROJECT, text),
        lambda: layout.attempt_prefix(PROJECT, text, 1),
    ):
        with pytest.raises(Invalid):
            build()
