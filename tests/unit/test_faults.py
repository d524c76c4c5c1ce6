"""The table of faults names tests that exist; every failpoint is at one place; leases know one clock."""

from __future__ import annotations

import ast
import re
from collections import Counter
from pathlib import Path
from typing import get_args

import pytest
from pydantic import ValidationError

from shared import failpoints
from shared.settings import Settings
from tests.faults.schedules import EDGES, FAULTS, generate

ROOT = Path(__file__).resolve().parents[2]


def test_every_test_named_in_the_table_of_faults_exists() -> None:
    named = set(re.findall(r"`(test_\w+)`", (ROOT / "docs/faults.md").read_text()))
    written = {
        node.name
        for path in (ROOT / "tests").rglob("test_*.py")
        if not named.isdisjoint(re.findall(r"\bdef (\w+)", text := path.read_text()))
        for node in ast.walk(ast.parse(text))
        if isinstance(node, ast.FunctionDef)
    }

    assert len(named) > 40
    assert named - written == set()


def test_every_fault_of_the_plan_is_in_the_table_or_says_why_not() -> None:
    numbers = set[int]()
    for cell in re.findall(r"^\| ([\d, –]+) \|", (ROOT / "docs/faults.md").read_text(), re.MULTILINE):
        for part in cell.split(","):
            first, _, last = part.strip().partition("–")
            if first:
                numbers |= set(range(int(first), int(last or first) + 1))

    assert numbers == set(range(1, 63))


def test_every_edge_is_reached_at_exactly_one_place() -> None:
    calls = Counter(
        node.args[0].value
        for folder in ("api", "shared", "worker")
        for path in (ROOT / folder).rglob("*.py")
        if "reach(" in (text := path.read_text())
        for node in ast.walk(ast.parse(text))
        if isinstance(node, ast.Call)
        and ast.unparse(node.func).endswith("reach")
        and isinstance(node.args[0], ast.Constant)
    )

    assert calls == Counter(get_args(failpoints.Edge))


def test_without_the_setting_no_edge_does_anything(tmp_path: Path) -> None:
    settings = Settings(home=tmp_path / "home")

    for edge in get_args(failpoints.Edge):
        failpoints.reach(edge, settings)

    assert not settings.home.exists()


@pytest.mark.parametrize("junk", ["after_claim", "after_claim:sleep", "After:exit", "after_claim:exit:twice"])
def test_a_failpoint_that_could_not_act_is_refused(junk: str) -> None:
    with pytest.raises(ValidationError):
        Settings(failpoint=junk)


def test_leases_are_reckoned_with_the_databases_clock_alone() -> None:
    # pulse.py looks at the age of a file on its own host, and at nothing else.
    readers = {
        path.name
        for path in [*(ROOT / "worker").glob("*.py"), *(ROOT / "shared").glob("*.py")]
        if re.search(r"\btime\.time\(|datetime\.now\(|utcnow\(|date\.today\(", path.read_text())
    }

    assert readers <= {"pulse.py", "unpack.py"}  # a probe's file, and the time that an event shows


def test_a_seed_is_a_schedule() -> None:
    assert generate(7) == generate(7)
    assert generate(7) != generate(8)


def test_schedules_come_to_every_fault_and_every_edge() -> None:
    schedules = [generate(seed) for seed in range(1000)]

    assert {fault.name for schedule in schedules for fault in schedule.faults} == set(FAULTS)
    assert {schedule.failpoint.partition(":")[0] for schedule in schedules} == {"", *EDGES}
