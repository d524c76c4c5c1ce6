"""`tunepool login` and `tunepool oidc`: CI jobs without stored keys, and the rules that let them in."""

from __future__ import annotations

from datetime import UTC, datetime
from typing import Annotated, Any, Final

import typer

from tunepool import native
from tunepool.id_tokens import Login, audience_of
from tunepool.printing import show, show_rows
from tunepool.requests import BadSetting, given, pairs

oidc_cli = typer.Typer(no_args_is_help=True, help="Rules: whose ID tokens are exchanged for keys. Needs admin.")

ISSUERS: Final = {"github": "https://token.actions.githubusercontent.com", "gitlab": "https://gitlab.com"}
Audience = Annotated[str | None, typer.Option(help="Whom tokens are meant for; none: scheme and host of the server.")]


def login(
    context: typer.Context,
    oidc: Annotated[bool, typer.Option("--oidc", help="With the ID token of this CI job.")] = False,
    audience: Audience = None,
    rule: Annotated[str | None, typer.Option(help="Id of the rule, when several accept the token.")] = None,
) -> None:
    """Sign a CI job in: its later commands need no OPENAI_API_KEY. The key is kept in the home, and not shown."""
    base_url: str | None = context.obj.base_url
    if not oidc:
        raise BadSetting("Say --oidc: a CI job signs in with its ID token. Elsewhere set OPENAI_API_KEY.")
    if base_url is None:
        raise BadSetting("Set OPENAI_BASE_URL to the server, such as https://tunepool.example.com/v1.")
    signed_in = Login(context.obj.home, base_url, audience or audience_of(base_url), rule)
    signed_in.key()
    until = f"{datetime.fromtimestamp(signed_in.expires_at, tz=UTC):%Y-%m-%d %H:%M:%SZ}"
    answer = {"base_url": base_url, "audience": signed_in.audience, "expires_at": int(signed_in.expires_at)}
    show(context, answer, f"Signed in to {base_url} until {until}.")


@oidc_cli.command("list")
def list_rules(
    context: typer.Context, project: Annotated[str | None, typer.Option(help="Id of one project.")] = None
) -> None:
    """List rules, the oldest first."""
    columns = ("id", "project_id", "name", "issuer", "audience", "claims", "scopes", "life_minutes", "last_used_at")
    show_rows(context, native.get(context, "oidc/rules", project_id=project)["data"], columns)


@oidc_cli.command("create")
def create_rule(  # noqa: PLR0917 -- typer makes options of them
    context: typer.Context,
    name: str,
    issuer: Annotated[str, typer.Option(help="github, gitlab, or an issuer's URL.")],
    scope: Annotated[list[str], typer.Option(help="Repeat for several.")],
    repository: Annotated[str | None, typer.Option(metavar="OWNER/NAME", help="* and ** as in --claim.")] = None,
    ref: Annotated[str | None, typer.Option(help="refs/heads/main at GitHub, main at GitLab.")] = None,
    environment: Annotated[str | None, typer.Option()] = None,
    claim: Annotated[
        list[str] | None,
        typer.Option(metavar="NAME=PATTERN", help="* is any text without / and :, ** any at all; may be repeated."),
    ] = None,
    audience: Audience = None,
    life_minutes: Annotated[int, typer.Option(min=1, max=720)] = 60,
    project: Annotated[str | None, typer.Option(help="Id of a project; none: the key's own.")] = None,
) -> None:
    """Let CI jobs in by their ID tokens, and print the rule's id."""
    place = "project_path" if issuer == "gitlab" else "repository"
    claims = {**given(**{place: repository}, ref=ref, environment=environment), **pairs(claim or [])}
    wanted: dict[str, Any] = {
        "name": name,
        "issuer": ISSUERS.get(issuer, issuer),
        "audience": audience or audience_of(str(context.obj.client.base_url)),
        "claims": claims,
        "scopes": scope,
        "life_minutes": life_minutes,
        **given(project_id=project),
    }
    made = native.post(context, "oidc/rules", wanted)
    show(context, made, made["id"])


@oidc_cli.command("delete")
def delete_rule(context: typer.Context, rule_id: str) -> None:
    """End a rule, and every key that was given by it, at once."""
    gone = native.delete(context, f"oidc/rules/{native.part(rule_id)}")
    show(context, gone, f"{gone['id']} deleted")
