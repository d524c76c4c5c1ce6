"""Who does the CPU lane's work: a handler for each row of `shared.chores.table`."""

from __future__ import annotations

from collections.abc import Callable, Collection
from typing import Final

from shared.chores.table import CHORES
from worker.chores.checks import check_next_file, check_next_table, validate_next_job
from worker.chores.evaluating import evaluate_next
from worker.chores.exporting import export_next
from worker.chores.fetching import fetch_next
from worker.chores.looking_up import look_up_next
from worker.chores.merging import make_next
from worker.chores.preflighting import examine_next
from worker.chores.sending import send_next
from worker.chores.tracking import track_next
from worker.host.host import Host

# Each does one piece of work if any may begin. False: there is none now.
HANDLERS: Final[dict[str, Callable[[Host], bool]]] = {
    "settle": validate_next_job,
    "file_check": check_next_file,
    "table_check": check_next_table,
    "base_model": look_up_next,
    "delivery": send_next,
    "tracking": track_next,
    "preflight": examine_next,
    "fetch": fetch_next,
    "merge": make_next,
    "export": export_next,
    "evaluation": evaluate_next,
}


def do_next(host: Host, *, left: Collection[str] = ()) -> bool:
    """Do the first piece of work that waits, in the table's order. False: nothing waits that may begin now.

    `left`: chores that are left to others.
    """
    return any(HANDLERS[name](host) for name in CHORES if name not in left)
