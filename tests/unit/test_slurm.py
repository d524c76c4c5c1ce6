"""Slurm's programs: what they are asked, and how their answers are read, honest and otherwise."""

from __future__ import annotations

import subprocess
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from shared.jobs.cluster_attempts import attempt_name, read_name
from shared.settings import Settings
from standalone import main
from tests.fake_slurm import FakeSlurm
from worker.attempt import dispatcher
from worker.attempt.cluster_places import places
from worker.attempt.engines import ClusterJobRequest, EngineAway, EngineRefused
from worker.attempt.slurm import Slurm, batch_script
from worker.host.host import beside, identify

NAME = attempt_name("ftjob-0199", 1)
OTHER = attempt_name("ftjob-0200", 2)


def slurm(fake: FakeSlurm, **settings: Any) -> Slurm:
    return Slurm(Settings(**settings), run=fake)


def test_an_attempt_is_submitted_under_its_name_once_and_with_what_lets_it_save() -> None:
    fake = FakeSlurm()

    number = slurm(fake, slurm_options="--partition=gpu --time=08:00:00 --job-name=mine --output=/logs/%j").submit(
        ClusterJobRequest(NAME, devices=4)
    )

    job = fake.jobs[int(number)]
    assert job.name == NAME
    assert job.options["--gres"] == "gpu:4"
    assert job.options["--partition"] == "gpu"
    assert job.options["--output"] == "/logs/%j"
    assert job.options["--signal"] == "B:TERM@120"
    assert "--no-requeue" in job.options
    assert job.options["--export"] == "NIL"


def test_the_batch_script_becomes_the_worker_of_that_attempt_and_reads_the_setup_of_the_node_first() -> None:
    settings = Settings(slurm_setup="/etc/tunepool/node.env", slurm_command="/opt/t/bin/tunepool-server")

    assert batch_script(settings, NAME).splitlines() == [
        "#!/bin/sh",
        "set -e",
        "set -a; . /etc/tunepool/node.env; set +a",
        f"exec /opt/t/bin/tunepool-server worker --attempt {NAME}",
    ]


def test_a_place_that_is_a_processor_asks_for_no_gpu() -> None:
    fake = FakeSlurm()

    slurm(fake, cluster_device_kind="cpu").submit(ClusterJobRequest(NAME, devices=1))

    assert "--gres" not in fake.jobs[1001].options


def test_no_secret_of_ours_reaches_a_program(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DATABASE_URL", "postgresql://secret")
    monkeypatch.setenv("SLURM_CONF", "/etc/slurm/slurm.conf")
    seen: dict[str, str] = {}

    def run(command: list[str], *, env: dict[str, str], **_: Any) -> subprocess.CompletedProcess[str]:
        seen.update(env)
        return subprocess.CompletedProcess(command, 0, "", "")

    Slurm(Settings(), run=run).listed()

    assert "DATABASE_URL" not in seen
    assert seen["SLURM_CONF"] == "/etc/slurm/slurm.conf"
    assert seen["LC_ALL"] == "C"  # its words are read


def test_what_waits_is_shown_in_slurms_words_and_what_runs_with_its_node() -> None:
    fake = FakeSlurm()
    cluster = slurm(fake)
    for name in (NAME, OTHER):
        cluster.submit(ClusterJobRequest(name, devices=1))
    fake.wait("ReqNodeNotAvail, UnavailableNodes:gpu[1-3]")
    fake.begin(fake.jobs[1002])

    waits, runs = cluster.listed()

    assert (waits.id, waits.name, waits.waits) == ("1001", NAME, True)
    assert waits.words == "job 1001 is PENDING (ReqNodeNotAvail, UnavailableNodes:gpu[1-3])"
    assert (runs.waits, runs.words) == (False, "job 1002 is RUNNING on gpu-node-7")


@pytest.mark.parametrize(
    "name", ["interactive", "tunepool-", f"{NAME}x", "tunepool-ftjob-1-0", "tunepool-ftjob-1-1;rm"]
)
def test_jobs_of_other_people_are_none_of_ours(name: str) -> None:
    fake = FakeSlurm()
    slurm(fake).submit(ClusterJobRequest(name, devices=1))

    assert slurm(fake).listed() == []
    assert read_name(name) is None


def test_a_name_is_one_that_kubernetes_takes_too_and_is_read_back() -> None:
    name = attempt_name("ftjob-" + "f" * 32, 999_999)

    assert len(name) <= 63
    assert read_name(name) == ("ftjob-" + "f" * 32, 999_999)


@pytest.mark.parametrize("weather", ["down", "hang"])
def test_a_cluster_that_does_not_answer_is_away_whatever_it_is_asked(weather: str) -> None:
    fake = FakeSlurm(weather=dict.fromkeys(("sbatch", "squeue", "scancel"), weather))
    cluster = slurm(fake)

    with pytest.raises(EngineAway, match=r"controller|no answer"):
        cluster.listed()
    with pytest.raises(EngineAway, match=r"controller|no answer"):
        cluster.submit(ClusterJobRequest(NAME, devices=1))


def test_programs_that_are_not_there_are_a_cluster_that_is_away(tmp_path: Path) -> None:
    with pytest.raises(EngineAway, match="squeue cannot be started: No such file"):
        Slurm(Settings(slurm_bin=tmp_path)).listed()


def test_an_answer_that_is_no_number_may_have_been_a_submission() -> None:
    with pytest.raises(EngineAway, match="instead of a number"):
        slurm(FakeSlurm(weather={"sbatch": "garbage"})).submit(ClusterJobRequest(NAME, devices=1))


def test_arrays_of_the_same_user_are_passed_over() -> None:
    def run(command: list[str], **_: Any) -> subprocess.CompletedProcess[str]:
        return subprocess.CompletedProcess(command, 0, f"77_[1-9]|PENDING||Priority|{NAME}\n", "")

    assert Slurm(Settings(), run=run).listed() == []


def test_a_list_that_nobody_can_read_is_none() -> None:
    with pytest.raises(EngineAway, match="instead of a list"):
        slurm(FakeSlurm(weather={"squeue": "garbage"})).listed()


@pytest.mark.parametrize(
    ("words", "kind"),
    [
        ("Batch job submission failed: Invalid account or account/partition combination specified", EngineRefused),
        ("Batch job submission failed: Job violates accounting/QOS policy (job submit limit)", EngineRefused),
        ("Batch job submission failed: Socket timed out on send/recv operation", EngineAway),
        ("Slurm temporarily unable to accept job, sleeping and retrying", EngineAway),
    ],
)
def test_a_refusal_is_told_from_a_cluster_that_asks_for_patience(words: str, kind: type[Exception]) -> None:
    with pytest.raises(kind, match=r"sbatch: error"):
        slurm(FakeSlurm(weather={"sbatch": f"refuse {words}"})).submit(ClusterJobRequest(NAME, devices=1))


@pytest.mark.parametrize(
    ("state", "kind"),
    [
        ("PREEMPTED", "taken"),
        ("CANCELLED by 1000", "ended"),
        ("NODE_FAIL", "ended"),
        ("FAILED", "ended"),
        ("COMPLETED", "ended"),
        ("RUNNING", "alive"),
        ("WEDGED", "unknown"),
    ],
)
def test_the_books_say_what_became_of_the_newest_job_of_a_name(state: str, kind: str) -> None:
    fake = FakeSlurm()
    cluster = slurm(fake)
    for _ in range(2):
        cluster.submit(ClusterJobRequest(NAME, devices=1))
    fake.end(fake.jobs[1001], "COMPLETED")
    fake.begin(fake.jobs[1002])
    fake.end(fake.jobs[1002], state, code="127:0")

    fate = cluster.fate(NAME)

    assert fate.kind == kind
    assert f"job 1002 {'is' if kind == 'alive' else 'was'} {state}" in fate.words


@pytest.mark.parametrize("weather", ["down", "empty", "garbage", "refuse Slurm accounting storage is disabled"])
def test_where_no_books_are_kept_nothing_is_known(weather: str) -> None:
    assert slurm(FakeSlurm(weather={"sacct": weather})).fate(NAME).kind == "unknown"


def test_a_job_that_is_gone_is_withdrawn_already_and_one_that_has_begun_meanwhile_is_left_alone() -> None:
    fake = FakeSlurm()
    cluster = slurm(fake)
    cluster.submit(ClusterJobRequest(NAME, devices=1))
    (sight,) = cluster.listed()
    fake.begin(fake.jobs[1001])

    cluster.withdraw(sight)
    assert fake.jobs[1001].state == "RUNNING"

    fake.end(fake.jobs[1001], "COMPLETED")
    cluster.withdraw(sight)


def test_each_node_of_the_settings_is_a_host_with_its_devices() -> None:
    settings = Settings(
        launcher="slurm",
        cluster_nodes=2,
        cluster_node_devices=2,
        cluster_device_bytes=80 * 2**30,
        cluster_device_capability=90,
        cluster_device_name="H100",
    )

    devices = places(settings, worker_id="worker_abcdef", cached=["a"])

    assert [device.id for device in devices] == [
        f"slurm-abcdef-{node}:cuda-{index}" for node in (0, 1) for index in (0, 1)
    ]
    assert {device.host for device in devices} == {"slurm-abcdef-0", "slurm-abcdef-1"}
    assert all(device.bfloat16 and device.healthy and device.capability == 90 for device in devices)


@pytest.mark.parametrize(
    ("words", "program"),
    [
        (("worker", "--attempt", NAME), ["worker.attempt.handed_over", NAME]),
        (("dispatcher",), ["worker.attempt.dispatcher"]),
    ],
)
def test_the_commands_become_their_processes_and_need_no_redis(
    words: tuple[str, ...], program: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    begun: list[list[str]] = []
    monkeypatch.setattr(main.os, "execve", lambda _path, command, _environment: begun.append(command))
    monkeypatch.setattr(main.log, "configure", lambda _settings: None)  # of this whole process
    monkeypatch.setattr(main, "hide_secrets", lambda: None)
    monkeypatch.chdir(tmp_path)
    environment = {"DATABASE_URL": "postgresql://nowhere/db", "REDIS_URL": "", "TUNEPOOL_HOME": str(tmp_path / "home")}

    CliRunner().invoke(main.app, list(words), env=environment)

    assert begun[0][1:] == ["-m", *program]


def test_a_dispatcher_that_is_not_told_of_a_cluster_does_not_start(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TUNEPOOL_LAUNCHER", "slurm")
    monkeypatch.setattr(dispatcher, "hide_secrets", lambda: None)

    assert dispatcher.main() == 2


def test_a_process_with_a_home_of_its_own_shares_all_else(tmp_path: Path) -> None:
    settings = Settings(home=tmp_path)
    (tmp_path / "models.toml").touch()

    own = beside(settings, "dispatcher")

    assert own.home == tmp_path / "dispatcher"
    assert (own.storage, own.cache, own.models_file) == (settings.storage, settings.cache, tmp_path / "models.toml")
    assert identify(own).id != identify(settings).id
