"""`tunepool-server`: starts and tends the processes of an installation."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Annotated, NoReturn

import typer

from shared import keys, log
from shared.catalogue import load_catalogue, local_folder
from shared.db import make_engine, session_scope
from shared.errors import TunepoolError
from shared.settings import Settings, child_environment
from shared.tables import ProjectRow
from standalone.home import Home, HomeInUse
from standalone.migrate import migrate as run_migrations
from standalone.postgres import PostgresFailed
from standalone.processes import ChildFailed
from standalone.up import WORKER, PortTaken, api_command, module, run
from standalone.valkey import ValkeyFailed

app = typer.Typer(no_args_is_help=True, add_completion=False, help=__doc__, pretty_exceptions_enable=False)
key_commands = typer.Typer(no_args_is_help=True, help="API keys of this installation.")
model_commands = typer.Typer(no_args_is_help=True, help="Base models of this installation.")
app.add_typer(key_commands, name="keys")
app.add_typer(model_commands, name="models")

HomeOption = Annotated[
    Path | None, typer.Option("--home", help="State of this host; else TUNEPOOL_HOME, else .tunepool.")
]


def _settings(home: Path | None) -> Settings:
    settings = Settings() if home is None else Settings(home=home)
    log.configure(settings)
    return settings


def _give_up(error: Exception) -> NoReturn:
    typer.echo(str(error), err=True)
    raise typer.Exit(2) from error


@app.command()
def up(
    home: HomeOption = None,
    port: Annotated[int, typer.Option(envvar="TUNEPOOL_PORT", help="Of the API on 127.0.0.1; 0: any free one.")] = 8765,
    worker: Annotated[bool, typer.Option(help="Also train on this machine.")] = True,
) -> None:
    """Everything on this machine: embedded Postgres and Valkey, API, worker, janitor. Ctrl-C stops it all.

    DATABASE_URL, REDIS_URL and STORAGE_URL each replace an embedded part.
    """
    settings = _settings(home)
    try:
        run(Home(settings.home.resolve()), settings, port=port, with_worker=worker)
    except (HomeInUse, PortTaken, PostgresFailed, ValkeyFailed, ChildFailed) as error:
        _give_up(error)


@app.command()
def migrate() -> None:
    """Bring the database at DATABASE_URL to this version's schema."""
    run_migrations(_settings(None).database_url)


@app.command()
def api(host: str = "127.0.0.1", port: int = 8765) -> None:
    """Only the API, on the servers that the environment names."""
    command = api_command(host, port)
    os.execv(command[0], command)  # noqa: S606  # no shell: this process becomes the API


@app.command()
def worker() -> None:
    """Only a worker: it trains on this host's devices and checks files."""
    command = module(*WORKER)
    os.execv(command[0], command)  # noqa: S606


@app.command()
def janitor() -> None:
    """Only a janitor: takes back dead leases, rings for waiting work, clears garbage. Any number may run."""
    command = module("worker.janitor")
    os.execv(command[0], command)  # noqa: S606


@key_commands.command("create")
def create_key(
    project: Annotated[str, typer.Option(help="Id of a project.")],
    name: str = "key",
    scope: Annotated[list[str] | None, typer.Option(help="Repeat for several; none: everything.")] = None,
) -> None:
    """Make an API key and print its secret, which nothing shows again."""
    unknown = set(scope or ()) - keys.SCOPES
    if unknown:
        _give_up(ValueError(f"Unknown scope '{min(unknown)}'. Known: {', '.join(sorted(keys.SCOPES))}."))
    with session_scope(make_engine(_settings(None).database_url)) as session:
        if session.get(ProjectRow, project) is None:
            _give_up(ValueError(f"No project '{project}'."))
        _, secret = keys.create(session, project_id=project, name=name, scopes=scope or ("*",))
    typer.echo(secret)


@key_commands.command("list")
def list_keys() -> None:
    """Ids, projects and states; never secrets."""
    with session_scope(make_engine(_settings(None).database_url)) as session:
        for row in keys.listed(session):
            state = "revoked" if row.revoked_at else "live"
            typer.echo(f"{row.id}  {row.project_id}  {row.prefix}…  {row.name}  {','.join(row.scopes)}  {state}")


@key_commands.command("revoke")
def revoke_key(key_id: str) -> None:
    """End a key at once."""
    try:
        with session_scope(make_engine(_settings(None).database_url)) as session:
            keys.revoke(session, key_id)
    except TunepoolError as error:
        _give_up(error)


@model_commands.command("list")
def list_models(home: HomeOption = None) -> None:
    """Names that jobs may use."""
    for name in load_catalogue(_settings(home)).names():
        typer.echo(name)


@model_commands.command("path")
def model_path(name: str, home: HomeOption = None) -> None:
    """The local directory of a base model, for loading an adapter on it outside this service."""
    settings = _settings(home)
    try:
        folder = local_folder(load_catalogue(settings).entry(name), cache=settings.cache)
    except TunepoolError as error:
        _give_up(error)
    if not folder.is_dir():
        _give_up(ValueError(f"'{name}' is not on this host yet. Fetch it with: tunepool-server models fetch {name}"))
    typer.echo(folder)


@model_commands.command("fetch")
def fetch_model(name: str, home: HomeOption = None) -> None:
    """Download and verify a base model now, not at the first job that needs it."""
    settings = _settings(home)
    environment = child_environment(TUNEPOOL_HOME=str(settings.home.resolve()))
    done = subprocess.run(module("worker.base_models", name), env=environment, check=False)
    raise typer.Exit(done.returncode)


if __name__ == "__main__":
    sys.exit(app())
