"""What one upload costs, part by part: `python bench/uploads.py [MiB]`, 512 MiB by default.

Starts an installation without a worker in a temporary folder and sends random bytes over the loopback to POST /v1/files
from a bare socket (sendfile), three times. Prints MB/s, the processor time of the API process for each MB by thread
(the event loop, and all others), by how much its peak of resident memory grew, and as bounds of this machine in the
same run: sha256sum of the same bytes, and dd of them with fdatasync. Then the parts alone, in this process: reading the
form, hashing, and the store. Needs about four times the size on disk.
"""

from __future__ import annotations

import asyncio
import hashlib
import json
import os
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Callable
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from obstore.store import LocalStore
from python_multipart.multipart import MultipartParser

from bench.machine import header
from bench.parted_upload import MIB, peak_mib, write_random
from bench.plane.installation import Installation, installation
from shared.store.storage import Store

RUNS = 3
BOUNDARY = b"a-mark-that-no-file-holds"
ARRIVING_BYTES = 256 * 1024  # what a read of a socket brings at most, and the server hands on
TICKS = os.sysconf("SC_CLK_TCK")


def thread_seconds(pid: int) -> tuple[float, float]:
    """Processor seconds of a process's first thread, which is its event loop, and of all others together."""
    spent = {}
    for thread in Path(f"/proc/{pid}/task").iterdir():
        fields = (thread / "stat").read_text(encoding="ascii").rpartition(")")[2].split()
        spent[int(thread.name)] = (int(fields[11]) + int(fields[12])) / TICKS  # utime, stime (proc(5))
    return spent[pid], sum(spent.values()) - spent[pid]


def send(place: Installation, path: Path) -> float:
    """Seconds of one POST /v1/files of `path`."""
    head = (
        b'--%b\r\nContent-Disposition: form-data; name="purpose"\r\n\r\nuser_data\r\n'
        b'--%b\r\nContent-Disposition: form-data; name="file"; filename="rows.bin"\r\n\r\n' % (BOUNDARY, BOUNDARY)
    )
    tail = b"\r\n--%b--\r\n" % BOUNDARY
    length = len(head) + path.stat().st_size + len(tail)
    request = (
        f"POST /v1/files HTTP/1.1\r\nHost: tunepool\r\nAuthorization: Bearer {place.key}\r\nConnection: close\r\n"
        f"Content-Type: multipart/form-data; boundary={BOUNDARY.decode()}\r\nContent-Length: {length}\r\n\r\n"
    )
    began = time.perf_counter()
    with socket.create_connection(place.address) as line, path.open("rb") as file:
        line.sendall(request.encode() + head)
        line.sendfile(file)
        line.sendall(tail)
        answer = b"".join(iter(lambda: line.recv(65536), b""))
    took = time.perf_counter() - began
    status, _, rest = answer.partition(b"\r\n")
    if b" 200 " not in status:
        raise RuntimeError(answer.decode(errors="replace")[:500])
    assert json.loads(rest.partition(b"\r\n\r\n")[2])["bytes"] == path.stat().st_size
    return took


def upload(place: Installation, path: Path, *, bound: float) -> None:
    api, mb = place.child("api.serve").pid, path.stat().st_size / 1e6
    Path(f"/proc/{api}/clear_refs").write_text("5", encoding="ascii")  # the peak begins anew (proc(5))
    before, peak = thread_seconds(api), peak_mib(api)
    took = send(place, path)
    after, grown = thread_seconds(api), peak_mib(api) - peak
    loop, others = ((now - then) * 1000 / mb for now, then in zip(after, before, strict=True))
    print(
        f"upload           {took:6.2f} s {mb / took:6.0f} MB/s, {took / bound:.2f} of the bound; processor ms/MB:"
        f" event loop {loop:.2f}, other threads {others:.2f}; peak +{grown:.0f} MiB"
    )


def bounds(path: Path, copy: Path) -> float:
    """Seconds of sha256sum and dd of the same bytes, one after the other."""
    mb, total = path.stat().st_size / 1e6, 0.0
    commands = (
        ["sha256sum", str(path)],
        ["dd", f"if={path}", f"of={copy}", "bs=8M", "conv=fdatasync"],
    )
    for command in commands:
        began = time.perf_counter()
        subprocess.run(command, check=True, capture_output=True)
        took = time.perf_counter() - began
        total += took
        print(f"{command[0]:16} {took:6.2f} s {mb / took:6.0f} MB/s")
    copy.unlink()
    return total


def alone(name: str, mb: float, work: Callable[[], None]) -> None:
    """Wall and processor time of one part of the way, in this process."""
    began, spent = time.perf_counter(), time.process_time()
    work()
    took, used = time.perf_counter() - began, time.process_time() - spent
    print(f"{name:16} {took:6.2f} s {mb / took:6.0f} MB/s, processor {used * 1000 / mb:.2f} ms/MB")


def parts(path: Path, folder: Path) -> None:
    content = path.read_bytes()
    pieces = [content[start : start + ARRIVING_BYTES] for start in range(0, len(content), ARRIVING_BYTES)]
    mb = len(content) / 1e6

    def parse() -> None:
        parser = MultipartParser(BOUNDARY, {})
        parser.write(b'--%b\r\nContent-Disposition: form-data; name="file"\r\n\r\n' % BOUNDARY)
        for piece in pieces:
            parser.write(piece)

    def digest() -> None:
        state = hashlib.sha256()
        for piece in pieces:
            state.update(piece)

    async def arriving() -> AsyncIterator[bytes]:
        for piece in pieces:
            yield piece

    async def put() -> None:
        await Store(LocalStore(prefix=str(folder), mkdir=True)).put_stream("alone", arriving())

    alone("form alone", mb, parse)
    alone("sha256 alone", mb, digest)
    alone("store alone", mb, lambda: asyncio.run(put()))


def main() -> None:
    mib = int(sys.argv[1]) if len(sys.argv) > 1 else 512
    print(header())
    with tempfile.TemporaryDirectory(prefix="uploads-") as name:
        folder = Path(name)
        path = folder / "rows.bin"
        write_random(path, mib=mib)
        bound = bounds(path, folder / "copy.bin")
        limit = {"TUNEPOOL_MAX_FILE_BYTES": str(mib * MIB)}
        with installation(folder / "home", worker=False, **limit) as place:
            for _ in range(RUNS):
                upload(place, path, bound=bound)
        parts(path, folder / "store")


if __name__ == "__main__":
    main()
