"""The walls that this host can put around programs on strangers' data. Each is measured by trying it.

A program is one of four kinds of company: it works alone, with ranks on this host, or with ranks on several hosts. Only
the last keeps the host's network, because it needs it.
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass
from functools import cache, partial
from pathlib import Path
from typing import Any, Final, Literal

from shared.operating import kernel_walls
from shared.operating.kernel_walls import ALL, DEVICES, LIST, READ
from shared.operating.trainer_user import User, trainer_user
from shared.settings import Settings

Company = Literal["alone", "ranks_here", "ranks_elsewhere"]
Network = Literal["namespace", "filter", "open"]
Files = Literal["user", "rules", "open"]

# Where systems keep programs, libraries and their settings. Not /run, where sockets and secrets of containers are.
_SYSTEM: Final = ("/usr", "/bin", "/sbin", "/lib", "/lib32", "/lib64", "/etc", "/opt", "/sys", "/nix/store")
_LIBRARIES: Final = ("site-packages", "dist-packages")
_TRY_SECONDS: Final = 20.0


class IsolationLacking(RuntimeError):
    """This host cannot give what `TUNEPOOL_ISOLATION=require` asks for; the words say what would."""


@dataclass(frozen=True, slots=True)
class Isolation:
    """What programs on strangers' data are kept from on this host. The default is nothing at all."""

    user: User = "own"  # a user for each program at work, one for all of them, or the worker's own
    network: Network = "open"  # of a program that works alone
    ranks_network: Network = "open"  # of the ranks of one host: they need the loopback
    files: Files = "open"  # who keeps files of the host and of other jobs from a program
    calls: bool = False  # system calls that a training has no use for are refused
    off: bool = False  # nothing was tried: TUNEPOOL_ISOLATION=off

    @property
    def lacking(self) -> tuple[str, ...]:
        """What programs are not kept from, each with its remedy."""
        gone = []
        if self.network == "open":
            gone.append(
                "programs have the host's network (allow the worker unshare(2) of a network namespace, or seccomp(2))"
            )
        if self.files == "open":
            gone.append(
                "programs may open what the worker's user may (start the worker as root, with interpreter and home"
                " readable for others, or on a kernel with Landlock, 5.13 and later)"
            )
        return tuple(gone)

    @property
    def line(self) -> str:
        """One line for people."""
        if self.off:
            return "isolation off: programs have the network and files of the worker's user"
        network = {"namespace": "no network", "filter": "no network (by filter)", "open": "NETWORK OPEN"}[self.network]
        user = {"slot": "a user each", "shared": "one user for all", "own": "the worker's user"}[self.user]
        files = {"user": "files by user", "rules": "files by Landlock", "open": "FILES OPEN"}[self.files]
        ranks = "" if self.ranks_network != "open" or self.network == "open" else ", but ranks of one host have it"
        return f"isolation: {network}{ranks}, {user}, {files}"

    def document(self) -> dict[str, Any]:
        return {name: value for name, value in asdict(self).items() if name != "off"}


def isolation(settings: Settings) -> Isolation:
    """What this host gives, measured once per process. Raises IsolationLacking."""
    measured = measured_isolation(settings)
    if settings.isolation == "require" and measured.lacking:
        raise IsolationLacking(
            f"TUNEPOOL_ISOLATION is 'require', and this host cannot give it: {'; '.join(measured.lacking)}."
            " Or set TUNEPOOL_ISOLATION=best to go on without."
        )
    return measured


def measured_isolation(settings: Settings) -> Isolation:
    """What this host gives, whatever is asked for. It starts a few short programs, once per process."""
    if settings.isolation == "off" or sys.platform != "linux":
        return Isolation(user=trainer_user(settings).kind, off=settings.isolation == "off")
    return _measured(trainer_user(settings).kind)


@cache
def _measured(user: User) -> Isolation:
    calls = kernel_walls.call_filter(sockets=False, connect=False)
    filtered = calls is not None and _works(partial(kernel_walls.filter_calls, calls))
    namespace = _works(partial(kernel_walls.leave_network, loopback=True))
    ruled = kernel_walls.landlock_version() > 0 and _works(lambda: kernel_walls.keep_to(_rules_of_a_try()))
    return Isolation(
        user=user,
        network="namespace" if namespace else "filter" if filtered else "open",
        ranks_network="namespace" if namespace else "open",
        files="user" if user == "slot" else "rules" if ruled else "open",
        calls=filtered,
    )


def _rules_of_a_try() -> int:
    return kernel_walls.file_rules([(Path("/"), READ)])


def _works(act: Callable[[], None]) -> bool:
    """Whether a child may do it, and a program still starts afterwards."""

    def prepare() -> None:
        kernel_walls.gain_nothing()
        act()

    try:
        done = subprocess.run(
            ["/bin/true"], stdin=subprocess.DEVNULL, preexec_fn=prepare, timeout=_TRY_SECONDS, check=False
        )
    except (OSError, subprocess.SubprocessError):
        return False
    return done.returncode == 0


# --- the walls of one program -----------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class ProgramPaths:
    """The paths of one program: what it writes, and what it reads beside the system and our code."""

    writes: tuple[Path, ...]
    reads: tuple[Path, ...] = ()
    home: Path | None = None  # never read, except for `reads`


class Walls:
    """Made before the fork; `leave_network` and then `close` are called in the child. Raises OSError."""

    def __init__(self, given: Isolation, company: Company, ground: ProgramPaths) -> None:
        network = given.network if company == "alone" else given.ranks_network if company == "ranks_here" else "open"
        self._drops = not given.off and os.geteuid() == 0 and given != Isolation()
        self._leaves = network == "namespace"
        self._loopback = company != "alone"
        alone = company == "alone"
        self._filter = (
            kernel_walls.call_filter(sockets=not alone, connect=not (alone and given.user == "own"))
            if given.calls
            else None
        )
        self._rules = kernel_walls.file_rules(_allowed(ground)) if given.files == "rules" else None

    def leave_network(self) -> None:
        """Before the user changes: as root it needs no namespace of users."""
        if self._leaves:
            kernel_walls.leave_network(loopback=self._loopback)

    def close(self) -> None:
        """The last act before exec: the filter also refuses what the other walls are made with."""
        if self._drops:
            kernel_walls.drop_rights()
        kernel_walls.gain_nothing()
        if self._rules is not None:
            kernel_walls.keep_to(self._rules)
        if self._filter is not None:
            kernel_walls.filter_calls(self._filter)

    def forget(self) -> None:
        """Close what the parent holds of it."""
        if self._rules is not None:
            os.close(self._rules)
            self._rules = None


def _allowed(ground: ProgramPaths) -> Iterator[tuple[Path, int]]:
    for system in (*_SYSTEM, sys.prefix, sys.base_prefix, sys.exec_prefix):
        yield Path(system), READ
    for open_to_all in ("/dev", "/proc"):  # what others have there is kept by the kernel's own checks
        yield Path(open_to_all), DEVICES
    yield Path("/dev/shm"), ALL  # noqa: S108  # shared memory of ranks
    for path in _code():
        yield from _without(path, ground.home)
    for path in ground.reads:
        yield path, READ
    for path in ground.writes:
        yield path, ALL


def _code() -> Iterable[Path]:
    """Where our modules and the libraries are found. Others, such as the folder we were started in, are not theirs."""
    entries = {Path(entry).resolve() for entry in sys.path if entry}
    return {entry for entry in entries if entry.name in _LIBRARIES or os.path.isdir(entry / "worker/train")}


def _without(folder: Path, home: Path | None) -> Iterator[tuple[Path, int]]:
    """The folder and all below it, except the hidden paths and the home: an installation may lie in its checkout."""
    try:
        children = list(folder.iterdir())
    except OSError:  # a zip file, or closed to us
        yield folder, READ
        return
    yield folder, LIST
    if folder == home:
        yield from ((folder / name, READ) for name in ("worker", "shared"))
        return
    for child in children:
        if child.name.startswith(".") or child == home:
            continue
        if home is not None and home.is_relative_to(child):
            yield from _without(child, home)
        else:
            yield child, READ
