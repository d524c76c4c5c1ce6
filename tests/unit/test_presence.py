"""The worker's reports go on, whatever a round of them meets."""

from __future__ import annotations

import threading
from pathlib import Path

import pytest

from shared.settings import Settings
from tests.patience import patience
from worker.host import presence as module
from worker.host.flags import SharedFlags
from worker.host.presence import Presence


@pytest.mark.parametrize("error", [ValueError("a catalogue"), OSError(28, "No space left on device"), KeyError("x")])
def test_a_round_that_fails_is_followed_by_the_next_and_stops_the_pulse(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    settings = Settings(home=tmp_path, database_url="postgresql+psycopg://nobody@127.0.0.1:1/none")
    presence = Presence(settings, SharedFlags(), children=1, on_deaf=lambda _: None)
    beats: list[Path] = []
    rounds, enough = [], threading.Event()

    def fail(*_: object, **__: object) -> list[object]:
        rounds.append(1)
        presence.wake()
        if len(rounds) >= 3:
            enough.set()
        raise error

    monkeypatch.setattr(module.pulse, "beat", beats.append)
    monkeypatch.setattr(presence, "_devices", fail)
    presence.start()

    assert enough.wait(patience(20))
    assert presence.is_alive()
    assert len(beats) == 1  # the first round's; then the health check must tell that something is wrong
    presence._over.set()
    presence.wake()
    presence.join(patience(20))
