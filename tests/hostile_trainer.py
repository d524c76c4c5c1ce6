"""A trainer that somebody else has taken over: `python -m tests.hostile_trainer SPEC OUT`.

The first training row says what it lays in the supervisor's way: {"text": "fake: lay=link-folder victim=/…"}.
"""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

from shared.contract.spec import AttemptSpec
from tests.fake_trainer import behaviour, folder, tell


def main(spec_file: Path, out: Path) -> int:
    act = behaviour(Path(AttemptSpec.model_validate_json(spec_file.read_bytes()).train_file))
    tell(out, type="started", total_steps=2, trainable_parameters=1, all_parameters=10, train_rows=10, sequences=10,
         train_tokens_per_epoch=100, labelled_tokens_per_epoch=50)  # fmt: skip
    LAYS[act["lay"]](out, Path(act["victim"]))
    while "stay" in act:
        time.sleep(0.05)
    tell(out, type="finished", steps=2, trained_tokens=20, published_step=2, published_reason="the last one",
         peak_memory_bytes=1, train_seconds=1.0)  # fmt: skip
    return 0


def link_folder(out: Path, victim: Path) -> None:
    (out / "adapter").symlink_to(victim)


def link_file(out: Path, victim: Path) -> None:
    folder(out / "adapter", {"adapter_config.json": {}})
    (out / "adapter" / "weights.safetensors").symlink_to(victim / "secret.json")


def dangling_link(out: Path, _victim: Path) -> None:
    folder(out / "adapter", {"adapter_config.json": {}})
    (out / "adapter" / "weights.safetensors").symlink_to(out / "nothing")


def hard_link(out: Path, victim: Path) -> None:
    folder(out / "adapter", {"adapter_config.json": {}})
    os.link(victim / "secret.json", out / "adapter" / "weights.safetensors")


def fifo(out: Path, _victim: Path) -> None:
    folder(out / "adapter", {"adapter_config.json": {}})
    os.mkfifo(out / "adapter" / "weights.safetensors")


def open_socket(out: Path, _victim: Path) -> None:
    folder(out / "adapter", {"adapter_config.json": {}})
    os.chdir(out / "adapter")
    with socket.socket(socket.AF_UNIX) as end:
        end.bind("weights.safetensors")
    os.chdir(out)


def file_for_folder(out: Path, _victim: Path) -> None:
    (out / "adapter").write_text("{}")


def events_fifo(out: Path, _victim: Path) -> None:
    time.sleep(0.5)  # so that the supervisor reads already
    (out / "events.jsonl").unlink()
    os.mkfifo(out / "events.jsonl")
    time.sleep(600)


def events_link(out: Path, victim: Path) -> None:
    (out / "events.jsonl").unlink()
    (out / "events.jsonl").symlink_to(victim / "events.jsonl")
    time.sleep(600)


def stop_fifo(out: Path, _victim: Path) -> None:
    os.mkfifo(out / "stop")


def stop_link(out: Path, victim: Path) -> None:
    (out / "stop").symlink_to(victim / "made-by-the-supervisor")


def name_in_event(out: Path, victim: Path) -> None:
    tell(out, type="checkpoint", step=1, name=str(victim))
    tell(out, type="checkpoint", step=1, name=os.path.relpath(victim, out / "checkpoints"))
    folder(out / "adapter", {"adapter_config.json": {}})


def many_files(out: Path, _victim: Path) -> None:
    (out / "adapter").mkdir()
    for number in range(10_001):
        (out / "adapter" / f"part-{number}").touch()


def sparse_file(out: Path, _victim: Path) -> None:
    (out / "adapter").mkdir()
    disk = os.statvfs(out)
    for name in ("one.safetensors", "two.safetensors"):  # a single one of that size is refused by the kernel
        with (out / "adapter" / name).open("wb") as file:
            file.truncate(disk.f_blocks * disk.f_frsize // 2 + 1)


def deep_folders(out: Path, _victim: Path) -> None:
    here = out
    for _ in range(1500):
        os.mkdir("d")
        os.chdir("d")
    os.chdir(here)
    folder(out / "adapter", {"adapter_config.json": {}})


def daemon(out: Path, _victim: Path) -> None:
    subprocess.Popen(["sleep", "600"], start_new_session=True, env={})
    folder(out / "adapter", {"adapter_config.json": {}})


def memory(_out: Path, _victim: Path) -> None:
    """Hold more and more, a part in each of many processes, and report nothing."""
    while True:
        held = [b"x" * 2**26 for _ in range(4)]
        if os.fork():
            time.sleep(600)
        held.clear()


LAYS: dict[str, Callable[[Path, Path], None]] = {
    lay.__name__: lay
    for lay in (
        *(link_folder, link_file, dangling_link, hard_link, fifo, open_socket, file_for_folder, events_fifo),
        *(events_link, stop_fifo, stop_link, name_in_event, many_files, sparse_file, deep_folders, daemon),
        memory,
    )
}


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1]), Path(sys.argv[2])))
