"""What is told of a file on its way: a bar for people, lines for logs, and nothing of what is soon over."""

from __future__ import annotations

import io
from pathlib import Path

import httpx2
from openai import OpenAI
from rich.console import Console
from tunepool import requests
from tunepool.transfers import CountedFile, Transfer

MIB = 2**20


def test_a_log_has_a_line_in_ten_seconds_and_none_of_a_short_transfer() -> None:
    moments, told = iter([0.0, 1.0, 9.9, 10.0, 10.0, 19.0, 20.0, 20.0]), io.StringIO()
    console = Console(file=told, force_terminal=False, width=200)

    with Transfer("rows\x1b[2J.jsonl", 512 * MIB, console=console, clock=lambda: next(moments)) as transfer:
        transfer.at(MIB)
        transfer.at(100 * MIB)
        assert told.getvalue() == ""
        for count in (120, 200, 240):
            transfer.at(count * MIB)

    lines = told.getvalue().splitlines()
    assert [line.partition(": ")[2] for line in lines] == ["120 of 512 MiB", "240 of 512 MiB"]
    assert "\x1b" not in told.getvalue()


def test_a_terminal_has_a_bar_that_leaves_nothing_behind() -> None:
    told = io.StringIO()

    with Transfer("[red]rows[/red].jsonl", 2 * MIB, console=Console(file=told, force_terminal=True)) as transfer:
        transfer.at(MIB)
        transfer.at(2 * MIB)

    assert "[red]rows[/red].jsonl" in told.getvalue()


def test_a_file_that_is_sent_again_counts_from_its_beginning(tmp_path: Path) -> None:
    (tmp_path / "f").write_bytes(b"abcdef")
    counts: list[int] = []

    with CountedFile(tmp_path / "f", counts.append) as file:
        while file.read(4):
            pass
        file.seek(0)
        file.read(4)

    assert counts == [4, 6, 6, 4]


class Line(httpx2.BaseTransport):
    """Takes bodies piece by piece, and loses its first answer."""

    def __init__(self) -> None:
        self.bodies: list[list[int]] = []

    def handle_request(self, request: httpx2.Request) -> httpx2.Response:
        assert isinstance(request.stream, httpx2.SyncByteStream)
        self.bodies.append([len(piece) for piece in request.stream])
        if len(self.bodies) == 1:
            return httpx2.Response(503, headers={"retry-after-ms": "1"})
        return httpx2.Response(200, json={"id": "file-1", "object": "file"})


def test_an_upload_is_sent_in_pieces_and_again_after_a_lost_answer(tmp_path: Path) -> None:
    (tmp_path / "rows.jsonl").write_bytes(b"x" * 3 * MIB)
    line = Line()

    with OpenAI(base_url="http://there/v1", api_key="k", http_client=httpx2.Client(transport=line)) as client:
        assert requests.upload(client, tmp_path / "rows.jsonl").id == "file-1"

    assert [sum(body) > 3 * MIB for body in line.bodies] == [True, True]
    assert max(max(body) for body in line.bodies) <= MIB
