"""Brings base models to this host before a job needs them. No device is held meanwhile."""

from __future__ import annotations

import time
from functools import partial

import structlog

from shared.chores import cold_jobs, fetches
from shared.chores.fetches import FETCH, Fetch
from shared.errors import TunepoolError, Unavailable
from shared.settle.catalogue import CatalogueEntry
from shared.store.bell import ring
from worker import base_models
from worker.chores.run_program import LeaseWatch, under_lease
from worker.host.host import AWAY, Host

log = structlog.get_logger()


def fetch_next(host: Host) -> bool:
    """Fetch one base model that was asked of this worker, if any. False: none was, or the worker drains."""
    wanted = host.claim(
        partial(
            fetches.claim,
            worker_id=host.worker.id,
            lease_seconds=host.settings.lease_seconds,
            turn=host.turn("fetch"),
        )
    )
    if wanted is None:
        return False
    host.served["fetch"] = wanted.project_id
    return under_lease(host, FETCH, wanted.lease, partial(_fetch, host, wanted))


def _fetch(host: Host, wanted: Fetch, watch: LeaseWatch) -> None:
    """Raises Stopped."""
    settings = host.settings
    try:
        entry = host.catalogue().entry(wanted.model)
        teller = _Teller(host, wanted, entry, watch)
        teller.tell()
        folder = base_models.ensure(entry, cache=settings.cache, interrupt=teller.check, most=settings.cache_bytes)
    except Unavailable as error:
        reason, log_reason = "Its source does not answer this host, or there is no room for it now.", error.message
        host.write_in_the_end(lambda s: cold_jobs.put_off(s, wanted, error=reason))
        log.warning("fetch.unavailable", model=wanted.model, reason=log_reason)
    except TunepoolError as error:
        code, sentence = error.code, error.message
        host.write_in_the_end(lambda s: cold_jobs.refuse(s, wanted, code=code, error=sentence))
        log.warning("fetch.refused", model=wanted.model, reason=sentence)
    else:
        size = base_models.bytes_in(folder)
        host.write_in_the_end(lambda s: cold_jobs.arrived(s, wanted, size=size))
        ring("training", host.settings)  # jobs wait for it
        log.info("fetch.done", model=wanted.model, bytes=size)


class _Teller:
    """Keeps the lease, and notes now and then how far the fetch is."""

    def __init__(self, host: Host, wanted: Fetch, entry: CatalogueEntry, watch: LeaseWatch) -> None:
        self._host, self._lease, self._entry, self._watch = host, wanted.lease, entry, watch
        self._total = base_models.expected_bytes(entry)
        self._told = time.monotonic()

    def check(self) -> None:
        """Raises Stopped."""
        self._watch.check()
        if time.monotonic() - self._told >= self._host.settings.control_seconds:
            self._told = time.monotonic()
            self.tell()

    def tell(self) -> None:
        """Write how many bytes are here. A database that is away hears it the next time."""
        done = base_models.bytes_here(self._entry, cache=self._host.settings.cache)
        try:
            self._host.write(lambda s: fetches.tell(s, self._lease, done=done, total=self._total))
        except AWAY as error:
            log.warning("fetch.unheard", error=str(error)[:200])
