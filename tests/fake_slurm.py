"""sbatch, squeue, sacct and scancel without Slurm: they take the real ones' options and answer in their words.

In a test's own process a `FakeSlurm` stands in for `subprocess.run`. As programs, `python tests/fake_slurm.py STATE
PROGRAM …` keep their jobs in the file STATE. What each program does wrong is its weather:

    down          it says that slurmctld does not answer
    hang          it never answers
    lost          it obeys, and its answer is lost (sbatch)
    empty         it answers that there is nothing
    garbage       it answers what nobody can read
    refuse WORDS  it says no in these words
"""

from __future__ import annotations

import fcntl
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

DOWN = {
    "sbatch": "sbatch: error: Batch job submission failed: Unable to contact slurm controller (connect failure)\n",
    "squeue": "slurm_load_jobs error: Unable to contact slurm controller (connect failure)\n",
    "sacct": "sacct: error: slurm_persist_conn_open_without_init: failed to open persistent connection to host\n",
    "scancel": "scancel: error: Kill job error on job id 1: Unable to contact slurm controller (connect failure)\n",
}
# With a value (=) or without; the manual pages know more, we use these.
KNOWN = {
    "sbatch": {
        *("--output=", "--chdir=", "--gres=", "--parsable", "--nodes=", "--ntasks=", "--no-requeue", "--export="),
        *("--signal=", "--job-name=", "--partition=", "--time=", "--account="),
    },
    "squeue": {"--me", "--noheader", "--format="},
    "sacct": {"--parsable2", "--noheader", "--allocations", "--format=", "--starttime=", "--name="},
    "scancel": {"--state="},
}
LISTED = {"PENDING", "CONFIGURING", "RUNNING", "COMPLETING"}


@dataclass
class FakeJob:
    number: int
    name: str
    script: str
    options: dict[str, str]
    state: str = "PENDING"
    reason: str = "Priority"
    nodes: str = ""
    code: str = "0:0"
    pid: int | None = None


@dataclass
class FakeSlurm:
    """What slurmctld and slurmdbd know."""

    jobs: dict[int, FakeJob] = field(default_factory=dict)
    weather: dict[str, str] = field(default_factory=dict)
    asked: list[list[str]] = field(default_factory=list)

    # --- as `subprocess.run` ----------------------------------------------------------------------------------------

    def __call__(self, command: list[str], *, timeout: float = 30, **more: Any) -> subprocess.CompletedProcess[str]:
        program = Path(command[0]).name
        done = self.answer(program, command[1:], more.get("input", ""))
        if done is None:
            raise subprocess.TimeoutExpired(command, timeout)
        return subprocess.CompletedProcess(command, *done)

    def answer(self, program: str, arguments: list[str], script: str) -> tuple[int, str, str] | None:
        """(exit code, stdout, stderr); None: never."""
        self.asked.append([program, *arguments])
        options, words = _parsed(arguments)
        strange = {*options} - {option.rstrip("=") for option in KNOWN[program]}
        if strange:
            return 1, "", f"{program}: unrecognized option '{min(strange)}'\n"
        weather, _, said = self.weather.get(program, "").partition(" ")
        if weather == "hang":
            return None
        if weather == "down":
            return 1, "", DOWN[program]
        if weather == "refuse":
            return 1, "", f"{program}: error: {said}\n"
        if weather in ("empty", "garbage"):
            return 0, "" if weather == "empty" else "\x1b[1mPlease|change your password\n", ""
        done: tuple[int, str, str] = getattr(self, program)(options, words, script)
        return None if weather == "lost" else done

    def sbatch(self, options: dict[str, str], _words: list[str], script: str) -> tuple[int, str, str]:
        if not script.startswith("#!"):
            return 1, "", "sbatch: error: This does not look like a batch script.\n"
        number = max(self.jobs, default=1000) + 1
        self.jobs[number] = FakeJob(number, options["--job-name"], script, options)
        return 0, f"{number}\n", ""

    def squeue(self, options: dict[str, str], _words: list[str], _script: str) -> tuple[int, str, str]:
        lines = []
        for job in reversed(self.jobs.values()):
            line = options["--format"]
            for letter, value in zip(
                "iTNrj", (str(job.number), job.state, job.nodes, job.reason, job.name), strict=True
            ):
                line = line.replace(f"%{letter}", value)
            lines += [line] if job.state in LISTED else []
        return 0, "".join(f"{line}\n" for line in lines), ""

    def sacct(self, options: dict[str, str], _words: list[str], _script: str) -> tuple[int, str, str]:
        def row(job: FakeJob) -> str:
            known = {"JobIDRaw": str(job.number), "State": job.state, "ExitCode": job.code, "JobName": job.name}
            known["NodeList"] = job.nodes or "None assigned"
            return "|".join(known[name] for name in options["--format"].split(","))

        return 0, "".join(f"{row(job)}\n" for job in self.jobs.values() if job.name == options["--name"]), ""

    def scancel(self, options: dict[str, str], words: list[str], _script: str) -> tuple[int, str, str]:
        job = self.jobs.get(int(words[0]))
        if job is None or job.state not in LISTED:
            return 1, "", f"scancel: error: Kill job error on job id {words[0]}: Invalid job id specified\n"
        if options.get("--state", job.state) == job.state:
            self.end(job, "CANCELLED by 1000", signal.SIGTERM)
        return 0, "", ""

    # --- what happens in the cluster --------------------------------------------------------------------------------

    def of(self, name: str) -> list[FakeJob]:
        return [job for job in self.jobs.values() if job.name == name]

    def wait(self, reason: str) -> None:
        for job in self.jobs.values():
            job.reason = reason

    def begin(self, job: FakeJob) -> None:
        job.state, job.nodes, job.reason = "RUNNING", "gpu-node-7", "None"

    def end(self, job: FakeJob, state: str, number: signal.Signals | None = None, *, code: str = "0:0") -> None:
        job.state, job.code = state, code
        if job.pid is not None and number is not None:
            os.killpg(job.pid, number)


def _parsed(arguments: list[str]) -> tuple[dict[str, str], list[str]]:
    options, words = dict[str, str](), list[str]()
    for argument in arguments:
        if argument.startswith("-"):
            name, _, value = argument.partition("=")
            options[name] = value
        else:
            words.append(argument)
    return options, words


# --- as programs -----------------------------------------------------------------------------------------------------


@contextmanager
def kept(state: Path) -> Iterator[FakeSlurm]:
    """The cluster of a file, for as long as nobody else has it."""
    with state.open("a+") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        file.seek(0)
        known = json.loads(file.read() or '{"jobs": [], "weather": {}}')
        slurm = FakeSlurm({job["number"]: FakeJob(**job) for job in known["jobs"]}, known["weather"])
        yield slurm
        file.truncate(0)
        file.write(json.dumps({"jobs": [asdict(job) for job in slurm.jobs.values()], "weather": slurm.weather}))


def programs(folder: Path, state: Path) -> Path:
    """A folder with the four programs, which are about this state."""
    folder.mkdir()
    for name in KNOWN:
        path = folder / name
        path.write_text(f'#!/bin/sh\nexec {sys.executable} {Path(__file__).resolve()} {state} {name} "$@"\n')
        path.chmod(0o755)
    return folder


def main(state: Path, program: str, arguments: list[str]) -> int:
    script = sys.stdin.read() if program == "sbatch" else ""
    with kept(state) as slurm:
        done = slurm.answer(program, arguments, script)
    while done is None:
        time.sleep(60)
    sys.stdout.write(done[1])
    sys.stderr.write(done[2])
    return done[0]


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1]), sys.argv[2], sys.argv[3:]))
