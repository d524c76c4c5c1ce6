"""Servers for all lifecycle tests; a stack for each module that breaks nothing, or for each test that does."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from standalone.postgres import EmbeddedPostgres
from standalone.valkey import EmbeddedValkey
from tests.lifecycle.stack import Servers, Stack, open_stack
from tests.servers import TEMPLATE


@pytest.fixture(scope="session")
def servers(postgres_server: EmbeddedPostgres, valkey_server: EmbeddedValkey) -> Servers:
    return Servers(postgres_server, valkey_server, TEMPLATE)


@pytest.fixture
def stack(servers: Servers, tmp_path: Path) -> Iterator[Stack]:
    """Nothing runs yet: the test starts what it wants to break."""
    with open_stack(tmp_path, servers) as made:
        yield made
    assert made.survivors() == [], "a trainer outlived its worker"


@pytest.fixture(scope="module")
def running(servers: Servers, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stack]:
    """A worker and a janitor at work, shared by the tests of a module."""
    with open_stack(tmp_path_factory.mktemp("stack"), servers) as made:
        made.start_worker(TUNEPOOL_LEASE_SECONDS="3600")  # nobody dies here, and no stall of the machine looks like it
        made.start_janitor()
        made.wait_for_worker()
        yield made
        broken = made.broken_invariants()
    assert broken == []
