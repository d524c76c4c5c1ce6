"""A large file in parts: `python bench/parted_upload.py [--mib N] [--s3] [--check]`, 2,048 MiB by default.

Starts an installation without a worker in a temporary folder, uploads random bytes by the official client's
`upload_file_chunked` (parts of 64 MiB) and, beside it, as much as one POST /v1/files takes at once; prints seconds,
MiB/s, and by how much the API process's peak of resident memory grew. Needs about five times the size on disk. With
`--s3` the store is moto's S3 server in a process of its own; it keeps all it has in memory or temporary files. With
`--check` there is a worker, the file is one of chat rows, and the peak of all the worker's processes while they check
it line by line is printed too.
"""

from __future__ import annotations

import argparse
import json
import os
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

import boto3
import botocore.exceptions
import psutil
from openai import OpenAI

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from bench.machine import header
from bench.plane.installation import Installation, installation

MIB = 1024 * 1024
BUCKET = "artifacts"
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


def write_rows(path: Path, *, mib: int) -> None:
    """Chat rows of 4 KiB, all different."""
    words = " ".join(f"word{number}" for number in range(480))
    with path.open("w", encoding="utf-8") as file:
        for number in range(mib * 256):
            messages = [{"role": "user", "content": f"{number} {words}"}, {"role": "assistant", "content": "yes"}]
            line = json.dumps({"messages": messages})
            file.write(line + " " * (4095 - len(line)) + "\n")


def measure_checked(place: Installation, client: OpenAI, path: Path) -> None:
    """The upload as `measure` has it, and then the worker's check."""
    api, worker = place.child("api.serve"), place.child("worker.app")
    Path(f"/proc/{api.pid}/clear_refs").write_text("5", encoding="ascii")
    before, begun, rest = peak_mib(api.pid), time.perf_counter(), resident_mib(worker)
    upload = client.uploads.upload_file_chunked(file=path, mime_type="application/jsonl", purpose="fine-tune")
    took, mib, peak = time.perf_counter() - begun, path.stat().st_size / MIB, rest
    assert upload.file is not None
    while (file := client.files.retrieve(upload.file.id)).status == "uploaded":
        peak = max(peak, resident_mib(worker))
        time.sleep(0.05)
    checked = time.perf_counter() - begun - took
    grown = peak_mib(api.pid) - before
    print(f"rows      {mib:6.0f} MiB {took:6.1f} s {mib / took:6.0f} MiB/s, peak of the API +{grown:.0f} MiB")
    print(f"{file.status} after {checked:.1f} s more, peak of the worker's processes {rest:.0f} +{peak - rest:.0f} MiB")


def resident_mib(process: psutil.Process) -> float:
    """Of a process and all that descend from it; shared pages count once for each."""
    total = 0
    for one in [process, *process.children(recursive=True)]:
        with suppress(psutil.NoSuchProcess):
            total += one.memory_info().rss
    return total / MIB


@contextmanager
def s3_server(folder: Path) -> Iterator[dict[str, str]]:
    """moto's server with a bucket, as settings of an installation."""
    port = free_port()
    endpoint, keys = f"http://127.0.0.1:{port}", {"aws_access_key_id": "test", "aws_secret_access_key": "test"}
    argv = [Path(sys.executable).parent / "moto_server", "-H", "127.0.0.1", "-p", str(port)]
    with (folder / "s3.log").open("wb") as log:
        server = subprocess.Popen(argv, stdout=log, stderr=log)
    try:
        client = boto3.client("s3", endpoint_url=endpoint, region_name="us-east-1", **keys)
        for _ in range(300):
            try:
                client.create_bucket(Bucket=BUCKET)
                break
            except botocore.exceptions.EndpointConnectionError:
                time.sleep(0.2)
        yield {
            "STORAGE_URL": f"s3://{BUCKET}/tunepool",
            "TUNEPOOL_STORAGE_ENDPOINT": endpoint,
            "TUNEPOOL_STORAGE_ACCESS_KEY": "test",
            "TUNEPOOL_STORAGE_SECRET_KEY": "test",
        }
    finally:
        server.terminate()
        server.wait(30)


def free_port() -> int:
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return int(one.getsockname()[1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--mib", type=int, default=2048)
    parser.add_argument("--s3", action="store_true")
    parser.add_argument("--check", action="store_true")
    arguments = parser.parse_args()
    print(header(), flush=True)
    with tempfile.TemporaryDirectory(prefix="parted-upload-") as folder, ExitStack() as stack:
        path = Path(folder) / "rows.bin"
        settings = stack.enter_context(s3_server(Path(folder))) if arguments.s3 else {}
        place = stack.enter_context(installation(Path(folder) / "home", worker=arguments.check, **settings))
        host, port = place.address
        with OpenAI(base_url=f"http://{host}:{port}/v1", api_key=place.key, max_retries=0) as client:
            if arguments.check:
                write_rows(path, mib=arguments.mib)
                measure_checked(place, client, path)
                return
            write_random(path, mib=min(arguments.mib, WHOLE_MIB - 1))
            measure(place, client, path, parted=False)
            write_random(path, mib=arguments.mib)
            measure(place, client, path, parted=True)


if __name__ == "__main__":
    main()
