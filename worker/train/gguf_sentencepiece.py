"""A SentencePiece vocabulary of pairs (Llama 2, TinyLlama) as llama.cpp's kind of tokenizer called `llama`.

llama.cpp joins the two neighbours that make the token with the highest score, whichever they are; tokenizers joins the
pair that comes first in its list of merges. Both are the same where that list has every pair that makes a token, in the
order of the tokens' scores. transformers makes it so from a `tokenizer.model`, whose scores are read back here from the
order. A list that is made otherwise is refused, and so is white space that llama.cpp would set elsewhere.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any, Final

import gguf

from shared.errors import Invalid

SPACE: Final = "\u2581"
_BYTE: Final = re.compile(r"<0x[0-9A-F]{2}>")
_NO_SCORE: Final = -1e6  # nothing is joined to it
_REPLACE: Final = {"type": "Replace", "pattern": {"String": " "}, "content": SPACE}
_PREPEND: Final = {"type": "Prepend", "prepend": SPACE}

JsonObject = dict[str, Any]


def is_sentencepiece(described: JsonObject) -> bool:
    """Whether a tokenizer.json was made from a SentencePiece vocabulary of pairs, its bytes included."""
    model = described["model"]
    return model.get("type") == "BPE" and bool(model.get("byte_fallback")) and bool(model.get("merges"))


def adds_space(described: JsonObject, *, chats_open_with_control: bool) -> bool:
    """Whether a space stands before every text, also behind a control token.

    A space before the first text alone is one that no chat has whose template begins with a control token; other texts
    lack it then. Raises Invalid where neither holds.
    """
    normal, before = described.get("normalizer"), described.get("pre_tokenizer")
    steps = (normal.get("normalizers", [normal]) if normal else []) if before is None else None
    if steps in ([_PREPEND, _REPLACE], [_REPLACE]):
        return steps == [_PREPEND, _REPLACE]
    match before:
        case {"type": "Metaspace", "replacement": "\u2581", "split": False, "prepend_scheme": str(scheme)} if (
            not normal
        ):
            pass
        case _:
            raise refused("SentencePiece with steps of its own before the pairs")
    if scheme != "first":
        return scheme == "always"
    if chats_open_with_control:
        return False
    raise refused("a space before the first text alone, where llama.cpp puts one behind each control token or none")


def scores(described: JsonObject) -> dict[str, float]:
    """The score of each token that is joined of two: less for each token that is joined before it. Raises Invalid."""
    merges = [merge.split(" ") if isinstance(merge, str) else merge for merge in described["model"]["merges"]]
    order: dict[str, float] = {}
    for left, right in merges:
        order.setdefault(left + right, -float(len(order)))
    listed = {(left, right) for left, right in merges}
    vocabulary = described["model"]["vocab"]
    joined = vocabulary.keys() - {token["content"] for token in described["added_tokens"]}
    missing = next((pair for token in joined for pair in _splits(token, vocabulary) if pair not in listed), None)
    if missing is not None:
        raise refused(f"SentencePiece without the pair {missing[0]!r} and {missing[1]!r}, which llama.cpp would join")
    return order


def _splits(token: str, vocabulary: JsonObject) -> Iterator[tuple[str, str]]:
    pairs = ((token[:place], token[place:]) for place in range(1, len(token)))
    return ((left, right) for left, right in pairs if left in vocabulary and right in vocabulary)


def kind_of(text: str, *, unknown: str | None) -> gguf.TokenType:
    """The kind of a token that is no added one."""
    if text == unknown:
        return gguf.TokenType.UNKNOWN
    return gguf.TokenType.BYTE if _BYTE.fullmatch(text) else gguf.TokenType.NORMAL


def write_scores(
    writer: gguf.GGUFWriter, tokens: list[str], described: JsonObject, *, chats_open_with_control: bool
) -> None:
    """Add the tokens' scores, and how spaces are set. Raises Invalid."""
    known = scores(described)
    writer.add_token_scores([known.get(token, _NO_SCORE) for token in tokens])
    writer.add_add_space_prefix(adds_space(described, chats_open_with_control=chats_open_with_control))


def refused(kind: str) -> Invalid:
    """`tokenizer_not_exported`: llama.cpp would cut text otherwise, or it is not known whether it would."""
    return Invalid(
        f"The tokenizer of this model ({kind}) is none that the export knows by llama.cpp's name for it. Merge the "
        "model (POST /v1/tunepool/merges) and convert it with llama.cpp's convert_hf_to_gguf.py.",
        code="tokenizer_not_exported",
        param="adapter",
    )
