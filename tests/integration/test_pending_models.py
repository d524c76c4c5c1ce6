"""The API's side of a hub's entry without facts: not ready, ready, refused; the others are there all along."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import httpx2
import pytest

from shared.chores import base_models
from shared.settings import Settings
from shared.store.db import session_scope
from tests.command_line import run_here
from tests.factories import make_file
from tests.integration.conftest import Api
from tests.lifecycle.stack import until
from tests.live import live_api
from tests.patience import patience

CONFIG = {
    "architectures": ["LlamaForCausalLM"],
    "hidden_size": 64,
    "num_attention_heads": 4,
    "num_hidden_layers": 2,
    "vocab_size": 100,
}


@pytest.fixture
def client(api: Api, tmp_path: Path) -> Iterator[httpx2.Client]:
    repository = f"example/{tmp_path.name}"  # each test's own row
    (tmp_path / "models.toml").write_text(f'[models.far]\nsource = "hub"\nrepository = "{repository}"\n')
    settings: Settings = api.settings.model_copy(update={"models_file": tmp_path / "models.toml"})
    headers = {"Authorization": f"Bearer {api.key}"}
    with live_api(settings) as url, httpx2.Client(base_url=url, headers=headers, timeout=patience(20)) as client:
        yield client


def states(client: httpx2.Client) -> dict[str, str]:
    models = client.get("/v1/models").json()["data"]
    return {model["id"]: model["tunepool"]["state"] for model in models if model["tunepool"]}


def submit(api: Api, client: httpx2.Client) -> httpx2.Response:
    with session_scope(api.engine) as session:
        file = make_file(session, api.caller).id
    return client.post("/v1/fine_tuning/jobs", json={"model": "far", "training_file": file})


def look_up(api: Api, *, refused: str = "") -> None:
    """What a worker of the CPU lane writes."""
    with session_scope(api.engine) as session:
        claimed = base_models.claim(session, worker_id="w", lease_seconds=60)
        assert claimed is not None
        lease = claimed.lease
        if refused:
            assert base_models.refused(session, lease, error=refused)
        else:
            assert base_models.resolved(session, lease, commit="1" * 40, config=json.dumps(CONFIG))


def test_a_job_waits_for_the_look_up_and_is_accepted_after_it(api: Api, client: httpx2.Client) -> None:
    early = submit(api, client)

    assert (early.status_code, early.json()["error"]["code"]) == (503, "base_model_resolving")
    assert int(early.headers["retry-after"]) > 0
    assert "not ready yet" in early.json()["error"]["message"]
    assert "example/" in client.get("/v1/models/far").json()["tunepool"]["detail"]
    assert states(client) == {"far": "resolving", "smollm2-135m-instruct": "ready"}
    ready = client.get("/readyz").json()
    assert (set(ready["resolving_models"]), ready["unusable_models"]) == ({"far"}, {})

    look_up(api)

    assert submit(api, client).status_code == 200
    assert states(client) == {"far": "ready", "smollm2-135m-instruct": "ready"}
    until(  # one look at readiness serves all for a second
        lambda: client.get("/readyz").json()["resolving_models"] == {}, seconds=20, what="nothing is looked up"
    )


def test_what_the_hub_refused_is_told_with_its_remedy(api: Api, client: httpx2.Client) -> None:
    assert submit(api, client).status_code == 503

    look_up(api, refused="It is gated: accept its terms and set HF_TOKEN.")

    answer = submit(api, client)
    assert (answer.status_code, answer.json()["error"]["code"]) == (400, "base_model_misconfigured")
    assert "accept its terms and set HF_TOKEN" in answer.json()["error"]["message"]
    assert states(client) == {"far": "error", "smollm2-135m-instruct": "ready"}
    assert set(client.get("/readyz").json()["unusable_models"]) == {"far"}


def test_the_command_line_says_what_is_not_ready_yet_and_not_that_the_server_is_ill(
    api: Api, client: httpx2.Client, tmp_path: Path
) -> None:
    known = {"OPENAI_BASE_URL": f"{str(client.base_url).rstrip('/')}/v1", "OPENAI_API_KEY": api.key}

    row = {"messages": [{"role": "user", "content": "1 + 1?"}, {"role": "assistant", "content": "2"}]}
    (tmp_path / "train.jsonl").write_text(f"{json.dumps(row)}\n" * 12)

    refused = run_here(tmp_path, "submit", "train.jsonl", "--model", "far", **known)

    assert refused.returncode == 3
    assert refused.stderr.startswith("The base model 'far' is not ready yet")
    assert "base_model_resolving" in refused.stderr
