"""What a leader concludes from its members' rows, and where the hosts of a job meet."""

from __future__ import annotations

import socket
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from shared.errors import Unavailable
from shared.fleet.members import RESTARTED, MemberState
from shared.lease.values import Lease, Member
from shared.settings import Settings
from worker.attempt import meeting
from worker.attempt.leader import Gang
from worker.program import launcher, processes

NOON = datetime(2026, 11, 27, 12, tzinfo=UTC)
MEMBERS = [Member(node=node, worker_id=f"w{node}", host=f"host-{node}", device_ids=(f"{node}",)) for node in (1, 2)]


class Rows:
    """Two members' rows and the leader's clock."""

    def __init__(self) -> None:
        self.now = 0.0
        self.gang = Gang(MEMBERS, Settings(heartbeat_seconds=10, lease_seconds=60), clock=lambda: self.now)

    def look(self, *, at: float, **second: Any) -> None:
        """The leader looks; the first member speaks every time, the second one said last what `second` says."""
        self.now = at
        heard = {"phase": "training", "leaving": False, "exit_code": None, "error": None, "heard_at": NOON}
        moment = NOON + timedelta(seconds=at)
        self.gang.hear(
            [
                MemberState(node=1, host="host-1", **{**heard, "heard_at": moment}),
                MemberState(node=2, host="host-2", **{**heard, **second}),
            ]
        )


def test_a_member_that_is_silent_for_three_beats_is_gone_and_named() -> None:
    rows = Rows()
    for second in range(31):
        rows.look(at=second)
    assert rows.gang.fault is None

    rows.look(at=31)

    assert rows.gang.fault is not None
    assert rows.gang.fault.code == "member_lost"
    assert "host-2" in rows.gang.fault.message
    assert not rows.gang.gone  # the first one lives


def test_silence_while_the_leader_itself_heard_nothing_does_not_count() -> None:
    rows = Rows()
    rows.look(at=0)

    rows.look(at=300)  # Postgres was away for everybody

    assert rows.gang.fault is None
    for second in range(301, 332):
        rows.look(at=second)
    assert rows.gang.fault is not None


def test_a_call_may_wait_for_the_workers_own_look_a_lease_long() -> None:
    rows = Rows()
    for second in range(61):
        rows.look(at=second, phase="called")
    assert rows.gang.fault is None

    rows.look(at=62, phase="called")

    assert rows.gang.fault is not None
    assert "did not answer the call" in rows.gang.fault.message


@pytest.mark.parametrize(
    ("said", "code", "words"),
    [
        ({"exit_code": -9}, "trainer_killed", "signal SIGKILL"),
        ({"exit_code": 1}, "trainer_crashed", "exit code 1"),
        ({"error": RESTARTED}, "member_lost", "started anew"),
        ({"error": {"code": "disk_full", "message": "No room.", "param": None}}, "disk_full", "had to stop: No room."),
    ],
)
def test_a_member_that_ends_early_says_why(said: dict[str, Any], code: str, words: str) -> None:
    rows = Rows()

    rows.look(at=1, phase="ended", **said)

    assert rows.gang.fault is not None
    assert rows.gang.fault.code == code
    assert words in rows.gang.fault.message


@pytest.mark.parametrize("code", [0, 5, None])
def test_a_member_that_ends_in_order_is_no_fault(code: int | None) -> None:
    rows = Rows()

    rows.look(at=1, phase="ended", exit_code=code)

    assert rows.gang.fault is None


def test_an_attempt_on_one_host_waits_for_nobody() -> None:
    alone = Gang([], Settings())

    assert alone.ready
    assert alone.gone
    assert not alone.leaving
    assert alone.fault is None


def test_a_meeting_point_has_a_free_port_of_the_range_and_a_name_that_nobody_can_guess() -> None:
    lease = Lease(kind="job", id="ftjob-1", fence=7, worker_id="w", attempt=1)
    with socket.create_server(("", 0)) as taken:
        port = taken.getsockname()[1]
        settings = Settings(gang_ports=f"{port}-{port}", gang_address="10.0.0.1")
        with pytest.raises(Unavailable, match=f"TUNEPOOL_GANG_PORTS={port}-{port}"):
            meeting.choose(settings, lease, apart=True)

    first, second = (meeting.choose(settings, lease, apart=True) for _ in range(2))

    assert (first.address, first.port) == ("10.0.0.1", port)
    assert first.name.startswith("ftjob-1-7-")
    assert first.name != second.name


@pytest.mark.parametrize("ports", ["9-8", "0-5", "1-70000", "80", "a-b"])
def test_a_range_of_ports_that_is_none_is_refused_by_name(ports: str) -> None:
    with pytest.raises(ValidationError, match="gang_ports"):
        Settings(gang_ports=ports)


@pytest.mark.parametrize(
    ("database_url", "address"),
    [
        ("postgresql+psycopg://u@127.0.0.1:5432/d", "127.0.0.1"),
        ("postgresql+psycopg:///d?host=/run/postgres", "127.0.0.1"),
        ("postgresql+psycopg://u@/d?host=127.0.0.2", "127.0.0.1"),
    ],
)
def test_a_host_is_reached_where_it_reaches_the_database_from(database_url: str, address: str) -> None:
    assert meeting.own_address(Settings(database_url=database_url)) == address


@pytest.mark.parametrize("address", ["127.0.0.1", "::1", "localhost"])
def test_a_leader_that_other_hosts_cannot_reach_says_which_setting_helps(address: str) -> None:
    lease, settings = Lease(kind="job", id="ftjob-1", fence=7, worker_id="w", attempt=1), Settings(gang_address=address)

    with pytest.raises(Unavailable, match="set TUNEPOOL_GANG_ADDRESS"):
        meeting.choose(settings, lease, apart=True)
    assert meeting.choose(settings, lease, apart=False).address == address


def test_a_host_that_finds_no_way_to_the_database_asks_for_its_address() -> None:
    with pytest.raises(Unavailable, match="TUNEPOOL_GANG_ADDRESS"):
        meeting.own_address(Settings(database_url="postgresql+psycopg://u@name.invalid/d"))


def test_ranks_talk_through_the_interface_that_has_the_hosts_address(tmp_path: Path) -> None:
    tag = processes.own_tag(home=tmp_path, job_id="j", fence=1)
    common = {"tag": tag, "device_ids": ("h:cpu",), "kind": "cpu", "threads": 1, "scratch": tmp_path}

    through = launcher.environment(**common, interface=meeting.interface("127.0.0.1"))
    alone = launcher.environment(**common)

    assert {through[name] for name in launcher.TALK_THROUGH} == {"lo"}
    assert not alone.keys() & set(launcher.TALK_THROUGH)
    assert meeting.interface("localhost") == "lo"
    assert meeting.interface("192.0.2.1") is None
