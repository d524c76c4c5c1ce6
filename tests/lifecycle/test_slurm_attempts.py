"""A job's life through a cluster with real processes: dispatcher, Slurm's programs (fakes), a worker of one attempt."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from shared.jobs.cluster_attempts import attempt_name
from shared.settings import child_environment
from tests.fake_slurm import kept, programs
from tests.forked import run_forked
from tests.lifecycle.stack import ROOT, Servers, Stack, chain_of, open_stack, until
from tests.patience import patience


@dataclass
class Node:
    """The machine that runs what is submitted, when the test lets it."""

    stack: Stack
    state: Path
    processes: list[subprocess.Popen[bytes]] = field(default_factory=list)

    def begin(self, job_id: str, number: int = 1) -> subprocess.Popen[bytes]:
        """Start the batch script of an attempt, once it is submitted."""
        name = attempt_name(job_id, number)
        until(lambda: self._scripts(name), what=f"{name} is submitted")
        with kept(self.state) as slurm, (self.stack.home / "node.log").open("ab") as log:
            (job,) = slurm.of(name)
            process = subprocess.Popen(
                ["/bin/sh"],
                cwd=ROOT,
                env=child_environment(**self.stack.environment),
                stdin=subprocess.PIPE,
                stdout=log,
                stderr=log,
                start_new_session=True,
            )
            self.processes.append(process)
            assert process.stdin is not None
            process.stdin.write(job.script.encode())
            process.stdin.close()
            slurm.begin(job)
            job.pid = process.pid
        return process

    def _scripts(self, name: str) -> bool:
        with kept(self.state) as slurm:
            return bool(slurm.of(name))

    def end(self, process: subprocess.Popen[bytes], state: str) -> int:
        code = process.wait(patience(40))
        with kept(self.state) as slurm:
            (job,) = (job for job in slurm.jobs.values() if job.pid == process.pid)
            slurm.end(job, state)
        return code

    def stop(self) -> None:
        for process in self.processes:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait(patience(20))


@pytest.fixture(scope="module")
def node(servers: Servers, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Node]:
    home = tmp_path_factory.mktemp("cluster")
    state, command = home / "slurm.json", home / "tunepool-server"
    # The real command changes to its home; the fake trainer is found from the root of the repository.
    command.write_text(f'#!/bin/sh\nexec {sys.executable} -m worker.attempt.handed_over "$3"\n')
    command.chmod(0o755)
    cluster = {
        "TUNEPOOL_LAUNCHER": "slurm",
        "TUNEPOOL_SLURM_BIN": str(programs(home / "bin", state)),
        "TUNEPOOL_SLURM_COMMAND": str(command),
        "TUNEPOOL_CLUSTER_DEVICE_KIND": "cpu",
        "TUNEPOOL_CLUSTER_DEVICE_BYTES": str(8 * 2**30),
        "TUNEPOOL_CLUSTER_NODES": "2",
        "TUNEPOOL_CLUSTER_LOOK_SECONDS": "0.5",
        "TUNEPOOL_CLUSTER_COMMAND_SECONDS": str(patience(10)),
    }
    with open_stack(home / "stack", servers, **cluster) as stack:
        stack.start_worker()
        stack.start_janitor()
        stack.start(["-m", "worker.attempt.dispatcher"], name="dispatcher")
        stack.wait_for_worker(devices=2)
        made = Node(stack, state)
        yield made
        made.stop()
        broken = stack.broken_invariants()
        trainers = stack.trainers()
    assert broken == []
    assert trainers == [], "a trainer outlived its cluster's job"


def test_a_job_trains_on_the_machine_that_slurm_gives_and_goes_on_after_an_eviction_from_its_checkpoint(
    node: Node,
) -> None:
    stack = node.stack
    job_id = stack.submit("steps=20 save=5 step_seconds=0.2 hold=12 once")
    process = node.begin(job_id)
    stack.wait_for_step(job_id, 7)

    os.killpg(process.pid, signal.SIGTERM)  # a preemption: to every process of the job, the trainer too
    assert node.end(process, "PREEMPTED") == 0

    first = stack.attempts(job_id)[0]
    assert (first.outcome, stack.job(job_id).failures) == ("preempted", 0)
    process = node.begin(job_id, 2)
    job = stack.wait(job_id, seconds=60)
    assert job.status == "succeeded", job.error
    assert stack.chain(job.manifest) == chain_of(20)
    told = [event.message for event in stack.events(job_id)]
    assert any(message.startswith("Resuming from the checkpoint of step") for message in told)
    assert node.end(process, "COMPLETED") == 0
    attempts = Path(stack.environment["TUNEPOOL_HOME"]) / "attempts"
    assert list(attempts.iterdir()) == []


def test_a_cancel_reaches_the_machine_of_the_cluster(node: Node) -> None:
    job_id = node.stack.submit("steps=1000 step_seconds=0.2")
    process = node.begin(job_id)
    node.stack.wait_for_step(job_id, 2)

    node.stack.cancel(job_id)

    assert node.stack.wait(job_id).status == "cancelled"
    assert node.end(process, "COMPLETED") == 0


def test_a_machine_that_dies_is_noticed_and_its_job_is_submitted_again(node: Node) -> None:
    job_id = node.stack.submit("steps=10 save=2 step_seconds=0.2")
    process = node.begin(job_id)
    node.stack.wait_for_step(job_id, 3)

    os.killpg(process.pid, signal.SIGKILL)
    node.end(process, "NODE_FAIL")

    process = node.begin(job_id, 2)
    assert node.stack.wait(job_id, seconds=60).status == "succeeded"
    assert [row.outcome for row in node.stack.attempts(job_id)] == ["lost", "succeeded"]
    assert node.end(process, "COMPLETED") == 0


def test_a_second_process_of_an_attempt_ends_in_silence(node: Node) -> None:
    job_id = node.stack.submit("steps=60 step_seconds=0.2")
    process = node.begin(job_id)
    node.stack.wait_for_step(job_id, 2)

    elsewhere = node.stack.environment | {"TUNEPOOL_HOME": str(node.stack.home / "elsewhere")}
    twin = run_forked(
        ["-m", "worker.attempt.handed_over", attempt_name(job_id, 1)],
        environment=child_environment(**elsewhere),
        seconds=patience(60),
    )

    assert (twin.returncode, "handover.nothing_to_do" in twin.stdout + twin.stderr) == (0, True)
    assert node.stack.wait(job_id, seconds=60).status == "succeeded"
    assert len(node.stack.attempts(job_id)) == 1
    assert node.end(process, "COMPLETED") == 0
