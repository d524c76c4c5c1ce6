"""Looks at a folder of training data: which file has the rows, what they are, and what is wrong with them."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final, Literal

from tunepool.requests import BadSetting
from tunepool.shapes import Row, Shape, UnknownShape, detect

Method = Literal["supervised", "dpo", "kto"]

HELD_OUT_NAMES: Final = ("heldout", "held_out", "holdout", "test", "eval", "validation", "valid", "dev")
METHODS: Final[dict[str, Method]] = {"openai_preference": "dpo", "chosen_rejected": "dpo", "kto": "kto"}
LEAST_TRAINED: Final = 10  # the server's least number of rows
MAX_LINE_BYTES: Final = 8 * 1024 * 1024
SHOWN_FAULTS: Final = 5
SHORT_ANSWER: Final = 60  # characters: longer ones are hardly ever met word by word
MOSTLY: Final = 0.95


@dataclass
class RowsSummary:
    """A file of rows. `answers` and `jsons` count the answers that are short, and those that are JSON objects."""

    path: Path
    rows: int = 0
    shapes: dict[Shape, int] = field(default_factory=dict)
    answered: int = 0
    short: int = 0
    jsons: int = 0
    faults: list[str] = field(default_factory=list)
    fault_count: int = 0

    @property
    def shape(self) -> Shape:
        """That of most rows."""
        return max(self.shapes, key=lambda shape: self.shapes[shape])

    @property
    def method(self) -> Method:
        return METHODS.get(self.shape, "supervised")

    def mostly(self, count: int) -> bool:
        return self.answered > 0 and count >= MOSTLY * self.answered


@dataclass(frozen=True)
class Data:
    """What a folder holds: the rows to train on, and those held out where there are some already."""

    training: RowsSummary
    held_out: RowsSummary | None
    passed_over: tuple[Path, ...]  # other files of data


def data_of(folder: Path) -> Data:
    """The largest JSONL file is trained on; one named like `heldout.jsonl` or `test.jsonl` is held out.

    Raises BadSetting when there is none, when rows are bad (with file and line), and when there are several shapes.
    """
    files = sorted(path for path in folder.glob("*.jsonl") if path.is_file())
    held_out = next((path for name in HELD_OUT_NAMES for path in files if path.stem.lower() == name), None)
    candidates = sorted((path for path in files if path != held_out), key=lambda path: -path.stat().st_size)
    if not candidates:
        other = sorted(path.name for path in folder.glob("*") if path.suffix in {".json", ".csv", ".tsv", ".parquet"})
        remedy = f" Turn {other[0]} into it: tunepool-server convert {other[0]} train.jsonl" if other else ""
        raise BadSetting(f"{folder} has no file of rows to train on (*.jsonl).{remedy}")
    training = must_be_good(look(candidates[0]))
    held = None if held_out is None else must_be_good(look(held_out))
    return Data(training, held, tuple(candidates[1:]))


def must_be_good(file: RowsSummary) -> RowsSummary:
    """Raises BadSetting with file and line."""
    if file.fault_count:
        more = file.fault_count - len(file.faults)
        raise BadSetting("\n".join([*file.faults, *([f"… and {more} more bad rows in {file.path}"] if more else [])]))
    if not file.rows:
        raise BadSetting(f"{file.path} has no row.")
    if len(file.shapes) > 1:
        counts = ", ".join(f"{count} of {shape}" for shape, count in sorted(file.shapes.items()))
        raise BadSetting(f"{file.path} mixes rows of several shapes: {counts}. A file has one; split it.")
    return file


def look(path: Path) -> RowsSummary:
    """Read every row once. The server checks far more; this finds what no pipeline could begin with."""
    file = RowsSummary(path)
    for number, line in numbered(path):
        try:
            row = json.loads(line)
            if not isinstance(row, dict):
                raise UnknownShape("The row is no JSON object.")
            shape = detect(row)
        except (ValueError, RecursionError) as error:
            file.fault_count += 1
            if len(file.faults) < SHOWN_FAULTS:
                column = f":{error.colno}" if isinstance(error, json.JSONDecodeError) else ""
                file.faults.append(f"{path}:{number}{column}: {error}")
            continue
        file.rows += 1
        file.shapes[shape] = file.shapes.get(shape, 0) + 1
        _count_answer(file, answer_of(row))
    return file


def numbered(path: Path) -> Iterator[tuple[int, bytes]]:
    """(number from 1, line) of the lines that hold something. Raises BadSetting for a line without an end."""
    with path.open("rb") as stream:
        number = 0
        while line := stream.readline(MAX_LINE_BYTES + 1):
            number += 1
            if len(line) > MAX_LINE_BYTES:
                raise BadSetting(f"{path}:{number}: the line has more than {MAX_LINE_BYTES // 2**20} MiB; is it JSONL?")
            if line.strip(b" \t\r\n\xef\xbb\xbf"):
                yield number, line.removeprefix(b"\xef\xbb\xbf") if number == 1 else line


def answer_of(row: Row) -> str | None:
    """The text that the row teaches, where it is one text."""
    answer: Any = row.get("completion", row.get("output"))
    for key, text in (("messages", "content"), ("conversations", "value")):
        turns = row.get(key)
        if isinstance(turns, list) and turns and isinstance(turns[-1], dict):
            answer = turns[-1].get(text)
    return answer if isinstance(answer, str) else None


def _count_answer(file: RowsSummary, answer: str | None) -> None:
    if answer is None:
        return
    file.answered += 1
    file.short += len(answer) <= SHORT_ANSWER
    try:
        file.jsons += isinstance(json.loads(answer), dict | list)
    except (ValueError, RecursionError):
        return


def is_held_out(line: bytes, share: float) -> bool:
    """By the row's hash: the same rows whatever their order and whatever comes later; equal rows stay together."""
    digest = hashlib.sha256(line.strip()).digest()
    return int.from_bytes(digest[:8], "big") < share * 2**64
