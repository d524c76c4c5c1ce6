"""`tunepool evaluate`: asks for an evaluation, waits for it, and shows its figures with their intervals."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Final, Literal
from urllib.parse import quote

import typer
from rich.console import Console
from rich.table import Table

from tunepool import watching
from tunepool.printing import json_line, plain, printable
from tunepool.requests import BadSetting, file_id, given

if TYPE_CHECKING:
    from openai import OpenAI

PATH: Final = "/tunepool/evaluations"
UNFINISHED: Final = ("queued", "running")
POLL_SECONDS: Final = 1.0
WIDTH: Final = 10_000
EXIT_NO_REPORT: Final = 1

# What is told stands beside stdout, which holds only what was asked for.
messages = Console(stderr=True)


class EvaluationNotInTime(Exception):
    """It has not ended in the time that was given."""


def items_of(client: OpenAI, source: str, *, share: float | None) -> dict[str, Any]:
    """The items that a word means: a suite's name, a job (its training file's rows), a file, or the id of one."""
    if source == "general" and not Path(source).exists():
        return {"type": "suite", "suite": source}
    if source.startswith("ftjob-") and not Path(source).exists():
        return {"type": "split", "job": source, **given(share=share)}
    if share is not None:
        raise BadSetting("--share goes with a job's id: it takes that share of the rows of its training file.")
    return {"type": "file", "file_id": file_id(client, source)}


def measures_of(words: Iterable[str]) -> list[dict[str, Any]]:
    """`exact_match`, `right=exact_match`, or a JSON object as the route takes it. Raises BadSetting."""
    return [_measure(word) for word in words]


def _measure(word: str) -> dict[str, Any]:
    if word.startswith("{"):
        try:
            measure = json.loads(word)
        except ValueError:
            raise BadSetting(f"'{word}' is no JSON.") from None
        assert isinstance(measure, dict)
        return {"name": measure.get("type"), **measure}
    name, equals, kind = word.partition("=")
    return {"type": kind if equals else name, "name": name}


def ask(client: OpenAI, body: dict[str, Any]) -> dict[str, Any]:
    """Create an evaluation; returns the server's record of it."""
    return _record(client.post(PATH, cast_to=object, body=body))


def cancel(client: OpenAI, evaluation_id: str) -> dict[str, Any]:
    return _record(client.post(f"{PATH}/{quote(evaluation_id)}/cancel", cast_to=object))


def follow(
    client: OpenAI,
    evaluation_id: str,
    *,
    timeout_seconds: float | None,
    tell: Callable[[str], None],
    sleep: Callable[[float], None] = time.sleep,
    clock: Callable[[], float] = time.monotonic,
) -> dict[str, Any]:
    """The record once it has ended; each change of place is printed. Raises EvaluationNotInTime."""
    began, before = clock(), ""
    while True:
        record = _record(client.get(f"{PATH}/{quote(evaluation_id)}", cast_to=object))
        now = _standing(record)
        if now != before:
            tell(now)
        if record["status"] not in UNFINISHED:
            return record
        if timeout_seconds is not None and clock() - began > timeout_seconds:
            raise EvaluationNotInTime(
                f"Evaluation {evaluation_id} is {record['status']} after {timeout_seconds:g} s; it goes on."
            )
        before = now
        sleep(POLL_SECONDS)


def _standing(record: dict[str, Any]) -> str:
    if record["status"] == "queued":
        return f"queued: {record['detail'] or '-'}"
    if record["status"] == "running" and record["items"]:
        return f"running: {record['answered']} of {record['items'] * len(record['request']['subjects'])} answers"
    return str(record["status"])


def _record(answer: object) -> dict[str, Any]:
    assert isinstance(answer, dict)
    return answer


# --- the command -----------------------------------------------------------------------------------------------------


def evaluate(  # noqa: PLR0917 -- typer makes options of them
    context: typer.Context,
    items: Annotated[str, typer.Argument(help="A data file, the id of one, a job's id, or the suite general.")],
    subjects: Annotated[list[str], typer.Option("--subject", help="A base or tuned model; may be repeated.")],
    against: Annotated[str | None, typer.Option(help="The subject that the others are compared with.")] = None,
    measures: Annotated[
        list[str] | None, typer.Option("--measure", help="exact_match, NAME=TYPE or a JSON object; may be repeated.")
    ] = None,
    slices: Annotated[list[str] | None, typer.Option("--slice", help="Key of the rows; may be repeated.")] = None,
    share: Annotated[float | None, typer.Option(help="Of a job's training rows.")] = None,
    forgetting: Annotated[bool, typer.Option(help="Ask the general suite too.")] = False,
    max_tokens: Annotated[int | None, typer.Option(min=1)] = None,
    name: Annotated[str | None, typer.Option()] = None,
    wait: Annotated[bool, typer.Option(help="Wait for the report; exit 1 when there is none.")] = False,
    timeout: Annotated[
        float | None, typer.Option(min=1, help="Seconds to wait; then exit 5. The evaluation goes on.")
    ] = None,
    on_interrupt: Annotated[
        Literal["leave", "cancel"], typer.Option(help="What becomes of the evaluation on SIGINT or SIGTERM.")
    ] = "leave",
) -> None:
    """Measure models on the same items and print the evaluation's id; with --wait its figures with intervals."""
    client: OpenAI = context.obj.client
    asked = given(
        subjects=subjects,
        items=items_of(client, items, share=share),
        measures=measures_of(measures) if measures else None,
        against=against,
        slices=slices or None,
        generation={"max_tokens": max_tokens} if max_tokens else None,
        forgetting=forgetting or None,
        name=name,
    )
    record = ask(client, asked)
    if wait:
        record = _awaited(client, record["id"], timeout=timeout, cancels=on_interrupt == "cancel")
    if context.obj.as_json or not wait or record["status"] != "succeeded":
        print(json_line(record) if context.obj.as_json else record["id"])
    else:
        show(record, wide=not sys.stdout.isatty())
    if wait and record["status"] != "succeeded":
        _tell((record["error"] or {}).get("message") or record["status"])
        raise typer.Exit(EXIT_NO_REPORT)


def _awaited(client: OpenAI, evaluation_id: str, *, timeout: float | None, cancels: bool) -> dict[str, Any]:
    """`follow`; a signal says what becomes of the evaluation. Raises EvaluationNotInTime, WatchInterrupted."""
    with watching.interruptible_work(
        cancel=(lambda: cancel(client, evaluation_id)) if cancels else None,
        cancelled=f"Evaluation {evaluation_id} is cancelled.",
        left=f"Evaluation {evaluation_id} goes on; its answers are kept.",
    ):
        return follow(client, evaluation_id, timeout_seconds=timeout, tell=_tell)


def _tell(text: str) -> None:
    messages.print(printable(text), markup=False, highlight=False, soft_wrap=True)


# --- the report -------------------------------------------------------------------------------------------------------


def show(record: dict[str, Any], *, wide: bool) -> None:
    """Figures of each subject, differences, the forgetting set and slices as tables."""
    report = record["report"]
    console = Console(width=WIDTH, soft_wrap=True) if wide else Console()
    console.print(plain(f"{record['id']}: {report['items']} items, {report['failures']} without an answer"))
    console.print(_figures(report["subjects"]))
    if report["differences"]:
        console.print(_differences(report["differences"]))
    if report["forgetting"]:
        console.print(plain("the forgetting set"))
        console.print(_figures(report["forgetting"]["subjects"]))
        if report["forgetting"]["differences"]:
            console.print(_differences(report["forgetting"]["differences"]))
    for part in report["slices"]:
        console.print(
            plain(f"{part['key']} = {'-' if part['value'] is None else part['value']}: {part['items']} items")
        )
        console.print(_figures(part["subjects"]))


def _figures(subjects: dict[str, Any]) -> Table:
    table = _table("subject", "measure", "n", "mean", "95 %")
    for name, subject in subjects.items():
        for measure, figure in subject["measures"].items():
            table.add_row(*map(plain, (name, measure, *_cells(figure))))
    return table


def _differences(differences: list[dict[str, Any]]) -> Table:
    table = _table("subject", "less", "measure", "n", "mean", "95 %")
    for row in differences:
        table.add_row(*map(plain, (row["subject"], row["against"], row["measure"], *_cells(row))))
    return table


def _cells(figure: dict[str, Any]) -> Iterator[str]:
    yield str(figure["n"])
    yield _number(figure["mean"])
    yield "-" if figure["low"] is None else f"{_number(figure['low'])} to {_number(figure['high'])}"


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.4g}"


def _table(*columns: str) -> Table:
    table = Table(box=None, pad_edge=False)
    for column in columns:
        table.add_column(column, no_wrap=True, overflow="ignore")
    return table
