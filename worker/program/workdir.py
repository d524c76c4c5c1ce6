"""Moves files between the store and an attempt's folder. Every byte is under a checksum. No database.

work/{job}/{fence}/spec.json  data/*.jsonl  trainer.log  out/{events.jsonl,stop,checkpoints/,adapter/}
work/spare/{device}/{pid}-{number}/   the same, of a program that was started ahead and of the attempt that gets it
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, BinaryIO, Final

import stamina

from shared.contract.documents import Manifest, ManifestEntry
from shared.contract.events import CheckpointSaved
from shared.errors import NotFound, TunepoolError, Unavailable
from shared.lease.values import Claim, FileRef, Lease
from shared.products.adapters import StoredFile
from shared.rows.check import read_report
from shared.rows.convert import checked_lines
from shared.store import layout
from shared.store.storage import Store, StoredObject
from worker.program import hostile_folder

Interrupt = Callable[[], None]
# Rough weather at a store lasts minutes; a device held idle for longer is better given back (attempt counted).
PATIENCE_SECONDS: Final = 600.0


class DataChanged(TunepoolError):
    """A file's bytes are not those that were accepted."""

    code = "file_changed"


@dataclass(frozen=True, slots=True)
class Workdir:
    """The folders of one attempt on this host."""

    root: Path

    @property
    def spec(self) -> Path:
        return self.root / "spec.json"

    @property
    def data(self) -> Path:
        return self.root / "data"

    @property
    def out(self) -> Path:
        return self.root / "out"

    @property
    def base(self) -> Path:
        """Further names of the base model's files, where a program may read nothing outside of this folder."""
        return self.root / "base"

    @property
    def prepared(self) -> Path:
        """The same of its prepared form."""
        return self.root / "prepared"

    @property
    def held(self) -> Path:
        """Names the base model that a program which is started ahead is to hold."""
        return self.root / "held.json"

    @property
    def events(self) -> Path:
        return self.out / "events.jsonl"

    @property
    def log(self) -> Path:
        return self.root / "trainer.log"


def make(work: Path, lease: Lease) -> Workdir:
    """A fresh folder for an attempt; whatever an earlier fence left of this job on this host goes away.

    A later fence's folder stays: this holder may be the late one.
    """
    remove_earlier(work, lease)
    return _made(work / lease.id / str(lease.fence))


def make_ahead(root: Path, *, uid: int | None) -> Workdir:
    """A fresh folder for an attempt that is not known yet, for the trainers' user."""
    made = _made(root)
    hand_over(made, uid=uid)
    return made


def remove_earlier(work: Path, lease: Lease) -> None:
    """Remove what this fence and earlier ones left of this job on this host."""
    for left in (work / lease.id).glob("[0-9]*"):
        if int(left.name) <= lease.fence:
            hostile_folder.remove(left)


def _made(root: Path) -> Workdir:
    made = Workdir(root)
    made.root.mkdir(parents=True, mode=0o700)
    for folder in (made.data, made.out, made.out / "checkpoints"):
        folder.mkdir()
    return made


def remove(work: Path, lease: Lease) -> None:
    """Remove an attempt's folder and no other: by now a later fence of the same job may train beside it."""
    hostile_folder.remove(work / lease.id / str(lease.fence))
    with contextlib.suppress(OSError):  # a later fence is there, or the folder has gone already
        (work / lease.id).rmdir()


def hand_over(workdir: Workdir, *, uid: int | None) -> None:
    """Let the trainers' user read the folder, and write `out` alone: nothing beside it can be put in its place."""
    if uid is None:
        return
    for path in (workdir.root, *workdir.root.rglob("*")):
        if {workdir.base, workdir.prepared} & set(path.parents):  # of the cache, whose files they are
            continue
        written = path == workdir.out or workdir.out in path.parents
        os.chown(path, uid if written else -1, uid, follow_symlinks=False)
        path.chmod((0o700 if written else 0o750) if path.is_dir() else (0o600 if written else 0o640))


def stage_rows(
    store: Store, file: FileRef, target: Path, *, columns: Mapping[Any, str] | None, interrupt: Interrupt
) -> Path:
    """Bring a data file here as canonical JSONL; `columns`: `training.columns` of the job.

    Raises:
        DataChanged: the store has other bytes than those that were checked.
        Unavailable: the store stays away for longer than we wait.
    """
    upload = stage_upload(store, file, target.with_name(f"{target.name}.upload"), interrupt=interrupt)
    cells = file.report is not None and read_report(file.report).cells
    with target.open("wb") as sink:
        sink.writelines(checked_lines(_chunks(upload, interrupt), columns=columns, cells=cells))
    upload.unlink()
    return target


def stage_upload(store: Store, file: FileRef, target: Path, *, interrupt: Interrupt) -> Path:
    """Bring a data file here as it was uploaded. Raises as `stage_rows` does."""
    _patiently(partial(_fetch, store, file, target, interrupt))
    if _sha256(target) != file.sha256:
        raise DataChanged(
            f"File '{file.id}' has changed since it was uploaded; upload it again.", param="training_file"
        )
    return target


def _fetch(store: Store, file: FileRef, target: Path, interrupt: Interrupt) -> None:
    interrupt()
    with target.open("wb") as sink:
        for chunk in store.chunks(file.key):
            interrupt()
            sink.write(chunk)


def _chunks(file: Path, interrupt: Interrupt) -> Iterator[bytes]:
    with file.open("rb") as stream:
        while chunk := stream.read(1 << 20):
            interrupt()
            yield chunk


def stage_checkpoint(store: Store, manifest: Manifest, checkpoints: Path, *, interrupt: Interrupt) -> bool:
    """Bring the newest checkpoint here, complete or not at all. False: its bytes are not what was published."""
    assert manifest.name is not None, "a checkpoint's manifest names its folder"
    name = hostile_folder.checked(manifest.name)
    unfinished = checkpoints / f"{name}.staging"
    for file in manifest.files:
        target = unfinished / hostile_folder.checked(file.name)
        target.parent.mkdir(parents=True, exist_ok=True)
        _patiently(partial(_download, store, manifest.key(file), target, interrupt))
        if _sha256(target) != file.sha256:
            shutil.rmtree(unfinished)
            return False
    unfinished.rename(checkpoints / name)
    return True


def _download(store: Store, key: str, target: Path, interrupt: Interrupt) -> None:
    interrupt()
    store.get_file(key, target)


def publish_checkpoint(
    store: Store, claim: Claim, out: Path, saved: CheckpointSaved, *, interrupt: Interrupt
) -> Manifest:
    """Upload a complete checkpoint; returns its manifest.

    Raises Unavailable, Refused, FileNotFoundError (pruned meanwhile).
    """
    lease = claim.lease
    prefix = layout.checkpoint_prefix(claim.project_id, lease.id, lease.fence, saved.step)
    files = _upload(store, out, f"checkpoints/{saved.name}", prefix, interrupt)
    return Manifest(prefix=prefix, step=saved.step, name=saved.name, files=files)


def publish_adapter(store: Store, claim: Claim, folder: Path, *, interrupt: Interrupt) -> Manifest:
    """Upload the adapter; returns its manifest. Nothing refers to it before the manifest is committed."""
    lease = claim.lease
    prefix = layout.adapter_prefix(claim.project_id, lease.id, lease.fence)
    return publish_folder(store, folder, prefix, interrupt=interrupt)


def publish_folder(store: Store, folder: Path, prefix: str, *, interrupt: Interrupt) -> Manifest:
    """Upload a folder of a program's `out` below `prefix`; returns its manifest. Raises Unavailable, Refused."""
    try:
        return Manifest(prefix=prefix, files=_upload(store, folder.parent, folder.name, prefix, interrupt))
    except FileNotFoundError as error:
        raise hostile_folder.Refused(f"'{folder.name}' of a program's output is not there, or not whole.") from error


def stage_files(store: Store, files: Iterable[StoredFile], folder: Path, *, interrupt: Interrupt) -> None:
    """Bring published files here. Raises DataChanged, Unavailable, NotFound."""
    for file in files:
        target = folder / hostile_folder.checked(file.name)
        target.parent.mkdir(parents=True, exist_ok=True)
        interrupt()
        _patiently(partial(store.get_file, file.key, target))
        if _sha256(target) != file.sha256:
            raise DataChanged(f"The stored {file.name} of this adapter is not what was published.", param="adapter")


def publish_text(store: Store, key: str, text: str, *, scratch: Path, interrupt: Interrupt) -> tuple[int, str]:
    """Upload a small text; returns (bytes, sha256)."""
    scratch.unlink(missing_ok=True)
    with scratch.open("x", encoding="utf-8") as file:  # a new one: never through a link that lies there
        file.write(text)
    with scratch.open("rb") as source:
        stored = _put(store, key, source, interrupt)
    return stored.bytes, stored.sha256


def publish_file(store: Store, key: str, file: Path, *, interrupt: Interrupt) -> tuple[int, str]:
    """Upload a file that a program of ours wrote from our own figures; returns (bytes, sha256)."""
    with file.open("rb") as source:
        stored = _put(store, key, source, interrupt)
    return stored.bytes, stored.sha256


def _upload(store: Store, out: Path, below: str, prefix: str, interrupt: Interrupt) -> tuple[ManifestEntry, ...]:
    """Upload the folder `below` of `out`. What is described is what was sent, whatever lies there by now."""
    described = []
    files = hostile_folder.files(out, below)
    if not files:
        raise hostile_folder.Refused(f"'{below}' of a program's output is empty.")
    for file in files:
        with hostile_folder.opened(out, f"{below}/{file.name}") as source:
            stored = _put(store, f"{prefix}/{file.name}", source, interrupt)
        described.append(ManifestEntry(name=file.name, bytes=stored.bytes, sha256=stored.sha256))
    return tuple(described)


def _put(store: Store, key: str, source: BinaryIO, interrupt: Interrupt) -> StoredObject:
    """Upload and look, again while the store is away."""
    for attempt in _patience():
        with attempt:
            return _put_once(store, key, source, interrupt)
    raise AssertionError("a retry ends in a value or in its error")


def _put_once(store: Store, key: str, source: BinaryIO, interrupt: Interrupt) -> StoredObject:
    """Nothing may be published that the store took and does not have."""
    interrupt()
    stored = store.put_open(key, source, interrupt=interrupt)
    try:
        size = store.size(key)
    except NotFound as error:
        raise Unavailable(f"The object store took '{key}' and does not have it.", code="object_store") from error
    if size != stored.bytes:
        raise Unavailable(f"The object store has {size} of {stored.bytes} bytes of '{key}'.", code="object_store")
    return stored


def _patience() -> Iterator[Any]:
    """Attempts while the store is away, with growing pauses (0.2 s … 15 s, jittered)."""
    return iter(
        stamina.retry_context(on=Unavailable, attempts=None, timeout=PATIENCE_SECONDS, wait_initial=0.2, wait_max=15.0)
    )


def _patiently(act: Callable[[], object]) -> None:
    """Again and again while the store is away."""
    for attempt in _patience():
        with attempt:
            act()


def _sha256(file: Path) -> str:
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()
