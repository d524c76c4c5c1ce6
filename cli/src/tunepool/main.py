"""The commands. Exit codes are a promise: see `cli/README.md`."""

from __future__ import annotations

import gc
import sys
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from functools import cached_property
from importlib.metadata import version
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Final, Literal

if _collects := gc.isenabled():
    # What imports make lives to the end; to look through it meanwhile is a seventh of the start.
    gc.disable()

import httpx2
import typer
from pydantic import BaseModel
from rich.console import Console

from tunepool import (
    adapters,
    chatting,
    evaluating,
    exports,
    gating,
    importing,
    lineage,
    logs,
    models,
    official,
    orders,
    pool,
    preflights,
    products,
    project_secrets,
    projects,
    proving,
    releasing,
    reproducing,
    requests,
    scheduling,
    signing_in,
    summary,
    watching,
    webhooks,
)
from tunepool.connection import Credentials, NoServerKnown, find_credentials
from tunepool.id_tokens import NoIdToken
from tunepool.pipeline import command, scaffold, sweep_command
from tunepool.printing import json_line, printable, show, show_rows

if TYPE_CHECKING:
    from openai import APIStatusError, OpenAI

if _collects:
    gc.freeze()
    gc.enable()

EXIT_JOB_NOT_DONE: Final = 1
EXIT_USAGE: Final = 2
EXIT_UNREACHABLE: Final = 3
EXIT_REFUSED: Final = 4
EXIT_TIMEOUT: Final = 5
EXIT_SUPERSEDED: Final = 6
EXIT_INTERRUPTED: Final = 130
NOT_OFFERED: Final = 501
JOBS_PER_PAGE: Final = 100
WITHOUT_A_SERVER: Final = frozenset({"gate", "init", "run", "sweep", "verify", "login"})  # they read files first

# Options that submit and watch share.
Timeout = Annotated[
    float | None, typer.Option(min=1, help="Seconds to wait for the job; then exit 5. The job goes on.")
]
ColumnNames = Annotated[
    list[str] | None,
    typer.Option("--column", metavar="NAME=COLUMN", help="A column of the file, such as prompt=question; repeatable."),
]
OnInterrupt = Annotated[Literal["leave", "cancel"], typer.Option(help="What becomes of the job on SIGINT or SIGTERM.")]

cli = typer.Typer(no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False, help=__doc__)
files_cli = typer.Typer(no_args_is_help=True, help="Training and validation files.")
jobs_cli = typer.Typer(no_args_is_help=True, help="Fine-tuning jobs.")
for _name, _group in {
    "files": files_cli,
    "jobs": jobs_cli,
    "adapters": products.adapters_cli,
    "import": importing.import_cli,
    "models": models.models_cli,
    "gate": gating.gate_cli,
    "exports": exports.exports_cli,
    "aliases": releasing.aliases_cli,
    "pool": pool.pool_cli,
    "workers": pool.workers_cli,
    "chores": pool.chores_cli,
    "devices": pool.devices_cli,
    "projects": projects.projects_cli,
    "keys": projects.keys_cli,
    "oidc": signing_in.oidc_cli,
    "secrets": project_secrets.secrets_cli,
    "schedule": scheduling.schedule_cli,
    "webhooks": webhooks.webhooks_cli,
    "sweeps": sweep_command.sweeps_cli,
}.items():
    cli.add_typer(_group, name=_name)
for _alone in (
    releasing.promote,
    releasing.rollback,
    releasing.compare,
    command.run,
    sweep_command.sweep,
    scaffold.init,
    chatting.chat,
    evaluating.evaluate,
    exports.export,
    exports.push,
    logs.logs,
    signing_in.login,
    proving.verify,
    reproducing.reproduce,
    lineage.lineage,
):
    cli.command(_alone.__name__)(_alone)
cli.command("usage")(pool.show_usage)
cli.command("audit")(pool.show_audit)
jobs_cli.command("create")(orders.create_job)
jobs_cli.command("pause")(orders.pause_job)
jobs_cli.command("resume")(orders.resume_job)
jobs_cli.command("hold")(orders.hold_job)
jobs_cli.command("release")(orders.release_job)
jobs_cli.command("priority")(orders.set_priority)
jobs_cli.command("cancel")(orders.cancel_jobs)

# Progress and messages go to stderr, so that stdout holds only what was asked for.
messages = Console(stderr=True)


@dataclass(frozen=True)
class Context:
    as_json: bool
    base_url: str | None
    home: Path
    find: Callable[[], Credentials] = field(repr=False)

    @cached_property
    def credentials(self) -> Credentials:
        """Raises NoServerKnown. Not asked by what works without a server."""
        return self.find()

    @cached_property
    def client(self) -> OpenAI:
        """Raises NoServerKnown. The official client is imported when it is first asked for."""
        return self.credentials.client()


def app() -> None:
    """Entry point: run a command and turn what went wrong into a sentence and an exit code."""
    try:
        cli()
    except SystemExit:  # the usual end; below, the official client would be imported to compare with its errors
        raise
    except (NoServerKnown, NoIdToken, requests.BadSetting) as error:
        _quit(str(error), EXIT_USAGE)
    except official.InternalServerError as error:
        reason = f"The server is ill (HTTP {error.status_code}): {error.message}"
        known = error.status_code == NOT_OFFERED or error.param is not None  # it is well, and says what is lacking
        _quit(requests.reason(error) if known else reason, EXIT_UNREACHABLE, error)
    except official.APIConnectionError as error:
        _quit(f"No server answers at {error.request.url.host}:{error.request.url.port}.", EXIT_UNREACHABLE)
    except official.APIStatusError as error:
        _quit(requests.reason(error), EXIT_REFUSED, error)
    except (httpx2.HTTPError, adapters.ChecksumMismatch) as error:
        _quit(f"The download failed: {error}", EXIT_UNREACHABLE)
    except preflights.TookTooLong as error:
        _quit(str(error), EXIT_UNREACHABLE)
    except watching.WatchInterrupted as interrupted:
        _quit(str(interrupted), 128 + interrupted.signal)
    except (watching.NotInTime, evaluating.EvaluationNotInTime) as late:
        _quit(str(late), EXIT_TIMEOUT)
    except KeyboardInterrupt:
        sys.exit(EXIT_INTERRUPTED)


def _quit(message: str, code: int, error: APIStatusError | None = None) -> None:
    """A sentence on stderr; with --json the server's envelope on stdout, too."""
    messages.print(printable(message), markup=False, highlight=False, soft_wrap=True)
    if "--json" in sys.argv:
        body = error.body if error is not None and isinstance(error.body, dict) else {"message": message}
        print(json_line({"error": body}))
    sys.exit(code)


def _print_version(asked: bool) -> None:
    if asked:
        print(f"tunepool {version('tunepool')}")
        raise typer.Exit


@cli.callback()
def connect(
    context: typer.Context,
    base_url: Annotated[str | None, typer.Option(envvar="OPENAI_BASE_URL")] = None,
    api_key: Annotated[str | None, typer.Option(envvar="OPENAI_API_KEY", show_default=False)] = None,
    home: Annotated[Path, typer.Option(envvar="TUNEPOOL_HOME", help="Home of a server on this machine.")] = Path(
        ".tunepool"
    ),
    as_json: Annotated[bool, typer.Option("--json", help="Print the server's answers as JSON, one per line.")] = False,
    _version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    """Command line of a Tunepool server."""
    context.obj = Context(as_json, base_url, home, lambda: find_credentials(home, base_url=base_url, api_key=api_key))
    if context.invoked_subcommand not in WITHOUT_A_SERVER and not {"--help", "-h"} & set(sys.argv):
        _ = context.obj.credentials  # what is missing is said before anything is read


@files_cli.command("upload")
def upload_file(context: typer.Context, file: Annotated[Path, typer.Argument(exists=True, dir_okay=False)]) -> None:
    """Upload a JSONL file and print its id; one above 64 MiB goes in parts."""
    made = requests.upload(context.obj.client, file)
    _print_one(context, made, made.id)


@files_cli.command("list")
def list_files(context: typer.Context) -> None:
    """List the project's files, newest first."""
    _print_table(context, context.obj.client.files.list(), ("id", "filename", "bytes", "purpose", "status"))


@files_cli.command("delete")
def delete_file(
    context: typer.Context,
    file_id: str,
    force: Annotated[bool, typer.Option("--force", help="Also what the model of an alias was made of.")] = False,
) -> None:
    """Delete a file."""
    gone = context.obj.client.files.delete(file_id, extra_query={"force": "true"} if force else None)
    _print_one(context, gone, gone.id)


@jobs_cli.command("list")
def list_jobs(
    context: typer.Context,
    limit: Annotated[int, typer.Option(min=1, help="So many of the newest.")] = 20,
    all_jobs: Annotated[bool, typer.Option("--all", help="Every job of the project.")] = False,
    status: Annotated[str | None, typer.Option(help="queued, running, succeeded, …")] = None,
    metadata: Annotated[list[str] | None, typer.Option(metavar="KEY=VALUE", help="Only jobs with it.")] = None,
) -> None:
    """List jobs, newest first."""
    client: OpenAI = context.obj.client
    page = client.fine_tuning.jobs.list(
        limit=JOBS_PER_PAGE if all_jobs else min(limit, JOBS_PER_PAGE),
        extra_query=requests.given(status=status),
        **requests.given(metadata=requests.pairs(metadata or []) or None),
    )
    jobs = iter(page) if all_jobs else islice(page, limit)
    _print_table(context, jobs, ("id", "status", "model", "fine_tuned_model", "trained_tokens"))


@jobs_cli.command("show")
def show_job(context: typer.Context, job_id: str) -> None:
    """Show where a job stands, why, and what became of it; with --json everything that the server tells."""
    job = context.obj.client.fine_tuning.jobs.retrieve(job_id)
    _print_one(context, job, summary.of_job(job))


@jobs_cli.command("events")
def list_events(context: typer.Context, job_id: str) -> None:
    """Print every event of a job, oldest first."""
    events = list(context.obj.client.fine_tuning.jobs.list_events(job_id, limit=watching.EVENTS_PER_PAGE))
    for event in reversed(events):
        _print_one(context, event, f"{event.created_at} {event.level:5} {event.message}")


@cli.command()
def submit(  # noqa: PLR0917 -- typer makes options of them
    context: typer.Context,
    training: Annotated[str, typer.Argument(metavar="FILE", help="A JSONL file, or the id of an uploaded one.")],
    model: Annotated[str, typer.Option(help="Base model, or a tuned one to go on from: ft:…, a checkpoint, an alias.")],
    validation: Annotated[str | None, typer.Option(help="A JSONL file, or the id of an uploaded one.")] = None,
    suffix: Annotated[str | None, typer.Option(help="Becomes part of the tuned model's name.")] = None,
    epochs: Annotated[int | None, typer.Option(min=1, max=50)] = None,
    batch_size: Annotated[int | None, typer.Option(min=1, max=256)] = None,
    seed: Annotated[int | None, typer.Option(min=0)] = None,
    settings: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="PART.FIELD=VALUE", help="For instance adapter.r=8; may be repeated."),
    ] = None,
    columns: ColumnNames = None,
    metadata: Annotated[list[str] | None, typer.Option(metavar="KEY=VALUE", help="May be repeated.")] = None,
    method: Annotated[requests.MethodName, typer.Option(help="How the rows are learnt.")] = "supervised",
    wait: Annotated[bool, typer.Option(help="Watch the job; exit 1 unless it succeeds.")] = False,
    timeout: Timeout = None,
    on_interrupt: OnInterrupt = "leave",
) -> None:
    """Upload what is not there yet, create a job and print its id."""
    extension = requests.with_columns(requests.nested(settings or []), columns or [])
    labels = requests.pairs(metadata or [])
    client: OpenAI = context.obj.client
    with watching.interruptible_work(left="No job's id has come back: tunepool jobs list shows whether one was made."):
        requests.check_model(client, model)  # a wrong name costs no upload
        job = client.fine_tuning.jobs.create(
            model=model,
            training_file=requests.file_id(client, training),
            validation_file=requests.file_id(client, validation) if validation else None,
            method=requests.method(method, n_epochs=epochs, batch_size=batch_size),
            extra_body={"tunepool": extension} if extension else None,
            **requests.given(suffix=suffix, seed=seed, metadata=labels or None),
        )
    _print_one(context, job, job.id)
    if wait:
        _wait(context, job.id, timeout=timeout, on_interrupt=on_interrupt)


@cli.command()
def preflight(  # noqa: PLR0917 -- typer makes options of them
    context: typer.Context,
    training: Annotated[str, typer.Argument(metavar="FILE", help="A data file, or the id of an uploaded one.")],
    model: Annotated[str, typer.Option(help="Base model, or a tuned one to go on from.")],
    validation: Annotated[str | None, typer.Option(help="A data file, or the id of an uploaded one.")] = None,
    epochs: Annotated[int | None, typer.Option(min=1, max=50)] = None,
    batch_size: Annotated[int | None, typer.Option(min=1, max=256)] = None,
    method: Annotated[requests.MethodName, typer.Option(help="How the rows would be learnt.")] = "supervised",
    dpo: Annotated[bool, typer.Option("--dpo", hidden=True, help="The same as --method dpo.")] = False,
    settings: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="PART.FIELD=VALUE", help="For instance adapter.r=8; may be repeated."),
    ] = None,
    columns: ColumnNames = None,
    rows: Annotated[list[int] | None, typer.Option("--row", min=1, help="Show this row; may be repeated.")] = None,
    diff: Annotated[bool, typer.Option("--diff", help="Show rows as written beside what is read of them.")] = False,
    timeout: Annotated[float, typer.Option(min=1, help="Seconds to wait for a worker.")] = 900.0,
) -> None:
    """Say what a job would do, and train nothing. Exit 0 when it would train, 1 when it would not. Ctrl-C cancels."""
    client: OpenAI = context.obj.client
    requests.check_model(client, model)  # a wrong name costs no upload
    asked = requests.given(
        model=model,
        training_file=requests.file_id(client, training),
        validation_file=requests.file_id(client, validation) if validation else None,
        preview_rows=rows or None,
        tunepool=requests.with_columns(requests.nested(settings or []), columns or []) or None,
        method=requests.method("dpo" if dpo else method, n_epochs=epochs, batch_size=batch_size),
    )
    answer = preflights.answer(client, asked, patience_seconds=timeout, hear=preflights.PreflightNotes())
    if context.obj.as_json:
        print(json_line(answer))
    else:
        preflights.show(answer, wide=not sys.stdout.isatty(), diff=diff)
    if not preflights.is_ok(answer):
        raise typer.Exit(EXIT_JOB_NOT_DONE)


@cli.command()
def watch(context: typer.Context, job_id: str, timeout: Timeout = None, on_interrupt: OnInterrupt = "leave") -> None:
    """Follow a job to its end. Exit 0 when it succeeds, 1 when it does not, 6 when a newer job took its place."""
    _wait(context, job_id, timeout=timeout, on_interrupt=on_interrupt)


def _wait(context: typer.Context, job_id: str, *, timeout: float | None, on_interrupt: str) -> None:
    client: OpenAI = context.obj.client
    with watching.interruptible(client, job_id, cancel=on_interrupt == "cancel"), watching.display(messages) as shown:
        for update in watching.follow(client, job_id, timeout_seconds=timeout, tell=shown.tell):
            shown.show(update)
    job = update.job
    newer = watching.ours(job).get("superseded_by")
    ended = f"{job.status}: superseded by {newer}" if newer else job.status
    _print_one(context, job, job.fine_tuned_model or (job.error.message if job.error else ended))
    if job.status != "succeeded":
        raise typer.Exit(EXIT_SUPERSEDED if newer else EXIT_JOB_NOT_DONE)


def _print_one(context: typer.Context, answer: BaseModel, text: str) -> None:
    show(context, answer.model_dump(mode="json"), text)


def _print_table(context: typer.Context, rows: Iterable[BaseModel], columns: tuple[str, ...]) -> None:
    show_rows(context, (row.model_dump(mode="json") for row in rows), columns)


if __name__ == "__main__":
    app()
