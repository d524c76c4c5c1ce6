"""Which characters of a text each of its tokens stands for."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

Ids = npt.NDArray[np.int32]
Mask = npt.NDArray[np.bool_]
Span = tuple[int, int]  # characters, half open


class Alignment:
    """Encodes texts and finds the tokens that overlap given spans of characters.

    Where tokens are bytes (GPT-2's alphabet: most of today's tokenizers) their lengths tell it, as long as they give
    back the text byte for byte, which every text is checked for. That takes two thirds of the time of asking the
    tokenizer for offsets, which is done for all others.
    """

    def __init__(self, backend: Any) -> None:
        self._backend = backend
        self._bytes = token_bytes(backend)
        self._sizes = np.asarray([len(one) for one in self._bytes or ()], dtype=np.int64)
        self._adds_tokens = backend.num_special_tokens_to_add(is_pair=False) > 0

    def encode(self, text: str, *, special_tokens: bool = False) -> list[int]:
        """The ids of `text`."""
        (encoded,) = self._backend.encode_batch_fast([text], add_special_tokens=special_tokens)
        ids: list[int] = encoded.ids
        return ids

    def overlapping(self, text: str, spans: Sequence[Span], *, special_tokens: bool) -> tuple[Ids, Mask]:
        """The ids of `text` (T,), and which of them overlap a span (T,)."""
        if self._bytes is not None and not (special_tokens and self._adds_tokens):
            ids, data = self.encode(text), text.encode()
            if b"".join(map(self._bytes.__getitem__, ids)) == data:
                found = np.asarray(ids, dtype=np.int32)
                return found, self._by_size(found, spans if text.isascii() else _in_bytes(text, spans))
        return self._by_offsets(text, spans, special_tokens=special_tokens)

    def _by_size(self, ids: Ids, spans: Sequence[Span]) -> Mask:
        sizes = self._sizes[ids]
        ends = sizes.cumsum()
        edges = np.asarray(spans, dtype=np.int64).reshape(-1, 2)
        first, last = ends.searchsorted(edges[:, 0], "right"), (ends - sizes).searchsorted(edges[:, 1], "left")
        mask = np.zeros(len(ids), dtype=np.bool_)
        for start, end in zip(first.tolist(), last.tolist(), strict=True):
            mask[start:end] = True
        return mask

    def _by_offsets(self, text: str, spans: Sequence[Span], *, special_tokens: bool) -> tuple[Ids, Mask]:
        encoded = self._backend.encode(text, add_special_tokens=special_tokens)
        starts, ends = np.asarray(encoded.offsets, dtype=np.int64).reshape(-1, 2).T
        mask = np.zeros(len(starts), dtype=np.bool_)
        for start, end in spans:
            # Of tokens that are white space alone, many tokenizers name the end only (trim_offsets).
            mask |= (ends > start) & np.where(ends > starts, starts < end, ends <= end)
        return np.asarray(encoded.ids, dtype=np.int32), mask


def token_bytes(backend: Any) -> list[bytes] | None:
    """The bytes of each token by its id; None when the vocabulary is not written in GPT-2's alphabet."""
    added = backend.get_added_tokens_decoder()
    vocabulary = backend.get_vocab(with_added_tokens=False)
    found = [b""] * (max([*added, *vocabulary.values()], default=-1) + 1)
    try:
        for token, number in vocabulary.items():
            found[number] = bytes(map(_ALPHABET.__getitem__, token))
    except KeyError:
        return None
    for number, token in added.items():
        found[number] = token.content.encode()
    return found


def _alphabet() -> dict[str, int]:
    """GPT-2's character for each byte: itself where it can be seen, the next one from U+0100 on where not."""
    visible = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = (byte for byte in range(256) if byte not in visible)
    return {chr(byte): byte for byte in visible} | {chr(256 + place): byte for place, byte in enumerate(others)}


_ALPHABET = _alphabet()


def _in_bytes(text: str, spans: Sequence[Span]) -> list[Span]:
    """Spans of characters as spans of UTF-8 bytes."""
    return [(len(text[:start].encode()), len(text[:end].encode())) for start, end in spans]
