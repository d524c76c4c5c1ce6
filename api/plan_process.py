"""Makes plans that show why jobs wait. A plan that takes long is made in a process of its own.

Planning computes. In the process that answers requests it would hold the interpreter meanwhile, and polls would wait
for it: 0.2 s for 10,000 waiting jobs.
"""

from __future__ import annotations

import gc
import pickle
import select
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from datetime import datetime
from typing import Any, Final

if __name__ == "__main__":
    # What imports make lives to the end: to look through it meanwhile is a quarter of the start.
    gc.disable()

import structlog
from sqlalchemy import Engine

from shared.fleet import snapshot
from shared.operating.secrecy import hide_secrets
from shared.plan.verdicts import Verdict
from shared.store.db import make_engine, session_scope

log = structlog.get_logger()

LONG_SECONDS: Final = 0.05  # about 2,000 waiting jobs
PATIENCE_SECONDS: Final = 20.0  # longer than a statement may take: who says nothing for so long is frozen


@dataclass(frozen=True, slots=True)
class PlanAnswer:
    """The verdicts of one plan, when it was made, and how long that took."""

    verdicts: Mapping[str, Verdict]
    starting: frozenset[str]  # jobs that a worker is about to start
    as_of: datetime  # the database's clock
    seconds: float  # that it took
    blocked: Counter[tuple[str, str]]  # how many wait by (project, reason)


class Planner:
    """Makes plans, one after the other, for one thread."""

    def __init__(self, engine: Engine, *, pool_name: str) -> None:
        self._engine = engine
        self._pool_name = pool_name
        self._apart: subprocess.Popen[bytes] | None = None
        self._long = False

    def plan(self) -> PlanAnswer:
        """The plan of this moment. Raises SQLAlchemy's errors when the database is away."""
        made = self._plan_apart() if self._long else make(self._engine, self._pool_name)
        self._long = made.seconds > (LONG_SECONDS / 4 if self._long else LONG_SECONDS)
        if not self._long:
            self.close()
        return made

    def _plan_apart(self) -> PlanAnswer:
        try:
            if self._apart is None:
                self._apart = _start(self._engine, self._pool_name)
            return _ask(self._apart)
        except (OSError, EOFError, pickle.UnpicklingError) as error:
            log.warning("planner.died", error=str(error)[:200])  # it has said why on stderr, which is ours
            self.close()
            return make(self._engine, self._pool_name)

    def close(self) -> None:
        """End the process apart, if there is one."""
        if self._apart is not None:
            self._apart.kill()
            self._apart.communicate()
            self._apart = None


def make(engine: Engine, pool_name: str) -> PlanAnswer:
    """Read the pool and plan."""
    begun = time.monotonic()
    with session_scope(engine) as session:
        view = snapshot.snapshot(session, pool_name=pool_name)
    made = snapshot.make_plan(view)
    next(iter(made.verdicts.values()), None)  # wording the first verdict works out the forecast for all
    starting = frozenset(assignment.job_id for assignment in made.assignments)
    return PlanAnswer(made.verdicts, starting, view.now, time.monotonic() - begun, made.verdicts.blocked())


class _Packed(Mapping[str, Verdict]):
    """Verdicts as bytes. Each is unpickled when it is read: ten thousand at once would hold the interpreter."""

    def __init__(self, packed: dict[str, bytes]) -> None:
        self._packed = packed

    def __iter__(self) -> Iterator[str]:
        return iter(self._packed)

    def __len__(self) -> int:
        return len(self._packed)

    def __contains__(self, job_id: object) -> bool:
        return job_id in self._packed

    def __getitem__(self, job_id: str) -> Verdict:
        verdict: Verdict = pickle.loads(self._packed[job_id])  # noqa: S301  # from our own process, by a pipe
        return verdict


# ---- the process apart: `python -m api.plan_process`. It plans whenever it is asked. It ends with its standard input,
# so it does not outlive a killed API.


def _start(engine: Engine, pool_name: str) -> subprocess.Popen[bytes]:
    apart = subprocess.Popen([sys.executable, "-m", "api.plan_process"], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    _send(apart.stdin, (engine.url.render_as_string(hide_password=False), pool_name))  # not by argv: it has a password
    return apart


def _ask(apart: subprocess.Popen[bytes]) -> PlanAnswer:
    _send(apart.stdin, "plan")
    assert apart.stdout is not None
    poller = select.poll()  # select() knows no file numbers above 1,023, and streams have many
    poller.register(apart.stdout, select.POLLIN)
    if not poller.poll(PATIENCE_SECONDS * 1000):
        raise TimeoutError(f"no plan within {PATIENCE_SECONDS:g} s")
    packed, starting, as_of, seconds, blocked = pickle.load(apart.stdout)  # noqa: S301  # from our own process
    return PlanAnswer(_Packed(packed), starting, as_of, seconds, blocked)


def _send(pipe: Any, what: object) -> None:
    pickle.dump(what, pipe)
    pipe.flush()


def main() -> None:
    """Answer requests for a plan until the pipe closes. An error ends the process; the parent then plans itself."""
    hide_secrets()
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the API's to answer, which then ends this process
    url, pool_name = pickle.load(sys.stdin.buffer)  # noqa: S301  # from our own process, by a pipe
    engine = make_engine(url, pool_size=1, max_overflow=0)
    answers, sys.stdout = sys.stdout.buffer, sys.stderr  # nothing but answers, whatever is logged
    while True:
        try:
            pickle.load(sys.stdin.buffer)  # noqa: S301
        except EOFError:
            return
        begun = time.monotonic()
        made = make(engine, pool_name)
        packed = {job_id: pickle.dumps(verdict) for job_id, verdict in made.verdicts.items()}
        _send(answers, (packed, made.starting, made.as_of, time.monotonic() - begun, made.blocked))


if __name__ == "__main__":
    gc.freeze()
    gc.enable()
    main()
