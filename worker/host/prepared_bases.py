"""Base models in the form in which QLoRA holds them, quantised once and kept on this host.

cache/models/prepared-{KEY}/        a model directory in 4 bits, and manifest.json with the sha256 of each of its files
            prepared-{KEY}.fetch/   one that is being made;  .lock: held meanwhile;  .use/*: who uses it
HOME/prepare/{KEY}.json             one that an attempt has missed;  {KEY}.failed: why it could not be made

Only this user writes here: each trainer has a user of its own or walls; without, nothing is kept. A trainer
reads a folder that was compared with its manifest when its attempt began. The key names all that the bytes depend on,
so another revision, quantisation, library or processor is another folder, and the old one goes as unused models go.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import os
import shutil
import stat
import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import structlog
from pydantic import BaseModel, ConfigDict, ValidationError

from shared.contract.methods import METHODS
from shared.contract.prepared import PrepareSpec
from shared.contract.spec import DeviceKind, JobSpec
from worker import base_models
from worker.base_models import Interrupt

log = structlog.get_logger()

PREFIX: Final = "prepared-"
# Grows when what a prepared form holds, or how it is loaded, changes.
FORMAT: Final = 1
MANIFEST: Final = "manifest.json"
MANIFEST_BYTES: Final = 1 << 20
# What prepared forms may take together, and of a bound that base models have on this host.
MOST_BYTES: Final = 64 * 2**30
MOST_SHARE: Final = 0.5
# A form that could not be made may be made later: there may have been no room.
AGAIN_SECONDS: Final = 86400.0
_LIBRARIES: Final = ("tunepool-server", "torch", "transformers", "bitsandbytes", "safetensors", "accelerate")
_OTHERS_MAY_WRITE: Final = stat.S_IWGRP | stat.S_IWOTH


class Files(BaseModel):
    """The manifest: of which form the folder is, and name -> (bytes, sha256) of each file."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    key: str
    files: dict[str, tuple[int, str]]


@dataclass(frozen=True, slots=True)
class PreparedForm:
    """A prepared form that a job would load: its key, and how it is made."""

    key: str
    spec: PrepareSpec

    def folder(self, cache: Path) -> Path:
        return cache / "models" / f"{PREFIX}{self.key}"


def form_of(
    job: JobSpec,
    *,
    model: Path,
    device: DeviceKind,
    libraries: Mapping[str, str],
    cpuinfo: Path = Path("/proc/cpuinfo"),
) -> PreparedForm | None:
    """The form for this job, whose base lies in `model`; None: jobs of its kind have none.

    A GPU quantises as it loads, faster than a disk reads, and to other bits than a processor.
    """
    quantised = METHODS[job.adapter.method].quantized and job.base_model.facts.quantised_as is None
    if not quantised or device != "cpu" or job.placement.strategy != "single":
        return None
    spec = PrepareSpec(
        base_model_path=str(model), dtype=job.training.dtype, quantization=job.quantization, marks=marks_of(model)
    )
    rests_on = {
        "format": FORMAT,
        "base": [job.base_model.source, job.base_model.revision, spec.marks],
        "form": spec.model_dump(mode="json", include={"dtype", "quantization"}),
        "libraries": {name: libraries.get(name) for name in _LIBRARIES},
        "processor": _processor(cpuinfo),
    }
    return PreparedForm(hashlib.sha256(json.dumps(rests_on, sort_keys=True).encode()).hexdigest()[:32], spec)


def marks_of(model: Path) -> str:
    """What changes when a file of the model is written: a folder of an operator's own has no revision that would."""
    seen = [(file.name, file.stat()) for file in sorted(model.iterdir()) if file.is_file()]
    listed = [[name, stat.st_size, stat.st_mtime_ns, stat.st_ino] for name, stat in seen]
    return hashlib.sha256(json.dumps(listed).encode()).hexdigest()


def _processor(cpuinfo: Path) -> list[str]:
    """What decides which kernels quantise."""
    try:
        lines = cpuinfo.read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return []
    words = ("model name", "flags", "Features", "CPU part")
    return [next((line for line in lines if line.startswith(word)), "") for word in words]


# --- reading ----------------------------------------------------------------------------------------------------------
def find(form: PreparedForm, *, cache: Path, user: Path, interrupt: Interrupt) -> Path | None:
    """The folder of this form, compared with its manifest and noted as used by `user`; None: there is no good one.

    One that is not as it was made is removed, and the log says why.
    """
    folder = form.folder(cache)
    if not base_models.hold(folder, user, interrupt):
        return None
    fault = fault_of(folder, key=form.key, interrupt=interrupt)
    if fault is None:
        return folder
    log.warning("prepared_base.refused", key=form.key, reason=fault)
    _discard(folder)
    return None


def fault_of(folder: Path, *, key: str, interrupt: Interrupt) -> str | None:
    """Why a trainer must not be given this folder, or None. Reads every byte of it."""
    try:
        if not stat.S_ISDIR(folder.lstat().st_mode) or not _ours(folder.lstat()):
            return "its folder is not ours alone to write"
        manifest = _read_manifest(folder)
        if manifest is None or manifest.key != key:
            return "its manifest is missing, broken or another's"
        if {place.name for place in folder.iterdir()} != {MANIFEST, *manifest.files}:
            return "its files are not those of its manifest"
        faults = (_fault(folder / name, *wanted, interrupt) for name, wanted in sorted(manifest.files.items()))
        return next((fault for fault in faults if fault is not None), None)
    except OSError as error:
        return f"it cannot be read ({error.strerror})"


def _fault(file: Path, size: int, digest: str, interrupt: Interrupt) -> str | None:
    seen = file.lstat()
    if not stat.S_ISREG(seen.st_mode) or not _ours(seen):
        return f"{file.name} is not ours alone to write"
    whole = seen.st_size == size and _sha256(file, interrupt) == digest
    return None if whole else f"{file.name} has not the bytes that were written"


def _ours(seen: os.stat_result) -> bool:
    return seen.st_uid == os.geteuid() and not seen.st_mode & _OTHERS_MAY_WRITE


def _read_manifest(folder: Path) -> Files | None:
    file = folder / MANIFEST
    seen = file.lstat()
    if not stat.S_ISREG(seen.st_mode) or not _ours(seen) or seen.st_size > MANIFEST_BYTES:
        return None
    try:
        return Files.model_validate_json(file.read_bytes())
    except ValidationError:
        return None


def _sha256(file: Path, interrupt: Interrupt) -> str:
    digest = hashlib.sha256()
    with file.open("rb", buffering=0) as stream:
        while chunk := stream.read(1 << 24):
            digest.update(chunk)
            interrupt()
    return digest.hexdigest()


def _discard(folder: Path) -> None:
    """Who has it open keeps what is open; nobody finds it any more."""
    gone = base_models.beside(folder, "gone")
    try:
        shutil.rmtree(gone, ignore_errors=True)
        folder.rename(gone)
    except OSError as error:
        log.warning("prepared_base.stays", folder=folder.name, reason=str(error)[:200])
    for left in (gone, base_models.beside(folder, "use")):
        shutil.rmtree(left, ignore_errors=True)


# --- writing ----------------------------------------------------------------------------------------------------------
def make_room(cache: Path, wanted: int, *, among: int | None, interrupt: Interrupt) -> None:
    """Remove the least recently used forms until `wanted` more bytes fit. Never a base model: what is made of one can
    be made again. `among`: bytes that models and forms may take together on this host.

    Raises OSError when they do not fit beside what is in use.
    """
    most = MOST_BYTES if among is None else min(MOST_BYTES, int(among * MOST_SHARE))
    with base_models.turn(cache / "models" / "any", interrupt):
        places = [place for place in (cache / "models").iterdir() if place.is_dir() and place.suffix != ".use"]
        sizes = {place: base_models.bytes_in(place) for place in places}
        forms = [place for place in sizes if place.name.startswith(PREFIX) and place.suffix in ("", ".fetch")]
        for place in sorted(forms, key=lambda path: path.stat().st_mtime):
            if _fits(sizes, wanted, most=most, among=among):
                return
            if base_models.remove(place):
                del sizes[place]
        if not _fits(sizes, wanted, most=most, among=among):
            raise OSError(errno.ENOSPC, f"there is no room for {wanted:,} bytes beside base models in use")


def _fits(sizes: Mapping[Path, int], wanted: int, *, most: int, among: int | None) -> bool:
    ours = sum(size for place, size in sizes.items() if place.name.startswith(PREFIX))
    return ours + wanted <= most and (among is None or sum(sizes.values()) + wanted <= among)


def publish(form: PreparedForm, files: Iterable[tuple[str, Path]], *, cache: Path) -> Path:
    """Make a folder of these plain files of ours, whole or not at all. The caller holds the form's lock.

    `files`: (name, file); each is moved.
    """
    folder = form.folder(cache)
    scratch = base_models.beside(folder, "fetch")
    shutil.rmtree(scratch, ignore_errors=True)  # of one that was killed
    scratch.mkdir(parents=True)
    scratch.chmod(0o755)
    listed: dict[str, tuple[int, str]] = {}
    for name, file in files:
        target = scratch / name
        shutil.move(file, target)
        target.chmod(0o644)
        _settle(target)
        listed[name] = target.stat().st_size, _sha256(target, _go_on)
    (scratch / MANIFEST).write_text(Files(key=form.key, files=listed).model_dump_json(), encoding="utf-8")
    (scratch / MANIFEST).chmod(0o644)
    _settle(scratch / MANIFEST)
    scratch.rename(folder)
    return folder


def _settle(place: Path) -> None:
    """On the disk before its name is: a name outlives a power cut that its bytes do not."""
    with place.open("rb") as stream:
        os.fsync(stream.fileno())


def _go_on() -> None:
    """Nobody interrupts."""


# --- what is missed ---------------------------------------------------------------------------------------------------
def missed_folder(home: Path) -> Path:
    return home.resolve() / "prepare"


def miss(form: PreparedForm, *, home: Path) -> bool:
    """Note that an attempt would have used this form. False: it is noted already, or could not be made lately."""
    noted = missed_folder(home)
    noted.mkdir(mode=0o700, exist_ok=True)
    with contextlib.suppress(FileNotFoundError):
        if time.time() - (noted / f"{form.key}.failed").stat().st_mtime < AGAIN_SECONDS:
            return False
    if (noted / f"{form.key}.json").exists():
        return False
    unfinished = noted / f"{form.key}.{os.getpid()}"
    unfinished.write_text(form.spec.model_dump_json(), encoding="utf-8")
    unfinished.rename(noted / f"{form.key}.json")
    return True


def missed(home: Path) -> list[PreparedForm]:
    """The forms that were missed, the first of them first."""
    forms = []
    for file in sorted(missed_folder(home).glob("*.json"), key=lambda place: place.name):
        try:
            forms.append(PreparedForm(file.stem, PrepareSpec.model_validate_json(file.read_bytes())))
        except (ValidationError, FileNotFoundError):
            file.unlink(missing_ok=True)
    return forms


def settled(form: PreparedForm, *, home: Path, failure: str | None = None) -> None:
    """It is made, or with `failure` it is not tried again for a while."""
    noted = missed_folder(home)
    if failure is not None:
        (noted / f"{form.key}.failed").write_text(failure, encoding="utf-8")
    (noted / f"{form.key}.json").unlink(missing_ok=True)
