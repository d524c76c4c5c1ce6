"""The devices of a pool at one moment: free, busy until when, out of order, or used by a stranger. Pure."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from math import inf
from typing import Final, NamedTuple

from shared.plan.capacity import Demand, Device, HostMap
from shared.plan.fairshare import GIB, Policy, QueuedJob, expected_seconds, longest_seconds
from shared.plan.preemption import RunningJob
from shared.plan.verdicts import DeviceForecast, Reason

NO_WORKER: Final = (
    "needs {} hosts with {} devices each, all of one kind; {} devices are registered on {} hosts (a worker counts as "
    "one); unblocked by a worker that has them"
)
TOO_LARGE: Final = (
    "needs {:.1f} GiB on each of {} devices; no more than {:.1f} GiB is built in; "
    "unblocked by a larger device or a smaller job"
)
UNABLE: Final = (
    "needs {} x {} devices with {}; none of the {} registered ones, or too few of one kind on a host, can do that; "
    "unblocked by a worker that has them, or by a job with other settings (training.dtype, placement.allow_cpu)"
)
QUARANTINED: Final = "needs {} x {} devices; {} are quarantined or drained ({}); unblocked when they are back"
OCCUPIED: Final = (
    "needs {:.1f} GiB on each of {} devices; {:.1f} GiB can be had, because processes outside "
    "the pool hold device memory ({}); unblocked when they end"
)
COLD: Final = (
    "its base model {0} is on no host that fits; {1}; unblocked when such a host has it, and no device waits meanwhile "
    "(if it does not come: `tunepool models prefetch {0}` asks for it again, and `python -m worker.base_models {0}` "
    "fetches it on a host)"
)


class Fetching(NamedTuple):
    """How far the host that is farthest has come with a base model."""

    host: str
    done: int  # bytes
    total: int  # bytes, estimated; 0: nothing has begun
    over: bool = False  # it failed, and is not tried again soon
    error: str | None = None  # of the last try

    def __str__(self) -> str:
        progress = f"{self.host} has {self.done:,} of {self.total:,} bytes"
        if self.over:
            return f"{self.host} could not fetch it: {(self.error or '').rstrip('.')}"
        if self.error:
            return f"{progress} and tries again, because: {self.error.rstrip('.')}"
        return progress if self.total else f"{self.host} is about to fetch it"


class Occupancy:
    """The pool's devices with their jobs. Times are POSIX seconds."""

    def __init__(
        self,
        devices: Iterable[Device],
        running: Sequence[RunningJob],
        *,
        policy: Policy,
        now: float,
        fetches: Mapping[str, Fetching] | None = None,
    ) -> None:
        self.policy, self.now, self._fetches = policy, now, fetches or {}
        self.devices = {device.id: device for device in sorted(devices, key=lambda device: device.id)}
        self.running = {device_id: job for job in running for device_id in job.device_ids}
        everything = self.devices.values()
        usable = [device for device in everything if device.usable]
        self.usable_count = len(usable)
        self._registered = HostMap((device, device.total_bytes) for device in everything)
        self._healthy = HostMap((device, device.total_bytes) for device in usable)
        self.obtainable = HostMap((device, self.room(device)) for device in usable)  # when every job has ended
        self.ends = {device.id: self._end(device) for device in everything}  # free at the latest; inf: nobody knows
        self._early = {device.id: self._soonest(device) for device in usable}
        self._late = {device.id: self._latest(device) for device in usable}

    def free(self, *, leaving: bool = False) -> HostMap:
        """The devices that a job can have now; with `leaving` also those that a preemption is about to free."""
        usable = [device for device in self.devices.values() if device.usable and not self._foreign(device)]
        return HostMap(
            (device, self.room(device))
            for device in usable
            if self._idle(device) or (leaving and self._leaving(device))
        )

    def room(self, device: Device) -> int:
        """Bytes that the device offers, now or when its job ends; -1 while a stranger works on it."""
        if self._foreign(device):
            return -1
        if device.kind == "cpu" and not self._idle(device):  # what is free there now is what its job has left
            return device.total_bytes - device.foreign_bytes
        return device.free_bytes  # of a GPU that a job has: what was free before (worker/host/idle_memory.py)

    def obtainable_of(self, job: RunningJob) -> tuple[Device, ...]:
        """The devices that stopping the job would make available."""
        held = [self.devices[device_id] for device_id in job.device_ids if device_id in self.devices]
        return tuple(device for device in held if device.usable and not self._foreign(device))

    def obstacle(self, demand: Demand) -> Reason | None:
        """Why the demand cannot be met as the pool is, even when every job has ended; None if it can."""
        if self.obtainable.fits(demand):
            return None
        anywhere = demand._replace(needs=demand.needs._replace(base_model=""))
        if not self.obtainable.fits(anywhere):
            return self._unfit(anywhere)
        base_model = demand.needs.base_model
        progress = self._fetches.get(base_model, "its hosts are about to be asked")
        return Reason("BASE_MODEL_FETCHING", COLD, (base_model, progress))

    def _unfit(self, demand: Demand) -> Reason:
        """Why no host could take the demand, whatever base models it has."""
        gpus, nodes, need = demand.gpus, demand.nodes, demand.bytes_needed / GIB
        widest = self._registered.widest(gpus, nodes)
        if widest < 0:
            count = len({device.host for device in self.devices.values()})
            return Reason("NO_WORKER", NO_WORKER, (nodes, gpus, len(self.devices), count))
        sizes = (need, gpus * nodes)
        widest = self._registered.able(demand.needs).widest(gpus, nodes)
        if widest < 0:
            return Reason("NO_FIT_DEVICE", UNABLE, (nodes, gpus, str(demand.needs), len(self.devices)))
        if widest < demand.bytes_needed:
            return Reason("NO_FIT_MEMORY", TOO_LARGE, (*sizes, widest / GIB))
        if not self._healthy.fits(demand):
            out = [device.id for device in self.devices.values() if not device.usable]
            return Reason("DEVICE_QUARANTINED", QUARANTINED, (nodes, gpus, len(out), ", ".join(out[:8])))
        had = max(0, self.obtainable.able(demand.needs).widest(gpus, nodes))
        return Reason("NO_FIT_MEMORY", OCCUPIED, (*sizes, had / GIB, self._strangers()))

    def outlook(self) -> DeviceForecast:
        return DeviceForecast(self.now, list(self._early.values()), list(self._late.values()))

    def occupy(self, device: Device, job: QueuedJob) -> None:
        """The job starts on the device."""
        limit = job.max_runtime_seconds
        self.ends[device.id] = inf if limit is None else self.now + limit
        self._early[device.id] = self.now + expected_seconds(job, policy=self.policy)
        self._late[device.id] = self.now + longest_seconds(job, policy=self.policy)

    def promise(self, device: Device) -> None:
        """The device goes to a waiting job next, for nobody knows how long."""
        self.ends[device.id] = inf

    def vacate(self, device: Device) -> None:
        """The job on the device is asked to stop."""
        moment = self.now + self.policy.preempt_grace.total_seconds()
        self.ends[device.id] = self._early[device.id] = self._late[device.id] = moment

    def _idle(self, device: Device) -> bool:
        return device.leased_by is None and device.id not in self.running

    def _foreign(self, device: Device) -> bool:
        return device.foreign_bytes > self.policy.foreign_tolerance_bytes

    def _leaving(self, device: Device) -> bool:
        job = self.running.get(device.id)
        return job is not None and job.preempt_requested

    def _end(self, device: Device) -> float:
        job = self.running.get(device.id)
        if job is None:
            return self.now if device.leased_by is None else inf
        if job.preempt_requested:
            return self.now + self.policy.preempt_grace.total_seconds()
        if job.max_runtime_seconds is None:
            return inf
        return max(self.now, job.started_at.timestamp() + job.max_runtime_seconds)

    def _soonest(self, device: Device) -> float:
        job = self.running.get(device.id)
        left = job.expected_seconds_left if job is not None else None
        return min(self.ends[device.id], self.now + (self.policy.entry_seconds if left is None else left))

    def _latest(self, device: Device) -> float:
        job = self.running.get(device.id)
        if self.ends[device.id] < inf or job is None or job.expected_seconds_left is None:
            return self.ends[device.id]
        return self.now + job.expected_seconds_left * self.policy.eta_slack

    def _strangers(self) -> str:
        seen = [device for device in self.devices.values() if device.foreign_bytes > 0]
        worst = sorted(seen, key=lambda device: (-device.foreign_bytes, device.id))[:4]
        return ", ".join(f"{device.id} {device.foreign_bytes / GIB:.1f} GiB" for device in worst) or "none reported"
