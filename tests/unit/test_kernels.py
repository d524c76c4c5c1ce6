"""Compiled kernels outlive the attempt that compiled them, and cross from one project to another by no way."""

from __future__ import annotations

import json
import os
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from shared.contract.compiled import PROCESSOR_KERNELS
from shared.settings import Settings
from worker.attempt.attempt_folder import AttemptFolder
from worker.program import kernels, launcher, workdir
from worker.program.processes import own_tag


def triton_put(out: Path, key: str, **files: bytes) -> None:
    """As `FileCacheManager` of triton 3.7 does: a folder by key, its files, and their whole paths in a group."""
    folder = out / "kernels" / "triton" / key
    folder.mkdir(parents=True)
    for name, content in files.items():
        (folder / f"{name}.bin").write_bytes(content)
    group = {f"{name}.bin": str(folder / f"{name}.bin") for name in files}
    (folder / "__grp__kernel.json").write_text(json.dumps({"child_paths": group}))


def triton_get(out: Path, key: str) -> dict[str, str] | None:
    """The group as that version reads it: files that are not where they are said to be do not count."""
    group = out / "kernels" / "triton" / key / "__grp__kernel.json"
    if not group.exists():
        return None
    listed: dict[str, str] = json.loads(group.read_text())["child_paths"]
    return {name: path for name, path in listed.items() if os.path.exists(path)}


def place(tmp_path: Path, name: str) -> Path:
    out = tmp_path / "home" / "work" / name / "out"
    out.mkdir(parents=True)
    return out


def test_the_next_attempt_of_a_project_finds_what_the_last_one_compiled(tmp_path: Path) -> None:
    home, first, second = tmp_path / "home", place(tmp_path, "1"), place(tmp_path, "2")
    triton_put(first, "ABC", cubin=b"machine code")

    kernels.keep(home, "proj_a", first)
    kernels.bring(home, "proj_a", second)

    assert triton_get(second, "ABC") == {"cubin.bin": str(second / "kernels/triton/ABC/cubin.bin")}
    assert (second / "kernels/triton/ABC/cubin.bin").read_bytes() == b"machine code"


def test_another_project_gets_none_of_it_and_everybody_what_the_probes_compiled(tmp_path: Path) -> None:
    home, probe, theirs, ours = tmp_path / "home", *(place(tmp_path, name) for name in ("probe", "theirs", "ours"))
    triton_put(probe, "PROBE", so=b"driver")
    triton_put(theirs, "THEIRS", so=b"poison")
    kernels.keep(home, kernels.PROBED, probe)
    kernels.keep(home, "proj_a", theirs)

    kernels.bring(home, "proj_b", ours)

    assert sorted(folder.name for folder in (ours / "kernels/triton").iterdir()) == ["PROBE"]


def test_an_attempt_cannot_change_what_is_kept(tmp_path: Path) -> None:
    home, first, second, third = tmp_path / "home", *(place(tmp_path, name) for name in "123")
    triton_put(first, "ABC", so=b"good")
    kernels.keep(home, "proj_a", first)
    triton_put(second, "ABC", so=b"other")
    kernels.keep(home, "proj_a", second)

    kernels.bring(home, "proj_a", third)

    assert (third / "kernels/triton/ABC/so.bin").read_bytes() == b"good"


@pytest.mark.parametrize("trap", ["link", "pipe", "folder link", "much"])
def test_what_is_no_plain_output_or_too_much_is_not_kept(
    tmp_path: Path, trap: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    home, out = tmp_path / "home", place(tmp_path, "1")
    secret = tmp_path / "secret"
    secret.mkdir()
    (secret / "key").write_text("hush")
    triton_put(out, "ABC", so=b"good")
    if trap == "link":
        (out / "kernels/triton/ABC/x").symlink_to(secret / "key")
    elif trap == "pipe":
        os.mkfifo(out / "kernels/x")
    elif trap == "folder link":
        (out / "kernels/x").symlink_to(secret)
    else:
        monkeypatch.setattr(kernels, "BOUNDS", kernels.Bounds(files=1))

    kernels.keep(home, "proj_a", out)

    assert not (home / "kernels/proj_a").exists()


@pytest.mark.parametrize("listing", ["no json", "[]", '{"child_paths": {"../../x": "/x"}}', "[" * 100_000])
def test_a_group_that_is_none_leaves_the_attempt_without_kernels_and_alive(tmp_path: Path, listing: str) -> None:
    home, out = tmp_path / "home", place(tmp_path, "1")
    (home / "kernels/proj_a/triton/ABC").mkdir(parents=True)
    (home / "kernels/proj_a/triton/ABC/__grp__kernel.json").write_text(listing)

    kernels.bring(home, "proj_a", out)

    assert not (out / "kernels").exists()


def test_projects_that_compiled_longest_ago_go_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    home = tmp_path / "home"
    monkeypatch.setattr(kernels, "ALL_BYTES", 5_000)
    for age, name in enumerate(["new", "middle", "old"]):
        out = place(tmp_path, name)
        triton_put(out, "ABC", so=b"x" * 2_000)
        kernels.keep(home, name, out)
        os.utime(home / "kernels" / name, (1e9 - age, 1e9 - age))
    out = place(tmp_path, "last")
    triton_put(out, "ABC", so=b"x" * 1_000)

    kernels.keep(home, "last", out)

    assert sorted(folder.name for folder in (home / "kernels").iterdir()) == ["last", "new"]


def test_compilers_are_told_to_keep_their_work_there(tmp_path: Path) -> None:
    tag = own_tag(home=Path("/home/pool"), job_id="ftjob-1", fence=1)

    told = launcher.environment(tag=tag, device_ids=("host:GPU-1",), kind="cuda", threads=1, scratch=tmp_path)

    assert {told[name] for name in ("TRITON_CACHE_DIR", "TORCHINDUCTOR_CACHE_DIR", "CUDA_CACHE_PATH")} == {
        str(tmp_path / "kernels" / name) for name in ("triton", "inductor", "cuda")
    }
    assert Path(PROCESSOR_KERNELS).parent == Path(kernels.FOLDER)


def test_an_attempt_that_ends_leaves_its_kernels(tmp_path: Path) -> None:
    settings = Settings(home=tmp_path / "home")
    attempt: Any = SimpleNamespace(
        host=SimpleNamespace(settings=settings, work=settings.home / "work"),
        claim=SimpleNamespace(project_id="proj_a", lease=SimpleNamespace(id="ftjob-1", fence=1)),
        folder=workdir.Workdir(place(tmp_path, "ftjob-1/1").parent),
        spare=None,
    )
    triton_put(attempt.folder.out, "ABC", so=b"good")

    AttemptFolder.remove_folder(attempt)

    assert not attempt.folder.root.exists()
    assert (settings.home / "kernels/proj_a/triton/ABC/so.bin").read_bytes() == b"good"
