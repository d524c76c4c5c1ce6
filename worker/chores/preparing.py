"""Quantises base models that attempts did not find quantised, beside the trainings. Local: no row, no device.

A program behind the walls of all programs makes the files; it sees the base model and nothing of a tenant. This
process takes them from it, hashes them and gives them their place.
"""

from __future__ import annotations

import contextlib
import fcntl
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Final

import structlog

from shared.contract.events import EXIT_DONE
from shared.contract.prepared import MADE
from shared.errors import TunepoolError
from shared.lease.values import Lease
from worker import base_models
from worker.chores import run_program
from worker.chores.run_program import Stopped
from worker.host import prepared_bases
from worker.host.host import Host, children
from worker.host.prepared_bases import PreparedForm
from worker.program import hostile_folder, workdir
from worker.program.hostile_folder import Bounds
from worker.program.workdir import Workdir

log = structlog.get_logger()

PROGRAM: Final = "worker.train.prepare_base"
# bitsandbytes quantises 16 million values a second on a core: a base of 70 billion takes more than an hour.
SECONDS: Final = 4 * 3600.0
BOUNDS: Final = Bounds(files=1_000, depth=1)
# Of the host's disk that stays free.
ROOM: Final = 0.1


class _Draining:
    """The check of work without a lease."""

    def __init__(self, host: Host) -> None:
        self._host = host

    def check(self) -> None:
        """Raises Stopped."""
        if self._host.flags.draining:
            raise Stopped


def prepare_missed(host: Host) -> None:
    """Make every form that was missed here, unless another process of this home does.

    It may take an hour, so one who could do short work meanwhile must be left; else a later bell is for it.
    """
    if not prepared_bases.missed(host.settings.home):
        return
    if not host.flags.has_idle_child(children(len(host.devices))):
        return
    with _alone(prepared_bases.missed_folder(host.settings.home) / "making.lock") as ours:
        while ours and (forms := prepared_bases.missed(host.settings.home)):  # more may be missed meanwhile
            form = forms[0]
            try:
                _prepare(host, form)
            except Stopped:
                return
            except (TunepoolError, OSError) as error:
                _give_up(host, form, str(error))


@contextlib.contextmanager
def _alone(file: Path) -> Iterator[bool]:
    """Whether no other process of this home is inside."""
    with file.open("w") as handle:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            yield False
            return
        yield True


def _prepare(host: Host, form: PreparedForm) -> None:
    """Raises Stopped, TooSlow, Refused, BaseModelUnavailable, Invalid, OSError."""
    settings, watch = host.settings, _Draining(host)
    lease = Lease(kind="prepare", id=f"prepare-{form.key}", fence=1, worker_id=host.worker.id, attempt=1)
    folder = form.folder(settings.cache)
    try:
        place = workdir.make(host.work, lease)
        with base_models.locked(base_models.beside(folder, "lock"), watch.check):
            if not folder.is_dir():
                _make(host, form, place, lease, watch)
    finally:
        workdir.remove(host.work, lease)
    prepared_bases.settled(form, home=settings.home)


def _make(host: Host, form: PreparedForm, place: Workdir, lease: Lease, watch: _Draining) -> None:
    settings, model = host.settings, Path(form.spec.base_model_path)
    place.spec.write_text(form.spec.model_dump_json(), encoding="utf-8")
    workdir.hand_over(place, uid=host.trainer_uid)
    ended = run_program.run(
        host, PROGRAM, lease=lease, place=place, watch=watch, seconds=SECONDS, threads=1, reads=(model,)
    )
    if ended.code != EXIT_DONE:
        raise OSError(f"its program ended with {ended.code}: {ended.last_words[-300:]}")
    if prepared_bases.marks_of(model) != form.spec.marks:
        raise OSError("the base model was changed meanwhile")
    listed = hostile_folder.files(place.out, MADE, bounds=BOUNDS)
    size = sum(file.bytes for file in listed)
    disk = shutil.disk_usage(place.root)
    if disk.free - size < ROOM * disk.total:
        raise OSError("the disk is too full to keep it")
    prepared_bases.make_room(settings.cache, size, among=settings.cache_bytes, interrupt=watch.check)
    taken = [(file.name, _taken(place, file.name)) for file in listed]
    prepared_bases.publish(form, taken, cache=settings.cache)
    log.info("prepared_base.made", key=form.key, bytes=size)


def _taken(place: Workdir, name: str) -> Path:
    """A copy of our own: what the program has written it could go on writing, had it left somebody behind."""
    target = place.root / "taken" / name
    target.parent.mkdir(mode=0o700, exist_ok=True)
    with hostile_folder.opened(place.out, f"{MADE}/{name}") as source, target.open("wb") as sink:
        shutil.copyfileobj(source, sink, 1 << 20)
    return target


def _give_up(host: Host, form: PreparedForm, reason: str) -> None:
    log.warning("prepared_base.not_made", key=form.key, reason=reason[:300])
    prepared_bases.settled(form, home=host.settings.home, failure=reason[:1000])
