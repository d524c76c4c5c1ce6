"""Unpacks a compressed upload into a file of bounded size: gzip by the standard library, Zstandard by Arrow's codec."""

from __future__ import annotations

import gzip
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Final, Literal

import pyarrow as pa

from shared.errors import TunepoolError

CHUNK_BYTES: Final = 1 << 20
# Rows that repeat a long system prompt or tool list shrink fifty times and more; what shall fill a disk, a thousand.
MOST_TIMES: Final = 300
_FREE_BYTES: Final = 32 << 20


class CannotInflate(TunepoolError):
    """The file is damaged, or unpacks to more than may be."""

    code = "damaged_compression"


def inflate(file: Path, target: Path, *, codec: Literal["gzip", "zstd"], most: int) -> None:
    """Write what `file` unpacks to. The memory that is taken is a megabyte, and a window (Zstandard: 128 MiB at most).

    Raises:
        CannotInflate: code `damaged_compression`; `file_too_large` past `most` bytes; `compressed_too_far` for more
            than `MOST_TIMES` the file's own size.
    """
    packed, written = file.stat().st_size, 0
    with target.open("wb") as sink:
        for chunk in _pieces(file, codec):
            written += len(chunk)
            if written > most:
                message = f"The file unpacks to more than {most:,} bytes; split it or remove rows."
                raise CannotInflate(message, code="file_too_large")
            if written > max(_FREE_BYTES, packed * MOST_TIMES):
                message = (
                    f"The file unpacks to more than {MOST_TIMES} times its {packed:,} bytes, as rows hardly do;"
                    " remove repeated rows, or upload it uncompressed."
                )
                raise CannotInflate(message, code="compressed_too_far")
            sink.write(chunk)


def _pieces(file: Path, codec: Literal["gzip", "zstd"]) -> Iterator[bytes]:
    try:
        if codec == "gzip":
            with gzip.open(file) as stream:
                while chunk := stream.read(CHUNK_BYTES):
                    yield chunk
            return
        with pa.CompressedInputStream(pa.OSFile(str(file)), codec) as unpacked:
            while chunk := unpacked.read(CHUNK_BYTES):
                yield chunk
    except pa.ArrowMemoryError:
        raise
    except (pa.ArrowException, OSError, EOFError, zlib.error) as error:
        reason = str(error).splitlines()[0][:200] if str(error) else type(error).__name__
        message = f"The file cannot be unpacked as {codec} ({reason}); compress it again, or upload it uncompressed."
        raise CannotInflate(message) from error
