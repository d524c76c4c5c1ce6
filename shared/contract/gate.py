"""A gate: assertions over the measures of an evaluation, judged passed, failed or undecided. Pure.

The command line carries this very module (a link in `cli/src/tunepool`), so that `tunepool gate check` and the server
give one answer. That is why it imports its neighbour by a relative name, and the standard library only.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final, Literal

from .formula import BadFormula, Formula, NoNumber

Status = Literal["passed", "failed", "undecided"]

# Two figures that differ by rounding alone are equal: 0.1 + 0.2 == 0.3 holds.
CLOSE: Final = 1e-9
KNOWN_SHOWN: Final = 40
_COMPARISON: Final = re.compile(r"(<=|>=|==|!=|<>|=>|=<|<|>|=)")
_OPERATORS: Final = (">=", "<=", ">", "<", "==")


class BadGate(ValueError):
    """A gate, or the report that it is held against, cannot be read. `line` and `column` count from 1, where known."""

    def __init__(self, message: str, *, line: int | None = None, column: int | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.line = line
        self.column = column


@dataclass(frozen=True, slots=True)
class Place:
    """Where something stands in the gate's file, counted from 1."""

    line: int
    column: int


@dataclass(frozen=True, slots=True)
class GateFigure:
    """One measure of one subject: its mean over `n` items, and its 95 % interval where there is one."""

    mean: float
    n: int | None = None
    low: float | None = None
    high: float | None = None


@dataclass(frozen=True, slots=True)
class Assertion:
    """`left operator right`, as it stands in a gate.

    Args:
        confidently: it must hold for the whole 95 % interval, not only for the mean.
        if_present: judged only where the report has this subject, for instance what an alias names before anything did.
        least_items: fewer items than that leave it undecided.
    """

    text: str
    left: Formula
    operator: str
    right: Formula
    place: Place
    title: str | None = None
    confidently: bool = False
    if_present: str | None = None
    least_items: int = 1

    @property
    def named(self) -> list[str]:
        return sorted(self.left.named | self.right.named)


@dataclass(frozen=True, slots=True)
class Gate:
    """A gate that has been read. `sha256`: of its file."""

    assertions: tuple[Assertion, ...]
    sha256: str


def read_assertion(text: str, place: Place, **options: Any) -> Assertion:
    """Raises BadGate for what is no comparison of two formulas over `subject.measure`."""
    parts = _COMPARISON.split(text)
    if len(parts) != 3 or parts[1] not in _OPERATORS:
        raise BadGate(
            f"'{text[:200]}' must compare two sides once, by one of {', '.join(_OPERATORS)}, for instance "
            "candidate.exact_match >= prod.exact_match - 0.01.",
            line=place.line,
            column=place.column,
        )
    try:
        left, right = (Formula(side, names=None) for side in (parts[0], parts[2]))
        assertion = Assertion(text.strip(), left, parts[1], right, place, **options)
        if assertion.confidently:
            _difference(assertion)
    except (BadFormula, NoNumber) as error:
        raise BadGate(f"In '{text[:200]}' a side {error}.", line=place.line, column=place.column) from None
    if not assertion.named or not all("." in name for name in assertion.named):
        raise BadGate(
            f"'{text[:200]}' must name measures as subject.measure, for instance candidate.exact_match.",
            line=place.line,
            column=place.column,
        )
    return assertion


def _difference(assertion: Assertion) -> dict[str, float]:
    """Left minus right as factors of names. Raises BadFormula, NoNumber."""
    terms = assertion.left.terms()
    for name, number in assertion.right.terms().items():
        terms[name] = terms.get(name, 0.0) - number
    return terms


# --- the report ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class GateReport:
    """What a gate needs of an evaluation's report: figures by `subject.measure`, paired differences by three names."""

    subjects: frozenset[str]
    figures: Mapping[str, GateFigure]
    differences: Mapping[tuple[str, str, str], GateFigure]


def read_report(
    document: Any,
    *,
    roles: Mapping[str, str] | None = None,
    facts: Mapping[str, Mapping[str, float]] | None = None,
) -> GateReport:
    """The report of an evaluation, as its JSON stands (`EvaluationReport`); a figure may be a bare number.

    Args:
        roles: role -> subject of the report: `{"candidate": "ft:…"}` lets a gate say `candidate.loss`. A subject
            keeps its own name besides.
        facts: role -> further figures without intervals, for instance `size_bytes`.

    Raises:
        BadGate: the document is no report, or a role names no subject of it.
    """
    if not isinstance(document, dict) or not isinstance(document.get("subjects"), dict) or not document["subjects"]:
        raise BadGate("The report has no subjects; it should be the report of an evaluation, as JSON.")
    names = _names_of(document["subjects"], roles or {})
    figures: dict[str, GateFigure] = {}
    differences: dict[tuple[str, str, str], GateFigure] = {}
    for part, prefix in ((document, ""), (document.get("forgetting"), "forgetting.")):
        if part is not None:
            _add_part(part, prefix, names, figures, differences)
    for role, numbers in (facts or {}).items():
        figures |= {f"{role}.{name}": GateFigure(float(number)) for name, number in numbers.items()}
    return GateReport(frozenset(name for known in names.values() for name in known), figures, differences)


def _names_of(subjects: dict[str, Any], roles: Mapping[str, str]) -> dict[str, list[str]]:
    """Under which names a gate may speak of each subject."""
    names = {subject: [subject] for subject in subjects}
    for role, subject in roles.items():
        if subject not in names:
            raise BadGate(
                f"The report has no subject '{subject[:200]}' to be '{role[:100]}'; it has: "
                f"{', '.join(sorted(subjects))[:1000]}."
            )
        if role != subject:
            names[subject].append(role)
    return names


def _add_part(
    part: Any,
    prefix: str,
    names: dict[str, list[str]],
    figures: dict[str, GateFigure],
    differences: dict[tuple[str, str, str], GateFigure],
) -> None:
    """Add the figures of one set of items under every name of their subjects."""
    subjects = part.get("subjects") if isinstance(part, dict) else None
    if not isinstance(subjects, dict):
        raise BadGate("The report's part 'forgetting' has no subjects.")
    for subject, entry in subjects.items():
        measures = entry.get("measures") if isinstance(entry, dict) else None
        if not isinstance(measures, dict):
            raise BadGate(f"The report's subject '{str(subject)[:100]}' has no measures.")
        for measure, value in measures.items():
            figure = _figure(value, f"{subject}.{prefix}{measure}")
            figures |= {f"{name}.{prefix}{measure}": figure for name in names.get(subject, [])}
    for (subject, against, measure), figure in _differences(part.get("differences", [])):
        for first in names.get(subject, []):
            for second in names.get(against, []):
                differences[first, second, f"{prefix}{measure}"] = figure


def _differences(entries: Any) -> list[tuple[tuple[str, str, str], GateFigure]]:
    if not isinstance(entries, list) or not all(isinstance(entry, dict) for entry in entries):
        raise BadGate("The report's differences are no list of objects.")
    try:
        names = [(str(entry["subject"]), str(entry["against"]), str(entry["measure"])) for entry in entries]
    except KeyError as error:
        raise BadGate(f"A difference of the report lacks {error}.") from None
    return [(name, _figure(entry, "-".join(name))) for name, entry in zip(names, entries, strict=True)]


def _figure(value: Any, name: str) -> GateFigure:
    document = value if isinstance(value, dict) else {"mean": value}
    mean = _number(document.get("mean"), name)
    n = document.get("n")
    return GateFigure(
        mean=math.nan if mean is None else mean,
        n=n if isinstance(n, int) and not isinstance(n, bool) else None,
        low=_number(document.get("low"), name),
        high=_number(document.get("high"), name),
    )


def _number(value: Any, name: str) -> float | None:
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise BadGate(f"The report's figure '{name[:200]}' is no number.")
    try:
        return float(value)
    except OverflowError:
        return math.inf


# --- judging ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class AssertionOutcome:
    """How one assertion ended, and why, in a sentence."""

    assertion: Assertion
    status: Status
    reason: str
    figures: Mapping[str, GateFigure]

    def document(self) -> dict[str, Any]:
        """As JSON; a figure that is not finite is null."""
        stated = self.assertion
        return {
            "assert": stated.text,
            "title": stated.title,
            "confidently": stated.confidently,
            "status": self.status,
            "reason": self.reason,
            "line": stated.place.line,
            "column": stated.place.column,
            "figures": {
                name: {
                    "n": figure.n,
                    "mean": _finite(figure.mean),
                    "low": _finite(figure.low),
                    "high": _finite(figure.high),
                }
                for name, figure in self.figures.items()
            },
        }


@dataclass(frozen=True, slots=True)
class GateResult:
    """Failed if one assertion failed, else undecided if one is, else passed."""

    status: Status
    outcomes: tuple[AssertionOutcome, ...]
    gate_sha256: str

    def document(self) -> dict[str, Any]:
        return {
            "object": "tunepool.gate_result",
            "status": self.status,
            "gate_sha256": self.gate_sha256,
            "assertions": [outcome.document() for outcome in self.outcomes],
        }


def judge(gate: Gate, report: GateReport) -> GateResult:
    """Hold each assertion against the report. Raises BadGate, at its place, for what the report does not have."""
    outcomes = tuple(_judged(assertion, report) for assertion in gate.assertions)
    statuses = {outcome.status for outcome in outcomes}
    status: Status = "failed" if "failed" in statuses else "undecided" if "undecided" in statuses else "passed"
    return GateResult(status, outcomes, gate.sha256)


def _judged(assertion: Assertion, report: GateReport) -> AssertionOutcome:
    if assertion.if_present is not None and assertion.if_present not in report.subjects:
        return AssertionOutcome(
            assertion, "passed", f"The report has no subject '{assertion.if_present}': not asked.", {}
        )
    figures = {name: _named_figure(name, assertion, report) for name in assertion.named}
    for name, figure in figures.items():
        if not math.isfinite(figure.mean):
            return AssertionOutcome(assertion, "undecided", f"{name} has no finite mean.", figures)
        if figure.n is not None and figure.n < assertion.least_items:
            reason = f"{name} rests on {figure.n} items; {assertion.least_items} are needed."
            return AssertionOutcome(assertion, "undecided", reason, figures)
    if assertion.confidently:
        return _judged_by_intervals(assertion, figures, report)
    return _judged_by_means(assertion, figures)


def _named_figure(name: str, assertion: Assertion, report: GateReport) -> GateFigure:
    figure = report.figures.get(name)
    if figure is not None:
        return figure
    subject = name.split(".", maxsplit=1)[0]
    if subject not in report.subjects:
        what, known = f"subject '{subject[:100]}'", sorted(report.subjects)
    else:
        what = f"measure '{name[:100]}'"
        known = sorted(known for known in report.figures if known.startswith(f"{subject}."))
    listed = ", ".join(known[:KNOWN_SHOWN]) + (" …" if len(known) > KNOWN_SHOWN else "")
    place = assertion.place
    raise BadGate(f"The report has no {what}; it has: {listed or 'none'}.", line=place.line, column=place.column)


def _judged_by_means(assertion: Assertion, figures: Mapping[str, GateFigure]) -> AssertionOutcome:
    means = {name: figure.mean for name, figure in figures.items()}
    try:
        left, right = assertion.left.of(means), assertion.right.of(means)
    except NoNumber as error:
        return AssertionOutcome(assertion, "undecided", f"A side has no value: {error}.", figures)
    holds = _holds(left, assertion.operator, right)
    reason = f"{_short(left)} {assertion.operator} {_short(right)} {'holds' if holds else 'does not hold'}."
    return AssertionOutcome(assertion, "passed" if holds else "failed", reason, figures)


def _holds(left: float, operator: str, right: float) -> bool:
    match operator:
        case ">=":
            return left >= right or _close(left, right)
        case "<=":
            return left <= right or _close(left, right)
        case ">":
            return left > right and not _close(left, right)
        case "<":
            return left < right and not _close(left, right)
    return _close(left, right)


def _close(left: float, right: float) -> bool:
    return math.isclose(left, right, rel_tol=CLOSE, abs_tol=CLOSE)


def _judged_by_intervals(
    assertion: Assertion, figures: Mapping[str, GateFigure], report: GateReport
) -> AssertionOutcome:
    """By the interval of left minus right, which must lie on one side of 0 as a whole."""
    low, high = 0.0, 0.0
    for factor, figure, name in _parts(_difference(assertion), figures, report):
        if figure.low is None or figure.high is None or not math.isfinite(figure.low + figure.high):
            return AssertionOutcome(assertion, "undecided", f"{name} has no interval.", figures)
        if figure.n is not None and figure.n < 2:
            return AssertionOutcome(
                assertion, "undecided", f"{name} rests on one item, which gives no interval.", figures
            )
        ends = (factor * figure.low, factor * figure.high)
        low, high = low + min(ends), high + max(ends)
    holds = {_holds(end, assertion.operator, 0.0) for end in (low, high)}
    if assertion.operator == "==" and low < 0.0 < high:
        holds = {True, False}
    status: Status = "undecided" if len(holds) > 1 else "passed" if holds == {True} else "failed"
    words = {"undecided": "on both sides of the line", "passed": "all of it holds", "failed": "none of it holds"}
    reason = f"Left minus right lies between {_short(low)} and {_short(high)} (95 %): {words[status]}."
    return AssertionOutcome(assertion, status, reason, figures)


def _parts(
    terms: dict[str, float], figures: Mapping[str, GateFigure], report: GateReport
) -> list[tuple[float, GateFigure, str]]:
    """(factor, figure, name) of each summand. Two subjects' difference on the same items takes its paired interval."""
    left = {name: factor for name, factor in terms.items() if name and factor}
    constant = terms.get("", 0.0)
    parts = [(1.0, GateFigure(constant, low=constant, high=constant), "the constant")]
    for (subject, against, measure), figure in report.differences.items():
        first, second = f"{subject}.{measure}", f"{against}.{measure}"
        if first in left and second in left and _close(left[first], -left[second]):
            parts.append((left[first], figure, f"{first} - {second}"))
            del left[first], left[second]
    return [*parts, *((factor, figures[name], name) for name, factor in left.items())]


def _finite(number: float | None) -> float | None:
    return number if number is not None and math.isfinite(number) else None


def _short(number: float) -> str:
    return f"{number:.6g}"
