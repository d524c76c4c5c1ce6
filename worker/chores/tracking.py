"""Brings the figures of jobs to trackers: Weights & Biases, MLflow, and event files for TensorBoard."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import Final

import structlog

from shared.chores import trackings
from shared.chores.points import CurvePoint
from shared.chores.trackings import TRACKING, Tracking, TrackingResult
from shared.errors import Invalid, TunepoolError
from shared.lease.values import NewFile
from shared.store import layout
from shared.tenants import project_secrets
from shared.tenants.secret_box import SecretBox
from worker.chores import library_program
from worker.chores.mlflow_line import MlflowFailed, MlflowLine
from worker.chores.run_program import LeaseWatch, under_lease
from worker.host.host import Host
from worker.host.libraries import fed_here
from worker.program import workdir

log = structlog.get_logger()

WANDB_SECONDS: Final = 120.0
EVENT_FILE_SECONDS: Final = 120.0
EVENT_FILE: Final = "events.out.tfevents.tunepool"
TAG_CHARACTERS: Final = 64  # of Weights & Biases


def track_next(host: Host) -> bool:
    """Bring what there is of one job to one of its trackers, if any waits. False: none does."""
    due = host.claim(
        partial(
            trackings.claim,
            worker_id=host.worker.id,
            lease_seconds=host.settings.lease_seconds,
            trackers=fed_here(),
        )
    )
    return due is not None and under_lease(host, TRACKING, due.lease, partial(_track, host, due))


def _track(host: Host, due: Tracking, watch: LeaseWatch) -> None:
    fed = feed(host, due, watch)
    seconds = host.settings.tracker_seconds
    host.write_in_the_end(lambda s: trackings.finish(s, due, fed, pause_seconds=seconds))
    log.info("job.tracked", job_id=due.job_id, tracker=due.tracker, points=len(due.points), error=fed.error)


def feed(host: Host, due: Tracking, watch: LeaseWatch) -> TrackingResult:
    """One try. Raises Stopped."""
    if not due.points and not due.final:  # the newest step is not whole yet
        return TrackingResult()
    try:
        return _FEEDERS[due.tracker](host, due, watch)
    except (MlflowFailed, TunepoolError) as error:
        return TrackingResult(error=str(error))


def _secrets(host: Host, due: Tracking) -> Mapping[str, str]:
    """Raises Invalid: one that is needed was removed, or this worker has not the key of the installation."""
    for name in project_secrets.NEEDED[due.tracker]:
        if name not in due.sealed:
            raise Invalid(f"The project has no secret {name} any more.", code="secret_missing")
    box = SecretBox(host.settings)
    return {name: box.open(sealed) for name, sealed in due.sealed.items()}


def _feed_mlflow(host: Host, due: Tracking, watch: LeaseWatch) -> TrackingResult:
    return MlflowLine(_secrets(host, due), host.settings, between=watch.check).feed(due)


def _feed_wandb(host: Host, due: Tracking, watch: LeaseWatch) -> TrackingResult:
    run_id = due.job_id if due.place == 0 else f"{due.job_id}-{due.place}"
    own_tags = ("tunepool/finetune", f"tunepool/{due.facts['base_model']}", f"tunepool/{due.job_id}")
    answer = library_program.ask(
        host,
        "worker.chores.wandb_program",
        {
            "base_url": host.settings.wandb_url,
            "api_key": _secrets(host, due)[project_secrets.WANDB_API_KEY],
            "run_id": run_id,
            "project": due.options["project"],
            "entity": due.options.get("entity"),
            "name": due.run_name,
            "tags": [*due.options.get("tags", ()), *(tag[:TAG_CHARACTERS] for tag in own_tags)],
            "config": due.facts,
            "points": _plain(due.points),
            "ending": due.ending if due.final else None,
        },
        lease=due.lease,
        watch=watch,
        seconds=WANDB_SECONDS,
    )
    return TrackingResult(run_id=run_id, url=answer["url"])


def _write_event_file(host: Host, due: Tracking, watch: LeaseWatch) -> TrackingResult:
    """A job that measured nothing has no file."""
    if not due.points:
        return TrackingResult()
    library_program.ask(
        host,
        "worker.chores.event_file_program",
        {"points": _plain(due.points), "filename": EVENT_FILE},
        lease=due.lease,
        watch=watch,
        seconds=EVENT_FILE_SECONDS,
    )
    # The same id at each try: one that died before its commit has left the same bytes under the same key.
    file_id = f"file-{due.lease.id.removeprefix('tracking_')}"
    key = layout.file_key(due.project_id, file_id)
    written = workdir.Workdir(host.work / due.lease.id / str(due.lease.fence)).out / EVENT_FILE
    size, sha256 = workdir.publish_file(host.store, key, written, interrupt=watch.check)
    return TrackingResult(file=NewFile(file_id, EVENT_FILE, "fine-tune-results", size, sha256, key))


def _plain(points: list[CurvePoint]) -> list[tuple[int, float, dict[str, float]]]:
    return [(point.step, point.at, point.figures) for point in points]


_FEEDERS: Final[Mapping[str, Callable[[Host, Tracking, LeaseWatch], TrackingResult]]] = {
    "wandb": _feed_wandb,
    "mlflow": _feed_mlflow,
    "tensorboard": _write_event_file,
}
