"""1,000 queued jobs cancelled with one order, and beside it one request for each: `python bench/bulk_cancel.py`.

Embedded Postgres with fsync on, the API in this process, requests over loopback.
"""

from __future__ import annotations

import argparse
import os
import platform
import sys
import tempfile
import time
from pathlib import Path

import httpx2

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from bench.machine import header
from shared.settings import Settings
from shared.store.db import make_engine, session_scope
from standalone.migrate import migrate
from standalone.postgres import EmbeddedPostgres
from tests.factories import make_file, make_job, make_key
from tests.live import live_api


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--jobs", type=int, default=1000)
    count = parser.parse_args().jobs
    print(header(), flush=True)
    with tempfile.TemporaryDirectory() as folder:
        postgres = EmbeddedPostgres(Path(folder) / "postgres")
        postgres.start()
        try:
            url = postgres.url("postgres")
            migrate(url)
            measure(Settings(home=Path(folder), database_url=url, redis_url=""), count)
        finally:
            postgres.stop()


def measure(settings: Settings, count: int) -> None:
    engine = make_engine(settings.database_url)
    print(f"Python {platform.python_version()}, {os.cpu_count()} cores, load {os.getloadavg()[0]:.1f}")
    with session_scope(engine) as session:
        caller, secret = make_key(session)
    with live_api(settings) as url, httpx2.Client(base_url=url, timeout=120) as http:
        http.headers["Authorization"] = f"Bearer {secret}"
        seconds = []
        for together in (True, False):
            with session_scope(engine) as session:
                file = make_file(session, caller)
                ids = [make_job(session, caller, file=file).id for _ in range(count)]
            began = time.perf_counter()
            if together:
                done = http.post("/v1/tunepool/jobs/cancel", json={"all": True}).json()
                assert len(done["cancelled"]) == count
            else:
                for job_id in ids:
                    assert http.post(f"/v1/fine_tuning/jobs/{job_id}/cancel").json()["status"] == "cancelled"
            seconds.append(time.perf_counter() - began)
    engine.dispose()
    print(f"{count:,} jobs, one order: {seconds[0]:.3f} s; one request each: {seconds[1]:.2f} s")
    print(f"ratio {seconds[1] / seconds[0]:.0f} : 1")


if __name__ == "__main__":
    main()
