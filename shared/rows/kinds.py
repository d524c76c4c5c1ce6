"""What kind of file an upload is, told by its first bytes. A name decides only between texts that look alike."""

from __future__ import annotations

from typing import Final, Literal

from shared.rows.cells import is_header
from shared.rows.lines import BOM, is_refused

Kind = Literal["lines", "array", "delimited", "parquet", "arrow", "gzip", "zstd"]
HEAD_BYTES: Final = 4096

_ENDINGS: Final = (".jsonl", ".ndjson", ".json", ".csv", ".tsv", ".parquet", ".arrow", ".feather")
_PACKED: Final = (".gz", ".zst")
NAMES: Final = f"{', '.join(_ENDINGS)}, or one of these followed by .gz or .zst"
_MAGIC: Final[tuple[tuple[bytes, Kind], ...]] = (
    (b"\x1f\x8b", "gzip"),
    (b"\x28\xb5\x2f\xfd", "zstd"),
    (b"PAR1", "parquet"),
    (b"ARROW1", "arrow"),
    (b"\xff\xff\xff\xff", "arrow"),  # a stream without a footer, as the hub's data sets are cached
)


def is_offered(filename: str) -> bool:
    """Whether a training file may have this name. One without an ending says nothing, and its content is believed.

    Official clients send such names for files that are in memory: `upload` (Python), `unknown_file` (Node).
    """
    name = unpacked_name(filename)
    return name.endswith(_ENDINGS) or "." not in name


def unpacked_name(filename: str) -> str:
    """The name that is left when a compressed file is unpacked, in small letters."""
    name = filename.lower()
    return next((name.removesuffix(ending) for ending in _PACKED if name.endswith(ending)), name)


def kind_of(head: bytes, *, filename: str) -> Kind:
    """The kind of a file from its first `HEAD_BYTES`. What nobody can read counts as lines, whose check names it."""
    for magic, kind in _MAGIC:
        if head.startswith(magic):
            return kind
    start = head.removeprefix(BOM).lstrip()
    if start.startswith(b"["):
        return "array"
    if not start or start.startswith(b"{") or is_refused(head):
        return "lines"
    named = unpacked_name(filename).endswith((".csv", ".tsv"))
    return "delimited" if named or is_header(start) else "lines"
