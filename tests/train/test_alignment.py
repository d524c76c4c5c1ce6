"""Tokens' own bytes and the tokenizer's offsets tell the same tokens for a span of characters."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import AddedToken, Tokenizer, models, normalizers, pre_tokenizers, processors

from tests.train.tiny import make_tokenizer
from worker.train.token_spans import Alignment
from worker.train.word_cache import token_bytes

PIECES = ["", "a", "naïve", "🙂", " ", "   ", "\n", "\t", "<|im_end|>", "é", "e\u0301", "<mask>", "zu", "\U0010ffff"]


def byte_level(**changes: Any) -> Tokenizer:
    """The tiny tokenizer with some merges, so that tokens hold several bytes, and with parts of `changes`."""
    backend = make_tokenizer().backend_tokenizer
    vocabulary = backend.get_vocab(with_added_tokens=False)
    merges = [("Ġ", "Ġ"), ("Ġ", "a"), ("z", "u"), ("Ã", "©"), ("ð", "Ł")]
    vocabulary |= {"".join(pair): len(vocabulary) + place for place, pair in enumerate(merges)}
    backend.model = models.BPE(vocab=vocabulary, merges=merges)
    for part, value in changes.items():
        setattr(backend, part, value)
    return backend


def with_mask(backend: Tokenizer) -> Tokenizer:
    backend.add_tokens([AddedToken("<mask>", lstrip=True, rstrip=True)])
    return backend


TOKENIZERS = {
    "plain": byte_level(),
    "one word pattern": byte_level(pre_tokenizer=pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)),
    "prefix space": byte_level(pre_tokenizer=pre_tokenizers.ByteLevel(add_prefix_space=True)),
    "composing": byte_level(normalizer=normalizers.NFC()),
    "lower case": byte_level(normalizer=normalizers.Lowercase()),
    "mask": with_mask(byte_level()),
    "begins": byte_level(
        post_processor=processors.TemplateProcessing(single="<|im_start|> $A", special_tokens=[("<|im_start|>", 0)])
    ),
}


@pytest.mark.parametrize("name", TOKENIZERS)
def test_tokens_by_their_bytes_are_the_tokens_by_their_offsets(name: str) -> None:
    alignment = Alignment(TOKENIZERS[name])

    @given(st.lists(st.sampled_from(PIECES)), st.integers(0, 2**32))
    def compare(pieces: list[str], seed: int) -> None:
        text, dice = "".join(pieces), random.Random(seed)
        spans = [(start, dice.randint(start, len(text))) for start in (dice.randint(0, len(text)) for _ in range(2))]
        ids, mask = alignment.overlapping(text, spans, special_tokens=False)
        other_ids, other_mask = alignment._by_offsets(text, spans)
        assert ids.tolist() == other_ids.tolist()
        assert mask.tolist() == other_mask.tolist(), (text, spans)

    compare()


def test_spaces_that_a_tokenizer_leaves_out_of_its_offsets_belong_to_their_span() -> None:
    alignment = Alignment(byte_level(post_processor=processors.ByteLevel(trim_offsets=True)))
    text, spans = "a:\n    zu\n", [(2, 9)]

    for ids, mask in (
        alignment.overlapping(text, spans, special_tokens=False),
        alignment._by_offsets(text, spans),
    ):
        assert b"".join(token_bytes(alignment._backend)[one] for one in ids[mask]) == b"\n    zu"


def test_a_vocabulary_of_characters_is_aligned_by_offsets(tmp_path: Path) -> None:
    backend = Tokenizer(models.WordLevel({"▁ja": 0, "nein": 1, "?": 2}, unk_token="?"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()

    ids, mask = Alignment(backend).overlapping("nein nein", [(5, 9)], special_tokens=False)

    assert token_bytes(backend) is None
    assert (ids.tolist(), mask.tolist()) == ([1, 1], [False, True])
