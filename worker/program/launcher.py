"""Starts a trainer as its own process group, asks it to stop, and proves it dead. No database, no queue, no store."""

from __future__ import annotations

import contextlib
import math
import os
import resource
import signal
import subprocess
import sys
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Final, Protocol

import psutil

from shared.contract.handover import ARGUMENT
from shared.contract.spec import Placement
from shared.errors import Unavailable
from shared.operating.isolation import Company, Isolation, ProgramPaths, Walls
from shared.settings import trainer_environment
from worker.program import hostile_folder, kernels, native_memory, processes, temporary
from worker.program.printed import FirstBytes, LogSink, PrintedLog
from worker.program.processes import Tag

# How often a thread looks at a barrier before it sleeps. Spinning for long (libgomp's default, 300,000) keeps the one
# that is waited for off its core as soon as anything else runs here; sleeping at once costs every barrier a wake-up.
# Measured on 2 cores, tokens/s of a QLoRA step alone and beside one busy process: sleeping 300 and 295, 1,000 spins 337
# and 252, 10,000 spins 420 and 152, 50,000 spins 385 and 71.
SPINS: Final = "10000"
# Processes and threads of the trainers' user: 8 ranks with 500 threads each, and as many again.
PROCESSES: Final = 8192
CORES: Final = os.cpu_count() or 1
LOOPBACK: Final = "127.0.0.1"
OPEN_FILES: Final = 65536
GANG: Final = "worker.train.gang"  # torchrun, with the exit codes of the trainer contract
# Through which interface ranks talk to those of other hosts. Left alone, gloo takes the one that the host's own name
# resolves to, which on Debian is the loopback.
TALK_THROUGH: Final = ("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME")


# Passes have unlike lengths, and segments of fixed sizes leave gaps between them. What the host says wins.
ALLOCATOR: Final = {"PYTORCH_ALLOC_CONF": "expandable_segments:True"}
_ALLOCATORS: Final = ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF")

NO_WALLS: Final = Isolation()


@dataclass(frozen=True, slots=True)
class Meeting:
    """Where the hosts of one attempt meet: the first host listens there, and every host has its number."""

    name: str  # job and fence, fit for a file name: hosts of another attempt that still knock are not let in
    address: str
    port: int
    node: int


def command(
    module: str,
    *,
    placement: Placement,
    spec_file: Path,
    out: Path,
    meeting: Meeting | None = None,
    gang: str = GANG,
    python: str = sys.executable,
) -> list[str]:
    """The argv of a trainer on this host. Pure.

    `-X faulthandler`: a stuck trainer answers SIGABRT with the stacks of all its threads.

    Raises:
        Unavailable: a placement over several hosts without a meeting point.
    """
    run = [python, "-X", "faulthandler", "-m"]
    what = [module, str(spec_file), str(out)]
    if placement.strategy == "single":
        return [*run, *what]
    return [*run, gang, *_meet(placement, meeting), f"--nproc-per-node={placement.gpus}", "--module", *what]


def command_ahead(module: str, *, channel: int, held: Path | None = None, python: str = sys.executable) -> list[str]:
    """The argv of a trainer that works alone and hears of its work over the descriptor `channel`. Pure.

    `held`: the file that names the base model which it is to hold until then.
    """
    return [python, "-X", "faulthandler", "-m", module, ARGUMENT, str(channel), *([] if held is None else [str(held)])]


def _meet(placement: Placement, meeting: Meeting | None) -> list[str]:
    """torchrun's rendezvous: a private port on one host; over several, the first host's."""
    if placement.nodes == 1:
        # The host's own name may lead to a network that is not there.
        return ["--standalone", f"--local-addr={LOOPBACK}"]
    if meeting is None:
        raise Unavailable(f"A job over {placement.nodes} hosts needs a meeting point, and its lease names none.")
    return [
        f"--nnodes={placement.nodes}",
        f"--node-rank={meeting.node}",
        f"--master-addr={meeting.address}",
        f"--master-port={meeting.port}",
        f"--rdzv-id={meeting.name}",
    ]


def environment(
    *,
    tag: Tag,
    device_ids: tuple[str, ...],
    kind: str,
    threads: int,
    scratch: Path,
    interface: str | None = None,
) -> dict[str, str]:
    """What a trainer may know of its surroundings: devices, tag, a home of its own, a way to other hosts."""
    uuids = [device_id.split(":", 1)[1] for device_id in device_ids]
    # HIP heeds CUDA's variable as well, and an empty one hides everything: each kind gets its own and no other.
    visible = "ROCR_VISIBLE_DEVICES" if kind == "rocm" else "CUDA_VISIBLE_DEVICES"
    ours = trainer_environment(
        **{processes.TAG: str(tag), processes.DEVICES_TAG: ",".join(device_ids)},
        **{visible: "" if kind == "cpu" else ",".join(uuids)},
        OMP_NUM_THREADS=str(threads),
        GOMP_SPINCOUNT=SPINS,
        TOKENIZERS_PARALLELISM="false",
        PYTHONFAULTHANDLER="1",  # for ranks, whose argv is torchrun's
        HOME=str(scratch),
        USER="trainer",  # who has no entry in the host's list of users; libraries that compile ask for a name
        HF_HOME=str(scratch / "hf"),
        **kernels.variables(scratch),
        **({} if interface is None else dict.fromkeys(TALK_THROUGH, interface)),
    )
    return ours if kind != "cuda" or not ours.keys().isdisjoint(_ALLOCATORS) else {**ours, **ALLOCATOR}


@dataclass(frozen=True, slots=True)
class Exit:
    """How a program ended. `code` is negative for a signal, as subprocess counts, and settled for want of memory."""

    code: int
    last_words: str

    @property
    def crash_code(self) -> str:
        """The code of the error where the program ended without saying why."""
        return "trainer_killed" if self.code == -signal.SIGKILL else "trainer_crashed"

    @property
    def crash_sentence(self) -> str:
        """The message to the user in that case."""
        if self.code == -signal.SIGKILL:
            return "The trainer was killed from outside, most likely by the system for lack of memory."
        how = f"signal {signal.Signals(-self.code).name}" if self.code < 0 else f"exit code {self.code}"
        return f"The trainer ended unexpectedly with {how}."


class Watched(Protocol):
    """What a supervisor watches: a `Trainer` of its own, or its attempt's part of a program that others share."""

    def poll(self) -> int | None: ...

    def ask_to_stop(self) -> None: ...

    def end(self, *, grace_seconds: float) -> Exit: ...

    def abort(self) -> Exit: ...


class Trainer:
    """A running trainer and everything it has forked."""

    def __init__(
        self,
        process: subprocess.Popen[bytes],
        *,
        tag: Tag,
        out: Path,
        log_file: Path | LogSink,
        temporary_files: Path,
        spared: frozenset[psutil.Process] | None,
    ) -> None:
        self._spared = spared
        self._process = process
        self._tag = tag
        self._out = out
        self._temporary_files = temporary_files
        assert process.stdout is not None
        self._log = PrintedLog(process.stdout, FirstBytes(log_file) if isinstance(log_file, Path) else log_file)
        self._log.start()

    @property
    def pid(self) -> int:
        return self._process.pid

    def log_to(self, sink: LogSink) -> None:
        """From now on `sink` takes what it prints, and first what it has printed before."""
        self._log.hand_to(sink)

    def poll(self) -> int | None:
        """The exit code, or None while it runs."""
        return self._process.poll()

    def ask_to_stop(self) -> None:
        """Ask for checkpoint-and-stop. A file: every rank sees it, and a launcher in between passes nothing on."""
        hostile_folder.touch(self._out, "stop")

    def end(self, *, grace_seconds: float) -> Exit:
        """TERM to the group, KILL after `grace_seconds`; returns once nothing of it lives. Raises StillAlive."""
        if self.poll() is None:
            self._signal(signal.SIGTERM)
            with contextlib.suppress(subprocess.TimeoutExpired):
                self._process.wait(grace_seconds)
        return self._kill_and_drain()

    def abort(self, *, grace_seconds: float = 3.0) -> Exit:
        """Have a stuck trainer write its stacks to its log, then as `end`. Raises StillAlive."""
        if self.poll() is None:
            # A stopped process gets no signal but KILL and CONT.
            self._signal(signal.SIGCONT)
            self._signal(signal.SIGABRT)
            with contextlib.suppress(subprocess.TimeoutExpired):
                self._process.wait(grace_seconds)
        return self._kill_and_drain()

    def _kill_and_drain(self) -> Exit:
        if self.poll() is None:
            self._signal(signal.SIGKILL)
        with processes.owned(self.pid):
            processes.kill_strays(self._tag, spared=self._spared)
            code = self._process.wait(10)
        temporary.remove(self._temporary_files)
        self._log.join(2)
        last_words = self._log.tail()
        return Exit(native_memory.settled_code(code, last_words), last_words)

    def _signal(self, number: signal.Signals) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.pid, number)


def start(
    argv: list[str],
    *,
    environment: dict[str, str],
    tag: Tag,
    out: Path,
    more_outs: tuple[Path, ...] = (),
    log_file: Path | LogSink,
    uid: int | None = None,
    cpu_seconds: float | None = None,
    isolation: Isolation = NO_WALLS,
    company: Company = "alone",
    reads: tuple[Path, ...] = (),
    home: Path | None = None,
    keep_open: tuple[int, ...] = (),
    only_child: bool = True,
) -> Trainer:
    """Run `argv` as the leader of its own process group; the kernel kills it when this process dies.

    `more_outs`: what it writes besides. `log_file`: takes its first megabytes of output, or whoever keeps it.
    `cpu_seconds`: the most that each process of it may compute, all its threads together; then the kernel kills it.
    `isolation`: what the host gives; `reads`: what the program may read beside its folder and our code, were it below
    `home`; it sees nothing else of it.
    `keep_open`: file descriptors that it gets, under their own numbers.
    `only_child`: this process starts no others meanwhile, so what has descended from it since dies with the program.

    Raises OSError.
    """
    spared = processes.descendants(tag) if only_child else None
    temporary_files = temporary.folder(out, tag)
    temporary.make(temporary_files, uid=uid)
    walls = Walls(isolation, company, ProgramPaths(writes=(out, temporary_files, *more_outs), reads=reads, home=home))
    try:
        process = subprocess.Popen(
            argv,
            cwd=out,
            env={**environment, "TMPDIR": str(temporary_files)},
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            start_new_session=True,
            # A few system calls and no lock; a wrapper program would cost a second interpreter.
            preexec_fn=partial(
                _prepare, walls, uid=uid, parent=os.getpid(), limits=_limits(out, uid=uid, cpu_seconds=cpu_seconds)
            ),
            umask=0o077,
            pass_fds=keep_open,
        )
    finally:
        walls.forget()
    processes.give_up_first(process.pid)
    return Trainer(process, tag=tag, out=out, log_file=log_file, temporary_files=temporary_files, spared=spared)


def _prepare(walls: Walls, *, uid: int | None, parent: int, limits: list[tuple[int, int]]) -> None:
    """What the child does before it becomes the program."""
    processes.own_signals()
    walls.leave_network()
    if uid is not None:
        os.setgroups([])
        os.setgid(uid)
        os.setuid(uid)
    # After setuid: changing user clears the death signal (prctl(2)).
    processes.die_with_parent(parent)
    for limit, most in limits:
        resource.setrlimit(limit, (most, most))
    walls.close()


def _limits(out: Path, *, uid: int | None, cpu_seconds: float | None) -> list[tuple[int, int]]:
    """(resource, the most of it) of a program that writes to `out`."""
    limits = [
        (resource.RLIMIT_CORE, 0),
        (resource.RLIMIT_NOFILE, _most_open_files()),
        (resource.RLIMIT_FSIZE, _most_of_one_file(out)),
    ]
    if uid is not None:  # counted per user: our own may run much else
        limits.append((resource.RLIMIT_NPROC, PROCESSES))
    if cpu_seconds is not None:
        limits.append((resource.RLIMIT_CPU, math.ceil(cpu_seconds)))
    return limits


def _most_of_one_file(out: Path) -> int:
    """The largest file allowed: the size of the file system, or the limit here if that is smaller."""
    disk = os.statvfs(out)
    _, most = resource.getrlimit(resource.RLIMIT_FSIZE)
    size = disk.f_blocks * disk.f_frsize
    return size if most == resource.RLIM_INFINITY else min(size, most)


def _most_open_files() -> int:
    """No descriptor table of a program fills the kernel's memory."""
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    return OPEN_FILES if most == resource.RLIM_INFINITY else min(OPEN_FILES, most)
