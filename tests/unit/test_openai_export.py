"""What OpenAI's API listed is read in every shape a script may dump it in; what cannot be kept is said."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
from tunepool import openai_export
from tunepool.openai_export import BadExport, DataFolder, Unusable

from shared.contract.job_request import CreateJob

ROW = '{"messages": [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "hello"}]}\n'


def record(job_id: str = "ftjob-abc", **changes: Any) -> dict[str, Any]:
    """A job as `client.fine_tuning.jobs.list` gives it."""
    values = {"n_epochs": 3, "batch_size": 8, "learning_rate_multiplier": 1.8}
    return {
        "id": job_id, "object": "fine_tuning.job", "created_at": 1721764867, "finished_at": 1721765867, "error": None,
        "model": "gpt-4o-mini-2024-07-18", "organization_id": "org-123", "status": "succeeded",
        "fine_tuned_model": "ft:gpt-4o-mini-2024-07-18:acme:tickets:9abc", "result_files": ["file-res"],
        "training_file": "file-abc123", "validation_file": None, "hyperparameters": values, "trained_tokens": 5768,
        "seed": 683058546, "estimated_finish": None, "integrations": [], "metadata": None,
        "method": {"type": "supervised", "supervised": {"hyperparameters": values}, "dpo": None}, **changes,
    }  # fmt: skip


def read(tmp_path: Path, text: str | bytes) -> list[openai_export.ExportedJob]:
    file = tmp_path / "export.json"
    file.write_bytes(text if isinstance(text, bytes) else text.encode())
    return openai_export.jobs(file)[0]


def only(tmp_path: Path, **changes: Any) -> openai_export.ExportedJob:
    (job,) = read(tmp_path, json.dumps(record(**changes)))
    return job


TWO = [record("ftjob-1"), record("ftjob-2")]
PAGES = [{"object": "list", "data": [job], "has_more": job is TWO[0]} for job in TWO]


@pytest.mark.parametrize(
    "text",
    [
        json.dumps(TWO),
        json.dumps({"object": "list", "data": TWO, "has_more": False}),
        "\n".join(map(json.dumps, TWO)) + "\n",
        "\n\n".join(json.dumps(job, indent=2) for job in TWO),
        "\n".join(map(json.dumps, PAGES)),
        json.dumps(PAGES),
        json.dumps(TWO + TWO[:1]),  # a page that was listed twice
    ],
)
@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16"])  # the last is what `>` of PowerShell writes
def test_every_shape_of_a_list_gives_the_same_jobs(tmp_path: Path, text: str, encoding: str) -> None:
    jobs, more = openai_export.jobs(dumped(tmp_path, text.encode(encoding)))

    assert [job.id for job in jobs] == ["ftjob-1", "ftjob-2"]
    assert not more


def dumped(tmp_path: Path, content: bytes) -> Path:
    file = tmp_path / "export.json"
    file.write_bytes(content)
    return file


def test_a_page_that_is_not_the_last_is_known(tmp_path: Path) -> None:
    assert openai_export.jobs(dumped(tmp_path, json.dumps(PAGES[0]).encode()))[1]


def test_what_can_be_asked_for_again_is_kept_as_it_is(tmp_path: Path) -> None:
    job = only(tmp_path, metadata={"team": "search"})

    assert (job.method, job.suffix, job.seed, job.metadata) == ("supervised", "tickets", 683058546, {"team": "search"})
    assert job.hyperparameters == {"n_epochs": 3, "batch_size": 8, "learning_rate_multiplier": 1.8}
    assert (job.notes, job.obstacles) == ([], [])


def test_records_from_before_methods_are_supervised(tmp_path: Path) -> None:
    job = only(tmp_path, method=None, hyperparameters={"n_epochs": "auto", "batch_size": 4})

    assert (job.method, job.hyperparameters) == ("supervised", {"batch_size": 4})


def test_a_dpo_job_keeps_its_beta(tmp_path: Path) -> None:
    values = {"beta": 0.2, "n_epochs": 2, "batch_size": None, "learning_rate_multiplier": "auto"}
    job = only(tmp_path, hyperparameters={}, method={"type": "dpo", "dpo": {"hyperparameters": values}})

    assert (job.method, job.hyperparameters, job.notes) == ("dpo", {"beta": 0.2, "n_epochs": 2}, [])


@pytest.mark.parametrize(
    ("changes", "note"),
    [
        ({"integrations": [{"type": "wandb", "wandb": {"project": "p"}}]}, "integrations are left out"),
        ({"method": None, "hyperparameters": {"n_epochs": 51}}, "n_epochs '51' is not a whole number from 1 to 50"),
        ({"method": None, "hyperparameters": {"n_epochs": 1.5}}, "n_epochs '1.5'"),
        ({"method": None, "hyperparameters": {"batch_size": True}}, "batch_size 'true'"),
        ({"method": None, "hyperparameters": {"learning_rate_multiplier": float("nan")}}, "multiplier 'NaN'"),
        ({"method": None, "hyperparameters": {"learning_rate_multiplier": 10**400}}, "is not a number above 0 to 1000"),
        ({"method": None, "hyperparameters": {"prompt_loss_weight": 0.1}}, "'prompt_loss_weight' has no equivalent"),
        ({"seed": 2**31}, "another one is drawn"),
        ({"user_provided_suffix": "s" * 65}, "suffix"),
        ({"user_provided_suffix": "a\x1b[2J"}, "control character"),
        ({"metadata": {"a\u202eb": "c"}}, "control character"),
        ({"metadata": {"a": 1}}, "no text"),
        ({"metadata": {"a": "b" * 513}}, "too long"),
        ({"metadata": {"imported_from": "elsewhere"}}, "takes its place"),
    ],
)
def test_what_is_left_out_is_said_and_the_rest_stays(tmp_path: Path, changes: dict[str, Any], note: str) -> None:
    job = only(tmp_path, **changes)

    assert len(job.notes) == 1
    assert note in job.notes[0]
    assert not job.obstacles


def test_metadata_leaves_a_place_for_where_the_job_comes_from(tmp_path: Path) -> None:
    job = only(tmp_path, metadata={f"key{number}": "value" for number in range(16)})

    assert len(job.metadata) == 15
    assert "'key15' is left out" in job.notes[0]


@pytest.mark.parametrize("method", ["reinforcement", "telepathy"])
def test_a_method_that_is_not_offered_is_an_obstacle(tmp_path: Path, method: str) -> None:
    job = only(tmp_path, method={"type": method, method: {"grader": {}, "hyperparameters": {"eval_samples": 3}}})

    assert job.obstacles == [f"method '{method}' is not offered here; supervised and dpo are."]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "export.json is empty"),
        ("  \n", "export.json is empty"),
        ('[\n  {"id": "a",}\n]', "line 2, column 1[34]"),
        (json.dumps(record()) + '\n{"id": ', "line 2, column 8"),
        ("SyncCursorPage[FineTuningJob](data=[])", "line 1, column 1"),
        ('{"data": [' + json.dumps(record()) + "] , 7", "line 1"),
        ("[" * 200_000, "no export|nested"),
        ("[" + "1" * 5000 + "]", "no export looks like this"),
        ("[null]", "record 1 is null; a JSON object is needed"),
        ('"text"', "record 1 is a text"),
        ("{}", "record 1: 'id' is missing"),
        (json.dumps(record(object="file")), "is a 'file'; records of fine-tuning jobs"),
        (json.dumps(record(id=7)), "'id' is a whole number; a text is needed"),
        (json.dumps(record(model=["a"])), "ftjob-abc: 'model' is an array"),
        (json.dumps(record(training_file=None)), "'training_file' is missing"),
        (json.dumps(record(metadata="a")), "'metadata' is a text; an object is needed"),
        (json.dumps(record(method="dpo")), "'method' is a text"),
        (json.dumps(record(method={"type": "dpo", "dpo": 3})), "'dpo' is a whole number"),
        (json.dumps(record(seed=True)), "'seed' is a truth value"),
        (json.dumps([record(), record(seed=1)]), "record 2 has the id ftjob-abc of an earlier record, and differs"),
        (json.dumps(record("../../etc/passwd")), "is none of OpenAI's"),
        (json.dumps(record("a\nb")), "is none of OpenAI's"),
        (json.dumps(record(metadata={"a": "\ud800"})), "half of a character"),
        (b"\xff\xfe\xfa", "is not utf-16"),
        (b'{"a": "\xe4"}', "byte 8 is not utf-8"),
    ],
)
def test_what_is_no_export_is_refused_with_its_place(tmp_path: Path, text: str | bytes, message: str) -> None:
    with pytest.raises(BadExport, match=message):
        read(tmp_path, text)


def test_a_gigantic_export_is_not_read(tmp_path: Path) -> None:
    file = tmp_path / "export.json"
    with file.open("wb") as stream:
        stream.truncate(openai_export.MAX_EXPORT_BYTES + 1)

    with pytest.raises(BadExport, match="Split it"):
        openai_export.jobs(file)


def test_the_bounds_are_those_of_the_server() -> None:
    kinds = CreateJob.model_json_schema()["$defs"]
    for method, kind in {"supervised": "Hyperparameters", "dpo": "DpoHyperparameters"}.items():
        for name in openai_export.HYPERPARAMETERS[method]:
            number = kinds[kind]["properties"][name]["anyOf"][0]
            least = number.get("minimum", number.get("exclusiveMinimum"))
            assert (least, number["maximum"], number["type"] == "integer") == openai_export.BOUNDS[name]


# ---- the data files


def folder(tmp_path: Path, *names: str, records: list[dict[str, Any]] | None = None) -> DataFolder:
    for name in names:
        (tmp_path / name).write_text(ROW)
    if records is not None:
        (tmp_path / "files.json").write_text(json.dumps({"object": "list", "data": records}))
    return DataFolder(tmp_path)


def known(file_id: str = "file-abc", filename: str = "train.jsonl", **more: Any) -> dict[str, Any]:
    return {"id": file_id, "object": "file", "filename": filename, "purpose": "fine-tune", **more}


@pytest.mark.parametrize("name", ["file-abc.jsonl", "file-abc"])
def test_a_file_is_found_by_its_id(tmp_path: Path, name: str) -> None:
    assert folder(tmp_path, name).path("file-abc").name == name


def test_a_file_is_found_by_the_name_that_its_record_has(tmp_path: Path) -> None:
    files = folder(tmp_path, "train.jsonl", records=[known(bytes=len(ROW))])

    assert files.path("file-abc").name == "train.jsonl"
    assert files.filename("file-abc") == "train.jsonl"


def test_a_name_that_two_files_have_does_not_stand_for_either(tmp_path: Path) -> None:
    files = folder(tmp_path, "train.jsonl", "file-2.jsonl", records=[known("file-1"), known("file-2")])

    assert files.path("file-2").name == "file-2.jsonl"
    with pytest.raises(Unusable, match=r"name this one file-1\.jsonl"):
        files.path("file-1")


def test_a_file_of_another_size_is_another_file(tmp_path: Path) -> None:
    with pytest.raises(Unusable, match="OpenAI's record of file-abc has 7"):
        folder(tmp_path, "train.jsonl", records=[known(bytes=7)]).path("file-abc")


@pytest.mark.parametrize("name", ["../secret.jsonl", "/etc/hostname", "..", "a/b", "files.json"])
def test_no_name_leads_out_of_the_folder(tmp_path: Path, name: str) -> None:
    (tmp_path / "secret.jsonl").write_text(ROW)
    (tmp_path / "in").mkdir()
    files = folder(tmp_path / "in", records=[known(filename=name)])

    for file_id in ("file-abc", "../secret"):
        with pytest.raises(Unusable, match="missing"):
            files.path(file_id)


def test_a_link_out_of_the_folder_is_not_followed(tmp_path: Path) -> None:
    (tmp_path / "secret.jsonl").write_text(ROW)
    (tmp_path / "in").mkdir()
    (tmp_path / "in/file-abc.jsonl").symlink_to(tmp_path / "secret.jsonl")

    with pytest.raises(Unusable, match="missing"):
        DataFolder(tmp_path / "in").path("file-abc")


def test_a_pipe_is_no_file_and_nobody_waits_for_it(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "file-abc.jsonl")

    with pytest.raises(Unusable, match="missing"):
        DataFolder(tmp_path).path("file-abc")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "line 1, column 1"),
        (b"PK\x03\x04\xff", "no JSONL"),
        (b'[{"messages": []}]\n', "line 1 is an array"),
        (b"{\n", "no JSONL: line 1"),
        (b"prompt,completion\n", "line 1, column 1"),
        (b"[" * 200_000, "no JSONL"),
    ],
)
def test_what_is_no_jsonl_is_refused(tmp_path: Path, content: bytes, message: str) -> None:
    (tmp_path / "file-abc.jsonl").write_bytes(content)

    with pytest.raises(Unusable, match=message):
        DataFolder(tmp_path).path("file-abc")


def test_records_of_files_that_contradict_each_other_are_refused(tmp_path: Path) -> None:
    with pytest.raises(BadExport, match="of an earlier record"):
        folder(tmp_path, records=[known(), known(filename="other.jsonl")])
