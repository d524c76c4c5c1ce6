"""What a worker's processes tell each other of base models that wait in memory."""

from __future__ import annotations

import os

from worker.host.flags import SharedFlags

NAMES = ("one", "two")


def test_a_base_model_is_told_to_the_other_processes_until_somebody_rises() -> None:
    flags = SharedFlags(devices=2)
    child = os.fork()
    if child == 0:
        flags.sit(1)
        flags.warm(1, "two")
        os._exit(0)
    os.waitpid(child, 0)

    assert [flags.warm_base(number, NAMES) for number in flags.seats] == [None, "two"]
    flags.rise(1)
    assert flags.warm_base(1, NAMES) is None


def test_a_base_model_that_nobody_knows_any_more_and_one_let_go_are_none() -> None:
    flags = SharedFlags(devices=1)
    flags.warm(0, "gone")

    assert flags.warm_base(0, NAMES) is None
    flags.warm(0, "one")
    assert flags.warm_base(0, NAMES) == "one"
    flags.cool(0)
    assert flags.warm_base(0, NAMES) is None


def test_a_process_without_seats_and_a_device_without_one_hold_nothing() -> None:
    assert SharedFlags().warm_base(0, NAMES) is None
    assert SharedFlags(devices=1).warm_base(7, NAMES) is None


def test_the_last_device_that_there_is_room_for_has_a_mark_of_its_own() -> None:
    flags = SharedFlags(devices=2)
    flags.warm(767, "one")

    assert flags.warm_base(0, NAMES) is None
    flags.cool(767)
