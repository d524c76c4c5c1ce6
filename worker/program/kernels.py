"""Compiled kernels (Triton, Inductor, CUDA's own compiler; C for a CPU) that outlive the attempt that compiled them.

HOME/kernels/PROJECT/ and HOME/kernels/probed/   what attempts of a project, and the probes of this host, have compiled
OUT/kernels/{triton,inductor,cuda,processor}/    an attempt's copy of both, and what it adds

Whoever can write compiled code has it run by whoever reads it. So a program writes its own copy only; an attempt
leaves its kernels to attempts of the same project and to no other. All attempts get the kernels of the probes, which
see nothing of a stranger's.
"""

from __future__ import annotations

import contextlib
import json
import os
import secrets
import shutil
from collections.abc import Iterable
from pathlib import Path
from typing import Final

import structlog

from worker.program import hostile_folder
from worker.program.hostile_folder import Bounds, Refused

log = structlog.get_logger()

FOLDER: Final = "kernels"  # below the home of a worker, and below OUT
PROBED: Final = "probed"  # no project has such an id
PROJECT_BYTES: Final = 256 * 2**20
ALL_BYTES: Final = 4 * 2**30
BOUNDS: Final = Bounds(files=20_000, depth=12, bytes=PROJECT_BYTES)
_GROUP: Final = "__grp__"  # Triton's list of the files that one compilation has left


def variables(out: Path) -> dict[str, str]:
    """Where a program with this OUT finds compiled kernels and leaves its own."""
    ours = out / FOLDER
    return {
        "TRITON_CACHE_DIR": str(ours / "triton"),
        "TORCHINDUCTOR_CACHE_DIR": str(ours / "inductor"),
        "CUDA_CACHE_PATH": str(ours / "cuda"),
    }


def bring(home: Path, project_id: str, out: Path) -> None:
    """Copy what the probes and earlier attempts of the project have compiled to `out`; if it fails, all is compiled."""
    try:
        for source in (home / FOLDER / PROBED, home / FOLDER / project_id):
            if source.is_dir():
                os.utime(source)
                shutil.copytree(source, out / FOLDER, dirs_exist_ok=True)
        for group in (out / FOLDER).rglob(f"{_GROUP}*.json"):
            _move_group(group)
    except (OSError, shutil.Error, ValueError, RecursionError) as error:
        log.warning("kernels.not_brought", project_id=project_id, reason=str(error)[:200])
        shutil.rmtree(out / FOLDER, ignore_errors=True)


def _move_group(group: Path) -> None:
    """Triton notes whole paths (triton 3.7, `runtime/cache.py`, `put_group`): they become those of this copy.

    Raises ValueError when it is no such list.
    """
    listed = json.loads(group.read_text(encoding="utf-8"))
    names = listed.get("child_paths") if isinstance(listed, dict) else None
    if not isinstance(names, dict) or any("/" in name for name in names):
        raise ValueError(f"{group.name} lists no files")
    moved = {name: str(group.parent / name) for name in names}
    group.write_text(json.dumps({"child_paths": moved}), encoding="utf-8")


def keep(home: Path, project_id: str, out: Path) -> None:
    """Keep the kernels that a dead program has compiled. A project with more of them than it may have begins anew."""
    ours = home / FOLDER / project_id
    try:
        listed = hostile_folder.files(out, FOLDER, bounds=BOUNDS)
        for file in listed:
            _take(out, f"{FOLDER}/{file.name}", ours / file.name)
    except FileNotFoundError:  # it has compiled nothing
        return
    except (OSError, Refused) as error:
        log.warning("kernels.not_kept", project_id=project_id, reason=str(error)[:200])
        shutil.rmtree(ours, ignore_errors=True)
        return
    if _bytes(ours) > PROJECT_BYTES:
        shutil.rmtree(ours, ignore_errors=True)
    _forget(home / FOLDER)


def _take(out: Path, name: str, target: Path) -> None:
    if target.exists():
        return
    target.parent.mkdir(parents=True, exist_ok=True)
    unfinished = target.with_name(f".{secrets.token_hex(8)}")
    try:
        with hostile_folder.opened(out, name) as stream, unfinished.open("wb") as sink:
            sink.write(stream.read(PROJECT_BYTES))
        unfinished.replace(target)  # two attempts may end at once
    finally:
        unfinished.unlink(missing_ok=True)


def _forget(folder: Path) -> None:
    """The projects that compiled longest ago go first, until the rest is within bounds."""
    with contextlib.suppress(OSError):  # another attempt that ends does the same
        projects = sorted(folder.iterdir(), key=lambda place: place.stat().st_mtime)
        sizes = {place: _bytes(place) for place in projects}
        for place in projects:
            if sum(sizes.values()) <= ALL_BYTES:
                break
            shutil.rmtree(place, ignore_errors=True)
            del sizes[place]


def _bytes(folder: Path) -> int:
    return sum(_sizes(folder.rglob("*")))


def _sizes(paths: Iterable[Path]) -> Iterable[int]:
    for path in paths:
        with contextlib.suppress(OSError):
            yield path.stat().st_size if path.is_file() else 0
