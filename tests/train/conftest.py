"""One tiny model for the whole ring."""

from __future__ import annotations

import signal
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.train.starting import starter
from tests.train.tiny import make_model_directory
from worker.program.launcher import Trainer


@pytest.fixture(scope="session")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_model_directory(tmp_path_factory.mktemp("tiny") / "model")


@pytest.fixture(autouse=True)
def own_signals() -> Iterator[None]:
    """The trainer runs inside the test process and takes SIGTERM; give it back."""
    before = signal.getsignal(signal.SIGTERM)
    yield
    signal.signal(signal.SIGTERM, before)


@pytest.fixture
def start(tmp_path: Path, system_temporary_folder: Path) -> Iterator[Callable[..., Trainer]]:
    with starter(tmp_path, system_temporary_folder) as begin:
        yield begin
