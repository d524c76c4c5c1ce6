"""Commands of the adapters: list, show, download, merge, combine."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any, Final, Literal

import typer
from rich.console import Console

from tunepool import adapters, requests, watching
from tunepool.printing import json_line, printable

Onto = Literal["base", "dequantized"]

EXIT_NOT_MADE: Final = 1

adapters_cli = typer.Typer(no_args_is_help=True, help="What jobs have made.")
messages = Console(stderr=True)


@adapters_cli.command("list")
def list_adapters(context: typer.Context) -> None:
    """Print the names of the tuned models."""
    for name in adapters.names(context.obj.client):
        print(json.dumps({"id": name}) if context.obj.as_json else name)


@adapters_cli.command("show")
def show_adapter(context: typer.Context, name: str) -> None:
    """Print where an adapter's files are, and which servers can serve it."""
    adapter = adapters.describe(context.obj.client, name)
    print(json.dumps(adapter) if context.obj.as_json else printable("\n".join(adapters.lines(adapter))))


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
        with watching.interruptible_work(left=f"{record['id']} goes on: tunepool adapters show {record['id']}"):
            record = adapters.wait(context.obj.client, record["id"])
    print(json_line(record) if context.obj.as_json else record["id"])
    if record["status"] == "failed":
        messages.print(printable(record["error"]["message"]), markup=False, highlight=False, soft_wrap=True)
        raise typer.Exit(EXIT_NOT_MADE)
