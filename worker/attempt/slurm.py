"""Slurm as a cluster: sbatch, squeue, sacct and scancel, asked as programs.

Written against the manual pages of Slurm 20.02 and later: `sbatch --parsable`, `squeue --me --format`, `sacct
--parsable2`. Text and not `--json`, whose shape changes with each release (data_parser) and which may not be built in.
"""

from __future__ import annotations

import re
import shlex
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Final

from shared.jobs.cluster_attempts import read_name
from shared.settings import Settings, program_environment
from worker.attempt.engines import ClusterJobEnd, ClusterJobRequest, ClusterJobState, EngineAway, EngineRefused

# A trainer has this long for its checkpoint when the time limit comes (sbatch's --signal).
SIGNAL_SECONDS: Final = 120
HISTORY: Final = "now-30days"
_QUEUE_FORMAT: Final = "%i|%T|%N|%r|%j"
_ACCOUNT_FORMAT: Final = "JobIDRaw,State,ExitCode,NodeList,JobName"
_ID: Final = re.compile(r"([0-9]{1,12})(?:;\S*)?")
# Of squeue's %T ("JOB STATE CODES"); every other state that it lists has a node.
_WAITS: Final = frozenset({"PENDING", "REQUEUED", "REQUEUE_HOLD", "REQUEUE_FED", "SPECIAL_EXIT", "RESV_DEL_HOLD"})
_ALIVE: Final = _WAITS | {"RUNNING", "CONFIGURING", "COMPLETING", "SUSPENDED", "STOPPED", "SIGNALING", "STAGE_OUT"}
_OVER: Final = frozenset(
    {"BOOT_FAIL", "CANCELLED", "COMPLETED", "DEADLINE", "FAILED", "NODE_FAIL", "OUT_OF_MEMORY", "PREEMPTED", "REVOKED"}
    | {"TIMEOUT", "LAUNCH_FAILED", "RECONFIG_FAIL"}
)
# What sbatch says when slurmctld does not answer or asks for patience (slurm_errno.h): nothing is refused by that.
_AWAY_WORDS: Final = re.compile(
    r"unable to contact|connection (refused|reset|timed out)|socket timed out|zero bytes|communication"
    r"|backup mode|temporarily unable|transaction|munge|credential",
    re.IGNORECASE,
)

Run = Callable[..., "subprocess.CompletedProcess[str]"]


class Slurm:
    """The Slurm cluster that this host submits to, as the user that this process is."""

    label = "Slurm"

    def __init__(self, settings: Settings, *, run: Run = subprocess.run) -> None:
        self._settings = settings
        self._run = run

    def submit(self, order: ClusterJobRequest) -> str:
        """See `Engine`. The batch script is all that Slurm gets: no environment of ours, hence no secret."""
        done = self._ask("sbatch", *self._options(order), script=batch_script(self._settings, order.name))
        if done.returncode != 0:
            words = _words(done.stderr) or f"sbatch ended with {done.returncode}"
            raise EngineAway(words) if _AWAY_WORDS.search(done.stderr) else EngineRefused(words)
        match = _ID.fullmatch(done.stdout.strip())
        if match is None:
            raise EngineAway(f"sbatch answered '{_words(done.stdout)}' instead of a number")
        return match[1]

    def _options(self, order: ClusterJobRequest) -> list[str]:
        """The operator's, then those that must hold: of an option that is given twice sbatch takes the second."""
        kind, gres = self._settings.cluster_device_kind, self._settings.slurm_gres
        return [
            *("--output=/dev/null", "--chdir=/"),
            *shlex.split(self._settings.slurm_options),
            *(("--gres=" + gres.replace("{count}", str(order.devices)),) if kind != "cpu" else ()),
            *("--parsable", "--nodes=1", "--ntasks=1", "--no-requeue", "--export=NIL"),
            *(f"--signal=B:TERM@{SIGNAL_SECONDS}", f"--job-name={order.name}"),
        ]

    def listed(self) -> list[ClusterJobState]:
        done = self._ask("squeue", "--me", "--noheader", f"--format={_QUEUE_FORMAT}")
        if done.returncode != 0:
            raise EngineAway(_words(done.stderr) or f"squeue ended with {done.returncode}")
        lines = [line for line in done.stdout.splitlines() if line.strip()]
        rows = [parts for line in lines if len(parts := line.strip().split("|", 4)) == 5]
        if lines and not rows:
            raise EngineAway(f"squeue answered '{_words(done.stdout)}' instead of a list")
        # This user's own arrays ("1234_[1-9]") are none of ours.
        sights = [sight for row in rows if row[0].isdecimal() and (sight := _sight(*row)) is not None]
        return sorted(sights, key=lambda sight: int(sight.id))

    def fate(self, name: str) -> ClusterJobEnd:
        """See `Engine`. Where no accounting is kept, nothing is known of what squeue has forgotten."""
        done = self._ask(
            "sacct",
            *("--parsable2", "--noheader", "--allocations", f"--format={_ACCOUNT_FORMAT}"),
            *(f"--starttime={HISTORY}", f"--name={name}"),
        )
        if done.returncode != 0:
            return ClusterJobEnd("unknown", _words(done.stderr) or f"sacct ended with {done.returncode}")
        rows = [line.split("|", 4) for line in done.stdout.splitlines()]
        ours = [row for row in rows if len(row) == 5 and row[0].isdecimal() and row[4] == name]
        if not ours:
            return ClusterJobEnd("unknown", "sacct has no such job")
        number, state, code, nodes, _ = max(ours, key=lambda row: int(row[0]))
        return _fate(number, state, code, nodes)

    def withdraw(self, sight: ClusterJobState) -> None:
        only = ("--state=PENDING",) if sight.waits else ()
        done = self._ask("scancel", *only, sight.id)
        if done.returncode != 0 and "invalid job id" not in done.stderr.lower():
            raise EngineAway(_words(done.stderr) or f"scancel ended with {done.returncode}")

    def _ask(self, program: str, *arguments: str, script: str = "") -> subprocess.CompletedProcess[str]:
        folder: Path | None = self._settings.slurm_bin
        command = [program if folder is None else str(folder / program), *arguments]
        try:
            return self._run(
                command,
                input=script,
                capture_output=True,
                text=True,
                errors="replace",
                timeout=self._settings.cluster_command_seconds,
                env=program_environment(),
                check=False,
            )
        except subprocess.TimeoutExpired as error:
            raise EngineAway(f"{program} gave no answer for {self._settings.cluster_command_seconds:g} s") from error
        except OSError as error:
            raise EngineAway(f"{program} cannot be started: {error.strerror}") from error


def batch_script(settings: Settings, name: str) -> str:
    """What Slurm runs on the node. The shell becomes our process, so that Slurm's TERM reaches it."""
    setup = [f"set -a; . {settings.slurm_setup}; set +a"] if settings.slurm_setup else []
    return "\n".join(["#!/bin/sh", "set -e", *setup, f"exec {settings.slurm_command} worker --attempt {name}", ""])


def _sight(number: str, state: str, nodes: str, reason: str, name: str) -> ClusterJobState | None:
    """A line of squeue; None where it is none of ours, or over."""
    if read_name(name) is None or state in _OVER:
        return None
    waits = state in _WAITS
    more = f" ({reason})" if waits and reason not in ("", "None") else f" on {nodes}" if nodes else ""
    return ClusterJobState(id=number, name=name, waits=waits, words=f"job {number} is {state}{more}")


def _fate(number: str, state: str, code: str, nodes: str) -> ClusterJobEnd:
    word = (state.split() or ["UNKNOWN"])[0]  # "CANCELLED by 1000"
    words = f"job {number} was {state}" + (f" on {nodes}" if nodes not in ("", "None assigned") else "")
    if word in _ALIVE:
        return ClusterJobEnd("alive", f"job {number} is {state}, says sacct, and squeue does not list it")
    if word == "PREEMPTED":
        return ClusterJobEnd("taken", words)
    return ClusterJobEnd("ended", f"{words}, exit code {code}") if word in _OVER else ClusterJobEnd("unknown", words)


def _words(text: str) -> str:
    """The line of a program's output that names the error, else its first line; short enough for an event."""
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    line = next((line for line in reversed(lines) if "error" in line.lower()), lines[0] if lines else "")
    return re.sub(r"[^\x20-\x7e]", "?", line)[:200]
