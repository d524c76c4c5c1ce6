"""A large file in parts: `python bench/parted_upload.py [MiB]`, 2,048 MiB by default.

Starts an installation without a worker in a temporary folder, uploads random bytes by the official client's
`upload_file_chunked` (parts of 64 MiB) and, beside it, as much as one POST /v1/files takes at once; prints seconds,
MiB/s, and by how much the API process's peak of resident memory grew. Needs about five times the size on disk.
"""

from __future__ import annotations

import os
import sys
import tempfile
import time
from pathlib import Path

from openai import OpenAI

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from bench.plane.installation import Installation, installation

MIB = 1024 * 1024
WHOLE_MIB = 512  # TUNEPOOL_MAX_FILE_BYTES


def write_random(path: Path, *, mib: int) -> None:
    with path.open("wb") as file:
        for _ in range(mib):
            file.write(os.urandom(MIB))


def peak_mib(pid: int) -> float:
    status = Path(f"/proc/{pid}/status").read_text(encoding="ascii")
    return next(int(line.split()[1]) / 1024 for line in status.splitlines() if line.startswith("VmHWM"))


def measure(place: Installation, client: OpenAI, path: Path, *, parted: bool) -> None:
    api = place.child("api.serve").pid
    Path(f"/proc/{api}/clear_refs").write_text("5", encoding="ascii")  # the peak begins anew (proc(5))
    before, begun = peak_mib(api), time.perf_counter()
    if parted:
        client.uploads.upload_file_chunked(file=path, mime_type="application/octet-stream", purpose="user_data")
    else:
        client.files.create(file=path, purpose="user_data")
    took, mib = time.perf_counter() - begun, path.stat().st_size / MIB
    way = "in parts" if parted else "whole"
    print(f"{way:9} {mib:6.0f} MiB {took:6.1f} s {mib / took:6.0f} MiB/s, peak +{peak_mib(api) - before:.0f} MiB")


def main() -> None:
    mib = int(sys.argv[1]) if len(sys.argv) > 1 else 2048
    with tempfile.TemporaryDirectory(prefix="parted-upload-") as folder:
        path = Path(folder) / "rows.bin"
        with installation(Path(folder) / "home", worker=False) as place:
            host, port = place.address
            with OpenAI(base_url=f"http://{host}:{port}/v1", api_key=place.key, max_retries=0) as client:
                write_random(path, mib=min(mib, WHOLE_MIB - 1))
                measure(place, client, path, parted=False)
                write_random(path, mib=mib)
                measure(place, client, path, parted=True)


if __name__ == "__main__":
    main()
