"""`tunepool-server`: starts and tends the processes of an installation."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import Annotated, Final, NoReturn

import typer
from sqlalchemy import select
from sqlalchemy.exc import OperationalError
from sqlalchemy.orm import Session

from shared import log
from shared.chores import base_models
from shared.errors import Invalid, TunepoolError
from shared.operating.isolation import IsolationLacking
from shared.operating.secrecy import hide_secrets
from shared.settings import Settings
from shared.settle.catalogue import Catalogue, load_catalogue, local_folder
from shared.store.db import make_engine, session_scope
from shared.store.tables import ProjectRow
from shared.tenants import audit, keys, rotation, signing_keys
from shared.tenants.plain_text import acting, printable
from standalone.children import ChildFailed
from standalone.conversion import convert_file
from standalone.doctor import Installation
from standalone.findings import document, lines
from standalone.first_key import signing_key
from standalone.home import Home, HomeInUse, HomeUnusable
from standalone.migrate import migrate as run_migrations
from standalone.postgres import running_url
from standalone.up import (
    DISPATCHER,
    HANDED_OVER,
    PLAYGROUND,
    WORKER,
    PortTaken,
    api_command,
    module,
    own_environment,
    run,
    with_secrets_key,
)
from standalone.valkey import running_redis

app = typer.Typer(no_args_is_help=True, add_completion=False, help=__doc__, pretty_exceptions_enable=False)
key_commands = typer.Typer(no_args_is_help=True, help="API keys of this installation.")
model_commands = typer.Typer(no_args_is_help=True, help="Base models of this installation.")
app.add_typer(key_commands, name="keys")
app.add_typer(model_commands, name="models")
signing_commands = typer.Typer(no_args_is_help=True, help="Keys that sign where adapters come from.")
app.add_typer(signing_commands, name="signing-keys")

HomeOption = Annotated[
    Path | None, typer.Option("--home", help="State of this host; else TUNEPOOL_HOME, else .tunepool.")
]


_PORT: Final = 8765
PortOption = Annotated[
    int, typer.Option(envvar="TUNEPOOL_PORT", min=0, max=65535, help="Of the API on 127.0.0.1; 0: any free one.")
]


def _settings(home: Path | None) -> Settings:
    hide_secrets()  # every command comes by here first
    settings = Settings() if home is None else Settings(home=home)
    log.configure(settings)
    return settings


def _home(settings: Settings) -> Home:
    return Home(settings.home.resolve())


def _prepared(settings: Settings) -> Home:
    home = _home(settings)
    try:
        home.prepare()
    except HomeUnusable as error:
        _give_up(error)
    return home


def _give_up(error: Exception | str) -> NoReturn:
    message = f"The database does not answer: {error.orig}" if isinstance(error, OperationalError) else str(error)
    typer.echo(message, err=True)
    raise typer.Exit(2)


def _running_database(settings: Settings) -> str | None:
    return settings.database_url or running_url(_home(settings).postgres)


def _database_url(settings: Settings) -> str:
    """The URL of the server that the environment names, else of the one that `up` runs in this home."""
    url = _running_database(settings)
    if not url:
        _give_up(
            f"No database: DATABASE_URL is not set, and no 'tunepool-server up' runs in {settings.home.resolve()}. "
            "Another home: --home, or TUNEPOOL_HOME."
        )
    return url


@contextmanager
def _session(home: Path | None) -> Iterator[Session]:
    engine = make_engine(_database_url(_settings(home)))
    try:
        with session_scope(engine) as session:
            yield session
    except (TunepoolError, OperationalError) as error:
        _give_up(error)
    finally:
        engine.dispose()


def _become(command: list[str], *, rung: bool = True) -> NoReturn:
    """Turn into one process of an installation whose servers the environment names. `rung`: it hears bells."""
    settings = _settings(None)
    if not settings.database_url or not (settings.redis_url or not rung):
        _give_up("Set DATABASE_URL and REDIS_URL. Everything on this machine, with nothing set: tunepool-server up.")
    home = _prepared(settings)
    os.chdir(home.path)  # a folder `api/` where the operator stands would be imported in place of ours
    os.execve(command[0], command, own_environment(home, settings))  # noqa: S606  # no shell


@app.command()
def up(
    home: HomeOption = None,
    port: PortOption = _PORT,
    worker: Annotated[bool, typer.Option(help="Also train on this machine.")] = True,
) -> None:
    """Everything on this machine: embedded Postgres and Valkey, API, worker, janitor. Ctrl-C stops it all.

    DATABASE_URL, REDIS_URL and STORAGE_URL each replace an embedded part.
    """
    settings = _settings(home)
    try:
        run(_home(settings), settings, port=port, with_worker=worker)
    except (HomeInUse, HomeUnusable, PortTaken, ChildFailed, IsolationLacking, Invalid, OperationalError) as error:
        _give_up(error)


@app.command()
def migrate(home: HomeOption = None) -> None:
    """Bring the database to this version's schema: the one at DATABASE_URL, else of the `up` in this home.

    Where there is a key to encrypt with, a key is made that signs adapters, unless one is there.
    """
    settings = _settings(home)
    url = _database_url(settings)
    try:
        run_migrations(url)
        signing_key(url, with_secrets_key(_home(settings), settings))
    except (OperationalError, Invalid) as error:
        _give_up(error)


@app.command()
def api(host: str = "127.0.0.1", port: PortOption = _PORT) -> None:
    """Only the API, on the servers that the environment names."""
    _become(api_command(host, port, processes=_settings(None).api_processes))


@app.command()
def worker(
    attempt: Annotated[
        str, typer.Option(help="Run this one attempt on a machine that a cluster gave, and end (docs/slurm.md).")
    ] = "",
) -> None:
    """Only a worker: it trains on this host's devices and checks files."""
    if attempt:
        _become(module(*HANDED_OVER, attempt), rung=False)
    _become(module(*WORKER))


@app.command()
def dispatcher() -> None:
    """Only a dispatcher: it gives what the plan admits to a cluster, as TUNEPOOL_LAUNCHER says."""
    _become(module(*DISPATCHER), rung=False)


@app.command()
def playground() -> None:
    """Only a playground: it answers questions to models, on this host's first device while no training wants it."""
    _become(module(*PLAYGROUND))


@app.command()
def janitor() -> None:
    """Only a janitor: takes back dead leases, rings for waiting work, clears garbage. Any number may run."""
    _become(module("worker.janitor"))


@app.command()
def doctor(
    home: HomeOption = None,
    port: Annotated[
        int | None, typer.Option(envvar="TUNEPOOL_PORT", help="The API's; else that of the last start of this home.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="For programs.")] = False,
) -> None:
    """Look at every part of this installation and say what to do. Exit code 1 where something is at fault."""
    settings = _settings(home)
    place = _home(settings)
    findings = list(
        Installation(
            settings=settings,
            home=place,
            database_url=_running_database(settings) or "",
            redis_url=settings.redis_url or running_redis(place.valkey) or "",
            port=(place.last_port or _PORT) if port is None else port,
        ).findings()
    )
    typer.echo(json.dumps(document(findings)) if as_json else "\n".join(lines(findings)))
    raise typer.Exit(any(finding.grade == "fault" for finding in findings))


@app.command()
def convert(
    source: Annotated[
        Path,
        typer.Argument(
            exists=True,
            dir_okay=False,
            help="JSONL, a JSON array, CSV, TSV, Parquet, Arrow, or one of them compressed.",
        ),
    ],
    target: Annotated[Path, typer.Argument(help="The canonical JSONL to write.")],
) -> None:
    """Turn a file of any known shape (ShareGPT, Alpaca, conversational …) into the rows that are trained."""
    try:
        typer.echo(f"{convert_file(source, target)} rows")
    except Invalid as error:
        _give_up(error)


@key_commands.command("create")
def create_key(
    project: Annotated[str, typer.Option(help="Id of a project; may be left out while there is only one.")] = "",
    name: str = "key",
    scope: Annotated[list[str] | None, typer.Option(help="Repeat for several; none: all but admin.")] = None,
    home: HomeOption = None,
) -> None:
    """Make an API key and print its secret, which nothing shows again.

    The first one of a database comes with the default organization and project, and may do everything unless a scope
    is named.
    """
    unknown = set(scope or ()) - keys.SCOPES
    if unknown:
        _give_up(f"Unknown scope '{min(unknown)}'. Known: {', '.join(sorted(keys.SCOPES))}.")
    if next(acting(name), None) is not None:
        _give_up("--name holds a control character or a mark of direction; leave it out.")
    with _session(home) as session:
        first = None if project else keys.first_project(session)
        scopes = scope or (keys.EVERYTHING if first else ("*",))
        row, secret = keys.create(session, project_id=first or _project(session, project), name=name, scopes=scopes)
        audit.record_of_host(session, row.id, "key.create", after={"name": name, "scopes": list(scopes)})
    if first:
        typer.echo(f"Made the project 'default' ({first}).", err=True)
    typer.echo(secret)


def _project(session: Session, wanted: str) -> str:
    known = session.scalars(select(ProjectRow.id).order_by(ProjectRow.id).limit(20)).all()
    if wanted and session.get(ProjectRow, wanted) is not None:
        return wanted
    if not wanted and len(known) == 1:
        return known[0]
    missing = f"No project '{wanted}'." if wanted else "Name one with --project."
    _give_up(f"{missing} Known: {', '.join(known) or 'none'}.")


@key_commands.command("list")
def list_keys(home: HomeOption = None) -> None:
    """Ids, projects and states; never secrets."""
    with _session(home) as session:
        for row in keys.listed(session):
            state = "revoked" if row.revoked_at else "live"
            typer.echo(
                f"{row.id}  {row.project_id}  {row.prefix}…  {printable(row.name)}  {','.join(row.scopes)}  {state}"
            )


@key_commands.command("rotate")
def rotate_key(
    key_id: str,
    overlap_hours: Annotated[
        float, typer.Option(min=0, max=720, help="So long the old secret stays valid; 0: it ends at once.")
    ] = 24.0,
    home: HomeOption = None,
) -> None:
    """Give a key a new secret and print it; id, rights and figures stay."""
    overlap = timedelta(hours=overlap_hours)
    with _session(home) as session:
        row, secret = rotation.rotate(session, key_id, overlap=overlap)
        former = {"former_valid_seconds": int(overlap.total_seconds()), "prefix": row.prefix}
        audit.record_of_host(session, key_id, "key.rotate", after=former)
    typer.echo(secret)


@key_commands.command("revoke")
def revoke_key(key_id: str, home: HomeOption = None) -> None:
    """End a key at once."""
    with _session(home) as session:
        keys.revoke(session, key_id)
        audit.record_of_host(session, key_id, "key.revoke", after={"revoked": True})


@signing_commands.command("list")
def list_signing_keys(home: HomeOption = None) -> None:
    """Ids of the keys that sign where adapters come from, or have signed; never private keys."""
    with _session(home) as session:
        for row in signing_keys.listed(session):
            typer.echo(f"{row.id}  {row.created_at:%Y-%m-%d %H:%M}  {'retired' if row.retired_at else 'signs'}")


@signing_commands.command("rotate")
def rotate_signing_key(home: HomeOption = None) -> None:
    """Have a new key sign from now on. What the old one has signed is verified as before; its private half goes."""
    settings = _settings(home)
    with _session(home) as session:
        made = signing_keys.rotate(session, with_secrets_key(_home(settings), settings))
    typer.echo(made)


def _catalogue(home: Path | None) -> Catalogue:
    """Every base model, as it stands now. Without a database, those of `models.toml` that need none."""
    settings = _settings(home)
    if not _running_database(settings):
        return load_catalogue(settings)
    with _session(home) as session:
        return base_models.offered(session, settings)


@model_commands.command("list")
def list_models(home: HomeOption = None) -> None:
    """Names that jobs may use; on standard error, entries that they may not, and why."""
    catalogue = _catalogue(home)
    for name in catalogue.names():
        typer.echo(name)
    for name, reason in catalogue.complaints().items():
        typer.echo(f"{name}: {reason}", err=True)
    for name, entry in catalogue.pending.items():
        typer.echo(f"{name}: resolving. A worker looks it up. {entry.note}".rstrip(), err=True)


@model_commands.command("path")
def model_path(name: str, home: HomeOption = None) -> None:
    """The local directory of a base model, for loading an adapter on it outside this service."""
    settings = _settings(home)
    try:
        folder = local_folder(_catalogue(home).entry(name), cache=settings.cache)
    except TunepoolError as error:
        _give_up(error)
    if not folder.is_dir():
        _give_up(f"'{name}' is not on this host yet. Fetch it with: tunepool-server models fetch {name}")
    typer.echo(folder)


@model_commands.command("fetch")
def fetch_model(name: str, home: HomeOption = None) -> None:
    """Download and verify a base model now, not at the first job that needs it."""
    settings = _settings(home)
    place = _prepared(settings)
    environment = own_environment(place, settings, DATABASE_URL=_running_database(settings) or "")
    done = subprocess.run(module("worker.base_models", name), env=environment, cwd=place.path, check=False)
    raise typer.Exit(done.returncode)


if __name__ == "__main__":
    sys.exit(app())
