"""A hub's entry without a table of its config: a worker looks up commit and config.json, and says what it cannot."""

from __future__ import annotations

import hashlib
import json
import os
import re
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import psutil
import pytest
from huggingface_hub.constants import DOWNLOAD_CHUNK_SIZE
from sqlalchemy import func, select

from api.views.catalogue_views import base_model
from shared.chores import added_models, base_models, fetches
from shared.errors import Conflict, Invalid, NotFound, NotYet
from shared.fleet import workers
from shared.settle.base_model_status import standing
from shared.settle.catalogue import Catalogue, local_folder
from shared.settle.wanted_models import wanted_model
from shared.store.db import session_scope
from shared.store.tables import BaseModelRow, DeviceRow, FetchRow
from tests import living
from tests.factories import verdict_of
from tests.lifecycle.stack import Stack, make_model, until
from tests.patience import patience
from tests.train.tiny import make_model_directory
from worker.base_models import BaseModelUnavailable, ensure
from worker.base_models import main as fetch_by_hand
from worker.chores import looking_up
from worker.chores.fetching import fetch_next
from worker.chores.looking_up import look_up_next
from worker.host.flags import SharedFlags
from worker.host.host import Host, open_host
from worker.host.presence import describe

COMMIT = "0123456789abcdef" * 2 + "01234567"


class Hub:
    """Repositories by name. A repository is its files, or the status that the hub answers instead."""

    def __init__(self) -> None:
        self.repositories: dict[str, dict[str, bytes] | int] = {}
        self.asked: list[str] = []
        self.sent: list[str] = []  # files that were not only asked for
        self.weight_bytes = 0  # of safetensors files, that were sent
        self.breaks = ""  # the file in whose midst the line breaks, once another is sent; then the hub is away
        self.whole = threading.Event()  # a file of weights was sent whole
        self.away = False
        self.sizes = False  # tells how large its files are, as the hub does and not every mirror
        self.gated = False  # says of what it refuses that terms are to be accepted, as the hub does
        self.slow: threading.Event | None = None  # the second half of each file of weights waits for it

    def answer(self, path: str) -> tuple[int, bytes]:
        self.asked.append(path)
        name = "/".join(path.removeprefix("/api/models").split("/")[1:3])
        found = self.repositories.get(name, 404)
        if isinstance(found, int):
            return found, b"{}"
        if path.startswith(f"/api/models/{name}/tree"):
            listed = [{"type": "file", "path": file, "size": len(found[file]), "oid": "0" * 40} for file in found]
            return 200, json.dumps(listed).encode()
        if path.startswith("/api/"):
            return 200, json.dumps(
                {"id": name, "sha": COMMIT, "siblings": [self.sibling(one, found[one]) for one in found]}
            ).encode()
        content = found.get(path.rsplit("/", 1)[1])
        return (404, b"{}") if content is None else (200, content)

    def sibling(self, name: str, content: bytes) -> dict[str, object]:
        return {"rfilename": name, **({"size": len(content), "blobId": "0" * 40} if self.sizes else {})}


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    made = Hub()

    class Answers(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            path = self.path.partition("?")[0]
            status, whole = (501, b"{}") if made.away else made.answer(path)
            content, asked = whole, re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", ""))
            if status == 200 and asked is not None:
                status, content = 206, whole[int(asked[1]) : int(asked[2] or len(whole)) + 1]
            self.send_response(status)
            if asked is not None:
                self.send_header("Content-Range", f"bytes {asked[1]}-{int(asked[1]) + len(content) - 1}/{len(whole)}")
            self.send_header("Content-Type", "application/json")
            self.send_header("X-Repo-Commit", COMMIT)
            self.send_header("ETag", f'"{hashlib.sha256(whole).hexdigest()}"')
            self.send_header("Retry-After", "0")
            if made.gated and status in {401, 403}:
                self.send_header("X-Error-Code", "GatedRepo")
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            if self.command == "GET":
                made.sent += [] if path.startswith("/api/") else [path.rsplit("/", 1)[1]]
                self.send(content, path.rsplit("/", 1)[1] if status < 300 else "")

        def send(self, content: bytes, file: str) -> None:
            breaks = made.breaks != "" and file == made.breaks
            if breaks and made.whole.wait(patience(20)):
                content, made.breaks, made.away = content[: len(content) // 2], "", True
            if file.endswith(".safetensors"):
                made.weight_bytes += len(content)
            if made.slow is not None and file.endswith(".safetensors"):
                self.wfile.write(content[: -len(content) // 2])
                made.slow.wait(patience(60))
                content = content[-len(content) // 2 :]
            self.wfile.write(content)
            if file.endswith(".safetensors") and not breaks:
                made.whole.set()
            self.close_connection = breaks

        def do_HEAD(self) -> None:
            self.do_GET()

        def log_message(self, *_: object) -> None:
            """Say nothing."""

    server = ThreadingHTTPServer(("127.0.0.1", 0), Answers)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    monkeypatch.setenv("HF_ENDPOINT", f"http://127.0.0.1:{server.server_port}")
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    yield made
    server.shutdown()
    server.server_close()


@pytest.fixture
def host(stack: Stack) -> Iterator[Host]:
    """The worker's side in this process: the chore is called, not waited for."""
    opened = open_host(stack.settings, flags=SharedFlags())
    yield opened
    opened.engine.dispose()


def add(stack: Stack, name: str, revision: str = "main") -> None:
    lines = ["", f"[models.{name}]", 'source = "hub"', f'repository = "example/{name}"', f'revision = "{revision}"', ""]
    with (stack.home / "models.toml").open("a") as file:
        file.write("\n".join(lines))


def offered(stack: Stack) -> Catalogue:
    with session_scope(stack.engine) as session:
        return base_models.offered(session, stack.settings)


def tiny(stack: Stack) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in (stack.home / "tiny").iterdir()}


def test_an_entry_without_config_becomes_ready_and_its_job_trains_on_the_commit(stack: Stack, hub: Hub) -> None:
    hub.repositories["example/far"] = tiny(stack)
    add(stack, "far")
    with pytest.raises(NotYet):
        offered(stack).find("far")
    stack.start_worker()
    stack.start_janitor()

    base = until(lambda: offered(stack).entries.get("far"), seconds=90, what="an entry that is ready").ref
    job = stack.wait(stack.submit("steps=2", model="far"), seconds=60)

    assert (base.revision, base.public_name) == (COMMIT, "example/far")
    assert base.facts == offered(stack).find("tiny").facts
    assert job.status == "succeeded"
    assert job.spec["base_model"]["revision"] == COMMIT
    assert stack.broken_invariants() == []


def test_while_a_slow_hub_sends_a_model_its_job_waits_and_no_device_is_leased(stack: Stack, hub: Hub) -> None:
    large = weights(numbers=12_000_000)
    hub.repositories["example/far"] = tiny(stack) | {"model.safetensors": large}
    add(stack, "far")
    offered(stack)
    stack.start_worker()
    stack.start_janitor()
    until(lambda: offered(stack).entries.get("far"), seconds=90, what="an entry that is ready")
    hub.slow = threading.Event()

    waits = stack.submit("steps=2", model="far")
    row = until(lambda: [one for one in prefetches(stack, "far") if one.bytes_done >= DOWNLOAD_CHUNK_SIZE], seconds=60)[
        0
    ]
    with session_scope(stack.engine) as session:
        verdict = verdict_of(session, waits, pool_name=stack.settings.pool)
        leased = session.scalars(select(DeviceRow.id).where(DeviceRow.leased_by.is_not(None))).all()
    near = stack.wait(stack.submit("steps=2"), seconds=60)

    assert verdict is not None
    assert (verdict.blocked_by, list(leased)) == ("BASE_MODEL_FETCHING", [])
    assert " bytes" in verdict.detail
    assert row.bytes_done < row.bytes_total
    assert near.status == "succeeded", "the device is free for others meanwhile"
    assert stack.job(waits).status == "queued"
    hub.slow.set()
    assert stack.wait(waits, seconds=60).status == "succeeded"
    told = [event.message for event in stack.events(waits)]
    assert any("is on no host that fits this job; 1 host fetches it" in message for message in told)
    assert any("has the base model 'far' now" in message for message in told)
    assert stack.broken_invariants() == []


def weights(*, padding: int = 0, numbers: int = 1_000_000) -> bytes:
    """A file in bfloat16, as it is published: a header, and two bytes for each number."""
    size = 2 * numbers
    told = {"model.embed_tokens.weight": {"dtype": "BF16", "shape": [1000, numbers // 1000], "data_offsets": [0, size]}}
    header = json.dumps({"__metadata__": {"padding": "x" * padding}, **told}).encode()
    return len(header).to_bytes(8, "little") + header + bytes(size)


@pytest.mark.parametrize("padding", [0, 150_000], ids=["short header", "header of several requests"])
def test_parameters_are_read_from_the_header_and_no_weight_is_fetched(
    stack: Stack, hub: Hub, host: Host, padding: int
) -> None:
    hub.repositories["example/far"] = tiny(stack) | {"model.safetensors": weights(padding=padding)}
    add(stack, "far")
    offered(stack)

    assert look_up_next(host)

    facts = offered(stack).find("far").facts
    assert (facts.parameters, facts.active_parameters, facts.stored_as) == (1_000_000, 1_000_000, "bfloat16")
    assert 0 < hub.weight_bytes < 400_000


def test_files_of_an_index_are_counted_together(stack: Stack, hub: Hub, host: Host) -> None:
    parts = {"a": "model-1.safetensors", "b": "model-2.safetensors"}
    index = json.dumps({"metadata": {}, "weight_map": parts}).encode()
    files = {name: content for name, content in tiny(stack).items() if name != "model.safetensors"}
    files |= {name: weights() for name in parts.values()} | {"model.safetensors.index.json": index}
    files["model-2.safetensors"] = files["model-2.safetensors"].replace(b"model.embed_tokens", b"model.layers.0.xyz")
    hub.repositories["example/far"] = files
    add(stack, "far")
    offered(stack)

    assert look_up_next(host)

    assert offered(stack).find("far").facts.parameters == 2_000_000


@pytest.mark.parametrize(
    ("large", "sizes"),
    [
        ("config.json", True),
        ("tokenizer.json", False),
        ("chat_template.jinja", True),
        ("model.safetensors.index.json", False),
    ],
)
def test_a_file_that_is_larger_than_any_models_is_refused_and_not_kept(
    stack: Stack, hub: Hub, host: Host, large: str, sizes: bool
) -> None:
    files = tiny(stack) | {large: b" " * 100_001}
    hub.repositories["example/far"] = {name: files[name] for name in files if name != "model.safetensors"}
    hub.sizes = sizes
    add(stack, "far")
    offered(stack)

    with pytest.MonkeyPatch.context() as smaller:
        smaller.setattr(looking_up, "_FILE_BYTES", 100_000)
        assert look_up_next(host)

    with pytest.raises(Invalid, match=r"larger than 100000 bytes\. No model needs that"):
        offered(stack).find("far")
    assert (large in hub.sent) is not sizes, "what the hub says is too large is not asked for"


def test_only_the_config_and_headers_are_fetched_to_know_a_model(stack: Stack, hub: Hub, host: Host) -> None:
    hub.repositories["example/far"] = tiny(stack) | {"model.safetensors": weights()}
    add(stack, "far", revision="v1.0")
    offered(stack)

    assert look_up_next(host)
    assert not look_up_next(host), "what is ready is not looked up again"

    assert offered(stack).find("far").revision == COMMIT
    assert "/api/models/example/far/revision/v1.0" in hub.asked
    assert {path.rsplit("/", 1)[1] for path in hub.asked if "/resolve/" in path} == {"config.json", "model.safetensors"}
    assert hub.weight_bytes < 200_000


def test_a_model_is_described_by_a_program_of_the_trainer_and_shown(stack: Stack, hub: Hub, tmp_path: Path) -> None:
    folder = make_model_directory(tmp_path / "model")
    hub.repositories["example/far"] = {file.name: file.read_bytes() for file in folder.iterdir()}
    add(stack, "far")
    offered(stack)
    stack.start_worker(TUNEPOOL_DESCRIBER="worker.train.description")

    until(lambda: offered(stack).entries.get("far"), seconds=120, what="an entry that is ready")

    shown = base_model(standing(offered(stack), "far")).model_dump(mode="json")
    assert shown["description"]["notes"] == [], "the headers count as many parameters as the build"
    assert shown["description"]["template"]["end_of_turn"] == "<|im_end|>"
    assert shown["description"]["build"]["layer_types"] == {"LlamaDecoderLayer": 2}
    assert shown["description"]["build"]["parameters"] == shown["sizes"]["parameters"]
    assert hub.weight_bytes < 200_000, "the header alone"


def test_the_fetcher_by_hand_knows_what_a_worker_has_looked_up(
    stack: Stack, hub: Hub, host: Host, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    hub.repositories["example/far"] = tiny(stack)
    add(stack, "far")
    offered(stack)
    assert look_up_next(host)
    monkeypatch.setattr(sys, "argv", ["base_models", "far"])
    monkeypatch.setenv("TUNEPOOL_HOME", str(stack.settings.home))
    monkeypatch.setenv("TUNEPOOL_MODELS_FILE", str(stack.home / "models.toml"))
    monkeypatch.setenv("DATABASE_URL", "")
    with pytest.raises(SystemExit, match="not ready yet"):  # a host without a database
        fetch_by_hand()

    monkeypatch.setenv("DATABASE_URL", stack.settings.database_url)
    fetch_by_hand()

    printed = capsys.readouterr().out.splitlines()[-1]  # above it is what the look-up has logged
    assert (Path(printed) / "model.safetensors").is_file()


def without_config(files: dict[str, bytes]) -> dict[str, bytes]:
    return {name: content for name, content in files.items() if name != "config.json"}


def without_weights(files: dict[str, bytes]) -> dict[str, bytes]:
    return {name: content for name, content in files.items() if name != "model.safetensors"}


def with_weights(content: bytes) -> Callable[[dict[str, bytes]], dict[str, bytes]]:
    return lambda files: files | {"model.safetensors": content}


def shaped(shape: list[int]) -> bytes:
    text = json.dumps({"w": {"dtype": "BF16", "shape": shape, "data_offsets": [0, 0]}}).encode()
    return len(text).to_bytes(8, "little") + text


def many_tensors(count: int) -> bytes:
    """A header of as many tensors of one byte each."""
    listed = {f"w{at}": {"dtype": "U8", "shape": [1], "data_offsets": [at, at + 1]} for at in range(count)}
    header = json.dumps(listed).encode()
    return len(header).to_bytes(8, "little") + header + bytes(count)


def in_files(count: int) -> Callable[[dict[str, bytes]], dict[str, bytes]]:
    """The weights in as many files, by an index."""
    names = [f"model-{at}.safetensors" for at in range(count)]
    index = json.dumps({"weight_map": {f"w{at}": name for at, name in enumerate(names)}}).encode()
    return lambda files: without_weights(files) | dict.fromkeys(names, b"") | {"model.safetensors.index.json": index}


def with_config(**changes: object) -> Callable[[dict[str, bytes]], dict[str, bytes]]:
    def changed(files: dict[str, bytes]) -> dict[str, bytes]:
        return files | {"config.json": json.dumps(json.loads(files["config.json"]) | changes).encode()}

    return changed


@pytest.mark.parametrize(
    ("published", "says"),
    [
        (lambda _: 401, "HF_TOKEN"),
        (lambda _: 403, "accept its terms"),
        (lambda _: 404, "The hub has no config.json of example/far at revision main"),
        (without_config, "The hub has no config.json of example/far at revision main"),
        (with_config(auto_map={"AutoModel": "m.M"}, model_type="invented_later"), "auto_map', which names code to run"),
        (with_config(attn_implementation="evil/kernel"), "a repository of code to run"),
        (without_weights, "no weights as safetensors"),
        (with_weights(b"\xff" * 64), "header that describes no tensors"),
        (with_weights(shaped([0])), "no size of a model"),
        (
            with_weights(shaped([10**30])),
            "a shape that is none",
        ),
        (with_weights(shaped([-3])), "a shape that is none"),
        (with_config(hidden_size=None), "hidden_size"),
        (with_config(num_hidden_layers=10_000_000), "num_hidden_layers"),
        (with_config(intermediate_size=float("nan")), "intermediate_size"),
        (with_weights(many_tensors(1_000_000)), "larger than any model's"),
        (in_files(2001), "more than 2000 such files"),
        (with_config(model_type="invented_later"), "'invented_later') is not known"),
        (lambda files: files | {"config.json": b"[" * 100_000}, "not valid JSON"),
        (lambda files: files | {"config.json": b" " * (2**20 + 1)}, "larger than"),
    ],
)
def test_what_cannot_be_used_says_what_to_do_and_the_others_stay(
    stack: Stack, hub: Hub, host: Host, published: Callable[[dict[str, bytes]], dict[str, bytes] | int], says: str
) -> None:
    hub.repositories["example/far"] = published(tiny(stack))
    add(stack, "far")
    offered(stack)

    assert look_up_next(host)

    found = offered(stack)
    with pytest.raises(Invalid) as refused:
        found.find("far")
    assert refused.value.code == "base_model_misconfigured"
    assert says in refused.value.message
    assert says in found.complaints()["far"]
    assert "tiny" in found.names()


@pytest.mark.parametrize(
    "answer",
    [
        b"<!DOCTYPE html><html><body>Sign in to the network</body></html>",
        b"",
        b"[]",
        b'"a hub"',
        b'{"id": "example/far"}',
        json.dumps({"id": "example/far", "sha": "../../../../etc/cron.d", "siblings": []}).encode(),
        json.dumps({"id": "example/far", "sha": COMMIT, "siblings": [1]}).encode(),
        b"[" * 100_000,
    ],
    ids=["a page", "nothing", "a list", "a text", "no commit", "a path as commit", "files that are none", "deep"],
)
def test_what_answers_and_is_no_hub_is_told_and_asked_again(
    stack: Stack, hub: Hub, host: Host, monkeypatch: pytest.MonkeyPatch, answer: bytes
) -> None:
    known = hub.answer
    monkeypatch.setattr(hub, "answer", lambda _: (200, answer))
    add(stack, "far")
    offered(stack)

    assert look_up_next(host)

    with pytest.raises(NotYet, match="HF_ENDPOINT"):
        offered(stack).find("far")
    assert "tiny" in offered(stack).names()
    monkeypatch.setattr(hub, "answer", known)
    hub.repositories["example/far"] = tiny(stack)
    with session_scope(stack.engine) as session:
        session.scalars(select(BaseModelRow)).one().lease_until = None
    assert look_up_next(host)
    assert offered(stack).find("far").revision == COMMIT


@pytest.mark.parametrize("status", [301, 400, 408, 429, 500, 502, 503])
def test_what_may_pass_is_asked_again(stack: Stack, hub: Hub, host: Host, status: int) -> None:
    hub.repositories["example/far"] = status
    add(stack, "far")
    offered(stack)

    assert look_up_next(host)

    with pytest.raises(NotYet, match="asked again"):
        offered(stack).find("far")


def test_a_config_with_a_bound_that_is_infinite_is_one(stack: Stack, hub: Hub, host: Host) -> None:
    """As published ones of the Mamba kind have: `time_step_limit`."""
    hub.repositories["example/far"] = with_config(time_step_limit=[0.0, float("inf")])(tiny(stack))
    add(stack, "far")
    offered(stack)

    assert look_up_next(host)

    assert offered(stack).find("far").revision == COMMIT


@pytest.mark.parametrize("status", [401, 403])
def test_a_gated_model_says_whose_terms_are_to_be_accepted_and_says_it_once(
    stack: Stack, hub: Hub, host: Host, status: int
) -> None:
    hub.repositories["example/far"], hub.gated = status, True
    add(stack, "far")
    offered(stack)

    assert look_up_next(host)

    with pytest.raises(Invalid) as refused:
        offered(stack).find("far")
    assert "only to those who have accepted its terms" in refused.value.message
    assert "tunepool models check far" in refused.value.message
    assert refused.value.message.count("Ask your administrator") == 1


def test_a_hub_that_is_away_is_asked_again_after_longer_pauses(stack: Stack, hub: Hub, host: Host) -> None:
    hub.repositories["example/far"] = 501
    add(stack, "far")
    pauses = []
    for _ in range(2):
        offered(stack)
        assert look_up_next(host)
        assert not look_up_next(host), "not before its time"
        with session_scope(stack.engine) as session:
            row = session.scalars(select(BaseModelRow)).one()
            pauses.append(session.scalar(select(func.extract("epoch", row.lease_until - row.updated_at))))
            row.lease_until = None

    with pytest.raises(NotYet, match="source = 'path'"):
        offered(stack).find("far")
    assert [round(float(pause)) for pause in pauses] == [5, 10]

    hub.repositories["example/far"] = tiny(stack)
    assert look_up_next(host)
    assert offered(stack).find("far").revision == COMMIT


def test_a_model_that_was_refused_is_looked_up_again_after_a_while(stack: Stack, hub: Hub, host: Host) -> None:
    hub.repositories["example/far"] = 403
    add(stack, "far")
    offered(stack)
    assert look_up_next(host)
    hub.repositories["example/far"] = tiny(stack)  # somebody accepted its terms
    offered(stack)
    assert not look_up_next(host)

    with session_scope(stack.engine) as session:
        session.scalars(select(BaseModelRow)).one().updated_at = func.to_timestamp(0)
    offered(stack)

    assert look_up_next(host)
    assert offered(stack).find("far").revision == COMMIT


# --- code that a config names ----------------------------------------------------------------------------------------


def test_code_that_transformers_does_not_need_is_left_out_of_the_copy(
    stack: Stack, hub: Hub, host: Host, tmp_path: Path
) -> None:
    own = {"model_type": "llama", "auto_map": {"AutoModelForCausalLM": "modeling_x.X"}}
    hub.repositories["example/far"] = with_config(**own)(tiny(stack)) | {
        "modeling_x.py": b"raise SystemExit",
        "tokenizer.json": b"{}",
        "tokenizer_config.json": json.dumps({"auto_map": {"AutoTokenizer": ["t.T", None]}, "kept": 1}).encode(),
    }
    add(stack, "far")
    offered(stack)

    assert look_up_next(host)
    folder = ensure(offered(stack).entry("far"), cache=tmp_path / "cache", interrupt=lambda: None)

    assert "auto_map" not in json.loads((folder / "config.json").read_text())
    assert json.loads((folder / "tokenizer_config.json").read_text()) == {"kept": 1}
    assert not (folder / "modeling_x.py").exists()


def test_a_tokenizer_that_needs_code_is_refused(stack: Stack, hub: Hub, host: Host, tmp_path: Path) -> None:
    hub.repositories["example/far"] = with_config(model_type="llama")(tiny(stack)) | {
        "tokenizer_config.json": json.dumps({"auto_map": {"AutoTokenizer": ["t.T", None]}}).encode()
    }
    add(stack, "far")
    offered(stack)
    assert look_up_next(host)

    with pytest.raises(Invalid, match=r"tokenizer_config\.json has the key 'auto_map'"):
        ensure(offered(stack).entry("far"), cache=tmp_path / "cache", interrupt=lambda: None)


# --- a fetch that breaks ------------------------------------------------------------------------------------------


def test_a_broken_fetch_goes_on_with_the_bytes_that_it_lacks(
    stack: Stack, hub: Hub, host: Host, tmp_path: Path
) -> None:
    large = weights(numbers=12_000_000)
    hub.repositories["example/far"] = tiny(stack) | {"model-2.safetensors": large, "model.safetensors": weights()}
    add(stack, "far")
    offered(stack)
    assert look_up_next(host)
    entry = offered(stack).entry("far")
    hub.whole.clear()
    hub.breaks = "model-2.safetensors"
    with pytest.raises(BaseModelUnavailable):
        ensure(entry, cache=tmp_path, interrupt=lambda: None)
    assert hub.away
    hub.away, hub.weight_bytes = False, 0

    folder = ensure(entry, cache=tmp_path, interrupt=lambda: None)

    assert hub.weight_bytes == len(large) - DOWNLOAD_CHUNK_SIZE, "only what was lacking, of a half file too"
    assert (folder / "model-2.safetensors").read_bytes() == large
    assert (folder / "model.safetensors").read_bytes() == weights()
    assert list(folder.glob("*.part")) == []


def test_a_part_with_other_bytes_than_promised_is_fetched_anew(
    stack: Stack, hub: Hub, host: Host, tmp_path: Path
) -> None:
    hub.repositories["example/far"] = tiny(stack) | {"model.safetensors": weights()}
    add(stack, "far")
    offered(stack)
    assert look_up_next(host)
    entry = offered(stack).entry("far")
    half = local_folder(entry, cache=tmp_path).with_name(f"{local_folder(entry, cache=tmp_path).name}.fetch") / "model"
    half.mkdir(parents=True)
    part = half / f"model.safetensors.{hashlib.sha256(weights()).hexdigest()}.part"
    part.write_bytes(b"\xff" * 1000)

    with pytest.raises(BaseModelUnavailable, match="it is fetched anew"):
        ensure(entry, cache=tmp_path, interrupt=lambda: None)
    folder = ensure(entry, cache=tmp_path, interrupt=lambda: None)

    assert (folder / "model.safetensors").read_bytes() == weights()
    assert [place.name for place in (tmp_path / "models").iterdir() if place.suffix == ".fetch"] == []


# --- folders ----------------------------------------------------------------------------------------------------------


def add_folder(stack: Stack, folder: Path) -> None:
    with session_scope(stack.engine) as session:
        added_models.add(session, stack.caller, wanted_model(str(folder), name="house"), stack.settings)


def spoilt(change: Callable[[Path], object]) -> Callable[[Path], None]:
    def make(folder: Path) -> None:
        make_model(folder)
        change(folder)

    return make


def test_a_folder_is_read_by_a_worker_and_its_config_is_kept(stack: Stack, host: Host) -> None:
    make_model(stack.home / "house")
    (stack.home / "house" / "model.safetensors").write_bytes(weights())
    add_folder(stack, stack.home / "house")

    assert look_up_next(host)

    base = offered(stack).find("house")
    assert (base.source, base.revision, base.facts.parameters) == ("path", "local", 1_000_000)


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (lambda _: None, "There is no folder"),
        (lambda folder: folder.write_text("a file"), "There is no folder"),
        (lambda folder: folder.mkdir(), "There is no config.json"),
        (spoilt(lambda folder: (folder / "model.safetensors").unlink()), "no weights as safetensors"),
        (spoilt(lambda folder: (folder / "modeling_x.py").touch()), "modeling_x.py can run code"),
        (spoilt(lambda folder: (folder / "config.json").write_text("{")), "not valid JSON"),
        (spoilt(lambda folder: (folder / "config.json").write_text('{"model_type": "new"}')), "is not known"),
        (spoilt(lambda folder: (folder / "config.json").write_bytes(b" " * (2**20 + 1))), "larger than"),
        (spoilt(lambda folder: (folder / "model.safetensors").write_bytes(b"\xff" * 9)), "impossible length"),
        (spoilt(lambda folder: os.mkfifo(folder / "config.json.x")), ""),
    ],
)
def test_a_folder_that_cannot_be_used_says_what_to_do(
    stack: Stack, host: Host, tmp_path: Path, make: Callable[[Path], object], says: str
) -> None:
    make(tmp_path / "house")
    add_folder(stack, tmp_path / "house")

    assert look_up_next(host)

    found = offered(stack)
    assert ("house" in found.names()) == (says == "")
    assert says in found.problems.get("house", "")


# --- prefetch ---------------------------------------------------------------------------------------------------------


def register(stack: Stack, host: Host) -> None:
    """As the worker's own reports do, with one device."""
    with session_scope(stack.engine) as session:
        workers.register(session, host.worker, [describe(host.devices[0], host="h", cached=[])], leased=[])


def prefetch(stack: Stack, name: str) -> None:
    with session_scope(stack.engine) as session:
        fetches.ask(session, stack.caller, name, stack.settings)


def prefetches(stack: Stack, name: str) -> list[FetchRow]:
    with session_scope(stack.engine) as session:
        return [row for row, _ in fetches.listed(session, name, stack.settings)]


def test_a_worker_brings_a_model_to_its_host_and_says_how_far_it_is(stack: Stack, hub: Hub, host: Host) -> None:
    hub.repositories["example/far"] = tiny(stack) | {"model.safetensors": weights()}
    add(stack, "far")
    offered(stack)
    assert look_up_next(host)
    register(stack, host)
    prefetch(stack, "far")
    assert [row.state for row in prefetches(stack, "far")] == ["waiting"]

    assert fetch_next(host)
    assert not fetch_next(host)

    (row,) = prefetches(stack, "far")
    assert (row.state, row.error) == ("done", None)
    assert row.bytes_done == row.bytes_total >= len(weights())
    assert (local_folder(offered(stack).entry("far"), cache=stack.settings.cache) / "config.json").is_file()
    prefetch(stack, "far")
    assert fetch_next(host), "asked again it looks again"
    assert [row.state for row in prefetches(stack, "far")] == ["done"]


def test_a_prefetch_of_a_hub_that_is_away_is_tried_again_and_ends_with_its_reason(
    stack: Stack, hub: Hub, host: Host
) -> None:
    hub.repositories["example/far"] = tiny(stack)
    add(stack, "far")
    offered(stack)
    assert look_up_next(host)
    register(stack, host)
    prefetch(stack, "far")
    hub.away = True
    for _ in range(3):
        assert fetch_next(host)
        assert not fetch_next(host), "not before its time"
        with session_scope(stack.engine) as session:
            session.scalars(select(FetchRow)).one().lease_until = None

    (row,) = prefetches(stack, "far")
    assert (row.state, row.error) == ("error", "Its source does not answer this host, or there is no room for it now.")


def test_a_model_that_the_hub_takes_back_ends_its_prefetch_with_the_remedy(stack: Stack, hub: Hub, host: Host) -> None:
    hub.repositories["example/far"] = tiny(stack)
    add(stack, "far")
    offered(stack)
    assert look_up_next(host)
    register(stack, host)
    prefetch(stack, "far")
    hub.repositories["example/far"] = 403

    assert fetch_next(host)

    (row,) = prefetches(stack, "far")
    assert row.state == "error"
    assert "HF_TOKEN" in (row.error or "")


def test_nothing_is_prefetched_that_lies_in_a_folder_or_has_nobody_to_fetch_it(stack: Stack, host: Host) -> None:
    with pytest.raises(Invalid, match="nothing to fetch"):
        prefetch(stack, "tiny")
    with pytest.raises(Conflict, match="No worker") as refused:
        prefetch(stack, "smollm2-135m-instruct")
    assert refused.value.code == "no_worker"
    with pytest.raises(NotFound):
        prefetch(stack, "none")


# --- several on one host ----------------------------------------------------------------------------------------------


def retry_at_once(stack: Stack) -> None:
    """A fetch that was put off is tried again 30 seconds later; these tests do not wait so long."""
    with session_scope(stack.engine) as session:
        for row in session.scalars(select(FetchRow).where(FetchRow.state == "waiting")):
            row.lease_until = None


def test_programs_that_bring_the_same_files_take_turns_and_the_second_fetches_nothing(
    stack: Stack, hub: Hub, tmp_path: Path
) -> None:
    """A fetcher that was killed may leave its program for a moment, beside that of the next one."""
    large = weights(numbers=12_000_000)
    hub.repositories["example/far"] = tiny(stack) | {"model.safetensors": large}
    hub.slow = threading.Event()
    made = tmp_path / "far.fetch" / "model"
    argv = [sys.executable, "-m", "worker.program.hub_download", "example/far", COMMIT, str(made)]

    with subprocess.Popen(argv) as first, subprocess.Popen(argv) as second:
        until(lambda: [part for part in made.glob("*.part") if part.stat().st_size], seconds=60, what="half a file")
        waiting = re.compile(rf"-> FLOCK .* ({first.pid}|{second.pid}) ")
        until(lambda: waiting.search(Path("/proc/locks").read_text()), seconds=60, what="one that waits for the other")
        hub.slow.set()
        assert [first.wait(patience(60)), second.wait(patience(60))] == [0, 0]

    assert {name: hub.sent.count(name) for name in hub.sent} == {"config.json": 1, "model.safetensors": 1}
    assert (made / "model.safetensors").read_bytes() == large


def downloads(worker: subprocess.Popen[bytes]) -> list[psutil.Process]:
    """The programs of a worker that ask the hub for the files of a model."""
    return [process for process in living.family(worker.pid) if "worker.program.hub_download" in living.words(process)]


def test_when_one_of_two_workers_of_a_host_dies_in_their_fetch_the_other_goes_on_with_the_bytes_that_are_there(
    stack: Stack, hub: Hub
) -> None:
    large = weights(numbers=24_000_000)
    hub.repositories["example/far"] = tiny(stack) | {"model.safetensors": large}
    add(stack, "far")
    offered(stack)
    cache = stack.home / "models"
    workers = [
        stack.start_worker(
            home=f"worker-{number}",
            TUNEPOOL_CACHE_DIR=str(cache),
            TUNEPOOL_CPU_SLOTS="2",
            TUNEPOOL_DEVICES=f"cpu-{number}",
        )
        for number in range(2)
    ]
    stack.start_janitor()
    stack.wait_for_worker(devices=2)
    entry = until(lambda: offered(stack).entries.get("far"), seconds=90, what="an entry that is ready")
    folder = local_folder(entry, cache=cache)
    hub.slow = threading.Event()
    hub.sent.clear()

    prefetch(stack, "far")
    until(lambda: [row.lease_owner is not None for row in prefetches(stack, "far")] == [True, True], what="two fetches")
    half = 2 * DOWNLOAD_CHUNK_SIZE  # of the 24 MB that the hub has sent, what has been written
    parts = until(lambda: [file for file in folder.parent.rglob("*.part") if file.stat().st_size >= half], seconds=60)
    ((holder, writer),) = [(worker, program) for worker in workers for program in downloads(worker)]
    holder.kill()
    until(lambda: not living.is_alive(writer), what="the end of the program that the dead worker has left")
    hub.weight_bytes = 0
    kept = parts[0].stat().st_size
    hub.slow.set()

    until(lambda: "done" in [row.state for row in prefetches(stack, "far")], seconds=60, what="the fetch of the other")
    assert kept == half
    assert hub.weight_bytes == len(large) - half, "the other asks for what is lacking, and for it only"
    assert {name: hub.sent.count(name) for name in hub.sent} == {"config.json": 1, "model.safetensors": 2}
    assert (folder / "model.safetensors").read_bytes() == large
    assert [place.name for place in folder.parent.iterdir() if place.suffix == ".fetch"] == []


def test_a_model_that_a_job_trains_on_is_not_removed_to_make_room_for_another(stack: Stack, hub: Hub) -> None:
    for name in ("near", "next"):
        hub.repositories[f"example/{name}"] = tiny(stack)
        add(stack, name)
    offered(stack)
    most = 2**26 + 3 * len(tiny(stack)["model.safetensors"]) // 2  # for one; what a second is reckoned at is too much
    stack.start_worker(TUNEPOOL_CACHE_BYTES=str(most))
    stack.start_janitor()
    until(lambda: {"near", "next"} <= offered(stack).entries.keys(), seconds=90, what="entries that are ready")
    folders = [local_folder(offered(stack).entry(name), cache=stack.settings.cache) for name in ("near", "next")]
    job = stack.submit("steps=4 hold=2", model="near")
    stack.wait_for_step(job, 1, seconds=60)

    prefetch(stack, "next")
    put_off = until(lambda: [row for row in prefetches(stack, "next") if row.error], what="a fetch that was put off")
    there = [folder.is_dir() for folder in folders]
    stack.let_go_on(job)
    ended = stack.wait(job, seconds=60)

    def arrived() -> bool:
        retry_at_once(stack)
        return [row.state for row in prefetches(stack, "next")] == ["done"]

    until(arrived, seconds=60, what="room for the next")
    assert "no room for it now" in (put_off[0].error or "")
    assert there == [True, False]
    assert ended.status == "succeeded"
    assert [folder.is_dir() for folder in folders] == [False, True]
    assert stack.broken_invariants() == []
