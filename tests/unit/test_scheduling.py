"""What `plan()` promises, case by case. The random cases are in test_scheduling_properties.py."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest

from shared.plan.fairshare import GIB
from shared.plan.scheduling import Device, Fetching, Plan, Policy, QueuedJob, RunningJob, Share, decayed, plan

NOON = datetime(2026, 6, 2, 12, tzinfo=UTC)
HOUR = 3600.0
POLICY = Policy()


def job(job_id: str, *, project: str = "red", **changes: Any) -> QueuedJob:
    values: dict[str, Any] = {
        "id": job_id,
        "project": project,
        "key": f"{project}-key",
        "submitted_at": NOON - timedelta(hours=1),
        "expected_seconds": HOUR,
        "preemptible": False,
    }
    return QueuedJob(**{**values, **changes})


def runner(job_id: str, *device_ids: str, project: str = "red", minutes: float = 60, **changes: Any) -> RunningJob:
    values: dict[str, Any] = {
        "id": job_id,
        "project": project,
        "key": f"{project}-key",
        "tier": "normal",
        "priority": 0,
        "device_ids": device_ids,
        "started_at": NOON - timedelta(minutes=minutes),
        "preemptible": False,
    }
    return RunningJob(**{**values, **changes})


def device(device_id: str, *, host: str = "host-1", gib: float = 24, **changes: Any) -> Device:
    values: dict[str, Any] = {"total_bytes": int(gib * GIB), "free_bytes": int(gib * GIB)}
    return Device(id=device_id, host=host, **{**values, **changes})


def host(name: str, count: int, **changes: Any) -> list[Device]:
    return [device(f"{name}-{n}", host=name, **changes) for n in range(count)]


def decide(
    queue: Iterable[QueuedJob],
    devices: Iterable[Device],
    *,
    running: Sequence[RunningJob] = (),
    shares: Sequence[Share] = (),
    policy: Policy = POLICY,
) -> Plan:
    return plan(queue, running, devices, shares, policy=policy, now=NOON)


def started(decision: Plan) -> list[str]:
    return [assignment.job_id for assignment in decision.assignments]


def stopped(decision: Plan) -> set[str]:
    return {preemption.victim_id for preemption in decision.preemptions}


# ---- the effective order


def test_the_worked_example_of_the_documentation_comes_out_as_written() -> None:
    devices = [device("gpu-0"), device("gpu-1"), device("gpu-2", host="host-2", gib=80)]
    shares = [
        Share("red", weight=1, usage=36_000),
        Share("blue", weight=2, usage=36_000),
        Share("green", weight=1, usage=0),
    ]
    limit = {"max_runtime_seconds": 2 * HOUR}
    queue = [
        job("r1", project="red", tier="interactive", bytes_per_device=12 * GIB, **limit),
        job("r2", project="red"),
        job("b1", project="blue"),
        job("b2", project="blue", priority=5, submitted_at=NOON - timedelta(minutes=30)),
        job("g1", project="green", expected_seconds=4 * HOUR, bytes_per_device=30 * GIB),
        job("g2", project="green", submitted_at=NOON - timedelta(minutes=20), bytes_per_device=10 * GIB),
        job(
            "o1", project="blue", tier="best_effort", submitted_at=NOON - timedelta(hours=26), bytes_per_device=10 * GIB
        ),
    ]

    decision = decide(queue, devices, shares=shares)

    assert [(a.job_id, a.device_ids) for a in decision.assignments] == [
        ("o1", ("gpu-0",)),
        ("r1", ("gpu-1",)),
        ("g1", ("gpu-2",)),
    ]
    assert list(decision.verdicts) == ["g2", "b2", "b1", "r2"]
    first, last = decision.verdicts["g2"], decision.verdicts["r2"]
    assert (first.position, first.jobs_ahead, first.blocked_by) == (1, 0, "NO_FREE_DEVICE")
    assert "gpu-1, free at the latest at 2026-06-02 14:00 UTC" in first.detail
    assert (first.eta_low, first.eta_high) == (NOON + timedelta(hours=1), NOON + timedelta(hours=2))
    assert (last.position, last.eta_low) == (4, NOON + timedelta(hours=2))


def test_usage_halves_with_every_half_life() -> None:
    week = timedelta(days=7)

    assert decayed(800.0, elapsed=3 * week, half_life=week) == pytest.approx(100.0)


def test_a_higher_tier_goes_before_a_smaller_share() -> None:
    shares = [Share("red", usage=1e6), Share("blue", usage=0)]

    decision = decide([job("ci", tier="interactive"), job("b", project="blue")], [device("gpu")], shares=shares)

    assert started(decision) == ["ci"]


def test_a_weight_divides_what_a_project_has_used() -> None:
    shares = [Share("red", usage=30_000, weight=3), Share("blue", usage=20_000)]

    decision = decide([job("r"), job("b", project="blue")], [device("gpu")], shares=shares)

    assert started(decision) == ["r"]


def test_inside_a_project_priority_goes_first_and_then_the_oldest() -> None:
    queue = [
        job("new", submitted_at=NOON),
        job("old"),
        job("urgent", submitted_at=NOON, priority=1),
    ]

    assert started(decide(queue, host("h", 3))) == ["urgent", "old", "new"]


def test_a_flood_is_charged_as_it_starts_so_that_projects_alternate() -> None:
    flood = [job(f"r{n}") for n in range(10)]
    few = [job(f"b{n}", project="blue", submitted_at=NOON) for n in range(2)]

    assert started(decide([*flood, *few], host("h", 4))) == ["r0", "b0", "r1", "b1"]


def test_a_job_that_waited_max_wait_goes_before_every_tier() -> None:
    old = job("old", tier="best_effort", submitted_at=NOON - timedelta(hours=24))
    shares = [Share("red", usage=1e9)]

    decision = decide([job("ci", project="blue", tier="interactive"), old], [device("gpu")], shares=shares)

    assert started(decision) == ["old"]


def test_an_old_flood_jumps_the_queue_only_up_to_its_part_of_the_pool() -> None:
    flood = [job(f"r{n}", submitted_at=NOON - timedelta(hours=30)) for n in range(10)]
    fresh = [job(f"b{n}", project="blue") for n in range(10)]
    shares = [Share("red", usage=1e6)]

    decision = decide([*flood, *fresh], host("h", 4), shares=shares)

    assert started(decision) == ["r0", "r1", "b0", "b1"]


def test_above_its_part_a_project_still_lets_its_own_oldest_job_go_first() -> None:
    queue = [
        job("old", tier="best_effort", submitted_at=NOON - timedelta(hours=30)),
        job("young"),
        job("b", project="blue", tier="interactive"),
    ]
    running = [runner("r0", "h-0"), runner("r1", "h-1")]

    assert started(decide(queue, host("h", 4), running=running)) == ["b", "old"]


def test_a_guarantee_goes_before_tier_and_share_but_not_for_best_effort() -> None:
    shares = [Share("red", guarantee=1, usage=1e6), Share("blue")]
    rival = job("ci", project="blue", tier="interactive")

    assert started(decide([job("r"), rival], [device("gpu")], shares=shares)) == ["r"]
    assert started(decide([job("r", tier="best_effort"), rival], [device("gpu")], shares=shares)) == ["ci"]


# ---- caps, holds, budgets


def test_a_project_over_its_cap_waits_and_lets_others_by() -> None:
    decision = decide(
        [job("r"), job("b", project="blue", submitted_at=NOON)],
        host("h", 2),
        running=[runner("r0", "h-0")],
        shares=[Share("red", max_running=1), Share("blue", usage=1e6)],
    )

    assert started(decision) == ["b"]
    assert decision.verdicts["r"].blocked_by == "QUOTA_PROJECT"
    assert "takes 1 devices; project red holds 1 of the 1" in decision.verdicts["r"].detail


def test_a_key_over_its_cap_waits_while_the_project_goes_on() -> None:
    shares = [Share("red", key_max_running={"ci": 1})]

    decision = decide(
        [job("c1", key="ci"), job("c2", key="ci"), job("r", submitted_at=NOON)], host("h", 3), shares=shares
    )

    assert started(decision) == ["c1", "r"]
    assert decision.verdicts["c2"].blocked_by == "QUOTA_KEY"


def test_a_spent_budget_stops_the_jobs_that_would_exceed_it() -> None:
    decision = decide([job("r1"), job("r2")], host("h", 2), shares=[Share("red", budget_left_seconds=5000)])

    assert started(decision) == ["r1"]
    assert decision.verdicts["r2"].blocked_by == "BUDGET"
    assert "charged 3,600 device-seconds and project red has 1,400 left" in decision.verdicts["r2"].detail
    assert decision.verdicts["r2"].eta_low is None


@pytest.mark.parametrize(
    ("changes", "shares", "policy"),
    [
        ({"held": True}, [], POLICY),
        ({}, [Share("red", held=True)], POLICY),
        ({}, [], Policy(held=True)),
    ],
)
def test_a_hold_on_job_project_or_pool_keeps_the_job(changes: Any, shares: list[Share], policy: Policy) -> None:
    decision = decide([job("r", **changes)], [device("gpu")], shares=shares, policy=policy)

    assert started(decision) == []
    assert decision.verdicts["r"].blocked_by == "HELD"


def test_a_backed_off_job_is_not_expected_before_its_time() -> None:
    later = NOON + timedelta(minutes=5)

    verdict = decide([job("r", not_before=later)], [device("gpu")]).verdicts["r"]

    assert (verdict.blocked_by, verdict.eta_low) == ("BACKOFF_UNTIL", later)
    assert "12:05:00 UTC" in verdict.detail


def test_jobs_that_are_set_aside_are_nobodys_jobs_ahead() -> None:
    held = [job(f"held{n}", held=True) for n in range(5)]

    decision = decide([*held, job("r", submitted_at=NOON)], [device("gpu")], running=[runner("x", "gpu")])

    assert decision.verdicts["r"].position == 1


# ---- devices


def test_a_job_larger_than_every_device_is_told_both_sizes() -> None:
    verdict = decide([job("r", bytes_per_device=30 * GIB)], [device("gpu")]).verdicts["r"]

    assert verdict.blocked_by == "NO_FIT_MEMORY"
    assert "needs 30.0 GiB" in verdict.detail
    assert "24.0 GiB is built in" in verdict.detail


def test_a_job_takes_what_is_really_free_and_no_margin_comes_on_top() -> None:
    tight = device("gpu", free_bytes=11 * GIB - 1)

    assert started(decide([job("r", bytes_per_device=11 * GIB)], [tight])) == []
    assert started(decide([job("r", bytes_per_device=11 * GIB - 1)], [tight])) == ["r"]


def test_a_device_with_a_strangers_process_is_left_alone_and_named() -> None:
    used = device("gpu-7", foreign_bytes=20 * GIB, free_bytes=4 * GIB)

    verdict = decide([job("r")], [used]).verdicts["r"]

    assert verdict.blocked_by == "NO_FIT_MEMORY"
    assert "gpu-7 20.0 GiB" in verdict.detail


T4 = device("h:GPU-t4", host="t4", gib=16, bfloat16=False, capability=75)
A100 = device("h:GPU-a100", host="a100", gib=80, capability=80)
CPU = device("c:cpu", host="cpu", gib=12, kind="cpu")
SETTLED_FOR_A100 = {"needs_gpu": True, "needs_bfloat16": True, "needs_capability": 80, "bytes_per_device": 9 * GIB}


def test_a_job_goes_to_no_device_that_lacks_what_it_was_settled_for_however_well_that_fits() -> None:
    (assignment,) = decide([job("r", **SETTLED_FOR_A100)], [CPU, T4, A100]).assignments

    assert assignment.device_ids == ("h:GPU-a100",)
    assert started(decide([job("r", bytes_per_device=9 * GIB)], [CPU])) == ["r"], "one that asks for nothing may"


@pytest.mark.parametrize(
    ("devices", "needs"), [([CPU], "a GPU"), ([T4], "bfloat16"), ([CPU, T4], "compute capability 8.0")]
)
def test_a_job_that_no_device_can_do_is_told_what_it_needs(devices: list[Device], needs: str) -> None:
    verdict = decide([job("r", **SETTLED_FOR_A100)], devices).verdicts["r"]

    assert verdict.blocked_by == "NO_FIT_DEVICE"
    assert needs in verdict.detail
    assert verdict.eta_low is None


def test_a_job_waits_for_the_device_that_can_do_it_while_others_are_free() -> None:
    taken = device("h:GPU-a100", host="a100", gib=80, capability=80, leased_by="x")
    queue = [job("r", **SETTLED_FOR_A100), job("s", bytes_per_device=GIB)]

    decision = decide(queue, [CPU, T4, taken], running=[runner("x", "h:GPU-a100")])

    assert started(decision) == ["s"]
    assert decision.verdicts["r"].blocked_by == "NO_FREE_DEVICE"


def test_several_devices_of_one_job_are_never_slices_of_a_gpu() -> None:
    slices = [device(f"h:MIG-{n}", host="h") for n in range(2)]
    whole = [device(f"i:GPU-{n}", host="i", gib=48) for n in range(2)]

    alone = decide([job("r", gpus=2)], slices).verdicts["r"]
    (assignment,) = decide([job("r", gpus=2)], [*slices, *whole]).assignments

    assert (alone.blocked_by, "no MIG slice" in alone.detail) == ("NO_FIT_DEVICE", True)
    assert assignment.device_ids == ("i:GPU-0", "i:GPU-1")
    assert started(decide([job("r")], slices)) == ["r"]


def test_what_a_driver_and_a_desktop_hold_is_not_waited_for_while_a_job_has_the_gpu() -> None:
    """A leased GPU is reported as it was when it was free: what was not free then will not be free afterwards."""
    taken = device("gpu", free_bytes=22 * GIB, leased_by="x")

    decision = decide(
        [job("r", bytes_per_device=23 * GIB), job("s", bytes_per_device=22 * GIB)],
        [taken],
        running=[runner("x", "gpu")],
    )

    assert decision.verdicts["r"].blocked_by == "NO_FIT_MEMORY"
    assert decision.verdicts["s"].blocked_by == "NO_FREE_DEVICE"


def test_a_desktop_on_the_device_is_no_stranger() -> None:
    assert started(decide([job("r")], [device("gpu", foreign_bytes=GIB // 4)])) == ["r"]


@pytest.mark.parametrize("changes", [{"healthy": False}, {"draining": True}])
def test_a_quarantined_or_drained_device_is_named_as_the_reason(changes: Any) -> None:
    verdict = decide([job("r")], [device("gpu-3", **changes)]).verdicts["r"]

    assert verdict.blocked_by == "DEVICE_QUARANTINED"
    assert "gpu-3" in verdict.detail


def test_without_a_worker_that_has_the_devices_the_job_says_so() -> None:
    assert decide([job("r")], []).verdicts["r"].blocked_by == "NO_WORKER"
    assert decide([job("r", gpus=8)], host("h", 4)).verdicts["r"].blocked_by == "NO_WORKER"


def test_a_job_that_can_never_fit_reserves_nothing() -> None:
    queue = [job("huge", bytes_per_device=100 * GIB, priority=9), job("r")]

    assert started(decide(queue, [device("gpu")])) == ["r"]


def test_the_smallest_device_that_fits_is_taken() -> None:
    devices = [device("big", gib=80), device("small", gib=24)]

    assert decide([job("r", bytes_per_device=GIB)], devices).assignments[0].device_ids == ("small",)


def test_of_devices_that_are_alike_a_job_gets_one_where_its_base_model_waits_in_memory() -> None:
    here = {"cached_models": frozenset({"smollm2"})}
    devices = [*host("a", 2, **here), device("a-9", host="a", warm_base="smollm2", **here)]
    elsewhere = [*host("b", 2, **here), device("b-9", host="b", warm_base="smollm2", **here)]

    assert chosen_for(job("r", base_model="smollm2"), devices) == ("a-9",)
    assert chosen_for(job("r", base_model="smollm2"), [*host("a", 3, **here), *elsewhere]) == ("b-9",)


def test_a_base_model_in_memory_decides_between_equals_only() -> None:
    here = {"cached_models": frozenset({"smollm2", "other"})}
    small, large = device("small", gib=24, **here), device("large", gib=80, warm_base="smollm2", **here)
    fuller = [*host("a", 1, **here), *host("b", 3, warm_base="smollm2", **here)]

    assert chosen_for(job("r", base_model="smollm2"), [small, large]) == ("small",), "large ones are for large jobs"
    assert chosen_for(job("r", base_model="smollm2"), fuller) == ("a-0",), "whole hosts are for gangs"
    assert chosen_for(job("r", base_model="other"), host("b", 2, warm_base="smollm2", **here)) == ("b-0",)
    assert chosen_for(job("r"), [device("x", **here), device("y", warm_base="", **here)]) == ("x",)


def chosen_for(queued: QueuedJob, devices: list[Device]) -> tuple[str, ...]:
    return decide([queued], devices).assignments[0].device_ids


def test_a_job_starts_only_where_its_base_model_is() -> None:
    devices = [*host("a", 1), *host("b", 1, cached_models=frozenset({"smollm2"}))]

    first, second = job("r", base_model="smollm2"), job("s", base_model="smollm2")
    decision = decide([first, second], devices)

    assert decision.assignments[0].device_ids == ("b-0",)
    assert decision.verdicts["s"].blocked_by == "NO_FREE_DEVICE", "it waits for a device, not for a fetch"


def test_a_job_whose_base_model_is_on_no_fitting_host_waits_for_its_fetch_and_keeps_nobody() -> None:
    devices = [device("a-0"), device("small", gib=1, cached_models=frozenset({"far"}))]
    queue = [job("r", base_model="far", bytes_per_device=2 * GIB, priority=9), job("s", bytes_per_device=2 * GIB)]

    decision = plan(
        queue, [], devices, [], policy=POLICY, now=NOON, fetches={"far": Fetching("a", 1_234_567, 7_654_321)}
    )

    assert started(decision) == ["s"]
    verdict = decision.verdicts["r"]
    assert (verdict.blocked_by, verdict.eta_low) == ("BASE_MODEL_FETCHING", None)
    assert "base model far is on no host that fits; a has 1,234,567 of 7,654,321 bytes" in verdict.detail


@pytest.mark.parametrize(
    ("fetching", "says"),
    [
        (Fetching("a", 0, 0), "a is about to fetch it;"),
        (Fetching("a", 1, 9, error="It is away."), "a has 1 of 9 bytes and tries again, because: It is away;"),
        (Fetching("a", 1, 9, over=True, error="It is away."), "a could not fetch it: It is away;"),
        (None, "its hosts are about to be asked;"),
    ],
)
def test_a_fetch_is_told_as_it_stands(fetching: Fetching | None, says: str) -> None:
    fetches = {"far": fetching} if fetching else {}

    made = plan([job("r", base_model="far")], [], [device("a")], [], policy=POLICY, now=NOON, fetches=fetches)

    assert says in made.verdicts["r"].detail


def test_a_job_that_no_host_could_take_is_not_told_of_its_base_model() -> None:
    (verdict,) = decide([job("r", base_model="far", bytes_per_device=100 * GIB)], [device("a")]).verdicts.values()

    assert verdict.blocked_by == "NO_FIT_MEMORY"


def test_a_gang_wants_its_base_model_on_each_of_its_hosts() -> None:
    devices = [*host("a", 1), *host("b", 1, cached_models=frozenset({"far"}))]
    gang = job("r", nodes=2, base_model="far")

    assert decide([gang], devices).verdicts["r"].blocked_by == "BASE_MODEL_FETCHING"
    warm = [replace(one, cached_models=frozenset({"far"})) for one in devices]
    assert started(decide([gang], warm)) == ["r"]


def test_a_warm_base_model_never_beats_the_fair_order() -> None:
    warm = device("gpu", cached_models=frozenset({"smollm2"}))
    shares = [Share("red", usage=1), Share("blue", usage=0)]

    assert started(decide([job("r", base_model="smollm2"), job("b", project="blue")], [warm], shares=shares)) == ["b"]


def test_single_jobs_are_packed_so_that_whole_hosts_stay_free() -> None:
    devices = [*host("a", 4), *host("b", 4)]

    decision = decide([job("r")], devices, running=[runner("x", "b-0")])

    assert decision.assignments[0].device_ids == ("b-1",)


# ---- gangs, reservations, backfill


def test_a_gang_does_not_start_on_devices_of_two_hosts() -> None:
    half_busy = [runner("x", "a-0", "a-1"), runner("y", "b-0", "b-1")]

    assert started(decide([job("gang", gpus=4)], [*host("a", 4), *host("b", 4)], running=half_busy)) == []


def test_a_gang_over_hosts_has_devices_of_one_kind_though_others_are_free_sooner() -> None:
    mixed = [*host("cpu-a", 2, kind="cpu"), *host("gpu-a", 2), *host("gpu-b", 2)]

    alone = decide([job("gang", gpus=2, nodes=2)], mixed)
    waiting = decide([job("gang", gpus=2, nodes=2)], mixed[:4])
    busy = decide([job("gang", gpus=2, nodes=2)], mixed, running=[runner("r", "gpu-b-0")])

    assert set(alone.assignments[0].device_ids) == {"gpu-a-0", "gpu-a-1", "gpu-b-0", "gpu-b-1"}
    assert waiting.verdicts["gang"].blocked_by == "NO_WORKER"
    assert busy.verdicts["gang"].blocked_by == "NO_FREE_DEVICE"
    assert "cpu-a" not in busy.verdicts["gang"].detail


def test_a_gang_over_hosts_gets_its_devices_on_every_host_or_none() -> None:
    devices = [*host("a", 2), *host("b", 2), *host("c", 1)]

    assert set(decide([job("gang", gpus=2, nodes=2)], devices).assignments[0].device_ids) == {
        "a-0",
        "a-1",
        "b-0",
        "b-1",
    }
    assert started(decide([job("gang", gpus=2, nodes=3)], [*devices, *host("d", 1)])) == []


def blocked_gang(*others: QueuedJob, **gang: Any) -> Plan:
    """A gang of 2 waits for h-0, which is free in an hour at the latest; h-1 is free."""
    running = [runner("x", "h-0", project="gold", minutes=60, max_runtime_seconds=2 * HOUR)]
    shares = [Share("red", usage=0), Share("blue", usage=1e6)]
    return decide([job("gang", gpus=2, **gang), *others], host("h", 2), running=running, shares=shares)


def test_a_job_that_ends_before_the_reservation_is_backfilled() -> None:
    decision = blocked_gang(job("short", project="blue", max_runtime_seconds=HOUR))

    assert [(a.job_id, a.backfill) for a in decision.assignments] == [("short", True)]


@pytest.mark.parametrize("limit", [None, HOUR + 1])
def test_a_job_that_may_outlast_the_reservation_waits_and_is_told_for_whom(limit: float | None) -> None:
    verdict = blocked_gang(job("long", project="blue", max_runtime_seconds=limit)).verdicts["long"]

    assert verdict.blocked_by == "RESERVED_FOR"
    assert "reserved for gang until 2026-06-02 13:00 UTC" in verdict.detail


def test_a_preemptible_job_is_backfilled_and_makes_way_when_the_gang_can_start() -> None:
    decision = blocked_gang(job("soft", project="blue", preemptible=True))
    assert [(a.job_id, a.backfill) for a in decision.assignments] == [("soft", True)]

    running = [runner("soft", "h-1", project="blue", preemptible=True, backfill=True)]
    shares = [Share("red"), Share("blue", usage=1e6)]
    later = decide([job("gang", gpus=2)], host("h", 2), running=running, shares=shares)

    assert [(p.victim_id, p.ground) for p in later.preemptions] == [("soft", "reservation")]


def test_an_aged_gang_lets_nothing_in_that_could_delay_it() -> None:
    soft = job("soft", project="blue", preemptible=True)

    assert started(blocked_gang(soft, submitted_at=NOON - timedelta(hours=25))) == []


def test_a_reservation_leaves_other_hosts_alone() -> None:
    running = [runner("x", "h-0", max_runtime_seconds=2 * HOUR), runner("y", "k-0")]

    decision = decide(
        [job("gang", gpus=2), job("r", submitted_at=NOON)], [*host("h", 2), *host("k", 2)], running=running
    )

    assert [(a.job_id, a.device_ids) for a in decision.assignments] == [("r", ("k-1",))]


# ---- preemption


def test_a_higher_tier_stops_the_lowest_tier_that_started_last() -> None:
    running = [
        runner("normal", "h-0", preemptible=True, minutes=11),
        runner("old", "h-1", tier="best_effort", minutes=90),
        runner("new", "h-2", tier="best_effort", minutes=20),
    ]

    decision = decide([job("ci", project="blue", tier="interactive")], host("h", 3), running=running)

    assert [(p.victim_id, p.for_job_id, p.ground) for p in decision.preemptions] == [("new", "ci", "tier")]
    assert decision.verdicts["ci"].blocked_by == "NO_FREE_DEVICE"
    assert "h-2 is promised" in decision.verdicts["ci"].detail


@pytest.mark.parametrize("changes", [{"minutes": 9}, {"preemptible": False}])
def test_a_young_or_unwilling_job_is_not_stopped(changes: Any) -> None:
    running = [runner("x", "gpu", **{"preemptible": True, **changes})]

    assert stopped(decide([job("ci", project="blue", tier="interactive")], [device("gpu")], running=running)) == set()


def test_a_device_that_is_about_to_be_free_is_not_freed_twice() -> None:
    running = [
        runner("going", "h-0", preemptible=True, preempt_requested=True),
        runner("staying", "h-1", preemptible=True),
    ]
    queue = [job("ci", project="blue", tier="interactive")]

    assert stopped(decide(queue, host("h", 2), running=running)) == set()


def test_a_gang_stops_no_more_jobs_than_it_needs() -> None:
    devices = [*host("a", 2), *host("b", 4)]
    running = [
        runner("a0", "a-0", preemptible=True, minutes=20),
        *(runner(f"b{n}", f"b-{n}", preemptible=True, minutes=30 + n) for n in range(4)),
        runner("a1", "a-1"),
    ]

    decision = decide([job("ci", project="blue", tier="interactive", gpus=2)], devices, running=running)

    assert stopped(decision) == {"b0", "b1"}


def test_a_project_below_its_part_and_share_stops_one_above_both() -> None:
    running = [runner(f"r{n}", f"h-{n}", preemptible=True, minutes=60 - n) for n in range(4)]
    shares = [Share("red", usage=100_000), Share("blue", usage=0)]

    decision = decide([job(f"b{n}", project="blue") for n in range(4)], host("h", 4), running=running, shares=shares)

    assert [(p.victim_id, p.ground) for p in decision.preemptions] == [("r3", "share"), ("r2", "share")]


def test_a_project_that_would_pass_its_victims_share_stops_nobody() -> None:
    running = [runner(f"r{n}", f"h-{n}", preemptible=True) for n in range(2)]
    shares = [Share("red", usage=3600), Share("blue", usage=1)]

    assert stopped(decide([job("b", project="blue")], host("h", 2), running=running, shares=shares)) == set()


def test_a_guarantee_takes_borrowed_devices_back_and_is_itself_safe() -> None:
    running = [
        runner("r1", "h-0", preemptible=True, minutes=50),
        runner("r2", "h-1", preemptible=True, minutes=40),
    ]
    shares = [Share("red", guarantee=1, usage=0), Share("blue", guarantee=1, usage=1e6)]

    decision = decide([job(f"b{n}", project="blue") for n in range(2)], host("h", 2), running=running, shares=shares)

    assert [(p.victim_id, p.ground) for p in decision.preemptions] == [("r2", "guarantee")]


def test_preemptions_of_one_pass_are_bounded() -> None:
    running = [runner(f"r{n}", f"h-{n}", tier="best_effort") for n in range(8)]
    queue = [job(f"ci{n}", project="blue", tier="interactive") for n in range(8)]

    decision = decide(queue, host("h", 8), running=running, policy=Policy(preemptions_per_pass=3))

    assert len(decision.preemptions) == 3


def test_a_head_above_its_part_could_not_reclaim_so_nothing_preemptible_is_lent_from_its_reservation() -> None:
    running = [runner("r0", "k-0"), runner("x", "h-0", project="gold", max_runtime_seconds=2 * HOUR)]
    soft = job("soft", project="blue", preemptible=True)
    shares = [Share("blue", usage=1e6)]

    decision = decide([job("gang", gpus=2), soft], [*host("h", 2), *host("k", 1)], running=running, shares=shares)

    assert started(decision) == []
    assert decision.verdicts["soft"].blocked_by == "RESERVED_FOR"


def test_nobody_is_stopped_for_a_device_that_a_stranger_uses() -> None:
    devices = [device("gpu-0", foreign_bytes=8 * GIB), device("gpu-1", host="host-2")]
    running = [
        runner("beside", "gpu-0", tier="best_effort", minutes=20),
        runner("alone", "gpu-1", tier="best_effort", minutes=30),
    ]

    assert stopped(decide([job("ci", tier="interactive")], devices, running=running)) == {"alone"}
