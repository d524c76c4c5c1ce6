"""The commands. Exit codes are a promise: see `cli/README.md`."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Final, Literal

import httpx2
import typer
from openai import APIConnectionError, APIStatusError, InternalServerError, OpenAI
from openai.types.fine_tuning import FineTuningJob
from pydantic import BaseModel
from rich.console import Console
from rich.table import Table

from tunepool import adapters, orders, pool, preflights, projects, requests, watching
from tunepool.connection import NoServerKnown, find_credentials
from tunepool.printing import json_line, plain, printable

Onto = Literal["base", "dequantized"]

EXIT_JOB_NOT_DONE: Final = 1
EXIT_USAGE: Final = 2
EXIT_UNREACHABLE: Final = 3
EXIT_REFUSED: Final = 4
EXIT_INTERRUPTED: Final = 130

cli = typer.Typer(no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False, help=__doc__)
files_cli = typer.Typer(no_args_is_help=True, help="Training and validation files.")
jobs_cli = typer.Typer(no_args_is_help=True, help="Fine-tuning jobs.")
adapters_cli = typer.Typer(no_args_is_help=True, help="What jobs have made.")
cli.add_typer(files_cli, name="files")
cli.add_typer(jobs_cli, name="jobs")
cli.add_typer(adapters_cli, name="adapters")
cli.add_typer(pool.pool_cli, name="pool")
cli.add_typer(pool.workers_cli, name="workers")
cli.add_typer(pool.devices_cli, name="devices")
cli.add_typer(projects.projects_cli, name="projects")
cli.add_typer(projects.keys_cli, name="keys")
cli.command("usage")(pool.show_usage)
cli.command("audit")(pool.show_audit)
jobs_cli.command("hold")(orders.hold_job)
jobs_cli.command("release")(orders.release_job)
jobs_cli.command("priority")(orders.set_priority)
jobs_cli.command("cancel")(orders.cancel_jobs)

# Progress and messages go to stderr, so that stdout holds only what was asked for.
messages = Console(stderr=True)


@dataclass(frozen=True)
class Context:
    client: OpenAI
    as_json: bool


def app() -> None:
    """Entry point: run a command and turn what went wrong into a sentence and an exit code."""
    try:
        cli()
    except (NoServerKnown, requests.BadSetting) as error:
        _quit(str(error), EXIT_USAGE)
    except InternalServerError as error:
        _quit(f"The server is ill (HTTP {error.status_code}): {error.message}", EXIT_UNREACHABLE)
    except APIConnectionError as error:
        _quit(f"No server answers at {error.request.url.host}:{error.request.url.port}.", EXIT_UNREACHABLE)
    except APIStatusError as error:
        _quit(_reason(error), EXIT_REFUSED)
    except (httpx2.HTTPError, adapters.Damaged) as error:
        _quit(f"The download failed: {error}", EXIT_UNREACHABLE)
    except preflights.TookTooLong as error:
        _quit(str(error), EXIT_UNREACHABLE)
    except KeyboardInterrupt:
        sys.exit(EXIT_INTERRUPTED)


def _quit(message: str, code: int) -> None:
    messages.print(printable(message), markup=False, highlight=False, soft_wrap=True)
    sys.exit(code)


def _reason(error: APIStatusError) -> str:
    body = error.body if isinstance(error.body, dict) else {}
    named = ", ".join(f"{key}: {body[key]}" for key in ("code", "param") if body.get(key))
    return f"{body.get('message') or error.message} ({named or error.status_code})"


@cli.callback()
def connect(
    context: typer.Context,
    base_url: Annotated[str | None, typer.Option(envvar="OPENAI_BASE_URL")] = None,
    api_key: Annotated[str | None, typer.Option(envvar="OPENAI_API_KEY", show_default=False)] = None,
    home: Annotated[Path, typer.Option(envvar="TUNEPOOL_HOME", help="Home of a server on this machine.")] = Path(
        ".tunepool"
    ),
    as_json: Annotated[bool, typer.Option("--json", help="Print the server's answers as JSON, one per line.")] = False,
) -> None:
    """Command line of a Tunepool server."""
    if not {"--help", "-h"} & set(sys.argv):
        client = find_credentials(home, base_url=base_url, api_key=api_key).client()
        context.obj = Context(client, as_json)


@files_cli.command("upload")
def upload_file(context: typer.Context, file: Annotated[Path, typer.Argument(exists=True, dir_okay=False)]) -> None:
    """Upload a JSONL file and print its id."""
    made = context.obj.client.files.create(file=file, purpose="fine-tune")
    _print_one(context, made, made.id)


@files_cli.command("list")
def list_files(context: typer.Context) -> None:
    """List the project's files, newest first."""
    _print_table(context, context.obj.client.files.list(), ("id", "filename", "bytes", "purpose", "status"))


@files_cli.command("delete")
def delete_file(context: typer.Context, file_id: str) -> None:
    """Delete a file."""
    gone = context.obj.client.files.delete(file_id)
    _print_one(context, gone, gone.id)


@jobs_cli.command("list")
def list_jobs(context: typer.Context, limit: Annotated[int, typer.Option(min=1, max=100)] = 20) -> None:
    """List the newest jobs."""
    page = context.obj.client.fine_tuning.jobs.list(limit=limit)
    _print_table(context, page.data, ("id", "status", "model", "fine_tuned_model", "trained_tokens"))


@jobs_cli.command("show")
def show_job(context: typer.Context, job_id: str) -> None:
    """Show one job with everything the server tells of it."""
    job = context.obj.client.fine_tuning.jobs.retrieve(job_id)
    _print_one(context, job, json.dumps(job.to_dict(), indent=2, ensure_ascii=False))


@jobs_cli.command("pause")
def pause_job(context: typer.Context, job_id: str) -> None:
    """Pause a job; a running trainer saves a checkpoint and gives its device back."""
    _print_status(context, context.obj.client.fine_tuning.jobs.pause(job_id))


@jobs_cli.command("resume")
def resume_job(context: typer.Context, job_id: str) -> None:
    """Put a paused job back into the queue."""
    _print_status(context, context.obj.client.fine_tuning.jobs.resume(job_id))


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
    model: Annotated[str, typer.Option(help="Base model, or an ft: model to go on from.")],
    validation: Annotated[str | None, typer.Option(help="A JSONL file, or the id of an uploaded one.")] = None,
    suffix: Annotated[str | None, typer.Option(help="Becomes part of the tuned model's name.")] = None,
    epochs: Annotated[int | None, typer.Option(min=1, max=50)] = None,
    batch_size: Annotated[int | None, typer.Option(min=1, max=256)] = None,
    seed: Annotated[int | None, typer.Option(min=0)] = None,
    settings: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="PART.FIELD=VALUE", help="For instance adapter.r=8; may be repeated."),
    ] = None,
    metadata: Annotated[list[str] | None, typer.Option(metavar="KEY=VALUE", help="May be repeated.")] = None,
    wait: Annotated[bool, typer.Option(help="Watch the job; exit 1 unless it succeeds.")] = False,
) -> None:
    """Upload what is not there yet, create a job and print its id."""
    extension, labels = requests.nested(settings or []), requests.pairs(metadata or [])
    client: OpenAI = context.obj.client
    job = client.fine_tuning.jobs.create(
        model=model,
        training_file=requests.file_id(client, training),
        validation_file=requests.file_id(client, validation) if validation else None,
        method=requests.supervised(n_epochs=epochs, batch_size=batch_size),
        extra_body={"tunepool": extension} if extension else None,
        **requests.given(suffix=suffix, seed=seed, metadata=labels or None),
    )
    _print_one(context, job, job.id)
    if wait:
        _wait(context, job.id)


@cli.command()
def preflight(  # noqa: PLR0917 -- typer makes options of them
    context: typer.Context,
    training: Annotated[str, typer.Argument(metavar="FILE", help="A data file, or the id of an uploaded one.")],
    model: Annotated[str, typer.Option(help="Base model.")],
    validation: Annotated[str | None, typer.Option(help="A data file, or the id of an uploaded one.")] = None,
    epochs: Annotated[int | None, typer.Option(min=1, max=50)] = None,
    batch_size: Annotated[int | None, typer.Option(min=1, max=256)] = None,
    dpo: Annotated[bool, typer.Option("--dpo", help="Preference rows.")] = False,
    settings: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="PART.FIELD=VALUE", help="For instance adapter.r=8; may be repeated."),
    ] = None,
    rows: Annotated[list[int] | None, typer.Option("--row", min=1, help="Show this row; may be repeated.")] = None,
    timeout: Annotated[float, typer.Option(min=1, help="Seconds to wait for a worker.")] = 900.0,
) -> None:
    """Say what a job would do, and train nothing. Exit 0 when it would train, 1 when it would not. Ctrl-C cancels."""
    client: OpenAI = context.obj.client
    kind = "dpo" if dpo else "supervised"
    asked = requests.given(
        model=model,
        training_file=requests.file_id(client, training),
        validation_file=requests.file_id(client, validation) if validation else None,
        preview_rows=rows or None,
        tunepool=requests.nested(settings or []) or None,
        method={"type": kind, kind: {"hyperparameters": requests.given(n_epochs=epochs, batch_size=batch_size)}},
    )
    answer = preflights.answer(client, asked, patience_seconds=timeout)
    if context.obj.as_json:
        print(json_line(answer))
    else:
        preflights.show(answer, wide=not sys.stdout.isatty())
    if not preflights.is_ok(answer):
        raise typer.Exit(EXIT_JOB_NOT_DONE)


@cli.command()
def watch(context: typer.Context, job_id: str) -> None:
    """Follow a job to its end. Exit 0 when it succeeds, 1 when it does not. Ctrl-C leaves the job running."""
    _wait(context, job_id)


def _wait(context: typer.Context, job_id: str) -> None:
    with watching.ProgressBar(messages) as bar:
        for update in watching.follow(context.obj.client, job_id):
            bar.show(update)
    job = update.job
    _print_one(context, job, job.fine_tuned_model or (job.error.message if job.error else job.status))
    if job.status != "succeeded":
        raise typer.Exit(EXIT_JOB_NOT_DONE)


@adapters_cli.command("list")
def list_adapters(context: typer.Context) -> None:
    """Print the names of the tuned models."""
    for name in adapters.names(context.obj.client):
        print(json.dumps({"id": name}) if context.obj.as_json else name)


@adapters_cli.command("download")
def download_adapter(context: typer.Context, name: str, out: Path) -> None:
    """Fetch an adapter's files into a folder; every file is verified by its sha256."""
    for path in adapters.download(context.obj.client, name, out=out):
        print(json.dumps({"path": str(path)}) if context.obj.as_json else path)


@adapters_cli.command("merge")
def merge_adapter(
    context: typer.Context,
    name: str,
    onto: Annotated[Onto, typer.Option(help="The weights as published, or those that QLoRA trained on.")],
    wait: Annotated[bool, typer.Option(help="Wait for the end; exit 1 unless it succeeds.")] = False,
) -> None:
    """Merge an adapter into its base model and print the merge's id; `download` takes that id."""
    _print_made(context, adapters.merge(context.obj.client, name, onto=onto), wait=wait)


@adapters_cli.command("combine")
def combine_adapters(  # noqa: PLR0917 -- typer makes options of them
    context: typer.Context,
    weighted: Annotated[list[str], typer.Argument(metavar="NAME=WEIGHT…")],
    combination_type: Annotated[str, typer.Option("--type", help="cat, svd, linear, ties, dare_linear, …")],
    density: Annotated[float | None, typer.Option(help="Share of values to keep: ties, dare, magnitude_prune.")] = None,
    svd_rank: Annotated[int | None, typer.Option(min=1)] = None,
    wait: Annotated[bool, typer.Option(help="Wait for the end; exit 1 unless it succeeds.")] = False,
) -> None:
    """Combine adapters of one base model and print the combination's id; `download` takes that id."""
    options = requests.given(density=density, svd_rank=svd_rank)
    made = adapters.combine(context.obj.client, weighted, combination_type=combination_type, **options)
    _print_made(context, made, wait=wait)


def _print_made(context: typer.Context, record: dict[str, Any], *, wait: bool) -> None:
    if wait:
        record = adapters.wait(context.obj.client, record["id"])
    print(json_line(record) if context.obj.as_json else record["id"])
    if record["status"] == "failed":
        messages.print(printable(record["error"]["message"]), markup=False, highlight=False, soft_wrap=True)
        raise typer.Exit(EXIT_JOB_NOT_DONE)


def _print_status(context: typer.Context, job: FineTuningJob) -> None:
    _print_one(context, job, f"{job.id} {job.status}")


def _print_one(context: typer.Context, answer: BaseModel, text: str) -> None:
    print(json_line(answer.model_dump(mode="json")) if context.obj.as_json else printable(text))


def _print_table(context: typer.Context, rows: Iterable[BaseModel], columns: tuple[str, ...]) -> None:
    if context.obj.as_json:
        for row in rows:
            _print_one(context, row, "")
        return
    table = Table(*columns, box=None, pad_edge=False)
    for row in rows:
        table.add_row(*(plain(_cell(getattr(row, column, None))) for column in columns))
    Console(soft_wrap=not sys.stdout.isatty()).print(table)


def _cell(value: Any) -> str:
    return "-" if value is None else str(value)


if __name__ == "__main__":
    app()
