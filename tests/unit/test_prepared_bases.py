"""A prepared base is what was written, or it is not given to anybody; and it is found by what its bytes depend on."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import structlog

from shared.contract.spec import JobSpec
from tests.factories import make_spec
from tests.patience import patience
from worker import base_models
from worker.host import prepared_bases
from worker.host.prepared_bases import PreparedForm

LIBRARIES = {"torch": "2.13.0", "transformers": "5.23.0", "bitsandbytes": "0.50.2"}


def go_on() -> None:
    """Nobody interrupts."""


@pytest.fixture
def model(tmp_path: Path) -> Path:
    folder = tmp_path / "base"
    folder.mkdir()
    (folder / "config.json").write_text("{}")
    (folder / "model.safetensors").write_bytes(b"weights")
    return folder


@pytest.fixture
def cpuinfo(tmp_path: Path) -> Path:
    file = tmp_path / "cpuinfo"
    file.write_text("processor\t: 0\nmodel name\t: A\nflags\t\t: avx2\n")
    return file


def form(model: Path, cpuinfo: Path, spec: JobSpec | None = None, **changed: Any) -> PreparedForm | None:
    given = {"device": "cpu", "libraries": LIBRARIES, **changed}
    return prepared_bases.form_of(spec or altered(adapter={"method": "qlora"}), model=model, cpuinfo=cpuinfo, **given)


@pytest.fixture
def wanted(model: Path, cpuinfo: Path) -> PreparedForm:
    found = form(model, cpuinfo)
    assert found is not None
    return found


def publish(wanted: PreparedForm, tmp_path: Path) -> Path:
    made = tmp_path / "made"
    made.mkdir(exist_ok=True)
    files = []
    for name, content in (("config.json", b"{}"), ("model.safetensors", b"four bits")):
        (made / name).write_bytes(content)
        files.append((name, made / name))
    return prepared_bases.publish(wanted, files, cache=tmp_path / "cache")


def find(wanted: PreparedForm, tmp_path: Path) -> Path | None:
    return prepared_bases.find(wanted, cache=tmp_path / "cache", user=tmp_path, interrupt=go_on)


# --- the key ----------------------------------------------------------------------------------------------------------
def test_the_key_is_the_same_for_the_same_and_another_when_anything_changes(model: Path, cpuinfo: Path) -> None:
    keys = {"as it is": form(model, cpuinfo)}
    assert form(model, cpuinfo) == keys["as it is"]

    for library in ("tunepool-server", "torch", "transformers", "bitsandbytes", "safetensors", "accelerate"):
        keys[library] = form(model, cpuinfo, libraries={**LIBRARIES, library: "9.9"})
    keys["no double quantization"] = form(
        model, cpuinfo, altered(adapter={"method": "qlora"}, quantization={"bnb_4bit_use_double_quant": False})
    )
    keys["fp4"] = form(
        model, cpuinfo, altered(adapter={"method": "qlora"}, quantization={"bnb_4bit_quant_type": "fp4"})
    )
    keys["dtype"] = form(model, cpuinfo, altered(adapter={"method": "qlora"}, training={"dtype": "float32"}))
    keys["revision"] = form(model, cpuinfo, altered(adapter={"method": "qlora"}, base_model={"revision": "f" * 40}))
    cpuinfo.write_text("processor\t: 0\nmodel name\t: A\nflags\t\t: avx2 avx512_bf16\n")
    keys["processor"] = form(model, cpuinfo)
    (model / "model.safetensors").write_bytes(b"other weights")
    keys["content"] = form(model, cpuinfo)

    found = [each.key for each in keys.values() if each is not None]
    assert len(found) == len(keys)
    assert len(set(found)) == len(keys)


def altered(**parts: dict[str, Any]) -> JobSpec:
    told = make_spec().model_dump(mode="json")
    for name, values in parts.items():
        told[name] = {**told[name], **values}
    return JobSpec.model_validate_json(json.dumps(told))


@pytest.mark.parametrize(
    ("method", "changed"),
    [
        ("lora", {}),
        ("qlora", {"device": "cuda"}),
    ],
)
def test_jobs_that_do_not_quantise_on_a_processor_have_no_form(
    method: str, changed: dict[str, Any], model: Path, cpuinfo: Path
) -> None:
    assert form(model, cpuinfo, altered(adapter={"method": method}), **changed) is None


# --- what is found ----------------------------------------------------------------------------------------------------
def test_what_was_published_is_found_and_stays_while_it_is_used(wanted: PreparedForm, tmp_path: Path) -> None:
    made = publish(wanted, tmp_path)

    assert find(wanted, tmp_path) == made
    assert (made / "model.safetensors").read_bytes() == b"four bits"
    with pytest.raises(OSError, match="no room"):  # `user` is there
        prepared_bases.make_room(tmp_path / "cache", 10, among=20, interrupt=go_on)
    assert find(wanted, tmp_path) == made


def test_forms_that_nobody_uses_make_room_and_base_models_do_not(wanted: PreparedForm, tmp_path: Path) -> None:
    made = publish(wanted, tmp_path)
    base = tmp_path / "cache" / "models" / "tiny-000000000000"
    base.mkdir()
    (base / "model.safetensors").write_bytes(bytes(1000))

    prepared_bases.make_room(tmp_path / "cache", 100, among=1100, interrupt=go_on)

    assert not made.exists()
    assert base.is_dir()
    with pytest.raises(OSError, match="no room"):
        prepared_bases.make_room(tmp_path / "cache", 101, among=1100, interrupt=go_on)
    assert base.is_dir()


def flipped(folder: Path) -> None:
    (folder / "model.safetensors").write_bytes(b"four bitz")


def truncated(folder: Path) -> None:
    os.truncate(folder / "model.safetensors", 4)


def file_gone(folder: Path) -> None:
    (folder / "config.json").unlink()


def file_added(folder: Path) -> None:
    (folder / "modeling.py").write_text("raise SystemExit")


def file_linked(folder: Path) -> None:
    elsewhere = folder.parent / "elsewhere"
    (folder / "model.safetensors").rename(elsewhere)
    (folder / "model.safetensors").symlink_to(elsewhere)


def file_for_all_to_write(folder: Path) -> None:
    (folder / "model.safetensors").chmod(0o666)


def folder_for_all_to_write(folder: Path) -> None:
    folder.chmod(0o777)


def no_manifest(folder: Path) -> None:
    (folder / prepared_bases.MANIFEST).unlink()


def broken_manifest(folder: Path) -> None:
    (folder / prepared_bases.MANIFEST).write_bytes(b'{"key": ')


def manifest_of_another(folder: Path) -> None:
    file = folder / prepared_bases.MANIFEST
    file.write_text(json.dumps({**json.loads(file.read_text()), "key": "0" * 32}))


@pytest.mark.parametrize(
    ("spoil", "word"),
    [
        (flipped, "has not the bytes"),
        (truncated, "has not the bytes"),
        (file_gone, "not those of its manifest"),
        (file_added, "not those of its manifest"),
        (file_linked, "not ours alone"),
        (file_for_all_to_write, "not ours alone"),
        (folder_for_all_to_write, "not ours alone"),
        (no_manifest, "cannot be read"),
        (broken_manifest, "manifest"),
        (manifest_of_another, "another's"),
    ],
)
def test_what_is_not_as_it_was_made_is_given_to_nobody_and_the_log_says_why(
    spoil: Callable[[Path], None], word: str, wanted: PreparedForm, tmp_path: Path
) -> None:
    made = publish(wanted, tmp_path)
    spoil(made)

    with structlog.testing.capture_logs() as told:
        assert find(wanted, tmp_path) is None

    assert [entry["event"] for entry in told] == ["prepared_base.refused"]
    assert word in told[0]["reason"]
    assert not made.exists(), "it is made anew"
    assert find(wanted, tmp_path) is None
    assert publish(wanted, tmp_path) == find(wanted, tmp_path)


@pytest.mark.skipif(os.geteuid() != 0, reason="only root may give files away")
def test_files_of_another_user_are_given_to_nobody(wanted: PreparedForm, tmp_path: Path) -> None:
    made = publish(wanted, tmp_path)
    os.chown(made / "model.safetensors", 65534, 65534)

    assert find(wanted, tmp_path) is None


# --- while it is written ----------------------------------------------------------------------------------------------
KILLED = """
import sys, time
from pathlib import Path
from shared.contract.prepared import PrepareSpec
from worker.host import prepared_bases
from worker.host.prepared_bases import PreparedForm
form = PreparedForm(sys.argv[1], PrepareSpec.model_validate_json(sys.argv[2]))
def files():
    for name in ("config.json", "model.safetensors"):
        file = Path(sys.argv[3]) / name
        file.write_bytes(b"half")
        yield name, file
        print("written", flush=True)
    time.sleep(600)
prepared_bases.publish(form, files(), cache=Path(sys.argv[4]))
"""


def test_one_that_is_killed_while_it_is_written_is_never_found(wanted: PreparedForm, tmp_path: Path) -> None:
    argv = [sys.executable, "-c", KILLED, wanted.key, wanted.spec.model_dump_json(), str(tmp_path)]
    with subprocess.Popen([*argv, str(tmp_path / "cache")], stdout=subprocess.PIPE) as writer:
        try:
            assert writer.stdout is not None
            assert writer.stdout.readline() == b"written\n"
            assert find(wanted, tmp_path) is None
        finally:
            writer.kill()
            assert writer.wait(patience(30)) == -signal.SIGKILL

    assert find(wanted, tmp_path) is None
    left = base_models.beside(wanted.folder(tmp_path / "cache"), "fetch")
    assert left.is_dir()
    made = publish(wanted, tmp_path)
    assert find(wanted, tmp_path) == made
    assert not left.exists()


# --- what is missed ---------------------------------------------------------------------------------------------------
def test_what_is_missed_is_noted_once_until_it_is_settled(wanted: PreparedForm, tmp_path: Path) -> None:
    assert prepared_bases.miss(wanted, home=tmp_path)
    assert not prepared_bases.miss(wanted, home=tmp_path)
    assert prepared_bases.missed(tmp_path) == [wanted]

    prepared_bases.settled(wanted, home=tmp_path)
    assert prepared_bases.missed(tmp_path) == []
    assert prepared_bases.miss(wanted, home=tmp_path), "it may have gone since"


def test_what_could_not_be_made_is_tried_again_the_next_day(wanted: PreparedForm, tmp_path: Path) -> None:
    prepared_bases.miss(wanted, home=tmp_path)

    prepared_bases.settled(wanted, home=tmp_path, failure="3 tensors come back otherwise")

    assert not prepared_bases.miss(wanted, home=tmp_path)
    assert prepared_bases.missed(tmp_path) == []
    os.utime(prepared_bases.missed_folder(tmp_path) / f"{wanted.key}.failed", (0, 0))
    assert prepared_bases.miss(wanted, home=tmp_path)


def test_a_note_that_cannot_be_read_goes(tmp_path: Path) -> None:
    folder = prepared_bases.missed_folder(tmp_path)
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    (folder / "abc.json").write_text("{")

    assert prepared_bases.missed(tmp_path) == []
    assert not (folder / "abc.json").exists()
