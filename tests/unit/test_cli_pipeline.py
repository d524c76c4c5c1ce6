"""`tunepool run`: what it asks of a server, what it leaves out when nothing changed, and how it ends.

The server here is a few dictionaries behind HTTP that answer in the wire's shapes.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit
from xml.etree import ElementTree

import jsonschema
import pytest
import yaml
from tunepool import main
from tunepool.pipeline import curves, document, reports
from tunepool.pipeline.outcome import GATE_FAILED, RunOutcome
from typer.testing import CliRunner

from shared.contract.gate import judge, read_report
from shared.contract.gate_file import read_gate
from tests.patience import patience

ROOT = Path(__file__).parents[2]
CI = ROOT / "examples/ci"
PIPELINE = """\
name: tickets
training: train.jsonl
model: tiny
hyperparameters: {n_epochs: 1}
evaluate:
  items: {split: 0.5}
gate: gate.yaml
promote: bot@prod
"""
GATE = """\
assertions:
  - candidate.exact_match >= 0.5
  - {assert: candidate.exact_match >= prod.exact_match, if_present: prod}
"""
CURVE = "step,train_loss,train_accuracy,valid_loss,valid_mean_token_accuracy\n1,4,0,3,0\n2,3,0,,\n3,1,0,2,0\n"


class Pretended:
    """The server's state. `mean`: what the next evaluation finds of the candidate."""

    def __init__(self) -> None:
        self.jobs: list[dict[str, Any]] = []
        self.evaluations: list[dict[str, Any]] = []
        self.versions: list[dict[str, Any]] = []
        self.uploads = 0
        self.version = "1.0"
        self.mean: float | None = 0.9
        self.job_ends = "succeeded"
        self.evaluation_ends = "succeeded"
        self.moves_meanwhile = False
        self.approvals = 0  # that a promotion needs
        self.problems: list[dict[str, Any]] = []
        self.ill = False
        self.curve = True  # whether the result file of jobs is there
        self.away = 0  # so many answers of an evaluation that is followed are a restart
        self.asked: list[str] = []

    def answer(  # noqa: PLR0911, PLR0912 -- a table of routes
        self, method: str, path: str, query: dict[str, list[str]], body: Any
    ) -> tuple[int, Any]:
        self.asked.append(f"{method} {path}")
        if self.ill:
            return 503, self._error("service_unavailable", "away")
        match [method, *path.strip("/").split("/")[1:]]:
            case ["GET"]:  # /livez
                return 200, {"status": "ok"} | ({"version": self.version} if self.version else {})
            case ["GET", "id-token"]:  # GitHub's
                return 200, {"value": "token"}
            case ["POST", "tunepool", "oidc", "token"]:
                return 200, {"access_token": "key", "expires_in": 3600}
            case ["GET", "models", name]:
                known = name == "tiny" or name in {job["fine_tuned_model"] for job in self.jobs}
                return (
                    (200, {"id": name, "object": "model"}) if known else (404, self._error("model_not_found", "none"))
                )
            case ["GET", "tunepool", "models", name]:
                if name != "tiny":
                    return 404, self._error("model_not_found", f"no base model '{name}'")
                return 200, {"id": name, "commit": "c0ffee", "locator": "owner/tiny"}
            case ["GET", "files", "file-curve", "content"]:
                return (200, CURVE) if self.curve else (404, self._error("not_found", "deleted"))
            case ["GET", "files"]:
                return 200, {"object": "list", "data": [], "has_more": False}
            case ["POST", "files"]:
                self.uploads += 1
                return 200, {"id": f"file-{self.uploads}", "object": "file"}
            case ["POST", "tunepool", "preflights"]:
                return 200, {"id": "pre"}
            case ["GET", "tunepool", "preflights", _]:
                return 200, {"status": "succeeded", "error": None, "report": self._preflight()}
            case ["GET", "fine_tuning", "jobs"]:
                content = query.get("metadata[tunepool_content]", [""])[0]
                data = [job for job in reversed(self.jobs) if job["metadata"]["tunepool_content"] == content]
                return 200, {"object": "list", "data": data, "has_more": False}
            case ["POST", "fine_tuning", "jobs"]:
                return 200, self._job(body)
            case ["GET", "fine_tuning", "jobs", job_id]:
                return 200, next(job for job in self.jobs if job["id"] == job_id)
            case ["GET", "fine_tuning", "jobs", _, "events"]:
                return 200, {"object": "list", "data": [], "has_more": False}
            case ["GET", "tunepool", "evaluations"]:
                return 200, {"data": self.evaluations[::-1]}
            case ["GET", "tunepool", "evaluations", _] if self.away:
                self.away -= 1
                return 503, self._error("service_unavailable", "away")
            case ["GET", "tunepool", "evaluations", evaluation_id]:
                return 200, next(record for record in self.evaluations if record["id"] == evaluation_id)
            case ["POST", "tunepool", "evaluations"]:
                return 200, self._evaluation(body)
            case ["GET", "tunepool", "aliases", "bot@prod"]:
                return (200, self._alias()) if self.versions else (404, self._error("not_found", "none"))
            case ["POST", "tunepool", "aliases", _, "promote"]:
                return self._promote(body)
        return 404, self._error("not_found", path)

    def _error(self, code: str, message: str) -> Any:
        return {"error": {"message": message, "code": code, "param": None, "type": "x"}}

    def _preflight(self) -> dict[str, Any]:
        refusal = {"message": "The training file has 1 bad row."} if self.problems else None
        files = {"training": {"problems": self.problems, "warnings": []}}
        return {"ok": not self.problems, "files": files, "refusal": refusal, "tokens": None}

    def _job(self, body: Any) -> dict[str, Any]:
        number = len(self.jobs) + 1
        done = self.job_ends == "succeeded"
        job = {
            "id": f"ftjob-{number}",
            "object": "fine_tuning.job",
            "status": self.job_ends,
            "fine_tuned_model": f"ft:tiny:{number}" if done else None,
            "error": {"code": "nan_loss", "message": "the loss is no number"} if self.job_ends == "failed" else None,
            "metadata": body["metadata"],
            "result_files": ["file-curve"] if done else [],
            "body": body,
            "tunepool": {"usage": {"device_seconds": 12.5}, "superseded_by": "ftjob-9" if not done else None},
        }
        self.jobs.append(job)
        return job

    def _evaluation(self, body: Any) -> dict[str, Any]:
        means = dict.fromkeys(body["subjects"], 0.6) | {body["subjects"][0]: self.mean}
        measures = {name: {"measures": {"exact_match": {"n": 9, "mean": mean}}} for name, mean in means.items()}
        record = {
            "id": f"eval_{len(self.evaluations) + 1}",
            "status": self.evaluation_ends,
            "request": body,
            "answered": 9,
            "error": {"message": "no memory"},
            "report": {"subjects": measures, "differences": []},
        }
        self.evaluations.append(record)
        if self.away:
            return {**record, "status": "running"}
        if self.moves_meanwhile:
            self.versions.append({"number": len(self.versions) + 1, "model": "ft:other", "gate": None})
        return record

    def _alias(self) -> dict[str, Any]:
        newest = self.versions[-1]
        return {"id": "bot@prod", "model": newest["model"], "version": newest["number"], "history": self.versions[::-1]}

    def _promote(self, body: Any) -> tuple[int, Any]:
        record = next(record for record in self.evaluations if record["id"] == body["gate"]["evaluation"])
        roles = {"candidate": body["model"]}
        if "bot@prod" in record["request"]["subjects"]:
            roles["prod"] = "bot@prod"
        gate = judge(read_gate(body["gate"]["text"].encode()), read_report(record["report"], roles=roles)).document()
        if body.get("dry_run"):
            return 200, {"moved": False, "alias": None, "version": None, "gate": gate}
        if body["expected_version"] != len(self.versions):
            return 409, self._error("alias_moved", "version 1 names 'ft:other'")
        if self.approvals:
            promotion = {"id": "promo_1", "alias": "bot@prod", "approved_by": [], "approvals": self.approvals}
            waiting = {**promotion, "expires_at": 1_900_000_000}
            return 200, {"moved": False, "alias": None, "version": None, "gate": gate, "promotion": waiting}
        self.versions.append({"number": len(self.versions) + 1, "model": body["model"], "gate": gate})
        return 200, {"moved": True, "alias": self._alias(), "version": self.versions[-1], "gate": gate}


@pytest.fixture
def server() -> Iterator[tuple[Pretended, str]]:
    state = Pretended()

    class Handler(BaseHTTPRequestHandler):
        def _serve(self) -> None:
            data = self.rfile.read(int(self.headers.get("content-length") or 0))
            body = json.loads(data) if self.headers.get("content-type") == "application/json" and data else None
            parts = urlsplit(self.path)
            status, answer = state.answer(self.command, unquote(parts.path), parse_qs(parts.query), body)
            text = answer.encode() if isinstance(answer, str) else json.dumps(answer).encode()
            self.send_response(status)
            self.send_header("content-type", "text/csv" if isinstance(answer, str) else "application/json")
            self.send_header("content-length", str(len(text)))
            self.send_header("x-should-retry", "false")
            self.end_headers()
            self.wfile.write(text)

        do_GET = do_POST = _serve  # noqa: N815 -- the names of http.server

        def log_message(self, *_: Any) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as listening:
        thread = threading.Thread(target=listening.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        yield state, f"http://127.0.0.1:{listening.server_port}/v1"
        listening.shutdown()
        thread.join()


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "train.jsonl").write_text('{"prompt": "a", "completion": "b"}\n')
    (tmp_path / "gate.yaml").write_text(GATE)
    (tmp_path / "pipeline.yaml").write_text(PIPELINE)
    return tmp_path


def run(
    server: tuple[Pretended, str], folder: Path, *words: str, **environment: str
) -> tuple[int, dict[str, Any], str]:
    """(exit code, the document of --json, all that stdout holds)."""
    ours = {
        "GITHUB_ACTIONS": "",
        "GITHUB_STEP_SUMMARY": "",
        "GITHUB_OUTPUT": "",
        "GITHUB_SHA": "abc123",
        "GITHUB_REF_NAME": "main",
    }
    environment = {**ours, "OPENAI_BASE_URL": server[1], "OPENAI_API_KEY": "tp_x", **environment}
    done = CliRunner().invoke(main.cli, ["--json", "run", str(folder / "pipeline.yaml"), *words], env=environment)
    lines = done.stdout.splitlines()
    assert lines, (done.exception, done.stderr)
    return done.exit_code, json.loads(lines[-1]), done.stdout


def steps(told: dict[str, Any]) -> list[tuple[str, str]]:
    return [(step["name"], step["status"]) for step in told["steps"]]


def test_a_first_run_goes_all_the_way_and_says_which_commit_it_was(server: tuple[Pretended, str], folder: Path) -> None:
    code, told, _ = run(server, folder)

    assert (code, told["status"], told["model"], told["alias"]) == (0, "passed", "ft:tiny:1", "bot@prod")
    assert steps(told) == [(name, "passed") for name in ("preflight", "submit", "train", "evaluate", "gate", "promote")]
    assert told["device_seconds"] == 12.5
    job = server[0].jobs[0]["body"]
    assert job["metadata"]["git_sha"] == "abc123"
    assert job["tunepool"]["queue"] == {"group": "tickets:main", "supersede": "running"}
    assert server[0].versions[0]["model"] == "ft:tiny:1"


def test_an_alias_that_needs_approvals_has_not_moved_and_the_run_says_what_is_missing(
    server: tuple[Pretended, str], folder: Path
) -> None:
    server[0].approvals = 2

    code, told, _ = run(server, folder)

    assert (code, steps(told)[-1], told["alias"]) == (8, ("promote", "failed"), None)
    assert told["message"].startswith("bot@prod has not moved: promo_1 has 0 of 2 approvals and waits until 2030-03-17")

    server[0].approvals = 0
    code, told, _ = run(server, folder)
    assert (code, told["model"], len(server[0].jobs)) == (0, "ft:tiny:1", 1)


def test_the_same_content_trains_once_and_is_answered_by_the_earlier_adapter(
    server: tuple[Pretended, str], folder: Path
) -> None:
    run(server, folder)
    code, told, _ = run(server, folder, GITHUB_SHA="another")

    assert (code, told["model"]) == (0, "ft:tiny:1")
    assert steps(told) == [("train", "skipped"), ("promote", "skipped")]
    assert "Nothing changed" in told["message"]
    assert (len(server[0].jobs), len(server[0].evaluations)) == (1, 1)


def scripts() -> Iterator[Any]:
    """What a job of each example types once the command is installed, and what its system sets."""
    github = yaml.safe_load((CI / ".github/workflows/train.yml").read_text())["jobs"]["train"]["steps"]
    asks = {"ACTIONS_ID_TOKEN_REQUEST_URL": "{url}/id-token", "ACTIONS_ID_TOKEN_REQUEST_TOKEN": "bearer"}
    yield pytest.param([step["run"] for step in github if "run" in step], asks, id="github")
    gitlab = yaml.safe_load((CI / ".gitlab-ci.yml").read_text())["train"]["script"]
    yield pytest.param(gitlab, {"TUNEPOOL_ID_TOKEN": "token"}, id="gitlab")
    jenkins = re.findall(r"sh '(.*)'", (CI / "Jenkinsfile").read_text())
    yield pytest.param([line.replace(".venv/bin/", "") for line in jenkins], {"OPENAI_API_KEY": "k"}, id="jenkins")


@pytest.mark.slow
@pytest.mark.parametrize(("lines", "environment"), list(scripts()))
def test_the_script_of_each_example_promotes_a_model_in_the_environment_of_its_runner(
    server: tuple[Pretended, str], folder: Path, lines: list[str], environment: dict[str, str]
) -> None:
    typed = [line for line in lines if "pip install" not in line]
    given = {name: value.format(url=server[1]) for name, value in environment.items()}

    done = subprocess.run(
        ["bash", "-ec", "\n".join(typed)],
        cwd=folder,
        env={"PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}", "OPENAI_BASE_URL": server[1], **given},
        capture_output=True,
        text=True,
        timeout=patience(120),
        check=False,
    )

    assert done.returncode == 0, done.stdout + done.stderr
    assert server[0].versions[0]["model"] == "ft:tiny:1"
    assert (folder / "junit.xml").exists()
    assert ("OPENAI_API_KEY" in given) is ("POST /v1/tunepool/oidc/token" not in server[0].asked), "a stored key"


@pytest.mark.parametrize("words", [["run", "pipeline.yaml"], ["--help"]], ids=["unchanged", "help"])
def test_what_changed_nothing_and_what_asks_no_server_is_done_before_the_official_client_could_be_imported(
    server: tuple[Pretended, str], folder: Path, words: list[str]
) -> None:
    run(server, folder)
    program = (
        "import sys; from tunepool import main\n"
        "try: main.app()\n"
        "except SystemExit as ended: print('ended', ended.code, 'openai' in sys.modules)"
    )

    done = subprocess.run(
        [sys.executable, "-c", program, *words],
        cwd=folder,
        env={"PATH": os.environ["PATH"], "OPENAI_BASE_URL": server[1], "OPENAI_API_KEY": "k"},
        capture_output=True,
        text=True,
        timeout=patience(60),
        check=False,
    )

    assert done.stdout.splitlines()[-1] == "ended 0 False", done.stdout + done.stderr


@pytest.mark.parametrize("change", ["data", "settings", "server"])
def test_other_data_settings_or_another_version_of_the_server_train_again(
    server: tuple[Pretended, str], folder: Path, change: str
) -> None:
    run(server, folder)
    if change == "data":
        (folder / "train.jsonl").write_text('{"prompt": "a", "completion": "c"}\n')
    elif change == "settings":
        (folder / "pipeline.yaml").write_text(PIPELINE.replace("n_epochs: 1", "n_epochs: 2"))
    else:
        server[0].version = "2.0"
    code, told, _ = run(server, folder)

    assert (code, told["model"]) == (0, "ft:tiny:2")


def test_a_base_model_that_is_not_there_costs_no_upload(server: tuple[Pretended, str], folder: Path) -> None:
    (folder / "pipeline.yaml").write_text(PIPELINE.replace("model: tiny", "model: huge"))

    code, told, _ = run(server, folder)

    assert (code, server[0].uploads) == (2, 0)
    assert "no base model 'huge'" in told["message"]


def test_a_server_that_tells_no_version_is_refused_before_anything_is_sent(
    server: tuple[Pretended, str], folder: Path
) -> None:
    server[0].version = ""  # what it trains cannot be told from what another version would

    code, told, _ = run(server, folder)

    assert (code, server[0].uploads) == (2, 0)
    assert "Upgrade it" in told["message"]


def test_worse_data_fails_the_gate_and_the_alias_stays(server: tuple[Pretended, str], folder: Path) -> None:
    run(server, folder)
    (folder / "train.jsonl").write_text('{"prompt": "a", "completion": "worse"}\n')
    server[0].mean = 0.55  # above the bar, below what prod has
    code, told, _ = run(server, folder)

    assert (code, told["status"]) == (1, "gate_failed")
    assert "candidate.exact_match >= prod.exact_match: 0.55 >= 0.6 does not hold" in told["message"]
    assert [version["model"] for version in server[0].versions] == ["ft:tiny:1"]


def test_a_runner_that_died_after_each_step_goes_on_from_there(server: tuple[Pretended, str], folder: Path) -> None:
    state = server[0]
    run(server, folder)
    state.versions.clear()  # it died before it promoted
    told = run(server, folder)[1]
    assert steps(told) == [("train", "skipped"), ("evaluate", "passed"), ("gate", "passed"), ("promote", "passed")]
    state.versions.clear()
    state.evaluations.clear()  # it died before it asked
    assert run(server, folder)[0] == 0

    assert (len(state.jobs), len(state.evaluations)) == (1, 1)


def test_a_server_that_restarts_while_an_evaluation_is_awaited_is_waited_for(
    server: tuple[Pretended, str], folder: Path
) -> None:
    server[0].away = 4  # plainly and by the official client, twice

    code, told, _ = run(server, folder)

    assert (code, told["status"], server[0].away) == (0, "passed", 0)


@pytest.mark.parametrize(
    ("state", "code", "words"),
    [
        ({"job_ends": "failed"}, 3, "the loss is no number"),
        ({"job_ends": "cancelled"}, 4, "superseded by ftjob-9"),
        ({"evaluation_ends": "failed"}, 3, "no memory"),
        ({"evaluation_ends": "cancelled"}, 4, "eval_1 was cancelled"),
        ({"mean": None}, 7, "no finite mean"),
        ({"mean": 0.1}, 1, "0.1 >= 0.5 does not hold"),
        ({"moves_meanwhile": True}, 4, "moved by another"),
        ({"ill": True}, 6, "not available"),
        ({"problems": [{"line": 3, "column": 9, "message": "no 'completion'", "code": "missing"}]}, 2, "bad row"),
    ],
)
def test_each_end_has_its_own_exit_code(
    server: tuple[Pretended, str], folder: Path, state: dict[str, Any], code: int, words: str
) -> None:
    for name, value in state.items():
        setattr(server[0], name, value)

    exit_code, told, _ = run(server, folder)

    assert (exit_code, told["exit_code"]) == (code, code)
    assert words in told["message"]
    assert "ft:tiny:1" not in [version["model"] for version in server[0].versions]


def test_work_that_is_not_done_in_time_goes_on_and_is_exit_5(server: tuple[Pretended, str], folder: Path) -> None:
    server[0].evaluation_ends = "running"

    code, told, _ = run(server, folder, "--timeout", "1")

    assert (code, told["status"]) == (5, "timeout")
    assert "eval_1 is running; it goes on" in told["message"]


def test_no_server_is_exit_6_and_none_known_is_exit_2(folder: Path) -> None:
    assert run((Pretended(), "http://127.0.0.1:1/v1"), folder)[0] == 6
    assert run((Pretended(), ""), folder, OPENAI_BASE_URL="", TUNEPOOL_HOME="/nowhere")[0] in {2, 6}


def test_faults_of_the_data_stand_at_file_and_line_in_every_report(server: tuple[Pretended, str], folder: Path) -> None:
    server[0].problems = [{"line": 3, "column": 9, "message": "100%, no\n'completion'", "code": "missing"}]
    junit, quality, summary = folder / "junit.xml", folder / "quality.json", folder / "summary.md"
    files = ("--junit", str(junit), "--code-quality", str(quality))

    code, told, out = run(server, folder, *files, GITHUB_ACTIONS="true", GITHUB_STEP_SUMMARY=str(summary))

    assert code == 2
    assert "::error file=train.jsonl,line=3,col=9::100%25, no%0A'completion'" in out.splitlines()
    (finding,) = json.loads(quality.read_text())
    assert finding["location"] == {"path": "train.jsonl", "lines": {"begin": 3}}
    assert {"description", "check_name", "fingerprint", "severity", "location"} == finding.keys()
    assert "`train.jsonl`, line 3" in summary.read_text()
    suite = ElementTree.parse(junit).getroot()  # noqa: S314 -- our own file
    assert (suite.get("tests"), suite.get("failures")) == ("1", "1")
    assert told["data_faults"][0]["line"] == 3


def test_a_passed_run_is_a_test_suite_and_a_table_of_figures(server: tuple[Pretended, str], folder: Path) -> None:
    junit, summary = folder / "junit.xml", folder / "summary.md"

    run(server, folder, "--junit", str(junit), "--summary", str(summary))

    suite = ElementTree.parse(junit).getroot()  # noqa: S314 -- our own file
    assert (suite.get("tests"), suite.get("failures"), suite.get("errors")) == ("8", "0", "0")
    names = [case.get("name") for case in suite if case.get("classname") == "gate"]
    assert names[0] == "candidate.exact_match >= 0.5"
    text = summary.read_text()
    assert "| candidate.exact_match | 0.9 | - to - | 9 |" in text
    assert "| ft:tiny:1 | exact_match | 0.9 | - to - | 9 |" in text
    assert "| tiny | exact_match | 0.6 | - to - | 9 |" in text
    assert "| train loss | 4 | █▆▁ | 1 |" in text
    assert "| valid loss | 3 | █▁ | 2 |" in text
    assert "12.5 device-seconds" in text
    assert f"[ftjob-1]({server[1].removesuffix('/v1')}/ui/jobs/ftjob-1)" in text


def test_a_result_file_that_is_gone_costs_the_curves_and_nothing_else(
    server: tuple[Pretended, str], folder: Path
) -> None:
    server[0].curve = False

    code, told, _ = run(server, folder)

    assert (code, told["curves"]) == (0, {})


def test_later_steps_of_a_github_job_read_model_and_verdict(server: tuple[Pretended, str], folder: Path) -> None:
    outputs = folder / "outputs"
    outputs.write_text("other=step\n")

    run(server, folder, GITHUB_OUTPUT=str(outputs))

    known = dict(line.split("=", 1) for line in outputs.read_text().splitlines())
    assert known == {
        "other": "step",
        "status": "passed",
        "model": "ft:tiny:1",
        "job": "ftjob-1",
        "evaluation": "eval_1",
        "alias": "bot@prod",
    }


def test_no_text_of_a_server_makes_a_second_output() -> None:
    told = RunOutcome("p", model="ft:x\nstatus=passed", exit_code=GATE_FAILED)

    assert reports.outputs(told) == "status=gate_failed\nmodel=ft:x status=passed\n"


def test_a_long_curve_is_drawn_by_means_and_what_is_no_number_is_no_point() -> None:
    text = "step,train_loss,valid_loss\n1,nan,\n2,,\n" + "".join(f"{n},{500 - n},\n" for n in range(3, 403))

    drawn = curves.read(text)

    assert list(drawn) == ["train_loss"]
    assert len(drawn["train_loss"]) == 400
    assert (len(curves.bars(drawn["train_loss"])), curves.bars([1.0, 1.0])) == (curves.WIDTH, "▁▁")


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("name: x\n", "pipeline.yaml:1:1: training: Field required"),
        (PIPELINE.replace("model: tiny", "modle: tiny"), "pipeline.yaml:3:1: modle: Extra inputs are not permitted"),
        (PIPELINE.replace("{split: 0.5}", "{split: 5}"), "pipeline.yaml:6:18: evaluate.items.split:"),
        (PIPELINE.replace("{split: 0.5}", "{split: 0.5, suite: general}"), "exactly one of file, split and suite"),
        (PIPELINE.replace("gate: gate.yaml\n", ""), "promote needs gate"),
        (PIPELINE + "name: again\n", "pipeline.yaml:9:1: 'name' stands twice"),
        (PIPELINE.replace("gate.yaml", "nowhere.yaml"), "there is no file"),
        ("a: &a [*a]\n", "no anchors"),
        ("[" * 1000, "deeper than 12"),
    ],
)
def test_a_pipeline_that_cannot_be_read_is_refused_before_a_server_is_asked(
    server: tuple[Pretended, str], folder: Path, text: str, words: str
) -> None:
    (folder / "pipeline.yaml").write_text(text)

    code, told, _ = run(server, folder)

    assert code == 2
    assert words in told["message"]
    assert server[0].asked == []


def test_a_gate_that_cannot_be_read_is_told_with_its_own_line(server: tuple[Pretended, str], folder: Path) -> None:
    (folder / "gate.yaml").write_text("assertions:\n  - candidate.x\n")

    code, told, _ = run(server, folder)

    assert (code, server[0].asked) == (2, [])
    assert "gate.yaml:2:5" in told["message"]


def test_the_published_schema_is_the_one_in_force_and_accepts_a_pipeline() -> None:
    published = json.loads((ROOT / "docs/pipeline.schema.json").read_text(encoding="utf-8"))

    assert published == document.schema()
    jsonschema.validate(yaml.safe_load(PIPELINE), published)
