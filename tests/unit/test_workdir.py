"""Nothing is named before the store has it."""

from __future__ import annotations

from pathlib import Path
from typing import Any, BinaryIO

from obstore.store import MemoryStore

from shared.lease.values import Lease
from shared.store.storage import Store, StoredObject
from worker.program import workdir


class ForgetfulStore(Store):
    """Says that it took an object, and does not have it the first time, and half of it the second."""

    def __init__(self) -> None:
        super().__init__(MemoryStore())
        self.taken = 0

    def put_open(self, key: str, source: BinaryIO, **options: Any) -> StoredObject:
        stored = super().put_open(key, source, **options)
        self.taken += 1
        if self.taken == 1:
            self.delete([key])
        if self.taken == 2:
            self.put_bytes(key, b"who")
        return stored


def test_an_object_that_the_store_lost_is_uploaded_again(tmp_path: Path) -> None:
    store = ForgetfulStore()

    workdir.publish_text(store, "key", "whole text", scratch=tmp_path / "scratch", interrupt=lambda: None)

    assert store.taken == 3
    assert b"".join(store.chunks("key")) == b"whole text"


def test_a_folder_is_made_without_those_of_earlier_fences_and_beside_those_of_later_ones(tmp_path: Path) -> None:
    late, now, next_one = (
        Lease(kind="job", id="ftjob-1", fence=fence, worker_id="w", attempt=fence) for fence in (2, 10, 11)
    )
    workdir.make(tmp_path, late)
    workdir.make(tmp_path, now)
    assert not (tmp_path / "ftjob-1" / "2").exists()

    workdir.make(tmp_path, late)
    workdir.remove(tmp_path, late)

    assert (tmp_path / "ftjob-1" / "10").is_dir()
    workdir.make(tmp_path, next_one)
    assert not (tmp_path / "ftjob-1" / "10").exists()
