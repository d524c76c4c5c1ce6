"""`tunepool jobs`: a request as it stands, and orders to jobs beyond OpenAI's API."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from tunepool import native, official
from tunepool.printing import show
from tunepool.requests import BadSetting, given, pairs

if TYPE_CHECKING:
    from openai import OpenAI
    from openai.types.fine_tuning import FineTuningJob


def create_job(
    context: typer.Context,
    request: Annotated[Path, typer.Argument(metavar="REQUEST.json", exists=True, dir_okay=False)],
) -> None:
    """Send a request that was written before, as `import openai` writes them, and print the job's id."""
    try:
        body = json.loads(request.read_text(encoding="utf-8"))
    except ValueError as error:
        raise BadSetting(f"{request.name} is no JSON: {error}.") from None
    client: OpenAI = context.obj.client
    job = client.post("/fine_tuning/jobs", cast_to=official.FineTuningJob, body=body)
    show(context, job.model_dump(mode="json"), job.id)


def pause_job(context: typer.Context, job_id: str) -> None:
    """Pause a job; a running trainer saves a checkpoint and gives its device back."""
    _show_status(context, context.obj.client.fine_tuning.jobs.pause(job_id))


def resume_job(context: typer.Context, job_id: str) -> None:
    """Put a paused job back into the queue."""
    _show_status(context, context.obj.client.fine_tuning.jobs.resume(job_id))


def _show_status(context: typer.Context, job: FineTuningJob) -> None:
    show(context, job.model_dump(mode="json"), f"{job.id} {job.status}")


def hold_job(context: typer.Context, job_id: str) -> None:
    """Keep a job from being started; one that runs goes on."""
    job = native.post(context, f"jobs/{native.part(job_id)}/hold")
    show(context, job, f"{job['id']} held")


def release_job(context: typer.Context, job_id: str) -> None:
    """Let a held job go."""
    job = native.post(context, f"jobs/{native.part(job_id)}/release")
    show(context, job, f"{job['id']} released")


def set_priority(
    context: typer.Context,
    job_id: str,
    priority: Annotated[int | None, typer.Argument(min=-100, max=100)] = None,
    tier: Annotated[str | None, typer.Option(help="interactive, normal or best_effort.")] = None,
) -> None:
    """Move a job in the order (negative numbers after `--`)."""
    job = native.post(context, f"jobs/{native.part(job_id)}/priority", given(priority=priority, tier=tier))
    show(context, job, f"{job['id']} {job['status']}")


def cancel_jobs(  # noqa: PLR0917 -- typer makes options of them
    context: typer.Context,
    job_ids: Annotated[list[str] | None, typer.Argument(metavar="JOB...")] = None,
    all_jobs: Annotated[bool, typer.Option("--all", help="Every job of the project that waits.")] = False,
    running: Annotated[bool, typer.Option(help="Running jobs too.")] = False,
    group: Annotated[str | None, typer.Option(help="Only jobs of this group.")] = None,
    metadata: Annotated[
        list[str] | None, typer.Option(metavar="KEY=VALUE", help="Only jobs with it; repeatable.")
    ] = None,
    project: Annotated[str | None, typer.Option(help="Id of another project; needs the scope admin.")] = None,
) -> None:
    """Cancel a job, a running one too; or many at once: several ids, --all, --group, --metadata."""
    narrowed = bool(all_jobs or running or group or metadata or project)
    if job_ids and len(job_ids) == 1 and not narrowed:
        client: OpenAI = context.obj.client
        job = client.fine_tuning.jobs.cancel(job_ids[0])
        _show_status(context, job)
        return
    if not (job_ids or all_jobs or group or metadata):
        raise BadSetting("Name jobs, or --all, --group, --metadata.")
    body = given(job_ids=job_ids or None, group=group, metadata=pairs(metadata or []) or None, project_id=project)
    statuses = ["validating_files", "queued", "paused", *(["running"] if running or job_ids else [])]
    answer = native.post(context, "jobs/cancel", {**body, "all": all_jobs, "statuses": statuses})
    show(context, answer, f"{len(answer['cancelled'])} cancelled, {len(answer['asked_to_stop'])} being stopped")
