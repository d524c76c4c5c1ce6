"""`tunepool pool|workers|devices|audit|usage`: see and run a pool. Most of it needs a key with the scope admin."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from tunepool import native
from tunepool.printing import show, show_rows
from tunepool.requests import BadSetting, nested

pool_cli = typer.Typer(no_args_is_help=True, help="The pool: what runs, who waits, and its rules.")
workers_cli = typer.Typer(no_args_is_help=True, help="Workers of the pool.")
chores_cli = typer.Typer(no_args_is_help=True, help="What workers do beside training: checks, merges and the like.")
devices_cli = typer.Typer(no_args_is_help=True, help="Devices of the pool.")


@pool_cli.command("show")
def show_pool(context: typer.Context) -> None:
    """Devices, projects and the queue in its order."""
    pool = native.get(context, "pool")
    if context.obj.as_json:
        show(context, pool, "")
        return
    counts = ", ".join(f"{count} {status}" for status, count in pool["jobs"].items())
    print(f"pool {pool['name']}{' (held)' if pool['held'] else ''}: {counts}\n")
    devices = [{**device, "state": _state(device)} for device in pool["devices"]]
    # A server of before knows of no jobs that share a device.
    sharing = ("sharing",) if any(device.get("sharing") for device in devices) else ()
    show_rows(context, devices, ("id", "name", "total_bytes", "free_bytes", "state", "job_id", *sharing))
    print()
    if gangs := pool.get("gangs"):  # a server of before has none
        show_rows(context, gangs, ("job_id", "node", "host", "worker_id", "phase"))
        print()
    columns = ("usage.share", "usage.running_devices", "usage.queued_jobs", "usage.month_gpu_hours")
    show_rows(context, pool["projects"], ("name", "weight", *columns, "usage.reserved_gpu_hours"))
    print()
    show_rows(context, pool["queue"], ("position", "job_id", "project_id", "tier", "blocked_by", "eta_low", "eta_high"))
    if preemptions := pool.get("preemptions"):  # as above
        print("\npreemptions")
        show_rows(context, preemptions, ("job_id", "project_id", "attempt", "reason", "ended_at"))


def _state(device: dict[str, Any]) -> str:
    ill = device["ailment"] or "unhealthy"
    words = ((not device["healthy"], ill), (device["quarantined"], "quarantined"), (device["leased"], "busy"))
    return ", ".join(word for holds, word in words if holds) or "free"


@pool_cli.command("hold")
def hold_pool(context: typer.Context) -> None:
    """Start nothing more; what runs goes on."""
    _say_pool(context, native.post(context, "pool/hold"))


@pool_cli.command("release")
def release_pool(context: typer.Context) -> None:
    """Start jobs again."""
    _say_pool(context, native.post(context, "pool/release"))


@pool_cli.command("set")
def set_pool(
    context: typer.Context,
    rules: Annotated[list[str], typer.Argument(metavar="RULE=VALUE...", help="For instance max_wait_seconds=3600.")],
) -> None:
    """Change rules; `null` goes back to the default."""
    pool = native.patch(context, "pool", nested(rules))
    show(context, pool, "\n".join(f"{name}={value}" for name, value in pool["policy"].items()))


def _say_pool(context: typer.Context, pool: dict[str, Any]) -> None:
    show(context, pool, f"{pool['name']} {'held' if pool['held'] else 'released'}")


@workers_cli.command("list")
def list_workers(context: typer.Context) -> None:
    """List the workers."""
    columns = ("id", "host", "pool", "draining", "last_seen", "version")
    show_rows(context, native.get(context, "workers")["data"], columns)


@workers_cli.command("show")
def show_worker(
    context: typer.Context,
    worker: Annotated[str, typer.Argument(help="Its id, or the name of its host where it is the only one there.")],
) -> None:
    """A worker, what its host keeps programs on strangers' data from, and its devices with what their probes found."""
    known = [each for each in native.get(context, "workers")["data"] if worker in {each["id"], each["host"]}]
    if len(known) != 1:
        several = f"{len(known)} workers are on '{worker}': name one by its id" if known else f"No worker '{worker}'"
        raise BadSetting(f"{several}; `tunepool workers list` names them.")
    (chosen,) = known
    devices = [device for device in native.get(context, "pool")["devices"] if device["worker_id"] == chosen["id"]]
    lines = [f"{name}={value}" for name, value in chosen.items() if name not in {"object", "isolation"}]
    walls = chosen.get("isolation") or {}
    lines += [f"isolation.{name}={value}" for name, value in walls.items()]
    show(context, {**chosen, "devices": devices}, "\n".join(lines))
    if context.obj.as_json:
        return
    print()
    shown = [{**device, "state": _state(device)} for device in devices]
    show_rows(context, shown, ("id", "name", "total_bytes", "free_bytes", "warm_base", "probed", "state"))


@workers_cli.command("drain")
def drain_worker(context: typer.Context, worker_id: str) -> None:
    """Its jobs save a checkpoint and wait again; it takes nothing more until it is undrained."""
    _say_worker(context, native.post(context, f"workers/{native.part(worker_id)}/drain"))


@workers_cli.command("undrain")
def undrain_worker(context: typer.Context, worker_id: str) -> None:
    """Have a drained worker take work again."""
    _say_worker(context, native.post(context, f"workers/{native.part(worker_id)}/undrain"))


def _say_worker(context: typer.Context, worker: dict[str, Any]) -> None:
    show(context, worker, f"{worker['id']} {'draining' if worker['draining'] else 'takes work'}")


@chores_cli.command("list")
def list_chores(
    context: typer.Context,
    kind: Annotated[str | None, typer.Option(help="Only these, such as merge, export or file_check.")] = None,
    limit: Annotated[int, typer.Option(min=1, max=100)] = 20,
) -> None:
    """What has not ended yet: the project's own, with a key of the scope admin everybody's."""
    rows = native.get(context, "chores", kind=kind, limit=limit)["data"]
    show_rows(context, rows, ("id", "kind", "project_id", "worker_id", "failures"))


@chores_cli.command("cancel")
def cancel_chore(context: typer.Context, chore_id: str) -> None:
    """End one of them, waiting or at work."""
    ended = native.post(context, f"chores/{native.part(chore_id)}/cancel")
    show(context, ended, f"{ended['id']} cancelled ({ended['kind']})")


@devices_cli.command("list")
def list_devices(context: typer.Context) -> None:
    """List the devices."""
    columns = ("id", "name", "total_bytes", "free_bytes", "foreign_bytes", "healthy", "quarantined", "job_id")
    show_rows(context, native.get(context, "pool")["devices"], columns)


@devices_cli.command("quarantine")
def quarantine_device(
    context: typer.Context,
    device_id: str,
    reason: Annotated[str | None, typer.Option(help="Kept in the audit.")] = None,
) -> None:
    """Give a device to no job; one that runs there goes on."""
    body = {} if reason is None else {"reason": reason}
    _say_device(context, native.post(context, f"devices/{native.part(device_id)}/quarantine", body))


@devices_cli.command("release")
def release_device(context: typer.Context, device_id: str) -> None:
    """Put a quarantined device back into the pool."""
    _say_device(context, native.post(context, f"devices/{native.part(device_id)}/release"))


def _say_device(context: typer.Context, device: dict[str, Any]) -> None:
    show(context, device, f"{device['id']} {'quarantined' if device['quarantined'] else 'released'}")


def show_audit(
    context: typer.Context,
    target: Annotated[str | None, typer.Option(help="Only acts on the thing with this id.")] = None,
    limit: Annotated[int, typer.Option(min=1, max=100)] = 20,
) -> None:
    """Who operated what, newest first."""
    rows = native.get(context, "audit", target=target, limit=limit)["data"]
    show_rows(context, rows, ("created_at", "key_id", "action", "target", "before", "after"))


def show_usage(  # noqa: PLR0917 -- typer makes options of them
    context: typer.Context,
    since: Annotated[int | None, typer.Option("--from", help="Unix seconds; else the start of this month.")] = None,
    until: Annotated[int | None, typer.Option("--to", help="Unix seconds; else now.")] = None,
    group_by: Annotated[str, typer.Option(help="project, key, model, label:NAME; several with commas.")] = "project",
    project: Annotated[str | None, typer.Option(help="Id of another project.")] = None,
    as_csv: Annotated[bool, typer.Option("--csv", help="As a CSV file on stdout.")] = False,
) -> None:
    """Device-seconds that leases held, by whatever you group them."""
    query = {"from": since, "to": until, "group_by": group_by, "project_id": project}
    if as_csv:
        if context.obj.as_json:
            raise BadSetting("--csv and --json are two formats; take one.")
        given = {name: value for name, value in query.items() if value is not None}
        print(_csv(context, given), end="")
        return
    report = native.get(context, "usage", **query)
    groups = [name.replace("label:", "labels.") for name in report["group_by"]]
    show_rows(context, report["data"], (*groups, "device_seconds", "attempts", "jobs"))


def _csv(context: typer.Context, query: dict[str, Any]) -> str:
    return str(context.obj.client.get("/tunepool/usage", cast_to=str, options={"params": {**query, "format": "csv"}}))
