"""Finds text in rows that nobody may have meant to train on. The check of a file reports it and never refuses it."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Final

from shared.rows.secrets import holds_secret

_CONTROL_TOKEN: Final = re.compile(rb"<\|[a-z_]{2,40}\|>")
_PLACEHOLDERS: Final = (
    *(b"<image>", b"<video>", b"<audio>", b"<|image|>", b"<|image_pad|>", b"<image_soft_token>"),
    *(b"<|image_1|>", b"<img>"),
)


def oddities(line: bytes) -> Iterator[tuple[str, str]]:
    """Code and message of each. `line` is a row as JSON."""
    if holds_secret(line):
        yield "possible_secret", "A row seems to hold a secret (key or token); a trained model may repeat it."
    if b"<|" in line and _CONTROL_TOKEN.search(line):
        yield (
            "control_token_text",
            "A row's text spells a control token such as <|im_end|>; it is read as text, "
            "unless training.special_tokens is parse.",
        )
    if b"<" in line and any(mark in line for mark in _PLACEHOLDERS):
        yield (
            "media_placeholder",
            "A row's text holds a placeholder such as <image>; no picture, video or sound is trained, but the word is.",
        )
