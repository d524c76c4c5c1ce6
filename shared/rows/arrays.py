"""A file that is one JSON array, as one item per line. One item is in memory at a time, as long as a line may be."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from typing import Final

from shared.rows.cells import RowRefused

ITEM_BYTES: Final = 8 * 1024 * 1024
# Possessive are characters only, never groups: with those, Python before 3.11.5 matches too little.
_STRING_BODY: Final = rb'[^"\\\n\r]*+(?:\\[^\n\r][^"\\\n\r]*+)*'
_INSIDE: Final = re.compile(_STRING_BODY)
# Up to the next bracket (and, between items, comma), past whole strings.
_DEEP: Final = re.compile(rb'(?:[^"{}\[\]]++|"%b")*' % _STRING_BODY)
_FLAT: Final = re.compile(rb'(?:[^"{}\[\],]++|"%b")*' % _STRING_BODY)
_SPACE: Final = b" \t\r\n"


def item_lines(chunks: Iterable[bytes]) -> Iterator[bytes]:
    """Stream the items of a JSON array as lines: line N is item N. What is in an item is for the reader of lines.

    Raises:
        RowRefused: the array does not end, something follows it, an item is missing or too long; `line` is the item's.
    """
    scan = _Scan()
    for chunk in chunks:
        yield from scan.feed(chunk)
    scan.end()


class _Scan:
    """Where in the array we are."""

    def __init__(self) -> None:
        self.held = b""
        self.begin = 0  # of the present item, in `held`
        self.place = 0  # up to which `held` has been looked at
        self.depth = 0
        self.items = 0
        self.after_comma = False
        self.closed = False

    def feed(self, chunk: bytes) -> Iterator[bytes]:
        self.held, self.place, self.begin = self.held[self.begin :] + chunk, self.place - self.begin, 0
        while not self.closed:
            match = (_FLAT if self.depth == 1 else _DEEP).match(self.held, self.place)
            self.place = match.end() if match else self.place
            mark = self.held[self.place : self.place + 1]
            if mark in {b"", b'"'}:
                self._refuse_line_break()
                break
            self.place += 1
            item = self._meet(mark)
            if item is not None:
                yield item
        if len(self.held) - self.begin > ITEM_BYTES:
            raise self.refused("line_too_long", f"the item is longer than {ITEM_BYTES:,} bytes; split the example")
        if self.closed:
            self._refuse_more()

    def end(self) -> None:
        """Raises RowRefused when the file ends before the array does."""
        if not self.closed:
            raise self.refused("truncated_json", "the file ends in the middle of the array; upload it again, whole")

    def _refuse_line_break(self) -> None:
        """A string that does not end goes on in the next chunk, unless a line break or so stands in it."""
        match = _INSIDE.match(self.held, self.place + 1)
        stop = self.held[match.end() : match.end() + 2] if match else b""
        if stop[:1] in {b"\n", b"\r"} or len(stop) == 2:
            message = r"a raw control character stands inside a string; escape it (\n, \t)"
            raise self.refused("invalid_json", message)

    def _meet(self, mark: bytes) -> bytes | None:
        """A bracket, or a comma between items; the item that ends there."""
        if mark in b"{[":
            if self.depth == 0:
                self.begin = self.place
            self.depth += 1
            return None
        if mark in b"}]":
            self.depth -= 1
            return self._item(last=True) if self.depth == 0 else None
        return self._item(last=False)

    def _item(self, *, last: bool) -> bytes | None:
        item = self.held[self.begin : self.place - 1].strip(_SPACE)
        if not item and (not last or self.after_comma):
            message = "a comma stands where an item should be; remove the comma before it"
            if last:
                message = "a comma stands before the closing bracket; remove it"
            raise self.refused("invalid_json", message)
        self.items += bool(item)
        self.begin, self.after_comma, self.closed = self.place, not last, last
        return item.replace(b"\n", b" ").replace(b"\r", b" ") + b"\n" if item else None

    def _refuse_more(self) -> None:
        if self.held[self.begin :].strip(_SPACE):
            message = "something follows the array; write one array, or one object per line without brackets around"
            raise RowRefused(message, line=max(1, self.items), code="invalid_json", unit="item")
        self.held, self.begin, self.place = b"", 0, 0

    def refused(self, code: str, message: str) -> RowRefused:
        return RowRefused(message, line=self.items + 1, code=code, unit="item")
