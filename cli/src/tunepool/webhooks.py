"""`tunepool webhooks`: who is told of a project's ended jobs, and what became of it."""

from __future__ import annotations

from typing import Annotated, Any, Final

import typer

from tunepool import native
from tunepool.printing import show, show_rows
from tunepool.requests import nested

webhooks_cli = typer.Typer(no_args_is_help=True, help="Webhooks: addresses that are told of ended jobs.")

EVENTS: Final = ("succeeded", "failed", "cancelled")
Events = Annotated[list[str] | None, typer.Option("--event", help="succeeded, failed or cancelled; may be repeated.")]


def _path(webhook_id: str, *rest: str) -> str:
    return "/".join(["webhooks", native.part(webhook_id), *rest])


@webhooks_cli.command("create")
def create_webhook(
    context: typer.Context,
    url: str,
    event: Events = None,
    name: Annotated[str, typer.Option(help="For lists.")] = "webhook",
    rich: Annotated[bool, typer.Option(help="Bodies say how the job ended, beside OpenAI's fields.")] = False,
) -> None:
    """Have an address told of jobs that end; print the secret, which nothing shows again."""
    types = [f"fine_tuning.job.{ending}" for ending in event or EVENTS]
    wanted = {"name": name, "url": url, "event_types": types, "rich": rich}
    made = native.post(context, "webhooks", wanted)
    show(context, made, f"{made['id']} {made['signing_secret']}")


@webhooks_cli.command("list")
def list_webhooks(context: typer.Context) -> None:
    """List the project's webhooks, and why one is disabled."""
    columns = ("id", "name", "url", "enabled", "failing_since", "disabled_reason")
    show_rows(context, native.get(context, "webhooks")["data"], columns)


@webhooks_cli.command("set")
def edit_webhook(
    context: typer.Context,
    webhook_id: str,
    settings: Annotated[list[str], typer.Argument(metavar="FIELD=VALUE...", help="name, url, rich, event_types.")],
) -> None:
    """Change what is given, for instance url=https://… or rich=true."""
    _say(context, native.patch(context, _path(webhook_id), nested(settings)))


@webhooks_cli.command("test")
def send_test(context: typer.Context, webhook_id: str, event: Annotated[str, typer.Option()] = "succeeded") -> None:
    """Send an event of a job that never was; print the delivery's id."""
    sent = native.post(context, _path(webhook_id, "test"), {"event_type": f"fine_tuning.job.{event}"})
    show(context, sent, sent["id"])


@webhooks_cli.command("rotate")
def rotate_secret(
    context: typer.Context,
    webhook_id: str,
    keep: Annotated[bool, typer.Option(help="Both secrets sign for 24 hours.")] = False,
) -> None:
    """Make a new secret and print it."""
    made = native.post(context, _path(webhook_id, "rotate"), {"keep_old_secret_active_for_24_hours": keep})
    show(context, made, made["signing_secret"])


@webhooks_cli.command("disable")
def disable_webhook(context: typer.Context, webhook_id: str) -> None:
    """Send nothing more there."""
    _say(context, native.post(context, _path(webhook_id, "disable")))


@webhooks_cli.command("enable")
def enable_webhook(context: typer.Context, webhook_id: str) -> None:
    """Tell it of jobs that end from now on."""
    _say(context, native.post(context, _path(webhook_id, "enable")))


@webhooks_cli.command("delete")
def delete_webhook(context: typer.Context, webhook_id: str) -> None:
    """Remove a webhook."""
    gone = native.delete(context, _path(webhook_id))
    show(context, gone, f"{gone['id']} deleted")


@webhooks_cli.command("deliveries")
def list_deliveries(
    context: typer.Context, webhook_id: str, limit: Annotated[int, typer.Option(min=1, max=100)] = 20
) -> None:
    """List what was sent there or waits, newest first."""
    rows = native.get(context, _path(webhook_id, "deliveries"), limit=limit)["data"]
    columns = ("id", "event_type", "job_id", "state", "tries", "next_try_at")
    show_rows(context, [{**row, "last": _last(row)} for row in rows], (*columns, "last"))


def _last(row: dict[str, Any]) -> str:
    tries = row["log"]
    return str(tries[-1]["error"] or tries[-1]["status"]) if tries else ""


@webhooks_cli.command("replay")
def replay_delivery(context: typer.Context, webhook_id: str, delivery_id: str) -> None:
    """Send an event once more; print the new delivery's id."""
    sent = native.post(context, _path(webhook_id, "deliveries", native.part(delivery_id), "replay"))
    show(context, sent, sent["id"])


def _say(context: typer.Context, webhook: dict[str, Any]) -> None:
    show(context, webhook, f"{webhook['id']} {'enabled' if webhook['enabled'] else 'disabled'} {webhook['url']}")
