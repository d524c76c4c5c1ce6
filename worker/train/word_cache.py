"""Caches the tokens of words for byte-level tokenizers: most words of a file have been seen before.

Such a tokenizer cuts a text at its added tokens, the pieces into words by a pattern, and finds the tokens of each word
by itself. The patterns of today's models are written here for Python, which cuts the words in a tenth of the time. The
tokenizer itself does the rest, where the result might differ: tokenizers with other parts, and texts with characters
whose kind is not settled.
"""

from __future__ import annotations

import json
import re
import unicodedata
from array import array
from collections.abc import Mapping, Sequence
from typing import Any, Final

import numpy as np
import numpy.typing as npt

REMEMBERED: Final = 1 << 16  # words: about 15 MB
LONGEST_REMEMBERED: Final = 64  # characters
# The tokenizer itself is the faster one for texts that hardly repeat their words (numbers, hashes).
TRIED: Final = 20_000  # words
MOST_NEW: Final = 0.25  # of them

_UNSETTLED: Final = {"Cn", "Co", "Cs"}  # not assigned, or not characters


def _kind(character: str) -> str:
    """L, N, Z and so on; ? where it may be another one elsewhere. Some take a long s for an s: "'s"."""
    # Python and the tokenizer go by Unicode's tables of different years: what those of 2002 have is the same in both.
    unsettled = unicodedata.ucd_3_2_0.category(character) in _UNSETTLED or character == "\u017f"
    return "?" if unsettled else unicodedata.category(character)[0]


_KINDS: Final = "".join(map(_kind, map(chr, range(0x10000))))


def _class(kinds: str) -> str:
    """The characters of some kinds, up to U+FFFF, as ranges of a pattern's class."""
    runs = re.finditer(f"[{kinds}]+", _KINDS)
    return "".join(f"{chr(run.start())}-{chr(run.end() - 1)}" for run in runs)


_L: Final = _class("L")
_N: Final = _class("N")
_S: Final = "\t-\r\x85" + _class("Z")
# Beyond U+FFFF only pictures are let in: none is an L, N or S, whether assigned or not.
_SETTLED: Final = re.compile(f"[{_class('^?')}\U0001f300-\U0001faff]*")

_ANY_OFFSETS: Final = {"trim_offsets": True}  # how offsets are told changes no token


def _split(pattern: str) -> dict[str, Any]:
    return {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": False} | _ANY_OFFSETS


def _bytes(*, by_words: bool) -> dict[str, Any]:
    return {"type": "ByteLevel", "add_prefix_space": False, "use_regex": by_words} | _ANY_OFFSETS


_ENDINGS: Final = "(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_LLAMA: Final = _ENDINGS + r"|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_LLAMA_HERE: Final = (
    rf"{_ENDINGS}|[^\r\n{_L}{_N}]?[{_L}]+|[{_N}]{{1,3}}| ?[^{_S}{_L}{_N}]+[\r\n]*"
    rf"|[{_S}]*[\r\n]+|[{_S}]+(?![^{_S}])|[{_S}]+"
)
_GPT2_HERE: Final = f"'s|'t|'re|'ve|'m|'ll|'d| ?[{_L}]+| ?[{_N}]+| ?[^{_S}{_L}{_N}]+|[{_S}]+(?![^{_S}])|[{_S}]+"
# Digits are cut out one by one before anything else, so the white space before one ends a piece.
_DIGITS_HERE: Final = f"'s|'t|'re|'ve|'m|'ll|'d| ?[{_L}]+|[{_N}]| ?[^{_S}{_L}{_N}]+|[{_S}]+(?![^{_S}{_N}])|[{_S}]+"

# The parts of a tokenizer that cut words, and the pattern that cuts the same.
_KNOWN: Final[list[tuple[list[dict[str, Any]], str]]] = [
    ([_bytes(by_words=True)], _GPT2_HERE),
    ([{"type": "Digits", "individual_digits": True} | _ANY_OFFSETS, _bytes(by_words=True)], _DIGITS_HERE),
    ([_split(_LLAMA), _bytes(by_words=False)], _LLAMA_HERE),
    ([_split(_LLAMA.replace("{1,3}", "")), _bytes(by_words=False)], _LLAMA_HERE.replace("{1,3}", "")),  # Qwen
]


class WordTokens:
    """The tokens of texts, word by word, of a tokenizer that makes them so."""

    def __init__(self, backend: Any, known: Sequence[bytes], *, word: str) -> None:
        added = backend.get_added_tokens_decoder()
        self._cut = re.compile(word).findall
        self._added = _splitter([token.content for token in added.values()])
        self._known = _Known(backend.model, known, added=frozenset(added))
        self._special = {token.content: np.int32(number).tobytes() for number, token in added.items()}
        self._composes = backend.normalizer is not None
        self._asked = 0

    def ids(self, text: str) -> npt.NDArray[np.int32] | None:
        """The ids of `text`; None when the tokenizer has to be asked."""
        if self._hardly_repeat() or not self._is_settled(text):
            return None
        return self._looked_up(self._added.split(text), self._special)

    def ids_of_pieces(self, pieces: Sequence[str], added: Mapping[str, int]) -> npt.NDArray[np.int32] | None:
        """The same of a text cut at its `added` tokens: every other piece is one. Those may be spelled otherwise."""
        if self._hardly_repeat() or not all(map(self._is_settled, pieces[::2])):
            return None
        return self._looked_up(pieces, {piece: np.int32(added[piece]).tobytes() for piece in set(pieces[1::2])})

    def _looked_up(self, pieces: Sequence[str], added: Mapping[str, bytes]) -> npt.NDArray[np.int32] | None:
        encoded = bytearray()
        for place, piece in enumerate(pieces):
            if place % 2:
                encoded += added[piece]
                continue
            words = self._cut(piece)
            self._asked += len(words)
            try:
                encoded += b"".join(map(self._known.__getitem__, words))
            except KeyError:
                return None
        return np.frombuffer(encoded, dtype=np.int32)

    def _hardly_repeat(self) -> bool:
        return self._asked > TRIED and self._known.new > MOST_NEW * self._asked

    def _is_settled(self, text: str) -> bool:
        if text.isascii():
            return True
        return _SETTLED.fullmatch(text) is not None and (not self._composes or unicodedata.is_normalized("NFC", text))


class _Known(dict[str, bytes]):
    """The ids of words.

    Raises KeyError for a word that its tokens do not give back byte for byte, or that is an added token to the model.
    """

    def __init__(self, model: Any, known: Sequence[bytes], *, added: frozenset[int]) -> None:
        super().__init__()
        self._model, self._bytes, self._added = model, known, added
        self.new = 0

    def __missing__(self, word: str) -> bytes:
        self.new += 1
        data = word.encode()
        ids = [token.id for token in self._model.tokenize(data.decode("latin-1").translate(_WRITTEN))]
        if b"".join(map(self._bytes.__getitem__, ids)) != data or not self._added.isdisjoint(ids):
            raise KeyError(word)
        encoded = array("i", ids).tobytes()
        if len(self) < REMEMBERED and len(word) <= LONGEST_REMEMBERED:
            self[word] = encoded
        return encoded


def words_of(backend: Any, known: Sequence[bytes]) -> WordTokens | None:
    """The words of a tokenizer; None for one that is not known to make its tokens word by word."""
    if backend.encode_special_tokens or getattr(backend.model, "dropout", None):
        return None
    if not _cuts_plainly(list(backend.get_added_tokens_decoder().values()), normalizer=_state(backend.normalizer)):
        return None
    state = _state(backend.pre_tokenizer)
    parts = [part | {"trim_offsets": True} for part in state.get("pretokenizers", [state])]
    word = next((here for theirs, here in _KNOWN if theirs == parts), None)
    return None if word is None else WordTokens(backend, known, word=word)


def _cuts_plainly(added: list[Any], *, normalizer: dict[str, Any]) -> bool:
    """Whether added tokens are found in the text as it is, all in one go, and take nothing around them along."""
    if any(token.lstrip or token.rstrip or token.single_word for token in added):
        return False
    normalized = {token.normalized for token in added}
    return (not normalizer and len(normalized) < 2) or (normalizer == {"type": "NFC"} and True not in normalized)


def _state(part: Any) -> dict[str, Any]:
    """The settings of a part of a tokenizer, as its file has them."""
    state: dict[str, Any] = {} if part is None else json.loads(part.__getstate__())
    return state


def _splitter(added: Sequence[str]) -> re.Pattern[str]:
    """Cuts a text at its added tokens and keeps them: at each place the longest."""
    longest_first = sorted(filter(None, added), key=len, reverse=True)
    return re.compile(f"({'|'.join(map(re.escape, longest_first)) or '(?!)'})")


def token_bytes(backend: Any) -> list[bytes] | None:
    """The bytes of each token by its id; None when the vocabulary is not written in GPT-2's alphabet."""
    added = backend.get_added_tokens_decoder()
    vocabulary = backend.get_vocab(with_added_tokens=False)
    spellings = [b""] * (max([*added, *vocabulary.values()], default=-1) + 1)
    try:
        for token, number in vocabulary.items():
            spellings[number] = bytes(map(_ALPHABET.__getitem__, token))
    except KeyError:
        return None
    for number, token in added.items():
        spellings[number] = token.content.encode()
    return spellings


def _alphabet() -> dict[str, int]:
    """GPT-2's character for each byte: itself where it can be seen, the next one from U+0100 on where not."""
    visible = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = (byte for byte in range(256) if byte not in visible)
    return {chr(byte): byte for byte in visible} | {chr(256 + place): byte for place, byte in enumerate(others)}


_ALPHABET: Final = _alphabet()
_WRITTEN: Final = {byte: character for character, byte in _ALPHABET.items()}
