"""An API server of Kubernetes with Jobs, pods and Kueue's workloads, over HTTP on the loopback. Nothing runs in it.

It checks what a real one would: manifests by Kubernetes' own schema, names, selectors, preconditions, the token. The
official client's models can read what it says (tests/unit/test_kubernetes.py). `weather` makes it answer otherwise.
"""

from __future__ import annotations

import json
import re
import ssl
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, urlparse

import kubernetes_validate

TOKEN = "service-account"  # of a test
_NAME = re.compile(r"[a-z0-9]([-a-z0-9]{0,61}[a-z0-9])?")
Item = dict[str, Any]


@dataclass
class FakeKubernetes:
    """What etcd holds."""

    jobs: dict[str, Item] = field(default_factory=dict)
    pods: dict[str, Item] = field(default_factory=dict)
    workloads: list[Item] = field(default_factory=list)
    weather: tuple[int, str] | None = None  # a code and a message in place of every answer
    lost: bool = False  # it obeys, and the connection closes without an answer
    silent: threading.Event | None = None  # it obeys, and answers only when this is set
    instead: bytes | None = None  # what is written in place of every document, with code 200
    asked: list[str] = field(default_factory=list)  # method and path of each request
    page: int = 1  # items of a page of a list
    url: str = ""
    versions: int = 0

    def answer(self, method: str, target: str, body: Item) -> tuple[int, Item]:
        if self.weather is not None:
            code, message = self.weather
            return _status(code, message)
        url = urlparse(target)
        words = {name: values[0] for name, values in parse_qs(url.query).items()}
        match = re.fullmatch(r"/apis/batch/v1/namespaces/ml/jobs(?:/(?P<name>.+))?", url.path)
        if match is not None:
            return self.job(method, match["name"], words, body)
        if url.path == "/api/v1/namespaces/ml/pods":
            return self.listed("PodList", list(self.pods.values()), words)
        if url.path == "/apis/kueue.x-k8s.io/v1beta2/namespaces/ml/workloads":
            return self.listed("WorkloadList", self.workloads, words)
        return _status(404, "the server could not find the requested resource")

    def job(self, method: str, name: str | None, words: dict[str, str], body: Item) -> tuple[int, Item]:
        if method == "POST":
            return self.create(body)
        if name is None:
            return self.listed("JobList", list(self.jobs.values()), words)
        if name not in self.jobs:
            return _status(404, f'jobs.batch "{name}" not found')
        job = self.jobs[name]
        if method == "DELETE":
            same = body.get("preconditions", {})
            if any(job["metadata"][key] != value for key, value in same.items()):
                return _status(409, "Precondition failed")
            del self.jobs[name]
            if body.get("propagationPolicy") == "Background":  # else its pods would be left alone
                self.pods = {key: pod for key, pod in self.pods.items() if key != name}
        return 200, job

    def create(self, job: Item) -> tuple[int, Item]:
        name, spec = job["metadata"]["name"], job["spec"]
        try:
            kubernetes_validate.validate(job, "1.37.0", strict=True)
        except kubernetes_validate.ValidationError as error:
            return _status(422, f'Job.batch "{name}" is invalid: {error.message}')
        if not _NAME.fullmatch(name):
            return _status(422, f'Job.batch "{name}" is invalid: metadata.name')
        if spec["template"]["spec"].get("restartPolicy") not in ("Never", "OnFailure"):
            return _status(422, f'Job.batch "{name}" is invalid: spec.template.spec.restartPolicy: Required value')
        if name in self.jobs:
            return _status(409, f'jobs.batch "{name}" already exists')
        job["metadata"] |= {"uid": f"uid-{len(self.jobs)}-{name}"}
        self.jobs[name] = job
        self.touch(name)
        return 201, job

    def touch(self, name: str) -> None:
        """The object has changed."""
        self.versions += 1
        self.jobs[name]["metadata"]["resourceVersion"] = str(self.versions)

    def listed(self, kind: str, items: list[Item], words: dict[str, str]) -> tuple[int, Item]:
        wanted = dict(pair.split("=", 1) for pair in words.get("labelSelector", "").split(",") if pair)
        ours = [item for item in items if wanted.items() <= item["metadata"].get("labels", {}).items()]
        first = int(words.get("continue", 0))
        more = {"continue": str(first + self.page)} if first + self.page < len(ours) else {}
        version = {"JobList": "batch/v1", "PodList": "v1"}.get(kind, "kueue.x-k8s.io/v1beta2")
        metadata = {"resourceVersion": str(self.versions), **more}
        return 200, {
            "kind": kind,
            "apiVersion": version,
            "metadata": metadata,
            "items": ours[first : first + self.page],
        }

    # --- what happens in the cluster --------------------------------------------------------------------------------

    def pod(self, name: str, phase: str, **status: Any) -> None:
        """The Job's pod is in a phase."""
        template = self.jobs[name]["spec"]["template"]
        labels = {**template["metadata"]["labels"], "batch.kubernetes.io/job-name": name}
        node = {"nodeName": "gpu-node-7"} if phase != "Pending" else {}
        self.pods[name] = {
            "metadata": {"name": f"{name}-x1", "labels": labels},
            "spec": {**template["spec"], **node},
            "status": {"phase": phase, **status},
        }
        self.touch(name)

    def end(self, name: str, kind: str, reason: str) -> None:
        held = {"type": kind, "status": "True", "reason": reason, "message": "Job has ended."}
        self.jobs[name]["status"] = {"conditions": [held]}
        self.touch(name)


def _status(code: int, message: str) -> tuple[int, Item]:
    return code, {"kind": "Status", "apiVersion": "v1", "status": "Failure", "message": message, "code": code}


def waiting_container(reason: str, message: str) -> Item:
    """The status of a container that cannot start, whole as a kubelet writes it."""
    still = {"name": "worker", "image": "tunepool-worker:1", "imageID": "", "ready": False, "restartCount": 0}
    return {**still, "state": {"waiting": {"reason": reason, "message": message}}}


@contextmanager
def api_server(*, certificate: Path | None = None) -> Iterator[FakeKubernetes]:
    """`certificate`: a PEM file with a key and its certificate; the server speaks TLS with it."""
    fake = FakeKubernetes()

    class Handler(BaseHTTPRequestHandler):
        def answer(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers.get("content-length") or 0)) or "{}")
            fake.asked.append(f"{self.command} {self.path.partition('?')[0]}")
            code, document = fake.answer(self.command, self.path, body)
            if fake.silent is not None:
                fake.silent.wait()
            if self.headers.get("authorization") != f"Bearer {TOKEN}":
                code, document = _status(401, "Unauthorized")
            if fake.lost:
                self.close_connection = True
                return
            content = json.dumps(document).encode()
            if fake.instead is not None:
                code, content = 200, fake.instead
            self.send_response(code)
            self.send_header("content-type", "application/json")
            self.send_header("content-length", str(len(content)))
            self.end_headers()
            self.wfile.write(content)

        do_GET = do_POST = do_DELETE = answer  # noqa: N815

        def log_message(self, *_: Any) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05})
    thread.start()
    if certificate is not None:
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(certificate)
        server.socket = context.wrap_socket(server.socket, server_side=True)
    fake.url = f"{'http' if certificate is None else 'https'}://127.0.0.1:{server.server_address[1]}"
    try:
        yield fake
    finally:
        server.shutdown()
        thread.join()
        server.server_close()
