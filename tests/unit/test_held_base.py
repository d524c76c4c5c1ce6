"""A spare holds the base of its device's last job where that is prepared, fits, and nobody else may write it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from shared.contract.spec import JobSpec
from shared.errors import NotFound
from shared.operating.isolation import Isolation
from shared.settings import Settings
from shared.settle.catalogue import local_folder
from tests.factories import make_spec
from worker.attempt import held_base
from worker.host import prepared_bases
from worker.program.launcher import NO_WALLS
from worker.program.workdir import Workdir

GIB = 2**30
DEVICE: Any = SimpleNamespace(kind="cpu", total_bytes=8 * GIB)
RULES = Isolation(files="rules")


def qlora() -> JobSpec:
    told = make_spec().model_dump()
    return JobSpec.model_validate({**told, "adapter": {**told["adapter"], "method": "qlora"}})


@pytest.fixture
def host(tmp_path: Path) -> Any:
    settings = Settings(home=tmp_path / "home")
    ref = qlora().base_model
    entry = SimpleNamespace(ref=ref, locator="")
    made: Any = SimpleNamespace(
        settings=settings,
        trainer_uid=None,
        worker=SimpleNamespace(version="1.0"),
        isolation=RULES,
        catalogue=lambda: SimpleNamespace(entry=lambda _name: entry),
    )
    model = local_folder(entry, cache=settings.cache)  # type: ignore[arg-type]  # a stand-in
    model.mkdir(parents=True)
    (model / "model.safetensors").write_bytes(b"weights")
    form = held_base.form_for(made, qlora(), model=model, device=DEVICE)
    assert form is not None
    (tmp_path / "four").write_bytes(b"four bits")
    prepared_bases.publish(form, [("model.safetensors", tmp_path / "four")], cache=settings.cache)
    return made


def test_the_last_base_is_held_and_its_files_stay_while_the_spare_is_there(host: Any, tmp_path: Path) -> None:
    found = held_base.find(host, qlora(), device=DEVICE)
    folder = Workdir(tmp_path / "spare")
    folder.root.mkdir()

    assert found is not None
    assert found.bytes >= len(b"four bits")
    held = found.held_by(folder)

    assert held is not None
    assert Path(held.prepared_path).name == f"prepared-{found.form.key}"
    with pytest.raises(OSError, match="no room"):
        prepared_bases.make_room(host.settings.cache, 500_000, among=10**6, interrupt=lambda: None)
    folder.root.rmdir()
    prepared_bases.make_room(host.settings.cache, 500_000, among=10**6, interrupt=lambda: None)
    assert not Path(held.prepared_path).exists()


def test_a_form_that_was_spoilt_is_not_held(host: Any, tmp_path: Path) -> None:
    found = held_base.find(host, qlora(), device=DEVICE)
    assert found is not None
    (found.form.folder(host.settings.cache) / "model.safetensors").write_bytes(b"fourbits!")

    assert found.held_by(Workdir(tmp_path)) is None
    assert held_base.find(host, qlora(), device=DEVICE) is None


def no_walls(host: Any) -> None:
    host.isolation = NO_WALLS


def trainer_of_the_operators_own(host: Any) -> None:
    host.settings = host.settings.model_copy(update={"trainer": "ours.trainer"})


def base_gone_from_the_catalogue(host: Any) -> None:
    def gone(_name: str) -> None:
        raise NotFound("no such model")

    host.catalogue = lambda: SimpleNamespace(entry=gone)


def another_revision_by_now(host: Any) -> None:
    ref = qlora().base_model.model_copy(update={"revision": "e" * 40})
    host.catalogue = lambda: SimpleNamespace(entry=lambda _name: SimpleNamespace(ref=ref, locator=""))


@pytest.mark.parametrize(
    "change", [no_walls, trainer_of_the_operators_own, base_gone_from_the_catalogue, another_revision_by_now]
)
def test_nothing_is_held_that_could_be_anothers_or_old(change: Callable[[Any], None], host: Any) -> None:
    change(host)

    assert held_base.find(host, qlora(), device=DEVICE) is None


def test_one_user_for_all_trainers_is_no_wall_and_one_for_each_is(host: Any) -> None:
    host.trainer_uid = 1234
    host.isolation = Isolation(user="shared", files="open")
    assert held_base.find(host, qlora(), device=DEVICE) is None

    host.isolation = Isolation(user="slot", files="user")
    assert held_base.find(host, qlora(), device=DEVICE) is not None


def test_a_base_that_is_half_of_its_device_is_not_held(host: Any) -> None:
    small: Any = SimpleNamespace(kind="cpu", total_bytes=20)

    assert held_base.find(host, qlora(), device=small) is None
