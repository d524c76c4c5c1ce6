"""The units of deploy/systemd are whole, start commands that exist, and give a worker what its walls need."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from configparser import ConfigParser
from pathlib import Path

import pytest

from shared.settings import Settings
from standalone.main import app

UNITS = Path(__file__).parents[2] / "deploy" / "systemd"
SERVICES = sorted(UNITS.glob("*.service"))
COMMAND = "/opt/tunepool/.venv/bin/tunepool-server"


def service(path: Path) -> dict[str, str]:
    parser = ConfigParser(strict=False, interpolation=None)
    parser.optionxform = str  # type: ignore[assignment,method-assign]
    parser.read(path)
    return dict(parser["Service"])


@pytest.mark.skipif(shutil.which("systemd-analyze") is None, reason="no systemd here")
def test_systemd_takes_every_unit_without_a_word(tmp_path: Path) -> None:
    for unit in UNITS.iterdir():
        # systemd looks whether the command is there; the installation's path is not on this machine.
        (tmp_path / unit.name).write_text(unit.read_text().replace(COMMAND, sys.executable))

    units = [str(path) for path in tmp_path.iterdir()]
    done = subprocess.run(
        ["systemd-analyze", "verify", "--man=no", *units], capture_output=True, text=True, check=False
    )

    assert (done.returncode, done.stderr) == (0, "")


@pytest.mark.parametrize("path", SERVICES, ids=lambda path: path.stem)
def test_a_unit_starts_a_command_that_exists_with_settings_that_exist(path: Path) -> None:
    known = {f"TUNEPOOL_{name.upper()}" for name in Settings.model_fields}
    commands = {command.name or command.callback.__name__ for command in app.registered_commands if command.callback}

    values = service(path)
    program, command, *_ = values["ExecStart"].split()

    assert program == COMMAND
    assert command in commands
    assert set(re.findall(r"(\w+)=", values["Environment"])) <= known
    assert values["EnvironmentFile"] == "/etc/tunepool/tunepool.env"


def test_a_worker_is_given_time_to_save_and_its_trainers_are_not_ended_beside_it() -> None:
    values = service(UNITS / "tunepool-worker.service")

    assert (values["KillMode"], values["TimeoutStopSec"]) == ("mixed", "5min")
    assert "User" not in values


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can leave rights away")
@pytest.mark.skipif(shutil.which("setpriv") is None, reason="no setpriv here")
def test_the_rights_that_a_worker_keeps_are_enough_for_its_walls() -> None:
    kept = service(UNITS / "tunepool-worker.service")["CapabilityBoundingSet"].split()
    measure = "from shared.operating.isolation import measured_isolation as m; from shared.settings import Settings;"
    measure += "found = m(Settings()); print(found.network, found.ranks_network)"

    def measured(*wrapper: str) -> str:
        done = subprocess.run([*wrapper, sys.executable, "-c", measure], capture_output=True, text=True, check=False)
        return done.stdout.splitlines()[-1] if done.returncode == 0 else ""

    def with_rights(rights: list[str]) -> str:
        names = ",".join(["-all", *(f"+{name.removeprefix('CAP_').lower()}" for name in rights)])
        return measured("setpriv", f"--bounding-set={names}", f"--inh-caps={names}")

    both = "namespace namespace"
    if measured() != both or not with_rights(kept):
        pytest.skip("this host gives its root no network namespace, or lacks some of the rights itself")
    assert with_rights(kept) == both
    assert with_rights([name for name in kept if name != "CAP_NET_ADMIN"]) != both
