"""A host's cache of base models has a bound: the least recently used goes first, and never one in use."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable
from pathlib import Path

import pytest

from shared.contract.base_facts import ModelFacts
from shared.contract.spec import BaseModelRef
from shared.errors import Invalid
from shared.settings import Settings
from shared.settle.catalogue import SMOLLM2, CatalogueEntry, local_folder
from tests.lifecycle.stack import make_model
from tests.patience import patience
from worker import base_models
from worker.base_models import BaseModelUnavailable, ensure

MIB = 2**20
BESIDE = base_models._BESIDE_BYTES  # what every model is expected to take besides its parameters


def entry(name: str, *, parameters: int = MIB) -> CatalogueEntry:
    facts = ModelFacts.model_validate({**SMOLLM2.ref.facts.model_dump(), "parameters": parameters})
    ref = BaseModelRef(name=name, public_name=f"example/{name}", source="hub", revision="1" * 40, facts=facts)
    return CatalogueEntry(ref=ref, locator=f"example/{name}")


@pytest.fixture
def fetches(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What was fetched, in order: models of 2 MiB and a little."""
    names: list[str] = []

    def fetch(wanted: CatalogueEntry, scratch: Path, interrupt: Callable[[], None]) -> Path:
        names.append(wanted.ref.name)
        make_model(scratch / "model")
        (scratch / "model" / "tokenizer.model").write_bytes(bytes(2 * MIB))
        return scratch / "model"

    monkeypatch.setitem(base_models._FETCHERS, "hub", fetch)
    return names


def have(cache: Path, name: str, *, most: int | None = None, user: Path | None = None, parameters: int = MIB) -> Path:
    wanted = entry(name, parameters=parameters)
    return ensure(wanted, cache=cache, interrupt=lambda: None, most=most, user=user)


def used_at(folder: Path, second: int) -> None:
    os.utime(folder, (second, second))


# Room for one model, and what a second is expected to take.
ROOM = BESIDE + 5 * MIB


def test_the_least_recently_used_model_makes_room(tmp_path: Path, fetches: list[str]) -> None:
    folders = [have(tmp_path, name, most=ROOM) for name in ("llama-3.1", "llama-3.2")]
    used_at(folders[0], 1)
    used_at(folders[1], 2)
    have(tmp_path, "llama-3.1", most=ROOM)  # used again

    third = have(tmp_path, "llama-3.3", most=ROOM)

    assert [folder.is_dir() for folder in (*folders, third)] == [True, False, True]
    assert fetches == ["llama-3.1", "llama-3.2", "llama-3.3"]


def test_without_a_bound_nothing_is_removed(tmp_path: Path, fetches: list[str]) -> None:
    folders = [have(tmp_path, name) for name in "abc"]

    assert [folder.is_dir() for folder in folders] == [True] * 3
    assert fetches == ["a", "b", "c"]


def test_a_model_in_use_stays_and_the_next_one_waits_for_its_end(tmp_path: Path, fetches: list[str]) -> None:
    work = [tmp_path / "work" / name for name in "ab"]
    for folder in work:
        folder.mkdir(parents=True)
    for name, user in zip("ab", work, strict=True):
        have(tmp_path, name, most=ROOM, user=user)

    with pytest.raises(BaseModelUnavailable, match="in use"):
        have(tmp_path, "c", most=ROOM)
    work[1].rmdir()
    have(tmp_path, "c", most=ROOM)

    assert local_folder(entry("a"), cache=tmp_path).is_dir()
    assert not local_folder(entry("b"), cache=tmp_path).is_dir()
    assert fetches == ["a", "b", "c"]


def test_a_model_that_is_larger_than_all_the_room_is_refused_by_name(tmp_path: Path, fetches: list[str]) -> None:
    kept = have(tmp_path, "a", most=ROOM)

    with pytest.raises(Invalid, match="TUNEPOOL_CACHE_BYTES") as refused:
        have(tmp_path, "huge", most=ROOM, parameters=10**9)

    assert refused.value.code == "base_model_too_large"
    assert kept.is_dir()
    assert fetches == ["a"]


def test_a_part_that_nobody_fetches_makes_room_and_one_that_is_fetched_stays(
    tmp_path: Path, fetches: list[str]
) -> None:
    kept = have(tmp_path, "a")
    parts = [kept.with_name(f"{name}-{'1' * 12}.fetch") for name in ("left", "going")]
    for part in parts:
        part.mkdir()
        (part / "model.safetensors.incomplete").write_bytes(bytes(4 * MIB))
        used_at(part, 1)

    with base_models.locked(kept.with_name(f"going-{'1' * 12}.lock"), lambda: None):
        have(tmp_path, "b", most=ROOM + 4 * MIB)

    assert [part.is_dir() for part in parts] == [False, True]
    assert fetches == ["a", "b"]


def test_workers_of_one_host_may_share_one_cache(tmp_path: Path) -> None:
    first, second = (Settings(home=tmp_path / name, cache_dir=tmp_path / "models") for name in ("one", "two"))

    assert first.cache == second.cache == tmp_path / "models"
    assert Settings(home=tmp_path).cache == tmp_path / "cache"


def test_several_that_want_one_model_share_one_fetch(tmp_path: Path, fetches: list[str]) -> None:
    threads = [threading.Thread(target=have, args=(tmp_path, "a")) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(patience(30))

    assert fetches == ["a"]
