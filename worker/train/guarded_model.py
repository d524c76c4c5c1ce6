"""A tokenizer's model that cannot write some words of its vocabulary.

Unigram models and those of SentencePiece have `<s>` and the like among their pieces, and would make the token of a text
that spells it. SentencePiece itself never does.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any, Final

from tokenizers import Tokenizer

_AROUND: Final[dict[str, Any]] = {
    "version": "1.0",
    "truncation": None,
    "padding": None,
    "added_tokens": [],
    "normalizer": None,
    "pre_tokenizer": None,
    "post_processor": None,
    "decoder": None,
}


def without_words(model: Any, spelling: Mapping[str, str]) -> Any:
    """`model` with the words of `spelling` spelled otherwise in its vocabulary, ids unchanged."""
    state = json.loads(model.__getstate__())
    words = state["vocab"]
    if isinstance(words, dict):
        state["vocab"] = {spelling.get(word, word): number for word, number in words.items()}
    else:  # Unigram's, with a score each
        state["vocab"] = [[spelling.get(word, word), score] for word, score in words]
    if "merges" in state:
        state["merges"] = [
            pair for pair in map(_pair, state["merges"]) if spelling.keys().isdisjoint((*pair, "".join(pair)))
        ]
    if isinstance(unknown := state.get("unk_token"), str):
        state["unk_token"] = spelling.get(unknown, unknown)
    return Tokenizer.from_str(json.dumps(_AROUND | {"model": state})).model


def _pair(merge: Any) -> tuple[str, str]:
    left, right = merge.split(" ") if isinstance(merge, str) else merge
    return left, right
