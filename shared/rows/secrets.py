"""Secrets of well-known forms within rows: a trained model may repeat them."""

from __future__ import annotations

import re
from typing import Final

# The search for a literal is an order of magnitude faster than the pattern, and most lines hold none.
_SECRET: Final = {
    b"AKIA": re.compile(rb"\bAKIA[0-9A-Z]{16}\b"),
    b"sk-": re.compile(rb"\bsk-[A-Za-z0-9_-]{20,}"),
    b"ghp_": re.compile(rb"\bghp_[A-Za-z0-9]{36}"),
    b"github_pat_": re.compile(rb"\bgithub_pat_[A-Za-z0-9_]{22,}"),
    b"PRIVATE KEY": re.compile(rb"-----BEGIN [A-Z ]*PRIVATE KEY-----"),
    b"xox": re.compile(rb"\bxox[bp]-[A-Za-z0-9-]{10,}"),
    b"hf_": re.compile(rb"\bhf_[A-Za-z0-9]{30,}"),
    b"AIza": re.compile(rb"\bAIza[A-Za-z0-9_-]{35}"),
}


def holds_secret(data: bytes) -> bool:
    """Whether the text spells what looks like a key or a token."""
    return any(hint in data and pattern.search(data) for hint, pattern in _SECRET.items())
