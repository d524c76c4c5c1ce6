"""What a look at an installation has found: one line for each part, and what to do about it."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict, dataclass
from typing import Any, Literal

Grade = Literal["ok", "warning", "fault"]


@dataclass(frozen=True, slots=True)
class Finding:
    """One part of an installation. `remedy` says what to do, and is empty where nothing is to be done."""

    part: str
    grade: Grade
    words: str
    remedy: str = ""


def ok(part: str, words: str) -> Finding:
    return Finding(part, "ok", words)


def warning(part: str, words: str, remedy: str = "") -> Finding:
    return Finding(part, "warning", words, remedy)


def fault(part: str, words: str, remedy: str) -> Finding:
    return Finding(part, "fault", words, remedy)


def lines(findings: Iterable[Finding]) -> list[str]:
    """For people: grade, part, words; the remedy on a line of its own."""
    shown = []
    for finding in findings:
        shown.append(f"{finding.grade:<8} {finding.part:<10} {finding.words}")
        if finding.remedy:
            shown.append(f"{'':<19} → {finding.remedy}")
    return shown


def document(findings: Iterable[Finding]) -> dict[str, Any]:
    """For programs."""
    listed = [asdict(finding) for finding in findings]
    return {"ok": all(finding["grade"] != "fault" for finding in listed), "findings": listed}
