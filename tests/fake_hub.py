"""A hub on loopback that gives the files of one repository at one commit."""

from __future__ import annotations

import contextlib
import hashlib
import json
from collections.abc import Iterator
from typing import Any, Final

from tests.loopback import answering

REVISION: Final = "0123456789abcdef" * 2 + "01234567"


class Served:
    """Where the hub listens, and what was asked of it."""

    def __init__(self) -> None:
        self.url = ""
        self.given: set[str] = set()


@contextlib.contextmanager
def serving(files: dict[str, bytes]) -> Iterator[Served]:
    served = Served()

    def answer(path: str, _: str | None) -> tuple[int, bytes, dict[str, str]]:
        if path.startswith("/api/models/"):
            content = json.dumps(
                [{"type": "file", "path": name, "size": len(files[name]), "oid": "0" * 40} for name in files]
            ).encode()
        elif path.startswith("/api/"):
            content = b"{}"  # what a hub's own command asks beside models
        else:
            name = path.split(f"/resolve/{REVISION}/")[1]
            content = files[name]
            served.given.add(name)
        headers = {"Content-Type": "application/json", "X-Repo-Commit": REVISION}
        return 200, content, headers | {"ETag": f'"{hashlib.sha256(content).hexdigest()}"'}

    with answering(answer) as served.url:
        yield served


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
