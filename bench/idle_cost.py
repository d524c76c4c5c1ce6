"""What an idle stack costs: `python -m bench.idle_cost [--seconds N]`.

Starts a stack in a folder of its own, lets it settle, and counts over a minute the CPU time of each kind of process and
the statements that Postgres is asked, transaction brackets apart. Then the worker's processes are frozen for a while:
what is asked no more was the worker's.
"""

from __future__ import annotations

import argparse
import re
import signal
import tempfile
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import psutil
from rich.console import Console
from rich.table import Table
from sqlalchemy import create_engine, text

from bench.machine import header
from examples.stack import running_stack
from standalone.postgres import running_url

SETTLE_SECONDS: Final = 20.0
# Words of a command line -> what it is. The first match counts; celery's children carry its command line.
KINDS: Final = {
    "celery": "worker",
    "worker.janitor": "janitor",
    "api.serve": "api",
    "postgres": "postgres",
    "valkey": "valkey",
    "tunepool-server": "supervisor",
}
_STATEMENT: Final = re.compile(r"LOG:  (?:statement|execute [^:]*): (.*)")
_BRACKETS: Final = ("BEGIN", "COMMIT", "ROLLBACK")


@dataclass(frozen=True)
class Window:
    """What happened within some seconds."""

    seconds: float
    cpu: dict[str, float]  # kind -> share of one core
    statements: Counter[str]
    brackets: int

    @property
    def queries(self) -> float:
        return self.statements.total() / self.seconds


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=60.0)
    seconds = parser.parse_args().seconds
    print(header(), flush=True)
    with tempfile.TemporaryDirectory() as folder, running_stack(Path(folder)):
        log = Path(folder) / "logs" / "postgres.log"
        log_statements(Path(folder))
        time.sleep(SETTLE_SECONDS)
        processes = family()
        whole = observe(processes, log, seconds=seconds)
        with frozen([process for kind, process in processes if kind == "worker"]):
            rest = observe(processes, log, seconds=seconds / 2)
    show(whole, rest)


def log_statements(home: Path) -> None:
    """Have the running server write every statement to its log, without a restart."""
    url = running_url(home / "postgres")
    assert url is not None, "the stack is up"
    with create_engine(url, isolation_level="AUTOCOMMIT").connect() as connection:
        connection.execute(text("ALTER SYSTEM SET log_statement = 'all'"))
        connection.execute(text("SELECT pg_reload_conf()"))


def family() -> list[tuple[str, psutil.Process]]:
    """Every process below this one, with its kind."""
    return [(kind_of(process), process) for process in psutil.Process().children(recursive=True)]


def kind_of(process: psutil.Process) -> str:
    line = " ".join(process.cmdline())
    return next((kind for word, kind in KINDS.items() if word in line), "other")


def observe(processes: Sequence[tuple[str, psutil.Process]], log: Path, *, seconds: float) -> Window:
    before, read, began = cpu_seconds(processes), log.stat().st_size, time.monotonic()
    time.sleep(seconds)
    spent = time.monotonic() - began
    cpu = {kind: (used - before[kind]) / spent for kind, used in cpu_seconds(processes).items()}
    asked = list(statements(log, since=read))
    brackets = sum(one.upper().startswith(_BRACKETS) for one in asked)
    queries = Counter(one for one in asked if not one.upper().startswith(_BRACKETS))
    return Window(seconds=spent, cpu=cpu, statements=queries, brackets=brackets)


def cpu_seconds(processes: Sequence[tuple[str, psutil.Process]]) -> Counter[str]:
    used: Counter[str] = Counter()
    for kind, process in processes:
        times = process.cpu_times()
        used[kind] += times.user + times.system  # type: ignore[assignment]  # a Counter counts seconds as well
    return used


def statements(log: Path, *, since: int) -> Iterator[str]:
    """First lines of the statements that the log got after byte `since`."""
    with log.open("rb") as stream:
        stream.seek(since)
        for line in stream:
            found = _STATEMENT.search(line.decode("utf-8", "replace"))
            if found is not None:
                yield found[1].strip()[:90]


@contextmanager
def frozen(processes: Sequence[psutil.Process]) -> Iterator[None]:
    for process in processes:
        process.send_signal(signal.SIGSTOP)
    try:
        yield
    finally:
        for process in processes:
            process.send_signal(signal.SIGCONT)


def show(whole: Window, rest: Window) -> None:
    table = Table("process", "share of a core", title=f"{whole.seconds:.0f} idle seconds")
    for kind, share in sorted(whole.cpu.items(), key=lambda one: -one[1]):
        table.add_row(kind, f"{share:.2%}")
    Console().print(table)
    transactions = whole.brackets / 2 / whole.seconds
    print(f"queries/s: {whole.queries:.2f} of the whole stack ({transactions:.2f} transactions/s);")
    print(f"           {rest.queries:.2f} with the worker frozen, so {whole.queries - rest.queries:.2f} of the worker")
    for statement, count in whole.statements.most_common(12):
        print(f"  {count / whole.seconds:6.2f}/s  {statement}")


if __name__ == "__main__":
    main()
