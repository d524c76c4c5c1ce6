"""A Weights & Biases server on the loopback, as far as wandb 0.31's own program asks: runs, histories, no files.

What it answers follows core/internal/{runupserter,filestream,runfiles} of that release: a run is upserted by GraphQL,
history lines come to `file_stream` with the offset of the first one, and a resumed run is told how many there are.
"""

from __future__ import annotations

import base64
import gzip
import http.server
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

HISTORY = "wandb-history.jsonl"


@dataclass
class Run:
    values: dict[str, Any]
    lines: dict[int, dict[str, Any]] = field(default_factory=dict)
    summary: dict[str, Any] = field(default_factory=dict)
    exit_code: int | None = None

    @property
    def steps(self) -> list[int]:
        return [line["_step"] for _, line in sorted(self.lines.items())]


@dataclass
class FakeWandb:
    url: str
    key: str
    runs: dict[str, Run] = field(default_factory=dict)
    refused: list[str] = field(default_factory=list)  # keys

    def graphql(self, asked: dict[str, Any]) -> dict[str, Any]:
        query, values = asked["query"], asked.get("variables") or {}
        if "upsertBucket" in query:
            return {"upsertBucket": {"bucket": self._upserted(values), "inserted": True}}
        if "createRunFiles" in query:
            return {"createRunFiles": {"runID": "x", "uploadHeaders": [], "files": []}}
        if "missingOk: true" in query:
            return {"model": self._known(values)}
        return {}

    def _upserted(self, values: dict[str, Any]) -> dict[str, Any]:
        run = self.runs.setdefault(values["name"], Run({}))
        run.values |= {name: value for name, value in values.items() if value is not None}
        entity = {"id": "e", "name": values.get("entity") or "team"}
        return {
            "id": "cnVu",
            "name": values["name"],
            "displayName": values.get("displayName"),
            "project": {"id": "p", "name": values["project"], "entity": entity},
            "historyLineCount": len(run.lines),
        }

    def _known(self, values: dict[str, Any]) -> dict[str, Any]:
        run = self.runs.get(values["name"])
        entity = {"id": "e", "name": values.get("entity") or "team"}
        bucket = None
        if run is not None:
            tail = [json.dumps(line) for _, line in sorted(run.lines.items())][-1:]
            bucket = {
                "id": "cnVu",
                "name": values["name"],
                "summaryMetrics": json.dumps(run.summary),
                "displayName": run.values.get("displayName"),
                "logLineCount": 0,
                "historyLineCount": len(run.lines),
                "eventsLineCount": 0,
                "historyTail": json.dumps(tail),
                "eventsTail": "[]",
                "config": run.values.get("config", "{}"),
                "tags": run.values.get("tags", []),
                "wandbConfig": '{"t": 1}',
            }
        return {"id": "p", "name": values["project"], "entity": entity, "bucket": bucket}

    def stream(self, name: str, document: dict[str, Any]) -> dict[str, Any]:
        run = self.runs[name]
        for file, part in (document.get("files") or {}).items():
            if file == HISTORY:
                run.lines |= {part["offset"] + place: json.loads(line) for place, line in enumerate(part["content"])}
            elif file == "wandb-summary.json":
                run.summary = json.loads(part["content"][-1])
        if document.get("complete"):
            run.exit_code = document.get("exitcode")
        return {}


@contextmanager
def fake_wandb(key: str) -> Iterator[FakeWandb]:
    """A server that takes `key` and no other."""

    class Handler(http.server.BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_POST(self) -> None:
            raw = self.rfile.read(int(self.headers.get("Content-Length") or 0))
            if self.headers.get("Content-Encoding") == "gzip":
                raw = gzip.decompress(raw)
            if self.headers.get("Authorization") != expected:
                fake.refused.append(self.headers.get("Authorization") or "")
                return self._answer(401, {"errors": [{"message": "user is not logged in"}]})
            document = json.loads(raw)
            if self.path == "/graphql":
                return self._answer(200, {"data": fake.graphql(document)})
            return self._answer(200, fake.stream(self.path.split("/")[-2], document))

        def _answer(self, status: int, document: dict[str, Any]) -> None:
            written = json.dumps(document).encode()
            self.send_response(status)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(written)))
            self.end_headers()
            self.wfile.write(written)

        def log_message(self, *words: object) -> None: ...

    expected = "Basic " + base64.b64encode(f"api:{key}".encode()).decode()
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    fake = FakeWandb(f"http://127.0.0.1:{server.server_address[1]}", key)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    try:
        yield fake
    finally:
        server.shutdown()
        thread.join()
        server.server_close()
