"""One bad entry of models.toml stops nothing but the requests that name it."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import httpx2
import pytest

from shared.settings import Settings
from tests.command_line import run_here
from tests.integration.conftest import Api
from tests.live import live_api
from tests.patience import patience

MODELS = """
[models.llama]
source = "hub"
repository = "meta-llama/Llama-3.1-8B-Instruct"
revision = "main"
[models.llama.config]
architectures = ["LlamaForCausalLM"]
[models.lost]
source = "path"
path = "/nowhere"
"""


@pytest.fixture(scope="module")
def client(api: Api, tmp_path_factory: pytest.TempPathFactory) -> Iterator[httpx2.Client]:
    home: Path = tmp_path_factory.mktemp("bad-base")
    (home / "models.toml").write_text(MODELS)
    settings: Settings = api.settings.model_copy(update={"models_file": home / "models.toml"})
    headers = {"Authorization": f"Bearer {api.key}"}
    with live_api(settings) as url, httpx2.Client(base_url=url, headers=headers, timeout=patience(20)) as client:
        yield client


def test_the_list_says_which_models_can_be_used(client: httpx2.Client) -> None:
    listed = client.get("/v1/models")

    assert listed.status_code == 200
    states = {model["id"]: model["tunepool"]["state"] for model in listed.json()["data"] if model["tunepool"]}
    assert states == {"llama": "error", "lost": "error", "smollm2-135m-instruct": "ready"}


@pytest.mark.parametrize(("name", "says"), [("lost", "/nowhere/config.json"), ("llama", "a branch can move")])
def test_whoever_names_the_entry_reads_its_reason(client: httpx2.Client, name: str, says: str) -> None:
    job = {"model": name, "training_file": "file-none"}
    assert says in client.get(f"/v1/models/{name}").json()["tunepool"]["detail"]
    answers = [
        client.post("/v1/fine_tuning/jobs", json=job),
        client.post("/v1/tunepool/preflights", json=job),
    ]

    assert [answer.status_code for answer in answers] == [400, 400]
    for answer in answers:
        error = answer.json()["error"]
        assert (error["code"], error["param"]) == ("base_model_misconfigured", "model")
        assert says in error["message"]


def test_a_job_of_another_model_does_not_notice(client: httpx2.Client) -> None:
    job = {"model": "smollm2-135m-instruct", "training_file": "file-none"}

    assert "file-none" in client.post("/v1/fine_tuning/jobs", json=job).json()["error"]["message"]


def test_the_api_is_ready_and_names_what_cannot_be_used(client: httpx2.Client) -> None:
    ready = client.get("/readyz")

    assert ready.status_code == 200
    assert set(ready.json()["unusable_models"]) == {"llama", "lost"}


def test_a_file_that_is_no_toml_is_told_in_the_list_and_the_built_in_model_stays(api: Api, tmp_path: Path) -> None:
    (tmp_path / "models.toml").write_text("[models.llama\n")
    settings: Settings = api.settings.model_copy(update={"models_file": tmp_path / "models.toml"})
    with live_api(settings) as url:
        listed = run_here(tmp_path, "models", "list", OPENAI_BASE_URL=f"{url}/v1", OPENAI_API_KEY=api.key)

    assert (listed.returncode, "smollm2-135m-instruct" in listed.stdout) == (0, True)
    assert listed.stderr.startswith("models.toml is left out: ")
    assert "is not understood" in listed.stderr
