"""The lines of an uploaded JSONL file, streamed; another kind of file is refused by its first bytes."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Iterator
from typing import Literal, NamedTuple

from shared.rows import strict_json

BOM = b"\xef\xbb\xbf"
# What numbers count: lines of a text, rows of a table, items of a JSON array.
Unit = Literal["line", "row", "item"]


@dataclasses.dataclass(frozen=True)
class RowProblem:
    """One fault. `line` and `column` count from 1: lines what `unit` says, columns characters (invalid_utf8: bytes)."""

    line: int
    column: int | None
    param: str
    code: str
    message: str
    unit: Unit = "line"

    def __str__(self) -> str:
        place = f"{self.unit} {self.line}"
        if self.column is not None:
            place += f", column {self.column}"
        return f"{place}: {self.message}"


class Line(NamedTuple):
    """A line without its ending. `whole` is false for one over the limit, whose `data` is only its beginning."""

    number: int
    data: bytes
    whole: bool
    ended: bool


class FileRefused(ValueError):
    """The bytes are not UTF-8 JSONL at all; nothing after this place was read."""

    def __init__(self, problem: RowProblem) -> None:
        super().__init__(problem.message)
        self.problem = problem


def lines(chunks: Iterable[bytes], *, limit: int) -> Iterator[Line]:
    """Split a stream into lines at LF, never holding more than one line of `limit` bytes and one chunk.

    Strips a UTF-8 byte order mark and the CR of CRLF.

    Raises:
        FileRefused: the first bytes are those of another kind of file.
    """
    number, held, skipping = 1, b"", False
    for chunk in _opened(chunks):
        parts = chunk.split(b"\n")
        for part in parts[:-1]:
            if not skipping:
                yield _line(number, held + part if held else part, limit, ended=True)
            number, held, skipping = number + 1, b"", False
        if skipping:
            continue
        held += parts[-1]
        if len(held) > limit:
            yield _line(number, held, limit, ended=False)
            held, skipping = b"", True
    if held:
        yield _line(number, held, limit, ended=False)


def decode(line: Line) -> str:
    """The text of a line.

    Raises:
        strict_json.BadJson: not UTF-8, or CR instead of LF; the column counts bytes.
    """
    if b"\r" in line.data:
        column = line.data.index(b"\r") + 1
        message = "A lone carriage return (CR) separates lines here; save the file with LF or CRLF line endings."
        raise strict_json.BadJson("cr_line_endings", message, column=column)
    try:
        return line.data.decode()
    except UnicodeDecodeError as error:
        byte = line.data[error.start]
        message = f"Byte {error.start + 1} of the line (0x{byte:02x}) is not valid UTF-8; save the file as UTF-8."
        raise strict_json.BadJson("invalid_utf8", message, column=error.start + 1) from None


def _line(number: int, data: bytes, limit: int, *, ended: bool) -> Line:
    if len(data) > limit:
        return Line(number, data[:4096], whole=False, ended=ended)
    return Line(number, data[:-1] if data.endswith(b"\r") else data, whole=True, ended=ended)


def _opened(chunks: Iterable[bytes]) -> Iterator[bytes]:
    """Look at the first bytes before anything else: a wrong kind of file deserves its name, not twenty JSON errors."""
    stream = iter(chunks)
    head = b""
    for chunk in stream:
        head += chunk
        if len(head) >= 64:
            break
    _refuse_other_kinds(head)
    yield head.removeprefix(BOM)
    yield from stream


_MAGIC: tuple[tuple[bytes, str, str], ...] = (
    (b"\x1f\x8b", "gzip", "decompress it first (gunzip)"),
    (b"PK\x03\x04", "ZIP", "unzip it first and upload the .jsonl inside"),
    (b"\x28\xb5\x2f\xfd", "Zstandard", "decompress it first (unzstd)"),
    (b"\xfd7zXZ", "xz", "decompress it first (unxz)"),
    (b"BZh", "bzip2", "decompress it first (bunzip2)"),
    (b"PAR1", "Parquet", "export it as JSONL"),
    (b"ARROW1", "Arrow", "export it as JSONL"),
    (b"FEA1", "Feather of version 1", "write it as Feather of version 2, Parquet or JSONL"),
    (b"version https://git-lfs", "a pointer of Git LFS", "fetch the file that it stands for (git lfs pull)"),
    (b"SQLite format 3", "SQLite", "export the table as JSONL"),
    (b"%PDF", "PDF", "extract its text and write JSONL"),
    (b"\xd0\xcf\x11\xe0", "Excel (.xls)", "export the sheet as CSV in UTF-8"),
    (b"7z\xbc\xaf", "7-Zip", "unpack it first and upload the .jsonl inside"),
    (b"Obj\x01", "Avro", "write it as Parquet or JSONL"),
    (b"\x89HDF", "HDF5", "export it as JSONL"),
    (b"\x89PNG", "a picture", "training is text-only"),
    (b"\x93NUMPY", "NumPy", "export it as JSONL"),
    *((bytes([0x80, protocol]), "Python pickle", "write JSONL with json.dumps") for protocol in range(2, 6)),
)
_UNICODE: tuple[tuple[bytes, str], ...] = (
    (b"\xff\xfe\x00\x00", "UTF-32 (little endian)"),
    (b"\x00\x00\xfe\xff", "UTF-32 (big endian)"),
    (b"\xff\xfe", "UTF-16 (little endian)"),
    (b"\xfe\xff", "UTF-16 (big endian)"),
    (b"{\x00", "UTF-16 (little endian)"),
    (b"\x00{", "UTF-16 (big endian)"),
)


def is_refused(head: bytes) -> bool:
    """Whether a file with this beginning is of a kind that is refused by name."""
    try:
        _refuse_other_kinds(head)
    except FileRefused:
        return True
    return False


def _refuse_other_kinds(head: bytes) -> None:
    for magic, kind, remedy in _MAGIC:
        if head.startswith(magic):
            raise FileRefused(at_start("wrong_file_type", f"The file is {kind}, not JSONL; {remedy}."))
    for odd, encoding in ((1, "UTF-16 (little endian)"), (0, "UTF-16 (big endian)")):
        # Without a mark: every other byte of plain letters is zero.
        if len(head) >= 16 and not any(head[odd:16:2]) and all(head[1 - odd : 16 : 2]):
            raise FileRefused(at_start("wrong_encoding", f"The file is in {encoding}; save it as UTF-8."))
    for magic, encoding in _UNICODE:
        if head.startswith(magic):
            raise FileRefused(at_start("wrong_encoding", f"The file is in {encoding}; save it as UTF-8."))
    start = head.removeprefix(BOM).lstrip()
    if start.startswith(b"["):
        message = "The row is a list; write one object per line, without brackets and commas around them."
        raise FileRefused(at_start("json_array", message))
    if start[:9].lower().startswith((b"<!doctype", b"<html")):
        raise FileRefused(at_start("wrong_file_type", "The file is a web page, not JSONL; download the data itself."))


def at_start(code: str, message: str) -> RowProblem:
    """A problem of the file as a whole."""
    return RowProblem(line=1, column=1, param="file", code=code, message=message)
