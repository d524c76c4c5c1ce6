"""`tunepool init`: what it writes for a folder of data is read by `run`, by the gate and by the CI systems."""

from __future__ import annotations

import hashlib
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from tunepool import main
from tunepool.pipeline.document import read_pipeline
from tunepool.pipeline.looking import is_held_out
from typer.testing import CliRunner

from shared.contract.evaluation import CreateEvaluation
from shared.contract.gate_file import read_gate
from shared.rows import evaluation_items
from tests.patience import patience

CHAT = [
    {"messages": [{"role": "user", "content": f"{n}?"}, {"role": "assistant", "content": json.dumps({"n": n})}]}
    for n in range(200)
]
PAIRS = [{"prompt": f"{n}?", "chosen": "a good long answer", "rejected": "no"} for n in range(60)]
PROSE = [{"prompt": f"{n}?", "completion": f"{n}: " + "a long answer " * 20} for n in range(60)]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    place = tmp_path / "tickets"
    place.mkdir()
    return place


def write(file: Path, rows: list[Any]) -> None:
    file.write_text("".join(f"{row if isinstance(row, str) else json.dumps(row)}\n" for row in rows))


def init(folder: Path, *words: str) -> tuple[int, str, BaseException | None]:
    environment = {"TUNEPOOL_HOME": "/nowhere", "OPENAI_BASE_URL": "", "OPENAI_API_KEY": ""}
    done = CliRunner().invoke(main.cli, ["init", str(folder), "--model", "tiny", *words], env=environment)
    return done.exit_code, done.stdout, done.exception


def names(folder: Path) -> set[str]:
    return {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}


def test_what_is_written_for_chat_rows_is_a_pipeline_a_gate_and_a_split(folder: Path) -> None:
    write(folder / "rows.jsonl", CHAT)

    code, told, error = init(folder)

    assert code == 0, error
    assert names(folder) == {"rows.jsonl", "rows.train.jsonl", "rows.heldout.jsonl", "pipeline.yaml", "gate.yaml"}
    pipeline = read_pipeline(folder / "pipeline.yaml")
    assert (pipeline.name, pipeline.model, pipeline.promote) == ("tickets", "tiny", "tickets@prod")
    assert pipeline.evaluate is not None
    asked = {"items": {"type": "file", "file_id": "f"}, "measures": pipeline.evaluate.measures, "subjects": ["x"]}
    measured = {measure.name for measure in CreateEvaluation.model_validate(asked).measures}
    gate = read_gate((folder / "gate.yaml").read_bytes())
    assert measured == {"loss", "exact_match", "valid_json"}
    assert {name.rsplit(".", 1)[1] for stated in gate.assertions for name in stated.named} <= measured
    assert "200 of the form chat" in told
    assert "answers are JSON" in told
    assert "nothing in the repository says which" in told


def test_the_split_loses_and_doubles_no_row_and_keeps_each_on_its_side_when_others_come(folder: Path) -> None:
    write(folder / "rows.jsonl", CHAT[:150])
    init(folder, "--share", "0.2")
    train, held = (folder / f"rows.{side}.jsonl" for side in ("train", "heldout"))
    first_held = held.read_text().splitlines()
    assert sorted([*train.read_text().splitlines(), *first_held]) == sorted(json.dumps(row) for row in CHAT[:150])
    assert 10 < len(first_held) < 60

    for name in names(folder) - {"rows.jsonl"}:
        (folder / name).unlink()
    write(folder / "rows.jsonl", CHAT[::-1])
    init(folder, "--share", "0.2")

    assert set(first_held) <= set(held.read_text().splitlines())


@pytest.mark.parametrize("share", [0.1, 0.5])
def test_the_split_is_the_one_that_the_server_makes_of_a_share(share: float) -> None:
    lines = [json.dumps(row).encode() + b"\n" for row in CHAT]

    theirs = {item.line for item in evaluation_items.items(lines, most=1000, share=share)}

    assert {number for number, line in enumerate(lines, start=1) if is_held_out(line, share)} == theirs


def test_pairs_are_for_dpo_and_prose_is_not_compared_word_by_word(folder: Path) -> None:
    write(folder / "pairs.jsonl", PAIRS)
    init(folder)
    assert read_pipeline(folder / "pipeline.yaml").method == "dpo"

    other = folder.parent / "prose"
    other.mkdir()
    write(other / "rows.jsonl", PROSE)
    init(other)
    pipeline = read_pipeline(other / "pipeline.yaml")
    assert pipeline.evaluate is not None
    assert pipeline.evaluate.measures == [{"type": "loss", "name": "loss"}]
    assert "candidate.loss <= prod.loss * 1.01" in (other / "gate.yaml").read_text()


def test_a_held_out_file_that_is_there_is_taken_and_nothing_is_split(folder: Path) -> None:
    write(folder / "train.jsonl", CHAT[:100])
    write(folder / "test.jsonl", CHAT[100:])

    code, told, _ = init(folder)

    assert code == 0
    assert names(folder) == {"train.jsonl", "test.jsonl", "pipeline.yaml", "gate.yaml"}
    pipeline = read_pipeline(folder / "pipeline.yaml")
    assert pipeline.evaluate is not None
    assert (pipeline.training, pipeline.evaluate.items.file) == ("train.jsonl", "test.jsonl")
    assert "100 rows that were there" in told


@pytest.mark.parametrize("there", ["pipeline.yaml", "gate.yaml", "rows.heldout.jsonl"])
def test_nothing_is_overwritten_and_then_nothing_is_written(folder: Path, there: str) -> None:
    write(folder / "rows.jsonl", CHAT)
    (folder / there).write_text("mine")
    if there.endswith(".jsonl"):
        (folder / there).write_text(json.dumps(CHAT[0]))

    code, _, error = init(folder)

    assert code != 0
    assert f"{there} is there already, and nothing was written" in str(error)
    assert names(folder) == {"rows.jsonl", there}


@pytest.mark.parametrize(
    ("rows", "words"),
    [
        ([*CHAT[:2], "{no json"], "rows.jsonl:3:2:"),
        ([*CHAT[:2], {"question": "x"}], "rows.jsonl:3: The row's keys (question) belong to no known format"),
        ([*CHAT[:20], *PROSE], "mixes rows of several shapes: 20 of chat, 60 of prompt_completion"),
        (["[1]"], "rows.jsonl:1: The row is no JSON object"),
        ([], "has no row"),
        (CHAT[:8], "at least 10 and 1 are needed"),
    ],
)
def test_bad_data_is_told_with_file_and_line_and_nothing_is_written(folder: Path, rows: list[Any], words: str) -> None:
    write(folder / "rows.jsonl", rows)

    code, _, error = init(folder)

    assert code != 0
    assert words in str(error)
    assert names(folder) == {"rows.jsonl"}


def test_a_folder_without_rows_says_how_to_make_some(folder: Path) -> None:
    (folder / "rows.csv").write_text("prompt,completion\n")

    assert "tunepool-server convert rows.csv train.jsonl" in str(init(folder)[2])


@pytest.mark.parametrize(
    ("mark", "file", "schema"),
    [
        (".github/CODEOWNERS", ".github/workflows/tunepool.yml", "vendor.github-workflows"),
        (".gitlab-ci.yml", ".gitlab-ci.tunepool.yml", "vendor.gitlab-ci"),
        ("Jenkinsfile", "Jenkinsfile.tunepool", None),
    ],
)
def test_the_ci_file_is_for_the_system_that_the_repository_shows(
    folder: Path, mark: str, file: str, schema: str | None
) -> None:
    root = folder.parent
    (root / ".git").mkdir()
    (root / mark).parent.mkdir(exist_ok=True)
    (root / mark).write_text("# mine\n")
    write(folder / "rows.jsonl", CHAT)

    code, told, error = init(folder)

    assert code == 0, error
    assert (root / mark).read_text() == "# mine\n"
    text = (root / file).read_text()
    assert "tunepool run tickets/pipeline.yaml" in text
    assert "tickets/rows.train.jsonl" in text
    assert "the repository has" in told
    if schema is not None:
        yaml.safe_load(text)
        tool = [Path(sys.executable).parent / "check-jsonschema", "--builtin-schema", schema, root / file]
        checked = subprocess.run(tool, capture_output=True, text=True, timeout=patience(60), check=False)
        assert checked.returncode == 0, checked.stdout


def test_the_rows_that_are_held_out_are_told_by_their_hash() -> None:
    line = b'{"text": "x"}'
    share = int.from_bytes(hashlib.sha256(line).digest()[:8], "big") / 2**64

    assert is_held_out(line + b"\r\n", share * 1.0001)
    assert not is_held_out(line, share * 0.9999)
