"""Which base model a spare holds: that of its device's last job, if it is prepared and there is memory for it."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Final

import structlog

from shared.contract.passes import device_kind
from shared.contract.prepared import HeldBase
from shared.contract.spec import JobSpec
from shared.errors import TunepoolError
from shared.settle.catalogue import local_folder
from worker import base_models
from worker.host import prepared_bases
from worker.host.found_device import FoundDevice
from worker.host.host import AWAY, Host
from worker.host.libraries import trainer_libraries
from worker.host.prepared_bases import PreparedForm
from worker.program.workdir import Workdir

log = structlog.get_logger()

# The program whose forms these are; an operator's own trainer knows nothing of them.
TRAINER: Final = "worker.train"
# Of its device's memory that a spare may hold.
SHARE: Final = 0.5


@dataclass(frozen=True, slots=True)
class FoundBase:
    """A prepared base on this host that a spare could hold."""

    host: Host
    form: PreparedForm
    name: str  # in the catalogue
    bytes: int  # about what it takes in memory

    def held_by(self, folder: Workdir) -> HeldBase | None:
        """The base that a spare with this folder is to hold. Its files are compared, and stay as long as the folder."""
        cache, model = self.host.settings.cache, Path(self.form.spec.base_model_path)
        prepared = prepared_bases.find(self.form, cache=cache, user=folder.root, interrupt=_go_on)
        if prepared is None:
            return None
        if model.parent == cache / "models" and not base_models.hold(model, folder.root, _go_on):
            return None
        return HeldBase(base_model_path=str(model), prepared_path=str(prepared), dtype=self.form.spec.dtype)


def keeps_forms(host: Host) -> bool:
    """Whether forms are kept here: a trainer that could write them would write what the next tenant loads.

    One user for all programs is no wall: a trainer could write where the program writes that makes a form.
    """
    return host.settings.trainer == TRAINER and host.isolation.files != "open"


def form_for(host: Host, spec: JobSpec, *, model: Path, device: FoundDevice) -> PreparedForm | None:
    """The prepared form that this job would load on this device; None: it has none, or none is kept here."""
    if not keeps_forms(host):
        return None
    versions = {**trainer_libraries(), "tunepool-server": host.worker.version}
    return prepared_bases.form_of(spec, model=model, device=device_kind(device.kind), libraries=versions)


def find(host: Host, spec: JobSpec, *, device: FoundDevice) -> FoundBase | None:
    """The base of `spec`, if this host has a form of it now that fits in the device's part of the memory."""
    try:
        entry = host.catalogue().entry(spec.base_model.name)
    except (TunepoolError, *AWAY):
        return None
    model = local_folder(entry, cache=host.settings.cache)
    if entry.ref.revision != spec.base_model.revision or not model.is_dir():
        return None
    form = form_for(host, spec, model=model, device=device)
    folder = None if form is None else form.folder(host.settings.cache)
    if form is None or folder is None or not folder.is_dir():
        return None
    size = base_models.bytes_in(folder)
    return FoundBase(host, form, entry.ref.name, size) if size < SHARE * device.total_bytes else None


def _go_on() -> None:
    """Nobody interrupts."""
