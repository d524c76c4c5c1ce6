"""`tunepool gate`: hold a report against a gate, on this machine; no server is asked."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any, Final

import typer

from tunepool import requests
from tunepool.gate import BadGate, Gate, judge, read_report
from tunepool.gate_file import MAX_BYTES, SCHEMA, read_gate
from tunepool.printing import json_line, printable

gate_cli = typer.Typer(no_args_is_help=True, help="Gates: what an evaluation must show before a model is promoted.")

EXIT_CODES: Final = {"passed": 0, "failed": 1, "undecided": 7}
MAX_REPORT_BYTES: Final = 64 * 1024 * 1024
_SIGNS: Final = {"passed": "✔", "failed": "✘", "undecided": "?"}

GateFile = Annotated[Path, typer.Argument(exists=True, dir_okay=False, metavar="GATE.YAML")]
Roles = Annotated[
    list[str] | None,
    typer.Option(
        "--as", metavar="ROLE=SUBJECT", help="What the gate calls a subject: candidate=ft:…; may be repeated."
    ),
]


@gate_cli.command("check")
def check_gate(
    context: typer.Context,
    gate: GateFile,
    report: Annotated[
        Path | None,
        typer.Option(
            exists=True, dir_okay=False, help="An evaluation, or its report, as JSON. Without: read the gate."
        ),
    ] = None,
    roles: Roles = None,
) -> None:
    """Judge a report. Exit 0 passed, 1 failed, 7 undecided, 2 when the gate or the report cannot be read."""
    stated = gate_of(gate)
    if report is None:
        print(f"{gate}: {len(stated.assertions)} assertions, sha256 {stated.sha256}")
        return
    try:
        result = judge(stated, read_report(report_document(report), roles=requests.pairs(roles or [])))
    except BadGate as error:
        raise requests.BadSetting(_placed(gate if error.line else report, error)) from None
    document = result.document()
    print(json_line(document) if context.obj.as_json else printable(text_of(document)))
    raise typer.Exit(EXIT_CODES[result.status])


@gate_cli.command("schema")
def print_schema() -> None:
    """Print the JSON schema of gate.yaml, for editors."""
    print(json.dumps(SCHEMA, indent=2, ensure_ascii=False))


def gate_of(path: Path) -> Gate:
    """Raises BadSetting with file, line and column."""
    with path.open("rb") as file:
        data = file.read(MAX_BYTES + 1)
    try:
        return read_gate(data)
    except BadGate as error:
        raise requests.BadSetting(_placed(path, error)) from None


def report_document(path: Path) -> Any:
    """The report in a file, which may hold a whole evaluation. Raises BadGate."""
    if path.stat().st_size > MAX_REPORT_BYTES:
        raise BadGate(f"The report has {path.stat().st_size:,} bytes; at most {MAX_REPORT_BYTES:,} are read.")
    try:
        document = json.loads(path.read_bytes())
    except (ValueError, RecursionError) as error:
        raise BadGate(f"The report is no JSON: {str(error)[:200]}.") from None
    if isinstance(document, dict) and isinstance(document.get("report"), dict):  # a whole evaluation
        return document["report"]
    return document


def report_of(path: Path) -> Any:
    """The same. Raises BadSetting with the file's name."""
    try:
        return report_document(path)
    except BadGate as error:
        raise requests.BadSetting(_placed(path, error)) from None


def _placed(path: Path, error: BadGate) -> str:
    place = "" if error.line is None else f":{error.line}:{error.column}"
    return f"{path}{place}: {error.message}"


def text_of(result: dict[str, Any]) -> str:
    """A gate's result for people: a line per assertion, and one for all."""
    lines = []
    for stated in result["assertions"]:
        lines.append(f"{_SIGNS[stated['status']]} {stated['title'] or stated['assert']}: {stated['reason']}")
        lines += [f"    {name} = {_figure(figure)}" for name, figure in stated["figures"].items()]
    return "\n".join([*lines, f"gate: {result['status']}"])


def _figure(figure: dict[str, Any]) -> str:
    if figure["mean"] is None:
        return "no finite value"
    interval = "" if figure["low"] is None else f" [{figure['low']:.6g}, {figure['high']:.6g}]"
    items = "" if figure["n"] is None else f", n {figure['n']}"
    return f"{figure['mean']:.6g}{interval}{items}"
