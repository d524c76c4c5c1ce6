"""A program that was started ahead takes its work, or is proven dead and the reason is told."""

from __future__ import annotations

import errno
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Final
from unittest import mock

import pytest

from shared.contract.handover import Handover
from shared.contract.prepared import HeldBase
from shared.operating.isolation import Isolation
from shared.settings import trainer_environment
from tests import held_trainer, living
from tests.patience import patience
from worker.host.seating import SPARE_BYTES, may_start, may_stay
from worker.program import processes, spare
from worker.program.launcher import NO_WALLS
from worker.program.processes import DEVICES_TAG, TAG, Tag
from worker.program.spare import NotTaken, Spare, within_walls

GIB = 2**30
RULES: Final = Isolation(files="rules")  # Landlock
GONE = 2**22 + 1  # above every pid


def go_on() -> None:
    """Nobody interrupts."""


@contextmanager
def started(module: str, folder: Path, **environment: str) -> Iterator[Spare]:
    spare_ = spare.start(
        module,
        place=folder / "work",
        home=folder,
        environment=lambda tag, _out: trainer_environment(**{TAG: str(tag), DEVICES_TAG: "host:cpu"}, **environment),
        uid=None,
        isolation=NO_WALLS,
    )
    try:
        yield spare_
    finally:
        spare_.remove()


@pytest.fixture
def begun(tmp_path: Path) -> Iterator[Spare]:
    """The fake trainer, started ahead."""
    with started("tests.fake_trainer", tmp_path) as ahead:
        yield ahead


@pytest.fixture
def gate(tmp_path: Path) -> Path:
    """Once this file is there, what `loading` loads is loaded."""
    return tmp_path / "gate"


@pytest.fixture
def loading(tmp_path: Path, gate: Path) -> Iterator[Spare]:
    """One that goes on loading until the test opens the gate."""
    with started("tests.held_trainer", tmp_path, **{held_trainer.GATE: str(gate)}) as ahead:
        yield ahead


def work(of: Spare, behaviour: str = "steps=2") -> Handover:
    """A job of the fake trainer in the spare's folder."""
    rows = of.folder.data / "train.jsonl"
    rows.write_text(json.dumps({"text": f"fake: {behaviour}"}))
    of.folder.spec.write_text(json.dumps({"train_file": str(rows), "micro_batch_size": 1}))
    return Handover(spec=str(of.folder.spec), out=str(of.folder.out))


def wait_for(holds: Callable[[], bool]) -> None:
    deadline = time.monotonic() + patience(30)
    while not holds():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def test_a_spare_is_the_trainer_of_its_attempt_and_its_line_is_closed(begun: Spare) -> None:
    # It hears no request to end, so only the last signal ends it, whenever that comes.
    trainer = begun.hand_over(work(begun, "steps=100000 step_seconds=0.1 ignore_term"), interrupt=go_on)

    assert trainer.pid == begun.pid
    wait_for((begun.folder.out / "events.jsonl").exists)
    assert not [target for target in living.open_files(trainer.pid) if target.startswith("socket:")]
    begun.end()
    assert trainer.poll() is None, "it is the attempt's by now"
    assert trainer.end(grace_seconds=0).code == -signal.SIGKILL


def test_a_spare_that_still_loads_is_waited_for(loading: Spare, gate: Path) -> None:
    assert not loading.ready

    trainer = loading.hand_over(work(loading), interrupt=gate.touch)  # asked while it is waited for
    wait_for(lambda: trainer.poll() is not None)

    assert trainer.end(grace_seconds=0).code == 0
    assert (loading.folder.out / "adapter").is_dir()


def test_an_order_ends_the_wait_for_a_spare(loading: Spare) -> None:
    with pytest.raises(InterruptedError):
        loading.hand_over(work(loading), interrupt=refuse)

    loading.end()
    assert not Path(f"/proc/{loading.pid}").exists()


def refuse() -> None:
    raise InterruptedError


def test_a_spare_that_has_died_takes_no_work(begun: Spare) -> None:
    wait_for(lambda: begun.ready)
    os.kill(begun.pid, signal.SIGKILL)

    with pytest.raises(NotTaken, match=r"ended with exit code -9|cannot be reached"):
        begun.hand_over(work(begun), interrupt=go_on)


def test_a_spare_that_does_not_answer_takes_no_work_and_is_proven_dead(
    begun: Spare, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(spare, "TAKE_SECONDS", 0.2)
    wait_for(lambda: begun.ready)
    os.kill(begun.pid, signal.SIGSTOP)

    with pytest.raises(NotTaken, match="does not answer"):
        begun.hand_over(work(begun), interrupt=go_on)

    begun.end()
    assert not Path(f"/proc/{begun.pid}").exists()


def test_a_spare_that_never_gets_ready_takes_no_work(loading: Spare, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(spare, "LOAD_SECONDS", 0.2)

    with pytest.raises(NotTaken, match="has been loading"):
        loading.hand_over(work(loading), interrupt=go_on)


def test_a_spare_that_is_older_than_what_is_installed_takes_no_work(
    begun: Spare, monkeypatch: pytest.MonkeyPatch
) -> None:
    wait_for(lambda: begun.ready)
    assert begun.fault() is None
    monkeypatch.setattr(spare, "installed", lambda: "a newer one")

    with pytest.raises(NotTaken, match="have changed"):
        begun.hand_over(work(begun), interrupt=go_on)


def test_a_spare_that_nobody_wants_any_more_ends_by_itself(begun: Spare) -> None:
    wait_for(lambda: begun.ready)

    begun._line.close()

    wait_for(lambda: begun.fault() is not None)
    assert begun.fault() == "it has ended with exit code 0"


def test_nothing_of_a_spare_is_left_on_the_disk(begun: Spare) -> None:
    begun.remove()

    assert not begun.folder.root.exists()


def test_a_spare_without_a_supervisor_is_swept_and_a_neighbours_is_not(tmp_path: Path) -> None:
    mine = processes.own_tag(home=tmp_path, job_id=spare.SPARE, fence=1)
    orphan = Tag(home=str(tmp_path), job_id=spare.SPARE, fence=1, supervisor_pid=GONE, supervisor_started=1.0)
    elsewhere = Tag(home="/elsewhere", job_id=spare.SPARE, fence=1, supervisor_pid=GONE, supervisor_started=1.0)
    sleepers = {str(tag): sleeper(tag) for tag in (mine, orphan, elsewhere)}
    try:
        assert processes.kill_orphans(home=tmp_path) == [sleepers[str(orphan)].pid]
    finally:
        for process in sleepers.values():
            process.kill()
            process.wait()


def test_a_spare_on_a_device_that_another_attempt_has_leased_is_killed(begun: Spare) -> None:
    home = Path(begun.tag.home)
    other = processes.own_tag(home=home, job_id="ftjob-2", fence=1)

    assert processes.kill_squatters(("host:cpu",), mine=begun.tag) == []
    assert processes.kill_squatters(("host:cpu",), mine=other) == [begun.pid]


@pytest.fixture
def base(tmp_path: Path) -> tuple[Path, Path]:
    """Folders of a base model and of its prepared form."""
    model, prepared = tmp_path / "model", tmp_path / "prepared-key"
    for folder in (model, prepared):
        folder.mkdir()
        (folder / "config.json").write_text(folder.name)
    return model, prepared


def test_where_rules_keep_files_a_spare_gets_a_base_that_it_does_not_hold_in_its_own_folder(
    begun: Spare, base: tuple[Path, Path]
) -> None:
    model, prepared = base

    assert within_walls(begun, model, NO_WALLS, prepared=prepared) == base
    read = within_walls(begun, model, RULES, prepared=prepared)

    assert read == (begun.folder.base, begun.folder.prepared / prepared.name)
    for place, source in zip((begun.folder.base, begun.folder.prepared / prepared.name), base, strict=True):
        assert (place / "config.json").samefile(source / "config.json")
    assert begun.serves


def test_a_spare_reads_the_base_that_it_holds_where_it_lies(begun: Spare, base: tuple[Path, Path]) -> None:
    model, prepared = base
    begun.held = HeldBase(base_model_path=str(model), prepared_path=str(prepared), dtype="float32")

    assert within_walls(begun, model, RULES, prepared=prepared) == base
    assert not begun.folder.base.exists()


def test_a_spare_that_can_read_no_base_is_ended_and_the_work_starts_cold(
    begun: Spare, base: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    model, prepared = base
    monkeypatch.setattr(os, "link", mock.Mock(side_effect=OSError(errno.EXDEV, "another file system")))

    assert within_walls(begun, model, RULES, prepared=prepared) == base
    assert not begun.serves
    assert not living.is_alive(begun.pid)


def sleeper(tag: Tag) -> subprocess.Popen[bytes]:
    environment = trainer_environment(**{TAG: str(tag)})
    return subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"], env=environment)


def test_a_host_has_a_spare_only_while_much_of_its_memory_is_free() -> None:
    assert may_start(total=16 * GIB, available=SPARE_BYTES + 4 * GIB)
    assert not may_start(total=16 * GIB, available=SPARE_BYTES + 4 * GIB - 1)
    assert may_start(total=16 * GIB, available=SPARE_BYTES + 7 * GIB, held=3 * GIB)
    assert not may_start(total=16 * GIB, available=SPARE_BYTES + 7 * GIB - 1, held=3 * GIB)
    assert may_stay(total=16 * GIB, available=int(1.6 * GIB) + 1)
    assert not may_stay(total=16 * GIB, available=int(1.6 * GIB) - 1)
