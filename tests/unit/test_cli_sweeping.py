"""`tunepool sweep`: what its file says, what it asks of a server, how it ends, and how a sweep is shown."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import jsonschema
import pytest
import yaml
from tunepool import main
from tunepool.pipeline import sweep_document, sweep_shown
from tunepool.pipeline.sweep_document import read_sweep
from tunepool.requests import BadSetting
from typer.testing import CliRunner

from tests.unit import test_cli_pipeline
from tests.unit.test_cli_pipeline import Pretended

ROOT = Path(__file__).parents[2]
SWEEP = """\
name: rates
training: train.jsonl
validation: valid.jsonl
model: tiny
sweep:
  parameters:
    tunepool.training.learning_rate: [1e-4, 2.0e-4]
    hyperparameters.n_epochs: {min: 1, max: 3}
  strategy: {type: random, trials: 2}
"""
server = test_cli_pipeline.server  # the fixture


@pytest.fixture
def file(tmp_path: Path) -> Path:
    for name in ("train", "valid"):
        (tmp_path / f"{name}.jsonl").write_text(f'{{"prompt": "{name}", "completion": "b"}}\n')
    made = tmp_path / "sweep.yaml"
    made.write_text(SWEEP)
    return made


def trial(number: int, **values: Any) -> dict[str, Any]:
    return {
        "number": number,
        "state": "succeeded",
        "parameters": {"tunepool.training.learning_rate": 1e-4 * (number + 1)},
        "job": f"ftjob-{number + 1}",
        "model": f"ft:tiny:{number + 1}",
        "value": 2.0 - number,
        "step": 20,
        "looks": [[10, 3.0], [20, 2.0 - number]],
        "device_seconds": 5.0,
        "reason": None,
        "error": None,
        **values,
    }


def shown(**values: Any) -> dict[str, Any]:
    return {
        "id": "sweep_1",
        "status": "succeeded",
        "measure": "valid_loss",
        "better": "lower",
        "best": 1,
        "rungs": [10],
        "trial_counts": {"succeeded": 2},
        "request": {"budget_device_seconds": 100.0},
        "metadata": {},
        "device_seconds": 10.0,
        "trials": [trial(0), trial(1)],
        "error": None,
        "closed": None,
        "detail": None,
        **values,
    }


class Sweeping:
    """The routes of sweeps before those of a pretended server."""

    def __init__(self, state: Pretended, **ends: Any) -> None:
        self.sweeps: list[dict[str, Any]] = []
        self.bodies: list[Any] = []
        self._others, self._ends = state.answer, ends
        state.answer = self.answer  # type: ignore[method-assign]
        state._job({"metadata": {}})
        state._job({"metadata": {}})

    def answer(self, method: str, path: str, query: Any, body: Any) -> tuple[int, Any]:
        match [method, *path.strip("/").split("/")[1:]]:
            case ["GET", "tunepool", "sweeps"]:
                return 200, {"data": self.sweeps[::-1]}
            case ["POST", "tunepool", "sweeps"]:
                self.bodies.append(body)
                self.sweeps.append(shown(status="running", metadata=body["metadata"]))
                return 200, self.sweeps[-1]
            case ["GET", "tunepool", "sweeps", _]:
                self.sweeps[-1] |= {"status": "succeeded", **self._ends}
                return 200, self.sweeps[-1]
        return self._others(method, path, query, body)


def run(server: tuple[Pretended, str], *words: str) -> tuple[int, dict[str, Any]]:
    ours = {"GITHUB_ACTIONS": "", "GITHUB_STEP_SUMMARY": "", "GITHUB_SHA": "abc123", "GITHUB_REF_NAME": "main"}
    environment = {**ours, "OPENAI_BASE_URL": server[1], "OPENAI_API_KEY": "tp_x"}
    done = CliRunner().invoke(main.cli, ["--json", "sweep", *words], env=environment)
    assert done.stdout, (done.exception, done.stderr)
    return done.exit_code, json.loads(done.stdout.splitlines()[-1])


def test_a_sweep_is_asked_for_once_and_a_client_that_comes_again_takes_it_up(
    server: tuple[Pretended, str], file: Path
) -> None:
    pretended = Sweeping(server[0])
    code, made = run(server, str(file))
    assert (code, made["id"]) == (0, "sweep_1")

    code, told = run(server, str(file), "--wait")

    assert (code, told["status"], told["model"], told["device_seconds"]) == (0, "passed", "ft:tiny:2", 10.0)
    assert told["steps"][0]["words"] == "sweep_1: trial 1 of 2 is the best, ft:tiny:2."
    (body,) = pretended.bodies
    assert body["parameters"]["tunepool.training.learning_rate"] == {"values": [1e-4, 2e-4]}
    assert body["parameters"]["hyperparameters.n_epochs"] == {"min": 1, "max": 3}
    assert body["strategy"] == {"type": "random", "trials": 2}
    assert body["job"]["validation_file"] != body["job"]["training_file"]
    assert body["metadata"]["git_sha"] == "abc123"


@pytest.mark.parametrize(
    ("ends", "code", "words"),
    [
        ({"status": "failed", "best": None, "error": {"message": "None has succeeded."}}, 3, "None has succeeded."),
        ({"status": "cancelled", "best": None}, 4, "was cancelled"),
    ],
)
def test_a_sweep_without_a_result_ends_with_the_code_of_a_run(
    server: tuple[Pretended, str], file: Path, ends: dict[str, Any], code: int, words: str
) -> None:
    Sweeping(server[0], **ends)

    ended, told = run(server, str(file), "--wait")

    assert ended == code
    assert words in told["message"]


@pytest.mark.parametrize(
    ("change", "place", "words"),
    [
        (("validation: valid.jsonl\n", ""), "1:1", "needs validation"),
        (("trials: 2", "trails: 2"), "9:28", "trails"),
        (("{min: 1, max: 3}", "{min: one, max: 3}"), "8:37", "min"),
        (("type: random", "type: bayes"), "9:20", "type"),
    ],
)
def test_a_fault_of_the_file_has_its_line_and_column(
    file: Path, change: tuple[str, str], place: str, words: str
) -> None:
    file.write_text(SWEEP.replace(*change))

    with pytest.raises(BadSetting) as refused:
        read_sweep(file)

    assert str(refused.value).startswith(f"{file}:{place}: ")
    assert words in str(refused.value)


def test_the_published_schema_is_the_one_in_force_and_accepts_a_sweep() -> None:
    published = json.loads((ROOT / "docs/sweep.schema.json").read_text(encoding="utf-8"))

    assert published == sweep_document.schema()
    jsonschema.validate(yaml.safe_load(SWEEP.replace("1e-4", "1.0e-4")), published)


def test_a_table_has_the_best_first_and_bars_for_its_looks() -> None:
    stopped = trial(2, state="stopped", value=2.5, reason="rank 3 of 3 at step 10 (valid_loss 2.5)")
    planned = trial(3, state="planned", value=None, looks=[], job=None, step=None)

    rows = sweep_shown.rows(shown(trials=[trial(0), trial(1), stopped, planned]))

    assert [row["trial"] for row in rows] == ["1 *", "0", "2", "3"]
    assert (rows[0]["settings"], rows[0]["value"], rows[0]["looks"]) == ("learning_rate=0.0002", "1", "█▃")
    assert (rows[2]["why"], rows[3]["value"]) == (stopped["reason"], None)
    assert "| 1 * | learning_rate=0.0002 | succeeded | 1 |" in sweep_shown.markdown(shown())
    assert sweep_shown.head(shown()) == "sweep_1 is succeeded: 2 succeeded; 10.0 of 100 device-seconds"


def test_the_picture_has_a_line_for_each_trial_with_looks_whatever_its_settings_say() -> None:
    hostile = trial(0, parameters={"tunepool.training.chat_template": "<script>\x1b]</script>"})

    root = drawn([hostile, trial(1), trial(2, looks=[])])

    lines = root.findall("{*}polyline")
    assert [line.get("stroke-width") for line in lines] == ["1.2", "3"]
    assert root.find(".//{*}script") is None
    assert drawn([trial(0, looks=[])]).findall("{*}polyline") == []


def drawn(trials: list[dict[str, Any]]) -> ElementTree.Element:
    return ElementTree.fromstring(sweep_shown.picture(shown(trials=trials)))  # noqa: S314  # our own


def test_what_a_sweep_waits_for_is_told_once(server: tuple[Pretended, str], file: Path) -> None:
    Sweeping(server[0], detail="Trial 0 paused, not by the sweep.")
    environment = {"OPENAI_BASE_URL": server[1], "OPENAI_API_KEY": "tp_x", "GITHUB_ACTIONS": "", "GITHUB_SHA": "a"}

    done = CliRunner().invoke(main.cli, ["sweep", str(file), "--wait"], env=environment)

    assert done.stderr.count("sweep_1: Trial 0 paused, not by the sweep.") == 1
