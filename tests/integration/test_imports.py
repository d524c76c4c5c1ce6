"""`tunepool import openai` against a live API: nothing without --apply, everything once, and a word for the rest."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from openai.types.fine_tuning import FineTuningJob
from sqlalchemy import update
from tunepool import openai_export
from tunepool.main import cli
from typer.testing import CliRunner, Result

from shared.ids import new_id
from shared.store.db import session_scope
from shared.store.tables import FileRow
from tests.integration.conftest import Api
from tests.unit.test_openai_export import record

THEIRS = "gpt-4o-mini-2024-07-18"
OURS = "smollm2-135m-instruct"
GUIDE = Path(__file__).parents[2] / "docs/migrate-from-openai.md"
MAP = ("--map", f"{THEIRS}={OURS}")
Import = Callable[..., Result]


@pytest.fixture
def export(tmp_path: Path) -> list[dict[str, Any]]:
    """Two jobs of one text under two ids, and a file for validation. Each test has bytes and ids of its own."""
    mark = new_id("")
    row = {"messages": [{"role": "user", "content": mark}, {"role": "assistant", "content": "hello"}]}
    for name in ("train.jsonl", "file-same.jsonl"):
        (tmp_path / name).write_text(json.dumps(row) + "\n")
    (tmp_path / "file-valid").write_text(json.dumps({"messages": [*row["messages"], *row["messages"]]}) + "\n")
    (tmp_path / "files.json").write_text(json.dumps([{"id": "file-abc123", "filename": "train.jsonl"}]))
    return [
        record(f"ftjob-a{mark}", metadata={"team": "search"}, validation_file="file-valid"),
        record(f"ftjob-b{mark}", training_file="file-same"),
    ]


@pytest.fixture
def imported(api: Api, tmp_path: Path) -> Import:
    """Runs the command on jobs; returns its result."""

    def run(jobs: list[dict[str, Any]], *words: str, before: tuple[str, ...] = ()) -> Result:
        (tmp_path / "export.json").write_text(json.dumps(jobs))
        known = ["--base-url", f"{api.url}/v1", "--api-key", api.key]
        sources = ["--jobs", str(tmp_path / "export.json"), "--files", str(tmp_path), "--out", str(tmp_path / "out")]
        return CliRunner().invoke(cli, [*known, *before, "import", "openai", *sources, *words])

    return run


def made_of(api: Api, job: dict[str, Any]) -> list[FineTuningJob]:
    return list(api.client.fine_tuning.jobs.list(metadata={"imported_from": job["id"]}))


def file_count(api: Api) -> int:
    return len(list(api.client.files.list(limit=10_000)))


def test_without_apply_nothing_is_changed(api: Api, imported: Import, export: list[dict[str, Any]]) -> None:
    before = file_count(api)

    result = imported(export, *MAP, "--resubmit")

    assert result.exit_code == 0, result.output
    assert result.stdout.count("would be submitted") == 3  # once for each, once for all
    assert "2 files to upload" in result.stdout
    assert "Nothing was changed" in result.stdout
    assert file_count(api) == before
    assert [made_of(api, job) for job in export] == [[], []]


def test_a_second_run_uploads_and_submits_nothing_twice(
    api: Api, imported: Import, export: list[dict[str, Any]]
) -> None:
    before = file_count(api)

    first = imported(export, *MAP, "--resubmit", "--apply")
    second = imported(export, *MAP, "--resubmit", "--apply")

    assert (first.exit_code, second.exit_code) == (0, 0), first.output + second.output
    assert file_count(api) == before + 2
    assert second.stdout.count("imported already as ftjob-") == 2
    ((job,), (other,)) = (made_of(api, job) for job in export)
    assert job.metadata == {"team": "search", "imported_from": export[0]["id"]}
    assert (job.model, job.seed, job.training_file) == (OURS, 683058546, other.training_file)
    assert job.hyperparameters.to_dict() == export[0]["hyperparameters"]
    assert (job.model_extra or {})["tunepool"]["suffix"] == "tickets"
    assert api.client.files.retrieve(job.training_file).filename == "train.jsonl"
    assert api.client.files.retrieve(str(job.validation_file)).filename == "file-valid.jsonl"


def test_requests_are_written_ready_to_be_sent(
    api: Api, imported: Import, export: list[dict[str, Any]], tmp_path: Path
) -> None:
    result = imported(export[:1], "--model", OURS, "--apply")
    request = tmp_path / "out" / f"{export[0]['id']}.json"
    request.write_text(request.read_text().replace("tickets", "edited"))
    again = imported(export[:1], "--model", OURS, "--apply")
    known = ["--base-url", f"{api.url}/v1", "--api-key", api.key]
    sent = CliRunner().invoke(cli, [*known, "jobs", "create", str(request)])

    assert (result.exit_code, again.exit_code, sent.exit_code) == (0, 0, 0), result.output + sent.output
    assert "differs and is kept as it is" in again.stdout
    assert "0 files uploaded" in again.stdout
    (job,) = made_of(api, export[0])
    assert sent.stdout.strip() == job.id
    assert (job.model_extra or {})["tunepool"]["suffix"] == "edited"
    assert "imported already" in imported(export[:1], "--model", OURS, "--resubmit").stdout


def test_what_has_no_equivalent_is_told_job_by_job(
    api: Api, imported: Import, export: list[dict[str, Any]], tmp_path: Path
) -> None:
    rft = {"type": "reinforcement", "reinforcement": {}}
    jobs = [
        export[0],  # no --map for it: the model is not here
        record("ftjob-rft", model=OURS, method=rft, training_file="file-same"),
        record("ftjob-ft", model="ft:gpt-4o:acme::1", training_file="file-same"),
        record("ftjob-file", model=OURS, training_file="file-gone"),
        record("ftjob-run", model=OURS, status="running", training_file="file-same"),
        record("ftjob-\u0041", model="\x1b[2J\nfaked", training_file="file-same"),
    ]
    result = imported(jobs, "--resubmit", "--apply", "--map", "never=x")

    assert result.exit_code == 1, result.output
    for words in (
        f"no model '{THEIRS}' is here: --map '{THEIRS}=OURS'",
        "method 'reinforcement' is not offered here",
        "goes on from 'ft:gpt-4o:acme::1', whose weights stay at OpenAI",
        "training_file: file 'file-gone' is missing: put it into the folder as file-gone.jsonl",
        "it has not succeeded at OpenAI ('running')",
        "no job of the list has the model 'never'",
        "learning_rate_multiplier scales this server's automatic rate",
        "5 cannot be recreated, 1 left out",
    ):
        assert words in result.stdout
    assert "\x1b" not in result.stdout
    assert not any(line.startswith("faked") for line in result.stdout.splitlines())
    assert all(made_of(api, job) == [] for job in jobs)


def test_what_the_server_refuses_stops_no_other_job(
    api: Api, imported: Import, export: list[dict[str, Any]], tmp_path: Path
) -> None:
    refused = {**export[0], "user_provided_suffix": "…"}  # nothing of it can stand in a name

    result = imported([refused, export[1]], *MAP, "--resubmit", "--apply", before=("--json",))

    *jobs, conclusion = map(json.loads, result.stdout.splitlines())
    assert result.exit_code == 4
    assert [job["outcome"] for job in jobs] == ["refused", "submitted"]
    assert "suffix" in jobs[0]["notes"][0]
    assert jobs[1]["request"]["metadata"] == {"imported_from": export[1]["id"]}
    assert conclusion["outcomes"] == {"refused": 1, "submitted": 1}
    assert len(made_of(api, export[1])) == 1


def test_a_file_that_failed_its_check_is_not_uploaded_again(
    api: Api, imported: Import, export: list[dict[str, Any]]
) -> None:
    imported(export[1:], "--model", OURS, "--apply")
    file_id = next(iter(api.client.files.list(order="desc"))).id
    with session_scope(api.engine) as session:
        session.execute(update(FileRow).where(FileRow.id == file_id).values(status="error", status_details="row 7"))
    before = file_count(api)

    result = imported(export[1:], "--model", OURS, "--apply")

    assert result.exit_code == 1
    assert f"the server found it unusable as {file_id}: row 7" in result.stdout
    assert file_count(api) == before


def test_the_script_of_the_guide_exports_what_the_import_reads(
    api: Api, imported: Import, export: list[dict[str, Any]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    imported(export[:1], *MAP, "--resubmit", "--apply")
    (job,) = made_of(api, export[0])
    for name, value in {"OPENAI_BASE_URL": f"{api.url}/v1", "OPENAI_API_KEY": api.key}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.chdir(tmp_path)
    script = re.search(r"```python\n(.*?)```", GUIDE.read_text(), re.DOTALL)
    assert script is not None

    exec(script[1], {})  # noqa: S102 -- the guide is ours

    exported = {known.id: known for known in openai_export.jobs(tmp_path / "export/jobs.json")[0]}
    folder = openai_export.DataFolder(tmp_path / "export")
    assert exported[job.id].metadata == {"team": "search"}
    assert folder.filename(job.training_file) == "train.jsonl"
    assert folder.path(job.training_file).read_bytes() == (tmp_path / "train.jsonl").read_bytes()
