"""`tunepool-server up` as an operator meets it: real command, servers and signals; only the trainer is a fake."""

from __future__ import annotations

import contextlib
import json
import os
import re
import signal
import stat
import subprocess
import sys
import sysconfig
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx2
import psutil
import pytest

from shared.operating.trainer_user import UNPRIVILEGED_UIDS
from shared.settings import child_environment
from standalone.postgres import EmbeddedPostgres
from standalone.valkey import EmbeddedValkey
from tests import living
from tests.forked import line_for, run_forked
from tests.lifecycle.stack import QUICK, ROOT, make_model, until
from tests.patience import patience
from tests.servers import begin_with, open_folder

SERVER = Path(sys.executable).parent / "tunepool-server"
OUTSIDE = ("DATABASE_URL", "REDIS_URL", "STORAGE_URL", "TUNEPOOL_HOME", "TUNEPOOL_PORT")
NOBODY = 65534


@dataclass
class Run:
    """One `tunepool-server up`."""

    process: subprocess.Popen[str]
    home: Path
    said: Path

    def wait_until_ready(self) -> Run:
        until(lambda: self.process.poll() is not None or "ready" in self.said.read_text(), seconds=60)
        assert self.process.poll() is None, self.said.read_text()
        return self

    @property
    def credentials(self) -> dict[str, str]:
        found: dict[str, str] = json.loads((self.home / "credentials.json").read_text())
        return found

    def client(self) -> httpx2.Client:
        known = self.credentials
        headers = {"Authorization": f"Bearer {known['api_key']}"}
        return httpx2.Client(base_url=known["base_url"] + "/", headers=headers, timeout=patience(20))

    def serves(self) -> bool:
        try:
            with self.client() as client:
                return client.get("models").status_code == 200
        except httpx2.HTTPError:
            return False

    def family(self) -> list[psutil.Process]:
        """Everything it has started, however far down and in whatever session."""
        return living.family(self.process.pid)

    def child(self, sign: str) -> psutil.Process | None:
        """The direct child whose command line holds `sign`."""
        started = living.children(self.process.pid)
        return next((child for child in started if sign in " ".join(living.words(child))), None)

    def log(self) -> str:
        return self.said.read_text()


def environment(**extra: str) -> dict[str, str]:
    return {name: value for name, value in child_environment(**extra).items() if name not in OUTSIDE or name in extra}


# Runs our code with another interpreter of the same version: ours may lie where only root may enter.
OUR_CODE = {"PYTHONPATH": f"{ROOT}{os.pathsep}{sysconfig.get_path('purelib')}", "PYTHONDONTWRITEBYTECODE": "1"}


def runs_for_others(python: str) -> bool:
    same = f"import sys, standalone.main; sys.exit(sys.version_info[:2] != {tuple(sys.version_info[:2])})"
    try:
        done = subprocess.run(
            [python, "-c", same],
            cwd="/",
            env=environment(**OUR_CODE),
            **become(NOBODY),
            capture_output=True,
            check=False,
        )
    except OSError:
        return False
    return done.returncode == 0


def become(user: int | None) -> dict[str, Any]:
    return {} if user is None else {"user": user, "group": user, "extra_groups": []}


@contextlib.contextmanager
def up_forked(home: Path, *words: str, **extra: str) -> Iterator[Run]:
    """`up` whose processes of ours are forked (tests/forked_up.py): for tests of what it does once it runs."""
    said, known = home.parent / f"{home.name}.said", environment(**extra)
    arguments = ["-m", "tests.forked_up", str(home.parent), "up", "--home", str(home), "--port", "0", *words]
    line = line_for(arguments, {name: value for name, value in known.items() if os.environ.get(name) != value})
    assert line is not None
    with said.open("w") as output:
        process: Any = line.start(arguments, environment=known, log=output.fileno())
    with ended_with(Run(process, home, said)) as run:
        yield run


@contextlib.contextmanager
def up(
    home: Path, *words: str, cwd: Path | None = None, user: int | None = None, python: str = "", **extra: str
) -> Iterator[Run]:
    """Started, and surely gone afterwards; the test itself ends it, or kills it."""
    said = home.parent / f"{home.name}.said"
    program = [python, "-m", "standalone.main"] if python else [SERVER]
    with said.open("w") as output:
        process = subprocess.Popen(
            [*program, "up", "--home", home, "--port", "0", *words],
            cwd=cwd or home.parent,
            env=environment(**((OUR_CODE | extra) if python else extra)),
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            text=True,
            **become(user),
        )
    with ended_with(Run(process, home, said)) as run:
        yield run


@contextlib.contextmanager
def ended_with(run: Run) -> Iterator[Run]:
    try:
        yield run
    finally:
        if run.process.poll() is None:
            run.process.send_signal(signal.SIGTERM)
            try:
                run.process.wait(patience(60))
            except subprocess.TimeoutExpired:
                run.process.kill()
                run.process.wait()


def command(*words: str | Path, **extra: str) -> subprocess.CompletedProcess[str]:
    """A short command. It is forked: that the program starts on its own, `up` shows."""
    arguments = ["-m", "standalone.main", *map(str, words)]
    return run_forked(arguments, environment=environment(**extra), seconds=patience(60))


def alive(processes: list[psutil.Process]) -> list[str]:
    left = filter(living.is_alive, processes)
    return [f"{process.pid} {' '.join(living.words(process))[:80]}" for process in left]


@pytest.fixture
def place() -> Iterator[Path]:
    """A folder that Postgres' user may pass through, so that nothing lies elsewhere."""
    with open_folder() as folder:
        yield folder


@pytest.fixture
def home(migrated_cluster: Path, place: Path) -> Path:
    """A home whose database was made and migrated before: for tests of which a first start is no part."""
    begin_with(migrated_cluster, place / "home" / "postgres")
    return place / "home"


@pytest.fixture(scope="module")
def served() -> Iterator[Run]:
    """One stack without a worker for the tests that leave it as they found it, or see it heal.

    The operator stands in a folder that has an `api`, a `shared` and a `worker` of its own.
    """
    with open_folder() as folder:
        for name in ("api", "shared", "worker"):
            (folder / "project" / name).mkdir(parents=True)
            (folder / "project" / name / "__init__.py").write_text("raise RuntimeError('not ours')\n")
        with up(folder / "home", "--no-worker", cwd=folder / "project") as run:
            yield run.wait_until_ready()


# --- up and down ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM], ids=["ctrl-c", "terminate"])
def test_up_serves_with_the_key_it_wrote_and_ends_without_a_trace(home: Path, number: signal.Signals) -> None:
    with up(home) as run:
        run.wait_until_ready()
        until(lambda: run.child("worker.app"), seconds=10)
        assert run.serves()
        family = run.family()
        names = set(map(living.name, family))
        assert any("postgres" in name for name in names)
        assert any("valkey" in name for name in names)

        run.process.send_signal(number)

        assert run.process.wait(patience(20)) == 0, run.log()
        assert alive(living.await_end(family)) == []
        assert "stopping" in run.log()
        assert not list(home.glob("*/socket-location")), "the sockets' folders stayed"


def test_credentials_are_complete_when_ready_is_said_and_for_their_owner_alone(served: Run) -> None:
    said = re.search(r"ready  (\S+)", served.log())

    assert said is not None
    assert served.credentials["base_url"] == said[1]
    assert served.credentials["api_key"].startswith("tp_")
    assert stat.S_IMODE((served.home / "credentials.json").stat().st_mode) == 0o600


@pytest.mark.skipif(os.geteuid() != 0, reason="only root sees the sockets of processes that hide their secrets")
def test_only_the_api_listens_and_only_on_this_machine(served: Run) -> None:
    addresses = {address for process in served.family() for address in living.listening(process)}

    port = int(served.credentials["base_url"].split(":")[2].split("/")[0])
    assert addresses == {("127.0.0.1", port)}


def test_nobody_gets_in_without_a_key(served: Run) -> None:
    assert httpx2.get(served.credentials["base_url"] + "/models", timeout=patience(20)).status_code == 401


def test_a_second_up_in_the_same_home_refuses_and_says_who_is_there(served: Run) -> None:
    second = command("up", "--home", served.home, "--port", "0")

    assert second.returncode == 2
    assert f"already runs in {served.home} (process {served.process.pid})" in second.stderr
    assert served.serves()


def test_a_port_in_use_is_named_and_nothing_is_started(served: Run, place: Path) -> None:
    port = served.credentials["base_url"].split(":")[2].split("/")[0]

    second = command("up", "--home", place / "home", "--port", port)

    assert second.returncode == 2
    assert f"Port {port} of 127.0.0.1 cannot be had" in second.stderr
    assert "--port" in second.stderr
    assert not (place / "home" / "postgres").exists()


def test_a_signal_while_it_starts_ends_it_cleanly_and_the_next_start_is_whole(place: Path) -> None:
    with up(place / "home", "--no-worker") as run:
        until((run.home / "postgres").exists, seconds=20)
        run.process.send_signal(signal.SIGINT)

        assert run.process.wait(patience(20)) == 0, run.log()
    with up_forked(place / "home", "--no-worker") as again:
        assert again.wait_until_ready().serves()


def test_a_reader_that_went_away_does_not_spoil_the_end(home: Path) -> None:
    with subprocess.Popen(
        [SERVER, "up", "--home", home, "--port", "0", "--no-worker"],
        env=environment(),
        stdout=subprocess.PIPE,
        text=True,
    ) as process:
        assert process.stdout is not None
        assert "ready" in process.stdout.readline()
        process.stdout.close()

        process.send_signal(signal.SIGINT)

        assert process.wait(patience(20)) == 0


# --- what dies comes back -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("sign", ["api.serve", "worker.janitor", "valkey-server", "bin/postgres"])
def test_a_killed_child_comes_back_and_clients_are_served_again(served: Run, sign: str) -> None:
    dead = served.child(sign)
    assert dead is not None

    dead.kill()

    until(lambda: (found := served.child(sign)) and found.pid != dead.pid, seconds=30, what=f"another {sign}")
    until(served.serves, seconds=30, what="the API's answer")
    assert "child.died" in served.log()


def test_a_worker_that_is_killed_comes_back(home: Path) -> None:
    with up_forked(home, **QUICK) as run:
        run.wait_until_ready()
        dead = until(lambda: run.child("worker.app"), seconds=10)
        until(lambda: len(living.children(dead)) >= 2, seconds=30, what="the worker's children")
        helpers = living.family(dead)

        dead.kill()

        until(lambda: (found := run.child("worker.app")) and found.pid != dead.pid, seconds=30)
        until(lambda: not alive(helpers), seconds=20, what="the end of the old worker's children")


def test_a_killed_up_takes_all_along_and_the_next_one_finishes_its_job(home: Path, place: Path) -> None:
    make_model(place / "tiny")
    models = place / "models.toml"
    models.write_text(f'[models.tiny]\nsource = "path"\npath = "{place / "tiny"}"\n')
    quick = QUICK | {"TUNEPOOL_MODELS_FILE": str(models)}
    with up_forked(home, **quick) as run:
        run.wait_until_ready()
        key = run.credentials["api_key"]
        with run.client() as client:
            job = submit(client, "fake: steps=60 step_seconds=0.05 save=5 hold=30")
            until(lambda: status(client, job) == "running", seconds=40, what="a running job")
            until(lambda: (progress(client, job)).get("step", 0) >= 6, seconds=40, what="a checkpoint")
        family = run.family()
        assert any("tests.fake_trainer" in living.words(process) for process in family)

        run.process.kill()

        until(lambda: not alive(family), seconds=15, what=f"the end of {len(family)} processes")
    with up_forked(home, **quick) as again:
        again.wait_until_ready()
        assert again.credentials["api_key"] == key
        with again.client() as client:

            def has_succeeded() -> bool:
                with contextlib.suppress(OSError):  # the folder may just be going
                    for out in home.glob(f"work/{job}/*/out"):
                        (out / "go").touch()
                return status(client, job) == "succeeded"

            until(has_succeeded, seconds=60, what="the job's success")


def submit(client: httpx2.Client, behaviour: str) -> str:
    rows = [json.dumps({"text": behaviour}), *(json.dumps({"text": f"row {number}"}) for number in range(11))]
    sent = client.post("files", files={"file": ("rows.jsonl", "\n".join(rows))}, data={"purpose": "fine-tune"})
    assert sent.status_code == 200, sent.text
    made = client.post("fine_tuning/jobs", json={"model": "tiny", "training_file": sent.json()["id"]})
    assert made.status_code in (200, 201), made.text
    return str(made.json()["id"])


def status(client: httpx2.Client, job: str) -> str:
    return str(client.get(f"fine_tuning/jobs/{job}").json()["status"])


def progress(client: httpx2.Client, job: str) -> dict[str, Any]:
    found: dict[str, Any] = client.get(f"fine_tuning/jobs/{job}").json()["tunepool"].get("progress") or {}
    return found


# --- places and people ----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def far() -> Iterator[Run]:
    """A second stack beside `served`, in a home whose path is longer than a socket's may be."""
    with open_folder() as folder:
        home = folder / ("a rather long name, with spaces and 100 % of ümlauts" * 2) / ("b" * 100) / "home"
        home.parent.mkdir(parents=True)
        for above in (home.parent, home.parent.parent):
            above.chmod(0o755)
        with up_forked(home, "--no-worker") as run:
            yield run.wait_until_ready()


def test_two_stacks_live_side_by_side_and_share_no_key(served: Run, far: Run) -> None:
    assert far.serves()
    assert served.serves()
    answer = httpx2.get(
        far.credentials["base_url"] + "/models",
        headers={"Authorization": f"Bearer {served.credentials['api_key']}"},
        timeout=patience(20),
    )
    assert answer.status_code == 401


def test_a_home_may_have_a_path_longer_than_a_sockets(far: Run) -> None:
    assert len(str(far.home)) > 200
    assert far.serves()


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can become somebody else")
def test_an_ordinary_user_needs_nothing_more(place: Path) -> None:
    python = next((python for python in (sys.executable, "/usr/bin/python3") if runs_for_others(python)), None)
    if python is None:
        pytest.skip(f"no Python that another user may run and that can load {ROOT}")
    own = place / "own"
    own.mkdir()
    os.chown(own, NOBODY, NOBODY)

    with up(own / "home", python=python, user=NOBODY, HOME=str(own)) as run:
        run.wait_until_ready()
        until(lambda: run.child("worker.app"), seconds=10)
        assert run.serves()
        family = run.family()
        assert set().union(*map(living.users, family)) == {NOBODY}
        run.process.send_signal(signal.SIGINT)
        assert run.process.wait(patience(20)) == 0, run.log()
        assert alive(living.await_end(family)) == []


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can become somebody else")
def test_roots_trainers_run_as_a_user_of_nobodys(home: Path, place: Path) -> None:
    python = python_for_others(place / "python")
    if python is None:
        pytest.skip(f"no Python that another user may run and that can load {ROOT}")
    make_model(place / "model")
    (place / "models.toml").write_text(f'[models.tiny]\nsource = "path"\npath = "{place / "model"}"\n')
    quick = QUICK | {"TUNEPOOL_MODELS_FILE": str(place / "models.toml")}

    with up(home, python=python, **quick) as run, run.wait_until_ready().client() as client:
        rows = "".join(
            json.dumps({"text": f"fake: steps=40 step_seconds=0.05 {number}"}) + "\n" for number in range(12)
        )
        uploaded = client.post("files", files={"file": ("rows.jsonl", rows)}, data={"purpose": "fine-tune"}).json()
        job = client.post("fine_tuning/jobs", json={"model": "tiny", "training_file": uploaded["id"]}).json()
        users = until(lambda: living.users(descendant(run, "tests.fake_trainer")), seconds=30)

        assert users < set(UNPRIVILEGED_UIDS)
        until(lambda: client.get(f"fine_tuning/jobs/{job['id']}").json()["status"] == "succeeded", seconds=30)


def descendant(run: Run, sign: str) -> psutil.Process | None:
    return next((process for process in run.family() if sign in living.words(process)), None)


def python_for_others(folder: Path) -> str | None:
    """An environment of its own on an interpreter that anybody may run, with our code and libraries on its path."""
    if not runs_for_others("/usr/bin/python3"):
        return None
    subprocess.run(["/usr/bin/python3", "-m", "venv", "--without-pip", folder], check=True)
    (site,) = folder.glob("lib/python3*/site-packages")
    (site / "ours.pth").write_text(OUR_CODE["PYTHONPATH"].replace(os.pathsep, "\n") + "\n")
    return str(folder / "bin" / "python")


@pytest.mark.skipif(os.geteuid() != 0, reason="the folder is root's")
def test_root_may_keep_its_home_where_only_root_may_enter(place: Path) -> None:
    closed = place / "closed"
    closed.mkdir(mode=0o700)
    with up_forked(closed / "home", "--no-worker") as run:
        key = run.wait_until_ready().credentials["api_key"]
        assert run.serves()
    with up_forked(closed / "home", "--no-worker") as again:
        again.wait_until_ready()
        assert again.credentials["api_key"] == key
        assert again.serves()

    assert stat.S_IMODE(closed.stat().st_mode) == 0o700
    EmbeddedPostgres(closed / "home" / "postgres").destroy()


def test_a_home_that_belongs_to_nobody_here_is_refused(place: Path) -> None:
    (place / "file").touch()

    done = command("up", "--home", place / "file" / "home")

    assert done.returncode == 2
    assert "Choose another with --home" in done.stderr
    assert "Traceback" not in done.stderr


# --- servers of others ----------------------------------------------------------------------------------------------


def test_outside_servers_take_the_place_of_the_embedded_ones(
    database_url: str, valkey_server: EmbeddedValkey, place: Path
) -> None:
    outside = {"DATABASE_URL": database_url, "REDIS_URL": valkey_server.url}

    with up_forked(place / "home", "--no-worker", STORAGE_URL=f"file://{place / 'store'}", **outside) as run:
        run.wait_until_ready()
        assert run.serves()
        assert {"postgres", "valkey-server"} & set(map(living.name, run.family())) == set()
        with run.client() as client:
            client.post("files", files={"file": ("rows.jsonl", '{"text": "x"}')}, data={"purpose": "fine-tune"})

    assert not (place / "home" / "postgres").exists()
    assert any(path.is_file() for path in (place / "store").rglob("*"))
    assert not (place / "home" / "storage").exists()


def test_a_database_that_does_not_answer_is_reported_in_one_sentence(place: Path) -> None:
    nowhere = "postgresql+psycopg://nobody@127.0.0.1:1/nowhere"
    done = command("up", "--home", place / "home", "--port", "0", DATABASE_URL=nowhere)

    assert done.returncode == 2
    assert "The database does not answer" in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize("process", ["api", "worker", "janitor"])
def test_a_single_process_says_which_servers_it_needs(place: Path, process: str) -> None:
    done = command(process, TUNEPOOL_HOME=str(place / "home"))

    assert done.returncode == 2
    assert "DATABASE_URL" in done.stderr


# --- keys and models ------------------------------------------------------------------------------------------------


def test_keys_are_made_listed_and_revoked_beside_a_running_stack(served: Run) -> None:
    made = command("keys", "create", "--home", served.home, "--name", "pipeline")
    secret = made.stdout.strip()
    url, headers = served.credentials["base_url"] + "/models", {"Authorization": f"Bearer {secret}"}
    assert httpx2.get(url, headers=headers, timeout=patience(20)).status_code == 200
    listed = command("keys", "list", "--home", served.home).stdout
    assert secret not in listed
    key_id = next(line.split()[0] for line in listed.splitlines() if "pipeline" in line)

    assert command("keys", "revoke", key_id, "--home", served.home).returncode == 0

    assert httpx2.get(url, headers=headers, timeout=patience(20)).status_code == 401
    assert "revoked" in command("keys", "list", "--home", served.home).stdout


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (("keys", "create", "--project", "proj_none"), "No project 'proj_none'"),
        (("keys", "create", "--scope", "everything"), "Unknown scope 'everything'"),
        (("keys", "revoke", "key_none"), "No API key 'key_none'"),
        (("keys", "rotate", "key_none"), "No API key 'key_none'"),
    ],
)
def test_a_wrong_word_about_keys_is_answered_with_a_sentence(served: Run, words: tuple[str, ...], told: str) -> None:
    done = command(*words, "--home", served.home)

    assert done.returncode == 2
    assert told in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize("words", [("keys", "list"), ("migrate",)])
def test_without_a_running_stack_the_commands_say_what_is_missing(place: Path, words: tuple[str, ...]) -> None:
    done = command(*words, "--home", place / "nothing")

    assert done.returncode == 2
    assert "DATABASE_URL is not set" in done.stderr


def test_migrating_twice_changes_nothing(served: Run) -> None:
    assert command("migrate", "--home", served.home).returncode == 0
    assert served.serves()


def test_models_are_listed_and_one_not_fetched_says_how(place: Path) -> None:
    listed = command("models", "list", "--home", place / "home")
    missing = command("models", "path", "smollm2-135m-instruct", "--home", place / "home")
    unknown = command("models", "path", "gpt-nothing", "--home", place / "home")

    assert "smollm2-135m-instruct" in listed.stdout.split()
    assert (missing.returncode, unknown.returncode) == (2, 2)
    assert "models fetch smollm2-135m-instruct" in missing.stderr
    assert "gpt-nothing" in unknown.stderr
