"""CSV and Parquet uploads: opened by a program that may die of them, then checked and read like JSONL."""

from __future__ import annotations

import dataclasses
import functools
import gzip
import io
import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from openai import BadRequestError, OpenAI

from shared.lease.values import FileRef
from shared.rows.cells import TableColumns
from shared.rows.check import DatasetReport, check
from shared.rows.convert import UnpackSpec
from shared.settings import child_environment
from shared.store.db import session_scope
from shared.store.storage import open_store
from shared.store.tables import FileRow
from tests.forked import PARENT, run_forked
from tests.integration.conftest import Api
from tests.live import live_api
from tests.openai_types import held
from tests.patience import patience
from tests.train.tiny import make_model_directory
from worker.program.workdir import stage_rows

ROOT = Path(__file__).parents[2]
MIB = 1 << 20
# From a small process: a program's peak counts what the one weighs that starts it.
MEASURED = """
import resource, subprocess, sys
code = subprocess.run(sys.argv[1:]).returncode
print(code, resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss)
"""
CHAT = [
    {"messages": [{"role": "user", "content": f"{n}?"}, {"role": "assistant", "content": "=cmd|' /C calc'!A0"}]}
    for n in range(5)
]


@pytest.fixture(scope="module")
def api(api: Api, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Api]:
    """An API with a base model that lies here: rows are read with it, and the built-in one would be fetched first."""
    home = tmp_path_factory.mktemp("tables")
    make_model_directory(home / "model")
    (home / "models.toml").write_text(f'[models.tiny]\nsource = "path"\npath = "{home / "model"}"\n')
    settings = api.settings.model_copy(update={"models_file": home / "models.toml"})
    with live_api(settings) as url, OpenAI(base_url=f"{url}/v1", api_key=api.key, http_client=held()) as client:
        yield dataclasses.replace(api, url=url, settings=settings, client=client)


def parquet(rows: list[dict[str, Any]], **options: Any) -> bytes:
    sink = io.BytesIO()
    pq.write_table(pa.Table.from_pylist(rows), sink, **options)
    return sink.getvalue()


def checked(api: Api, name: str, content: bytes) -> FileRow:
    made = api.client.files.create(file=(name, content), purpose="fine-tune")
    do_waiting_work(api)
    with session_scope(api.engine) as session:
        return session.get_one(FileRow, made.id)


def do_waiting_work(api: Api) -> None:
    place = {
        "DATABASE_URL": api.settings.database_url,
        "REDIS_URL": "",
        "TUNEPOOL_HOME": str(api.settings.home),
        "TUNEPOOL_MODELS_FILE": str(api.settings.models_file),
    }
    lane = ["-m", "worker.pull", "cpu", PARENT]
    done = run_forked(lane, environment=child_environment(**place), seconds=patience(120))
    assert done.returncode == 0, done.stderr


def rows_of(api: Api, file: FileRow) -> list[dict[str, Any]]:
    assert file.rows_key is not None
    content = b"".join(open_store(api.settings).chunks(file.rows_key))
    return [json.loads(line) for line in content.splitlines() if line]


def test_a_parquet_file_of_conversations_becomes_rows_and_its_other_columns_go(api: Api) -> None:
    content = parquet([{**row, "source": "x", "score": 0.5} for row in CHAT])
    file = checked(api, "rows.parquet", content)

    assert (file.status, file.report["format"], file.report["rows"]) == ("processed", "chat", 5)
    assert rows_of(api, file) == [{**row, "source": "x"} for row in CHAT]  # read, should a job call it by our name
    assert file.report["dropped_columns"] == ["score", "source"]
    assert api.client.files.content(file.id).read() == content


def test_columns_that_nobody_uses_are_told_at_the_file_and_in_the_jobs_events(api: Api) -> None:
    file = checked(api, "rows.parquet", parquet([{**row, "source": "x", "score": 0.5} for row in CHAT * 2]))
    job = api.client.fine_tuning.jobs.create(model="tiny", training_file=file.id)
    do_waiting_work(api)

    told = api.client.files.retrieve(file.id).model_extra
    assert told is not None
    assert told["tunepool"]["dropped_columns"] == ["score", "source"]
    (warning,) = (one for one in told["tunepool"]["warnings"] if one["code"] == "dropped_columns")
    assert warning["rows"] == 10
    events = api.client.fine_tuning.jobs.list_events(job.id).data
    (event,) = (one for one in events if "dropped" in one.message)
    assert (event.level, event.message) == (
        "warn",
        f"training_file '{file.id}': Columns that this format does not use were dropped:"
        " score (10 rows), source (10 rows). (10 rows)",
    )


A = [{"from": "human", "value": "What is it?"}, {"from": "gpt", "value": "A bus."}]


@pytest.mark.parametrize(
    ("rows", "param", "code"),
    [
        ([{"conversations": A, "image": {"bytes": b"\x89PNG", "path": "1.png"}}], "image", "unsupported_content"),
        ([{"conversations": A, "images": [b"\x89PNG"]}], "images", "unsupported_content"),
        ([{**CHAT[0], "kto_tag": "yes"}, *CHAT], "kto_tag", "unknown_key"),
        ([{**CHAT[0], "train_on_input": True}, *CHAT], "train_on_input", "unknown_key"),
        ([{**CHAT[0], "tool": "x"}], "tool", "unknown_key"),
    ],
)
def test_a_column_with_a_meaning_is_refused_by_name_in_a_table_as_in_lines(
    tmp_path: Path, rows: list[dict[str, Any]], param: str, code: str
) -> None:
    report = made_and_checked(tmp_path, "rows.parquet", parquet(rows))

    assert [(one.line, one.column, one.param, one.code, one.unit) for one in report.problems] == [
        (1, None, param, code, "row")
    ]


def test_the_lines_of_a_csv_file_are_counted_as_an_editor_does(tmp_path: Path) -> None:
    content = b'prompt,completion,id\n"a\nb",c,1\n\nd,"",2\n'

    report = made_and_checked(tmp_path, "rows.csv", content)

    assert [str(problem) for problem in report.problems] == [
        "line 5: completion is empty; write some text or remove the row."
    ]
    assert report.dropped_columns == ("id",)
    assert {one.code for one in report.warnings} == {"dropped_columns"}


def test_a_csv_file_becomes_rows_and_formulas_in_it_stay_text(api: Api) -> None:
    file = checked(api, "rows.csv", b'prompt,completion,id\n"a, ""b""",=1+1,7\nc,@SUM(A1),8\n')

    assert (file.status, file.report["format"]) == ("processed", "prompt_completion")
    assert rows_of(api, file) == [
        {"prompt": 'a, "b"', "completion": "=1+1", "id": "7"},
        {"prompt": "c", "completion": "@SUM(A1)", "id": "8"},
    ]


def test_a_file_of_another_kind_is_read_whatever_its_name(api: Api) -> None:
    lines = b"".join(json.dumps(row).encode() + b"\n" for row in CHAT)
    content = {"rows.jsonl.gz": gzip.compress(lines), "rows.jsonl": json.dumps(CHAT, indent=1).encode()}
    uploads = [api.client.files.create(file=file, purpose="fine-tune").id for file in content.items()]
    named = checked(api, "rows.csv", lines)

    assert (named.status, named.packed, named.rows_key) == ("processed", False, None)
    for upload in uploads:
        with session_scope(api.engine) as session:
            file = session.get_one(FileRow, upload)
        assert (file.status, file.status_details, file.report["rows"], file.packed) == ("processed", None, 5, True)
        assert rows_of(api, file) == CHAT


def test_a_bad_row_of_a_table_is_named_by_its_number(api: Api) -> None:
    bad = [*CHAT, {"messages": [{"role": "bot", "content": "x"}]}]
    file = checked(api, "rows.parquet", parquet(bad))

    assert file.status == "error"
    assert "row 6: messages" in str(file.status_details)


QUESTIONS = [{"frage": f"{n}?", "antwort": str(n), "vektor": [0.5, n]} for n in range(12)]
NAMED = {"prompt": "frage", "completion": "antwort"}
OTHERWISE = {
    "rows.jsonl": b"".join(json.dumps(row).encode() + b"\n" for row in QUESTIONS),
    "rows.csv.gz": gzip.compress(b"frage,antwort\n" + b"".join(f"{n}?,{n}\n".encode() for n in range(12))),
    "rows.parquet": parquet(QUESTIONS),
    "rows.json": json.dumps(QUESTIONS).encode(),
}


def test_columns_of_other_names_are_trained_from_every_type_of_file(api: Api, tmp_path: Path) -> None:
    ask = functools.partial(api.client.fine_tuning.jobs.create, model="tiny")
    uploads = [api.client.files.create(file=file, purpose="fine-tune").id for file in OTHERWISE.items()]
    do_waiting_work(api)
    with pytest.raises(BadRequestError, match=r"training\.columns of the job"):
        ask(training_file=uploads[0])
    jobs = [
        ask(training_file=upload, extra_body={"tunepool": {"training": {"columns": columns}}}).id
        for upload in uploads
        for columns in (NAMED, {**NAMED, "prompt": "farge"})
    ]
    do_waiting_work(api)

    for good, bad in zip(jobs[::2], jobs[1::2], strict=True):
        job = api.client.fine_tuning.jobs.retrieve(good)
        told = [one.message for one in api.client.fine_tuning.jobs.list_events(good).data]
        assert (job.status, job.error) == ("queued", None)
        assert any("frage as prompt, antwort as completion was read. (12 rows)" in one for one in told)
        refused = api.client.fine_tuning.jobs.retrieve(bad)
        assert (refused.status, refused.error and refused.error.code) == ("failed", "unknown_column")
        assert "did you mean frage?" in str(refused.error)
    for upload in uploads:
        with session_scope(api.engine) as session:
            file = FileRef.of(session.get_one(FileRow, upload))
        rows = stage_rows(
            open_store(api.settings), file, tmp_path / "rows.jsonl", columns=NAMED, interrupt=lambda: None
        )
        assert [json.loads(line) for line in rows.read_text().splitlines()] == [
            {"prompt": f"{n}?", "completion": str(n)} for n in range(12)
        ]


def test_an_idle_column_that_is_too_large_is_left_alone(tmp_path: Path) -> None:
    rows = [{"prompt": "a", "completion": "b", "page": "x" * 400_000}] * 30

    report = made_and_checked(tmp_path, "rows.parquet", parquet(rows, compression="zstd"))

    assert (report.ok, report.rows, report.dropped_columns) == (True, 30, ("page",))
    assert (tmp_path / "out" / "rows.jsonl").stat().st_size < 10_000


WHOLE = parquet(CHAT)


@pytest.mark.parametrize(
    ("name", "content", "code"),
    [
        ("no.parquet", b"PAR1 this is not a table PAR1", "unreadable_table"),
        ("cut.parquet", WHOLE[: len(WHOLE) // 2], "unreadable_table"),
        ("footer.parquet", WHOLE[:-8] + b"\xff\xff\xff\x7fPAR1", "unreadable_table"),
        ("columns.parquet", parquet([{"a": 1.5}]), "unknown_format"),
        ("bytes.parquet", parquet([{"text": b"\xff\xfe"}]), "wrong_type"),
        ("quote.csv", b'prompt,completion\n"' + b"a\n" * 200_000, "invalid_csv"),
        ("cells.csv", b"prompt,completion\na,b,c\n", "wrong_cell_count"),
        ("latin.csv", "prompt,completion\na,ü\n".encode("latin-1"), "invalid_utf8"),
    ],
)
def test_a_hostile_table_is_refused_by_name(tmp_path: Path, name: str, content: bytes, code: str) -> None:
    assert refusal(tmp_path, name, content)["code"] == code


def unpacked(tmp_path: Path, name: str, content: bytes, *, max_bytes: int = 10_000_000) -> tuple[int, int]:
    """The program's exit code and peak resident memory in bytes, run as the CPU lane runs it."""
    (tmp_path / name).write_bytes(content)
    spec = UnpackSpec(file=str(tmp_path / name), filename=name, max_bytes=max_bytes, memory_bytes=256 * MIB)
    (tmp_path / "spec.json").write_text(spec.model_dump_json(), encoding="utf-8")
    argv = [sys.executable, "-m", "worker.program.unpack", str(tmp_path / "spec.json"), str(tmp_path / "out")]
    done = subprocess.run(
        [sys.executable, "-c", MEASURED, *argv],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=patience(60),
        check=True,
    )
    (tmp_path / "log").write_text(done.stderr)
    code, peak = done.stdout.split()
    return int(code), int(peak) * 1024


def made_and_checked(tmp_path: Path, name: str, content: bytes) -> DatasetReport:
    """What the lane says of the rows that the program makes."""
    assert unpacked(tmp_path, name, content)[0] == 0, (tmp_path / "log").read_text()
    columns = TableColumns.model_validate_json((tmp_path / "out" / "columns.json").read_bytes())
    rows = (tmp_path / "out" / "rows.jsonl").read_bytes()
    return check([rows], made_of=columns.unit, left=columns.dropped, cells=columns.cells)


def refusal(tmp_path: Path, name: str, content: bytes, **options: Any) -> dict[str, Any]:
    """How the program says that it ended."""
    code, peak = unpacked(tmp_path, name, content, **options)
    assert code in {3, 4}, (code, (tmp_path / "log").read_text()[-2000:])
    assert peak < 400 * MIB
    return json.loads((tmp_path / "out" / "events.jsonl").read_text().splitlines()[-1])


def test_a_small_table_that_unpacks_to_very_much_is_refused(tmp_path: Path) -> None:
    bomb = parquet([{"text": "x" * 100_000}] * 2000, compression="zstd")
    assert len(bomb) < 1_000_000

    assert refusal(tmp_path, "bomb.parquet", bomb)["code"] == "file_too_large"


def test_one_cell_that_fills_the_memory_is_refused(tmp_path: Path) -> None:
    bomb = parquet([{"text": "x" * 280_000_000}], compression="zstd", use_dictionary=False, write_statistics=False)
    assert len(bomb) < 1_000_000

    refused = refusal(tmp_path, "bomb.parquet", bomb, max_bytes=1 << 40)

    assert refused["code"] == "table_too_large"
    assert "256 MiB" in refused["message"]
    assert "data_page_size" in refused["message"]


def repeated(texts: list[str], *, rows: int) -> bytes:
    """A file of one row group whose cells are these texts by turns: each text is written once, the rest by number."""
    places = pa.array([row % len(texts) for row in range(rows)], pa.int32())
    sink = io.BytesIO()
    table = pa.table({"text": pa.DictionaryArray.from_arrays(places, pa.array(texts))})
    pq.write_table(table, sink, compression="zstd", dictionary_pagesize_limit=1 << 30, store_schema=False)
    assert pq.ParquetFile(sink).num_row_groups == 1
    return sink.getvalue()


@pytest.mark.parametrize(("characters", "rows"), [(100_000, 3000), (1_000_000, 280)])
def test_a_huge_row_group_of_few_bytes_is_read_in_little_memory(tmp_path: Path, characters: int, rows: int) -> None:
    content = repeated([letter * characters for letter in "abc"], rows=rows)
    assert len(content) < 100_000

    code, peak = unpacked(tmp_path, "rows.parquet", content, max_bytes=1 << 30)

    assert code == 0
    assert (tmp_path / "out" / "rows.jsonl").stat().st_size == rows * (characters + len('{"text": ""}\n'))
    assert peak < 300 * MIB


def test_one_row_of_endlessly_many_messages_is_refused(tmp_path: Path) -> None:
    nothing = pa.nulls(20_000_000, pa.string())
    messages = pa.StructArray.from_arrays([nothing, nothing], ["role", "content"])
    sink = io.BytesIO()
    one_row = pa.array([0, len(messages)], pa.int32())
    pq.write_table(pa.table({"messages": pa.ListArray.from_arrays(one_row, messages)}), sink)
    assert len(sink.getvalue()) < 10_000

    assert refusal(tmp_path, "rows.parquet", sink.getvalue())["code"] == "table_too_large"


def test_columns_that_nobody_reads_cost_nothing_and_more_than_fit_a_footer_are_refused(tmp_path: Path) -> None:
    wide = pa.table({"text": ["a"], **{f"column {number}": [number] for number in range(2000)}})
    sink = io.BytesIO()
    pq.write_table(wide, sink)

    assert unpacked(tmp_path, "rows.parquet", sink.getvalue())[0] == 0
    assert (tmp_path / "out" / "rows.jsonl").read_text() == '{"text": "a"}\n'

    footer = bytes(33 * MIB)
    refused = refusal(tmp_path, "wider.parquet", b"PAR1" + footer + len(footer).to_bytes(4, "little") + b"PAR1")
    assert refused["code"] == "table_too_large"
    assert "columns or row groups" in refused["message"]
