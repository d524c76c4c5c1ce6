"""`tunepool-server convert`: turns a file of any known format into the canonical JSONL that trainers read."""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Final

from shared.errors import Invalid
from shared.rows.cells import RowRefused, TableColumns
from shared.rows.convert import UnpackSpec, convert
from shared.rows.kinds import HEAD_BYTES, NAMES, is_offered, kind_of
from shared.rows.lines import FileRefused, Unit
from shared.settings import trainer_environment

CHUNK_BYTES: Final = 1 << 20
MOST_BYTES: Final = 512 * 1024 * 1024
MEMORY_BYTES: Final = 2 * 1024**3


def convert_file(source: Path, target: Path) -> int:
    """Write `target`, complete or not at all; returns its rows. Raises Invalid naming the row at fault."""
    if not is_offered(source.name):
        raise Invalid(f"'{source.name}' must end in {NAMES}.", param="file")
    with source.open("rb") as stream:
        kind = kind_of(stream.read(HEAD_BYTES), filename=source.name)
    unit: Unit = "line"
    unfinished = target.with_name(target.name + ".part")
    try:
        if kind in {"lines", "delimited"}:
            rows = _write(convert(_chunks(source), source="jsonl" if kind == "lines" else "csv"), unfinished)
        else:
            with tempfile.TemporaryDirectory() as place:
                opened, unit = _unpacked(source, Path(place))
                rows = _write(convert(_chunks(opened), source="jsonl"), unfinished)
        unfinished.rename(target)
    except RowRefused as refused:
        raise Invalid(f"{source.name}: {unit} {refused.line}: {refused.reason}", param="file") from refused
    except FileRefused as refused:
        raise Invalid(f"{source.name}: {refused}", param="file") from refused
    finally:
        unfinished.unlink(missing_ok=True)
    return rows


def _unpacked(source: Path, place: Path) -> tuple[Path, Unit]:
    """The rows of a file, made by the program that the service uses too, and what their numbers count."""
    spec = UnpackSpec(file=str(source.resolve()), filename=source.name, max_bytes=MOST_BYTES, memory_bytes=MEMORY_BYTES)
    (place / "spec.json").write_text(spec.model_dump_json(), encoding="utf-8")
    argv = [sys.executable, "-m", "worker.program.unpack", str(place / "spec.json"), str(place / "out")]
    done = subprocess.run(argv, env=trainer_environment(TMPDIR=str(place)), capture_output=True, check=False)
    if done.returncode == 0:
        columns = TableColumns.model_validate_json((place / "out" / "columns.json").read_bytes())
        return place / "out" / "rows.jsonl", columns.unit or "line"
    events = place / "out" / "events.jsonl"
    lines = events.read_text(encoding="utf-8").splitlines() if events.is_file() else []
    if not lines:
        raise Invalid(f"{source.name}: It ended the program that opens it.", param="file")
    why = json.loads(lines[-1])
    where = f"{why['param']}: " if why["param"] else ""
    raise Invalid(f"{source.name}: {where}{why['message']}", param="file")


def _write(lines: Iterator[bytes], target: Path) -> int:
    rows = 0
    with target.open("wb") as sink:
        for line in lines:
            sink.write(line)
            rows += 1
    return rows


def _chunks(file: Path) -> Iterator[bytes]:
    with file.open("rb") as stream:
        while chunk := stream.read(CHUNK_BYTES):
            yield chunk
