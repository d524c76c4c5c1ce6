"""What a job would do, asked before it is submitted: the question, the wait, and the answer as tables."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from functools import partial
from typing import TYPE_CHECKING, Any, Final

from rich.console import Console, Group, RenderableType
from rich.table import Table
from rich.text import Text

from tunepool import watching
from tunepool.printing import plain, printable

if TYPE_CHECKING:
    from openai import OpenAI

PATH: Final = "/tunepool/preflights"
BAR: Final = 32


class TookTooLong(Exception):
    """No worker has answered in time; the message says where to look."""


def ask(client: OpenAI, body: dict[str, Any]) -> dict[str, Any]:
    """Create a preflight; returns the server's record of it."""
    made = client.post(PATH, body=body, cast_to=object)
    assert isinstance(made, dict)
    return made


def wait(
    client: OpenAI,
    preflight_id: str,
    *,
    patience_seconds: float,
    interval_seconds: float = 0.5,
    hear: Callable[[dict[str, Any]], None] = lambda preflight: None,
    sleep: Callable[[float], None] = time.sleep,
    clock: Callable[[], float] = time.monotonic,
) -> dict[str, Any]:
    """The answered preflight. `hear` is called with each record of it before that. Raises TookTooLong."""
    began = clock()
    while True:
        preflight = watching.in_the_end(partial(client.get, f"{PATH}/{preflight_id}", cast_to=object), sleep=sleep)
        assert isinstance(preflight, dict)
        if preflight["status"] in {"succeeded", "failed"}:
            return preflight
        hear(preflight)
        if clock() - began > patience_seconds:
            raise TookTooLong(
                f"Preflight {preflight_id} is {preflight['status']} after {patience_seconds:g} s; does a worker run?"
            )
        sleep(interval_seconds)


class PreflightNotes:
    """Says on stderr what is known before the answer: what a sample says, once, and each tenth of the way."""

    def __init__(self, console: Console | None = None) -> None:
        self._console = console or Console(stderr=True, highlight=False)
        self._sampled = False
        self._way: tuple[str, int] | None = None

    def __call__(self, preflight: dict[str, Any]) -> None:
        sample, progress = preflight.get("sample"), preflight.get("progress")  # an older server has neither
        if sample and not self._sampled:
            self._sampled = True
            for line in sampled(sample):
                self._console.print(line)
        if progress and (way := (progress["stage"], progress["percent"] // 10)) != self._way:
            self._way = way
            done = f"{progress['rows_read']:,} of {progress['rows_total']:,} rows, " * (way[0] == "reading")
            self._console.print(f"{way[0]}: {done}{progress['percent']} %")


def sampled(sample: dict[str, Any]) -> Iterator[Text]:
    """What some rows say, marked as that."""
    verdict = "the job would train" if sample["ok"] else "the job would not train as it is"
    yield Text(
        f"From {sample['rows']:,} of {sample['of_rows']:,} rows, the others are still being read: {verdict}.",
        "green" if sample["ok"] else "red",
    )
    if sample["fault"]:
        yield Text(f"{sample['refused']:,} of them are refused: {printable(sample['fault'])}", "red")
    run = sample["run"]
    yield Text(
        f"about {run['steps']:,} steps and {run['tokens']:,} tokens; a row has {sample['mean_tokens']:,.0f} tokens on"
        f" average; {sample['truncated']:,} are cut, {sample['left_out']:,} left out"
    )
    if time_ := sample["time"]:
        yield Text(f"about {_clock(time_['low'])} to {_clock(time_['high'])} on {plain(time_['device'])}")


def answer(
    client: OpenAI,
    body: dict[str, Any],
    *,
    patience_seconds: float,
    hear: Callable[[dict[str, Any]], None] = lambda preflight: None,
) -> dict[str, Any]:
    """`ask` and `wait`. A signal cancels the preflight: nobody would read its answer.

    Raises TookTooLong, WatchInterrupted.
    """
    preflight_id = ask(client, body)["id"]
    with watching.interruptible_work(
        cancel=lambda: client.delete(f"{PATH}/{preflight_id}", cast_to=object),
        cancelled=f"Preflight {preflight_id} is cancelled.",
        left=f"Preflight {preflight_id} goes on.",
    ):
        return wait(client, preflight_id, patience_seconds=patience_seconds, hear=hear)


def is_ok(preflight: dict[str, Any]) -> bool:
    """Whether a job with this body would begin to train."""
    return bool((preflight["report"] or {}).get("ok"))


def tables(preflight: dict[str, Any], *, diff: bool = False) -> RenderableType:
    """The answer for people: findings, figures, and the rows that were asked for (with `diff` as written, too)."""
    report = preflight["report"]
    if report is None:
        return Text(f"No answer: {preflight['error']['message']}", style="red")
    sections = (*_SECTIONS, _diffs if diff else _rows)
    return Group(*(part for section in sections for part in section(report)))


def _verdict(report: dict[str, Any]) -> Iterator[RenderableType]:
    if report["refusal"]:
        yield Text(f"The job would be refused: {report['refusal']['message']}", style="red")
    elif report["ok"]:
        yield Text("The job would train.", style="green")
    else:
        yield Text("The job would not train as it is.", style="red")
    for warning in report.get("warnings") or ():  # a server older than this command has none
        yield Text(warning, style="yellow")
    for verdict in report.get("servable") or ():
        if not verdict["servable"]:
            yield Text(f"{verdict['server']} cannot serve it. {verdict['reason']}", style="yellow")


def _files(report: dict[str, Any]) -> Iterator[RenderableType]:
    for name, file in report["files"].items():
        for warning in file["warnings"]:
            yield Text(f"{name} file, line {warning['line']}: {warning['message']} ({warning['rows']} rows)", "yellow")
    table = _table(
        "file", "rows", "tokens", "trained", "mean", "p95", "longest", "cut", "left out", "repeated", "refused"
    )
    for name in report["files"]:
        counts = (report["tokens"] or {}).get(name)
        if counts:
            table.add_row(
                name,
                *(f"{counts[figure]:,}" for figure in ("rows", "kept_tokens", "trained_tokens")),
                *(f"{counts[figure]:,.0f}" for figure in ("mean_tokens", "p95_tokens", "longest_tokens")),
                *(f"{counts[figure]['count']:,}" for figure in ("truncated", "empty", "duplicates")),
                f"{counts['fault_count']:,}",
            )
    if table.row_count:
        yield table


def _findings(report: dict[str, Any]) -> Iterator[RenderableType]:
    tokens = report["tokens"] or {}
    for name in ("training", "validation"):
        for fault in (tokens.get(name) or {}).get("faults", ()):
            yield Text(f"{name} row {fault['row']}: {fault['message']}", style="red")
        for lost in (tokens.get(name) or {}).get("unwritten", ()):
            rows = lost["rows"]
            yield Text(f"{name} row {rows['rows'][0]}: {lost['message']} ({rows['count']} rows)", style="yellow")
    leaked = tokens.get("leakage")
    if leaked and leaked["prompts"]["count"] + leaked["rows"]["count"]:
        rows, prompts = leaked["rows"], leaked["prompts"]
        yield Text(
            f"{rows['count']} validation rows are training rows too {rows['rows']}, {prompts['count']} share their"
            f" prompt with one {prompts['rows']}: the validation loss will look better than it is.",
            style="yellow",
        )
    bins = (tokens.get("training") or {}).get("histogram", ())
    most = max((part["rows"] for part in bins), default=1)
    for part in bins:
        yield Text(f"up to {part['up_to']:>7,} tokens {'█' * round(BAR * part['rows'] / most):{BAR}} {part['rows']:,}")


def _run(report: dict[str, Any]) -> Iterator[RenderableType]:
    if run := report["run"]:
        yield Text(f"{run['steps']:,} steps over {run['rows']:,} rows, {run['tokens']:,} tokens")
    if memory := report["memory"]:
        sizes = [memory[name] / 2**30 for name in ("predicted_bytes", "upper_bytes")]
        yield Text(f"memory {sizes[0]:.1f} GiB, at most {sizes[1]:.1f} GiB ({memory['sure']})")
    if time_ := report["time"]:
        span = f"{_clock(time_['low'])} to {_clock(time_['high'])}"
        yield Text(f"time {span} on {time_['device']} ({time_['basis']})")
    elif report["run"]:
        yield Text("time unknown: no job of this kind has finished yet")
    if report["devices"]:
        table = _table("device", "kind", "fits", "training", "why")
        for device in report["devices"]:
            time_ = device.get("time")  # an older server does not say
            span = f"{_clock(time_['low'])} to {_clock(time_['high'])}" if time_ else "–"
            fits = "yes" if device["fits"] else "no"
            table.add_row(plain(device["name"]), device["kind"], fits, span, plain(device["reason"] or ""))
        yield table


def _rows(report: dict[str, Any]) -> Iterator[RenderableType]:
    for row in (report["tokens"] or {}).get("preview", ()):
        yield from _faults(row)
        for sequence in row["sequences"]:
            yield _heading(row, sequence)
            yield _rendered(sequence)


def _diffs(report: dict[str, Any]) -> Iterator[RenderableType]:
    """Each row as it was written beside what is read; red: what the chat template leaves out of it."""
    for row in (report["tokens"] or {}).get("preview", ()):
        yield from _faults(row)
        table = Table("written", "rendered (trained: bold)", show_lines=True)
        written = Text("\n").join(_written(part) for part in row.get("written", ()))
        rendered = [line for sequence in row["sequences"] for line in (_heading(row, sequence), _rendered(sequence))]
        table.add_row(written, Text("\n").join(rendered))
        yield table


def _faults(row: dict[str, Any]) -> Iterator[Text]:
    if row["fault"]:
        yield Text(f"row {row['row']}: {printable(row['fault'])}", style="red")
    for text in row.get("unwritten", ()):
        yield Text(f"row {row['row']}: {printable(text)}", style="yellow")


def _heading(row: dict[str, Any], sequence: dict[str, Any]) -> Text:
    return Text(
        f"row {row['row']}, {sequence['name']}: {sequence['trained_token_count']} of {sequence['token_count']} trained"
    )


def _rendered(sequence: dict[str, Any]) -> Text:
    shown = (
        Text(printable(token["text"]), "bold green" if token["trained"] else "dim") for token in sequence["tokens"]
    )
    return Text.assemble(*shown)


def _written(part: dict[str, Any]) -> Text:
    where = "" if part["message"] is None else f"messages[{part['message']}] "
    gone = f"\nleft out: {printable(part['left_out'])}" if part["left_out"] else ""
    text = Text(printable(part["text"]), "red" if gone else "")
    return Text.assemble((f"{where}{printable(part['what'])}\n", "bold"), text, (gone, "red"))


def _abilities(report: dict[str, Any]) -> Iterator[RenderableType]:
    able = (report["tokens"] or {}).get("template")
    if able:
        lacks = [name.replace("_", " ") for name, has in able.items() if has is False]
        end = able["end_of_turn"] or " or ".join(able["stops"])
        yield Text(f"chat template: ends a turn with {printable(end)}; does not write: {', '.join(lacks) or 'nothing'}")


_SECTIONS: Final = (_verdict, _files, _findings, _run, _abilities)


def _table(*columns: str) -> Table:
    return Table(*columns, box=None, pad_edge=False)


def _clock(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes // 60}:{minutes % 60:02}:{rest:02}"


def show(preflight: dict[str, Any], *, wide: bool, diff: bool = False) -> None:
    """Print the answer; `wide`: into a file or pipe, so no line is broken."""
    Console(soft_wrap=wide, highlight=False).print(tables(preflight, diff=diff))
