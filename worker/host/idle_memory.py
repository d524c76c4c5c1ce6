"""Memory of each GPU while none of our trainers is on it. The plan and the settling of jobs count with it.

While a device is leased its memory is our trainer's, and NVML cannot be asked whose it is: in a container it lists
processes by the host's numbers, or by ours without their memory. So a leased device is reported as it was when it was
last free, and strangers are looked for only while it is.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable
from dataclasses import replace

from worker.host.found_device import FoundDevice


class IdleMemory:
    """Remembers (free, foreign) bytes of each GPU from the last look at which it was not leased."""

    def __init__(self) -> None:
        self._idle: dict[str, tuple[int, int]] = {}

    def applied(self, devices: Iterable[FoundDevice], *, leased: Collection[str]) -> tuple[FoundDevice, ...]:
        """The same devices, leased GPUs as they were when free. `leased`: their uuids.

        A processor's memory is judged by what our own processes hold (`devices.cpu`), leased or not.
        """
        return tuple(self._as_idle(device, leased=device.uuid in leased) for device in devices)

    def _as_idle(self, device: FoundDevice, *, leased: bool) -> FoundDevice:
        if device.kind == "cpu":
            return device
        if not leased:
            self._idle[device.uuid] = device.free_bytes, device.foreign_bytes
            return device
        # Leased before the first look: nothing is known but that the memory in use is ours.
        free, foreign = self._idle.get(device.uuid, (device.total_bytes, 0))
        return replace(device, free_bytes=free, foreign_bytes=foreign)
