"""An issuer of ID tokens on the loopback, which lies as it is told."""

from __future__ import annotations

import http.server
import json
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import parse_qs, urlsplit

from joserfc import jwt
from joserfc.jwk import ECKey, RSAKey
from joserfc.jws import JWSRegistry

RSA = RSAKey.generate_key(2048, {"kid": "rsa-1"})
EC = ECKey.generate_key("P-256", {"kid": "ec-1"})
STRANGE = RSAKey.generate_key(2048, {"kid": "rsa-1"})  # another one, under the same id


@dataclass
class Issuer:
    """What it answers: path -> (status, headers, body). `asked` are the paths in order."""

    url: str
    asked: list[str] = field(default_factory=list)
    answers: dict[str, tuple[int, dict[str, str], bytes]] = field(default_factory=dict)
    keys: list[dict[str, Any]] = field(default_factory=list)
    bearer: str = ""  # of the last request
    drips: bool = False  # each answer comes byte by byte, for ever
    over: threading.Event = field(default_factory=threading.Event)

    def publish(self, *keys: RSAKey | ECKey) -> None:
        self.keys = [{**key.as_dict(private=False), "kid": key.kid, "use": "sig"} for key in keys]

    def answer(self, path: str) -> tuple[int, dict[str, str], bytes]:
        if path in self.answers:
            return self.answers[path]
        if path == "/.well-known/openid-configuration":
            return 200, {}, json.dumps({"issuer": self.url, "jwks_uri": f"{self.url}/jwks"}).encode()
        if path.startswith("/request?"):  # GitHub's way to ask for a token from within a job
            audience = parse_qs(urlsplit(path).query)["audience"][0]
            return 200, {}, json.dumps({"value": self.token(aud=audience)}).encode()
        return (200, {}, json.dumps({"keys": self.keys}).encode()) if path == "/jwks" else (404, {}, b"")

    def claims(self, **changes: Any) -> dict[str, Any]:
        """Those of a GitHub job, for five minutes. None takes a claim out."""
        now = int(time.time())
        usual = {
            "iss": self.url,
            "aud": "https://tunepool.example.com",
            "sub": "repo:octo/app:ref:refs/heads/main",
            "repository": "octo/app",
            "ref": "refs/heads/main",
            "environment": "production",
            "run_id": "1234",
            "jti": f"jti-{time.monotonic_ns()}",
            "iat": now,
            "nbf": now - 5,
            "exp": now + 300,
        }
        return {name: value for name, value in (usual | changes).items() if value is not None}

    def token(self, key: Any = RSA, *, algorithm: str = "RS256", header: dict[str, Any] | None = None, **changes: Any):
        """A signed token. `header` changes its header."""
        named = {"alg": algorithm, "kid": getattr(key, "kid", None) or "rsa-1", **(header or {})}
        registry = JWSRegistry(algorithms=[algorithm], strict_check_header=False)
        return jwt.encode(named, self.claims(**changes), key, registry=registry)


class _Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self) -> None:
        issuer: Issuer = self.server.issuer  # type: ignore[attr-defined]
        issuer.asked.append(self.path)
        issuer.bearer = self.headers.get("Authorization", "")
        status, headers, body = issuer.answer(self.path)
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.end_headers()
        try:
            while issuer.drips and not issuer.over.wait(0.05):
                self.wfile.write(b" ")
            self.wfile.write(body)
        except OSError:
            return

    def log_message(self, *words: object) -> None: ...


@contextmanager
def issuing() -> Iterator[Issuer]:
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), _Handler)
    issuer = server.issuer = Issuer(f"http://127.0.0.1:{server.server_address[1]}")  # type: ignore[attr-defined]
    issuer.publish(RSA, EC)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05})
    thread.start()
    try:
        yield issuer
    finally:
        issuer.over.set()
        server.shutdown()
        thread.join()
        server.server_close()
