"""Keeps what a process knows from its neighbours of the same user. Linux; elsewhere it does nothing."""

from __future__ import annotations

import ctypes
import sys
from typing import Final

_PR_SET_DUMPABLE: Final = 4  # linux/prctl.h


def hide_secrets() -> None:
    """Keep other processes of our user from this one's memory and environment, where credentials lie.

    `/proc/PID/environ` and `mem` belong to root then (prctl(2)), and no core is dumped. A fork inherits this; a program
    that is executed begins readable, so every entry of ours that holds a credential calls this first.
    """
    if sys.platform == "linux":
        ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_DUMPABLE, 0, 0, 0, 0)
