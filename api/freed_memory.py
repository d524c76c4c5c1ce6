"""Keeps a few megabytes of the memory that the process frees, and gives the rest back to the system."""

from __future__ import annotations

import ctypes
from typing import Final

# glibc's mallopt(3). Its own bounds let every quarter of a megabyte that a socket brings go back to the system, which
# hands it out again page by page, each filled with zeros: that was half of what receiving a body cost.
_TRIM_THRESHOLD: Final = -1
_MMAP_THRESHOLD: Final = -3
KEPT_BYTES: Final = 8 * 1024 * 1024  # at the end of a heap; what is free beyond it goes back
APART_BYTES: Final = 1024 * 1024  # larger blocks are mapped each by itself, and go back at once


def keep_a_little() -> bool:
    """Use freed blocks of small size again before the system has them. False: this C library has no such setting."""
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is None:
        return False
    return bool(mallopt(_MMAP_THRESHOLD, APART_BYTES)) and bool(mallopt(_TRIM_THRESHOLD, KEPT_BYTES))
