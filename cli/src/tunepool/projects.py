"""`tunepool projects|keys`: the tenants of a pool and who may act for them. Needs a key with the scope admin."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from tunepool import native
from tunepool.printing import cell, show, show_rows
from tunepool.requests import given, nested

projects_cli = typer.Typer(no_args_is_help=True, help="Projects: weights, quotas, budgets.")
keys_cli = typer.Typer(no_args_is_help=True, help="API keys: scopes, caps, bounds.")

Settings = Annotated[
    list[str], typer.Argument(metavar="FIELD=VALUE...", help="For instance weight=2 max_running=null.")
]


@projects_cli.command("list")
def list_projects(context: typer.Context) -> None:
    """List every project with its rights and what it uses."""
    columns = ("id", "name", "weight", "guarantee", "max_running", "max_queued", "held", "budget_gpu_hours")
    show_rows(context, native.get(context, "projects")["data"], (*columns, "usage.month_gpu_hours", "usage.share"))


@projects_cli.command("create")
def create_project(
    context: typer.Context,
    name: str,
    settings: Annotated[list[str] | None, typer.Argument(metavar="FIELD=VALUE...")] = None,
) -> None:
    """Make a project and print its id."""
    made = native.post(context, "projects", {**nested(settings or []), "name": name})
    show(context, made, made["id"])


@projects_cli.command("set")
def edit_project(context: typer.Context, project_id: str, settings: Settings) -> None:
    """Change weight, guarantee, quotas, budgets or name."""
    project = native.patch(context, f"projects/{native.part(project_id)}", nested(settings))
    show(context, project, "\n".join(f"{name}={project[name]}" for name in nested(settings)))


@projects_cli.command("hold")
def hold_project(context: typer.Context, project_id: str) -> None:
    """Start none of its jobs; what runs goes on."""
    _say(context, native.post(context, f"projects/{native.part(project_id)}/hold"))


@projects_cli.command("release")
def release_project(context: typer.Context, project_id: str) -> None:
    """Start its jobs again."""
    _say(context, native.post(context, f"projects/{native.part(project_id)}/release"))


def _say(context: typer.Context, project: dict[str, Any]) -> None:
    show(context, project, f"{project['id']} {'held' if project['held'] else 'released'}")


@keys_cli.command("list")
def list_keys(
    context: typer.Context, project: Annotated[str | None, typer.Option(help="Id of one project.")] = None
) -> None:
    """List keys, revoked ones too; never secrets."""
    rows = native.get(context, "keys", project_id=project)["data"]
    columns = ("id", "project_id", "name", "prefix", "scopes", "max_running", "max_queued", "max_tier", "max_priority")
    rows = [{**row, "former": _former(row["former"])} for row in rows] if not context.obj.as_json else rows
    show_rows(context, rows, (*columns, "expires_at", "revoked_at", "last_used_at", "rotated_at", "former"))


def _former(secrets: list[dict[str, Any]]) -> str | None:
    """The former secrets that are still valid, and until when."""
    return " ".join(f"{secret['prefix']}…→{cell('expires_at', secret['expires_at'])}" for secret in secrets) or None


@keys_cli.command("create")
def create_key(
    context: typer.Context,
    project_id: str,
    name: str,
    scope: Annotated[
        list[str] | None, typer.Option(help="Repeat for several; none: everything in the project.")
    ] = None,
    settings: Annotated[list[str] | None, typer.Option("--set", metavar="FIELD=VALUE", help="May be repeated.")] = None,
) -> None:
    """Make a key and print its secret, which nothing shows again."""
    wanted = {**nested(settings or []), **given(scopes=scope), "project_id": project_id, "name": name}
    made = native.post(context, "keys", wanted)
    show(context, made, made["api_key"])


@keys_cli.command("set")
def edit_key(context: typer.Context, key_id: str, settings: Settings) -> None:
    """Change a key's name, caps, bounds or scopes (scopes='["jobs:read"]')."""
    key = native.patch(context, f"keys/{native.part(key_id)}", nested(settings))
    show(context, key, "\n".join(f"{name}={key[name]}" for name in nested(settings)))


@keys_cli.command("rotate")
def rotate_key(
    context: typer.Context,
    key_id: str,
    overlap_hours: Annotated[
        float, typer.Option(min=0, max=720, help="So long the old secret stays valid; 0: it ends at once.")
    ] = 24.0,
) -> None:
    """Give a key a new secret and print it; id, rights and figures stay."""
    made = native.post(context, f"keys/{native.part(key_id)}/rotate", {"overlap_hours": overlap_hours})
    show(context, made, made["api_key"])


@keys_cli.command("revoke")
def revoke_key(context: typer.Context, key_id: str) -> None:
    """End a key at once."""
    key = native.delete(context, f"keys/{native.part(key_id)}")
    show(context, key, f"{key['id']} revoked")
