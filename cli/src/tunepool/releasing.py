"""`tunepool aliases`, `promote`, `rollback`, `compare`: names of tuned models that move, such as support-bot@prod."""

from __future__ import annotations

import json
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated, Any, Final

import typer

from tunepool import gating, native, official, requests
from tunepool.printing import json_line, printable, show, show_rows

aliases_cli = typer.Typer(no_args_is_help=True, help="Names of tuned models that move, such as support-bot@prod.")

EXIT_GATE: Final = {"gate_failed": 1, "gate_undecided": 7}
EXIT_WAITS: Final = 8
PER_PAGE: Final = 100

AliasName = Annotated[str, typer.Argument(metavar="ALIAS", help="For instance support-bot@prod.")]
PromotionId = Annotated[str, typer.Argument(metavar="PROMOTION", help="`promo_…`, as `aliases pending` lists it.")]
Reason = Annotated[str | None, typer.Option(help="Why; kept in the history.")]
Expected = Annotated[int | None, typer.Option(min=0, help="Only if it is still at this version; 0: if it is new.")]


@aliases_cli.command("list")
def list_aliases(context: typer.Context) -> None:
    """List the project's aliases, with what each of them names now."""
    rows: list[dict[str, Any]] = []
    more, after = True, None
    while more:
        page = native.get(context, "aliases", limit=PER_PAGE, after=after)
        rows += page["data"]
        more, after = page["has_more"], page["data"][-1]["id"] if page["data"] else None
    show_rows(context, rows, ("id", "model", "version", "moved_at", "movers"))


@aliases_cli.command("show")
def show_alias(context: typer.Context, alias: AliasName) -> None:
    """Show what an alias names, and its history."""
    shown = native.get(context, f"aliases/{_part(alias)}")
    if context.obj.as_json:
        print(json_line(shown))
        return
    rows = [
        {**version, "gate": (version["gate"] or {}).get("status"), "by": version["key_id"]}
        for version in shown["history"]
    ]
    show_rows(context, rows, ("number", "kind", "model", "gate", "forced", "by", "created_at", "reason"))


@aliases_cli.command("protect")
def protect_alias(
    context: typer.Context,
    alias: AliasName,
    keys: Annotated[list[str] | None, typer.Option("--key", metavar="KEY_ID", help="May be repeated.")] = None,
    approvals: Annotated[
        int | None, typer.Option(min=0, max=10, help="So many other keys must approve a promotion.")
    ] = None,
    approvers: Annotated[
        list[str] | None, typer.Option("--approver", metavar="KEY_ID", help="Who may approve; may be repeated.")
    ] = None,
) -> None:
    """Let only these keys move an alias; without options every key, at once. Needs the scope admin."""
    changes: dict[str, Any] = requests.given(movers=keys, approvals=approvals, approvers=approvers)
    shown = native.patch(
        context, f"aliases/{_part(alias)}", changes or {"movers": None, "approvals": 0, "approvers": None}
    )
    needs = f"; {shown['approvals']} approvals of {_names(shown['approvers'])}" if shown["approvals"] else ""
    show(context, shown, f"{shown['id']}: {_names(shown['movers'])}{needs}")


def _names(keys: list[str] | None) -> str:
    return ", ".join(keys or ["every key"])


@aliases_cli.command("pending")
def list_pending(context: typer.Context) -> None:
    """List the promotions that wait for approvals."""
    rows: list[dict[str, Any]] = []
    more, after = True, None
    while more:
        page = native.get(context, "promotions", state="pending", limit=PER_PAGE, after=after)
        rows += page["data"]
        more, after = page["has_more"], page["data"][-1]["id"] if page["data"] else None
    columns = ("id", "alias", "model", "approvals", "approved_by", "key_id", "forced", "expires_at", "reason")
    show_rows(context, rows, columns)


@aliases_cli.command("approve")
def approve_promotion(context: typer.Context, promotion: PromotionId) -> None:
    """Approve what another key asked for. Exit 0 moved, 8 more approvals are needed, 1 or 7 the gate, 4 refused."""
    answer = _unless_the_gate_forbids(context, f"promotions/{_part(promotion)}/approve", {})
    if answer["state"] == "pending":
        show(context, answer, waiting_words(answer))
        raise typer.Exit(EXIT_WAITS)
    show(context, answer, f"{answer['alias']} names {answer['model']} (version {answer['version']})")


@aliases_cli.command("withdraw")
def withdraw_promotion(context: typer.Context, promotion: PromotionId, reason: Reason = None) -> None:
    """End a promotion that waits: take back what this key asked for, or refuse what another one did."""
    answer = native.post(context, f"promotions/{_part(promotion)}/withdraw", requests.given(reason=reason))
    show(context, answer, f"{answer['id']} {answer['state']}")


@aliases_cli.command("remove")
def remove_alias(context: typer.Context, alias: AliasName) -> None:
    """Take an alias away. The models that it has named stay."""
    gone = native.delete(context, f"aliases/{_part(alias)}")
    show(context, gone, f"{gone['id']} removed")


def promote(  # noqa: PLR0917 -- typer makes options of them
    context: typer.Context,
    alias: AliasName,
    model: Annotated[str, typer.Argument(help="`ft:…`, a checkpoint, a combination, or another alias.")],
    gate: Annotated[Path | None, typer.Option(exists=True, dir_okay=False, help="gate.yaml.")] = None,
    evaluation: Annotated[str | None, typer.Option(help="The evaluation that the gate is held against, by id.")] = None,
    report: Annotated[
        Path | None, typer.Option(exists=True, dir_okay=False, help="A report as JSON, in place of an evaluation.")
    ] = None,
    roles: gating.Roles = None,
    expected_version: Expected = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Only judge; nothing moves.")] = False,
    force: Annotated[bool, typer.Option("--force", help="Whatever the gate says; needs --reason.")] = False,
    reason: Reason = None,
) -> None:
    """Have an alias name a model whose gate passes. Exit 0 moved, 8 waits for approvals, 1 failed, 7 undecided."""
    body = requests.given(model=model, expected_version=expected_version, reason=reason)
    body |= {"dry_run": dry_run, "force": force}
    if gate is not None:
        gating.gate_of(gate)  # a gate that cannot be read is refused here, with its file's name
        figures = None if report is None else gating.report_of(report)
        body["gate"] = {
            "text": gate.read_text(encoding="utf-8"),
            "roles": requests.pairs(roles or []),
            **requests.given(evaluation=evaluation, report=figures),
        }
    answer = _unless_the_gate_forbids(context, f"aliases/{_part(alias)}/promote", body)
    if dry_run:
        _show_dry_run(context, answer)
        return
    _show_move(context, answer)


def _unless_the_gate_forbids(context: typer.Context, path: str, body: dict[str, Any]) -> dict[str, Any]:
    """The answer. A gate that has not passed ends the program with its own exit code."""
    try:
        return native.post(context, path, body)
    except official.APIStatusError as error:
        document = error.body if isinstance(error.body, dict) else {}
        code = EXIT_GATE.get(str(document.get("code")))
        if code is None:
            raise
        if context.obj.as_json:
            print(json_line({"error": document}))
        typer.echo(printable(str(document.get("message"))), err=True)
        raise typer.Exit(code) from None


def _show_dry_run(context: typer.Context, answer: dict[str, Any]) -> None:
    gate = answer["gate"]
    if gate is None:
        raise requests.BadSetting("--dry-run needs --gate, with --evaluation or --report.")
    show(context, answer, gating.text_of(gate))
    raise typer.Exit(gating.EXIT_CODES[gate["status"]])


def rollback(
    context: typer.Context,
    alias: AliasName,
    to: Annotated[int | None, typer.Option(min=1, help="A version; else what it named before.")] = None,
    expected_version: Expected = None,
    reason: Reason = None,
) -> None:
    """Have an alias name again what it named before. Again goes back one more."""
    body = requests.given(to_version=to, expected_version=expected_version, reason=reason)
    _show_move(context, native.post(context, f"aliases/{_part(alias)}/rollback", body))


def waiting_words(promotion: dict[str, Any]) -> str:
    """What a promotion still needs."""
    until = f"{datetime.fromtimestamp(promotion['expires_at'], tz=UTC):%Y-%m-%d %H:%M:%SZ}"
    given = f"{len(promotion['approved_by'])} of {promotion['approvals']} approvals"
    return (
        f"{promotion['alias']} has not moved: {promotion['id']} has {given} and waits until {until}. Another key "
        f"gives one: tunepool aliases approve {promotion['id']}"
    )


def _show_move(context: typer.Context, answer: dict[str, Any]) -> None:
    if answer.get("promotion"):
        show(context, answer, waiting_words(answer["promotion"]))
        raise typer.Exit(EXIT_WAITS)
    alias = answer["alias"]
    since = f"{datetime.fromtimestamp(alias['moved_at'], tz=UTC):%Y-%m-%d %H:%M:%SZ}"
    words = "names" if answer["moved"] else f"already names, since {since},"
    show(context, answer, f"{alias['id']} {words} {alias['model']} (version {alias['version']})")


def compare(
    context: typer.Context,
    alias: AliasName,
    first: Annotated[int, typer.Argument(min=1, help="A version's number.")],
    second: Annotated[int, typer.Argument(min=1)],
) -> None:
    """Print every field in which two versions differ: data, settled spec, figures of the gates."""
    comparison = native.get(context, f"aliases/{_part(alias)}/compare", first=first, second=second)
    if context.obj.as_json:
        print(json_line(comparison))
        return
    rows = [
        {"field": entry["field"], str(first): json.dumps(entry["first"]), f"{second} ": json.dumps(entry["second"])}
        for entry in comparison["differences"]
    ]
    show_rows(context, rows, ("field", str(first), f"{second} "))


def _part(alias: str) -> str:
    return native.part(alias)
