"""How a run of a pipeline ended: its steps, its verdict, and the files that CI systems read."""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict, dataclass, field
from typing import Any, Final
from xml.etree import ElementTree

from tunepool.pipeline.curves import Curves
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
    page: str | None = None  # of the job, for people
    curves: Curves = field(default_factory=dict)
    subjects: dict[str, Any] = field(default_factory=dict)  # of the evaluation, each with its measures

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
