"""How a run of a pipeline ended: its steps, its verdict, and the files that CI systems read."""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Final
from xml.etree import ElementTree

from tunepool.printing import printable

PASSED, GATE_FAILED, BAD_INPUT, JOB_FAILED, ENDED_EARLY, TIMEOUT, UNAVAILABLE, UNDECIDED, UNAPPROVED = range(9)
STATUSES: Final = (
    "passed",
    "gate_failed",
    "bad_input",
    "job_failed",
    "cancelled",
    "timeout",
    "unavailable",
    "undecided",
    "unapproved",
)


@dataclass
class Step:
    """`status`: passed, failed, or skipped, which needs no work now."""

    name: str
    status: str
    words: str
    seconds: float = 0.0


@dataclass
class DataFault:
    """What is wrong with a row; `line` counts from 1."""

    path: str
    line: int
    column: int | None
    message: str
    code: str


@dataclass
class RunOutcome:
    """All that a run has found out, in the order in which it did."""

    pipeline: str
    content: str = ""
    git_sha: str = ""
    job: str | None = None
    model: str | None = None
    evaluation: str | None = None
    alias: str | None = None
    exit_code: int = PASSED
    message: str = ""
    device_seconds: float | None = None
    gate: dict[str, Any] | None = None
    steps: list[Step] = field(default_factory=list)
    data_faults: list[DataFault] = field(default_factory=list)

    def document(self) -> dict[str, Any]:
        return {"object": "tunepool.run", "status": STATUSES[self.exit_code], **asdict(self)}


def junit(outcome: RunOutcome) -> bytes:
    """A test suite: a case for each step, and one for each assertion of the gate."""
    suite = ElementTree.Element("testsuite", name=f"tunepool.{outcome.pipeline}")
    for step in outcome.steps:
        case = ElementTree.SubElement(suite, "testcase", name=step.name, classname="steps", time=f"{step.seconds:.3f}")
        _mark(case, {"failed": "failure", "skipped": "skipped"}.get(step.status), step.words)
    for stated in (outcome.gate or {}).get("assertions", []):
        case = ElementTree.SubElement(suite, "testcase", name=stated["title"] or stated["assert"], classname="gate")
        _mark(case, {"failed": "failure", "undecided": "error"}.get(stated["status"]), stated["reason"])
    for tag, attribute in (("failure", "failures"), ("error", "errors"), ("skipped", "skipped")):
        suite.set(attribute, str(len(suite.findall(f"testcase/{tag}"))))
    suite.set("tests", str(len(suite)))
    written: bytes = ElementTree.tostring(suite, encoding="utf-8", xml_declaration=True)
    return written


def _mark(case: ElementTree.Element, tag: str | None, words: str) -> None:
    if tag is not None:  # XML has no control characters
        ElementTree.SubElement(case, tag, message=printable(words).replace("\n", " "))


def code_quality(outcome: RunOutcome) -> str:
    """GitLab's report of code quality: the faults of the data, each at its file and line."""
    return json.dumps(
        [
            {
                "description": fault.message,
                "check_name": f"tunepool.{fault.code}",
                "fingerprint": hashlib.sha256(f"{fault.path}:{fault.line}:{fault.code}".encode()).hexdigest(),
                "severity": "blocker",
                "location": {"path": fault.path, "lines": {"begin": fault.line}},
            }
            for fault in outcome.data_faults
        ],
        ensure_ascii=False,
    )


def workflow_commands(outcome: RunOutcome) -> list[str]:
    """GitHub's workflow commands: errors at file and line of the data."""
    return [
        f"::error file={_property(fault.path)},line={fault.line}"
        f"{'' if fault.column is None else f',col={fault.column}'}::{_escaped(fault.message)}"
        for fault in outcome.data_faults
    ]


def _escaped(text: str) -> str:
    """What would end the command, or begin another one, is written as GitHub reads it back."""
    return text.replace("%", "%25").replace("\r", "%0D").replace("\n", "%0A")


def _property(text: str) -> str:
    return _escaped(text).replace(":", "%3A").replace(",", "%2C")


def summary(outcome: RunOutcome) -> str:
    """Markdown: verdict, steps, gate with figures, and cost."""
    lines = [
        f"## {_cell(outcome.pipeline)}: {STATUSES[outcome.exit_code].replace('_', ' ')}",
        "",
        _cell(outcome.message),
        "",
    ]
    lines += ["| step | | |", "|---|---|---|"]
    lines += [f"| {step.name} | {step.status} | {_cell(step.words)} |" for step in outcome.steps]
    if outcome.gate is not None:
        lines += ["", "| assertion | | why |", "|---|---|---|"]
        lines += [
            f"| `{_cell(stated['assert'])}` | {stated['status']} | {_cell(stated['reason'])} |"
            for stated in outcome.gate["assertions"]
        ]
        lines += ["", "| figure | mean | 95 % interval | n |", "|---|---|---|---|", *_figures(outcome.gate)]
    for fault in outcome.data_faults:
        lines.append(f"- `{_cell(fault.path)}`, line {fault.line}: {_cell(fault.message)}")
    if outcome.device_seconds is not None:
        lines += ["", f"Cost of the training: {outcome.device_seconds:.1f} device-seconds."]
    return "\n".join([*lines, ""])


def _figures(gate: dict[str, Any]) -> list[str]:
    figures = {name: figure for stated in gate["assertions"] for name, figure in stated["figures"].items()}
    return [
        f"| {_cell(name)} | {_number(figure['mean'])} | {_number(figure['low'])} to {_number(figure['high'])} "
        f"| {'-' if figure['n'] is None else figure['n']} |"
        for name, figure in figures.items()
    ]


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.6g}"


def _cell(text: str) -> str:
    return printable(text).replace("\n", " ").replace("|", "\\|").replace("<", "&lt;")


def write_files(
    outcome: RunOutcome, *, junit_file: Path | None, summary_file: Path | None, quality: Path | None
) -> None:
    if junit_file is not None:
        junit_file.write_bytes(junit(outcome))
    if summary_file is not None:
        with summary_file.open("a", encoding="utf-8") as file:  # GitHub's file may hold other steps' words
            file.write(summary(outcome))
    if quality is not None:
        quality.write_text(code_quality(outcome), encoding="utf-8")
