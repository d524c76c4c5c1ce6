"""Jobs on several hosts: two workers of one machine, each with a home and a device of its own, as two hosts."""

from __future__ import annotations

import re
import signal
import subprocess
from collections.abc import Iterator

import psutil
import pytest
from sqlalchemy import select
from sqlalchemy.orm import Session

from shared.jobs import moves
from shared.store.db import session_scope
from shared.store.tables import DeviceRow, MemberRow
from tests import living
from tests.factories import claim_on, make_worker, verdict_of
from tests.lifecycle.stack import Servers, Stack, chain_of, open_stack, until
from tests.patience import patience

ON_TWO = {"strategy": "ddp", "gpus": 1, "nodes": 2}


def start_host(stack: Stack, number: int, **environment: str) -> subprocess.Popen[bytes]:
    slot = {"TUNEPOOL_CPU_SLOTS": "2", "TUNEPOOL_DEVICES": f"cpu-{number}", "TUNEPOOL_HEARTBEAT_SECONDS": "1"}
    return stack.start_worker(home=f"host-{number}", **slot, **environment)


@pytest.fixture(scope="module")
def pair(servers: Servers, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stack]:
    """Two hosts and a janitor at work, shared by the tests that leave them alive."""
    with open_stack(tmp_path_factory.mktemp("pair"), servers) as made:
        for number in (0, 1):
            start_host(made, number)
        made.start_janitor()
        made.wait_for_worker(devices=2)
        yield made
        broken = made.broken_invariants()
    assert broken == []


def members(stack: Stack, job_id: str) -> list[MemberRow]:
    query = select(MemberRow).where(MemberRow.job_id == job_id).order_by(MemberRow.number, MemberRow.node)
    with Session(stack.engine) as session:
        return list(session.scalars(query))


def leased(stack: Stack) -> list[str]:
    with Session(stack.engine) as session:
        return list(session.scalars(select(DeviceRow.id).where(DeviceRow.leased_by.is_not(None))))


def ranks(stack: Stack) -> dict[str, psutil.Process]:
    """The fake ranks that run now, by their number."""
    found = {}
    for process in stack.trainers():
        number = re.search(r"--node-rank=(\d)", " ".join(living.words(process)))
        if number is not None:
            found[number[1]] = process
    return found


def supervisor(rank: psutil.Process) -> psutil.Process:
    return psutil.Process(int(living.tag(rank).split("/")[2]))


def outcomes(stack: Stack, job_id: str) -> list[tuple[str | None, str | None]]:
    return [(row.outcome, row.error and row.error["code"]) for row in stack.attempts(job_id)]


def test_a_job_on_two_hosts_leases_both_meets_and_is_published_once(pair: Stack) -> None:
    job_id = pair.submit("steps=20 step_seconds=0.05 save=10 hold=10", placement=ON_TWO)
    pair.wait_for_step(job_id, 3)
    held, attempt = leased(pair), pair.attempts(job_id)[0]
    pair.let_go_on(job_id)
    job = pair.wait(job_id)

    assert job.status == "succeeded", job.error
    assert pair.chain(job.manifest) == chain_of(20)
    assert sorted(attempt.device_ids) == sorted(held)
    assert len(held) == 2
    (member,) = members(pair, job_id)
    assert (member.node, member.phase, member.exit_code, member.error) == (1, "ended", 0, None)
    assert attempt.worker_id != member.worker_id
    assert re.fullmatch(rf"{job_id}-{attempt.fence}-[0-9a-f]{{16}}", attempt.meeting["name"])
    assert leased(pair) == []
    assert pair.trainers() == []
    seconds = (pair.attempts(job_id)[0].ended_at - attempt.started_at).total_seconds()
    assert job.device_seconds == pytest.approx(2 * seconds, rel=1e-3)


def test_cancel_ends_the_ranks_of_all_hosts_before_it_frees_their_devices(pair: Stack) -> None:
    job_id = pair.submit("steps=1000 step_seconds=0.05", placement=ON_TWO)
    pair.wait_for_step(job_id, 1)
    assert ranks(pair).keys() == {"0", "1"}

    pair.cancel(job_id)
    job = pair.wait(job_id)

    assert job.status == "cancelled"
    assert pair.trainers() == []
    assert leased(pair) == []
    assert [row.phase for row in members(pair, job_id)] == ["ended"]


def test_a_member_whose_ranks_die_ends_the_attempt_by_name_and_the_next_goes_on_from_the_checkpoint(
    pair: Stack,
) -> None:
    job_id = pair.submit("steps=30 step_seconds=0.1 save=5 hold=20 once", placement=ON_TWO)
    pair.wait_for_checkpoint(job_id, 5)

    ranks(pair)["1"].kill()
    job = pair.wait(job_id, seconds=60)

    assert job.status == "succeeded", job.error
    assert pair.chain(job.manifest) == chain_of(30)
    assert outcomes(pair, job_id) == [("crashed", "trainer_killed"), ("succeeded", None)]
    said = pair.attempts(job_id)[0].error["message"]
    assert members(pair, job_id)[0].host in said
    assert "signal SIGKILL" in said
    # The fake rank of the second host ends in 7 if it has not the checkpoint that the first goes on from.
    assert any(event.message.startswith("Resuming from the checkpoint") for event in pair.events(job_id))


def test_a_pause_writes_one_checkpoint_for_all_hosts_and_frees_them(pair: Stack) -> None:
    job_id = pair.submit("steps=40 step_seconds=0.05 save=1000 hold=20 once", placement=ON_TWO)
    pair.wait_for_step(job_id, 3)
    with session_scope(pair.engine) as session:
        moves.request_pause(session, job_id, project_id=pair.caller.project_id)
    paused = pair.wait(job_id, "paused")
    assert leased(pair) == []
    with session_scope(pair.engine) as session:
        moves.resume(session, job_id, project_id=pair.caller.project_id)
    job = pair.wait(job_id)

    assert job.status == "succeeded", job.error
    assert 3 <= paused.last_checkpoint["step"] < 40
    assert pair.chain(job.manifest) == chain_of(40)
    assert outcomes(pair, job_id) == [("paused", None), ("succeeded", None)]


def test_memory_that_runs_out_on_a_member_shrinks_the_pass_of_all(pair: Stack) -> None:
    small = {"per_device_train_batch_size": 4, "batch_size": 8, "packing": False}
    job = pair.wait(pair.submit("steps=4 member_fits=2", placement=ON_TWO, training=small), seconds=60)

    assert job.status == "succeeded", job.error
    assert job.micro_batch_size == 2
    assert outcomes(pair, job.id) == [("out_of_memory", "gpu_oom"), ("succeeded", None)]


def test_a_job_for_more_hosts_than_there_are_waits_and_says_so(pair: Stack) -> None:
    job_id = pair.submit("steps=4", placement={**ON_TWO, "nodes": 3})
    pair.wait(job_id, "queued")
    with session_scope(pair.engine) as session:
        verdict = verdict_of(session, job_id, pool_name=pair.settings.pool)
    pair.cancel(job_id)

    assert verdict is not None
    assert verdict.blocked_by == "NO_WORKER"
    assert "needs 3 hosts with 1 devices each" in verdict.detail
    assert "2 devices are registered on 2 hosts" in verdict.detail


def test_a_member_whose_supervisor_is_killed_is_missed_and_named(pair: Stack) -> None:
    job_id = pair.submit("steps=30 step_seconds=0.1 save=5 hold=20 once", placement=ON_TWO)
    pair.wait_for_checkpoint(job_id, 5)

    supervisor(ranks(pair)["1"]).kill()
    job = pair.wait(job_id, seconds=60)

    assert job.status == "succeeded", job.error
    assert outcomes(pair, job_id) == [("crashed", "member_lost"), ("succeeded", None)]
    assert "stopped answering" in pair.attempts(job_id)[0].error["message"]


def test_a_frozen_member_is_left_behind_and_finds_its_ranks_gone_when_it_wakes(pair: Stack) -> None:
    job_id = pair.submit("steps=140 step_seconds=0.1 save=5", placement=ON_TWO)
    pair.wait_for_step(job_id, 3)
    old_rank = ranks(pair)["1"]
    frozen = supervisor(old_rank)

    frozen.suspend()
    try:
        until(lambda: pair.job(job_id).attempts == 2 and ranks(pair).get("1") not in (None, old_rank))
        squatting = living.is_alive(old_rank)
    finally:
        frozen.resume()
    job = pair.wait(job_id, seconds=60)

    assert not squatting  # the newer attempt has the device to itself
    assert job.status == "succeeded", job.error
    assert pair.chain(job.manifest) == chain_of(140)
    assert outcomes(pair, job_id) == [("crashed", "member_lost"), ("succeeded", None)]
    until(lambda: [row.phase for row in members(pair, job_id)] == ["ended", "ended"])
    assert pair.trainers() == []


def test_a_leader_that_dies_takes_all_ranks_with_it_and_the_reaper_returns_the_job(pair: Stack) -> None:
    job_id = pair.submit("steps=30 step_seconds=0.1 save=5 hold=20 once", placement=ON_TWO)
    pair.wait_for_checkpoint(job_id, 5)
    first = ranks(pair)

    supervisor(first["0"]).kill()
    alive = living.await_end(first.values())
    job = pair.wait(job_id, seconds=60)

    assert alive == []
    assert job.status == "succeeded", job.error
    assert pair.chain(job.manifest) == chain_of(30)
    assert outcomes(pair, job_id) == [("lost", "worker_lost"), ("succeeded", None)]


def test_a_host_that_hears_no_bell_looks_by_itself_and_leaves_when_the_attempt_has_ended(stack: Stack) -> None:
    # Nobody rings here, and nobody would start it again: it must not take itself for deaf on a busy machine.
    start_host(stack, 1, TUNEPOOL_DEAF_SECONDS="3600")
    stack.wait_for_worker()
    job_id = stack.submit("steps=3", placement=ON_TWO)
    stack.wait(job_id, "queued")

    with session_scope(stack.engine) as session:  # the leader is this test, and rings nobody
        able = session.scalars(select(DeviceRow.bfloat16)).one()  # as its machine computes, the job was settled
        leader = make_worker(session, pool=stack.settings.pool, kind="cpu", cached_models=["tiny"], bfloat16=able)
        claim = claim_on(session, leader)
    assert claim is not None
    until(lambda: members(stack, job_id)[0].phase == "ready")
    with session_scope(stack.engine) as session:
        moves.fail(session, claim.lease, code="internal_error", message="The leader gives up.")
    until(lambda: members(stack, job_id)[0].phase == "ended")

    assert leased(stack) == []
    assert ranks(stack) == {}


def test_a_host_that_shuts_down_has_the_whole_gang_checkpoint_and_is_not_called_again(pair: Stack) -> None:
    """The last test here: one host of the pair is gone afterwards."""
    job_id = pair.submit("steps=100 step_seconds=0.1 save=1000 hold=50", placement=ON_TWO)
    pair.wait_for_step(job_id, 3)
    leaving = int("host-1" in living.tag(ranks(pair)["1"]))

    pair.processes[leaving].send_signal(signal.SIGTERM)  # the fixture started the hosts first, in their order
    waiting = pair.wait(job_id, "queued")
    assert pair.processes[leaving].wait(patience(30)) == 0
    later = pair.job(job_id)
    pair.cancel(job_id)

    assert waiting.last_checkpoint["step"] >= 3
    assert waiting.failures == 0
    assert (later.status, later.attempts) == ("queued", 1)
    assert outcomes(pair, job_id) == [("drained", "drained")]
    assert leased(pair) == []
