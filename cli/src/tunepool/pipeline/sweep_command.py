"""`tunepool sweep` and `tunepool sweeps`: a job in many settings, from its file to its exit code."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Annotated, Any, Final, Literal

import typer
from rich.console import Console

from tunepool import native, watching
from tunepool.pipeline import command, reports, sweep_document, sweep_shown
from tunepool.pipeline.ci_environment import CiEnvironment, surroundings
from tunepool.pipeline.service import Service
from tunepool.pipeline.sweep_runner import SweepOutcome, SweepRunner
from tunepool.printing import json_line, printable, show, show_rows

sweeps_cli = typer.Typer(no_args_is_help=True, help="Sweeps: one job in many settings.")
LISTED: Final = ("id", "status", "name", "strategy", "measure", "trial_counts", "best")


def sweep(  # noqa: PLR0917 -- typer makes options of them
    context: typer.Context,
    file: Annotated[Path, typer.Argument(dir_okay=False, metavar="SWEEP.YAML")],
    wait: Annotated[bool, typer.Option(help="Watch it to its end, then evaluate, gate and promote the best.")] = False,
    timeout: Annotated[
        float | None, typer.Option(min=1, help="Seconds for all steps; then exit 5. The work goes on.")
    ] = None,
    on_interrupt: Annotated[
        Literal["leave", "cancel"], typer.Option(help="What becomes of the sweep or evaluation on SIGINT or SIGTERM.")
    ] = "leave",
    junit: Annotated[Path | None, typer.Option(dir_okay=False, help="Write JUnit XML here.")] = None,
    summary: Annotated[Path | None, typer.Option(dir_okay=False, help="Add a Markdown summary here.")] = None,
    picture: Annotated[Path | None, typer.Option(dir_okay=False, help="Write the curves as SVG here.")] = None,
    print_schema: Annotated[bool, typer.Option("--schema", help="Print the JSON schema of sweep.yaml.")] = False,
) -> None:
    """Try a job in many settings. The same content is tried once; started again, it goes on.

    With --wait the exit codes of `tunepool run`: 0 passed or promoted, 1 gate failed, 2 bad input, 3 no trial
    succeeded, 4 cancelled or overtaken, 5 timeout, 6 service unavailable, 7 undecided; 130 and 143 after a signal.
    """
    if print_schema:
        print(json.dumps(sweep_document.schema(), indent=2, ensure_ascii=False))
        return
    where = surroundings(file.parent)
    result = SweepOutcome(file.stem, git_sha=where.git_sha)
    with command.recorded(result) as exit_of_shell:
        runner = _runner(context, file, where, result, timeout=timeout)
        runner.cancel_on_interrupt = on_interrupt == "cancel"
        with watching.interruptible_work(left=command.BETWEEN_STEPS):
            if not wait:
                made = runner.asked()
                show(context, made, made["id"])
                return
            runner.run()
    _write(result, where, junit=junit, summary=summary, picture=picture)
    if result.sweep is not None and not context.obj.as_json:
        show_rows(context, sweep_shown.rows(result.sweep), sweep_shown.COLUMNS)
    command.tell(context, result, where)
    raise typer.Exit(exit_of_shell())


def _runner(
    context: typer.Context, path: Path, where: CiEnvironment, result: SweepOutcome, *, timeout: float | None
) -> SweepRunner:
    """Everything that can be read is read before a server is asked. Raises BadSetting, NoServerKnown."""
    asked = sweep_document.read_sweep(path)
    result.pipeline = asked.name
    lines = watching.EventLines(Console(stderr=True))

    def keep(seen: dict[str, Any]) -> None:
        result.sweep = seen

    return SweepRunner(
        service=Service(context.obj.credentials),
        pipeline=asked,
        folder=path.parent,
        where=where,
        gate_text=command.gate_of(path, asked),
        outcome=result,
        tell=lines.tell,
        show=lines.show,
        deadline=None if timeout is None else time.monotonic() + timeout,
        seen=keep,
    )


def _write(
    result: SweepOutcome, where: CiEnvironment, *, junit: Path | None, summary: Path | None, picture: Path | None
) -> None:
    reports.write_files(result, junit_file=junit, summary_file=summary, quality=None)
    if result.sweep is None:
        return
    for place in (summary, where.step_summary):
        if place is not None:
            with place.open("a", encoding="utf-8") as file:
                file.write(f"\n{sweep_shown.markdown(result.sweep)}")
    if picture is not None:
        picture.write_bytes(sweep_shown.picture(result.sweep))


@sweeps_cli.command("list")
def list_sweeps(context: typer.Context, limit: Annotated[int, typer.Option(min=1, max=100)] = 20) -> None:
    """List the project's sweeps, newest first."""
    show_rows(context, native.get(context, "sweeps", limit=limit)["data"], LISTED)


@sweeps_cli.command("show")
def show_sweep(
    context: typer.Context,
    sweep_id: str,
    picture: Annotated[Path | None, typer.Option(dir_okay=False, help="Write the curves as SVG here.")] = None,
) -> None:
    """Show a sweep: each trial with its settings, state, value, looks and cost. The best is marked with *."""
    _show(context, native.get(context, f"sweeps/{native.part(sweep_id)}"), picture)


def _show(context: typer.Context, seen: dict[str, Any], picture: Path | None = None) -> None:
    if picture is not None:
        picture.write_bytes(sweep_shown.picture(seen))
    if context.obj.as_json:
        print(json_line(seen))
        return
    print(printable(sweep_shown.head(seen)))
    for why in (seen["closed"], seen["detail"], (seen["error"] or {}).get("message")):
        if why:
            print(printable(why))
    show_rows(context, sweep_shown.rows(seen), (*sweep_shown.COLUMNS, "why"))


@sweeps_cli.command("cancel")
def cancel_sweep(context: typer.Context, sweep_id: str) -> None:
    """Cancel a sweep with its jobs."""
    _show(context, native.post(context, f"sweeps/{native.part(sweep_id)}/cancel"))


@sweeps_cli.command("pause")
def pause_sweep(context: typer.Context, sweep_id: str) -> None:
    """Start and compare nothing more until it is resumed; what runs goes on."""
    _show(context, native.post(context, f"sweeps/{native.part(sweep_id)}/pause"))


@sweeps_cli.command("resume")
def resume_sweep(context: typer.Context, sweep_id: str) -> None:
    """Let a paused sweep go on."""
    _show(context, native.post(context, f"sweeps/{native.part(sweep_id)}/resume"))
