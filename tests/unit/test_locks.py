"""The images install files that are known by hash, of the versions that were tested, free of known holes."""

from __future__ import annotations

import re
import tomllib
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

ROOT = Path(__file__).parents[2]
LOCKS = {"api": ("traces",), "worker": ("train", "trackers", "traces", "kubernetes")}  # image -> extras
# What the test machine has not: the build of the package itself, CUDA's libraries, and other systems' parts.
ELSEWHERE = re.compile(
    r"hatchling|tomlkit|editables|trove-classifiers|triton|cuda-[a-z]+|nvidia-(cu|nc|nv).*|colorama|httpx2-jsfetch|setuptools"
)
_ENTRY = re.compile(r"^(?P<name>[A-Za-z0-9._-]+)(\[[a-z,]+\])?==(?P<version>[^ ;\\]+)(?P<rest>.*?[^\\])$", re.M | re.S)


def locked(image: str) -> dict[str, tuple[str, list[str]]]:
    """name -> (version, hashes)"""
    text = (ROOT / f"requirements.{image}.lock").read_text()
    return {
        canonicalize_name(entry["name"]): (entry["version"], re.findall(r"--hash=sha256:([0-9a-f]{64})", entry["rest"]))
        for entry in _ENTRY.finditer(text)
    }


def pinned() -> dict[str, str]:
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    pins = [line.split("==") for line in lines if "==" in line and not line.startswith("#")]
    return {canonicalize_name(name): version for name, version in pins}


def needed(requirement: Requirement, seen: set[str]) -> Iterator[str]:
    """The names of a requirement and of all that it needs on this machine."""
    name = canonicalize_name(requirement.name)
    key = f"{name}[{','.join(sorted(requirement.extras))}]"
    if key in seen or (requirement.marker and not requirement.marker.evaluate()):
        return
    seen.add(key)
    yield name
    for line in metadata.requires(name) or ():
        inner = Requirement(line)
        extras = requirement.extras or {""}
        if inner.marker is None or any(inner.marker.evaluate({"extra": extra}) for extra in extras):
            inner.marker = None
            yield from needed(inner, seen)


@pytest.mark.parametrize("image", LOCKS)
def test_every_part_of_an_image_has_hashes_and_the_version_that_was_tested(image: str) -> None:
    parts, versions = locked(image), pinned()

    assert all(hashes for _, hashes in parts.values())
    assert {name: version for name, (version, _) in parts.items() if versions.get(name) != version}.keys() == {
        name for name in parts if ELSEWHERE.fullmatch(name)
    }


@pytest.mark.parametrize("image", LOCKS)
def test_an_image_lacks_nothing_of_what_the_package_needs(image: str) -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = project["optional-dependencies"]
    wanted = [*project["dependencies"], *(line for extra in LOCKS[image] for line in extras[extra])]
    seen: set[str] = set()

    assert {name for line in wanted for name in needed(Requirement(line), seen)} - locked(image).keys() == set()


def test_the_api_has_nothing_of_the_training_stack() -> None:
    assert not {"torch", "transformers", "pyarrow", "bitsandbytes"} & locked("api").keys()


@pytest.mark.parametrize("file", ["requirements.api.lock", "requirements.worker.lock", "constraints.txt"])
def test_where_packages_come_from_is_the_installers_affair(file: str) -> None:
    assert "://" not in (ROOT / file).read_text()


@pytest.mark.parametrize("image", LOCKS)
def test_an_image_installs_nothing_but_what_its_lock_names(image: str) -> None:
    recipe = (ROOT / "Dockerfile.gpu").read_text()

    assert f"pip install --require-hashes -r requirements.{image}.lock" in recipe
    others = re.findall(r"pip install (?!--require-hashes|--no-deps --no-build-isolation)(.*)", recipe)
    assert others == ['${TORCH_INDEX:+--extra-index-url "$TORCH_INDEX/$TORCH"} \\']  # asked for by whoever builds


def test_no_locked_version_has_a_hole_that_we_know_of() -> None:
    versions = {**pinned(), **{name: version for name, (version, _) in locked("worker").items()}}
    known = tomllib.loads((ROOT / "advisories.toml").read_text())["advisory"]

    assert [one["id"] for one in known if Version(versions[one["package"]]) < Version(one["fixed"])] == []
