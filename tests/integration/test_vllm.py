"""With a vLLM server beside it, the API has it answer what it can, and says what it cannot."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx2
import pytest
from openai import (
    APIConnectionError,
    APIError,
    AsyncOpenAI,
    BadRequestError,
    InternalServerError,
    NotFoundError,
    OpenAI,
)
from sqlalchemy import Engine, func, select, update

from shared.contract.documents import Manifest, ManifestEntry
from shared.contract.spec import Adapter
from shared.jobs import moves
from shared.jobs.rows import model_name
from shared.settings import Settings
from shared.store.db import session_scope
from shared.store.storage import open_store
from shared.store.tables import JobRow, WorkerRow
from shared.tenants.keys import Caller
from tests.factories import claim_on, make_key, make_queued_job, make_worker
from tests.fake_vllm import KEY, FakeVllm, app_of
from tests.integration.test_completions import at_work, until
from tests.lifecycle.stack import make_model
from tests.live import live_api, served
from tests.patience import patience

BASE = "tiny"


@dataclass
class Beside:
    """A live API, the fake vLLM beside it, and what makes adapters."""

    settings: Settings
    vllm: FakeVllm
    engine: Engine
    caller: Caller
    client: OpenAI

    def say(self, content: str, *, model: str = BASE, **values: Any) -> Any:
        messages = [{"role": "user", "content": content}]
        return self.client.chat.completions.create(model=model, messages=messages, **values)

    def trained(self, *, chat_template: str | None = None, **adapter: Any) -> str:
        """The name of a tuned model whose job had this adapter."""
        store = open_store(self.settings)
        config = {"r": adapter.get("r", 16), "use_dora": adapter.get("method") == "dora"}
        with session_scope(self.engine) as session:
            job = make_queued_job(session, self.caller)
            session.execute(update(WorkerRow).values(last_seen=func.now()))  # whatever the tests before it took
            claim = claim_on(session, session.scalars(select(WorkerRow)).first() or make_worker(session))
            assert claim is not None
            row = session.get_one(JobRow, claim.lease.id)
            assert row.id == job.id
            spec = claim.spec.model_dump(mode="json")
            spec["base_model"] |= {"name": BASE, "public_name": BASE, "source": "path", "revision": "local"}
            spec["adapter"] = Adapter(**adapter).model_dump(mode="json")
            spec["training"]["chat_template"] = chat_template
            row.spec, row.base_model = spec, BASE
            name = model_name(session, row)
            files = {"adapter_config.json": json.dumps(config).encode(), "adapter_model.safetensors": b"weights"}
            stored = {file: store.put_bytes(f"{row.id}/{file}", content) for file, content in files.items()}
            entries = tuple(ManifestEntry(name=file, bytes=it.bytes, sha256=it.sha256) for file, it in stored.items())
            assert moves.succeed(session, claim.lease, manifest=Manifest(prefix=row.id, files=entries).document())
        return name


@contextmanager
def beside(engine: Engine, database_url: str, folder: Path, vllm: FakeVllm) -> Iterator[Beside]:
    make_model(folder / "tiny")
    models = folder / "models.toml"
    models.write_text(f'[models.{BASE}]\nsource = "path"\npath = "{folder / "tiny"}"\n')
    with session_scope(engine) as session:
        caller, key = make_key(session)
    with served(app_of(vllm)) as vllm_url:
        settings = Settings(
            home=(folder / "home").resolve(),
            database_url=database_url,
            redis_url="",
            models_file=models,
            playground="tests.fake_playground",
            vllm_url=f"{vllm_url}/v1",
            vllm_key=KEY,
            vllm_adapters=folder / "seen by both",
        )
        with (
            live_api(settings) as url,
            OpenAI(base_url=f"{url}/v1", api_key=key, max_retries=0, timeout=patience(30)) as client,
        ):
            yield Beside(settings, vllm, engine, caller, client)


@pytest.fixture
def it(engine: Engine, database_url: str, tmp_path: Path) -> Iterator[Beside]:
    with beside(engine, database_url, tmp_path, FakeVllm(base=BASE)) as both:
        yield both


def test_bases_and_adapters_answer_under_their_names_whole_and_in_streams(it: Beside) -> None:
    tuned = it.trained()

    base = it.client.chat.completions.with_raw_response.create(
        model=BASE, messages=[{"role": "user", "content": "one two"}]
    )
    answer = it.say("one two", model=tuned, tools=[{"type": "function", "function": {"name": "f"}}])
    chunks = list(it.say("one two", model=tuned, stream=True))
    text = it.client.completions.create(model=tuned, prompt="one")

    assert base.headers["x-tunepool-backend"] == "vllm"
    assert base.parse().choices[0].message.content == f"{BASE}:one {BASE}:two"
    (inside,) = it.vllm.adapters
    assert ":" not in inside
    assert answer.choices[0].message.content == f"{inside}:one {inside}:two"
    assert {answer.model, text.model, *(chunk.model for chunk in chunks)} == {tuned}
    assert "".join(chunk.choices[0].delta.content for chunk in chunks) == f"{inside}:one {inside}:two "
    assert text.choices[0].text == f"{inside}:one"
    assert it.vllm.loads == [inside]
    assert it.vllm.asked[1]["tools"]
    assert not any("tunepool" in asked for asked in it.vllm.asked)
    assert base.parse().system_fingerprint != answer.system_fingerprint


def test_no_key_of_a_user_goes_up(it: Beside) -> None:
    it.say("one")

    sent = json.dumps(it.vllm.headers)
    assert it.client.api_key not in sent
    assert KEY in sent


def test_an_adapter_that_vllm_forgot_is_loaded_again(it: Beside) -> None:
    tuned = it.trained()
    it.say("one", model=tuned)
    (inside,) = it.vllm.adapters
    it.vllm.adapters.clear()  # it was started again

    assert it.say("one", model=tuned).choices[0].message.content == f"{inside}:one"
    assert it.vllm.loads == [inside, inside]


def test_one_that_is_loaded_already_is_asked(it: Beside) -> None:
    tuned = it.trained()
    it.say("one", model=tuned)
    (inside,) = it.vllm.adapters

    with live_api(it.settings) as other, OpenAI(base_url=f"{other}/v1", api_key=it.client.api_key) as client:
        said = client.chat.completions.create(model=tuned, messages=[{"role": "user", "content": "one"}])

    assert said.choices[0].message.content == f"{inside}:one"
    assert it.vllm.loads == [inside]


def test_many_first_questions_load_an_adapter_once(it: Beside) -> None:
    tuned = it.trained()

    async def many() -> set[str | None]:
        async with AsyncOpenAI(base_url=it.client.base_url, api_key=it.client.api_key, timeout=patience(30)) as client:
            messages: Any = [{"role": "user", "content": "one"}]
            asked = (client.chat.completions.create(model=tuned, messages=messages) for _ in range(20))
            return {answer.choices[0].message.content for answer in await asyncio.gather(*asked)}

    assert len(asyncio.run(many())) == 1
    assert len(it.vllm.loads) == 1


@pytest.mark.parametrize(
    ("adapter", "asked"),
    [
        ({"method": "dora"}, {}),
        ({"bias": "all"}, {}),
        ({"r": 32}, {}),  # above this server's --max-lora-rank
        ({"chat_template": "{{ messages }}"}, {}),
        ({"method": "full"}, {}),
        ({}, {"extra_body": {"tunepool": {"scale": 0.5}}}),
        ({}, {"extra_body": {"guided_regex": "a*"}}),
        ({}, {"n": 1000}),
    ],
)
def test_what_vllm_does_not_take_goes_to_the_playground(it: Beside, adapter: dict[str, Any], asked: Any) -> None:
    tuned = it.trained(**adapter)

    with pytest.raises(APIError) as caught:  # no playground runs here, or it refuses the field
        it.say("one", model=tuned, **asked)

    assert caught.value.code in {"playground_unavailable", "unknown_parameter", "unsupported_parameter"}
    assert it.vllm.asked == []


def test_a_picture_is_not_fetched_by_the_server(it: Beside) -> None:
    part = {"type": "image_url", "image_url": {"url": "http://169.254.169.254/latest"}}

    with pytest.raises(BadRequestError):
        it.client.chat.completions.create(model=BASE, messages=[{"role": "user", "content": [part]}])

    assert it.vllm.asked == []


@pytest.mark.slow
def test_the_playground_says_why_it_answers(it: Beside, tmp_path: Path) -> None:
    tuned = it.trained(method="dora")

    with at_work(it.settings, tmp_path / "log"):
        messages: Any = [{"role": "user", "content": "one"}]

        def answers() -> Any:
            try:
                return it.client.chat.completions.with_raw_response.create(model=tuned, messages=messages)
            except InternalServerError:
                return None

        answer = until(answers, (tmp_path / "log").read_text)

    assert answer.headers["x-tunepool-backend"] == "playground"
    assert "DoRA" in answer.headers["x-tunepool-fallback"]


def test_a_server_that_is_down_or_another_base_leaves_all_to_the_playground(it: Beside) -> None:
    it.vllm.orders.add("down")
    with pytest.raises(InternalServerError) as caught:
        it.say("one")
    assert caught.value.code == "playground_unavailable"

    it.vllm.orders.clear()
    it.vllm.base, it.vllm.path = "another", "/models/another"
    with pytest.raises(InternalServerError) as caught:
        it.say("one")
    assert caught.value.code == "playground_unavailable"


def test_a_folder_that_cannot_be_written_leaves_the_adapter_to_the_playground_and_nothing_half_behind(
    it: Beside,
) -> None:
    it.settings.vllm_folder.write_text("a file where the folder should be")

    with pytest.raises(InternalServerError) as caught:
        it.say("one", model=it.trained())

    assert caught.value.code == "playground_unavailable"
    assert it.vllm.loads == []
    it.settings.vllm_folder.unlink()
    assert it.say("one", model=it.trained()).choices[0].message.content
    assert [path.name for path in it.settings.vllm_folder.iterdir()] == list(it.vllm.adapters)


def test_a_model_that_nobody_has_is_not_there(it: Beside) -> None:
    with pytest.raises(NotFoundError) as caught:
        it.say("one", model="ft:tiny:nobody::1")
    assert caught.value.code == "model_not_found"


def test_a_refusal_comes_in_vllms_words_and_a_failure_may_be_tried_again(it: Beside) -> None:
    with pytest.raises(BadRequestError, match="maximum context length") as refused:
        it.say("full")
    assert refused.value.param == "input_tokens"

    with pytest.raises(InternalServerError) as failed:
        it.say("broken")
    assert (failed.value.status_code, failed.value.code) == (503, "vllm_failed")
    assert failed.value.response.headers["retry-after"]


def test_a_stream_that_breaks_off_ends_with_an_error(it: Beside) -> None:
    heard: list[Any] = []
    answer = it.say("one cut two", stream=True)
    with pytest.raises(APIError, match="failed") as caught:
        heard.extend(chunk.choices[0].delta.content for chunk in answer)
    assert not isinstance(caught.value, APIConnectionError)
    assert heard == [f"{BASE}:one "]


def test_a_client_that_leaves_ends_the_answer_upstream(it: Beside) -> None:
    body = {"model": BASE, "messages": [{"role": "user", "content": "one wait two"}], "stream": True}
    headers = {"authorization": f"Bearer {it.client.api_key}"}
    with httpx2.stream(
        "POST", f"{it.client.base_url}chat/completions", json=body, headers=headers, timeout=patience(20)
    ) as answer:
        next(answer.iter_lines())

    assert it.vllm.left.wait(patience(20))
