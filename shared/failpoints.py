"""Edges at which a fault test has its process die or freeze: `TUNEPOOL_FAILPOINT=after_claim:exit`. Unset: no effect.

An edge is one call of `reach` at a moment after which a crash would hurt most. With `:once` the first process of a home
that comes by takes it, and no other.
"""

from __future__ import annotations

import os
import signal
from typing import Final, Literal

from shared.settings import Settings

Edge = Literal[
    "submit_before_commit",
    "submit_after_commit",
    "claim_before_commit",
    "after_claim",
    "after_staging",
    "after_launch",
    "checkpoint_uploaded",
    "adapter_uploaded",
    "publish_before_commit",
    "after_publish",
    "reap_before_commit",
    "schedule_before_commit",
    "sweep_before_commit",
]
_SIGNALS: Final = {"exit": signal.SIGKILL, "freeze": signal.SIGSTOP}


def reach(edge: Edge, settings: Settings) -> None:
    """Die or stop here if the settings say so; the kernel leaves no time for a clean-up, as in life."""
    if not settings.failpoint:
        return
    named, act, *once = settings.failpoint.split(":")
    if named == edge and (not once or _first(settings)):
        os.kill(os.getpid(), _SIGNALS[act])


def _first(settings: Settings) -> bool:
    settings.home.mkdir(parents=True, exist_ok=True)
    try:
        (settings.home / "failpoint").touch(exist_ok=False)
    except FileExistsError:
        return False
    return True
