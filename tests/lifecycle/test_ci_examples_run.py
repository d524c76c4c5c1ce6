"""The files of `examples/ci` at work: their own scripts, with the variables of their runners, against a live stack.

Data come to the runner as git, LFS, DVC or a bucket bring them. Trainer, examiner and evaluator are the fakes that obey
the contracts; the command line is installed from a wheel by the script itself.
"""

from __future__ import annotations

import itertools
import json
import shutil
import subprocess
import xml.etree.ElementTree as ET  # of our own files
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import boto3
import pytest
from cryptography.fernet import Fernet
from moto.server import ThreadedMotoServer
from sqlalchemy import select
from sqlalchemy.orm import Session

from api.app import create_app
from shared.products import aliases
from shared.store.db import session_scope
from shared.store.tables import JobRow
from shared.tenants import keys, signing_keys
from tests import ci_runner
from tests.ci_runner import EXAMPLES, Checkout, Image, Ran, git
from tests.factories import make_key
from tests.fake_issuer import RSA, Issuer, issuing
from tests.lifecycle.stack import ROOT, Servers, Stack, open_stack
from tests.lifecycle.test_pipeline import SETTINGS, TOOL
from tests.live import served
from tests.patience import patience

SCOPES = ("files:write", "files:read", "jobs:write", "jobs:read", "models:read", "models:write")
ITEMS = 6
RUN = "https://ci.example.com/runs/7"
COUNT = itertools.count(1)


@dataclass(frozen=True)
class Place:
    """A stack with its API, an issuer of ID tokens whom it believes, and the machine of a runner."""

    stack: Stack
    url: str
    key: str
    issuer: Issuer
    image: Image


@pytest.fixture(scope="module")
def place(servers: Servers, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Place]:
    image = ci_runner.make_image(tmp_path_factory.mktemp("image"))
    with issuing() as issuer:
        issuer.publish(RSA)
        believed = {"TUNEPOOL_OIDC_ISSUERS": issuer.url, "TUNEPOOL_OIDC_NETWORKS": "127.0.0.0/8"}
        kept = {**SETTINGS, **believed, "TUNEPOOL_SECRETS_KEY": Fernet.generate_key().decode()}
        with open_stack(tmp_path_factory.mktemp("stack"), servers, **kept) as stack:
            with session_scope(stack.engine) as session:
                signing_keys.ensure(session, stack.settings)
                _, key = keys.create(session, project_id=stack.caller.project_id, name="runner")
                _, operator = make_key(session, scopes=("*", "admin"))
            stack.start_worker()
            stack.start_janitor()
            stack.wait_for_worker()
            with served(create_app(stack.settings)) as url:
                made = Place(stack, url, key, issuer, image)
                let_in(made, operator)
                yield made


def let_in(place: Place, operator: str) -> None:
    """The rules by which jobs of both systems sign in, made as docs/ci.md says."""
    environment = {"PATH": "/usr/bin:/bin", "OPENAI_BASE_URL": f"{place.url}/v1", "OPENAI_API_KEY": operator}
    common = ["--issuer", place.issuer.url, "--project", place.stack.caller.project_id]
    common += [word for scope in SCOPES for word in ("--scope", scope)]
    for name, claims in {
        "github": ["--repository", "octo/app", "--ref", "refs/heads/main"],
        "gitlab": ["--claim", "project_path=team/app", "--ref", "main"],
    }.items():
        done = subprocess.run(
            [TOOL, "oidc", "create", name, *common, *claims],
            env=environment,
            capture_output=True,
            text=True,
            timeout=patience(60),
            check=False,
        )
        assert done.returncode == 0, done.stderr


@dataclass(frozen=True)
class Pushed:
    """A commit that a runner has checked out, with what each system tells its jobs."""

    place: Place
    folder: Path
    home: Path
    commit: str

    def on(self, **variables: str) -> Checkout:
        known = self.place.image.environment(self.home, TUNEPOOL_CLI=str(self.place.image.wheel))
        return Checkout(self.folder, {**known, **variables})

    @property
    def values(self) -> dict[str, str]:
        """Variables that a team has set in its system, and its credential of Jenkins."""
        url, wheel = f"{self.place.url}/v1", str(self.place.image.wheel)
        known = {"TUNEPOOL_URL": url, "TUNEPOOL_CLI": wheel, "tunepool-key": self.place.key}
        return known | {"vars.TUNEPOOL_URL": url, "vars.TUNEPOOL_CLI": wheel}

    def github(self) -> Checkout:
        issuer = self.place.issuer
        return self.on(
            GITHUB_ACTIONS="true",
            CI="true",
            GITHUB_SHA=self.commit,
            GITHUB_REF_NAME="main",
            GITHUB_SERVER_URL="https://ci.example.com",
            GITHUB_REPOSITORY="octo/app",
            GITHUB_RUN_ID="7",
            GITHUB_STEP_SUMMARY=str(self.home / "summary.md"),
            GITHUB_OUTPUT=str(self.home / "outputs"),
            ACTIONS_ID_TOKEN_REQUEST_URL=f"{issuer.url}/request?api-version=2.0",
            ACTIONS_ID_TOKEN_REQUEST_TOKEN="of-the-runner",
        )

    def workflow(self) -> Ran:
        return self.github().run(ci_runner.of_workflow(self.values))

    def action(self) -> Ran:
        inputs = {"url": f"{self.place.url}/v1", "cli": str(self.place.image.wheel)}
        return self.github().run(ci_runner.of_action(inputs))

    def gitlab(self) -> Ran:
        claims: dict[str, Any] = {"repository": None, "project_path": "team/app", "ref": "main"}
        token = self.place.issuer.token(aud=self.place.url, **claims)
        known = {"GITLAB_CI": "true", "CI": "true", "CI_COMMIT_SHA": self.commit, "CI_COMMIT_REF_NAME": "main"}
        checkout = self.on(**known, CI_PIPELINE_URL=RUN, TUNEPOOL_ID_TOKEN=token)
        return checkout.run(ci_runner.of_gitlab(self.values))

    def jenkins(self) -> Ran:
        known = {"GIT_COMMIT": self.commit, "BRANCH_NAME": "main", "BUILD_URL": RUN}
        return self.on(**known).run(ci_runner.of_jenkins(self.values))

    def cases(self) -> dict[str, bool]:
        """Of junit.xml: whether each has passed."""
        cases = ET.parse(self.folder / "junit.xml").iter("testcase")  # noqa: S314  # our own file
        return {str(case.get("name")): case.find("failure") is None and case.find("error") is None for case in cases}

    def job(self) -> JobRow:
        """The newest job of this commit."""
        with Session(self.place.stack.engine) as session:
            of_commit = JobRow.job_metadata["git_sha"].astext == self.commit
            return session.scalars(select(JobRow).where(of_commit).order_by(JobRow.created_at.desc())).first()  # type: ignore[return-value]

    def prod(self) -> str:
        with Session(self.place.stack.engine) as session:
            row = aliases.find(session, "tickets@prod", project_id=self.place.stack.caller.project_id)
            return aliases.version(session, row, row.version).model


def good_rows() -> str:
    """Training rows that nobody has trained on."""
    told = [f"fake: steps=3 wrong=0 run={next(COUNT)}", *(f"row {number}" for number in range(11))]
    return "".join(json.dumps({"text": text}) + "\n" for text in told)


def held_out() -> str:
    rows = (json.dumps({"n": number}) for number in range(ITEMS))
    asked = [[{"role": role, "content": text} for role in ("user", "assistant")] for text in rows]
    return "".join(json.dumps({"messages": messages}) + "\n" for messages in asked)


def committed(_origin: Path) -> None:
    """Data that git itself keeps."""


def push(place: Place, tmp_path: Path, training: str, *, keep: Callable[[Path], None] = committed) -> Pushed:
    """The example's pipeline and gate with a team's data, committed and cloned. The stack's one model is `tiny`.

    `keep` is called in the new repository before the commit: it may have the data kept elsewhere than in git.
    """
    origin, folder, home = tmp_path / "origin", tmp_path / "work", tmp_path / "home"
    origin.mkdir()
    home.mkdir()
    pipeline = (EXAMPLES / "pipeline.yaml").read_text()
    assert pipeline.count("model: smollm2-135m-instruct") == 1
    (origin / "pipeline.yaml").write_text(pipeline.replace("model: smollm2-135m-instruct", "model: tiny"))
    shutil.copy(EXAMPLES / "gate.yaml", origin)
    (origin / "train.jsonl").write_text(training)
    (origin / "heldout.jsonl").write_text(held_out())
    git(origin, "init", "-q", "-b", "main")
    keep(origin)
    git(origin, "add", ".")
    git(origin, "commit", "-q", "-m", "data")
    git(tmp_path, "clone", "-q", str(origin), str(folder))
    return Pushed(place, folder, home, git(folder, "rev-parse", "HEAD"))


SYSTEMS: dict[str, Callable[[Pushed], Ran]] = {
    "workflow of GitHub": Pushed.workflow,
    "action of GitHub": Pushed.action,
    "GitLab": Pushed.gitlab,
    "Jenkins": Pushed.jenkins,
}


@pytest.mark.parametrize("system", SYSTEMS)
def test_the_script_of_an_example_takes_good_data_to_production(place: Place, tmp_path: Path, system: str) -> None:
    pushed = push(place, tmp_path, good_rows())

    ran = SYSTEMS[system](pushed)

    assert ran.code == 0, ran.words
    job = pushed.job()
    assert pushed.prod() == job.fine_tuned_model
    expected = RUN if system in {"GitLab", "Jenkins"} else "https://ci.example.com/octo/app/actions/runs/7"
    assert (job.job_metadata["ci_run"], job.job_metadata["pipeline"]) == (expected, "tickets")
    cases = pushed.cases()
    assert all(cases.values()), cases
    assert {"preflight", "submit", "train", "evaluate", "gate", "promote"} <= {name.split(":")[0] for name in cases}
    assert place.key not in ran.words, "the credential is not printed"
    if "GitHub" in system:
        assert f"model={job.fine_tuned_model}" in (pushed.home / "outputs").read_text().splitlines()
        told = (pushed.home / "summary.md").read_text()
        assert f"/ui/jobs/{job.id})" in told
        assert f"| {job.fine_tuned_model} | exact_match | 1 |" in told


def test_a_job_of_github_has_its_summary_and_its_faults_at_their_lines(place: Place, tmp_path: Path) -> None:
    lines = good_rows().splitlines()
    pushed = push(place, tmp_path, "\n".join([*lines[:2], '{"text": 3}', *lines[3:]]) + "\n")

    ran = pushed.workflow()

    assert ran.code == 2, ran.words
    assert "::error file=train.jsonl,line=3" in ran.words
    assert "preflight" in (pushed.home / "summary.md").read_text()
    assert not all(pushed.cases().values())


def test_a_job_of_gitlab_has_its_faults_in_the_report_that_gitlab_reads(place: Place, tmp_path: Path) -> None:
    lines = good_rows().splitlines()
    pushed = push(place, tmp_path, "\n".join([*lines[:2], '{"text": 3}', *lines[3:]]) + "\n")

    ran = pushed.gitlab()

    assert ran.code == 2, ran.words
    (fault, *_) = json.loads((pushed.folder / "gl-code-quality-report.json").read_text())
    assert (fault["location"]["path"], fault["location"]["lines"]["begin"]) == ("train.jsonl", 3)


def recipe_of(keeper: str) -> str:
    """The first command that the docs give for data of that keeper and that is typed as it stands."""
    row = next(line for line in (ROOT / "docs/ci.md").read_text().splitlines() if line.startswith(f"| {keeper} |"))
    return next(words for words in row.split("`")[1::2] if words.split()[0] in {"git", "dvc", "aws"})


def run_in(folder: Path, *command: str, home: Path) -> None:
    """Run a command of a data tool as somebody whose settings are in `home`."""
    tool = Path(shutil.which(command[0]) or command[0])
    known = {
        "HOME": str(home),
        "PATH": f"{tool.parent}:/usr/bin:/bin",
        "GIT_CONFIG_NOSYSTEM": "1",
        "DVC_NO_ANALYTICS": "1",
    }
    ran = subprocess.run(
        [str(tool), *command[1:]],
        cwd=folder,
        env=known,
        capture_output=True,
        text=True,
        timeout=patience(120),
        check=False,
    )
    assert ran.returncode == 0, ran.stdout + ran.stderr


@pytest.mark.skipif(shutil.which("git-lfs") is None, reason="no git-lfs on this machine")
def test_data_of_lfs_come_by_the_command_that_the_docs_give(place: Place, tmp_path: Path) -> None:
    def keep(origin: Path) -> None:
        run_in(origin, "git", "lfs", "install", "--local", home=tmp_path)
        run_in(origin, "git", "lfs", "track", "*.jsonl", home=tmp_path)

    training = good_rows()
    pushed = push(place, tmp_path, training, keep=keep)
    run_in(pushed.folder, "git", "lfs", "install", "--local", "--skip-smudge", home=tmp_path)
    shutil.rmtree(pushed.folder / ".git" / "lfs", ignore_errors=True)
    for name in ("train.jsonl", "heldout.jsonl"):  # as a checkout without `lfs: true` leaves them
        pointer = git(pushed.folder, "show", f"HEAD:{name}")
        assert pointer.startswith("version https://git-lfs"), "the commit holds a pointer"
        (pushed.folder / name).write_text(pointer + "\n")

    run_in(pushed.folder, *recipe_of("Git LFS").split(), home=tmp_path)

    assert (pushed.folder / "train.jsonl").read_text() == training
    ran = pushed.workflow()
    assert ran.code == 0, ran.words
    assert pushed.prod() == pushed.job().fine_tuned_model


@pytest.mark.skipif(shutil.which("dvc") is None, reason="no dvc on this machine")
def test_data_of_dvc_come_by_the_command_that_the_docs_give(place: Place, tmp_path: Path) -> None:
    def keep(origin: Path) -> None:
        run_in(origin, "dvc", "init", "-q", home=tmp_path)
        run_in(origin, "dvc", "add", "-q", "train.jsonl", "heldout.jsonl", home=tmp_path)
        run_in(origin, "dvc", "remote", "add", "-q", "-d", "store", str(tmp_path / "kept"), home=tmp_path)
        run_in(origin, "dvc", "push", "-q", home=tmp_path)

    training = good_rows()
    pushed = push(place, tmp_path, training, keep=keep)
    assert not (pushed.folder / "train.jsonl").exists(), "the commit holds train.jsonl.dvc alone"

    run_in(pushed.folder, *recipe_of("DVC").split(), home=tmp_path)

    assert (pushed.folder / "train.jsonl").read_text() == training
    ran = pushed.workflow()
    assert ran.code == 0, ran.words
    assert pushed.prod() == pushed.job().fine_tuned_model


def test_a_pointer_of_lfs_that_was_not_resolved_is_red_at_its_line(place: Place, tmp_path: Path) -> None:
    pointer = "version https://git-lfs.github.com/spec/v1\noid sha256:" + "0" * 64 + "\nsize 12345\n"
    pushed = push(place, tmp_path, pointer)

    ran = pushed.workflow()

    assert ran.code == 2, ran.words
    assert "::error file=train.jsonl,line=1" in ran.words
    assert "git lfs pull" in ran.words


@pytest.mark.skipif(shutil.which("aws") is None, reason="no aws command line on this machine")
def test_data_of_a_bucket_come_by_the_command_that_the_docs_give(place: Place, tmp_path: Path) -> None:
    training = good_rows()
    pushed = push(place, tmp_path, training)
    (pushed.folder / "train.jsonl").unlink()
    command = recipe_of("a bucket").replace("BUCKET", "datasets").replace("VERSION", "v7")
    known = {"AWS_ACCESS_KEY_ID": "test", "AWS_SECRET_ACCESS_KEY": "test", "AWS_DEFAULT_REGION": "us-east-1"}
    server = ThreadedMotoServer(port=0)
    server.start()
    try:
        host, port = server.get_host_and_port()
        endpoint = f"http://{host}:{port}"
        store = boto3.client(
            "s3", endpoint_url=endpoint, region_name="us-east-1", aws_access_key_id="test", aws_secret_access_key="test"
        )
        store.create_bucket(Bucket="datasets")
        store.put_object(Bucket="datasets", Key="v7/train.jsonl", Body=training.encode())
        subprocess.run(
            command.split(),
            cwd=pushed.folder,
            env={
                **known,
                "AWS_ENDPOINT_URL": endpoint,
                "PATH": f"{Path(shutil.which('aws') or '').parent}:/usr/bin:/bin",
            },
            timeout=patience(60),
            check=True,
        )
    finally:
        server.stop()

    ran = pushed.workflow()

    assert ran.code == 0, ran.words
    assert pushed.prod() == pushed.job().fine_tuned_model
