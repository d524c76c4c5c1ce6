"""A preflight from the wire to its answer: a real API, database and store, and the real program that reads the rows."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx2
import pytest
from sqlalchemy import text

from shared.chores import preflights
from shared.chores import table as chores
from shared.chores.preflights import PREFLIGHT
from shared.lease import lease as leasing
from shared.lease.lease import MAX_FAILURES
from shared.settings import Settings, child_environment
from shared.store.db import session_scope
from shared.store.tables import PreflightRow
from tests.factories import make_key, make_worker
from tests.fake_hub import catalogue_entry, serving
from tests.forked import PARENT, run_forked
from tests.integration.conftest import Api
from tests.live import live_api
from tests.patience import patience
from tests.train.tiny import chat, chat_rows, make_model_directory
from worker.chores.checks import check_next_file
from worker.chores.preflighting import examine_next
from worker.host.flags import SharedFlags
from worker.host.host import Host, open_host

GIB = 1 << 30
ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A home whose catalogue has the tiny model."""
    home = tmp_path_factory.mktemp("preflights")
    make_model_directory(home / "model")
    path = f'[models.tiny]\nsource = "path"\npath = "{home / "model"}"\n'
    far = catalogue_entry("far", (home / "model" / "config.json").read_bytes())
    (home / "models.toml").write_text(f"{path}{far}")
    return home


@pytest.fixture(scope="module")
def settings(api: Api, folder: Path) -> Settings:
    return api.settings.model_copy(update={"models_file": folder / "models.toml", "min_training_rows": 2})


@pytest.fixture(scope="module")
def http(api: Api, settings: Settings) -> Iterator[httpx2.Client]:
    with (
        live_api(settings) as url,
        httpx2.Client(base_url=url, headers={"Authorization": f"Bearer {api.key}"}, timeout=patience(30)) as client,
    ):
        yield client


@pytest.fixture
def host(settings: Settings) -> Iterator[Host]:
    opened = open_host(settings, flags=SharedFlags())
    yield opened
    opened.engine.dispose()


def upload(http: httpx2.Client, rows: list[Any], *, name: str = "rows.jsonl") -> str:
    content = "".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows)
    made = http.post("/v1/files", files={"file": (name, content.encode())}, data={"purpose": "fine-tune"})
    assert made.status_code == 200, made.text
    return made.json()["id"]


def ask(http: httpx2.Client, training: str, **body: Any) -> dict[str, Any]:
    made = http.post("/v1/tunepool/preflights", json={"model": "tiny", "training_file": training, **body})
    assert made.status_code == 200, made.text
    return made.json()


def pull(host: Host, program: str = "", **settings: str) -> None:
    """The CPU lane in a process of its own: a supervisor kills whatever it has left, and our database is our child."""
    known = {
        "DATABASE_URL": host.settings.database_url,
        "REDIS_URL": "",
        "TUNEPOOL_HOME": str(host.settings.home),
        "TUNEPOOL_MODELS_FILE": str(host.settings.models_file),
        "TUNEPOOL_MIN_TRAINING_ROWS": "2",
    }
    environment = child_environment(**known, **settings)
    if program:
        lane = [sys.executable, "-c", program, "cpu", str(os.getpid())]
        subprocess.run(lane, env=environment, cwd=ROOT, check=True, timeout=patience(120))
    else:
        done = run_forked(["-m", "worker.pull", "cpu", PARENT], environment=environment, seconds=patience(120))
        assert done.returncode == 0, done.stderr


def answered(http: httpx2.Client, host: Host, asked: dict[str, Any], **settings: str) -> dict[str, Any]:
    pull(host, **settings)
    return http.get(f"/v1/tunepool/preflights/{asked['id']}").json()


def test_a_preflight_tells_all_that_a_job_would_do_and_trains_nothing(http: httpx2.Client, host: Host) -> None:
    with session_scope(host.engine) as session:
        worker = make_worker(session, devices=1, pool="default", bfloat16=True)
        make_worker(session, devices=1, pool="default", total_bytes=GIB // 2, free_bytes=GIB // 2, bfloat16=True)
    training = upload(http, [*chat_rows(30), chat_rows(30)[4]])
    validation = upload(http, [chat_rows(30)[7], chat("unseen?", "yes")])

    asked = ask(http, training, validation_file=validation, preview_rows=[2], seed=7)
    assert asked["status"] == "queued"
    done = answered(http, host, asked)

    report = done["report"]
    assert (done["status"], report["ok"], report["refusal"]) == ("succeeded", True, None)
    assert report["files"]["training"]["rows"] == report["tokens"]["training"]["rows"] == 31
    assert report["tokens"]["training"]["duplicates"]["rows"] == [31]
    assert report["tokens"]["leakage"]["rows"]["rows"] == [1]
    (row,) = report["tokens"]["preview"]
    assert (row["row"], [span["text"] for span in row["sequences"][0]["spans"]]) == (2, ["2<|im_end|>"])
    assert report["spec"]["seed"] == 7
    assert all(one["reason"] for one in report["auto"])
    assert report["run"]["steps"] > 0
    assert "the formula alone" in report["memory"]["sure"]
    fits = {one["id"]: one for one in report["devices"]}
    assert fits[f"{worker.id}:0"]["fits"]
    small = next(one for one in report["devices"] if one["offered_bytes"] == GIB // 2)
    assert not small["fits"]
    assert "needs" in small["reason"]
    with session_scope(host.engine) as session:
        assert session.scalar(text("select count(*) from jobs where base_model = 'tiny'")) == 0
    assert not (host.work / asked["id"]).exists()


SAMPLING = """
import runpy, sys
from worker.chores import sampling
sampling.SAMPLED_FROM_BYTES = 1
runpy.run_module("worker.pull", run_name="__main__")
"""


def test_a_large_file_is_answered_from_a_sample_before_all_its_rows_are_read(http: httpx2.Client, host: Host) -> None:
    rows = chat_rows(40)
    training = upload(http, rows, name="large.jsonl")
    asked = ask(http, training, validation_file=upload(http, rows[:3]))
    assert (asked["progress"], asked["sample"]) == (None, None)

    pull(host, program=SAMPLING)
    done = http.get(f"/v1/tunepool/preflights/{asked['id']}").json()

    sample, report = done["sample"], done["report"]
    assert (done["status"], done["progress"], sample["ok"], report["ok"]) == ("succeeded", None, True, True)
    # All rows are in the first of its pieces, so that what is estimated is what is counted.
    assert (sample["rows"], sample["of_rows"], sample["refused"]) == (40, 40, 0)
    assert sample["mean_tokens"] == report["tokens"]["training"]["mean_tokens"]
    assert (sample["run"], sample["memory"]) == (report["run"], report["memory"])
    with session_scope(host.engine) as session:
        assert session.get_one(PreflightRow, asked["id"]).progress["rows_total"] == 43


def test_a_bad_file_is_answered_with_every_error_by_line_and_column(http: httpx2.Client, host: Host) -> None:
    bad = {"messages": [{"role": "bot", "content": "x"}]}
    training = upload(http, [chat("u", "a"), bad, '{"messages": [', chat("v", "b")])

    report = answered(http, host, ask(http, training))["report"]

    assert report["ok"] is False
    assert report["refusal"]["param"] == "training_file"
    problems = report["files"]["training"]["problems"]
    assert [(one["line"], one["code"]) for one in problems][:2] == [(2, "unknown_role"), (3, "invalid_json")]
    assert problems[0]["column"] == 16
    assert report["tokens"] is None


def test_a_template_that_fails_is_the_jobs_fault_and_names_the_row(http: httpx2.Client, host: Host) -> None:
    template = "{% for m in messages %}{% if m.content == 'bad' %}{{ raise_exception('no such turn') }}{% endif %}"
    template += "{{ m.content }}<|im_end|>{% endfor %}"
    training = upload(http, [chat("u", "a"), chat("bad", "b"), chat("w", "c")])

    asked = ask(http, training, tunepool={"training": {"chat_template": template}})
    report = answered(http, host, asked)["report"]

    assert report["ok"] is False
    assert report["tokens"]["training"]["faults"][0]["row"] == 2
    assert "no such turn" in report["tokens"]["training"]["faults"][0]["message"]


def test_the_wrong_objective_for_the_rows_is_a_refusal(http: httpx2.Client, host: Host) -> None:
    asked = ask(http, upload(http, chat_rows(5)), method={"type": "dpo"})

    assert "preference rows" in answered(http, host, asked)["report"]["refusal"]["message"]


@pytest.mark.parametrize(
    ("body", "param"),
    [
        ({"training_file": "file-0193a1b2c3d4e5f60718293a4b5c6d7e"}, "training_file"),
        ({"preview_rows": [0]}, "preview_rows.0"),
        ({"preview_rows": list(range(1, 40))}, "preview_rows"),
        ({"model": "nothing"}, "model"),
        ({"unknown": 1}, "unknown"),
        ({"tunepool": {"adapter": {"method": "full", "r": 8}}}, "tunepool.adapter.r"),
    ],
)
def test_what_a_job_would_refuse_at_submit_a_preflight_refuses_too(
    http: httpx2.Client, host: Host, body: dict[str, Any], param: str
) -> None:
    wanted = {"model": "tiny", "training_file": upload(http, chat_rows(3)), **body}
    refused = http.post("/v1/tunepool/preflights", json=wanted)

    assert refused.status_code in {400, 404}, refused.text
    assert refused.json()["error"]["param"] == param


def test_nobody_elses_preflight_exists(http: httpx2.Client, host: Host, stranger: str) -> None:
    asked = ask(http, upload(http, chat_rows(3)))
    theirs = {"Authorization": f"Bearer {stranger}"}

    assert http.get(f"/v1/tunepool/preflights/{asked['id']}", headers=theirs).status_code == 404
    assert http.get("/v1/tunepool/preflights", headers=theirs).json()["data"] == []
    listed = http.get("/v1/tunepool/preflights", params={"limit": 1, "status": "queued"}).json()
    assert [one["id"] for one in listed["data"]] == [asked["id"]]
    answered(http, host, asked)


def test_a_program_that_dies_is_no_answer_and_says_so(http: httpx2.Client, host: Host) -> None:
    asked = ask(http, upload(http, chat_rows(3)))
    done = answered(http, host, asked, TUNEPOOL_PREFLIGHT="tests.no_such_program")

    assert (done["status"], done["error"]["code"]) == ("failed", "preflight_failed")
    assert done["report"] is None


def test_a_program_that_does_not_end_is_ended(http: httpx2.Client, host: Host) -> None:
    asked = ask(http, upload(http, chat_rows(3)))
    done = answered(http, host, asked, TUNEPOOL_PREFLIGHT_SECONDS="0.3")

    assert done["error"]["code"] == "preflight_timeout"


def test_an_examiner_that_was_thought_dead_writes_nothing(host: Host, http: httpx2.Client) -> None:
    asked = ask(http, upload(http, chat_rows(3)))
    while check_next_file(host):
        pass
    with session_scope(host.engine) as session:
        slow = preflights.claim(session, worker_id="slow", lease_seconds=-60)
    with session_scope(host.engine) as session:
        chores.reap(session, grace_seconds=5)
        quick = preflights.claim(session, worker_id="quick", lease_seconds=60)
    assert slow is not None
    assert quick is not None
    assert slow.lease.id == quick.lease.id == asked["id"]
    with session_scope(host.engine) as session:
        assert not preflights.finish(session, slow, {"ok": False, "files": {}, "refusal": None})
        assert preflights.finish(session, quick, {"ok": True, "files": {}, "refusal": None})
        assert session.get_one(PreflightRow, asked["id"]).report["ok"] is True


def test_a_preflight_that_ends_three_examiners_is_given_up(host: Host, http: httpx2.Client) -> None:
    asked = ask(http, upload(http, chat_rows(3)))
    while check_next_file(host):
        pass
    for _ in range(MAX_FAILURES):
        with session_scope(host.engine) as session:
            assert preflights.claim(session, worker_id="gone", lease_seconds=-60) is not None
        with session_scope(host.engine) as session:
            assert chores.reap(session, grace_seconds=5) == [asked["id"]]
    with session_scope(host.engine) as session:
        assert preflights.claim(session, worker_id="next", lease_seconds=60) is None
    assert http.get(f"/v1/tunepool/preflights/{asked['id']}").json()["error"]["code"] == "preflight_lost"


def test_a_preflight_is_cancelled_by_its_owner_or_an_administrator_and_its_examiner_writes_nothing(
    http: httpx2.Client, host: Host, stranger: str
) -> None:
    asked = [ask(http, upload(http, chat_rows(3))) for _ in range(2)]
    while check_next_file(host):
        pass
    with session_scope(host.engine) as session:
        held = preflights.claim(session, worker_id="examiner", lease_seconds=60)
        _, administrator = make_key(session, scopes=("*", "admin"))
    assert held is not None
    own, other = (f"/v1/tunepool/preflights/{one['id']}" for one in asked)

    assert http.delete(own, headers={"Authorization": f"Bearer {stranger}"}).status_code == 404
    ended = http.delete(own).json()
    assert (ended["status"], ended["error"]["code"], ended["report"]) == ("failed", "cancelled", None)
    assert http.delete(own).status_code == 409
    assert http.delete(other, headers={"Authorization": f"Bearer {administrator}"}).json()["status"] == "failed"
    with session_scope(host.engine) as session:
        assert not leasing.keep(session, PREFLIGHT, held.lease, lease_seconds=60), "its program is not stopped"
        assert not preflights.finish(session, held, {"ok": True, "files": {}, "refusal": None})
    assert http.get(own).json() == ended


def test_a_drained_worker_gives_the_preflight_back(host: Host, http: httpx2.Client) -> None:
    asked = ask(http, upload(http, chat_rows(3)))
    while check_next_file(host):
        pass
    host.flags.drain()

    assert not examine_next(host)
    assert http.get(f"/v1/tunepool/preflights/{asked['id']}").json()["status"] == "queued"
    assert answered(http, host, asked)["status"] == "succeeded"


def cli(http: httpx2.Client, api: Api, *words: str, **environment: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [Path(sys.executable).parent / "tunepool", *words],
        env={
            "PATH": "/usr/bin:/bin",
            "OPENAI_BASE_URL": f"{http.base_url}/v1",
            "OPENAI_API_KEY": api.key,
            "COLUMNS": "200",
            **environment,
        },
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def finished(command: subprocess.Popen[str], host: Host) -> tuple[int, str, str]:
    """The command's end; the lane is pulled until then."""
    while command.poll() is None:
        pull(host)
    out, err = command.communicate(timeout=patience(60))
    return command.returncode, out, err


def test_a_pipeline_asks_before_it_trains_and_reads_a_table(
    http: httpx2.Client, host: Host, api: Api, tmp_path: Path
) -> None:
    file = tmp_path / "train.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in [*chat_rows(20), chat_rows(20)[3]]), encoding="utf-8")

    code, out, err = finished(cli(http, api, "preflight", str(file), "--model", "tiny", "--row", "2"), host)

    assert code == 0, out + err
    assert "The job would train." in out
    assert "up to" in out
    assert "row 2, row:" in out
    assert "memory" in out


def test_a_pipeline_with_bad_rows_stops_with_exit_1_and_the_line(
    http: httpx2.Client, host: Host, api: Api, tmp_path: Path
) -> None:
    file = tmp_path / "train.jsonl"
    file.write_text('{"messages": [{"role": "bot", "content": "x"}]}\n' * 3, encoding="utf-8")

    code, out, err = finished(cli(http, api, "--json", "preflight", str(file), "--model", "tiny"), host)

    assert code == 1, out + err
    assert json.loads(out)["report"]["files"]["training"]["problems"][0]["line"] == 1


def test_a_pipeline_that_is_interrupted_cancels_its_preflight(http: httpx2.Client, host: Host, api: Api) -> None:
    file_id = upload(http, chat_rows(20))
    # The client's log tells that its one POST is answered, and that it begins to ask how the preflight is.
    with cli(http, api, "preflight", file_id, "--model", "tiny", OPENAI_LOG="debug") as command:
        assert command.stderr is not None
        lines = iter(command.stderr.readline, "")
        for sign in ("HTTP Response: POST 200", "Sending HTTP Request: GET"):
            assert any(sign in line for line in lines), sign
        (asked,) = http.get("/v1/tunepool/preflights", params={"status": "queued"}).json()["data"]
        command.send_signal(signal.SIGINT)
        command.communicate(timeout=patience(60))

    assert command.returncode != 0
    ended = http.get(f"/v1/tunepool/preflights/{asked['id']}").json()
    assert (ended["status"], ended["error"]["code"]) == ("failed", "cancelled")


NO_SYSTEM = (
    "{% for m in messages %}{% if m['role'] == 'system' %}{{ raise_exception('No system text here!') }}{% endif %}"
    "{{ '<|im_start|>' + m['role'] + '\\n' + m['content'] + '<|im_end|>\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)


def test_a_job_whose_trainer_would_refuse_a_row_fails_before_it_is_queued(http: httpx2.Client, host: Host) -> None:
    rows = chat_rows(10)
    for place in (6, 8):
        rows[place]["messages"].insert(0, {"role": "system", "content": "Be brief."})
    training, plain = upload(http, rows), upload(http, chat_rows(4))

    def submit(training_file: str, **training: Any) -> str:
        body = {"model": "tiny", "training_file": training_file, "tunepool": {"training": training}}
        made = http.post("/v1/fine_tuning/jobs", json=body)
        assert made.status_code in {200, 201}, made.text
        return str(made.json()["id"])

    asked = {
        "good": submit(training),
        "refused": submit(training, chat_template=NO_SYSTEM),
        "plain": submit(plain, chat_template=NO_SYSTEM),
        "cut": submit(plain, max_length=16),
    }
    pull(host)
    jobs = {name: http.get(f"/v1/fine_tuning/jobs/{job_id}").json() for name, job_id in asked.items()}

    assert {name: job["status"] for name, job in jobs.items()} == {
        "good": "queued",
        "refused": "failed",
        "plain": "queued",
        "cut": "failed",
    }
    error = jobs["refused"]["error"]
    assert (error["code"], error["param"]) == ("chat_template_failed", "training_file")
    assert error["message"].startswith(f"training_file '{training}', row 7: The chat template fails on")
    assert "No system text here. " in error["message"]
    assert error["message"].endswith("(2 rows are refused.)")
    assert jobs["cut"]["error"]["code"] == "no_trainable_tokens"
    assert all(job["tunepool"]["attempts"] == [] for job in jobs.values())


def test_rows_are_judged_before_the_queue_by_a_host_that_does_not_hold_the_base(
    http: httpx2.Client, host: Host, folder: Path
) -> None:
    rows = chat_rows(4)
    rows[2]["messages"].insert(0, {"role": "system", "content": "Be brief."})
    training = upload(http, rows)

    def submit(**training_options: Any) -> str:
        body = {"model": "far", "training_file": training, "tunepool": {"training": training_options}}
        made = http.post("/v1/fine_tuning/jobs", json=body)
        assert made.status_code in {200, 201}, made.text
        return str(made.json()["id"])

    refused, good = submit(chat_template=NO_SYSTEM), submit()
    with serving({file.name: file.read_bytes() for file in (folder / "model").iterdir()}) as hub:
        pull(host, HF_ENDPOINT=hub.url, HF_HUB_OFFLINE="0")
    jobs = [http.get(f"/v1/fine_tuning/jobs/{job_id}").json() for job_id in (refused, good)]

    assert [job["status"] for job in jobs] == ["failed", "queued"]
    assert f"training_file '{training}', row 3: The chat template fails on" in jobs[0]["error"]["message"]
    assert "tokenizer.json" in hub.given
    assert "model.safetensors" not in hub.given
    assert all(job["tunepool"]["attempts"] == [] for job in jobs)
