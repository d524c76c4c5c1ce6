"""What a program on strangers' data is kept from, asked of such a program: as root, as an ordinary user, and where
namespaces are forbidden. Each case measures the host first, as a worker does."""

from __future__ import annotations

import json
import os
import shutil
import socket
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from shared.operating import isolation as isolating
from shared.operating.isolation import Isolation, IsolationLacking
from shared.settings import Settings, child_environment
from tests.patience import patience

ROOT = Path(__file__).parents[2]
NOBODY = 64900

# A supervisor, in short: it measures, starts one program of `company` with the walls, and prints what that says.
SUPERVISOR = """
import json, os, subprocess, sys
sys.path[:] = [*json.loads(sys.argv[1]), sys.argv[5], sys.argv[5] + "/home"]  # as of one that was started there
uid, forbidden, company, place = int(sys.argv[2]), sys.argv[3] == "forbidden", sys.argv[4], sys.argv[5]
from pathlib import Path
from shared.operating import kernel_walls
from shared.operating.isolation import ProgramPaths, Walls, measured_isolation
from shared.operating.secrecy import hide_secrets
from shared.settings import Settings
if uid:
    os.setgroups([]); os.setgid(uid); os.setuid(uid)
hide_secrets()
if forbidden:  # as in a container: a filter refuses unshare(2)
    kernel_walls.gain_nothing()
    kernel_walls.filter_calls(kernel_walls.call_filter(sockets=True, connect=True))
given = measured_isolation(Settings(home=Path(place, "home"), trainer_uid=0))
walls = Walls(given, company, ProgramPaths(writes=(Path(place, "out"),), reads=(Path(place, "home/read"),),
                                     home=Path(place, "home")))
def prepare():
    walls.leave_network()
    walls.close()
python = "/usr/bin/python3" if uid else sys.executable  # ours may lie where only root enters
done = subprocess.run([python, "-c", sys.argv[6], place, str(os.getpid())], preexec_fn=prepare,
                      capture_output=True, text=True)
print(json.dumps([given.document(), json.loads(done.stdout or "null"), done.stderr[-2000:]]))
"""

PROGRAM = """
import json, os, socket, subprocess, sys
place, parent = sys.argv[1:]
def may(act):
    try:
        act()
    except OSError:
        return False
    return True
def read(path):
    if not open(path).read():
        raise OSError("nothing to read")
def dial(family, address):
    with socket.socket(family) as line:
        line.connect(address)
def loop():
    with socket.create_server(("127.0.0.1", 0)) as server:
        dial(socket.AF_INET, server.getsockname())
port = int(open(place + "/home/read/port").read())
print(json.dumps({
    "host": may(lambda: dial(socket.AF_INET, ("127.0.0.1", port))),
    "host6": may(lambda: dial(socket.AF_INET6, ("::1", port))),
    "database": may(lambda: dial(socket.AF_UNIX, place + "/database")),
    "loopback": may(loop),
    "secret": may(lambda: open(place + "/home/credentials.json").read()),
    "other": may(lambda: open(place + "/other").read()),
    "names": may(lambda: os.listdir(place + "/home")),
    "given": may(lambda: open(place + "/home/read/port").read()),
    "write": may(lambda: open(place + "/out/file", "w").write("x")),
    "move": may(lambda: (os.mkdir(place + "/out/a"), os.rename(place + "/out/file", place + "/out/a/file"))),
    "beside": may(lambda: open(place + "/home/read/new", "w").write("x")),
    "start": may(lambda: subprocess.run(["/bin/true"], check=True)),
    "signal": may(lambda: os.kill(int(parent), 0)),
    "environ": may(lambda: read(f"/proc/{parent}/environ")),
    "code": may(lambda: __import__("json.tool")),
}))
"""


def asked(place: Path, *, uid: int = 0, forbidden: bool = False, company: str = "alone") -> tuple[Any, dict[str, bool]]:
    """(what the host gives, what the program may do)."""
    for folder in (place / "home/read", place / "out"):
        folder.mkdir(parents=True)
    for secret in ("home/credentials.json", "other"):
        (place / secret).write_text("secret")
    with socket.create_server(("127.0.0.1", 0)) as server, socket.socket(socket.AF_UNIX) as database:
        database.bind(str(place / "database"))
        database.listen()
        (place / "home/read/port").write_text(str(server.getsockname()[1]))
        for path in (place, *place.rglob("*")):
            os.chown(path, uid or -1, uid or -1)
        paths = json.dumps([str(ROOT), *(entry for entry in sys.path if entry)])
        state = "forbidden" if forbidden else "free"
        done = subprocess.run(
            [sys.executable, "-c", SUPERVISOR, paths, str(uid), state, company, str(place), PROGRAM],
            capture_output=True,
            text=True,
            cwd="/",
            env=child_environment(),
            timeout=patience(60),
            check=False,
        )
    assert done.returncode == 0, done.stderr
    given, seen, words = json.loads(done.stdout.splitlines()[-1])
    assert seen is not None, words
    return given, seen


@pytest.fixture(params=["the user of the tests", "an ordinary user"])
def uid(request: pytest.FixtureRequest) -> int:
    if request.param == "the user of the tests":
        return 0
    if os.geteuid() != 0:
        pytest.skip("only root can become somebody else")
    if not Path("/usr/bin/python3").exists():
        pytest.skip("no Python that another user may run")
    return NOBODY


@pytest.fixture
def place() -> Iterator[Path]:
    """Where another user may enter, too."""
    folder = Path(tempfile.mkdtemp(prefix="tp-test-", dir="/tmp"))
    folder.chmod(0o755)
    yield folder
    shutil.rmtree(folder)


def must_give(given: dict[str, Any], **wanted: Any) -> None:
    lacking = {name: given[name] for name, value in wanted.items() if given[name] != value}
    if lacking:
        pytest.skip(f"this host does not give it: {lacking}")


def test_a_program_that_works_alone_reaches_nobody_and_opens_nothing_of_others(uid: int, place: Path) -> None:
    given, seen = asked(place, uid=uid)

    must_give(given, network="namespace", files="rules", calls=True)
    refused = ("host", "host6", "database", "loopback", "secret", "other", "names", "beside", "environ")
    assert {name: seen[name] for name in refused} == dict.fromkeys(refused, False)
    allowed = ("given", "write", "move", "start", "code")
    assert {name: seen[name] for name in allowed} == dict.fromkeys(allowed, True)


def test_ranks_of_one_host_reach_one_another_and_nobody_else(uid: int, place: Path) -> None:
    given, seen = asked(place, uid=uid, company="ranks_here")

    must_give(given, ranks_network="namespace", files="rules")
    assert seen["loopback"]
    assert not seen["host"]
    assert not seen["secret"]


def test_ranks_of_several_hosts_keep_the_network_and_see_no_file_of_others(uid: int, place: Path) -> None:
    given, seen = asked(place, uid=uid, company="ranks_elsewhere")

    must_give(given, files="rules")
    assert seen["host"]
    assert not seen["secret"]
    assert not seen["other"]


def test_where_namespaces_are_forbidden_a_filter_refuses_the_network(uid: int, place: Path) -> None:
    given, seen = asked(place, uid=uid, forbidden=True)

    must_give(given, files="rules", calls=True)
    assert (given["network"], given["ranks_network"]) == ("filter", "open")
    refused = ("host", "host6", "database", "loopback", "secret", "other")
    assert {name: seen[name] for name in refused} == dict.fromkeys(refused, False)
    assert seen["write"]
    assert seen["start"]


# --- what a worker does about it ------------------------------------------------------------------------------------


def test_who_requires_walls_that_are_not_to_be_had_is_refused_with_what_would_mend_it(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(isolating, "_measured", lambda _user: Isolation())

    with pytest.raises(IsolationLacking, match=r"unshare\(2\).*Landlock.*TUNEPOOL_ISOLATION=best"):
        isolating.isolation(Settings(home=tmp_path, trainer_uid=0, isolation="require"))
    lacking = isolating.isolation(Settings(home=tmp_path, trainer_uid=0, isolation="best"))
    assert "NETWORK OPEN" in lacking.line
    assert "FILES OPEN" in lacking.line


def test_walls_that_are_off_are_said_to_be_off(tmp_path: Path) -> None:
    assert "isolation off" in isolating.isolation(Settings(home=tmp_path, trainer_uid=0, isolation="off")).line


def test_each_process_takes_a_user_that_no_other_has() -> None:
    code = "from shared.operating.trainer_user import _taken; print(_taken()[0], flush=True); input()"
    people = [
        subprocess.Popen(
            [sys.executable, "-c", code], cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        for _ in range(2)
    ]
    try:
        uids = [int(person.stdout.readline()) for person in people if person.stdout is not None]
    finally:
        for person in people:
            person.communicate("\n")

    assert len(set(uids)) == 2
