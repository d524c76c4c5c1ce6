"""`tunepool run`: a pipeline from its file to its exit code."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any, Final, Literal

import typer
from rich.console import Console

from tunepool import gating, official, preflights, watching
from tunepool.connection import NoServerKnown
from tunepool.pipeline import document, outcome, reports
from tunepool.pipeline.ci_environment import CiEnvironment, surroundings
from tunepool.pipeline.outcome import RunOutcome
from tunepool.pipeline.runner import RunEnded, Runner
from tunepool.pipeline.service import Service
from tunepool.printing import json_line, printable
from tunepool.requests import BadSetting

SIGNALLED: Final = 128  # and the signal's number
BETWEEN_STEPS: Final = "Stopped between two steps; started again, it goes on from there."


def run(  # noqa: PLR0917 -- typer makes options of them
    context: typer.Context,
    pipeline: Annotated[Path, typer.Argument(dir_okay=False, metavar="PIPELINE.YAML")],
    timeout: Annotated[
        float | None, typer.Option(min=1, help="Seconds for all steps; then exit 5. The work goes on.")
    ] = None,
    on_interrupt: Annotated[
        Literal["leave", "cancel"], typer.Option(help="What becomes of the job or evaluation on SIGINT or SIGTERM.")
    ] = "leave",
    junit: Annotated[Path | None, typer.Option(dir_okay=False, help="Write JUnit XML here.")] = None,
    summary: Annotated[Path | None, typer.Option(dir_okay=False, help="Add a Markdown summary here.")] = None,
    code_quality: Annotated[
        Path | None, typer.Option(dir_okay=False, help="Write GitLab's code-quality JSON here: faults of the data.")
    ] = None,
    print_schema: Annotated[bool, typer.Option("--schema", help="Print the JSON schema of pipeline.yaml.")] = False,
) -> None:
    """Preflight, submit, evaluate, gate, promote. Started again, it goes on; the same content trains once.

    Exit 0 passed or promoted, 1 gate failed, 2 bad input, 3 job failed, 4 cancelled, superseded or overtaken,
    5 timeout, 6 service unavailable, 7 undecided; 130 and 143 after a signal.
    """
    if print_schema:
        print(json.dumps(document.schema(), indent=2, ensure_ascii=False))
        return
    where = surroundings(pipeline.parent)
    result = RunOutcome(pipeline.stem, git_sha=where.git_sha)
    with recorded(result) as exit_of_shell:
        runner = _runner(context, pipeline, where, result, timeout=timeout)
        runner.cancel_on_interrupt = on_interrupt == "cancel"
        with watching.interruptible_work(left=BETWEEN_STEPS):
            runner.run()
    reports.write_files(result, junit_file=junit, summary_file=summary, quality=code_quality)
    tell(context, result, where)
    raise typer.Exit(exit_of_shell())


@contextmanager
def recorded(result: RunOutcome) -> Iterator[Callable[[], int]]:
    """Whatever ends the run within becomes the exit code and the message of `result`.

    Yields what says the exit code for the shell afterwards: after a signal it is a shell's own, "cancelled" in files.
    """
    by_signal = 0
    try:
        yield lambda: by_signal or result.exit_code
    except _ends() as error:
        result.exit_code, result.message = _ending(error)
        if isinstance(error, watching.WatchInterrupted):
            by_signal = SIGNALLED + error.signal


def _ends() -> tuple[type[BaseException], ...]:
    """What ends a run with an exit code of its own. Looked up while an error passes, not before."""
    return (
        *(RunEnded, BadSetting, NoServerKnown, preflights.TookTooLong, watching.NotInTime, watching.WatchInterrupted),
        *(official.APIConnectionError, official.APIStatusError, OSError),
    )


def _runner(
    context: typer.Context, path: Path, where: CiEnvironment, result: RunOutcome, *, timeout: float | None
) -> Runner:
    """Everything that can be read is read before a server is asked. Raises BadSetting, NoServerKnown."""
    asked = document.read_pipeline(path)
    result.pipeline = asked.name
    lines = watching.EventLines(Console(stderr=True))
    return Runner(
        service=Service(context.obj.credentials),
        pipeline=asked,
        folder=path.parent,
        where=where,
        gate_text=gate_of(path, asked),
        outcome=result,
        tell=lines.tell,
        show=lines.show,
        deadline=None if timeout is None else time.monotonic() + timeout,
    )


def gate_of(path: Path, asked: document.Pipeline) -> str | None:
    """The text of the gate that a pipeline names, read and understood; None where it names none. Raises BadSetting."""
    if asked.gate is None:
        return None
    gate = path.parent / asked.gate
    if not gate.is_file():
        raise BadSetting(f"{path}: gate: there is no file '{gate}'.")
    gating.gate_of(gate)
    return gate.read_text(encoding="utf-8")


def _ending(error: BaseException) -> tuple[int, str]:
    """The exit code and the sentence of what ended a run."""
    match error:
        case RunEnded():
            return error.exit_code, error.message
        case watching.WatchInterrupted():
            return outcome.ENDED_EARLY, str(error)
        case watching.NotInTime() | preflights.TookTooLong():
            return outcome.TIMEOUT, str(error)
        case official.InternalServerError() | official.APIConnectionError():
            return outcome.UNAVAILABLE, f"The service is not available: {error}"
        case official.APIStatusError():
            body: Any = error.body if isinstance(error.body, dict) else {}
            return (
                outcome.BAD_INPUT,
                f"{body.get('message') or error.message} ({body.get('code') or error.status_code})",
            )
    if isinstance(error, OSError) and error.filename:
        error = BadSetting(f"{error.filename}: {error.strerror}.")
    return outcome.BAD_INPUT, str(error)


def tell(context: typer.Context, result: RunOutcome, where: CiEnvironment) -> None:
    if where.github:
        for line in outcome.workflow_commands(result):
            print(line)
    if where.step_summary is not None:
        reports.add(where.step_summary, reports.summary(result))
    if where.outputs is not None:
        reports.add(where.outputs, reports.outputs(result))
    if context.obj.as_json:
        print(json_line(result.document()))
        return
    for fault in result.data_faults:
        print(printable(f"{fault.path}:{fault.line}{f':{fault.column}' if fault.column else ''}: {fault.message}"))
    if result.gate is not None:
        print(printable(gating.text_of(result.gate)))
    print(printable(f"{outcome.STATUSES[result.exit_code]}: {result.message}"))
