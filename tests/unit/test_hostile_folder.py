"""A program's output is looked at as what it is: plain files of its own, below its folder, or nothing."""

from __future__ import annotations

import ast
import os
import socket
import stat
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from obstore.store import MemoryStore
from pydantic import ValidationError

from shared.contract.events import TRAINER_EVENT
from shared.store.storage import CHUNK_BYTES, Store, StoredObject
from worker.program import hostile_folder, workdir
from worker.program.hostile_folder import Bounds, Refused
from worker.program.trainer_events import EVENTS_BYTES, EventTail

ROOT = Path(__file__).parents[2]
SECRET = b"of the host"


@pytest.fixture
def out(tmp_path: Path) -> Path:
    made = tmp_path / "attempt" / "out"
    (made / "adapter").mkdir(parents=True)
    (made / "adapter" / "config.json").write_text("{}")
    (tmp_path / "secret").write_bytes(SECRET)
    return made


def bind(place: Path) -> None:
    before = Path.cwd()
    os.chdir(place.parent)  # a socket's path has to be short
    try:
        with socket.socket(socket.AF_UNIX) as end:
            end.bind(place.name)
    finally:
        os.chdir(before)


def device(place: Path) -> None:
    try:
        os.mknod(place, stat.S_IFCHR | 0o666, os.makedev(1, 5))  # /dev/zero: it never ends
    except PermissionError:
        pytest.skip("only root makes devices")


KINDS: dict[str, Callable[[Path, Path], object]] = {
    "link": lambda place, secret: place.symlink_to(secret),
    "link to a folder": lambda place, secret: place.symlink_to(secret.parent),
    "dangling link": lambda place, _: place.symlink_to("nothing"),
    "hard link": lambda place, secret: os.link(secret, place),
    "FIFO": lambda place, _: os.mkfifo(place),
    "socket": lambda place, _: bind(place),
    "device": lambda place, _: device(place),
    "folder": lambda place, _: place.mkdir(),
}


@pytest.mark.parametrize("kind", KINDS)
def test_only_a_plain_file_is_opened_and_nothing_blocks(out: Path, kind: str, tmp_path: Path) -> None:
    KINDS[kind](out / "report.json", tmp_path / "secret")

    with pytest.raises(Refused):
        hostile_folder.read(out, "report.json", most=100)
    assert not hostile_folder.holds(out, "report.json")


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "folder"])
def test_a_folder_with_something_else_than_plain_files_is_refused_whole(out: Path, kind: str, tmp_path: Path) -> None:
    KINDS[kind](out / "adapter" / "weights", tmp_path / "secret")

    with pytest.raises(Refused):
        hostile_folder.files(out, "adapter")


@pytest.mark.parametrize("kind", KINDS)
def test_events_that_are_no_plain_file_are_not_read_and_say_so(out: Path, kind: str, tmp_path: Path) -> None:
    KINDS[kind](out / "events.jsonl", tmp_path / "secret")
    tail = EventTail(out / "events.jsonl")

    assert list(tail.read()) == []
    assert tail.refused is not None


def test_events_of_a_gigabyte_are_read_up_to_their_bound_and_say_so(out: Path) -> None:
    with (out / "events.jsonl").open("wb") as file:
        file.truncate(10**9)
    tail = EventTail(out / "events.jsonl")

    while tail.refused is None:
        assert list(tail.read()) == []

    assert tail.offset <= EVENTS_BYTES
    assert tail.unreadable > 0


@pytest.mark.parametrize("kind", KINDS)
def test_asking_to_stop_changes_nothing_but_a_name_that_is_free(out: Path, kind: str, tmp_path: Path) -> None:
    KINDS[kind](out / "stop", tmp_path / "secret")
    before = sorted(tmp_path.rglob("*"))

    hostile_folder.touch(out, "stop")

    assert sorted(tmp_path.rglob("*")) == before
    assert (tmp_path / "secret").read_bytes() == SECRET


def test_asking_to_stop_makes_an_empty_file(out: Path) -> None:
    hostile_folder.touch(out, "stop")

    assert (out / "stop").read_bytes() == b""


def test_a_link_in_the_place_of_the_output_itself_is_not_followed(out: Path, tmp_path: Path) -> None:
    out.rename(tmp_path / "elsewhere")
    out.symlink_to(tmp_path / "elsewhere")

    for look in (lambda: hostile_folder.files(out, "adapter"), lambda: hostile_folder.touch(out, "stop")):
        with pytest.raises(Refused):
            look()


def test_a_folder_on_the_way_that_is_a_link_is_not_followed(out: Path, tmp_path: Path) -> None:
    (tmp_path / "victim").mkdir()
    (tmp_path / "victim" / "step-00000001").mkdir()
    (out / "checkpoints").symlink_to(tmp_path / "victim")

    with pytest.raises(Refused):
        hostile_folder.files(out, "checkpoints/step-00000001")


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can give files away")
def test_a_file_of_another_user_than_the_programs_is_refused(out: Path) -> None:
    os.chown(out, 64998, 64998)

    with pytest.raises(Refused):
        hostile_folder.files(out, "adapter")


@pytest.mark.parametrize(
    "name", ["../secret", "/etc/passwd", "adapter/../../secret", "", ".", "a\nb", "\x1b[2J", "a b"]
)
def test_a_name_that_is_more_than_a_name_is_refused(out: Path, name: str) -> None:
    with pytest.raises(Refused):
        hostile_folder.opened(out, name)


@pytest.mark.parametrize("name", ["a\nb", "\x1b]0;x\x07", "=1+1", "é"])
def test_a_file_whose_name_would_act_on_a_terminal_or_a_table_is_refused(out: Path, name: str) -> None:
    (out / "adapter" / name).touch()

    with pytest.raises(Refused):
        hostile_folder.files(out, "adapter")


def test_files_bytes_and_depth_are_bounded(out: Path) -> None:
    (out / "adapter" / "inner").mkdir()
    with (out / "adapter" / "inner" / "sparse").open("wb") as file:
        file.truncate(1 << 40)

    assert [one.name for one in hostile_folder.files(out, "adapter", bounds=Bounds(bytes=1 << 41))] == [
        "config.json",
        "inner/sparse",
    ]
    for bounds in (Bounds(bytes=1 << 39), Bounds(files=1, bytes=1 << 41), Bounds(depth=1, bytes=1 << 41)):
        with pytest.raises(Refused):
            hostile_folder.files(out, "adapter", bounds=bounds)


def test_a_report_of_more_than_its_bound_is_refused_without_being_read_whole(out: Path) -> None:
    with (out / "report.json").open("wb") as file:
        file.truncate(1 << 40)

    with pytest.raises(Refused):
        hostile_folder.read(out, "report.json", most=1000)


@pytest.mark.parametrize("what", ["adapter", "nothing"])
def test_an_empty_product_and_none_at_all_are_not_published(out: Path, what: str) -> None:
    (out / "adapter" / "config.json").unlink()

    with pytest.raises(Refused):
        workdir.publish_folder(Store(MemoryStore()), out / what, "p", interrupt=lambda: None)


class SwappingStore(Store):
    """A store whose upload of a file is used by the trainer to lay another one in its place."""

    def __init__(self, adapter: Path, secret: Path) -> None:
        super().__init__(MemoryStore())
        self.swap = lambda: ((adapter / "config.json").unlink(), (adapter / "config.json").symlink_to(secret))

    def put_bytes(self, key: str, content: bytes) -> StoredObject:
        self.swap()
        return super().put_bytes(key, content)


def test_what_is_swapped_between_look_and_upload_is_not_uploaded(out: Path, tmp_path: Path) -> None:
    store = SwappingStore(out / "adapter", tmp_path / "secret")

    manifest = workdir.publish_folder(store, out / "adapter", "p", interrupt=lambda: None)

    assert b"".join(store.chunks("p/config.json")) == b"{}"
    assert manifest.files[0].bytes == 2


def test_a_file_swapped_for_a_link_after_the_folder_was_listed_is_refused(
    out: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = hostile_folder.files(out, "adapter")
    (out / "adapter" / "config.json").unlink()
    (out / "adapter" / "config.json").symlink_to(tmp_path / "secret")
    monkeypatch.setattr(hostile_folder, "files", lambda *_: found)

    with pytest.raises(Refused):
        workdir.publish_folder(Store(MemoryStore()), out / "adapter", "p", interrupt=lambda: None)


def test_a_manifest_describes_the_bytes_that_were_sent_even_when_a_file_grows_meanwhile(out: Path) -> None:
    weights = out / "adapter" / "weights"
    weights.write_bytes(b"a" * CHUNK_BYTES)
    store = Store(MemoryStore())
    calls: list[int] = []

    def grow() -> None:
        calls.append(1)
        if len(calls) == 3:  # within the upload of the second file
            with weights.open("ab") as file:
                file.write(b"b" * 10)

    manifest = workdir.publish_folder(store, out / "adapter", "p", interrupt=grow)

    described = {file.name: file.bytes for file in manifest.files}
    assert len(calls) > 3
    assert described["weights"] == store.size("p/weights") == CHUNK_BYTES + 10


def test_a_text_of_ours_is_never_written_through_a_link_that_lies_in_its_place(tmp_path: Path) -> None:
    (tmp_path / "secret").write_bytes(SECRET)
    (tmp_path / "scratch").symlink_to(tmp_path / "secret")

    workdir.publish_text(Store(MemoryStore()), "k", "ours", scratch=tmp_path / "scratch", interrupt=lambda: None)

    assert (tmp_path / "secret").read_bytes() == SECRET


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can give folders away")
def test_the_trainers_user_writes_its_output_and_nothing_beside_it(tmp_path: Path) -> None:
    place = workdir.Workdir(tmp_path / "1")
    (place.out / "checkpoints").mkdir(parents=True)
    place.data.mkdir()
    for file in (place.spec, place.data / "train.jsonl", place.out / "checkpoints" / "state"):
        file.touch()

    workdir.hand_over(place, uid=64998)

    theirs = {path for path in (place.root, *place.root.rglob("*")) if path.stat().st_uid == 64998}
    assert theirs == {place.out, place.out / "checkpoints", place.out / "checkpoints" / "state"}
    assert all(path.stat().st_gid == 64998 and path.stat().st_mode & 0o040 for path in (place.root, place.spec))
    assert not any(path.stat().st_mode & 0o027 for path in place.root.rglob("*"))


def test_a_folder_goes_however_deep_it_is_and_what_its_links_point_to_stays(tmp_path: Path) -> None:
    (tmp_path / "secret").write_bytes(SECRET)
    top, before = tmp_path / "top", Path.cwd()
    top.mkdir()
    try:
        os.chdir(top)
        for _ in range(2000):
            os.symlink(tmp_path, "link")
            os.mkdir("d")
            os.chdir("d")
    finally:
        os.chdir(before)

    hostile_folder.remove(top)

    assert not top.exists()
    assert (tmp_path / "secret").read_bytes() == SECRET


# ---- what events may say

CHECKPOINT = {"type": "checkpoint", "time": 1.0, "step": 1, "name": "step-00000001"}
FAILED = {"type": "failed", "time": 1.0, "code": "data_error", "message": "m"}


@pytest.mark.parametrize(
    "event",
    [
        *(CHECKPOINT | {"name": name} for name in ("../../x", "/etc", "step-1", "step-00000001/..", "step-00000001\n")),
        *(CHECKPOINT | {"step": step} for step in (-1, 10**8, 10**30)),
        *(FAILED | {"code": code} for code in ("", "A", "a b", "x" * 65, "\x1b[2J")),
        FAILED | {"peak_memory_bytes": 10**30},
    ],
)
def test_names_codes_and_numbers_of_events_have_bounds(event: dict[str, object]) -> None:
    TRAINER_EVENT.validate_python({**CHECKPOINT})
    with pytest.raises(ValidationError):
        TRAINER_EVENT.validate_python(event)


def test_texts_of_events_hold_nothing_that_the_database_refuses() -> None:
    event = TRAINER_EVENT.validate_python(FAILED | {"message": "a\0b" + "x" * 5000, "param": "p\0"})

    assert (event.message[:2], len(event.message), event.param) == ("ab", 4000, "p")  # type: ignore[union-attr]


# ---- one way only

BY_PATH = {"open", "read_text", "read_bytes", "write_text", "is_file", "is_dir", "exists", "stat", "touch", "rglob"}


def test_nothing_else_of_the_worker_looks_at_a_programs_output_by_path() -> None:
    sources = [path for path in (ROOT / "worker").glob("*.py") if path.name != "hostile_folder.py"]

    assert [at for path in sources for at in by_path(ast.parse(path.read_text()))] == []
    assert (
        len(list(by_path(ast.parse("(place.out / 'a').open(); self.folder.events.is_file(); place.spec.stat()")))) == 2
    )


def by_path(tree: ast.AST) -> Iterator[str]:
    """Calls of Path's own methods on something below `.out`, or on `.events`."""
    for call in ast.walk(tree):
        if isinstance(call, ast.Call) and isinstance(call.func, ast.Attribute) and call.func.attr in BY_PATH:
            parts = {part.attr for part in ast.walk(call.func.value) if isinstance(part, ast.Attribute)}
            if parts & {"out", "_out", "events"}:
                yield ast.unparse(call)
