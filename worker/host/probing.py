"""Has a device tried by a trainer's program before the first job, and again while it is ailing.

The program (`worker.train.probe`) runs as trainers do: their interpreter, user, environment, limits and folder. So what
it finds is what a job would have found.
"""

from __future__ import annotations

import contextlib
import os
import threading
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from typing import Any, Final

import pynvml
import structlog
from pydantic import ValidationError

from shared.contract.probe_report import ProbeReport, ProbeSpec
from shared.contract.spec import Placement
from shared.lease.values import Lease
from shared.operating.trainer_user import own_uid
from shared.settings import Settings
from worker.host import nvml as nvidia
from worker.host import processor_rates, remedies
from worker.host.found_device import FoundDevice
from worker.host.host import work_folder
from worker.host.processor_rates import ProductRates
from worker.host.remedies import Driver
from worker.program import hostile_folder, kernels, launcher, processes, workdir

log = structlog.get_logger()

PROGRAM: Final = "worker.train.probe"
# The first context on a host with eight GPUs, and the first kernel of Triton, take tens of seconds.
PROBE_SECONDS: Final = 180.0
# Somebody may have mended it; a device that is ailing has no job that this could disturb.
AGAIN_SECONDS: Final = 300.0
LOOK_SECONDS: Final = 0.1
REPORT_BYTES: Final = 1 << 20
UNTRIED: Final = "it is being tried before its first job"
# A context, cuBLAS and a few small tensors: a probe must not end a stranger's work, nor fail because of it.
PROBE_BYTES: Final = 2 << 30
TOO_FULL: Final = "it is tried before its first job, once 2 GiB are free"


@dataclass(frozen=True, slots=True)
class Outcome:
    """What a probe found: why the device must not be used, or what it is made of."""

    ailment: str | None
    summary: str
    capability: tuple[int, int] | None = None
    rates: ProductRates | None = None  # of a CPU


def try_device(
    device: FoundDevice, *, settings: Settings, uid: int | None, driver: Driver | None, module: str = PROGRAM
) -> Outcome:
    """Run the program on one device to its end, and read what it found."""
    # `tunepool-server doctor` may try the same device at the same time.
    lease = Lease(kind="probe", id=f"probe-{device.uuid}-{os.getpid()}", fence=1, worker_id="", attempt=1)
    place = workdir.make(work_folder(settings), lease)
    try:
        ended = _run(device, place, lease=lease, settings=settings, uid=uid, module=module)
        report = _read(place)
        kernels.keep(settings.home, kernels.PROBED, place.out)
    except (OSError, hostile_folder.Refused, processes.StillAlive) as error:
        return Outcome(f"its probe could not be run: {error}", "")
    finally:
        workdir.remove(work_folder(settings), lease)
    if report is None:
        return Outcome(_crashed(ended), "")
    return Outcome(
        remedies.ailment(report, driver=driver),
        remedies.summary(report, driver=driver),
        capability=report.capability,
        rates=_rates(report),
    )


def _run(
    device: FoundDevice,
    place: workdir.Workdir,
    *,
    lease: Lease,
    settings: Settings,
    uid: int | None,
    module: str,
) -> launcher.Exit | None:
    """How it ended; None: not within its time."""
    tag = processes.own_tag(home=settings.home.resolve(), job_id=lease.id, fence=lease.fence)
    environment = launcher.environment(
        tag=tag, device_ids=(f"here:{device.uuid}",), kind=device.kind, threads=device.cores or 1, scratch=place.out
    )
    spec = ProbeSpec(kind=device.kind, compiler=environment.get("CC", ""))
    place.spec.write_text(spec.model_dump_json(), encoding="utf-8")
    workdir.hand_over(place, uid=uid)
    program = launcher.start(
        launcher.command(module, placement=Placement(), spec_file=place.spec, out=place.out),
        environment=environment,
        tag=tag,
        out=place.out,
        log_file=place.log,
        uid=uid,
        only_child=False,  # a worker's first process has its children at work
    )
    began = time.monotonic()
    while program.poll() is None and time.monotonic() - began < PROBE_SECONDS:
        time.sleep(LOOK_SECONDS)
    in_time = program.poll() is not None
    ended = program.end(grace_seconds=0)
    return ended if in_time else None


def _read(place: workdir.Workdir) -> ProbeReport | None:
    with contextlib.suppress(FileNotFoundError, ValidationError):
        return ProbeReport.model_validate_json(hostile_folder.read(place.out, "probe.json", most=REPORT_BYTES))
    return None


def _rates(report: ProbeReport) -> ProductRates | None:
    with contextlib.suppress(ValidationError):  # a GPU has none
        return ProductRates.model_validate(report.rates)
    return None


def _crashed(ended: launcher.Exit | None) -> str:
    if ended is None:
        return f"its probe did not end within {PROBE_SECONDS:g} s; see the kernel log, then restart this worker"
    last = (ended.last_words.strip().splitlines() or ["it said nothing"])[-1][:300]
    return f"its probe crashed (exit code {ended.code}): {last}"


def too_full(device: FoundDevice) -> bool:
    """Whether a probe there might fail, or end another's work, for want of memory."""
    return device.kind != "cpu" and device.free_bytes < min(PROBE_BYTES, device.total_bytes // 2)


class Probes:
    """The probes of this worker's devices. A thread tries each GPU that has none yet, and times an unknown processor.

    Args:
        done: called from that thread when a device has been tried.
        probe: tries one device; tests give another.
    """

    def __init__(
        self,
        settings: Settings,
        *,
        done: Callable[[], None],
        probe: Callable[[FoundDevice], Outcome] | None = None,
        clock: Callable[[], float] = time.monotonic,
        nvml: Any = pynvml,
    ) -> None:
        self._settings, self._done, self._clock, self._nvml = settings, done, clock, nvml
        self._probe = probe or self._try
        self._known: dict[str, tuple[Outcome, float]] = {}
        self._thread: threading.Thread | None = None

    def judged(self, devices: Iterable[FoundDevice]) -> tuple[FoundDevice, ...]:
        """The same devices; a GPU that has not passed its probe is ailing. The processor is always taken.

        What is found of a processor is kept, and whoever looks for devices after that sees it.
        """
        listed = tuple(devices)
        due = [device for device in listed if device.kind != "cpu" and device.healthy and self._is_due(device)]
        due += [device for device in listed[:1] if device.kind == "cpu" and self._is_unmeasured(device)]
        if due and not self.busy:
            self._thread = threading.Thread(target=self._work, args=(due,), name="probes", daemon=True)
            self._thread.start()
        return tuple(self._judge(device) for device in listed)

    @property
    def busy(self) -> bool:
        return self._thread is not None and self._thread.is_alive()

    def _is_due(self, device: FoundDevice) -> bool:
        outcome, at = self._known.get(device.uuid, (None, 0.0))
        if too_full(device):
            return False
        return outcome is None or (outcome.ailment is not None and self._clock() - at >= AGAIN_SECONDS)

    def _is_unmeasured(self, device: FoundDevice) -> bool:
        """The slots of a processor are alike: the first one is timed, once for each worker that finds nothing kept."""
        return self._settings.cpu_probe and device.probed is None and device.uuid not in self._known

    def _judge(self, device: FoundDevice) -> FoundDevice:
        if device.kind == "cpu" or not device.healthy:
            return device
        unknown = Outcome(TOO_FULL if too_full(device) else UNTRIED, "")
        outcome, _ = self._known.get(device.uuid, (unknown, 0.0))
        return replace(device, ailment=outcome.ailment, probed=outcome.summary or None)

    def _work(self, devices: list[FoundDevice]) -> None:
        # All of one probe happens in this thread: its program dies with the thread that started it.
        for device in devices:
            outcome = self._probe(device)
            self._known[device.uuid] = outcome, self._clock()
            if outcome.ailment is None:
                log.info("device.passed", uuid=device.uuid, probed=outcome.summary)
            else:
                log.error("device.ailing", uuid=device.uuid, ailment=outcome.ailment)
            if outcome.rates is not None:
                self._keep(device, outcome.rates)
            self._done()

    def _keep(self, device: FoundDevice, rates: ProductRates) -> None:
        try:
            processor_rates.keep(self._settings, processor_rates.this_machine(threads=device.cores or 1), rates)
        except OSError as error:  # a full disk: flags decide, and the next worker times it again
            log.warning("device.rates_not_kept", error=str(error))

    def _try(self, device: FoundDevice) -> Outcome:
        return try_device(
            device,
            settings=self._settings,
            uid=own_uid(self._settings),
            driver=nvidia.driver(self._nvml) if device.kind == "cuda" else None,
        )
