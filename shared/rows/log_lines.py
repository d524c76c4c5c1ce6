"""What a program prints, as lines that may be kept and shown: plain text, no secrets, no line without an end."""

from __future__ import annotations

import codecs
import re
from collections.abc import Iterator
from typing import Final

from shared.rows.secrets import SecretFilter, hidden

# Of a line so much is shown, and so much is looked at: a secret that begins in what is shown ends in what is seen.
SHOWN_CHARACTERS: Final = 4_000
SEEN_CHARACTERS: Final = 8_000
# Colours, cursor moves and titles of terminals (ECMA-48, 5.4 and 8.3.89): gone without a trace.
_ORDERS: Final = re.compile(
    "\x1b\\[[0-?]{0,64}[ -/]{0,8}[@-~]|\x1b\\][^\x07\x1b\n]{0,2000}(\x07|\x1b\\\\)|\x1b[@-Z\\\\^_]"
)
_ENDS: Final = re.compile("\r\n|\r|\n")  # a progress bar that writes over itself becomes lines


def inert(line: str) -> str:
    """Without terminal orders; other control characters and marks of direction are shown as U+FFFD. Pure."""
    line = _ORDERS.sub("", line)
    if line.isprintable():
        return line
    return "".join(c if c.isprintable() or c == "\t" else "\ufffd" for c in line)


class LogLines:
    """From bytes as they come to finished lines, each with its line feed."""

    def __init__(self) -> None:
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")
        self._hide = SecretFilter()
        self._begun = ""
        self._over = 0  # characters of the line that nobody keeps

    def feed(self, data: bytes, *, final: bool = False) -> Iterator[str]:
        """The lines that are whole by now; with `final` the last one, too, which has no end."""
        text = self._begun + self._decoder.decode(data, final)
        at = 0
        for end in _ENDS.finditer(text):
            if end[0] == "\r" and end.end() == len(text) and not final:
                break  # its line feed may still come
            yield self._line(text[at : end.start()])
            at = end.end()
        self._begun = text[at:]
        if len(self._begun) > 2 * SEEN_CHARACTERS:
            # One more than what is seen, so that a carriage return at the end is not lost.
            self._over += len(self._begun) - SEEN_CHARACTERS - 1
            self._begun = self._begun[:SEEN_CHARACTERS] + self._begun[-1]
        if final and self._begun:
            yield self._line(self._begun)
            self._begun = ""

    def _line(self, raw: str) -> str:
        over, self._over = self._over, 0
        line = self._hide(inert(raw[:SEEN_CHARACTERS]))
        left = len(raw) + over - SHOWN_CHARACTERS
        if left > 0 and len(line) > SHOWN_CHARACTERS:
            line = f"{line[:SHOWN_CHARACTERS]} … [{left:,} characters of this line are left out]"
        elif over or len(raw) > SEEN_CHARACTERS:
            line = f"{line} … [the rest of this line is left out]"
        return f"{line}\n"


def safe_words(text: str) -> str:
    """The last words of a program, as a log line of ours may carry them. Pure."""
    return "\n".join(hidden(inert(line)) for line in text.splitlines())[-2000:]
