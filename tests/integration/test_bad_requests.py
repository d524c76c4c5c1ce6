"""Every field of create, in every bad form: a clear 4xx in OpenAI's envelope that names the field; no row; no 5xx."""

from __future__ import annotations

import json
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import httpx2
import pytest
from sqlalchemy import func, select

from api.app import create_app
from shared.store.db import session_scope
from shared.store.tables import JobRow
from tests.factories import make_file
from tests.integration.conftest import Api
from tests.patience import patience

HUGE = "9" * 5000
URL = "/v1/fine_tuning/jobs"
LISTS = (
    URL,
    "/v1/files",
    "/v1/evals",
    *(f"/v1/tunepool/{noun}" for noun in ("adapters", "evaluations", "exports", "merges", "promotions", "sweeps")),
)
# Lists by name, of rows that really go after a while, and of work that leaves the list with its end: any place in their
# order will do.
FREE_LISTS = ("/v1/tunepool/aliases", "/v1/tunepool/schedules", "/v1/tunepool/preflights", "/v1/tunepool/chores")


@pytest.fixture(scope="module")
def training_file(api: Api) -> str:
    with session_scope(api.engine) as session:
        return make_file(session, api.caller).id


@pytest.fixture(scope="module")
def http(api: Api) -> Iterator[httpx2.Client]:
    with api.http() as client:
        yield client


def jobs_there_are(api: Api) -> int:
    with session_scope(api.engine) as session:
        return session.scalar(select(func.count()).select_from(JobRow)) or 0


def refused(api: Api, answer: httpx2.Response, *, status: int = 400) -> dict[str, Any]:
    assert answer.status_code == status, answer.text
    assert set(answer.json()) == {"error"}
    error = answer.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert answer.headers["x-request-id"].startswith("req_")
    return error


def post(http: httpx2.Client, body: str | bytes, **headers: str) -> httpx2.Response:
    content = body.encode("utf-8", "surrogatepass") if isinstance(body, str) else body
    return http.post(URL, content=content, headers={"Content-Type": "application/json", **headers})


def at(path: str, value: Any) -> dict[str, Any]:
    """A body part with `value` at a dotted path."""
    for name in reversed(path.split(".")):
        value = {name: value}
    return value


def merged(left: dict[str, Any], right: dict[str, Any]) -> dict[str, Any]:
    both = dict(left)
    for key, value in right.items():
        both[key] = merged(both[key], value) if isinstance(value, dict) and isinstance(both.get(key), dict) else value
    return both


HYPER = "method.supervised.hyperparameters"
BAD_VALUES: list[tuple[str, Any]] = [
    ("model", 5),
    ("model", ""),
    ("model", None),
    ("model", "x" * 301),
    ("training_file", ["file-1"]),
    ("training_file", ""),
    ("training_file", "file-unknown"),
    ("validation_file", 5),
    ("validation_file", "../../etc/passwd"),
    ("suffix", ""),
    ("suffix", "x" * 65),
    ("suffix", "--- ..."),
    ("suffix", 5),
    ("seed", -1),
    ("seed", 2**31),
    ("seed", "7"),
    ("seed", 1.5),
    ("seed", True),
    ("method", "supervised"),
    ("method", {}),
    ("method.type", "reinforcement"),
    ("method.type", "magic"),
    (f"{HYPER}.n_epochs", 0),
    (f"{HYPER}.n_epochs", 51),
    (f"{HYPER}.n_epochs", "3"),
    (f"{HYPER}.n_epochs", 1.5),
    (f"{HYPER}.batch_size", 0),
    (f"{HYPER}.batch_size", 257),
    (f"{HYPER}.learning_rate_multiplier", 0),
    (f"{HYPER}.learning_rate_multiplier", -1.0),
    (f"{HYPER}.learning_rate_multiplier", "fast"),
    (f"{HYPER}.lora_r", 0),
    (f"{HYPER}.lora_dropout", 1.0),
    (f"{HYPER}.packing", "yes"),
    ("hyperparameters.n_epochs", 0),
    ("metadata", []),
    ("metadata", {"k": 5}),
    ("metadata", {"": "v"}),
    ("metadata", {"k" * 65: "v"}),
    ("metadata", {"k": "v" * 513}),
    ("metadata", {str(n): "v" for n in range(17)}),
    ("integrations", "wandb"),
    ("integrations", [{"type": "slack"}]),
    ("tunepool", 5),
    ("tunepool.preset", "fastest"),
    ("tunepool.adapter.method", "magic"),
    ("tunepool.adapter.r", 0),
    ("tunepool.adapter.r", 1025),
    ("tunepool.adapter.r", "16"),
    ("tunepool.adapter.r", 16.5),
    ("tunepool.adapter.lora_alpha", 0),
    ("tunepool.adapter.lora_dropout", 1.0),
    ("tunepool.adapter.target_modules", "(a+)+$"),
    ("tunepool.adapter.target_modules", ["(a+)+$"]),
    ("tunepool.adapter.target_modules", ["no_such_proj"]),
    ("tunepool.adapter.target_modules", ["lm_head"]),
    ("tunepool.adapter.use_rslora", "true"),
    ("tunepool.adapter.init_lora_weights", "xavier"),
    ("tunepool.adapter.layers_to_transform", [30]),
    ("tunepool.quantization.bnb_4bit_quant_type", "int4"),
    ("tunepool.quantization.load_in_4bit", 1),
    ("tunepool.training.learning_rate", 0),
    ("tunepool.training.learning_rate", 1e3),
    ("tunepool.training.max_length", 0),
    ("tunepool.training.max_length", 1_000_000),
    ("tunepool.training.warmup_ratio", 1.1),
    ("tunepool.training.optim", "adagrad"),
    ("tunepool.training.lr_scheduler_type", "zigzag"),
    ("tunepool.training.max_steps", 0),
    ("tunepool.training.max_grad_norm", 0),
    ("tunepool.training.eval", {"steps": 0}),
    ("tunepool.training.early_stopping", {"patience": 0}),
    ("tunepool.training.dtype", "int8"),
    ("tunepool.placement.gpus", 0),
    ("tunepool.placement.strategy", "magic"),
    ("tunepool.queue.tier", "vip"),
    ("tunepool.queue.priority", 101),
    ("tunepool.queue.max_runtime_seconds", -1),
    ("tunepool.queue.group", "a b\n"),
]


@pytest.mark.parametrize(("path", "value"), BAD_VALUES, ids=[f"{path}={str(value)[:30]}" for path, value in BAD_VALUES])
def test_a_bad_value_is_refused_by_name(
    api: Api, http: httpx2.Client, training_file: str, path: str, value: Any
) -> None:
    before = jobs_there_are(api)
    body = {"model": "smollm2-135m-instruct", "training_file": training_file}
    if path.startswith("method."):
        body = merged(body, {"method": {"type": "supervised"}})

    error = refused(api, post(http, json.dumps(merged(body, at(path, value)))))

    assert error["param"] is not None
    assert error["param"].startswith(path) or path.startswith(error["param"])
    assert error["type"] == "invalid_request_error"
    assert jobs_there_are(api) == before


@pytest.mark.parametrize(
    "path", ["n_epochs", "method.epochs", "tunepool.lora", "tunepool.adapter.rank", "tunepool.training.lr"]
)
def test_an_unknown_key_is_refused_by_name_with_the_known_ones(
    api: Api, http: httpx2.Client, training_file: str, path: str
) -> None:
    body = merged({"model": "smollm2-135m-instruct", "training_file": training_file}, at(path, 1))
    if path.startswith("method"):
        body = merged(body, {"method": {"type": "supervised"}})

    error = refused(api, post(http, json.dumps(body)))

    assert (error["param"], error["code"]) == (path, "unknown_parameter")
    assert "Known here" in error["message"]


@pytest.mark.parametrize("name", ["model", "training_file"])
def test_a_missing_field_is_named(api: Api, http: httpx2.Client, training_file: str, name: str) -> None:
    body = {"model": "smollm2-135m-instruct", "training_file": training_file}
    del body[name]

    error = refused(api, post(http, json.dumps(body)))

    assert (error["param"], error["code"]) == (name, "missing_required_parameter")


HOSTILE: dict[str, str | bytes] = {
    "empty": "",
    "null": "null",
    "array": "[]",
    "number": "5",
    "byte order mark": b'\xef\xbb\xbf{"model":"m"}',
    "invalid UTF-8": b'{"model":"\xff"}',
    "truncated": '{"model":',
    "NaN": '{"model":"m","training_file":"f","seed":NaN}',
    "Infinity": '{"tunepool":{"training":{"learning_rate":Infinity}}}',
    "1e999": '{"tunepool":{"training":{"learning_rate":1e999}}}',
    "lone surrogate in a value": '{"model":"\\ud800","training_file":"f"}',
    "lone surrogate in a key": '{"\\ud800":1}',
    "NUL in a value": '{"model":"a\\u0000b","training_file":"f"}',
    "5,000-digit integer": f'{{"seed":{HUGE}}}',
    "100,000-deep arrays": '{"metadata":' + "[" * 100_000 + "]" * 100_000 + "}",
    "100,000-deep objects": '{"metadata":' + '{"a":' * 100_000 + "1" + "}" * 100_000 + "}",
    "duplicate keys": '{"model":"a","model":"b","training_file":"f"}',
    "proto": '{"__proto__":{"admin":true}}',
    "100,000 metadata keys": '{"metadata":{' + ",".join(f'"k{n}":"v"' for n in range(50_000)) + "}}",
}


@pytest.mark.parametrize("body", HOSTILE.values(), ids=HOSTILE.keys())
def test_a_hostile_body_is_refused_and_leaves_nothing(api: Api, http: httpx2.Client, body: str | bytes) -> None:
    before = jobs_there_are(api)

    error = refused(api, post(http, body))

    assert error["type"] == "invalid_request_error"
    assert jobs_there_are(api) == before


def test_a_body_over_the_limit_is_refused_while_it_streams(api: Api, http: httpx2.Client) -> None:
    def endless() -> Iterator[bytes]:
        yield b'{"model":"'
        for _ in range(200):
            yield b"x" * 65536

    answer = http.post(URL, content=endless(), headers={"Content-Type": "application/json"})

    assert refused(api, answer, status=413)["code"] == "request_too_large"


@pytest.mark.parametrize(
    "kind", ["", "text/plain", "application/x-www-form-urlencoded", "multipart/form-data; boundary=x"]
)
def test_another_content_type_is_told_the_right_one(api: Api, http: httpx2.Client, kind: str) -> None:
    answer = http.post(URL, content=b"{}", headers={"Content-Type": kind})

    assert "application/json" in refused(api, answer, status=415)["message"]


def test_a_compressed_body_is_refused(api: Api, http: httpx2.Client) -> None:
    refused(api, post(http, b"\x1f\x8b", **{"Content-Encoding": "gzip"}), status=415)


@pytest.mark.parametrize("key", ["", "k" * 256, "a b", "ä"])
def test_a_bad_idempotency_key_is_refused(api: Api, http: httpx2.Client, training_file: str, key: str) -> None:
    body = json.dumps({"model": "smollm2-135m-instruct", "training_file": training_file})

    answer = http.post(
        URL, content=body, headers=[(b"Content-Type", b"application/json"), (b"Idempotency-Key", key.encode("utf-8"))]
    )

    assert refused(api, answer)["param"] == "Idempotency-Key"


def test_an_idempotency_key_replays_and_says_so_and_another_body_is_422(
    api: Api, http: httpx2.Client, training_file: str
) -> None:
    body = {"model": "smollm2-135m-instruct", "training_file": training_file}

    first = post(http, json.dumps(body), **{"Idempotency-Key": "one"})
    again = post(http, json.dumps(body), **{"Idempotency-Key": "one"})
    other = post(http, json.dumps({**body, "seed": 1}), **{"Idempotency-Key": "one"})

    assert first.json()["id"] == again.json()["id"]
    assert again.headers["idempotent-replayed"] == "true"
    assert refused(api, other, status=422)["code"] == "idempotency_key_reused"


def test_the_clients_own_retry_makes_no_second_job(api: Api, http: httpx2.Client, training_file: str) -> None:
    body = json.dumps({"model": "smollm2-135m-instruct", "training_file": training_file, "seed": 99})

    first = post(http, body, **{"x-stainless-retry-count": "0"})
    retry = post(http, body, **{"x-stainless-retry-count": "1"})
    meant = post(http, body, **{"x-stainless-retry-count": "0"})

    assert retry.json()["id"] == first.json()["id"]
    assert retry.headers["idempotent-replayed"] == "true"
    assert meant.json()["id"] != first.json()["id"]


@pytest.mark.parametrize("count", ["", "0", "00", "-1", "junk", "1e3", "9" * 500])
def test_what_is_no_count_of_retries_is_a_new_request(
    api: Api, http: httpx2.Client, training_file: str, count: str
) -> None:
    body = json.dumps({"model": "smollm2-135m-instruct", "training_file": training_file, "seed": 98})

    made = [post(http, body, **{"x-stainless-retry-count": count}).json()["id"] for _ in range(2)]

    assert made[0] != made[1]


BAD_AUTHORIZATION: dict[str, list[tuple[bytes, bytes]]] = {
    "none": [],
    "basic": [(b"Authorization", b"Basic dXNlcjpwYXNz")],
    "junk": [(b"Authorization", b"Bearer junk")],
    "bad checksum": [(b"Authorization", b"Bearer tp_" + b"a" * 32 + b"_" + b"0" * 6)],
    "10 kB": [(b"Authorization", b"Bearer " + b"a" * 10_000)],
    "not ASCII": [(b"Authorization", "Bearer schlüssel".encode())],
    "two": [(b"Authorization", b"Bearer a"), (b"Authorization", b"Bearer b")],
}


@pytest.mark.parametrize("headers", BAD_AUTHORIZATION.values(), ids=BAD_AUTHORIZATION.keys())
def test_a_bad_key_is_a_401(api: Api, headers: list[tuple[bytes, bytes]]) -> None:
    with httpx2.Client(base_url=api.url, timeout=patience(20)) as client:
        error = refused(api, client.get("/v1/models", headers=headers), status=401)

    assert error["type"] == "invalid_request_error"  # as OpenAI has it
    sent = b"".join(value for _, value in headers)
    assert not any(sent[start : start + 12].decode("latin-1") in error["message"] for start in range(8, len(sent) - 12))


def test_another_organizations_things_do_not_exist(api: Api, stranger: str, training_file: str) -> None:
    with api.http(stranger) as http:
        body = json.dumps({"model": "smollm2-135m-instruct", "training_file": training_file})
        assert refused(api, post(http, body))["code"] == "file_not_found"
        for method, path in [("GET", f"/v1/files/{training_file}"), ("DELETE", f"/v1/files/{training_file}")]:
            refused(api, http.request(method, path), status=404)


BAD_URLS = [
    ("GET", "/v1/nothing", 404),
    ("PUT", "/v1/files", 405),
    ("GET", "/v1/files//", 404),
    ("POST", "/v1/fine_tuning/jobs//", 404),
    ("GET", "//v1/files", 404),
    ("GET", "/v1/files/%ff", 404),
    ("GET", "/v1/files/%ED%A0%80", 404),
    ("GET", "/v1/models/%2F%2F", 404),
    ("GET", "/v1/fine_tuning/jobs?after=" + "x" * 101, 400),
    ("GET", "/v1/fine_tuning/jobs?limit=" + "9" * 5000, 400),
    ("GET", "/v1/fine_tuning/jobs?metadata=null&metadata%5Bk%5D=v", 400),
    ("GET", "/v1/fine_tuning/jobs?q=" + "x" * 9000, 400),
    ("GET", "/v1/files/not-an-id", 404),
    ("GET", "/v1/files/file-%00", 404),
    ("GET", "/v1/fine_tuning/jobs/ftjob-x", 404),
    ("GET", "/v1/fine_tuning/jobs/..%2f..%2fetc", 404),
    ("POST", "/v1/fine_tuning/jobs/ftjob-x/cancel", 404),
    ("GET", "/v1/fine_tuning/jobs?limit=0", 400),
    ("GET", "/v1/fine_tuning/jobs?limit=-1", 400),
    ("GET", "/v1/fine_tuning/jobs?limit=1000000000", 400),
    ("GET", "/v1/fine_tuning/jobs?limit=abc", 400),
    ("GET", "/v1/fine_tuning/jobs?metadata=x", 400),
    ("GET", "/v1/fine_tuning/jobs?after=%00", 400),
    ("GET", "/v1/fine_tuning/jobs?metadata%5Bk%5D=%00", 400),
    ("GET", "/v1/files?order=sideways", 400),
    ("GET", "/v1/files?purpose=%00", 400),
    ("GET", "/v1/models/ft:a:b:c:d", 404),
    ("GET", "/v1/models/a%00b", 404),
    ("DELETE", "/v1/models/smollm2-135m-instruct", 400),
    ("GET", "/v1/tunepool/adapters/..%2f..%2fx", 404),
    ("GET", "/v1/tunepool/objects/junk", 403),
    ("GET", "/v1/tunepool/objects/%C3%A4.%C3%A4", 403),
]


@pytest.mark.parametrize(("method", "path", "status"), BAD_URLS, ids=[f"{one[0]} {one[1]}" for one in BAD_URLS])
def test_a_bad_address_is_answered_in_the_envelope(
    api: Api, http: httpx2.Client, method: str, path: str, status: int
) -> None:
    refused(api, http.request(method, path), status=status)


def test_every_list_answers_alike_to_a_cursor_that_never_was(api: Api, http: httpx2.Client, training_file: str) -> None:
    body = json.dumps({"model": "smollm2-135m-instruct", "training_file": training_file})
    job = f"{URL}/{post(http, body).json()['id']}"
    for cursor in ["junk", "' or 1=1 --", "ftjob-" + "f" * 90, "file-zzz"]:
        for path in (*LISTS, f"{job}/events", f"{job}/checkpoints"):
            answer = http.get(path, params={"after": cursor})
            assert refused(api, answer, status=404)["param"] == "after", path
    assert http.post(f"{job}/cancel").status_code == 200


def test_no_list_is_left_out(api: Api) -> None:
    paths = create_app(api.settings).openapi()["paths"]
    cursors = {
        path
        for path, verbs in paths.items()
        for parameter in verbs.get("get", {}).get("parameters", ())
        if parameter["name"] == "after" and "{" not in path
    }

    assert cursors == {*LISTS, *FREE_LISTS, "/v1/tunepool/audit"}  # audit is for administrators


def test_polling_with_the_etag_costs_a_304(api: Api, http: httpx2.Client, training_file: str) -> None:
    job_id = post(http, json.dumps({"model": "smollm2-135m-instruct", "training_file": training_file})).json()["id"]

    first = http.get(f"{URL}/{job_id}")
    again = http.get(f"{URL}/{job_id}", headers={"If-None-Match": first.headers["etag"]})
    junk = http.get(f"{URL}/{job_id}", headers={"If-None-Match": "junk"})

    assert (again.status_code, again.content, junk.status_code) == (304, b"", 200)


def test_an_etag_is_known_again_as_proxies_write_it(api: Api, http: httpx2.Client, training_file: str) -> None:
    body = {"model": "smollm2-135m-instruct", "training_file": training_file}
    path = f"{URL}/{post(http, json.dumps(body)).json()['id']}"
    etag = http.get(path).headers["etag"]

    for sent in (f"W/{etag}", f'"other", {etag}', "*"):
        assert http.get(path, headers={"If-None-Match": sent}).status_code == 304
    http.post(f"{path}/cancel")
    assert http.get(path, headers={"If-None-Match": etag}).json()["status"] == "cancelled"


def test_two_requests_at_once_with_one_idempotency_key_make_one_job(
    api: Api, http: httpx2.Client, training_file: str
) -> None:
    body = json.dumps({"model": "smollm2-135m-instruct", "training_file": training_file})
    before = jobs_there_are(api)

    with ThreadPoolExecutor(8) as together:
        answers = list(together.map(lambda _: post(http, body, **{"Idempotency-Key": "at-once"}), range(8)))

    assert len({answer.json()["id"] for answer in answers}) == 1
    assert jobs_there_are(api) == before + 1
