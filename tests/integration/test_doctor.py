"""`tunepool-server doctor` finds a sound installation sound, and names each part that is not, with what to do."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import Engine

from shared.fleet import workers
from shared.fleet.workers import DeviceReport, NewWorker
from shared.settings import Settings
from shared.store.db import session_scope
from shared.store.tables import DeviceRow, WorkerRow
from standalone import host_report
from standalone.doctor import Installation, clock, room, secrets
from standalone.findings import Finding, document
from standalone.home import Home
from standalone.postgres import EmbeddedPostgres
from tests.forked import run_forked
from tests.patience import patience

GIB = 1 << 30
DEVICE = DeviceReport(
    id="h:GPU-a",
    kind="cuda",
    name="NVIDIA A100",
    total_bytes=80 * GIB,
    free_bytes=79 * GIB,
    foreign_bytes=0,
    healthy=True,
    bfloat16=True,
    cached_models=[],
)


def register(engine: Engine, *devices: DeviceReport, worker: str = "worker_1", host: str = "h") -> None:
    arrival = NewWorker(id=worker, host=host, pool="default", boot_id="b", version="1")
    with session_scope(engine) as session:
        workers.register(session, arrival, devices, leased=[])


@pytest.fixture
def sound(engine: Engine, database_url: str, redis_url: str, tmp_path: Path) -> Installation:
    """One worker with one device; this host's own devices are the business of other tests."""
    with session_scope(engine) as session:
        session.query(DeviceRow).delete()
        session.query(WorkerRow).delete()
    register(engine, DEVICE)
    home = tmp_path / "home"
    home.mkdir()
    settings = Settings(home=home, database_url=database_url, redis_url=redis_url)
    return Installation(settings, Home(home), database_url, redis_url, port=0)


@pytest.fixture
def host(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """What the program that looks at this host tells; a test changes it."""
    report: dict[str, Any] = {
        "devices": [
            {"uuid": "cpu", "kind": "cpu", "name": "CPU", "total_bytes": GIB, "ailment": None, "found": "torch 2.13.0"}
        ],
        "notes": [],
        "isolation": {"uid": 64998, "trainers_are_root": False, "shares_user": False, "noexec": ""},
    }
    monkeypatch.setattr(host_report, "_ask", lambda _home, _settings: report)
    return report


def of(found: list[Finding], part: str, *, grade: str = "") -> list[Finding]:
    return [one for one in found if one.part == part and (not grade or one.grade == grade)]


def test_a_sound_installation_has_no_fault(sound: Installation, host: dict[str, Any]) -> None:
    found = list(sound.findings())

    assert of(found, "database")[0].grade == "ok"
    assert [one for one in found if one.grade == "fault"] == []
    assert {one.part for one in found} == {
        *("database", "clock", "store", "redis", "devices", "host", "isolation", "models", "disk", "ports"),
    }
    assert list((sound.home.path / "storage").rglob("probe*")) == [], "the object in the store is removed again"


def broken_database(sound: Installation) -> Installation:
    return replace(sound, database_url="postgresql+psycopg://nobody@127.0.0.1:1/none")


def broken_redis(sound: Installation) -> Installation:
    return replace(sound, redis_url="redis://127.0.0.1:1/0")


def broken_store(sound: Installation) -> Installation:
    file = sound.home.path / "a-file"
    file.touch()
    return replace(sound, settings=sound.settings.model_copy(update={"storage_url": f"file://{file}/below"}))


def broken_models(sound: Installation) -> Installation:
    (sound.home.path / "models.toml").write_text('[models.mine]\nsource = "floppy"\n')
    return replace(sound, settings=sound.settings.model_copy(update={"models_file": sound.home.path / "models.toml"}))


@pytest.mark.parametrize(
    ("broken", "part", "words"),
    [
        (broken_database, "database", "Start it, or correct DATABASE_URL"),
        (broken_redis, "redis", "Start it, or correct REDIS_URL"),
        (broken_store, "store", "STORAGE_URL"),
        (broken_models, "models", "Correct the entry"),
        (lambda sound: replace(sound, database_url=""), "database", "tunepool-server up"),
    ],
)
def test_each_part_that_is_away_is_a_fault_with_its_remedy_and_the_others_are_looked_at(
    sound: Installation,
    host: dict[str, Any],
    broken: Callable[[Installation], Installation],
    part: str,
    words: str,
) -> None:
    found = list(broken(sound).findings())

    (one,) = of(found, part, grade="fault")
    assert words in one.remedy
    assert {"store", "redis", "models", "disk", "ports"} <= {one.part for one in found}
    assert document(found)["ok"] is False


def test_a_database_without_tables_is_to_be_migrated(
    sound: Installation, host: dict[str, Any], postgres_server: EmbeddedPostgres
) -> None:
    (one,) = of(list(replace(sound, database_url=postgres_server.url("postgres")).findings()), "database")

    assert (one.grade, "tunepool-server migrate" in one.remedy) == ("fault", True)


def test_ailing_quarantined_and_crowded_devices_are_named(
    sound: Installation, host: dict[str, Any], engine: Engine
) -> None:
    register(
        engine,
        replace(DEVICE, healthy=False, ailment="driver 550 is too old for CUDA 13.0"),
        replace(DEVICE, id="h:GPU-b", foreign_bytes=9 * GIB),
        replace(DEVICE, id="h:GPU-c"),
    )
    with session_scope(engine) as session:
        workers.set_quarantined(session, "h:GPU-c", quarantined=True)

    found = of(list(sound.findings()), "devices")

    assert [one.grade for one in found] == ["fault", "warning", "warning"]
    assert "driver 550 is too old" in found[0].words
    assert "strangers hold 9.0 GiB" in found[1].words
    assert "tunepool devices release h:GPU-c" in found[2].remedy


def test_a_silent_worker_and_a_pool_without_one_are_faults(
    sound: Installation, host: dict[str, Any], engine: Engine
) -> None:
    with session_scope(engine) as session:
        session.get_one(WorkerRow, "worker_1").last_seen = datetime.now(UTC) - timedelta(minutes=10)

    found = list(sound.findings())

    assert "has been silent for 60" in of(found, "workers", grade="fault")[0].words
    assert "jobs wait" in of(found, "devices", grade="fault")[0].words


def test_workers_of_two_hosts_on_a_folder_are_warned(sound: Installation, host: dict[str, Any], engine: Engine) -> None:
    register(engine, replace(DEVICE, id="i:GPU-a"), worker="worker_2", host="i")

    assert "2 hosts: h, i" in of(list(sound.findings()), "store", grade="warning")[0].words


def test_what_the_host_says_of_its_devices_and_of_the_trainers_user_is_told(
    sound: Installation, host: dict[str, Any]
) -> None:
    host["devices"][0] |= {"ailment": "no C compiler is there"}
    host["notes"] = ["a GPU without a driver"]
    host["isolation"] |= {"trainers_are_root": True, "noexec": "/srv/tunepool"}

    found = list(sound.findings())

    assert "no C compiler" in of(found, "host", grade="fault")[0].words
    assert "a GPU without a driver" in of(found, "host", grade="warning")[0].words
    assert [one.grade for one in of(found, "isolation")] == ["warning", "fault"]


def test_clocks_disks_and_secrets_have_their_bounds(tmp_path: Path) -> None:
    assert [clock(seconds).grade for seconds in (0.3, -8, 400)] == ["ok", "warning", "fault"]
    assert "8 s behind" in clock(-8).words
    assert [room(tmp_path, free * GIB).grade for free in (100, 9, 0)] == ["ok", "warning", "fault"]
    home = Home(tmp_path)
    home.write_credentials(base_url="http://127.0.0.1:1/v1", api_key="tp_1")
    assert list(secrets(home)) == []
    home.credentials.chmod(0o644)
    assert "chmod 600" in next(secrets(home)).remedy


@pytest.mark.parametrize("saved", ["", "{}", "[]", '{"base_url": "http://127.0.0.1:no/v1"}', '{"base_url": 7}'])
def test_the_api_is_looked_for_at_the_port_of_the_last_start(tmp_path: Path, saved: str) -> None:
    home = Home(tmp_path)
    assert home.last_port is None
    home.write_credentials(base_url="http://127.0.0.1:8790/v1", api_key="tp_1")
    assert home.last_port == 8790
    home.credentials.write_text(saved)
    assert (home.last_port, home.known_key()) == (None, "")


@pytest.mark.slow
def test_the_command_ends_in_1_where_something_is_at_fault_and_speaks_json(tmp_path: Path) -> None:
    environment = {name: value for name, value in os.environ.items() if name not in {"DATABASE_URL", "REDIS_URL"}}

    command = ["-m", "standalone.main", "doctor", "--home", str(tmp_path / "home"), "--port", "0", "--json"]
    done = run_forked(command, environment=environment | {"TUNEPOOL_DEVICES": "cpu"}, seconds=patience(120))

    assert done.returncode == 1, done.stderr
    found = json.loads(done.stdout)
    assert found["ok"] is False
    grades = {(one["part"], one["grade"]) for one in found["findings"]}
    assert {("database", "fault"), ("store", "ok"), ("host", "ok")} <= grades
