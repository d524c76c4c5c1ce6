"""Questions to models through the official client, against a live API and a playground; only the weights are a fake."""

from __future__ import annotations

import asyncio
import json
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx2
import psutil
import pytest
from openai import APIStatusError, AsyncOpenAI, AsyncStream, BadRequestError, InternalServerError, NotFoundError, OpenAI
from openai.types import completion_create_params
from openai.types.chat import ChatCompletionChunk
from openai.types.chat import completion_create_params as chat_params
from pydantic import BaseModel
from sqlalchemy import select

from shared.contract.completions import CreateChatCompletion, CreateCompletion
from shared.contract.documents import Manifest, ManifestEntry
from shared.jobs import moves
from shared.jobs.rows import model_name
from shared.settings import Settings, child_environment
from shared.settle.catalogue import SMOLLM2
from shared.store.db import session_scope
from shared.store.storage import open_store
from shared.store.tables import DeviceRow, JobRow, PlaygroundRow, WorkerRow
from tests import living
from tests.factories import claim_on, make_key, make_queued_job, make_worker
from tests.integration.conftest import Api
from tests.lifecycle.stack import make_model
from tests.live import live_api
from tests.openai_types import faults_of, held
from tests.patience import lease, patience
from worker.host.host import identify
from worker.program import processes

BASE = "tiny"
QUEUE = 60
ROOT = Path(__file__).parents[2]


@dataclass(frozen=True)
class Talking:
    """A live API, and a playground in this process whose program is a fake."""

    api: Api
    tuned: str
    checkpoint: str

    @property
    def client(self) -> OpenAI:
        return self.api.client

    def say(self, content: str, *, model: str = BASE, **values: Any) -> Any:
        messages = [{"role": "user", "content": content}]
        return self.client.chat.completions.create(model=model, messages=messages, **values)

    def row(self) -> PlaygroundRow | None:
        with session_scope(self.api.engine) as session:
            return session.scalars(select(PlaygroundRow)).one_or_none()

    def programs(self) -> list[psutil.Process]:
        return [process for process, tag, _ in processes.tagged() if tag.home == str(self.api.settings.home)]


def until(holds: Callable[[], Any], what: str | Callable[[], str]) -> Any:
    deadline = time.monotonic() + patience(20)
    while not (answer := holds()):
        assert time.monotonic() < deadline, what if isinstance(what, str) else what()
        time.sleep(0.05)
    return answer


@pytest.fixture(scope="module")
def talk(engine: Any, database_url: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Talking]:
    folder = tmp_path_factory.mktemp("talk")
    make_model(folder / "tiny")
    (folder / "models.toml").write_text(
        f'[models.tiny]\nsource = "path"\npath = "{folder / "tiny"}"\n[aliases]\n"gpt-4o-mini" = "tiny"\n'
    )
    settings = Settings(
        home=(folder / "home").resolve(),
        database_url=database_url,
        redis_url="",
        models_file=folder / "models.toml",
        playground="tests.fake_playground",
        playground_queue=QUEUE,
        control_seconds=0.1,
        devices="cpu",
    )
    with session_scope(engine) as session:
        caller, key = make_key(session)
    with (
        live_api(settings) as url,
        OpenAI(base_url=f"{url}/v1", api_key=key, max_retries=0, http_client=held()) as client,
        at_work(settings, folder / "playground.log"),
    ):
        api = Api(url, caller, key, settings, engine, client)
        talking = Talking(api, *trained(api, engine))
        until(talking.row, (folder / "playground.log").read_text)
        yield talking
    assert talking.programs() == []


@contextmanager
def at_work(settings: Settings, log: Path) -> Iterator[None]:
    """The playground's process: it may kill whatever descends from it, so it is not this one."""
    values = {
        "DATABASE_URL": settings.database_url,
        "REDIS_URL": "",
        "STORAGE_URL": settings.storage,
        "TUNEPOOL_HOME": str(settings.home),
        "TUNEPOOL_MODELS_FILE": str(settings.models_file),
        "TUNEPOOL_PLAYGROUND": settings.playground,
        "TUNEPOOL_PLAYGROUND_QUEUE": str(QUEUE),
        "TUNEPOOL_PLAYGROUND_IDLE_SECONDS": lease(3),
        "TUNEPOOL_CONTROL_SECONDS": "0.1",
        "TUNEPOOL_DEVICES": "cpu",
    }
    argv = [sys.executable, "-m", "worker.chores.playground_queue"]
    with log.open("wb") as output:
        process = subprocess.Popen(argv, cwd=ROOT, env=child_environment(**values), stdout=output, stderr=output)
    try:
        yield
    finally:
        process.terminate()
        process.wait(patience(20))


def trained(api: Api, engine: Any) -> tuple[str, str]:
    """A tuned model and a checkpoint of it, with files in the store."""
    store = open_store(api.settings)

    def manifest(prefix: str, name: str) -> dict[str, Any]:
        stored = store.put_bytes(f"{prefix}/{name}", b"weights")
        return Manifest(
            prefix=prefix, files=(ManifestEntry(name=name, bytes=stored.bytes, sha256=stored.sha256),)
        ).document()

    with session_scope(engine) as session:
        make_queued_job(session, api.caller)
        claim = claim_on(session, session.scalars(select(WorkerRow)).first() or make_worker(session))
        assert claim is not None
        # The factory's spec names the built-in base; this installation has the tiny one on its disk.
        spec = claim.spec.model_dump(mode="json")
        row = session.get_one(JobRow, claim.lease.id)
        spec["base_model"] |= {"name": BASE, "source": "path", "revision": "local"}
        row.spec, row.base_model = spec, BASE
        name = model_name(session, row)
        step = f"{name}:ckpt-step-1"
        saved = manifest("c", "adapter/adapter_model.safetensors")
        moves.record_checkpoint(session, claim.lease, step=1, name=step, metrics={"step": 1}, manifest=saved)
        assert moves.succeed(session, claim.lease, manifest=manifest("p", "adapter_model.safetensors"))
    return name, step


def test_a_base_model_an_alias_a_tuned_model_and_a_checkpoint_answer(talk: Talking) -> None:
    answers = {name: talk.say("one two", model=name) for name in (BASE, "gpt-4o-mini", talk.tuned, talk.checkpoint)}

    voices = [answer.choices[0].message.content.split(":")[0] for answer in answers.values()]
    assert voices[:2] == ["base", "base"]
    assert [voice.partition("_")[0] for voice in voices[2:]] == ["adapter", "ftckpt"]
    assert [answer.model for answer in answers.values()] == list(answers)
    answer = answers[BASE]
    assert answer.id.startswith("chatcmpl-")
    assert (answer.object, answer.choices[0].finish_reason) == ("chat.completion", "stop")
    assert answer.choices[0].message.model_dump(exclude_none=True) == {
        "role": "assistant",
        "content": "base:one base:two ",
    }
    assert answer.usage.model_dump(exclude_none=True) == {
        "prompt_tokens": 2,
        "completion_tokens": 2,
        "total_tokens": 4,
    }
    assert len({answer.system_fingerprint for answer in answers.values()}) == 3


def test_a_stream_has_the_role_first_the_reason_last_and_the_usage_when_asked(talk: Talking) -> None:
    chunks = list(talk.say("one two three", stream=True, max_completion_tokens=2, max_tokens=99))

    assert [chunk.choices[0].delta.role for chunk in chunks] == ["assistant", None, None, None]
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks) == "base:one base:two "
    assert [chunk.choices[0].finish_reason for chunk in chunks] == [None, None, None, "length"]
    assert all(chunk.usage is None and chunk.object == "chat.completion.chunk" for chunk in chunks)
    assert len({chunk.id for chunk in chunks}) == 1

    *others, last = list(talk.say("one", stream=True, stream_options={"include_usage": True}))
    assert last.choices == []
    assert (last.usage.prompt_tokens, last.usage.completion_tokens) == (1, 1)
    assert all(chunk.usage is None and "usage" in chunk.model_fields_set for chunk in others), "null, as at OpenAI"
    options: Any = {"include_usage": True}
    *others, last = list(talk.client.completions.create(model=BASE, prompt="a", stream=True, stream_options=options))
    assert (last.choices, last.usage.total_tokens) == ([], 2)
    assert all(chunk.usage is None and "usage" in chunk.model_fields_set for chunk in others)


def test_the_bytes_of_a_stream_are_server_sent_events_that_end_in_done(talk: Talking) -> None:
    body = {"model": BASE, "messages": [{"role": "user", "content": "one\ttwo"}], "stream": True}
    with talk.api.http() as http, http.stream("POST", "/v1/chat/completions", json=body) as answer:
        assert answer.headers["content-type"].startswith("text/event-stream")
        lines = [line for line in answer.iter_lines() if line]

    assert all(line.startswith("data: ") for line in lines)
    assert lines[-1] == "data: [DONE]"
    assert [list(faults_of(ChatCompletionChunk, line[6:])) for line in lines[:-1]] == [[]] * (len(lines) - 1)
    assert json.loads(lines[1][6:])["choices"] == [
        {"index": 0, "delta": {"content": "base:one "}, "logprobs": None, "finish_reason": None}
    ]


def test_the_older_route_goes_on_from_a_text(talk: Talking) -> None:
    whole = talk.client.completions.create(model=talk.tuned, prompt="one two")
    chunks = list(talk.client.completions.create(model=BASE, prompt=["one two"], stream=True, max_tokens=1))

    assert whole.choices[0].text.count("adapter_") == 2
    assert (whole.object, whole.choices[0].finish_reason) == ("text_completion", "stop")
    assert [chunk.choices[0].text for chunk in chunks] == ["base:one ", ""]
    assert chunks[-1].choices[0].finish_reason == "length"


def test_an_adapter_that_is_disabled_leaves_the_base_to_answer(talk: Talking) -> None:
    answer = talk.say("one", model=talk.tuned, extra_body={"tunepool": {"disabled": True}})

    assert answer.choices[0].message.content == "base:one "
    with pytest.raises(BadRequestError) as caught:
        talk.say("one", model=talk.tuned, extra_body={"tunepool": {"scale": 9.0}})
    assert caught.value.param == "tunepool.scale"


TOOL: Any = {"type": "function", "function": {"name": "weather", "parameters": {"type": "object", "properties": {}}}}


def test_calls_of_tools_are_told_whole_and_in_a_stream_and_their_results_are_taken(talk: Talking) -> None:
    whole = talk.say("see weather", tools=[TOOL], tool_choice="auto")
    chunks = list(talk.say("weather weather", tools=[TOOL], stream=True))

    (choice,) = whole.choices
    assert (choice.finish_reason, choice.message.content) == ("tool_calls", "base:see ")
    (call,) = choice.message.tool_calls
    assert call.id.startswith("call_")
    assert (call.type, call.function.name, call.function.arguments) == ("function", "weather", '{"of": 2}')
    deltas = [call for chunk in chunks for call in chunk.choices[0].delta.tool_calls or []]
    assert [(call.index, call.function.name) for call in deltas] == [(0, "weather"), (1, "weather")]
    assert chunks[-1].choices[0].finish_reason == "tool_calls"

    result: Any = {"role": "tool", "tool_call_id": call.id, "content": "21 C"}
    asked: Any = [{"role": "user", "content": "weather?"}, choice.message.model_dump(exclude_none=True), result]
    again = talk.client.chat.completions.create(model=BASE, messages=asked, tools=[TOOL])
    assert again.choices[0].message.content == "base:21 base:C "

    alone = talk.say("weather weather", tools=[TOOL], parallel_tool_calls=False).choices[0]
    assert (alone.message.content, len(alone.message.tool_calls)) == (None, 1)
    never = talk.say("weather", tools=[TOOL], tool_choice="none").choices[0]
    assert (never.message.content, never.message.tool_calls) == ("base:weather ", None)


def test_the_form_of_an_answer_reaches_the_program(talk: Talking) -> None:
    schema: Any = {"type": "object", "properties": {"a": {"type": "integer"}}}
    form = {"type": "json_schema", "json_schema": {"name": "x", "schema": schema, "strict": True}}

    of_schema = talk.say("one", response_format=form).choices[0].message.content
    of_any = talk.say("one", response_format={"type": "json_object"}).choices[0].message.content

    assert of_schema.split("base:")[-1].strip() == json.dumps(schema, separators=(",", ":"))
    assert of_any.split("base:")[-1].strip() == '{"type":"object"}'
    with pytest.raises(BadRequestError) as caught:
        talk.say("one", response_format=form, tools=[TOOL])
    assert (caught.value.param, caught.value.code) == ("response_format", "unsupported_combination")


def test_logprobs_are_told_in_the_form_of_each_route(talk: Talking) -> None:
    choice = talk.say("one two", logprobs=True, top_logprobs=2).choices[0]
    chunks = list(talk.say("one two", logprobs=True, stream=True))
    older = talk.client.completions.create(model=BASE, prompt="one two", logprobs=1).choices[0]

    first, second = choice.logprobs.content
    assert (first.token, first.logprob, bytes(first.bytes).decode()) == ("base:one ", -0.5, "base:one ")
    assert [other.logprob for other in second.top_logprobs] == [0.0, -1.0]
    told = [chunk.choices[0].logprobs for chunk in chunks if chunk.choices[0].delta.content]
    assert [one.content[0].token for one in told if one is not None] == ["base:one ", "base:two "]
    assert all(one is not None and one.content[0].top_logprobs == [] for one in told)
    assert older.logprobs is not None
    assert older.logprobs.text_offset == [0, len("base:one ")]
    assert older.logprobs.token_logprobs == [-0.5, -0.5]
    assert older.logprobs.top_logprobs == [{"base:one 0": 0.0}, {"base:two 0": 0.0}]


def test_the_async_client_streams_too(talk: Talking) -> None:
    async def said() -> str:
        async with AsyncOpenAI(base_url=f"{talk.api.url}/v1", api_key=talk.api.key) as client:
            asked = {"model": BASE, "messages": [{"role": "user", "content": "one two"}]}
            stream = await client.chat.completions.create(**asked, stream=True)
            return "".join([chunk.choices[0].delta.content or "" async for chunk in stream])

    assert asyncio.run(said()) == "base:one base:two "


REFUSED: list[tuple[str, Any]] = [
    ("n", 2),
    ("tool_choice", "required"),
    ("functions", [{"name": "f"}]),
    ("logit_bias", {"5": 1}),
    ("modalities", ["audio"]),
    ("reasoning_effort", "high"),
    ("verbosity", "low"),
    ("service_tier", "flex"),
    ("store", True),
    ("metadata", {"a": "b"}),
    ("prediction", {"type": "content", "content": "x"}),
    ("audio", {"voice": "alloy", "format": "wav"}),
    ("web_search_options", {"search_context_size": "low"}),
    ("tool_choice", {"type": "function", "function": {"name": "f"}}),
]


@pytest.mark.parametrize(("field", "value"), REFUSED, ids=[field for field, _ in REFUSED])
def test_what_no_playground_does_is_refused_by_name(talk: Talking, field: str, value: Any) -> None:
    with pytest.raises(BadRequestError) as caught:
        talk.say("one", extra_body={field: value})

    assert (caught.value.param, caught.value.code) == (field, "unsupported_parameter")


@pytest.mark.parametrize(
    ("asked", "ours"),
    [
        (chat_params.CompletionCreateParamsStreaming, CreateChatCompletion),
        (completion_create_params.CompletionCreateParamsStreaming, CreateCompletion),
    ],
    ids=["chat", "text"],
)
def test_every_field_that_the_openai_package_has_is_known_here(asked: Any, ours: type[BaseModel]) -> None:
    theirs = set(asked.__annotations__)

    assert {"model", "stop", "stream"} <= theirs
    assert theirs - set(ours.model_fields) == set(), "told as an unknown parameter, which looks like a typing error"


def test_what_asks_for_nothing_is_no_reason_to_refuse(talk: Talking) -> None:
    harmless = {
        "n": 1,
        "tools": [],
        "logprobs": False,
        "tool_choice": "auto",
        "response_format": {"type": "text"},
        "logit_bias": {},
        "safety_identifier": "a user",
        "prompt_cache_key": "tickets",
        "prompt_cache_retention": "24h",
    }
    answer = talk.say("one", extra_body=harmless)
    again = [{"role": "user", "content": "one"}, answer.choices[0].message, {"role": "user", "content": "two"}]

    assert talk.client.chat.completions.create(model=BASE, messages=again).choices[0].message.content == "base:two "


@pytest.mark.parametrize(
    ("body", "param"),
    [
        ({"messages": []}, "messages"),
        ({"messages": [{"role": "tool", "content": "x"}]}, "messages.0"),
        ({"messages": [{"role": "user", "content": None}]}, "messages.0"),
        ({"messages": [{"role": "user", "content": "x", "tool_call_id": "c"}]}, "messages.0"),
        ({"tools": [{"type": "function", "function": {"name": "no name"}}]}, "tools.0.function.name"),
        ({"tools": [{"type": "function", "function": {"name": "f", "strict": True}}]}, "tools.0.function.strict"),
        ({"tools": [{"type": "web_search"}]}, "tools.0"),
        ({"response_format": {"type": "json_schema"}}, "response_format"),
        ({"response_format": {"type": "xml"}}, "response_format.type"),
        ({"top_logprobs": 3}, "top_logprobs"),
        ({"logprobs": True, "top_logprobs": 21}, "top_logprobs"),
        ({"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {}}]}]}, "messages.0.content"),
        ({"messages": "hi"}, "messages"),
        ({"temperature": 3}, "temperature"),
        ({"max_tokens": 0}, "max_tokens"),
        ({"stop": ["a", "b", "c", "d", "e"]}, "stop"),
        ({"stream_options": {"include_usage": True}}, "stream_options"),
        ({"stream": True, "stream_options": {"include_obfuscation": True}}, "stream_options.include_obfuscation"),
        ({"stream": True, "stream_options": {"include_use": True}}, "stream_options.include_use"),
        ({"n": True}, "n"),
        ({"n": 10**9}, "n"),
        ({"stop": "x" * 1001}, "stop"),
        ({"stop": [""]}, "stop"),
        ({"seed": 2**63}, "seed"),
        ({"max_completion_tokens": 10**30}, "max_completion_tokens"),
        ({"messages": [{"role": "function", "name": "f", "content": "x"}]}, "messages.0.role"),
        ({"messages": [{"role": "user", "content": [{"type": "text"}]}]}, "messages.0.content"),
        ({"messages": [{"role": "assistant", "refusal": "no", "content": "x"}]}, "messages.0.refusal"),
        ({"temprature": 0}, "temprature"),
    ],
)
def test_a_field_at_fault_is_named(talk: Talking, body: dict[str, Any], param: str) -> None:
    whole = {"model": BASE, "messages": [{"role": "user", "content": "x"}]} | body
    with talk.api.http() as http:
        answer = http.post("/v1/chat/completions", json=whole)

    assert answer.status_code == 400
    assert answer.json()["error"]["param"].startswith(param)


def test_unknown_models_and_those_of_other_projects_do_not_exist(talk: Talking) -> None:
    with session_scope(talk.api.engine) as session:
        stranger = make_key(session)[1]
    with OpenAI(base_url=f"{talk.api.url}/v1", api_key=stranger, max_retries=0) as other:
        for client, model in ((talk.client, "ft:none"), (other, talk.tuned), (other, talk.checkpoint)):
            with pytest.raises(NotFoundError) as caught:
                client.chat.completions.create(model=model, messages=[{"role": "user", "content": "x"}])
            assert caught.value.code == "model_not_found"


def test_a_model_whose_job_has_not_succeeded_is_told_with_its_status(talk: Talking) -> None:
    with session_scope(talk.api.engine) as session:
        job = make_queued_job(session, talk.api.caller)
        job.base_model = BASE
        name, job_id = model_name(session, job), job.id
        stranger = make_key(session)[1]

    with pytest.raises(BadRequestError) as caught:
        talk.say("one", model=name)
    assert (caught.value.param, caught.value.code) == ("model", "model_not_ready")
    assert f"{job_id} is queued" in caught.value.message
    with OpenAI(base_url=f"{talk.api.url}/v1", api_key=stranger, max_retries=0) as other, pytest.raises(NotFoundError):
        other.chat.completions.create(model=name, messages=[{"role": "user", "content": "x"}])
    with session_scope(talk.api.engine) as session:
        moves.request_cancel(session, job_id, project_id=talk.api.caller.project_id)
    with pytest.raises(BadRequestError, match="is cancelled"):
        talk.say("one", model=name)


def test_models_say_whether_they_are_warm_and_only_our_own_are_told(talk: Talking) -> None:
    talk.say("one", model=talk.tuned)

    def warm() -> set[str]:
        return {model.id for model in talk.client.models.list() if model.tunepool["warm"]}  # type: ignore[attr-defined]

    assert until(lambda: {BASE, "gpt-4o-mini", talk.tuned} <= warm(), "the tuned model is told to be warm")
    assert talk.client.models.retrieve(talk.tuned).tunepool["warm"]  # type: ignore[attr-defined]
    assert "smollm2-135m-instruct" not in warm()


def test_a_client_that_leaves_is_answered_no_further(talk: Talking) -> None:
    stream = talk.say("slow=0.05 " + "word " * 2000, stream=True)
    next(iter(stream))
    stream.close()
    until(lambda: (row := talk.row()) is not None and row.asked == 0, "the question is withdrawn")

    body = {"model": BASE, "messages": [{"role": "user", "content": "slow=0.05 " + "word " * 2000}]}
    with talk.api.http() as http, pytest.raises(httpx2.ReadTimeout):
        http.post("/v1/chat/completions", json=body, timeout=httpx2.Timeout(patience(20), read=0.5))
    until(lambda: (row := talk.row()) is not None and row.asked == 0, "the question is withdrawn")


def test_a_program_that_dies_is_told_to_those_it_answered_and_the_next_question_has_a_new_one(
    talk: Talking, tmp_path: Path
) -> None:
    (before,) = speaking(talk, tmp_path / "before")

    with pytest.raises(InternalServerError) as caught:
        talk.say("one crash=two two three")
    assert (caught.value.status_code, caught.value.code) == (503, "playground_crashed")
    assert caught.value.response.headers["retry-after"]

    with pytest.raises(Exception, match="ended in the middle"):
        list(talk.say("slow=0.02 one crash=two two three", stream=True))

    never = f"wait={tmp_path / 'never'} one"
    waits = talk.say(never, stream=True)  # so that the base is not let go between the look and the kill
    (killed,) = until(talk.programs, "a program")
    killed.kill()
    with pytest.raises(Exception, match="ended in the middle"):
        list(waits)
    until(lambda: not living.is_alive(killed), "it is dead")
    assert until(lambda: _answers(talk), "an answer of a new program")
    (after,) = speaking(talk, tmp_path / "after")
    assert killed.pid != after.pid != before.pid


def speaking(talk: Talking, gate: Path) -> list[psutil.Process]:
    """The programs that there are while one answers: a base that nobody asks is let go soon."""
    with talk.say(f"wait={gate} one", stream=True) as words:
        programs: list[psutil.Process] = until(talk.programs, "a program")
        gate.touch()
        assert list(words)
    return programs


def _answers(talk: Talking) -> bool:
    try:
        return bool(talk.say("one").choices[0].message.content == "base:one ")
    except APIStatusError:
        return False


def test_fifty_streams_at_once_are_all_answered_and_what_is_too_much_is_refused_at_once(
    talk: Talking, tmp_path: Path
) -> None:
    words = " ".join(str(number) for number in range(20))
    may_speak = tmp_path / "may-speak"

    async def asked(client: AsyncOpenAI, model: str, text: str) -> AsyncStream[ChatCompletionChunk]:
        """A question that the playground has taken: the API answers no earlier. A refusal raises."""
        messages: Any = [{"role": "user", "content": text}]
        return await client.chat.completions.create(model=model, messages=messages, stream=True)

    async def heard(stream: AsyncStream[ChatCompletionChunk]) -> str:
        return "".join([chunk.choices[0].delta.content or "" async for chunk in stream])

    async def answered(client: AsyncOpenAI, model: str) -> str:
        return await heard(await asked(client, model, words))

    async def fifty(client: AsyncOpenAI) -> list[str]:
        models = [BASE, talk.tuned]
        return await asyncio.gather(*(answered(client, models[number % 2]) for number in range(50)))

    async def too_many(client: AsyncOpenAI) -> tuple[list[BaseException | str], list[str]]:
        # They wait for a file, so all are in the queue when one more comes, however slow the machine is.
        waiting = f"wait={may_speak} {words}"
        taken = await asyncio.gather(*(asked(client, BASE, waiting) for _ in range(QUEUE)))
        refused = await asyncio.gather(*(answered(client, BASE) for _ in range(10)), return_exceptions=True)
        may_speak.touch()
        return refused, await asyncio.gather(*map(heard, taken))

    async def ask() -> tuple[list[str], list[BaseException | str], list[str]]:
        values: Any = {"api_key": talk.api.key, "max_retries": 0, "timeout": patience(60)}
        async with AsyncOpenAI(base_url=f"{talk.api.url}/v1", **values) as client:
            return await fifty(client), *await too_many(client)

    answers, refused, late = asyncio.run(ask())
    assert {len(answer.split()) for answer in answers} == {20}
    assert {(error.status_code, error.code) for error in refused} == {(503, "playground_busy")}
    assert (len(late), {len(answer.split()) for answer in late}) == (QUEUE, {21})


def test_a_training_that_needs_the_memory_has_it(talk: Talking) -> None:
    talk.say("one")
    with session_scope(talk.api.engine) as session:
        identity = identify(talk.api.settings)
        session.add(WorkerRow(id=identity.id, host=identity.host, pool=identity.pool, boot_id="boot", version="test"))
        session.flush()
        devices = {"id": f"{identity.host}:cpu", "kind": "cpu", "total_bytes": 1 << 60, "free_bytes": 1 << 60}
        session.add(DeviceRow(**devices, worker_id=identity.id, host=identity.host, pool="default", name="CPU"))
        job = make_queued_job(session, talk.api.caller)
        job.bytes_per_device = 1 << 59
        job_id = job.id

    until(lambda: not talk.programs(), "the playground lets its base go")
    with pytest.raises(InternalServerError) as caught:
        talk.say("one")
    assert caught.value.code == "playground_yields"
    assert caught.value.response.headers["retry-after"]

    with session_scope(talk.api.engine) as session:
        moves.request_cancel(session, job_id, project_id=talk.api.caller.project_id)
    assert until(lambda: _answers(talk), "the playground answers again")


def test_a_base_nobody_asks_is_let_go(talk: Talking, tmp_path: Path) -> None:
    assert speaking(talk, tmp_path / "gate")

    until(lambda: not talk.programs(), "the base is let go")
    until(lambda: (row := talk.row()) is not None and row.state == "cold", "it says so")
    assert list((talk.api.settings.home / "playground").iterdir()) == []


def test_without_a_playground_the_answer_is_a_503_that_names_the_remedy(talk: Talking) -> None:
    body = {"model": BASE, "messages": [{"role": "user", "content": "x"}]}
    elsewhere = talk.api.settings.model_copy(update={"pool": "nobody"})
    with live_api(elsewhere) as url, httpx2.Client(base_url=url, timeout=patience(20)) as http:
        headers = {"Authorization": f"Bearer {talk.api.key}"}
        answer = http.post("/v1/chat/completions", json=body, headers=headers)

    assert answer.status_code == 503
    assert answer.json()["error"]["code"] == "playground_unavailable"
    assert "tunepool-server playground" in answer.json()["error"]["message"]


def test_a_caller_without_the_token_hears_nothing(talk: Talking) -> None:
    row = talk.row()
    assert row is not None

    async def asked() -> bytes:
        reader, writer = await asyncio.open_connection(row.address, row.port)
        base = {"name": "x", "public_name": "x", "source": "path", "revision": "local"}
        target = {"base": {**base, "facts": SMOLLM2.ref.facts.model_dump()}}
        call = {"token": "guess", "target": target, "question": {"type": "question", "number": 1, "text": "x"}}
        writer.write(json.dumps(call).encode() + b"\n")
        heard = await reader.read()
        writer.close()
        return heard

    assert asyncio.run(asked()) == b""
