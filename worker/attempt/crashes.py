"""The message to the user when a trainer ended without saying why."""

from __future__ import annotations

import signal


def crash_code(code: int) -> str:
    return "trainer_killed" if code == -signal.SIGKILL else "trainer_crashed"


def crash_sentence(code: int) -> str:
    if code == -signal.SIGKILL:
        return "The trainer was killed from outside, most likely by the system for lack of memory."
    how = f"signal {signal.Signals(-code).name}" if code < 0 else f"exit code {code}"
    return f"The trainer ended unexpectedly with {how}."
