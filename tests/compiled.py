"""Test files as pytest runs them, compiled once for all processes of a suite.

pytest rewrites the assertions of each file that it collects, and keeps the result beside the file for the next run. In
a fresh checkout there is none yet. Where Python writes no bytecode (PYTHONDONTWRITEBYTECODE, as in many containers),
there never is. The processes of a suite collect the same files at the same time, so each would do all that work.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import pytest
from _pytest.assertion import rewrite
from _pytest.assertion.rewrite import assertstate_key


def compile_share(files: Sequence[Path], config: pytest.Config, *, number: int, of: int) -> None:
    """Keep the compiled form of every `of`-th file, from the one with that number on. What is current stays."""
    by_size = sorted(files, key=lambda file: (-file.stat().st_size, file))
    for file in by_size[number::of]:
        kept = kept_form(file)
        if rewrite._read_pyc(file, kept) is None and rewrite.try_makedirs(kept.parent):
            source_hash, code = rewrite._rewrite_test(file, config)
            rewrite._write_pyc(config.stash[assertstate_key], code, source_hash, kept)


def kept_form(file: Path) -> Path:
    """Where pytest looks for it."""
    return rewrite.get_cache_dir(file) / (file.stem + rewrite.PYC_TAIL)
