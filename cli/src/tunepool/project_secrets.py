"""`tunepool secrets`: the credentials of a project's integrations. A value is never an argument."""

from __future__ import annotations

import os
import sys
from typing import Annotated

import typer

from tunepool import native
from tunepool.printing import show, show_rows

secrets_cli = typer.Typer(no_args_is_help=True, help="Secrets of the project, for Weights & Biases and MLflow.")


@secrets_cli.command("set")
def set_secret(
    context: typer.Context,
    name: Annotated[str, typer.Argument(help="WANDB_API_KEY, MLFLOW_TRACKING_URI, MLFLOW_TRACKING_TOKEN …")],
    from_env: Annotated[
        bool, typer.Option("--from-env", help="Take the value of the environment variable of that name.")
    ] = False,
) -> None:
    """Store a secret. Its value comes from standard input, or is asked for where that is a terminal."""
    stored = native.put(context, f"secrets/{native.part(name)}", {"value": _value(name, from_env=from_env)})
    show(context, stored, f"{stored['id']} stored")


def _value(name: str, *, from_env: bool) -> str:
    if from_env:
        if name not in os.environ:
            raise typer.BadParameter(f"The environment has no variable {name}.", param_hint="--from-env")
        return os.environ[name]
    if sys.stdin.isatty():
        return str(typer.prompt(name, hide_input=True))
    return sys.stdin.readline().rstrip("\r\n")


@secrets_cli.command("list")
def list_secrets(context: typer.Context) -> None:
    """List the names of the project's secrets."""
    show_rows(context, native.get(context, "secrets")["data"], ("id", "created_at", "updated_at"))


@secrets_cli.command("remove")
def remove_secret(context: typer.Context, name: str) -> None:
    """Forget a secret."""
    gone = native.delete(context, f"secrets/{native.part(name)}")
    show(context, gone, f"{gone['id']} removed")
