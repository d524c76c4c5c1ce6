"""The hub answers, and says no: what only people can mend ends at once, what may pass is tried again."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from shared.errors import Invalid
from shared.settings import Settings
from shared.settle.catalogue import load_catalogue
from tests.lifecycle.stack import Stack, make_model
from tests.loopback import answering
from worker.base_models import BaseModelUnavailable, ensure

REVISION = "0123456789abcdef" * 2 + "01234567"
LISTED = [{"type": "file", "path": "config.json", "size": 2, "oid": "0" * 40}]


@contextmanager
def hub(listing: int, files: int) -> Iterator[None]:
    """A hub that answers questions for the list of files with one status, for a file with the other."""

    def answer(path: str, _: str | None) -> tuple[int, bytes, dict[str, str]]:
        status = listing if path.startswith("/api/") else files
        # The hub's client asks five times more.
        headers = {"Content-Type": "application/json", "Retry-After": "0"}
        return status, json.dumps(LISTED).encode() if status == 200 else b"{}", headers

    with answering(answer) as url, pytest.MonkeyPatch.context() as environment:
        environment.setenv("HF_ENDPOINT", url)
        environment.delenv("HF_HUB_OFFLINE", raising=False)
        yield


def catalogue(file: Path, config: Path) -> Path:
    facts = [f"{key} = {json.dumps(value)}" for key, value in json.loads(config.read_text()).items()]
    head = ["[models.far]", 'source = "hub"', 'repository = "example/far"', f'revision = "{REVISION}"']
    with file.open("a") as stream:
        stream.write("\n".join(["", *head, "[models.far.config]", *facts, ""]))
    return file


def fetch(folder: Path, config: Path) -> None:
    models = catalogue(folder / "models.toml", config)
    entry = load_catalogue(Settings(models_file=models)).entry("far")
    ensure(entry, cache=folder / "cache", interrupt=lambda: None)


@pytest.fixture
def config(tmp_path: Path) -> Path:
    make_model(tmp_path / "tiny")
    return tmp_path / "tiny" / "config.json"


@pytest.mark.parametrize(
    ("listing", "files", "expected"),
    [
        (401, 401, ("base_model_forbidden", "HF_TOKEN")),
        (403, 403, ("base_model_forbidden", "HF_TOKEN")),
        (404, 404, ("base_model_not_found", "models.toml, or `tunepool models`")),
        (200, 403, ("base_model_forbidden", "HF_TOKEN")),  # a gated one lists its files and gives none
    ],
)
def test_what_the_hub_refuses_is_an_error_of_the_catalogue(
    config: Path, tmp_path: Path, listing: int, files: int, expected: tuple[str, str]
) -> None:
    with hub(listing, files), pytest.raises(Invalid) as refused:
        fetch(tmp_path, config)

    code, remedy = expected
    assert refused.value.code == code
    assert "example/far at revision 0123456789ab" in refused.value.message
    assert remedy in refused.value.message
    assert list(tmp_path.glob("cache/**/*.fetch")) == []


@pytest.mark.parametrize(("listing", "files"), [(429, 429), (501, 501)])
def test_what_may_pass_is_not_the_users_fault(config: Path, tmp_path: Path, listing: int, files: int) -> None:
    with hub(listing, files), pytest.raises(BaseModelUnavailable) as away:
        fetch(tmp_path, config)

    assert "Once its source answers this host, the job goes on" in away.value.message


def test_a_job_whose_model_the_hub_refuses_fails_before_it_takes_a_device(stack: Stack) -> None:
    catalogue(stack.home / "models.toml", stack.home / "tiny" / "config.json")
    with hub(403, 403):
        stack.start_worker()
        stack.start_janitor()
        job = stack.wait(stack.submit("steps=2", model="far"), seconds=60)

    assert (job.status, job.error["code"], job.attempts) == ("failed", "base_model_forbidden", 0)
    assert stack.broken_invariants() == []
