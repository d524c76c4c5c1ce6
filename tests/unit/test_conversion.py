"""The convert command: one file in, canonical JSONL out, complete or not at all."""

from __future__ import annotations

import json
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from shared.errors import Invalid
from standalone.conversion import convert_file

ALPACA = [{"instruction": f"{n}?", "input": "", "output": str(n), "id": n} for n in range(3)]
CANONICAL = [
    {"messages": [{"role": "user", "content": f"{n}?"}, {"role": "assistant", "content": str(n)}]} for n in range(3)
]


def write(file: Path) -> Path:
    if file.suffix == ".jsonl":
        file.write_text("".join(json.dumps(row) + "\n" for row in ALPACA))
    elif file.suffix == ".json":
        file.write_text(json.dumps(ALPACA, indent=1))
    elif file.suffix == ".csv":
        file.write_text("instruction,output,id\n" + "".join(f"{n}?,{n},{n}\n" for n in range(3)))
    else:
        pq.write_table(pa.Table.from_pylist(ALPACA), file)
    return file


@pytest.mark.parametrize("name", ["rows.jsonl", "rows.csv", "ROWS.parquet", "rows.json"])
def test_the_same_rows_come_out_of_every_kind_of_file(tmp_path: Path, name: str) -> None:
    out = tmp_path / "out.jsonl"

    assert convert_file(write(tmp_path / name), out) == 3
    assert [json.loads(line) for line in out.read_text().splitlines()] == CANONICAL
    again = tmp_path / "again.jsonl"
    convert_file(out, again)
    assert again.read_bytes() == out.read_bytes()


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("a.txt", b"x", ".parquet"),
        ("a.jsonl", b'{"text": "x"}\n{"text": ""}\n', "line 2"),
        ("a.jsonl", b"PAR1", "Parquet"),
        ("a.csv", b'text\n"x', "line 2"),
        ("a.json", b'[{"text": "x"}, {"text": "y"', "item 2"),
        ("a.json", b'[{"text": "x"}, {"text": ""}]', "item 2"),
        ("a.parquet", b"PAR1", "cannot be read as Parquet"),
    ],
)
def test_a_file_that_breaks_a_rule_is_named_and_leaves_nothing(
    tmp_path: Path, name: str, content: bytes, words: str
) -> None:
    (tmp_path / name).write_bytes(content)

    with pytest.raises(Invalid, match=words):
        convert_file(tmp_path / name, tmp_path / "out.jsonl")

    assert [path.name for path in tmp_path.iterdir()] == [name]
