"""The streaming check of an uploaded JSONL file: every problem by line and column, in bounded memory.

Memory holds one line (at most `Limits.line_bytes`), twenty problems, and at most 2 * 10^5 row digests.
"""

from __future__ import annotations

import dataclasses
import time
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from typing import Any, Final

from pydantic import TypeAdapter

from shared.contract.spec import Format
from shared.rows import formats, shapes, strict_json
from shared.rows.arguments import row_is_rounded, slip_of
from shared.rows.content import oddities
from shared.rows.conversation import ROUNDED
from shared.rows.findings import RowFinding, RowFindings, shown
from shared.rows.foreign import SAYS, recast
from shared.rows.lines import BOM, FileRefused, Line, RowProblem, Unit, at_start, decode, lines
from shared.rows.renaming import RENAMED, ColumnCounts, ColumnMismatch, in_file, renamed
from shared.rows.repeats import Repeats
from shared.rows.rules import check_row
from shared.rows.shapes import Shape

_MAX_PROBLEMS = 20


@dataclasses.dataclass(frozen=True)
class Limits:
    """What a file may weigh. 512 MB is OpenAI's limit for a training file (platform docs, `POST /v1/files`)."""

    file_bytes: int = 512 * 1024 * 1024
    line_bytes: int = 8 * 1024 * 1024
    min_rows: int = 1
    seconds: float = 300.0  # of this thread's processor: 512 MB of good rows take some 60
    problems: int = 10_000  # then reading stops; 20 are shown


@dataclasses.dataclass(frozen=True)
class DatasetWarning:
    """Something odd that does not stop a job: the first line that shows it, and how many rows do."""

    line: int
    code: str
    message: str
    rows: int


@dataclasses.dataclass(frozen=True)
class DatasetReport:
    """What the check saw. Characters feed token estimates: in English about four make a token."""

    format: Format | None
    shape: Shape | None
    rows: int
    bytes: int
    messages: int
    characters: int
    trained_characters: int
    longest_row: int
    longest_row_characters: int
    duplicate_rows: int
    dropped_columns: tuple[str, ...]
    problem_count: int
    problems: tuple[RowProblem, ...]
    warnings: tuple[DatasetWarning, ...]
    stopped_at: int | None = None  # the line after which so many problems were known that reading stopped
    made_of: Unit | None = None  # what the rows were made of, where they are no JSONL as uploaded
    left: tuple[str, ...] = ()  # columns of that which are not among the rows
    cells: bool = False  # the rows' values are cells of a CSV file

    @property
    def ok(self) -> bool:
        return self.problem_count == 0

    def document(self) -> dict[str, Any]:
        """As the file's row keeps it."""
        report = dataclasses.asdict(self)
        for key in ("dropped_columns", "problems", "warnings", "left"):
            report[key] = list(report[key])
        return report


_REPORT: Final = TypeAdapter(DatasetReport)


def read_report(stored: dict[str, Any]) -> DatasetReport:
    """The report that a file's row keeps; keys of a newer version are passed over."""
    return _REPORT.validate_python(stored)


DEFAULT_LIMITS = Limits()


def check(
    chunks: Iterable[bytes],
    *,
    limits: Limits = DEFAULT_LIMITS,
    made_of: Unit | None = None,
    left: Collection[str] = (),
    cells: bool = False,
    columns: Mapping[str, str] | None = None,
    clock: Callable[[], float] = time.thread_time,
) -> DatasetReport:
    """Check a JSONL file from its bytes, in one pass. Never raises for any content.

    Args:
        made_of: the rows were made of another file, whose lines, rows or items the line numbers count.
        left: columns of that file which are not among the rows.
        cells: the rows' values are cells of a CSV file.
        columns: `training.columns` of the job that reads the file (`shared.rows.renaming`).
        clock: seconds, for `limits.seconds`.
    """
    deadline = clock() + limits.seconds
    tally = _Tally(made_of=made_of, left=left, cells=cells, columns=columns)
    try:
        for line in lines(tally.counted(chunks, limits), limit=limits.line_bytes):
            _check_line(line, tally, limits)
            if tally.problem_count >= limits.problems:
                tally.stopped_at = line.number
                break
            if clock() > deadline:
                tally.refuse_first(_too_slow(line, limits))
                break
        else:
            _check_whole(tally, limits)
    except FileRefused as refused:
        tally.refuse(refused.problem)
    return tally.report()


def refused(problem: RowProblem) -> DatasetReport:
    """The report of a file that cannot be read at all."""
    tally = _Tally()
    tally.refuse(problem)
    return tally.report()


def _check_line(line: Line, tally: _Tally, limits: Limits) -> None:
    if not line.whole:
        tally.rows += 1
        tally.refuse(_too_long(line, limits))
        return
    if not line.data or line.data.isspace():
        tally.blank_lines += 1
        return
    tally.last_line = line.number
    tally.rows += 1
    text = ""
    try:
        text = decode(line)
        row = strict_json.parse(text, long_integers=True)
    except strict_json.BadJson as bad:
        tally.refuse(_bad_line(line, bad))
        return
    if not isinstance(row, dict):
        slip = slip_of(row)
        message = f"The line is {shown(row)}{f', {slip}' if slip else '; write one JSON object per line'}."
        tally.refuse(RowProblem(line=line.number, column=1, param="", code="not_an_object", message=message))
        return
    _check_object(line, text, row, tally)


def _too_slow(line: Line, limits: Limits) -> RowProblem:
    message = f"Reading the file up to here took more than {limits.seconds:g} seconds; split it, or simplify its rows."
    return RowProblem(line=line.number, column=None, param="file", code="too_slow", message=message)


def _check_object(line: Line, text: str, row: dict[str, Any], tally: _Tally) -> None:
    try:
        read = recast(tally.named(row, line))
        shape = shapes.detect(read.row)
    except ColumnMismatch as fault:
        tally.columns.refuse(line.number, fault)
        return
    except shapes.UnknownShape as unknown:
        problem = RowProblem(line=line.number, column=1, param="", code=unknown.code, message=str(unknown))
        if tally.made_of in {"row", "line"} and tally.rows == 1:  # a table: all its rows have the same columns
            raise FileRefused(problem) from None
        tally.refuse(problem)
        return
    if tally.shape is None:
        tally.shape, tally.shape_line = shape, line.number
    elif shape != tally.shape:
        message = f"The row is {shape}, but line {tally.shape_line} is {tally.shape}; keep one format per file."
        tally.refuse(RowProblem(line=line.number, column=1, param="", code="mixed_formats", message=message))
        return
    findings = check_row(read.row, shape)
    findings.dropped += [name for name in read.dropped if name not in findings.dropped]
    tally.add(line, findings)
    for form in read.forms:
        tally.warn(line.number, f"converted_{form}", SAYS[form])
    if row_is_rounded(text, row, read.forms):
        tally.warn(line.number, "rounded_decimal", ROUNDED)
    if findings.problems:
        faults = [_as_in_file(fault, read.names, tally.columns.columns) for fault in findings.problems]
        tally.refuse_all(line.number, text, faults)
    for code, message in oddities(line.data):
        tally.warn(line.number, code, message)


def _as_in_file(fault: RowFinding, names: Mapping[str, str], columns: Mapping[str, str]) -> RowFinding:
    """A fault under the name that its column has in the file."""
    name = in_file(names.get(fault.param, fault.param), columns)
    if name == fault.param:
        return fault
    return fault._replace(param=name, message=fault.message.replace(fault.param, name, 1))


_PRETTY: Final = "A row takes several lines (indented JSON); write each on one line (json.dumps), or all in one array."


def _too_long(line: Line, limits: Limits) -> RowProblem:
    if b"\r" in line.data and not line.ended:
        message = "Lines end with a lone carriage return (CR); save the file with LF or CRLF line endings."
        return RowProblem(
            line=line.number, column=line.data.index(b"\r") + 1, param="file", code="cr_line_endings", message=message
        )
    message = f"The line is longer than {limits.line_bytes:,} bytes; split the example, one per line."
    return RowProblem(line=line.number, column=None, param="", code="line_too_long", message=message)


def _bad_line(line: Line, bad: strict_json.BadJson) -> RowProblem:
    code, message = bad.code, bad.message
    if line.number == 1 and line.ended and line.data.strip() == b"{":
        raise FileRefused(at_start("invalid_json", _PRETTY))
    if code == "invalid_json" and not line.ended and "stops before its end" in message:
        code, message = "truncated_json", "The file ends in the middle of a row; upload it again, whole."
    return RowProblem(line=line.number, column=bad.column, param=bad.param, code=code, message=message)


def _check_whole(tally: _Tally, limits: Limits) -> None:
    for line, param, code, message in tally.columns.faults(tally.left):
        tally.refuse_first(RowProblem(line=line, column=1, param=param, code=code, message=message))
    if tally.rows == 0 and not tally.problem_count:
        what = "holds only blank lines" if tally.bytes else "is empty"
        tally.refuse(at_start("empty_file", f"The file {what}; write one JSON object per line."))
    elif tally.rows < limits.min_rows:
        message = f"The file has {tally.rows} rows; add examples, at least {limits.min_rows} are needed."
        tally.refuse(
            RowProblem(line=max(tally.last_line, 1), column=None, param="file", code="too_few_rows", message=message)
        )


class _Tally:
    """The running counts of one check."""

    def __init__(
        self,
        *,
        made_of: Unit | None = None,
        left: Collection[str] = (),
        cells: bool = False,
        columns: Mapping[str, str] | None = None,
    ) -> None:
        self.made_of, self.left, self.cells = made_of, left, cells
        self.columns = ColumnCounts(columns or {})
        self.shape: Shape | None = None
        self.shape_line = 0
        self.stopped_at: int | None = None
        self.head = b""
        self.rows = self.bytes = self.messages = self.characters = self.trained_characters = 0
        self.longest_row = self.longest_row_characters = self.blank_lines = self.last_line = 0
        self.problem_count = 0
        self.problems: list[RowProblem] = []
        self.warnings: dict[str, DatasetWarning] = {}
        self.dropped: Counter[str] = Counter()
        self.dropped_rows = self.dropped_line = 0
        self.duplicates = Repeats()

    def counted(self, chunks: Iterable[bytes], limits: Limits) -> Iterator[bytes]:
        for chunk in chunks:
            if len(self.head) < len(BOM):
                self.head = (self.head + chunk)[: len(BOM)]
            self.bytes += len(chunk)
            if self.bytes > limits.file_bytes:
                message = f"The file is larger than {limits.file_bytes:,} bytes; split it or remove rows."
                raise FileRefused(
                    RowProblem(
                        line=self.last_line + 1, column=None, param="file", code="file_too_large", message=message
                    )
                )
            yield chunk

    def named(self, row: dict[str, Any], line: Line) -> dict[str, Any]:
        """The row under our names. Raises Misnamed."""
        if not self.columns.columns:
            return row
        self.columns.meet(row)
        read = renamed(row, self.columns.columns, cells=self.cells)
        self.warn(line.number, RENAMED, self.columns.says)
        return read

    def add(self, line: Line, findings: RowFindings) -> None:
        self.messages += findings.messages
        self.characters += findings.characters
        self.trained_characters += findings.trained_characters
        if findings.characters > self.longest_row_characters:
            self.longest_row, self.longest_row_characters = line.number, findings.characters
        self.duplicates.add(line.data)
        if findings.dropped:
            self.dropped.update(findings.dropped if len(self.dropped) < 50 else self.dropped.keys() & findings.dropped)
            self.dropped_rows += 1
            self.dropped_line = self.dropped_line or line.number
        for code, message in {fault.code: fault.message for fault in findings.warnings}.items():
            self.warn(line.number, code, message)

    def refuse(self, problem: RowProblem) -> None:
        self.problem_count += 1
        if len(self.problems) < _MAX_PROBLEMS:
            self.problems.append(problem)

    def refuse_first(self, problem: RowProblem) -> None:
        """A problem that is shown, however many there are before it."""
        self.problem_count += 1
        self.problems = [problem, *self.problems[: _MAX_PROBLEMS - 1]]

    def refuse_all(self, number: int, text: str, faults: list[RowFinding]) -> None:
        kept = faults[: _MAX_PROBLEMS - len(self.problems)]
        self.problem_count += len(faults)
        if not kept:
            return
        column = strict_json.columns(text, {fault.param for fault in kept})
        self.problems += [RowProblem(number, column[fault.param], *fault) for fault in kept]

    def warn(self, number: int, code: str, message: str, *, rows: int = 1) -> None:
        earlier = self.warnings.get(code)
        if earlier is None:
            self.warnings[code] = DatasetWarning(line=number, code=code, message=message, rows=rows)
        else:
            self.warnings[code] = dataclasses.replace(earlier, rows=earlier.rows + rows)

    def _placed(self, problem: RowProblem) -> RowProblem:
        """A problem where it stands in the file. Rows made of a table have no columns that a user could look up."""
        if self.made_of is None:
            return problem
        return dataclasses.replace(problem, column=None, unit=self.made_of)

    def _leave_columns(self) -> None:
        if self.left and self.rows:
            self.dropped.update(dict.fromkeys(self.left, self.rows))
            self.dropped_rows, self.dropped_line = self.rows, 1

    def _warn_of_columns(self) -> None:
        most = sorted(self.dropped.items(), key=lambda column: (-column[1], column[0]))[:12]
        counts = ", ".join(f"{name} ({rows:,} rows)" for name, rows in most)
        more = f" and {len(self.dropped) - 12:,} more" if len(self.dropped) > 12 else ""
        message = f"Columns that this format does not use were dropped: {counts}{more}."
        self.warn(self.dropped_line, "dropped_columns", message, rows=self.dropped_rows)

    def report(self) -> DatasetReport:
        duplicates = self.duplicates.estimate()
        if self.head == BOM:
            self.warn(1, "byte_order_mark", "The file starts with a byte order mark; it was ignored.")
        self._leave_columns()
        if self.dropped:
            self._warn_of_columns()
        if duplicates:
            message = f"{duplicates:,} of {self.rows:,} rows repeat an earlier row byte for byte."
            self.warn(1, "duplicate_rows", message, rows=duplicates)
        if self.blank_lines and self.rows and self.made_of is None:
            self.warn(1, "blank_lines", f"{self.blank_lines:,} blank lines were skipped.", rows=self.blank_lines)
        return DatasetReport(
            format=formats.FORMAT_OF[self.shape] if self.shape else None,
            shape=self.shape,
            rows=self.rows,
            bytes=self.bytes,
            messages=self.messages,
            characters=self.characters,
            trained_characters=self.trained_characters,
            longest_row=self.longest_row,
            longest_row_characters=self.longest_row_characters,
            duplicate_rows=duplicates,
            dropped_columns=tuple(sorted(self.dropped)),
            problem_count=self.problem_count,
            problems=tuple(map(self._placed, self.problems)),
            warnings=tuple(self.warnings.values()),
            stopped_at=self.stopped_at,
            made_of=self.made_of,
            left=tuple(self.left),
            cells=self.cells,
        )
