"""What the kernel says of a program at work: who it is, what it may, what it was given."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import psutil

from tests import living

STATUS = ("Uid", "Gid", "Groups", "Umask", "NoNewPrivs", "Seccomp", "Seccomp_filters", "CapEff", "CapBnd", "SigIgn")


def around(program: psutil.Process, *, home: Path, written: str) -> dict[str, Any]:
    """Its walls, with folders and numbers of its own taken out. `written`: the file that it may have open."""
    place = Path("/proc") / str(program.pid)
    folder = str(Path(program.cwd()).parent)
    known: dict[str, Any] = {
        name: value.replace(folder, "FOLDER").replace(str(home), "HOME")
        for name, value in living.environment(program).items()
        if name not in {"TUNEPOOL_ATTEMPT", "TMPDIR"}
    }
    status = dict(line.split(":\t", 1) for line in (place / "status").read_text().splitlines() if ":\t" in line)
    known |= {name: status[name] for name in STATUS if name in status}
    known["limits"] = (place / "limits").read_text()
    known["oom_score_adj"] = (place / "oom_score_adj").read_text()
    known["leads its own session"] = os.getsid(program.pid) == os.getpgid(program.pid) == program.pid
    known["has the host's network"] = (place / "ns/net").readlink() == Path("/proc/self/ns/net").readlink()
    opened = {_kind(file, written) for file in (place / "fd").iterdir() if file.is_symlink()}
    known["open"] = sorted(opened - {written})
    return known


def _kind(descriptor: Path, written: str) -> str:
    """`0 null`, `1 pipe`: which descriptor is open to what."""
    target = os.readlink(descriptor).split(":")[0]
    return written if target.endswith(written) else f"{descriptor.name} {Path(target).name}"
