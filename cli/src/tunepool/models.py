"""`tunepool models`: the base models of an installation. Changing them needs a key with the scope admin."""

from __future__ import annotations

import time
from typing import Annotated, Any, Final

import typer
from rich.console import Console

from tunepool import native, watching
from tunepool.printing import show, show_rows
from tunepool.requests import given

models_cli = typer.Typer(no_args_is_help=True, help="Base models: what jobs may train, and how it stands.")

_POLL_SECONDS: Final = 1.0
messages = Console(stderr=True)
_EXIT_ERROR: Final = 1

Wait = Annotated[bool, typer.Option("--wait", help="Until a worker has looked at it; exit code 1 if it is in error.")]


@models_cli.command("add")
def add_model(
    context: typer.Context,
    source: Annotated[str, typer.Argument(help="owner/name at a hub, or an absolute path on the workers' hosts.")],
    *,
    revision: Annotated[str | None, typer.Option(help="Branch, tag or commit of a hub; else main.")] = None,
    name: Annotated[str | None, typer.Option(help="Else the repository's or the folder's, in lower case.")] = None,
    alias: Annotated[list[str] | None, typer.Option(help="A further name, such as OpenAI's; may be repeated.")] = None,
    wait: Wait = False,
) -> None:
    """Add a base model and print its name and state."""
    body = {"source": source, **given(revision=revision, name=name, aliases=alias)}
    made = native.post(context, "models", body)
    _tell(context, _settled(context, made) if wait else made)


@models_cli.command("list")
def list_models(context: typer.Context) -> None:
    """List every base model with its state, also those that cannot be used."""
    columns = ("id", "state", "origin", "locator", "revision", "aliases", "sizes.parameters", "detail")
    page = native.get(context, "models")
    show_rows(context, page["data"], columns)
    if page.get("file_problem") and not context.obj.as_json:
        messages.print(f"models.toml is left out: {page['file_problem']}", style="yellow", markup=False)


@models_cli.command("show")
def show_model(context: typer.Context, name: str) -> None:
    """Show one base model with everything that is known of it."""
    model = native.get(context, f"models/{native.part(name)}")
    sizes, description = (None, None) if context.obj.as_json else (model.pop("sizes"), model.pop("description", None))
    rows = {**model, **(sizes or {}), **_described(description or {})}
    show(context, model, "\n".join(f"{field}: {_words(value)}" for field, value in rows.items()))


def _described(description: dict[str, Any]) -> dict[str, Any]:
    """What a program of the trainer tells of the model, in lines."""
    build, template = description.get("build") or {}, description.get("template") or {}
    linear = [
        f"{kind['name']} {kind['inputs']}x{kind['outputs']} ({kind['count']})" for kind in build.get("linear", ())
    ]
    experts = [
        f"{kind['name']} {'x'.join(map(str, kind['shape']))} ({kind['count']})" for kind in build.get("experts", ())
    ]
    rows = {
        "template writes": [name for name, writes in template.items() if writes is True],
        "template leaves out": [name for name, writes in template.items() if writes is False],
        "ends": template.get("stops"),
        "layers": [f"{count} {kind}" for kind, count in build.get("layer_types", {}).items()],
        "linear layers": linear,
        "experts": experts,
        "tied": [" = ".join(names) for names in build.get("tied", ())],
        "beside the language model": build.get("beside"),
        "notes": description.get("notes"),
    }
    return {field: ", ".join(values) for field, values in rows.items() if values}


@models_cli.command("check")
def check_model(context: typer.Context, name: str, wait: Wait = False) -> None:
    """Have a worker look at it again, for instance once its terms are accepted."""
    model = native.post(context, f"models/{native.part(name)}/check")
    _tell(context, _settled(context, model) if wait else model)


@models_cli.command("prefetch")
def prefetch_model(
    context: typer.Context,
    name: str,
    wait: Annotated[bool, typer.Option("--wait", help="Until all have it; exit code 1 if one cannot.")] = False,
) -> None:
    """Have every worker of the pool bring it to its host, before a job needs it."""
    path = f"models/{native.part(name)}/prefetch"
    rows = native.post(context, path)["data"]
    with watching.interruptible_work(left=f"The workers go on: tunepool models prefetch {name}"):
        while wait and any(row["state"] in {"waiting", "fetching"} for row in rows):
            time.sleep(_POLL_SECONDS)
            rows = native.get(context, path)["data"]
    show_rows(context, rows, ("worker_id", "host", "state", "bytes_done", "bytes_total", "detail"))
    if any(row["state"] == "error" for row in rows):
        raise typer.Exit(_EXIT_ERROR)


@models_cli.command("remove")
def remove_model(context: typer.Context, name: str) -> None:
    """Take a base model out of the catalogue. Refused while jobs use it; adapters stay."""
    gone = native.delete(context, f"models/{native.part(name)}")
    show(context, gone, f"{gone['id']} removed")


def _settled(context: typer.Context, model: dict[str, Any]) -> dict[str, Any]:
    """The base model once it is no longer being looked at."""
    with watching.interruptible_work(left=f"A worker goes on: tunepool models show {model['id']}"):
        while model["state"] == "resolving":
            time.sleep(_POLL_SECONDS)
            model = native.get(context, f"models/{native.part(model['id'])}")
    return model


def _tell(context: typer.Context, model: dict[str, Any]) -> None:
    detail = f"\n{model['detail']}" if model["detail"] else ""
    show(context, model, f"{model['id']} {model['state']}{detail}")
    if model["state"] == "error":
        raise typer.Exit(_EXIT_ERROR)


def _words(value: Any) -> str:
    if isinstance(value, list):
        return ", ".join(map(str, value)) or "-"
    return "-" if value is None else str(value)
