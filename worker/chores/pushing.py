"""The CPU lane's longer work: pushes. The files come here, verified, and a program brings them to the hub."""

from __future__ import annotations

from typing import Final

import structlog

from shared.chores import pushes
from shared.chores.exports import RECORDS, PushClaim
from shared.errors import TunepoolError, Unavailable
from shared.tenants.secret_box import SecretBox
from worker.chores import library_program
from worker.chores.library_program import LibraryFailed
from worker.chores.run_program import LeaseWatch
from worker.host.host import Host
from worker.program import workdir

log = structlog.get_logger()

PUSH_SECONDS: Final = 6 * 3600.0


def push(host: Host, claim: PushClaim, watch: LeaseWatch) -> None:
    """Bring the files there, or write why not. Raises Stopped."""
    try:
        _bring(host, claim, watch)
    except (Unavailable, LibraryFailed) as error:
        message = error.message
        host.write_in_the_end(lambda s: RECORDS.give_back(s, claim.lease, code="hub_failed", message=message))
    except TunepoolError as error:
        code, message, param = error.code, error.message, error.param
        host.write_in_the_end(lambda s: RECORDS.fail(s, claim.lease, code=code, message=message, param=param))


def _bring(host: Host, claim: PushClaim, watch: LeaseWatch) -> None:
    load = host.write(lambda s: pushes.load(s, claim))
    token = SecretBox(host.settings).open(load.sealed)
    place = workdir.make(host.work, claim.lease)
    folder = place.data / "product"
    workdir.stage_files(host.store, load.files, folder, interrupt=watch.check)
    request = claim.request
    answer = library_program.ask(
        host,
        "worker.chores.hub_program",
        {
            "endpoint": host.settings.push_url.rstrip("/"),
            "token": token,
            "repository": request.repository,
            "private": request.private,
            "folder": str(folder),
            "message": f"{request.model}, by Tunepool",
        },
        lease=claim.lease,
        watch=watch,
        seconds=PUSH_SECONDS,
        place=place,
        # Its other way of uploading has stores of its own, which a hub of another kind does not know.
        environment={"HF_HUB_OFFLINE": "0", "HF_HUB_DISABLE_XET": "1", "HF_HUB_DISABLE_TELEMETRY": "1"},
    )
    if (status := answer.get("refused")) is not None:
        message = f"The hub refuses {request.repository} ({status}): the token may not write there, or has ended."
        host.write_in_the_end(
            lambda s: RECORDS.fail(s, claim.lease, code="hub_refused", message=message, param="repository")
        )
        return
    manifest = {"url": answer["url"], "commit": answer["commit"]}
    done = host.write_in_the_end(lambda s: RECORDS.finish(s, claim.lease, manifest=manifest))
    log.info("push.ended", export_id=claim.lease.id, published=done)
