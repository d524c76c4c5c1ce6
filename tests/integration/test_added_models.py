"""Base models are added, looked at and removed by routes. The file wins by name; what jobs use is not removed."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx2
import pytest
from sqlalchemy import delete, func, select, update

from shared.chores import base_models
from shared.settings import Settings
from shared.store.db import session_scope
from shared.store.tables import AddedModelRow, BaseModelRow, JobRow
from tests.factories import make_file, make_key
from tests.integration.conftest import Api
from tests.integration.test_bad_requests import refused
from tests.live import live_api
from tests.patience import patience

CONFIG = {
    "architectures": ["LlamaForCausalLM"],
    "hidden_size": 64,
    "num_attention_heads": 4,
    "num_hidden_layers": 2,
    "vocab_size": 100,
}
FILE = """
[models.of-the-file]
source = "path"
path = "/nowhere"
[aliases]
"gpt-of-the-file" = "of-the-file"
"""
ROUTE = "/v1/tunepool/models"
BUILT_IN = "smollm2-135m-instruct"


@pytest.fixture(scope="module")
def settings(api: Api, tmp_path_factory: pytest.TempPathFactory) -> Settings:
    file: Path = tmp_path_factory.mktemp("catalogue") / "models.toml"
    file.write_text(FILE)
    return api.settings.model_copy(update={"models_file": file})


@pytest.fixture(scope="module")
def url(settings: Settings) -> Iterator[str]:
    with live_api(settings) as url:
        yield url


@pytest.fixture(scope="module")
def admin(api: Api, url: str) -> Iterator[httpx2.Client]:
    """Everything in the project, and the pool."""
    with session_scope(api.engine) as session:
        _, key = make_key(session, scopes=("*", "admin"))
    with httpx2.Client(base_url=url, headers={"Authorization": f"Bearer {key}"}, timeout=patience(20)) as client:
        yield client


@pytest.fixture(autouse=True)
def fresh(api: Api) -> None:
    end_jobs(api)
    with session_scope(api.engine) as session:
        session.execute(delete(AddedModelRow))
        session.execute(delete(BaseModelRow))


def end_jobs(api: Api) -> None:
    with session_scope(api.engine) as session:
        session.execute(update(JobRow).values(status="cancelled", finished_at=func.now()))


def add(admin: httpx2.Client, **body: Any) -> dict[str, Any]:
    answer = admin.post(ROUTE, json={"source": "example/Far-8B", **body})
    assert answer.status_code == 200, answer.text
    made: dict[str, Any] = answer.json()
    return made


def look_up(api: Api, *, refusal: str = "") -> None:
    """What a worker of the CPU lane writes."""
    with session_scope(api.engine) as session:
        claimed = base_models.claim(session, worker_id="w", lease_seconds=60)
        assert claimed is not None
        if refusal:
            assert base_models.refused(session, claimed.lease, error=refusal, known=claimed.known)
        else:
            commit = None if claimed.source == "path" else "1" * 40
            assert base_models.resolved(session, claimed.lease, commit=commit, config=json.dumps(CONFIG))


def submit(api: Api, admin: httpx2.Client, model: str) -> httpx2.Response:
    with session_scope(api.engine) as session:
        caller, secret = make_key(session)
        file = make_file(session, caller).id
    body = {"model": model, "training_file": file}
    return admin.post("/v1/fine_tuning/jobs", json=body, headers={"Authorization": f"Bearer {secret}"})


def test_an_added_model_is_named_at_once_and_usable_when_a_worker_has_seen_it(api: Api, admin: httpx2.Client) -> None:
    made = add(admin, aliases=["gpt-4o-mini-2024-07-18"])

    assert (made["id"], made["state"], made["revision"], made["commit"]) == ("far-8b", "resolving", "main", None)
    assert (made["origin"], made["source"], made["locator"]) == ("added", "hub", "example/Far-8B")
    listed = {model["id"]: model["tunepool"] for model in admin.get("/v1/models").json()["data"]}
    assert listed["far-8b"]["state"] == listed["gpt-4o-mini-2024-07-18"]["state"] == "resolving"
    early = submit(api, admin, "far-8b")
    assert (early.status_code, early.json()["error"]["code"]) == (503, "base_model_resolving")

    look_up(api)

    ready = admin.get(f"{ROUTE}/gpt-4o-mini-2024-07-18").json()
    assert (ready["id"], ready["state"], ready["commit"]) == ("far-8b", "ready", "1" * 40)
    assert ready["sizes"]["architecture"] == "LlamaForCausalLM"
    assert submit(api, admin, "gpt-4o-mini-2024-07-18").status_code == 200
    audit = admin.get("/v1/tunepool/audit", params={"target": "far-8b"}).json()["data"]
    assert [(entry["action"], entry["after"]["locator"]) for entry in audit] == [("base_model.add", "example/Far-8B")]


def test_a_model_is_known_by_its_repository_too_wherever_a_name_is_asked_for(api: Api, admin: httpx2.Client) -> None:
    add(admin)
    look_up(api)
    path = f"{ROUTE}/example%2FFar-8B"

    assert admin.get(path).json()["id"] == "far-8b"
    assert admin.get(f"{ROUTE}/example/far-8b").json()["id"] == "far-8b"
    assert admin.post(f"{path}/check").json()["id"] == "far-8b"
    assert admin.get(f"{path}/prefetch").json()["data"] == []
    assert admin.get("/v1/models/example%2FFar-8B").json()["id"] == "far-8b"
    assert submit(api, admin, "example/Far-8B").status_code == 200
    assert "another name of 'far-8b'" in refused(api, admin.delete(path), status=409)["message"]


@pytest.mark.parametrize("name", ["gpt-4o", "nobody/has-this"])
def test_who_asks_for_a_model_that_is_not_there_is_told_which_are(api: Api, admin: httpx2.Client, name: str) -> None:
    chat = {"model": name, "messages": [{"role": "user", "content": "x"}]}
    answers = [
        submit(api, admin, name),
        admin.get(f"/v1/models/{name}"),
        admin.post("/v1/chat/completions", json=chat),
        admin.post("/v1/completions", json={"model": name, "prompt": "x"}),
    ]

    for answer in answers:
        error = refused(api, answer, status=404)
        assert (error["code"], error["param"]) == ("model_not_found", "model")
        assert f"'{name}'" in error["message"]
        assert f"Known base models: {BUILT_IN}." in error["message"]
    assert refused(api, admin.get(f"{ROUTE}/{name}"), status=404)["code"] == "model_not_found"


def test_a_refusal_is_told_and_checked_again_on_demand(api: Api, admin: httpx2.Client) -> None:
    add(admin)
    look_up(api, refusal="It is gated: accept its terms and set HF_TOKEN.")

    found = admin.get(f"{ROUTE}/far-8b").json()
    assert (found["state"], found["detail"]) == ("error", "It is gated: accept its terms and set HF_TOKEN.")
    assert "HF_TOKEN" in refused(api, submit(api, admin, "far-8b"), status=400)["message"]

    assert admin.post(f"{ROUTE}/far-8b/check").json()["state"] == "resolving"
    look_up(api)
    assert admin.get(f"{ROUTE}/far-8b").json()["state"] == "ready"


def test_a_check_of_a_model_in_use_leaves_it_usable_and_its_commit_pinned(api: Api, admin: httpx2.Client) -> None:
    add(admin)
    look_up(api)

    assert admin.post(f"{ROUTE}/far-8b/check").json()["state"] == "ready"
    look_up(api, refusal="The hub does not give it any more.")

    found = admin.get(f"{ROUTE}/far-8b").json()
    assert (found["state"], found["commit"]) == ("ready", "1" * 40)
    assert found["detail"] == "The hub does not give it any more."
    assert submit(api, admin, "far-8b").status_code == 200


def test_a_check_of_what_nobody_looks_up_changes_nothing(admin: httpx2.Client) -> None:
    assert admin.post(f"{ROUTE}/{BUILT_IN}/check").json()["state"] == "ready"
    assert admin.post(f"{ROUTE}/of-the-file/check").json()["state"] == "error"


def test_a_folder_is_added_by_its_path_and_has_no_commit(api: Api, admin: httpx2.Client) -> None:
    made = add(admin, source="/models/House-Model")
    look_up(api)

    found = admin.get(f"{ROUTE}/{made['id']}").json()
    assert (found["id"], found["source"], found["revision"], found["commit"]) == ("house-model", "path", None, None)
    assert found["state"] == "ready"


def test_a_removed_model_is_gone_and_may_be_added_with_another_commit(api: Api, admin: httpx2.Client) -> None:
    add(admin)
    look_up(api)

    assert admin.delete(f"{ROUTE}/far-8b").json() == {
        "id": "far-8b",
        "object": "tunepool.base_model",
        "deleted": True,
    }

    refused(api, admin.get(f"{ROUTE}/far-8b"), status=404)
    refused(api, submit(api, admin, "far-8b"), status=404)
    assert add(admin)["state"] == "resolving", "what was known of it went with it"


def test_a_model_that_unfinished_jobs_use_is_not_removed(api: Api, admin: httpx2.Client) -> None:
    add(admin)
    look_up(api)
    job = submit(api, admin, "far-8b").json()["id"]

    answer = admin.delete(f"{ROUTE}/far-8b")

    error = refused(api, answer, status=409)
    assert (error["code"], error["param"]) == ("base_model_in_use", "name")
    assert job in error["message"]
    assert answer.headers["x-should-retry"] == "false"
    end_jobs(api)
    assert admin.delete(f"{ROUTE}/far-8b").status_code == 200


def test_a_model_is_removed_while_a_worker_looks_it_up(api: Api, admin: httpx2.Client) -> None:
    add(admin)
    with session_scope(api.engine) as session:
        claimed = base_models.claim(session, worker_id="w", lease_seconds=60)
    assert claimed is not None

    assert admin.delete(f"{ROUTE}/far-8b").status_code == 200

    with session_scope(api.engine) as session:
        assert not base_models.resolved(session, claimed.lease, commit="1" * 40, config="{}")
        assert session.scalars(select(BaseModelRow)).all() == []


def test_two_entries_of_one_repository_share_what_is_known_until_the_last_goes(api: Api, admin: httpx2.Client) -> None:
    add(admin)
    look_up(api)

    assert add(admin, name="second")["state"] == "ready"
    admin.delete(f"{ROUTE}/far-8b")
    assert admin.get(f"{ROUTE}/second").json()["state"] == "ready"
    admin.delete(f"{ROUTE}/second")
    with session_scope(api.engine) as session:
        assert session.scalars(select(BaseModelRow)).all() == []


@pytest.mark.parametrize("name", ["of-the-file", BUILT_IN])
def test_what_the_file_or_the_installation_brings_is_not_removed_by_the_route(
    api: Api, admin: httpx2.Client, name: str
) -> None:
    assert refused(api, admin.delete(f"{ROUTE}/{name}"), status=409)["code"] == "base_model_not_added"


def test_an_alias_is_not_removed_in_place_of_its_model(api: Api, admin: httpx2.Client) -> None:
    add(admin, aliases=["gpt"])

    assert "another name of 'far-8b'" in refused(api, admin.delete(f"{ROUTE}/gpt"), status=409)["message"]


@pytest.mark.parametrize(
    ("body", "param"),
    [
        ({"name": "far-8b"}, "name"),
        ({"name": "gpt"}, "name"),
        ({"name": BUILT_IN}, "name"),
        ({"name": "of-the-file"}, "name"),
        ({"name": "gpt-of-the-file"}, "name"),
        ({"name": "new", "aliases": ["far-8b"]}, "aliases"),
        ({"name": "new", "aliases": ["fresh", "gpt"]}, "aliases"),
        ({"name": "new", "aliases": [BUILT_IN]}, "aliases"),
    ],
)
def test_a_name_that_is_taken_is_refused(api: Api, admin: httpx2.Client, body: dict[str, Any], param: str) -> None:
    add(admin, aliases=["gpt"])

    error = refused(api, admin.post(ROUTE, json={"source": "example/other", **body}), status=409)

    assert (error["code"], error["param"]) == ("base_model_exists", param)


def test_of_several_additions_at_once_one_wins(admin: httpx2.Client) -> None:
    answers: list[httpx2.Response] = []

    def race() -> None:
        answers.append(admin.post(ROUTE, json={"source": "example/Far-8B"}))

    threads = [threading.Thread(target=race) for _ in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(patience(30))

    assert sorted(answer.status_code for answer in answers) == [200, 409, 409, 409, 409, 409]


def test_an_entry_of_the_file_wins_by_name_and_gives_it_back(
    api: Api, admin: httpx2.Client, settings: Settings
) -> None:
    add(admin, name="both", aliases=["said"])
    look_up(api)
    assert settings.models_file is not None
    settings.models_file.write_text(f'{FILE}\n[models.both]\nsource = "path"\npath = "/elsewhere"\n')
    try:
        found = admin.get(f"{ROUTE}/both").json()
        assert (found["origin"], found["state"]) == ("models.toml", "error")
        assert "/elsewhere" in found["detail"]
        refused(api, admin.get(f"{ROUTE}/said"), status=404)
    finally:
        settings.models_file.write_text(FILE)

    assert admin.get(f"{ROUTE}/both").json()["state"] == "ready"


@pytest.mark.parametrize(
    ("body", "param"),
    [
        ({}, "source"),
        ({"source": None}, "source"),
        ({"source": ""}, "source"),
        ({"source": 3}, "source"),
        ({"source": ["a/b"]}, "source"),
        ({"source": "a"}, "source"),
        ({"source": "a/b/c"}, "source"),
        ({"source": "../b"}, "source"),
        ({"source": "a/.."}, "source"),
        ({"source": "a/b..c"}, "source"),
        ({"source": "./models"}, "source"),
        ({"source": "a/-b"}, "source"),
        ({"source": "-a/b"}, "source"),
        ({"source": "https://hub.example.org/a/b"}, "source"),
        ({"source": "file:///etc"}, "source"),
        ({"source": "hf://a/b"}, "source"),
        ({"source": "a/b?x=1"}, "source"),
        ({"source": "a/b\x00"}, "source"),
        ({"source": "a/b\u202e"}, "source"),
        ({"source": "\u00e4/b"}, "source"),
        ({"source": "a/" + "b" * 2000}, "source"),
        ({"source": "/"}, "source"),
        ({"source": "//host/share"}, "source"),
        ({"source": "/models/../etc"}, "source"),
        ({"source": "/models/x/"}, "source"),
        ({"source": "/models/\x00"}, "source"),
        ({"source": "/models/x", "revision": "main"}, "revision"),
        ({"source": "/models/with space"}, "name"),
        ({"source": "a/b", "revision": ""}, "revision"),
        ({"source": "a/b", "revision": "../x"}, "revision"),
        ({"source": "a/b", "revision": "-x"}, "revision"),
        ({"source": "a/b", "revision": "x..y"}, "revision"),
        ({"source": "a/b", "revision": 7}, "revision"),
        ({"source": "a/b", "name": ""}, "name"),
        ({"source": "a/b", "name": "a/b"}, "name"),
        ({"source": "a/b", "name": ".."}, "name"),
        ({"source": "a/b", "name": "ft:x"}, "name"),
        ({"source": "a/b", "name": "x" * 101}, "name"),
        ({"source": "a/b", "aliases": "gpt"}, "aliases"),
        ({"source": "a/b", "aliases": [1]}, "aliases.0"),
        ({"source": "a/b", "aliases": ["ok", ""]}, "aliases.1"),
        ({"source": "a/b", "aliases": ["b"]}, "aliases.0"),
        ({"source": "a/b", "aliases": ["x", "x"]}, "aliases.1"),
        ({"source": "a/b", "aliases": ["ft:gpt"]}, "aliases"),
        ({"source": "a/b", "aliases": ["a/../b"]}, "aliases.0"),
        ({"source": "a/b", "aliases": [f"a{number}" for number in range(21)]}, "aliases"),
        ({"source": "a/b", "token": "hf_x"}, "token"),
    ],
)
def test_bad_input_is_refused_by_field(api: Api, admin: httpx2.Client, body: dict[str, Any], param: str) -> None:
    assert refused(api, admin.post(ROUTE, json=body), status=400)["param"] == param


@pytest.mark.parametrize("name", ["none", "%00", "..%2F..%2Fetc", "ft:x", "x" * 500, "%F0%9F%92%A9"])
def test_a_name_that_is_none_is_not_there(api: Api, admin: httpx2.Client, name: str) -> None:
    for answer in (
        admin.get(f"{ROUTE}/{name}"),
        admin.delete(f"{ROUTE}/{name}"),
        admin.post(f"{ROUTE}/{name}/check"),
    ):
        assert answer.status_code == 404, answer.text
        assert set(answer.json()) == {"error"}


def test_base_models_are_not_deleted_as_adapters(api: Api, admin: httpx2.Client) -> None:
    add(admin)

    assert "base model" in refused(api, admin.delete("/v1/models/far-8b"), status=400)["message"]
