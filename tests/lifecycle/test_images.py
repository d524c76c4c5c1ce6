"""The images without an engine: their steps are done in folders, and what Compose starts in them is started there.

Left out are the steps that need root's system or an index: users, packages of the distribution, locked wheels. In
place of the last stand the libraries of this environment.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
import signal
import subprocess
import sysconfig
import tomllib
import uuid
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import httpx2
import psutil
import psycopg
import pytest

from shared.operating.trainer_user import UNPRIVILEGED_UIDS
from standalone.postgres import EmbeddedPostgres
from tests import living
from tests.faults.conftest import _free_port, relay
from tests.lifecycle.stack import ROOT, Servers, open_stack, until
from tests.lifecycle.test_standalone import runs_for_others
from tests.patience import patience
from tests.servers import open_folder
from tests.unit.test_compose import CONFIG, SECRETS
from tests.unit.test_compose import run as run_tool

RECIPE: Final = (ROOT / "Dockerfile.gpu").read_text(encoding="utf-8")
PYTHON: Final = "/usr/bin/python3"
# Steps that are left out, by their first words; one that is neither here nor done below fails the test.
LEFT_OUT: Final = (
    *("groupadd", "useradd", "apt-get", "rm -rf /var/lib/apt", "python -m venv", "python3 -m venv"),
    "pip install --require-hashes",
)
OTHER_BUILD: Final = 'test -z "$TORCH"'  # of PyTorch, where one is asked for

pytestmark = [
    pytest.mark.skipif(os.geteuid() != 0, reason="only root can become the images' user"),
    pytest.mark.skipif(
        not runs_for_others(PYTHON), reason="no Python that another user may run and that loads our code"
    ),
]


@dataclass(frozen=True)
class Image:
    """A stage of Dockerfile.gpu whose /app, /venv and /state are folders of `place`."""

    place: Path
    user: int
    environment: dict[str, str]
    command: list[str]
    probe: list[str]

    def started(self, words: list[str], *, within: tuple[str, ...] = (), user: int | None = None) -> dict[str, Any]:
        """The arguments of `subprocess` that start `words` in it, as the image's user or as another."""
        who = self.user if user is None else user
        program = shutil.which(words[0], path=str(self.place / "venv/bin"))
        assert program is not None, f"{words[0]} is no program of the image"
        return {
            "args": [*within, program, *words[1:]],
            "cwd": self.place / "app",
            "env": self.environment,
            "stdin": subprocess.DEVNULL,
            **({"user": who, "group": who, "extra_groups": []} if who else {}),
        }

    def run(self, words: list[str], **options: Any) -> subprocess.CompletedProcess[str]:
        how = self.started(words, **options)
        return subprocess.run(**how, capture_output=True, text=True, timeout=patience(120), check=False)


def built(target: str, place: Path, environment: dict[str, str]) -> Image:
    """Do the steps of a stage; the last user, command and probe are the image's."""
    user, command, probe, known = 0, [], [], {}
    for line in instructions(target):
        word, _, rest = line.partition(" ")
        if word == "ENV":
            known |= dict(pair.split("=", 1) for pair in rest.split())
        elif word == "COPY":
            copy(rest.split(), place / "app")
        elif word == "RUN":
            for step in () if rest.startswith(OTHER_BUILD) else rest.split(" && "):
                do(step.strip(), place)
        elif word == "USER":
            user = int(rest.partition(":")[0])
        elif word == "CMD":
            command = json.loads(rest)
        elif word == "HEALTHCHECK":
            probe = json.loads(rest.partition(" CMD ")[2])
        else:
            assert word in {"WORKDIR", "VOLUME", "EXPOSE", "ARG"}, line
    os.chown(place / "state", user, user)
    known |= {"PATH": f"{place / 'venv/bin'}:/usr/bin:/bin", "TUNEPOOL_HOME": str(place / "state")}
    return Image(place, user, known | environment, command, probe)


def instructions(target: str) -> list[str]:
    """One line for each, without comments and blank lines."""
    stage = re.search(rf"^FROM \S+ AS {target}\n(.*?)(?=^FROM |\Z)", RECIPE, re.MULTILINE | re.DOTALL)
    assert stage is not None
    lines = "\n".join(line for line in stage[1].splitlines() if not line.startswith("#"))
    return [re.sub(r"\s+", " ", line) for line in re.sub(r"\\\n", " ", lines).splitlines() if line]


def copy(words: list[str], app: Path) -> None:
    *sources, target = words
    for source in sources:
        if (ROOT / source).is_dir():
            bytecode = shutil.ignore_patterns("__pycache__")
            shutil.copytree(ROOT / source, app / target, ignore=bytecode, dirs_exist_ok=True)
        else:
            shutil.copy(ROOT / source, app / target)


def do(step: str, place: Path) -> None:
    if step.startswith(("mkdir ", "touch ")):
        subprocess.run(step.split(), cwd=place / "app", check=True)
    elif step.startswith("install -d "):
        assert step.endswith(" /state")
        (place / "state").mkdir(mode=0o755)
    elif step.startswith("pip install --no-deps --no-build-isolation -e ."):
        install(place)
    else:
        assert step.startswith(LEFT_OUT), f"a step that nobody tries: {step}"


def install(place: Path) -> None:
    """What the editable install leaves: a path to the code, and the commands."""
    (site,) = (place / "venv").glob("lib/python3*/site-packages")
    (site / "_image.pth").write_text(f"{place / 'app'}\n{sysconfig.get_path('purelib')}\n")
    scripts = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]["scripts"]
    for name, entry in scripts.items():
        module, _, function = entry.partition(":")
        program = place / "venv/bin" / name
        program.write_text(f"#!{place / 'venv/bin/python'}\nfrom {module} import {function}\n{function}()\n")
        program.chmod(0o755)


@pytest.fixture
def place() -> Iterator[Path]:
    with open_folder() as folder:
        (folder / "app").mkdir()
        subprocess.run([PYTHON, "-m", "venv", "--without-pip", folder / "venv"], check=True)
        yield folder


@pytest.fixture(scope="module")
def services() -> dict[str, Any]:
    done = run_tool(*CONFIG, "--format", "json", **dict.fromkeys(SECRETS, "a secret"))
    assert done.returncode == 0, done.stderr
    rendered: dict[str, Any] = json.loads(done.stdout)["services"]
    return rendered


def settings_of(service: dict[str, Any], **servers: str) -> dict[str, str]:
    """A container's environment, with servers of the test in place of the names of Compose's network."""
    empty = {"TUNEPOOL_MODELS_FILE": "/dev/null"}  # what is mounted there unless a file is named
    passed = {name: value for name, value in service["environment"].items() if value is not None}
    return passed | empty | servers


@pytest.fixture
def empty_database(postgres_server: EmbeddedPostgres) -> Iterator[str]:
    """A database without a table, at a port: its socket is closed to other users."""
    name = f"i{uuid.uuid4().hex[:12]}"
    socket = postgres_server.socket_dir / ".s.PGSQL.5432"
    where = f"host={postgres_server.socket_dir} user=postgres dbname=postgres"
    with psycopg.connect(where, autocommit=True) as admin:
        admin.execute(f"create database {name}")
    with relay(socket) as proxy:
        yield f"postgresql+psycopg://postgres@127.0.0.1:{proxy.port}/{name}"


def test_from_an_empty_database_the_image_of_the_api_comes_to_its_first_key_and_serves(
    place: Path, services: dict[str, Any], empty_database: str
) -> None:
    """`docker compose up -d`, then `docker compose exec api tunepool-server keys create`."""
    gone = f"redis://127.0.0.1:{_free_port()}/0"  # the API accepts jobs without Redis
    servers = {"DATABASE_URL": empty_database, "REDIS_URL": gone, "STORAGE_URL": f"file://{place / 'state/store'}"}
    image = built("api", place, settings_of(services["api"], **servers))
    assert image.user != 0

    migrated = image.run(services["migrate"]["command"])
    first = image.run(["tunepool-server", "keys", "create"])
    second = image.run(["tunepool-server", "keys", "create"])

    assert migrated.returncode == 0, migrated.stderr
    assert (first.returncode, len(first.stdout.split())) == (0, 1), first.stderr
    assert second.returncode == 0, "a second one is no dead end either"
    port = str(_free_port())
    everywhere = image.command.index("--host") + 1
    words = [port if word == "8000" else word for word in image.command]
    words[everywhere] = "127.0.0.1"
    with serving(image, words) as process:
        probe = [word.replace(":8000/", f":{port}/") for word in image.probe]
        until(lambda: image.run(probe).returncode == 0 or process.poll() is not None, seconds=30)
        assert process.poll() is None
        headers = {"Authorization": f"Bearer {first.stdout.strip()}"}
        with httpx2.Client(base_url=f"http://127.0.0.1:{port}", headers=headers, timeout=patience(20)) as client:
            listed = client.get("/v1/models").json()
            assert client.get("/v1/tunepool/audit").status_code == 200, "the first key is an administrator's"
        assert living.users(psutil.Process(process.pid)) == {image.user}
    assert [model["id"] for model in listed["data"]] == ["smollm2-135m-instruct"]


@contextlib.contextmanager
def serving(image: Image, words: list[str], **options: Any) -> Iterator[subprocess.Popen[bytes]]:
    """The command of a container while the block lasts; it ends as `docker stop` ends it."""
    with (image.place / "log").open("wb") as log:
        process = subprocess.Popen(**image.started(words, **options), stdout=log, stderr=log)
    try:
        yield process
    finally:
        process.terminate()
        try:
            process.wait(patience(60))
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def rights(service: dict[str, Any], *, without: str = "") -> tuple[str, ...]:
    """The start of a command that has a service's rights and no other."""
    assert (service["user"], service["cap_drop"]) == ("0:0", ["ALL"])
    kept = [f"+{name.lower()}" for name in service["cap_add"] if name != without]
    names = ",".join(["-all", *kept])
    return ("setpriv", f"--bounding-set={names}", f"--inh-caps={names}", "--no-new-privs")


SEES: Final = """
import sys
from worker.program.processes import tagged
print(sum(tag.home == sys.argv[1] for _, tag, _ in tagged()))
"""


@pytest.mark.skipif(shutil.which("setpriv") is None, reason="no setpriv here")
def test_in_the_image_of_the_worker_trainers_are_another_user_who_reads_no_secret_of_its(
    place: Path, services: dict[str, Any], servers: Servers
) -> None:
    service = services["worker"]
    with open_stack(place / "stack", servers) as stack:
        own = {"TUNEPOOL_HOME": str(place / "state"), "TUNEPOOL_KEEP_WARM": "off", "TUNEPOOL_CPU_PROBE": "false"}
        image = built("worker", place, settings_of(service) | stack.environment | own)
        (site,) = (place / "venv").glob("lib/python3*/site-packages")
        with (site / "_image.pth").open("a") as paths:
            paths.write(f"{ROOT}\n")  # behind the image's own: the fake trainer
        assert image.run(image.probe).returncode == 1, "no worker yet"
        stack.start_janitor()

        with serving(image, image.command, within=rights(service), user=0) as worker:
            job = stack.submit("steps=4 hold=2")
            trainer = until(lambda: seen("tests.fake_trainer", worker), seconds=60, what="a trainer")
            (user,) = until(lambda: living.users(trainer) - {0}, seconds=10, what="the trainer's user")
            look = ["python", "-c", SEES, str(place / "state")]
            sees = [image.run(look, within=rights(service, without=name), user=0) for name in ("", "SYS_PTRACE")]
            ours = [worker.pid, *(one.pid for one in living.family(worker.pid) if user not in living.users(one))]
            opened = {pid: readable(f"/proc/{pid}/environ", user) for pid in ours}
            probed = image.run(image.probe, user=0)
            for out in place.glob(f"state/work/{job}/*/out"):
                (out / "go").touch()
            ended = stack.wait(job, seconds=60)
            worker.send_signal(signal.SIGTERM)
            assert worker.wait(patience(60)) == 0

    assert user in UNPRIVILEGED_UIDS
    assert len(opened) > 1
    assert not any(opened.values()), "the worker's environment holds the secrets of database and store"
    assert [int(done.stdout) for done in sees] == [1, 0], "the right to know its own programs is needed"
    assert probed.returncode == 0, probed.stderr
    assert ended.status == "succeeded"


def seen(sign: str, process: subprocess.Popen[bytes]) -> psutil.Process | None:
    return next((one for one in living.family(process.pid) if sign in living.words(one)), None)


def readable(file: str, user: int) -> bool:
    """Whether a program of this user reads a byte of it."""
    how: dict[str, Any] = {"user": user, "group": user, "extra_groups": []}
    return subprocess.run(["/usr/bin/head", "-c1", file], **how, capture_output=True, check=False).stdout != b""
