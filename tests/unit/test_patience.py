"""Waits of tests grow with the slowness of the machine, and one failed test leaves nothing open for the next."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Set
from functools import cache
from pathlib import Path

import pytest

from shared.settings import child_environment
from tests import patience as measured
from tests.unit.test_architecture import dotted

TESTS = Path(__file__).parents[1]
# Programs that the product or a test starts with an environment of their own, and what measures.
APART = {"patience.py", "fake_trainer.py", "fake_merger.py", "hasty_worker.py", "proxy.py", "sitecustomize.py"}
# Settings that a test shortens though a slow machine needs them longer.
SHORTENED = {f"TUNEPOOL_{name}_SECONDS" for name in ("LEASE", "GRACE", "STOP", "STALL_FLOOR")}
LONG_ANYWHERE = 300.0
CLOCKS = {
    *("time.time", "time.time_ns", "time.monotonic", "time.monotonic_ns", "time.perf_counter"),
    *("datetime.now", "datetime.utcnow", "datetime.datetime.now", "date.today", "datetime.date.today", "now"),
}


@cache
def trees() -> dict[Path, ast.Module]:
    files = (path for path in sorted(TESTS.rglob("*.py")) if path.name not in APART)
    return {path.relative_to(TESTS): ast.parse(path.read_text(encoding="utf-8")) for path in files}


@cache
def nodes(tree: ast.AST) -> tuple[ast.AST, ...]:
    """Every node of it: each scan looks at all of them."""
    return tuple(ast.walk(tree))


def fixed_waits(tree: ast.AST) -> list[int]:
    """Lines with a wait of a second or more, or a shortened setting, that no slowness changes."""
    found = []
    for node in nodes(tree):
        match node:
            case ast.Call(func=ast.Attribute(attr="wait" | "join" | "timeout"), args=[first]) if _number(first) >= 1:
                found.append(node.lineno)
            case ast.keyword(arg="timeout", value=value) if _number(value) >= 1:
                found.append(value.lineno)
            case ast.BinOp(left=left, right=right) if _is_clock(left) and _number(right) >= 1:
                found.append(node.lineno)
            case ast.keyword(arg=str(name), value=value) if name in SHORTENED and 0 < _text(value) < LONG_ANYWHERE:
                found.append(value.lineno)
            case ast.Dict(keys=keys, values=values):
                found += [
                    value.lineno
                    for key, value in zip(keys, values, strict=True)
                    if isinstance(key, ast.Constant) and key.value in SHORTENED and 0 < _text(value) < LONG_ANYWHERE
                ]
            case _:
                pass
    return found


def _number(node: ast.expr) -> float:
    is_number = isinstance(node, ast.Constant) and isinstance(node.value, int | float)
    return float(node.value) if is_number else 0.0


def _text(node: ast.expr) -> float:
    return float(node.value) if isinstance(node, ast.Constant) and isinstance(node.value, str) else 0.0


def _is_clock(node: ast.expr) -> bool:
    return isinstance(node, ast.Call) and ast.unparse(node) == "time.monotonic()"


def hasty_requests(tree: ast.AST) -> list[int]:
    """Lines of requests that give up after the client's own five seconds, on whatever machine."""
    asking = {"Client", "AsyncClient", "get", "post", "put", "patch", "delete", "head", "options", "request", "stream"}
    return [
        node.lineno
        for node in nodes(tree)
        if isinstance(node, ast.Call)
        and isinstance(node.func, ast.Attribute)
        and node.func.attr in asking
        and dotted(node.func.value) == "httpx2"
        and not {keyword.arg for keyword in node.keywords} & {"timeout", "transport", None}
    ]


def hard_bounds(tree: ast.AST) -> list[int]:
    """Lines that want something to have taken less than so many seconds, on whatever machine."""
    if not _may_read_a_clock(tree):
        return []
    lines, measured = [], _durations(tree)
    for node in nodes(tree):
        if isinstance(node, ast.Compare):
            sides = [node.left, *node.comparators]
            for left, compared, right in zip(sides, node.ops, sides[1:], strict=False):
                less, more = (right, left) if isinstance(compared, ast.Gt | ast.GtE) else (left, right)
                is_order = isinstance(compared, ast.Lt | ast.LtE | ast.Gt | ast.GtE)
                if is_order and _is_duration(less, measured) and isinstance(more, ast.Constant):
                    lines.append(node.lineno)
    return lines


def _may_read_a_clock(tree: ast.AST) -> bool:
    """Whether a name of it ends as a clock's does; most files have none, and what makes durations is long to find."""
    ends = {clock.rpartition(".")[2] for clock in CLOCKS}
    names = (getattr(node, "attr", getattr(node, "id", "")) for node in nodes(tree))
    return any(name in ends for name in names)


def _is_duration(node: ast.AST, measured: Set[str]) -> bool:
    """Whether it is a clock less something, or made of what is."""
    for part in ast.walk(node):
        if isinstance(part, ast.BinOp) and isinstance(part.op, ast.Sub):
            calls = (call for call in ast.walk(part) if isinstance(call, ast.Call))
            if any(dotted(call.func) in CLOCKS for call in calls):
                return True
        if isinstance(part, ast.Name) and part.id in measured:
            return True
    return False


def _durations(tree: ast.AST) -> Set[str]:
    """Names of variables, lists and functions of this file that are seconds by a clock."""
    measured: set[str] = set()
    for _ in range(3):  # one may be made of another
        for node in nodes(tree):
            match node:
                case ast.Assign(targets=[ast.Name(id=name)], value=value) if _is_duration(value, measured):
                    measured.add(name)
                case ast.Call(func=ast.Attribute(attr="append", value=ast.Name(id=name)), args=[value]) if _is_duration(
                    value, measured
                ):
                    measured.add(name)
                case ast.FunctionDef(name=name) if any(
                    isinstance(part, ast.Return) and part.value is not None and _is_duration(part.value, measured)
                    for part in ast.walk(node)
                ):
                    measured.add(name)
                case _:
                    pass
    return measured


def unguarded_looks(tree: ast.AST) -> list[int]:
    """Lines that ask psutil what raises when a process ends between two looks (tests/living.py answers instead)."""
    asked = {"children", "cmdline", "environ", "is_running", "status"}
    walks = {"process_iter", "wait_procs", "pid_exists", "pids"}
    return [
        node.lineno
        for node in nodes(tree)
        if isinstance(node, ast.Call)
        and isinstance(node.func, ast.Attribute)
        and (
            (node.func.attr in asked and ast.unparse(node.func.value) != "living")
            or (node.func.attr in walks and ast.unparse(node.func.value) == "psutil")
        )
    ]


def early_clocks(tree: ast.Module) -> list[int]:
    """Lines that read a clock while tests are collected: the test may run an hour later."""
    lines, outside = [], list(tree.body)
    while outside:
        node = outside.pop()
        if isinstance(node, ast.Call) and dotted(node.func) in CLOCKS:
            lines.append(node.lineno)
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            outside += [*node.decorator_list, node.args]
        elif not isinstance(node, ast.Lambda):
            outside += ast.iter_child_nodes(node)
    return lines


def unguarded_yields(tree: ast.AST) -> list[int]:
    """Lines of context managers that yield outside every `with` and `try`, and still have something to do after it."""
    found = []
    for function in nodes(tree):
        if isinstance(function, ast.FunctionDef) and any(
            "contextmanager" in ast.unparse(d) for d in function.decorator_list
        ):
            found += [
                one.lineno
                for one in function.body[:-1]
                if isinstance(one, ast.Expr | ast.Assign) and isinstance(one.value, ast.Yield)
            ]
    return found


def test_no_test_waits_a_fixed_time_or_shortens_a_lease_by_a_fixed_one() -> None:
    assert [f"{path}:{line}" for path, tree in trees().items() for line in fixed_waits(tree)] == []


@pytest.mark.parametrize(
    "line",
    [
        "process.wait(30)",
        "get(url, timeout=20)",
        "pytest.mark.timeout(900)",
        "deadline = time.monotonic() + 10",
        "start_worker(TUNEPOOL_LEASE_SECONDS='3')",
        "QUICK = {'TUNEPOOL_STOP_SECONDS': '3'}",
    ],
)
def test_the_scan_for_fixed_waits_sees_each_kind(line: str) -> None:
    assert fixed_waits(ast.parse(line)) == [1]


def test_no_request_of_a_test_gives_up_sooner_than_a_slow_machine_answers() -> None:
    assert [f"{path}:{line}" for path, tree in trees().items() for line in hasty_requests(tree)] == []
    assert hasty_requests(ast.parse("httpx2.get(url)\nhttpx2.Client(base_url=url, timeout=patience(20))")) == [1]


def test_no_test_wants_something_done_in_so_many_seconds_of_whatever_machine() -> None:
    assert [f"{path}:{line}" for path, tree in trees().items() for line in hard_bounds(tree)] == []


@pytest.mark.parametrize(
    ("line", "lines"),
    [
        ("assert time.monotonic() - began < 5", [1]),
        ("assert 0.9 < time.perf_counter() - began <= 20.0", [1]),
        ("assert 5 > time.time() - began", [1]),
        ("taken.append(time.monotonic() - began)\nassert max(taken) < 2.0", [2]),
        ("def timed(): return time.monotonic() - began\nall_ = [timed(), timed()]\nassert min(all_) < 1", [3]),
        ("assert time.monotonic() - began < patience(5)", []),
        ("assert time.monotonic() - began > 0.9", []),
        ("assert size - before < 5", []),
    ],
)
def test_the_scan_for_hard_bounds_sees_each_kind(line: str, lines: list[int]) -> None:
    assert hard_bounds(ast.parse(line)) == lines


def test_no_test_looks_at_a_process_that_may_just_have_ended_but_by_the_module_that_expects_it() -> None:
    files = {path: tree for path, tree in trees().items() if path.name != "living.py"}

    assert [f"{path}:{line}" for path, tree in files.items() for line in unguarded_looks(tree)] == []
    assert unguarded_looks(trees()[Path("living.py")]) != []


@pytest.mark.parametrize(
    ("line", "lines"),
    [
        ("[p.environ() for p in stack.trainers()]", [1]),
        ("psutil.Process(pid).children(recursive=True)", [1]),
        ("for p in psutil.process_iter(): pass", [1]),
        ("alive = child.is_running() and child.status() != psutil.STATUS_ZOMBIE", [1, 1]),
        ("psutil.wait_procs(ranks, timeout=patience(5))", [1]),
        ("living.children(psutil.Process(pid))", []),
        ("os.environ['HOME'], job.status", []),
    ],
)
def test_the_scan_for_unguarded_looks_sees_each_kind(line: str, lines: list[int]) -> None:
    assert unguarded_looks(ast.parse(line)) == lines


def test_no_test_keeps_a_moment_from_when_it_was_collected() -> None:
    assert {str(path): lines for path, tree in trees().items() if (lines := early_clocks(tree))} == {}


@pytest.mark.parametrize(
    "text",
    [
        "START = time.time()",
        "@parametrize('at', [datetime.now(UTC)])\ndef test(at): ...",
        "def at(t=now()): ...",
    ],
)
def test_the_scan_for_early_clocks_sees_each_kind(text: str) -> None:
    assert early_clocks(ast.parse(text)) == [1]
    assert early_clocks(ast.parse("def test():\n    start = time.time()\nlater = lambda: time.time()")) == []


def test_what_a_block_opens_is_closed_also_when_the_test_fails() -> None:
    assert [f"{path}:{line}" for path, tree in trees().items() for line in unguarded_yields(tree)] == []
    # A stack that is made and then fails to start would keep its processes and connections.
    makers = [
        str(path)
        for path, tree in trees().items()
        for node in nodes(tree)
        if isinstance(node, ast.Call) and dotted(node.func) == "make_stack"
    ]
    assert makers == ["lifecycle/stack.py"]


def test_the_scan_for_unguarded_blocks_sees_one() -> None:
    careless = "@contextmanager\ndef opened():\n    it = open()\n    yield it\n    it.close()\n"
    careful = "@contextmanager\ndef opened():\n    try:\n        yield 1\n    finally:\n        close()\n"

    assert unguarded_yields(ast.parse(careless)) == [4]
    assert unguarded_yields(ast.parse(careful)) == []


def test_the_machine_is_measured_and_never_shortens_a_wait() -> None:
    assert 1.0 <= measured.slowness() <= measured.SLOWEST


@pytest.mark.parametrize("slowness", [1.0, 2.0, 5.0])
def test_a_slow_machine_waits_longer_and_keeps_steps_and_leases_in_relation(slowness: float) -> None:
    program = (
        "from tests.patience import lease, paced, patience\n"
        "print(patience(10), float(lease(3)), paced('steps=9 step_seconds=0.05 save=3'))"
    )
    told = subprocess.run(
        [sys.executable, "-c", program],
        env=child_environment(**{measured.MEASURED: str(slowness)}),
        cwd=TESTS.parent,
        capture_output=True,
        text=True,
        check=True,
    ).stdout.split()
    pace = min(slowness, measured.SLOWEST_PACE)

    assert float(told[0]) == 10 * slowness * measured.COMPANY
    assert float(told[1]) == 3 * pace
    assert told[2:] == ["steps=9", f"step_seconds={0.05 * pace:.3f}", "save=3"]
