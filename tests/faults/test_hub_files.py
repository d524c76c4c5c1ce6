"""Of a repository that holds its weights several times, one copy is fetched."""

from __future__ import annotations

import hashlib
import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from shared.settings import Settings
from shared.settle.catalogue import load_catalogue
from tests.lifecycle.stack import make_model
from worker.base_models import ensure

REVISION = "0123456789abcdef" * 2 + "01234567"
AGAIN = (
    "original/model.safetensors",
    "consolidated.safetensors",
    "consolidated.00.safetensors",
    "metal/model.safetensors",
)


@pytest.fixture
def files(tmp_path: Path) -> dict[str, bytes]:
    """A small model as published: what is needed, and its weights again in other forms."""
    make_model(tmp_path / "tiny")
    needed = {file.name: file.read_bytes() for file in (tmp_path / "tiny").iterdir()}
    weights = next(content for name, content in needed.items() if name.endswith(".safetensors"))
    return needed | dict.fromkeys(AGAIN, weights)


@pytest.fixture
def hub(files: dict[str, bytes], monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    class Answers(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            if self.path.startswith("/api/"):
                content = json.dumps(
                    [{"type": "file", "path": name, "size": len(files[name]), "oid": "0" * 40} for name in files]
                ).encode()
            else:
                content = files[self.path.split(f"/resolve/{REVISION}/")[1]]
            self.send_response(200)
            self.send_header("Content-Type", "application/json")
            self.send_header("X-Repo-Commit", REVISION)
            self.send_header("ETag", f'"{hashlib.sha256(content).hexdigest()}"')
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            if self.command == "GET":
                self.wfile.write(content)

        def do_HEAD(self) -> None:
            self.do_GET()

        def log_message(self, *_: object) -> None:
            """Say nothing."""

    server = ThreadingHTTPServer(("127.0.0.1", 0), Answers)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    monkeypatch.setenv("HF_ENDPOINT", f"http://127.0.0.1:{server.server_port}")
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    yield
    server.shutdown()
    server.server_close()


@pytest.mark.usefixtures("hub")
def test_weights_in_other_forms_are_not_fetched(files: dict[str, bytes], tmp_path: Path) -> None:
    config = json.loads(files["config.json"])
    lines = [f"{key} = {json.dumps(value)}" for key, value in config.items() if value is not None]
    head = ["[models.far]", 'source = "hub"', 'repository = "example/far"', f'revision = "{REVISION}"']
    (tmp_path / "models.toml").write_text("\n".join([*head, "[models.far.config]", *lines, ""]))
    entry = load_catalogue(Settings(models_file=tmp_path / "models.toml")).entry("far")

    folder = ensure(entry, cache=tmp_path / "cache", interrupt=lambda: None)

    fetched = {str(file.relative_to(folder)) for file in folder.rglob("*") if file.is_file()}
    assert not fetched.intersection(AGAIN)
    assert {"config.json", "model.safetensors"} <= fetched
