"""`tunepool schedule`: jobs that start by the clock or when data changes."""

from __future__ import annotations

from typing import Annotated, Any, Final, Literal

import typer

from tunepool import native, requests
from tunepool.printing import cell, json_line, show, show_rows

schedule_cli = typer.Typer(no_args_is_help=True, help="Jobs that start by the clock or when data changes.")

EXIT_REFUSED: Final = 1
PER_PAGE: Final = 100
COLUMNS: Final = ("due_at", "cause", "verdict", "job_id", "job_status", "missed", "reason")

ScheduleName = Annotated[str, typer.Argument(metavar="SCHEDULE", help="Its name or id.")]


@schedule_cli.command("create")
def create_schedule(  # noqa: PLR0917 -- typer makes options of them
    context: typer.Context,
    name: Annotated[str, typer.Argument(help="For instance nightly-tickets.")],
    model: Annotated[str, typer.Option(help="Base model, or a tuned one to go on from: ft:…, a checkpoint, an alias.")],
    training: Annotated[
        str | None, typer.Option(metavar="FILE", help="What every run trains on: a file, or the id of an uploaded one.")
    ] = None,
    data_prefix: Annotated[
        str | None, typer.Option(help="Train on the newest file whose name begins so; without --cron, when one comes.")
    ] = None,
    cron: Annotated[str | None, typer.Option(help="'30 2 * * 1-5': minute, hour, day, month, day of the week.")] = None,
    time_zone: Annotated[str, typer.Option(help="Of --cron, for instance Europe/Berlin.")] = "UTC",
    overlap: Annotated[
        Literal["skip", "queue", "supersede"], typer.Option(help="While an earlier run's job has not ended.")
    ] = "skip",
    skip_unchanged: Annotated[bool, typer.Option(help="Start nothing where data and settings are the same.")] = True,
    validation: Annotated[str | None, typer.Option(help="A file, or the id of an uploaded one.")] = None,
    suffix: Annotated[str | None, typer.Option(help="Becomes part of the tuned models' names.")] = None,
    epochs: Annotated[int | None, typer.Option(min=1, max=50)] = None,
    seed: Annotated[int | None, typer.Option(min=0)] = None,
    method: Annotated[requests.MethodName, typer.Option(help="How the rows are learnt.")] = "supervised",
    settings: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="PART.FIELD=VALUE", help="For instance adapter.r=8; may be repeated."),
    ] = None,
) -> None:
    """Make a schedule and print its id, and when it is due first."""
    client = context.obj.client
    requests.check_model(client, model)  # a wrong name costs no upload
    job = requests.given(
        model=model,
        training_file=requests.file_id(client, training) if training else None,
        validation_file=requests.file_id(client, validation) if validation else None,
        suffix=suffix,
        seed=seed,
        tunepool=requests.nested(settings or []) or None,
    )
    job["method"] = requests.method(method, n_epochs=epochs)
    wanted = requests.given(name=name, cron=cron, time_zone=time_zone, data_prefix=data_prefix)
    _say(
        context,
        native.post(context, "schedules", {**wanted, "overlap": overlap, "skip_unchanged": skip_unchanged, "job": job}),
    )


@schedule_cli.command("list")
def list_schedules(context: typer.Context) -> None:
    """List the project's schedules: when each is due, and what came of its last run."""
    rows: list[dict[str, Any]] = []
    more, after = True, None
    while more:
        page = native.get(context, "schedules", limit=PER_PAGE, after=after)
        rows += page["data"]
        more, after = page["has_more"], page["data"][-1]["name"] if page["data"] else None
    shown = [{**row, "last": row["last_runs"][0] if row["last_runs"] else {}} for row in rows]
    columns = ("id", "name", "cron", "time_zone", "data_prefix", "next_at", "paused_at")
    show_rows(context, rows if context.obj.as_json else shown, (*columns, "last.verdict", "last.job_status"))


@schedule_cli.command("show")
def show_schedule(context: typer.Context, schedule: ScheduleName) -> None:
    """Show a schedule, and the verdicts of its last runs."""
    shown = native.get(context, _path(schedule))
    if context.obj.as_json:
        print(json_line(shown))
        return
    _say(context, shown)
    show_rows(context, shown["last_runs"], COLUMNS)


@schedule_cli.command("runs")
def list_runs(
    context: typer.Context, schedule: ScheduleName, limit: Annotated[int, typer.Option(min=1, max=100)] = 20
) -> None:
    """List the runs of a schedule, newest first."""
    show_rows(context, native.get(context, _path(schedule, "runs"), limit=limit)["data"], ("id", *COLUMNS))


@schedule_cli.command("run")
def run_schedule(
    context: typer.Context,
    schedule: ScheduleName,
    force: Annotated[bool, typer.Option("--force", help="Also where nothing has changed.")] = False,
) -> None:
    """Run it now, paused or not, and print the verdict. Exit 0 started or skipped, 1 refused."""
    run = native.post(context, _path(schedule, "run"), {"force": force})
    show(context, run, f"{run['verdict']}: {run['reason']}")
    if run["verdict"] == "refused":
        raise typer.Exit(EXIT_REFUSED)


@schedule_cli.command("pause")
def pause_schedule(context: typer.Context, schedule: ScheduleName) -> None:
    """Start nothing more until it is resumed. Jobs that it has started go on."""
    _say(context, native.post(context, _path(schedule, "pause")))


@schedule_cli.command("resume")
def resume_schedule(context: typer.Context, schedule: ScheduleName) -> None:
    """Go on from now; what was due meanwhile is not made up for."""
    _say(context, native.post(context, _path(schedule, "resume")))


@schedule_cli.command("delete")
def delete_schedule(context: typer.Context, schedule: ScheduleName) -> None:
    """Remove a schedule. The jobs that it has started stay."""
    gone = native.delete(context, _path(schedule))
    show(context, gone, f"{gone['id']} deleted")


def _path(schedule: str, *rest: str) -> str:
    return "/".join(["schedules", native.part(schedule), *rest])


def _say(context: typer.Context, schedule: dict[str, Any]) -> None:
    when = f"next at {cell('next_at', schedule['next_at'])}" if schedule["next_at"] else "waits for data"
    words = "paused" if schedule["paused_at"] else when
    show(context, schedule, f"{schedule['id']} {schedule['name']}: {words}")
