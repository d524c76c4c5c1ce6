"""A server on loopback that answers GET and HEAD by a function of its test."""

from __future__ import annotations

import contextlib
import re
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

# (path without its query, what the header Authorization holds) -> (status, content, headers)
Answer = Callable[[str, str | None], tuple[int, bytes, dict[str, str]]]


@contextlib.contextmanager
def answering(answer: Answer) -> Iterator[str]:
    """Where it listens, until the block ends. It knows ranges of bytes."""

    class Answers(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            status, content, headers = answer(self.path.partition("?")[0], self.headers.get("Authorization"))
            asked = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", ""))
            if status == 200 and asked is not None:
                whole, begin = len(content), int(asked[1])
                content, status = content[begin : int(asked[2] or whole) + 1], 206
                headers |= {"Content-Range": f"bytes {begin}-{begin + len(content) - 1}/{whole}"}
            self.send_response(status)
            for name, value in (headers | {"Content-Length": str(len(content))}).items():
                self.send_header(name, value)
            self.end_headers()
            if self.command == "GET":
                self.wfile.write(content)

        def do_HEAD(self) -> None:
            self.do_GET()

        def log_message(self, *_: object) -> None:
            """Say nothing."""

    server = ThreadingHTTPServer(("127.0.0.1", 0), Answers)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        server.server_close()
