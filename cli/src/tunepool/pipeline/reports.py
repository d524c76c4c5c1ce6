"""What a run leaves on a runner: Markdown for people, outputs for later steps, and the files of other systems."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from tunepool.pipeline import curves
from tunepool.pipeline.outcome import STATUSES, RunOutcome, code_quality, junit
from tunepool.printing import markdown_code, markdown_text, printable


def summary(outcome: RunOutcome) -> str:
    """Markdown: verdict, steps, curves, figures, gate, and cost."""
    lines = [
        f"## {markdown_text(outcome.pipeline)}: {STATUSES[outcome.exit_code].replace('_', ' ')}",
        "",
        markdown_text(outcome.message),
        "",
    ]
    lines += ["| step | | |", "|---|---|---|"]
    lines += [f"| {step.name} | {step.status} | {markdown_text(step.words)} |" for step in outcome.steps]
    lines += _curves(outcome.curves)
    if outcome.subjects:
        lines += ["", "| subject | measure | mean | 95 % interval | n |", "|---|---|---|---|---|"]
        lines += [
            f"| {markdown_text(name)} | {markdown_text(measure)} {_figure(figure)}"
            for name, subject in outcome.subjects.items()
            for measure, figure in subject["measures"].items()
        ]
    if outcome.gate is not None:
        lines += _gate(outcome.gate)
    for fault in outcome.data_faults:
        lines.append(f"- {markdown_code(fault.path)}, line {fault.line}: {markdown_text(fault.message)}")
    if outcome.device_seconds is not None:
        lines += ["", f"Cost of the training: {outcome.device_seconds:.1f} device-seconds."]
    if outcome.job is not None and outcome.page is not None:
        lines += ["", f"[{markdown_text(outcome.job)}]({outcome.page})"]
    return "\n".join([*lines, ""])


def _curves(drawn: curves.Curves) -> list[str]:
    """A line of bars for each, between its first and its last value."""
    if not drawn:
        return []
    lines = ["", "| curve | first | | last |", "|---|---|---|---|"]
    for name, values in drawn.items():
        lines.append(f"| {name.replace('_', ' ')} | {values[0]:.4g} | {curves.bars(values)} | {values[-1]:.4g} |")
    return lines


def _gate(gate: dict[str, Any]) -> list[str]:
    lines = ["", "| assertion | | why |", "|---|---|---|"]
    lines += [
        f"| {markdown_code(stated['assert'])} | {stated['status']} | {markdown_text(stated['reason'])} |"
        for stated in gate["assertions"]
    ]
    figures = {name: figure for stated in gate["assertions"] for name, figure in stated["figures"].items()}
    lines += ["", "| figure | mean | 95 % interval | n |", "|---|---|---|---|"]
    return lines + [f"| {markdown_text(name)} {_figure(figure)}" for name, figure in figures.items()]


def _figure(figure: dict[str, Any]) -> str:
    """The cells of a mean, its interval and its items, to the end of the row."""
    items = "-" if figure.get("n") is None else figure["n"]
    interval = f"{_number(figure.get('low'))} to {_number(figure.get('high'))}"
    return f"| {_number(figure['mean'])} | {interval} | {items} |"


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.6g}"


def outputs(outcome: RunOutcome) -> str:
    """Lines of `$GITHUB_OUTPUT`: what later steps of the job read as `steps.ID.outputs.NAME`."""
    known = {
        "status": STATUSES[outcome.exit_code],
        "model": outcome.model,
        "job": outcome.job,
        "evaluation": outcome.evaluation,
        "alias": outcome.alias,
    }
    return "".join(f"{name}={_one_line(value)}\n" for name, value in known.items() if value)


def _one_line(text: str) -> str:
    """A second line would be another output."""
    return printable(text).replace("\r", " ").replace("\n", " ")


def write_files(
    outcome: RunOutcome, *, junit_file: Path | None, summary_file: Path | None, quality: Path | None
) -> None:
    if junit_file is not None:
        junit_file.write_bytes(junit(outcome))
    if summary_file is not None:
        add(summary_file, summary(outcome))
    if quality is not None:
        quality.write_text(code_quality(outcome), encoding="utf-8")


def add(file: Path, text: str) -> None:
    """GitHub's files may hold other steps' words."""
    with file.open("a", encoding="utf-8") as stream:
        stream.write(text)
