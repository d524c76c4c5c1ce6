"""Which characters of a text each of its tokens stands for."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from worker.train.control_tokens import ControlTokens, Respelling
from worker.train.word_cache import token_bytes, words_of

Ids = npt.NDArray[np.int32]
Mask = npt.NDArray[np.bool_]
Span = tuple[int, int]  # characters, half open


class Alignment:
    """Encodes texts and finds the tokens that overlap given spans of characters.

    Where tokens are bytes (GPT-2's alphabet: most of today's tokenizers) their lengths tell it, as long as they give
    back the text byte for byte, which every text is checked for. That takes two thirds of the time of asking the
    tokenizer for offsets, which is done for all others. Words that were met before come from `word_cache`.
    """

    def __init__(self, backend: Any, controls: ControlTokens | None = None) -> None:
        self._backend = backend
        self._respelling = Respelling(backend, controls or ControlTokens(backend))
        self._bytes = token_bytes(backend)
        self._words = None if self._bytes is None else words_of(backend, self._bytes)
        self._sizes = np.asarray([len(spelling) for spelling in self._bytes or ()], dtype=np.int64)
        self._before, self._behind = _added_around(backend)

    def encode(self, text: str, *, own: Sequence[int] = ()) -> list[int]:
        """The ids of `text`. Control tokens that cover a place of `own` are text."""
        if own:
            return self._respelled(text, [], own)[0].tolist()
        known = self._known(text)
        return self._found(text) if known is None else known.tolist()

    def _known(self, text: str) -> Ids | None:
        return None if self._words is None else self._words.ids(text)

    def _found(self, text: str) -> list[int]:
        (encoded,) = self._backend.encode_batch_fast([text], add_special_tokens=False)
        ids: list[int] = encoded.ids
        return ids

    def overlapping(
        self, text: str, spans: Sequence[Span], *, special_tokens: bool, own: Sequence[int] = ()
    ) -> tuple[Ids, Mask]:
        """The ids of `text` (T,), and which of them overlap a span (T,).

        Control tokens that cover a place of `own` are text. With `special_tokens`, also those that the tokenizer adds
        by itself, unless the text has them already. What it adds behind (an end token) belongs to a span that reaches
        the end of the text.
        """
        ids, mask = self._respelled(text, spans, own) if own else self._plain(text, spans)
        if not special_tokens:
            return ids, mask
        before = self._before[: 0 if _begins(ids, self._before) else None]
        behind = self._behind[: 0 if _begins(ids[::-1], self._behind[::-1]) else None]
        at_end = bool(spans) and spans[-1][1] == len(text)
        masks = (np.zeros(len(before), dtype=np.bool_), mask, np.full(len(behind), at_end))
        return np.concatenate((before, ids, behind)), np.concatenate(masks)

    def _plain(self, text: str, spans: Sequence[Span]) -> tuple[Ids, Mask]:
        if self._bytes is not None:
            exact = self._known(text)
            if exact is None:
                exact = self._checked(text, self._bytes)
            if exact is not None:
                return exact, self._by_size(exact, spans if text.isascii() else _in_bytes(text, spans))
        return self._by_offsets(text, spans)

    def _by_offsets(self, text: str, spans: Sequence[Span]) -> tuple[Ids, Mask]:
        encoded = self._backend.encode(text, add_special_tokens=False)
        return _over_offsets(encoded.ids, encoded.offsets, spans)

    def _respelled(self, text: str, spans: Sequence[Span], own: Sequence[int]) -> tuple[Ids, Mask]:
        """As `_plain`, of a text some of whose control tokens are text."""
        respelled, tokens = self._respelling.respelled(text, own)
        if self._words is not None:
            exact = self._words.ids_of_pieces(tokens.split(respelled), tokens.ids)
            if exact is not None:
                return exact, self._by_size(exact, spans if text.isascii() else _in_bytes(text, spans))
        ids, offsets = tokens.encode(respelled)
        return self._by_size_or_offsets(text, ids, offsets, spans)

    def _by_size_or_offsets(
        self, text: str, ids: list[int], offsets: list[Span], spans: Sequence[Span]
    ) -> tuple[Ids, Mask]:
        if self._bytes is None or not self._give_back(text, ids, self._bytes):
            return _over_offsets(ids, offsets, spans)
        sized = np.asarray(ids, dtype=np.int32)
        return sized, self._by_size(sized, spans if text.isascii() else _in_bytes(text, spans))

    def _checked(self, text: str, known: Sequence[bytes]) -> Ids | None:
        """The ids of `text`, if they give it back byte for byte."""
        ids = self._found(text)
        return np.asarray(ids, dtype=np.int32) if self._give_back(text, ids, known) else None

    def _give_back(self, text: str, ids: Sequence[int], known: Sequence[bytes]) -> bool:
        return b"".join(map(known.__getitem__, ids)) == text.encode()

    def _by_size(self, ids: Ids, spans: Sequence[Span]) -> Mask:
        sizes = self._sizes[ids]
        ends = sizes.cumsum()
        edges = np.asarray(spans, dtype=np.int64).reshape(-1, 2)
        first, last = ends.searchsorted(edges[:, 0], "right"), (ends - sizes).searchsorted(edges[:, 1], "left")
        mask = np.zeros(len(ids), dtype=np.bool_)
        for start, end in zip(first.tolist(), last.tolist(), strict=True):
            mask[start:end] = True
        return mask


def runs_of(mask: Sequence[int], offsets: Sequence[Span]) -> list[Span]:
    """Character spans of the runs of ones in a token mask."""
    spans: list[Span] = []
    for position, (trained, (start, end)) in enumerate(zip(mask, offsets, strict=True)):
        if trained and position and mask[position - 1]:
            spans[-1] = (spans[-1][0], end)
        elif trained:
            spans.append((start, end))
    return spans


def _over_offsets(ids: Sequence[int], offsets: Sequence[Span], spans: Sequence[Span]) -> tuple[Ids, Mask]:
    starts, ends = np.asarray(offsets, dtype=np.int64).reshape(-1, 2).T
    mask = np.zeros(len(starts), dtype=np.bool_)
    for start, end in spans:
        # Of tokens that are white space alone, many tokenizers name the end only (trim_offsets).
        mask |= (ends > start) & np.where(ends > starts, starts < end, ends <= end)
    return np.asarray(ids, dtype=np.int32), mask


def _added_around(backend: Any) -> tuple[Ids, Ids]:
    """What a tokenizer adds by itself before a text and behind it: BOS, EOS or nothing."""
    plain, whole = (backend.encode("a", add_special_tokens=added).ids for added in (False, True))
    before = next((at for at in range(len(whole)) if whole[at : at + len(plain)] == plain), 0)
    return np.asarray(whole[:before], dtype=np.int32), np.asarray(whole[before + len(plain) :], dtype=np.int32)


def _begins(ids: Ids, added: Ids) -> bool:
    return np.array_equal(ids[: len(added)], added)


def _in_bytes(text: str, spans: Sequence[Span]) -> list[Span]:
    """Spans of characters as spans of UTF-8 bytes."""
    return [(len(text[:start].encode()), len(text[:end].encode())) for start, end in spans]
