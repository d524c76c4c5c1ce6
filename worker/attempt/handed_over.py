"""One attempt on a machine that a cluster gave: `python -m worker.attempt.handed_over ATTEMPT`.

Takes exactly that attempt's lease from its dispatcher, trains, publishes and ends. It is no worker of the pool: it
offers no device and takes no other work. Whoever comes second finds the attempt taken, and ends in silence.
"""

from __future__ import annotations

import gc
import shutil
import signal
import sys
from dataclasses import replace
from functools import partial

if __name__ == "__main__":
    # What imports make lives to the end: to look through it meanwhile is a quarter of the start.
    gc.disable()

import structlog
from sqlalchemy.orm import Session

from shared import log as logs
from shared.jobs import moves
from shared.jobs.cluster_attempts import promised_kind, read_name
from shared.lease.values import Claim, WrittenByNewerVersion
from shared.operating.isolation import IsolationLacking
from shared.operating.secrecy import hide_secrets
from shared.settings import Settings
from shared.store import schema
from shared.store.schema import SchemaOutdated
from worker.attempt.supervisor import run_attempt
from worker.host.devices import NoSuchDevice
from worker.host.flags import SharedFlags
from worker.host.host import AWAY, Host, beside, open_host
from worker.host.presence import HomeAlreadyServed, take_home
from worker.program import processes

log = structlog.get_logger()

# The cluster's own books call this a failure; the dispatcher reads it there, as long as nobody took the attempt over.
EXIT_UNFIT = 1


def run(name: str, settings: Settings, *, flags: SharedFlags) -> int:
    """The exit code: 0 when the attempt was carried to its end, or was not ours to begin."""
    own = beside(settings, f"attempts/{name}")
    try:
        lock = take_home(own.home)
    except HomeAlreadyServed:
        log.warning("handover.running_here", attempt=name)
        return 0
    try:
        return _carry_on(name, own, flags=flags)
    except (SchemaOutdated, IsolationLacking, NoSuchDevice, WrittenByNewerVersion, *AWAY) as error:
        log.error("handover.impossible", attempt=name, error=str(error)[:500])
        return EXIT_UNFIT
    finally:
        lock.close()
        shutil.rmtree(own.home, ignore_errors=True)


def _carry_on(name: str, settings: Settings, *, flags: SharedFlags) -> int:
    host = replace(open_host(settings, flags=flags), of_cluster=True)
    try:
        host.write_in_the_end(schema.must_serve)
        if flags.draining:
            return EXIT_UNFIT  # the machine is wanted back already: the attempt is left to the dispatcher
        claim = host.write_in_the_end(partial(_take, host, name))
        if claim is None:
            log.info("handover.nothing_to_do", attempt=name)
        elif (fitted := _on_this_node(host, claim)) is not None:
            run_attempt(host, fitted)
        return 0
    finally:
        host.engine.dispose()


def _take(host: Host, name: str, session: Session) -> Claim | None:
    return moves.take_over(
        session, name, worker_id=host.worker.id, host=host.worker.host, lease_seconds=host.settings.lease_seconds
    )


def _on_this_node(host: Host, claim: Claim) -> Claim | None:
    """The claim with the devices that the cluster gave, in place of those that the plan counted.

    None: they are too few or of another kind. Then the attempt is over, and the job hears it.
    """
    wanted = len(claim.device_ids)
    kind = host.write_in_the_end(lambda s: promised_kind(s, claim))
    usable = [device for device in host.devices if device.healthy and device.kind == (kind or device.kind)]
    if len(usable) >= wanted:
        return replace(claim, device_ids=tuple(f"{host.worker.host}:{device.uuid}" for device in usable[:wanted]))
    shown = ", ".join(f"{device.name}{'' if device.healthy else f' ({device.ailment})'}" for device in host.devices)
    message = f"The cluster gave host {host.worker.host} for {wanted} devices ({kind}), and it has: {shown}."
    host.write_in_the_end(
        lambda s: moves.give_back(
            s, claim.lease, outcome="crashed", code="cluster_devices_missing", message=message, settings=host.settings
        )
    )
    return None


def main() -> int:
    """Serve one attempt. SIGTERM, from a time limit or a preemption, means: save a checkpoint and end."""
    hide_secrets()
    settings = Settings()
    logs.configure(settings)
    if read_name(sys.argv[1]) is None:
        log.error("handover.no_such_name", attempt=sys.argv[1][:100])
        return EXIT_UNFIT
    flags = SharedFlags()
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda _number, _frame: flags.drain())
    processes.adopt_strays()
    return run(sys.argv[1], settings, flags=flags)


if __name__ == "__main__":
    gc.freeze()
    gc.enable()
    sys.exit(main())
