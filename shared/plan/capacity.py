"""Devices of a pool, host by host, and what fits where. Pure: no clock, no I/O."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Final, NamedTuple


@dataclass(frozen=True, slots=True)
class Device:
    """One device as its worker last read it. All sizes are bytes."""

    id: str
    host: str
    total_bytes: int
    free_bytes: int  # really free, as read; on the CPU the memory available
    pool: str = "default"
    kind: str = "cuda"
    leased_by: str | None = None
    healthy: bool = True
    draining: bool = False
    foreign_bytes: int = 0  # held by processes that are not ours
    cached_models: frozenset[str] = field(default_factory=frozenset)
    bfloat16: bool = True
    capability: int | None = None  # NVIDIA's compute capability: 80 is 8.0
    of_cluster: bool = False  # the host is a place in a cluster, which names the real one when an attempt starts
    warm_base: str | None = None  # the base model that waits in memory for its next job, as its worker last said

    @property
    def usable(self) -> bool:
        return self.healthy and not self.draining

    @property
    def is_slice(self) -> bool:
        """A part of a GPU: NCCL refuses it, and a process sees one of them only."""
        return self.id.partition(":")[2].startswith("MIG-")


class Abilities(NamedTuple):
    """What a job asks of each of its devices besides memory."""

    gpu: bool = False  # not a CPU
    bfloat16: bool = False
    capability: int = 0  # at least, of an NVIDIA GPU: 80 is 8.0
    whole: bool = False  # no slice of a GPU
    base_model: str = ""  # its host has it: a device never waits for a download
    meets: bool = False  # its host can meet the other hosts of the job: not a place in a cluster

    def met_by(self, device: Device) -> bool:
        return not (
            (self.gpu and device.kind == "cpu")
            or (self.bfloat16 and not device.bfloat16)
            or (device.capability is not None and device.capability < self.capability)
            or (self.whole and device.is_slice)
            or (self.base_model and self.base_model not in device.cached_models)
            or (self.meets and device.of_cluster)
        )

    def __str__(self) -> str:
        words = (
            (self.gpu, "a GPU"),
            (self.bfloat16, "bfloat16"),
            (self.capability > 0, f"compute capability {self.capability // 10}.{self.capability % 10}"),
            (self.whole, "no MIG slice"),
            (self.meets, "a worker of its own on each host"),
        )
        return ", ".join(word for holds, word in words if holds)


ANY: Final = Abilities()


class Demand(NamedTuple):
    """What a job asks for: `gpus` devices on each of `nodes` hosts, `bytes_needed` on each device, safety included.

    Its hosts must have devices of one kind: ranks on a CPU, on CUDA and on ROCm have no language in common.
    """

    gpus: int
    nodes: int
    bytes_needed: int
    needs: Abilities = ANY

    def starts_cold_on(self, device: Device) -> bool:
        """Whether its base model would have to be loaded there. Decides nothing but between devices that are alike."""
        return not self.needs.base_model or device.warm_base != self.needs.base_model


class HostMap:
    """A set of devices grouped by host, each with the room (bytes) that it offers.

    Whoever asks with a demand is answered for the devices that meet its needs: those are a map of their own, made when
    it is first asked for and kept up to date.
    """

    def __init__(self, offers: Iterable[tuple[Device, int]] = ()) -> None:
        self._rooms: dict[str, dict[str, tuple[Device, int]]] = {}
        self._levels: dict[str, list[int]] = {}  # host -> rooms, largest first
        self._kinds: dict[str, str] = {}  # host -> the kind of its devices; a worker has devices of one kind
        self._bounds: dict[tuple[int, int], int] = {}  # (gpus, nodes) -> largest need that may still fit
        self._exact = set[tuple[int, int]]()  # the bounds that no device has left since
        self._parts: dict[Abilities, HostMap] = {}  # of the devices that meet some needs
        for device, room in offers:
            self._put(device, room)
        for host in self._rooms:
            self._sort(host)

    def copy(self) -> HostMap:
        twin = HostMap()
        twin._rooms = {host: dict(rooms) for host, rooms in self._rooms.items()}
        twin._levels = dict(self._levels)
        twin._kinds = dict(self._kinds)
        return twin

    def able(self, needs: Abilities) -> HostMap:
        """The devices that meet the needs."""
        if needs == ANY:
            return self
        if needs not in self._parts:
            rooms = (offer for host in self._rooms.values() for offer in host.values())
            self._parts[needs] = HostMap((device, room) for device, room in rooms if needs.met_by(device))
        return self._parts[needs]

    def _put(self, device: Device, room: int) -> None:
        self._rooms.setdefault(device.host, {})[device.id] = (device, room)
        self._kinds[device.host] = device.kind

    def _sort(self, host: str) -> None:
        self._levels[host] = sorted((room for _, room in self._rooms[host].values()), reverse=True)

    def __contains__(self, device: Device) -> bool:
        return device.id in self._rooms.get(device.host, ())

    def add(self, device: Device, room: int) -> None:
        self._put(device, room)
        self._bounds.clear()
        self._exact.clear()
        self._sort(device.host)
        for needs, part in self._parts.items():
            if needs.met_by(device):
                part.add(device, room)

    def remove(self, device: Device) -> None:
        """Take a device out; a device that is not here is no error. Bounds stay valid: they can only be too large."""
        if self._rooms.get(device.host, {}).pop(device.id, None) is not None:
            self._sort(device.host)
            self._exact.clear()
            for part in self._parts.values():
                part.remove(device)

    def widest(self, gpus: int, nodes: int) -> int:
        """The largest number of bytes per device that `gpus` devices on each of `nodes` hosts offer; -1 if none."""
        if nodes == 1:  # nearly every job, in every turn
            return max((level[gpus - 1] for level in self._levels.values() if len(level) >= gpus), default=-1)
        widths: dict[str, list[int]] = {}
        for host, level in self._levels.items():
            if len(level) >= gpus:
                widths.setdefault(self._kinds[host], []).append(level[gpus - 1])
        enough = [sorted(alike, reverse=True)[nodes - 1] for alike in widths.values() if len(alike) >= nodes]
        return max(enough, default=-1)

    def fits(self, demand: Demand) -> bool:
        return self.able(demand.needs).offers((demand.gpus, demand.nodes), demand.bytes_needed)

    def offers(self, shape: tuple[int, int], need: int) -> bool:
        """Whether (devices on each host, hosts) can be had with `need` bytes on each, of the devices that are here."""
        if shape not in self._exact:
            if need > self._bounds.get(shape, need):  # removals only lower a bound, so an old one still refuses
                return False
            self._bounds[shape] = self.widest(*shape)
            self._exact.add(shape)
        return need <= self._bounds[shape]

    def hosts_for(self, demand: Demand) -> list[str]:
        """The hosts that offer one host's part of the demand."""
        gpus, need = demand.gpus, demand.bytes_needed
        return [
            host
            for host, level in self.able(demand.needs)._levels.items()
            if len(level) >= gpus and level[gpus - 1] >= need
        ]

    def teams(self, demand: Demand) -> list[list[str]]:
        """The hosts that offer one host's part, those of one kind together, where they are enough for the demand."""
        teams: dict[str, list[str]] = {}
        for host in self.hosts_for(demand):
            teams.setdefault(self._kinds[host], []).append(host)
        return [team for team in teams.values() if len(team) >= demand.nodes]

    def serves(self, host: str, demand: Demand) -> bool:
        level = self.able(demand.needs)._levels.get(host, ())
        return len(level) >= demand.gpus and level[demand.gpus - 1] >= demand.bytes_needed

    def devices(self, host: str, demand: Demand) -> list[Device]:
        """The devices of a host that can do one device's part of the demand, smallest device first, then the warm."""
        rooms = self.able(demand.needs)._rooms[host]
        fitting = [device for device, room in rooms.values() if room >= demand.bytes_needed]
        return sorted(fitting, key=lambda device: (device.total_bytes, demand.starts_cold_on(device), device.id))

    def choose(self, demand: Demand) -> tuple[Device, ...]:
        """Devices for a demand that `fits`.

        Smallest devices first: large ones are left for large jobs. Then the host that is left with the fewest free
        devices: whole hosts are left for gangs. Then devices with the job's base model in memory, then the host's
        name.
        """
        teams = [sorted(self._offer(host, demand) for host in team) for team in self.teams(demand)]
        best = min(team[: demand.nodes] for team in teams)
        picked = [(host, ids) for *_, host, ids in best]
        return tuple(self._rooms[host][device_id][0] for host, ids in picked for device_id in ids)

    def _offer(self, host: str, demand: Demand) -> tuple[int, int, int, str, tuple[str, ...]]:
        chosen = self.devices(host, demand)[: demand.gpus]
        left, cold = len(self._rooms[host]) - demand.gpus, sum(map(demand.starts_cold_on, chosen))
        return chosen[-1].total_bytes, left, cold, host, tuple(device.id for device in chosen)
