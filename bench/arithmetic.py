"""The dtype in which jobs compute on this machine's processor, measured as a worker measures it."""

from __future__ import annotations

from pathlib import Path

from shared.contract.probe_report import Arithmetic
from shared.operating.trainer_user import own_uid
from shared.settings import Settings
from worker.host import processor_rates
from worker.host.devices import cpu
from worker.host.probing import try_device


def dtype_of_jobs(home: Path) -> Arithmetic:
    settings = Settings(home=home)
    (device, *_) = cpu(settings)
    if device.probed is None and settings.cpu_probe:
        rates = try_device(device, settings=settings, uid=own_uid(settings), driver=None).rates
        if rates is not None:
            processor_rates.keep(settings, processor_rates.this_machine(threads=device.cores or 1), rates)
        (device, *_) = cpu(settings)
    return "bfloat16" if device.bfloat16 else "float32"
