"""A hub on loopback that gives the files of one repository at one commit."""

from __future__ import annotations

import contextlib
import hashlib
import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, Final

REVISION: Final = "0123456789abcdef" * 2 + "01234567"


class Served:
    """Where the hub listens, and what was asked of it."""

    def __init__(self) -> None:
        self.url = ""
        self.given: set[str] = set()


@contextlib.contextmanager
def serving(files: dict[str, bytes]) -> Iterator[Served]:
    served = Served()

    class Answers(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            if not self.path.startswith("/api/models/") and self.path.startswith("/api/"):
                content = b"{}"  # what a hub's own command asks beside models
            elif self.path.startswith("/api/"):
                content = json.dumps(
                    [{"type": "file", "path": name, "size": len(files[name]), "oid": "0" * 40} for name in files]
                ).encode()
            else:
                name = self.path.split(f"/resolve/{REVISION}/")[1]
                content = files[name]
                served.given.add(name)
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
    served.url = f"http://127.0.0.1:{server.server_port}"
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield served
    finally:
        server.shutdown()
        server.server_close()


def catalogue_entry(name: str, config: bytes) -> str:
    """Lines of a models.toml: a model of this hub."""
    values = json.loads(config).items()
    lines = [f"{key} = {_toml(value)}" for key, value in values if value is not None]
    head = [f"[models.{name}]", 'source = "hub"', f'repository = "example/{name}"', f'revision = "{REVISION}"']
    return "\n".join([*head, f"[models.{name}.config]", *lines, ""])


def _toml(value: Any) -> str:
    """A value of a config as TOML writes it: an object is an inline table, which has no null."""
    if isinstance(value, dict):
        pairs = (f"{json.dumps(key)} = {_toml(item)}" for key, item in value.items() if item is not None)
        return "{ " + ", ".join(pairs) + " }"
    return json.dumps(value)
