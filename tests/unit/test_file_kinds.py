"""Files of every kind: told by their first bytes, unpacked within bounds, their faults counted as the file counts."""

from __future__ import annotations

import gzip
import io
import json
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st
from pyarrow import feather, ipc

from shared.errors import TunepoolError
from shared.rows.arrays import item_lines
from shared.rows.cells import RowRefused, TableColumns
from shared.rows.check import DatasetReport, check
from shared.rows.convert import UnpackSpec, canonical_lines
from shared.rows.kinds import is_offered, kind_of
from worker.program.unpack import make_rows

Rows = list[dict[str, Any]]
ROWS: Rows = [{"prompt": f'say {n}, \t "twice"', "completion": f" {n}\n[{n}]"} for n in range(40)]
MIB = 1 << 20


def jsonl(rows: Rows) -> bytes:
    return b"".join(json.dumps(row).encode() + b"\n" for row in rows)


def array(rows: Rows) -> bytes:
    return json.dumps(rows, indent=2).encode()


def separated(rows: Rows, *, by: str) -> bytes:
    def cell(value: Any) -> str:
        text = value if isinstance(value, str) else json.dumps(value)
        return '"' + text.replace('"', '""') + '"'

    names = list(dict.fromkeys(name for row in rows for name in row))
    lines = [by.join(names), *(by.join(cell(row[name]) if name in row else "" for name in names) for row in rows)]
    return "\n".join(lines).encode()


def parquet(rows: Rows) -> bytes:
    sink = io.BytesIO()
    pq.write_table(table(rows), sink)
    return sink.getvalue()


def table(rows: Rows) -> pa.Table:
    names = list(dict.fromkeys(name for row in rows for name in row))
    return pa.table({name: [row.get(name) for row in rows] for name in names})


def arrow_file(rows: Rows) -> bytes:
    sink = io.BytesIO()
    feather.write_feather(table(rows), sink, compression="zstd")
    return sink.getvalue()


def arrow_stream(rows: Rows) -> bytes:
    sink = io.BytesIO()
    with ipc.new_stream(sink, table(rows).schema) as stream:
        stream.write_table(table(rows), max_chunksize=7)
    return sink.getvalue()


def zstd(content: bytes) -> bytes:
    return bytes(pa.compress(content, codec="zstd", asbytes=True))


KINDS: dict[str, Callable[[Rows], bytes]] = {
    "rows.jsonl.gz": lambda rows: gzip.compress(jsonl(rows)),
    "rows.jsonl.zst": lambda rows: zstd(jsonl(rows)),
    "two members.jsonl.gz": lambda rows: gzip.compress(jsonl(rows[:9])) + gzip.compress(jsonl(rows[9:])),
    "two frames.jsonl.zst": lambda rows: zstd(jsonl(rows[:9])) + zstd(jsonl(rows[9:])),
    "rows.json": array,
    "minified.json": lambda rows: json.dumps(rows).encode(),
    "marked.json": lambda rows: b"\xef\xbb\xbf" + array(rows),
    "rows.json.gz": lambda rows: gzip.compress(array(rows)),
    "rows.csv": lambda rows: separated(rows, by=","),
    "rows.tsv": lambda rows: separated(rows, by="\t"),
    "rows.tsv.zst": lambda rows: zstd(separated(rows, by="\t")),
    "rows.parquet": parquet,
    "rows.parquet.gz": lambda rows: gzip.compress(parquet(rows)),
    "rows.feather": arrow_file,
    "rows.arrow": arrow_stream,
    "rows.arrow.zst": lambda rows: zstd(arrow_stream(rows)),
    "rows.ndjson": jsonl,
}


def made(place: Path, name: str, content: bytes, *, most: int = 64 * MIB) -> tuple[bytes, TableColumns]:
    """The rows that the program makes, and what it says of the columns."""
    file = place / "upload"
    file.write_bytes(content)
    make_rows(UnpackSpec(file=str(file), filename=name, max_bytes=most, memory_bytes=MIB), place)
    columns = TableColumns.model_validate_json((place / "columns.json").read_bytes())
    return (place / "rows.jsonl").read_bytes(), columns


def report_of(place: Path, name: str, content: bytes) -> DatasetReport:
    rows, columns = made(place, name, content)
    return check([rows], made_of=columns.unit, left=columns.dropped)


@pytest.mark.parametrize("name", KINDS)
def test_the_same_rows_come_out_of_every_kind_of_file(tmp_path: Path, name: str) -> None:
    rows, _ = made(tmp_path, name, KINDS[name](ROWS))

    assert [json.loads(line) for line in canonical_lines([rows])] == ROWS


@pytest.mark.parametrize("name", KINDS)
def test_a_file_is_what_it_holds_and_not_what_it_is_called(tmp_path: Path, name: str) -> None:
    rows, _ = made(tmp_path, "rows.jsonl", KINDS[name](ROWS))

    assert [json.loads(line) for line in canonical_lines([rows])] == ROWS


@pytest.mark.parametrize(
    ("name", "place"),
    [
        ("rows.jsonl.gz", "line 31, column 17"),
        ("rows.jsonl.zst", "line 31, column 17"),
        ("rows.json", "item 31"),
        ("rows.csv", "line 62"),  # each row before it has two lines, the header one
        ("rows.tsv", "line 62"),
        ("rows.parquet", "row 31"),
        ("rows.arrow", "row 31"),
    ],
)
def test_a_fault_stands_where_the_file_counts_it(tmp_path: Path, name: str, place: str) -> None:
    bad = [*ROWS[:30], {"prompt": "a", "completion": " "}, *ROWS[31:]]

    report = report_of(tmp_path, name, KINDS[name](bad))

    assert report.rows == 40
    assert [str(problem).split(": ")[0] for problem in report.problems] == [place]


@pytest.mark.parametrize(
    "name", ["rows.csv", "rows.tsv", "rows.parquet", "rows.feather", "rows.arrow", "rows.json", "rows.jsonl.gz"]
)
def test_a_column_of_no_account_is_told_in_every_kind_of_file(tmp_path: Path, name: str) -> None:
    report = report_of(tmp_path, name, KINDS[name]([{**row, "source": "web"} for row in ROWS]))

    assert (report.ok, report.dropped_columns) == (True, ("source",))
    assert [(one.code, one.rows) for one in report.warnings] == [("dropped_columns", 40)]


@pytest.mark.parametrize(
    ("content", "line", "code", "words"),
    [
        (b'[{"text": "a"}, {"text": "b"},]', 3, "invalid_json", "a comma stands before the closing bracket"),
        (b'[{"text": "a"},, {"text": "b"}]', 2, "invalid_json", "where an item should be"),
        (b'[{"text": "a"}, {"text": "b"', 2, "truncated_json", "upload it again"),
        (b'[{"text": "a"}, {"text": "b', 2, "truncated_json", "upload it again"),
        (b'[{"text": "a"}]\n{"text": "b"}', 1, "invalid_json", "something follows the array"),
        (b'[{"text": "a"}, {"text": "b\nc"}]', 2, "invalid_json", "control character"),
        (b'[{"text": "a"}, {"text": "' + b"b" * 9 * MIB + b'"}]', 2, "line_too_long", "split the example"),
    ],
)
@pytest.mark.parametrize("size", [3, MIB])
def test_a_broken_array_is_refused_at_its_item(content: bytes, line: int, code: str, words: str, size: int) -> None:
    if size < MIB < len(content):
        size = 100_000
    with pytest.raises(RowRefused, match=words) as refused:
        list(item_lines(content[at : at + size] for at in range(0, len(content), size)))

    assert (refused.value.line, refused.value.code, refused.value.unit) == (line, code, "item")


VALUES = st.recursive(
    st.none() | st.integers() | st.text(), lambda v: st.lists(v, max_size=3) | st.dictionaries(st.text(), v, max_size=3)
)


@given(st.lists(VALUES, max_size=4), st.integers(1, 20), st.sampled_from([None, 1]))
def test_an_array_of_anything_is_split_at_its_items(items: list[Any], size: int, indent: int | None) -> None:
    content = json.dumps(items, indent=indent, ensure_ascii=False).encode("utf-8", "replace")

    lines = list(item_lines(content[at : at + size] for at in range(0, len(content), size)))

    assert lines == [] if not items else [json.loads(line) for line in lines] == json.loads(content)


def test_an_item_of_an_array_is_all_that_is_held_of_it() -> None:
    item = b'{"text": "' + b"a" * 1000 + b'"}'
    chunks = ((b"," if n else b"[") + item + (b"" if n < 19_999 else b"]") for n in range(20_000))
    tracemalloc.start()
    lines = sum(1 for _ in item_lines(chunks))
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()

    assert lines == 20_000
    assert peak < MIB


@pytest.mark.parametrize(
    ("name", "content", "code"),
    [
        ("cut.jsonl.gz", gzip.compress(jsonl(ROWS))[:-20], "damaged_compression"),
        ("cut.jsonl.zst", zstd(jsonl(ROWS))[:-20], "damaged_compression"),
        ("no.jsonl.gz", b"\x1f\x8b no gzip at all", "damaged_compression"),
        ("no.jsonl.zst", b"\x28\xb5\x2f\xfd no frame at all", "damaged_compression"),
        ("twice.jsonl.gz", gzip.compress(gzip.compress(jsonl(ROWS))), "wrong_file_type"),
        ("zeros.jsonl.gz", gzip.compress(bytes(48 * MIB), 9), "compressed_too_far"),
        ("zeros.jsonl.zst", zstd(bytes(48 * MIB)), "compressed_too_far"),
        ("much.jsonl.gz", gzip.compress(bytes(65 * MIB), 0), "file_too_large"),
        ("cut.arrow", arrow_stream(ROWS)[:-300], "unreadable_table"),
        ("no.arrow", b"ARROW1\0\0 this is no table", "unreadable_table"),
    ],
)
def test_a_damaged_or_swollen_file_is_refused_by_name(tmp_path: Path, name: str, content: bytes, code: str) -> None:
    with pytest.raises(TunepoolError) as refused:
        made(tmp_path, name, content)

    assert refused.value.code == code


def test_arrow_offsets_that_lie_are_refused(tmp_path: Path) -> None:
    whole = arrow_stream([{"text": "a"}] * 4)
    offsets = b"".join(n.to_bytes(4, "little") for n in range(5))
    assert whole.count(offsets) == 1
    lying = whole.replace(offsets, offsets[:-4] + (1 << 30).to_bytes(4, "little"))

    with pytest.raises(TunepoolError, match="cannot be read as Arrow"):
        made(tmp_path, "rows.arrow", lying)


@pytest.mark.parametrize(
    ("head", "name", "kind"),
    [
        (b'{"text": "a"}', "rows.csv", "lines"),
        (b"", "rows.jsonl", "lines"),
        (b" \n[", "rows.jsonl", "array"),
        (b"text\nhello", "rows.jsonl", "delimited"),
        (b"hello there", "rows.jsonl", "lines"),
        (b"PK\x03\x04", "rows.csv", "lines"),  # whose check refuses it by name
        ("text\na".encode("utf-16"), "rows.csv", "lines"),
    ],
)
def test_first_bytes_say_the_kind(head: bytes, name: str, kind: str) -> None:
    assert kind_of(head, filename=name) == kind


@pytest.mark.parametrize("name", [*KINDS, "ROWS.JSONL", "rows.csv.GZ", "upload", "unknown_file"])
def test_each_kind_has_a_name_that_may_be_uploaded(name: str) -> None:
    assert is_offered(name)
    assert not is_offered(name + ".exe")


HI, HELLO = {"role": "user", "content": "Hi?"}, {"role": "assistant", "content": "Hello."}
_SPOKEN = pa.struct([("role", pa.string()), ("content", pa.string())])
# Columns of messages and of text in every type that Arrow has for such.
COLUMNS_OF_ARROW: dict[str, pa.Table] = {
    "lists of large offsets": pa.table({"messages": pa.array([[HI, HELLO]], pa.large_list(_SPOKEN))}),
    "list views": pa.table({"messages": pa.array([[HI, HELLO]], pa.list_view(_SPOKEN))}),
    "lists of one length": pa.table({"messages": pa.array([[HI, HELLO]], pa.list_(_SPOKEN, 2))}),
    "a dictionary of JSON text": pa.table({"messages": pa.array([json.dumps([HI, HELLO])]).dictionary_encode()}),
    "maps as messages": pa.table(
        {"messages": pa.array([[[*HI.items()], [*HELLO.items()]]], pa.list_(pa.map_(pa.string(), pa.string())))}
    ),
    "text under names of their own": pa.table(
        {"instruction": pa.array(["Hi?"], pa.string_view()), "output": pa.array(["Hello."], pa.large_string())}
    ),
}


def in_a_file(rows: pa.Table, name: str) -> bytes:
    sink = io.BytesIO()
    if name.endswith("parquet"):
        pq.write_table(rows, sink)
    else:
        with ipc.new_file(sink, rows.schema) as file:
            file.write_table(rows)
    return sink.getvalue()


@pytest.mark.parametrize("name", ["rows.parquet", "rows.arrow"])
@pytest.mark.parametrize("kind", COLUMNS_OF_ARROW)
def test_messages_are_read_from_every_type_of_column(tmp_path: Path, name: str, kind: str) -> None:
    rows, _ = made(tmp_path, name, in_a_file(COLUMNS_OF_ARROW[kind], name))

    assert [json.loads(line) for line in canonical_lines([rows])] == [{"messages": [HI, HELLO]}]


@pytest.mark.parametrize("name", ["rows.parquet", "rows.arrow"])
def test_a_null_of_a_map_is_trained_and_a_null_that_arrow_filled_in_is_not(tmp_path: Path, name: str) -> None:
    maps, filled = pa.map_(pa.string(), pa.string()), pa.struct([("city", pa.string()), ("zip", pa.string())])
    for kind, arguments in ((maps, [[("city", "Rome"), ("zip", None)], []]), (filled, [{"city": "Rome"}, {}])):
        call = pa.struct([("function", pa.struct([("name", pa.string()), ("arguments", kind)]))])
        message = pa.struct([("role", pa.string()), ("content", pa.string()), ("tool_calls", pa.list_(call))])
        calls = [{"function": {"name": "clock", "arguments": each}} for each in arguments]
        table = pa.table({"messages": pa.array([[HI, {"role": "assistant", "tool_calls": calls}]], pa.list_(message))})
        rows, _ = made(tmp_path, name, in_a_file(table, name))

        (row,) = map(json.loads, canonical_lines([rows]))
        wanted = {"city": "Rome", "zip": None} if kind == maps else {"city": "Rome"}
        read = [json.loads(call["function"]["arguments"]) for call in row["messages"][1]["tool_calls"]]
        assert read == [wanted, {}]


@pytest.mark.parametrize("name", ["rows.parquet", "rows.arrow"])
def test_a_map_with_a_key_twice_is_refused_by_name(tmp_path: Path, name: str) -> None:
    pairs = pa.array([[[("role", "user"), ("role", "assistant")]]], pa.list_(pa.map_(pa.string(), pa.string())))

    with pytest.raises(TunepoolError, match="a key twice") as refused:
        made(tmp_path, name, in_a_file(pa.table({"messages": pairs}), name))
    assert refused.value.code == "duplicate_key"


def test_a_column_that_holds_no_text_is_named_with_the_remedy(tmp_path: Path) -> None:
    rows = pa.table({"prompt": pa.array([b"a"]), "completion": ["b"]})

    with pytest.raises(RowRefused, match=r"the column prompt cannot be read as text .* a column of text"):
        made(tmp_path, "rows.parquet", in_a_file(rows, "rows.parquet"))


@pytest.mark.parametrize("column", ["loss_weight", "input_mask", "train_on_prompt", "weight", "picture"])
@pytest.mark.parametrize("name", ["rows.jsonl.gz", "rows.csv", "rows.parquet", "rows.arrow"])
def test_a_column_that_would_change_what_is_trained_is_refused_in_every_kind_of_file(
    tmp_path: Path, name: str, column: str
) -> None:
    report = report_of(tmp_path, name, KINDS[name]([{**row, column: 0.5} for row in ROWS[:2]]))

    assert {problem.param for problem in report.problems} == {column}
