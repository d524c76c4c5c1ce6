"""A live API on a real database, with keys for two projects."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import httpx2
import pytest
from openai import OpenAI
from sqlalchemy import Engine

from shared.settings import Settings
from shared.store.db import session_scope
from shared.tenants.keys import Caller
from tests.factories import make_key
from tests.live import live_api
from tests.openai_types import FAULTS, HOOKS, held
from tests.patience import patience


@dataclass(frozen=True)
class Api:
    """A live API and whom we ask as."""

    url: str
    caller: Caller
    key: str
    settings: Settings
    engine: Engine
    client: OpenAI

    def http(self, key: str | None = None, **headers: str) -> httpx2.Client:
        """A plain client, for requests that the official one would never send."""
        return httpx2.Client(
            base_url=self.url,
            headers={"Authorization": f"Bearer {key or self.key}", **headers},
            timeout=patience(20),
            event_hooks=HOOKS,
        )

    def openai(self) -> OpenAI:
        return self.client


@pytest.fixture(autouse=True)
def _answers_are_as_openai_types_them() -> Iterator[None]:
    """Every answer of OpenAI's routes that a test of this ring sees, by whichever client of `Api`."""
    before = len(FAULTS)
    yield
    found, FAULTS[before:] = FAULTS[before:], []
    assert found == []


@pytest.fixture(scope="module")
def api(engine: Engine, database_url: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Api]:
    """Nobody pulls here: files stay `uploaded`, jobs stay `validating_files`, unless a test moves them."""
    settings = Settings(home=tmp_path_factory.mktemp("home"), database_url=database_url, redis_url="")
    with session_scope(engine) as session:
        caller, key = make_key(session)
    with live_api(settings) as url, OpenAI(base_url=f"{url}/v1", api_key=key, http_client=held()) as client:
        yield Api(url, caller, key, settings, engine, client)


@pytest.fixture
def stranger(api: Api) -> str:
    """The key of another organization."""
    with session_scope(api.engine) as session:
        return make_key(session)[1]
