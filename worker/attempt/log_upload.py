"""Brings logs of attempts to where people read them: the newest lines to Postgres, the whole of one to the store."""

from __future__ import annotations

import contextlib
from pathlib import Path

import structlog

from shared.contract.documents import StoredLog
from shared.errors import TunepoolError
from shared.jobs import trainer_log
from shared.store import layout
from worker.attempt import kept_log
from worker.attempt.kept_log import KeptLog
from worker.host.host import AWAY, Host

log = structlog.get_logger()


def tell(host: Host, kept: KeptLog, job_id: str, fence: int) -> None:
    """Tell what was printed since. Raises one of `AWAY`."""
    news = kept.news()
    if news is None:
        return
    host.write(lambda s: trainer_log.tell(s, job_id, fence, start=news.start, lines=news.text, size=news.size))
    kept.forget(news)


def hand_over(host: Host, kept: KeptLog, job_id: str, fence: int) -> None:
    """Give the whole log to the store, once the attempt has ended. If that fails it stays, and is left behind."""
    kept.let_go()
    send_left(host)
    if kept.folder.exists():
        log.warning("log.kept_here", job_id=job_id, fence=fence, remedy="it is sent when a next attempt ends here")


def send_left(host: Host) -> None:
    """Send every log of this home that no living supervisor holds: this attempt's, and those that others left."""
    with kept_log.left_behind(host.logs) as left:
        for log_here in left:
            try:
                _send(host, log_here.folder, log_here.job_id, log_here.fence)
            except AWAY as error:
                log.warning("log.unsent", job_id=log_here.job_id, error=str(error)[:200])
                return
            except TunepoolError as error:
                log.warning("log.unsent", job_id=log_here.job_id, error=error.message[:200])
                return
            except OSError as error:
                log.warning("log.unreadable", job_id=log_here.job_id, error=str(error)[:200])


def _send(host: Host, folder: Path, job_id: str, fence: int) -> None:
    project_id = host.write(lambda s: trainer_log.owner(s, job_id, fence))
    if project_id is not None:
        log_file = kept_log.whole(folder)
        put = host.store.put_bytes(layout.log_key(project_id, job_id, fence), log_file.content)
        stored = StoredLog(
            key=put.key,
            bytes=put.bytes,
            sha256=put.sha256,
            size=log_file.size,
            head_bytes=log_file.head_bytes,
            tail_from=log_file.tail_from,
            tail_at=log_file.tail_at,
        )
        host.write(lambda s: trainer_log.store(s, job_id, fence, stored))
    with contextlib.suppress(OSError):
        kept_log.remove(folder)
