"""What a benchmark says first: which machine this is, and what its processor can multiply."""

from __future__ import annotations

import os
import platform
from pathlib import Path
from typing import Final

FLAGS: Final = ("avx2", "avx512f", "avx512_bf16", "amx_bf16", "sha_ni")


def header() -> str:
    """The processor's name, cores, those of its flags that matter to a training, and the load before."""
    known = Path("/proc/cpuinfo").read_text(encoding="utf-8") if Path("/proc/cpuinfo").exists() else ""
    lines = {name.strip(): value.strip() for name, _, value in (line.partition(":") for line in known.splitlines())}
    words = set(lines.get("flags", "").split())
    flags = " ".join(flag for flag in FLAGS if flag in words) or "none of " + " ".join(FLAGS)
    name = lines.get("model name", platform.machine())
    return f"{name}, {os.cpu_count()} cores, {flags}, load {os.getloadavg()[0]:.1f}"
