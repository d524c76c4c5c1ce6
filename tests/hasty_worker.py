"""A worker for one attempt whose supervisor's clock runs too fast: `python -m tests.hasty_worker SPEED`.

A limit of run time is a minute at least; so no test has to wait for one. It ends when the attempt has ended.
"""

from __future__ import annotations

import sys
import time

from shared.chores import table as chores
from shared.fleet import workers
from shared.jobs import moves
from shared.settings import Settings
from worker.attempt.supervisor import run_attempt
from worker.base_models import cached_names
from worker.chores.checks import check_next_file, validate_next_job
from worker.host.flags import SharedFlags
from worker.host.host import open_host
from worker.host.presence import describe
from worker.program import processes


def main(speed: float) -> None:
    processes.adopt_strays()
    host = open_host(Settings(), flags=SharedFlags())
    cached = cached_names(host.catalogue(), cache=host.settings.cache)
    devices = [describe(found, host=host.worker.host, cached=cached) for found in host.devices]
    host.write(lambda s: workers.register(s, host.worker, devices, leased=chores.leased_rows()))
    while check_next_file(host) or validate_next_job(host):
        pass
    claim = host.write(
        lambda s: moves.claim_training(s, worker_id=host.worker.id, pool_name=host.settings.pool, lease_seconds=60)
    )
    assert claim is not None
    run_attempt(host, claim, clock=lambda: time.monotonic() * speed)


if __name__ == "__main__":
    main(float(sys.argv[1]))
