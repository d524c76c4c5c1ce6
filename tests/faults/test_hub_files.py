"""Of a repository that holds its weights several times, one copy is fetched; to read rows with, none."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from shared.errors import Invalid
from shared.settings import Settings
from shared.settle.catalogue import CatalogueEntry, load_catalogue, local_folder
from tests.fake_hub import REVISION, catalogue_entry, serving
from tests.lifecycle.stack import make_model
from tests.patience import patience
from worker.base_models import BaseModelUnavailable, cached_names, ensure, verify
from worker.chores import base_tokenizers

AGAIN = (
    "original/model.safetensors",
    "consolidated.safetensors",
    "consolidated.00.safetensors",
    "metal/model.safetensors",
)


@pytest.fixture
def files(tmp_path: Path) -> dict[str, bytes]:
    """A small model as published: what is needed, and its weights again in other forms."""
    make_model(tmp_path / "tiny")
    needed = {file.name: file.read_bytes() for file in (tmp_path / "tiny").iterdir()}
    weights = next(content for name, content in needed.items() if name.endswith(".safetensors"))
    return needed | dict.fromkeys(AGAIN, weights)


@pytest.fixture
def entry(files: dict[str, bytes], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[CatalogueEntry]:
    (tmp_path / "models.toml").write_text(catalogue_entry("far", files["config.json"]))
    with serving(files) as hub:
        monkeypatch.setenv("HF_ENDPOINT", hub.url)
        monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
        yield load_catalogue(Settings(models_file=tmp_path / "models.toml")).entry("far")


def names(folder: Path) -> set[str]:
    return {str(file.relative_to(folder)) for file in folder.rglob("*") if file.is_file()}


def test_weights_in_other_forms_are_not_fetched(entry: CatalogueEntry, tmp_path: Path) -> None:
    fetched = names(ensure(entry, cache=tmp_path / "cache", interrupt=lambda: None))

    assert not fetched.intersection(AGAIN)
    assert {"config.json", "model.safetensors"} <= fetched


def test_a_listed_file_that_would_lie_outside_the_models_folder_is_not_written(
    files: dict[str, bytes], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No repository has one; a hub that is not what it says may list it."""
    (tmp_path / "models.toml").write_text(catalogue_entry("far", files["config.json"]))
    entry = load_catalogue(Settings(models_file=tmp_path / "models.toml")).entry("far")
    with serving(files | {"../../../stolen.safetensors": files["model.safetensors"]}) as hub:
        monkeypatch.setenv("HF_ENDPOINT", hub.url)
        monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
        with pytest.raises(BaseModelUnavailable, match="outside the model's folder"):
            ensure(entry, cache=tmp_path / "deep" / "cache", interrupt=lambda: None)

    assert list(tmp_path.rglob("stolen*")) == []


def test_to_read_rows_with_no_weights_are_fetched_and_the_model_does_not_count_as_here(
    entry: CatalogueEntry, tmp_path: Path
) -> None:
    cache = tmp_path / "cache"
    catalogue = load_catalogue(Settings(models_file=tmp_path / "models.toml"))

    words = base_tokenizers.ensure(entry, cache=cache, interrupt=lambda: None)
    again = base_tokenizers.ensure(entry, cache=cache, interrupt=lambda: None)

    assert again == words
    assert "config.json" in names(words)
    assert not [name for name in names(words) if name.endswith(".safetensors")]
    assert entry.ref.name not in cached_names(catalogue, cache=cache)

    whole = ensure(entry, cache=cache, interrupt=lambda: None)
    assert whole == local_folder(entry, cache=cache)
    assert base_tokenizers.ensure(entry, cache=cache, interrupt=lambda: None) == whole


def test_what_rows_are_read_with_is_plain_data_too(
    entry: CatalogueEntry, files: dict[str, bytes], tmp_path: Path
) -> None:
    files["config.json"] = b'{"model_type": "llama", "_attn_implementation_internal": "someone/kernel"}'

    with pytest.raises(Invalid):
        base_tokenizers.ensure(entry, cache=tmp_path / "cache", interrupt=lambda: None)
    assert not [place for place in (tmp_path / "cache").rglob("*") if place.is_dir() and place.name != "models"]


def test_the_command_of_the_docs_for_hosts_without_a_network_brings_what_is_needed_once(
    entry: CatalogueEntry, tmp_path: Path
) -> None:
    """`hf download`, with the hub and the repository of this test: what it leaves is a model in a folder."""
    page = (Path(__file__).parents[2] / "docs" / "models.md").read_text(encoding="utf-8")
    (line,) = re.findall(r"^hf download (?:.*\\\n)*.*$", page, re.MULTILINE)
    program, command, repository, *options = shlex.split(line.replace("\\\n", " "))
    folder = tmp_path / options[options.index("--local-dir") + 1]

    done = subprocess.run(
        [Path(sys.executable).parent / program, command, entry.locator, "--revision", REVISION, *options],
        cwd=tmp_path,
        env={**os.environ, "HF_HUB_DISABLE_UPDATE_CHECK": "1", "HF_HOME": str(tmp_path / "hf")},
        capture_output=True,
        text=True,
        timeout=patience(60),
        check=False,
    )

    assert done.returncode == 0, done.stderr
    assert repository.count("/") == 1
    verify(folder)
    fetched = {name for name in names(folder) if not name.startswith(".cache/")}
    assert fetched == names(ensure(entry, cache=tmp_path / "cache", interrupt=lambda: None))
